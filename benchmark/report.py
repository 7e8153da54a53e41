"""Statistics and figures of finished and running runs.

    python benchmark/report.py runs/ --out report/

Folders given are runs or hold runs; several may be given. --out receives:

    report.md        settings, versions, warnings, tables, figures, and the state of every run
    scores.csv       one row per run: state, versions, final evaluation
    games.csv        per game and variant: mean and standard deviation (ddof 1) over seeds
    aggregates.csv   per variant: IQM, mean, median, optimality gap, predicted Atari-57 median, with intervals
    profiles.csv     per variant: performance profile, the share of its scores above each threshold, with intervals
    improvement.csv  per comparison and game; comparisons.csv: per comparison, over its games, with intervals
    curves.csv       per run at 200 points of training: return, divergence, KL divergence, noise scale, rollout length
    figures/         PNG and PDF

A variant is a script with the settings that matter for the result; where and how a run was computed does not, and neither do
the settings of adaptation where the rollout is fixed. Definitions:

* Score: mean of the final evaluation (eval.json). HNS: its human-normalised score, 0 for a random player, 1 for a human.
* Aggregates (Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice", arXiv 2108.13264) are
  rliable's: IQM, the mean of the middle half of all HNS of a variant (of all, where there are three or fewer); mean and median
  over games of the mean over seeds; optimality gap, the mean shortfall from HNS 1. Performance profile: the share of a
  variant's runs whose HNS exceeds a threshold. All are taken over the games that all variants share, with as many seeds (the
  lowest) as every one of these games has. Variants with at most half as many games as another are left out.
* Comparisons of two variants are taken over the games that these two share, with as many seeds as every one of these games
  has; improvement.csv and its figures, game by game, with all seeds.
* Intervals: 95 % stratified bootstrap (percentile) over seeds, for which at least two seeds are needed. They are about these
  games, not about others.
* p: two-sided permutation test of the mean difference in HNS between A and B, which holds with few seeds too. It is the share
  of all ways to deal the runs of each game out to A and B, as many to each as they have, that differ by at least as much; of
  20,000 random ways where there are more. Not corrected for the number of comparisons.
* Probability of improvement of A over B: mean over their common games of the probability that a run of A scores higher than
  a run of B (ties count half).
* Improvement of A over B in a game: 100 * (HNS of A - HNS of B) / max(1, HNS of B) percent, the measure of Wang et al.,
  "Dueling Network Architectures" (arXiv 1511.06581), which the small score of a baseline cannot blow up.
* Predicted Atari-57 median (Aitchison et al., "Atari-5", arXiv 2210.02019) from the ten games of Atari-10 with weights w:
  10^(sum of w * log10(1 + max(0, x))) - 1, x being the mean HNS of a game in percent.
* Curves: mean of what was logged in the trailing --window of training; a return belongs to the step at which its game ended.
  No line is drawn where no game of a run ended for more than 5 % of training.
"""

import argparse
import ast
import contextlib
import hashlib
import itertools
import json
import math
import re
import shutil
import sys
import tempfile
import textwrap
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from plot_run import can_write, read_scalars
from rliable import library as rly
from rliable import metrics

FAMILIES = {
    "pqn_abs_atari.py": "PQN",
    "pqn_l_abs_atari.py": "PQN-L",
    "pqn_xl_abs_atari.py": "PQN-XL",
    "ppo_abs_atari.py": "PPO",
    "gns_batch_atari.py": "GNS",
}
# Settings that do not change the result: those that a resumed run may change (MAY_CHANGE of the scripts), names, and what a
# run only logs. The game and the seed tell runs of one variant apart.
NO_MATTER = set(
    "device torch_deterministic track wandb_project_name wandb_entity capture_video video_episodes eval_episodes eval_epsilon "
    "eval_greedy eval_only model checkpoint_interval resume auto_resume compile cudagraphs microbatch_size env_pools "
    "env_threads torch_threads memory_format exp_name env_id seed log_noise_scale".split()
)
ADAPTATION = re.compile(
    "adapt_(interval|signal)|rollout_(length_min|length_max|smoothing)|(divergence|kl|noise_scale)_.*|schedule|"
    "reference_batch_size|scale_epochs"
)
SIGNAL = re.compile("(divergence|kl|noise_scale)_.*|schedule|reference_batch_size")
CURVES = {
    "episodic_return": "charts/episodic_return",
    "divergence": "abs/divergence",
    "kl": "abs/kl",
    "b_simple": "gns/b_simple",
    "rollout_length": "abs/rollout_length",
}
YLABELS = {
    "episodic_return": "return",
    "divergence": "behavioral divergence",
    "kl": "KL(old || new), nats",
    "b_simple": "noise scale, samples",
}
FEW_SEEDS = 5
LONGEST_GAP = 0.05  # of training, without an ended game, that a curve of returns is drawn across
ATARI57 = pd.read_csv(Path(__file__).parent / "atari57_scores.csv", index_col="env_id")
ATARI10 = ATARI57["atari10_weight"].dropna()

# Okabe and Ito's colours, in an order that also falls apart in greyscale together with line style and marker
COLORS = ["#0072B2", "#E69F00", "#000000", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"]
LINES = ["-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (4, 3)), (0, (1, 3))]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
FONTS = {"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 8, "xtick.labelsize": 7}
FONTS |= {"ytick.labelsize": 7, "lines.linewidth": 1.2, "lines.markersize": 4, "axes.grid": True, "grid.alpha": 0.3}


# ---------------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------------


def find_runs(paths):
    """All run folders among the paths and directly below them."""
    folders = {}
    for path in paths:
        if not path.is_dir():
            sys.exit(f"error: {path} is no folder; give runs/ or single runs")
        is_run = (path / "args.json").exists() or any(path.glob("events.out.tfevents.*"))
        below = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
        folders |= {p.resolve(): p for p in ([path] if is_run else below)}
    return list(folders.values())


def read_json(path):
    """(content, None), or (None, what is wrong)."""
    try:
        content = json.loads(path.read_text())
        return (content, None) if isinstance(content, dict | list) else (None, f"{path.name} is damaged")
    except OSError:
        return None, f"no {path.name}"
    except ValueError:
        return None, f"{path.name} is damaged"


def is_evaluation(content):
    """Whether an eval.json holds what is read of it."""
    if not isinstance(content, dict) or "episodes" not in content or "mean" not in content:
        return False
    numbers = content["mean"], content["episodes"], content.get("human_normalized_score") or 0  # None: not one of the 57 games
    return all(isinstance(x, int | float) for x in numbers)


def windowed_means(steps, values, grid, window):
    """Mean of the values at steps in (g - window, g] for every g of the grid, NaN where there are none."""
    order = np.argsort(steps, kind="stable")
    steps, values = np.asarray(steps)[order], np.asarray(values, dtype=float)[order]
    starts, ends = np.searchsorted(steps, grid - window, side="right"), np.searchsorted(steps, grid, side="right")
    return np.array([values[a:b].mean() if b > a else np.nan for a, b in zip(starts, ends, strict=True)])


def read_run(folder, window=0.02, points=200):
    """A run as (row of scores.csv, args, curves); the last two are None if it cannot be read."""
    row = {"folder": str(folder), "run": folder.name, "state": "unreadable"}
    args, error = read_json(folder / "args.json")
    if error:
        return row | {"note": error}, None, None
    needed = "env_id exp_name seed total_timesteps num_envs num_steps adapt_rollout rollout_length_min rollout_length_max"
    missing = [name for name in needed.split() if name not in args]
    if missing:
        return row | {"note": f"args.json lacks {', '.join(missing)}"}, None, None
    try:
        scalars = read_scalars(folder)
    except Exception as e:  # of TensorBoard's and protobuf's many
        return row | {"note": f"the event files cannot be read ({type(e).__name__})"}, None, None
    if "abs/rollout_length" not in scalars:
        return row | {"note": "the event files hold no training step"}, None, None

    versions, error = read_json(folder / "versions.json")
    if not error and not (isinstance(versions, list) and all(isinstance(v, dict) for v in versions)):
        versions, error = None, "versions.json is damaged"
    names = "script", "source", "python", "torch", "envpool", "processor"
    # A run that was continued by something else has several entries
    row |= {name: " then ".join(dict.fromkeys(v.get(name, "unknown") for v in versions or [{}])) for name in names}
    if error:
        row["script"] = args["exp_name"] + (".py" if args["exp_name"] + ".py" in FAMILIES else "")
    total, step = args["total_timesteps"], int(max(scalars["abs/rollout_length"][0]))
    row |= {"env_id": args["env_id"], "seed": args["seed"], "step": step, "total_timesteps": total, "note": ""}
    row["diverged_before"] = (folder / "diverged.json").exists()

    evaluation, error = read_json(folder / "eval.json")
    longest = args["rollout_length_max"] if args["adapt_rollout"] else args["num_steps"]
    losses = [points for name, points in scalars.items() if name.startswith("losses/")]
    infinite = [int(s[~np.isfinite(v)].min()) for s, v in losses if not np.isfinite(v).all()]
    if infinite:
        row |= {"state": "diverged", "note": f"a loss is not finite at step {min(infinite):,} of {total:,}"}
    elif step + args["num_envs"] * longest <= total:
        written = max(f.stat().st_mtime for f in folder.glob("events.out.tfevents.*"))
        written = datetime.fromtimestamp(written).strftime("%Y-%m-%d %H:%M")
        note = f"step {step:,} of {total:,} ({step / total:.0%}), last event {written}"
        row |= {"state": "unfinished", "note": note}
    elif error or not is_evaluation(evaluation):
        end = "trained to the end" if (folder / "model.pt").exists() else "trained to the end or nearly so"
        row |= {
            "state": "not evaluated",
            "note": f"{end}, but {error or 'eval.json lacks the mean or the number of episodes'}",
        }
    else:
        row["state"] = "finished"
        row |= {"score": evaluation["mean"], "hns": evaluation.get("human_normalized_score")}
        row |= {"score_std_over_games": evaluation.get("std"), "eval_episodes": evaluation.get("episodes")}
        row["eval_policy"] = f"epsilon {evaluation['epsilon']}" if "epsilon" in evaluation else "sampled"
        if evaluation.get("greedy"):
            row["eval_policy"] = "greedy"
        row |= {name: evaluation.get(name) for name in ("distinct_games", "time_limits")}

    grid = np.linspace(total / points, total, points).round()
    grid = grid[grid < step + total / points]  # the last point of a finished run lies up to one rollout behind its last step
    curves = pd.DataFrame({"step": grid.astype(int)})
    for name, scalar in CURVES.items():
        if scalar in scalars:
            curves[name] = windowed_means(*scalars[scalar], grid, window * total)
    return row, args, curves


def family(script):
    return FAMILIES.get(script, script)


def signal_of(args):
    """What sets the rollout length: fixed, ABS, time or GNS."""
    if not args["adapt_rollout"]:
        return "fixed"
    return {"time": "time", "noise-scale": "GNS"}.get(args.get("adapt_signal"), "ABS")


def settings_of(args):
    """The settings of a run that matter for its result."""
    settings = {name: value for name, value in args.items() if name not in NO_MATTER}
    if not settings.get("schedule_timesteps"):
        settings.pop("schedule_timesteps", None)  # total_timesteps, as in runs of older scripts
    if not args["adapt_rollout"]:
        return {name: value for name, value in settings.items() if not ADAPTATION.fullmatch(name)}
    if not args.get("scale_epochs"):
        settings.pop("num_steps")
    if signal_of(args) == "time":
        return {name: value for name, value in settings.items() if not SIGNAL.fullmatch(name)}
    if signal_of(args) == "GNS":
        settings.pop("reference_batch_size")  # of the divergence, which it only logs
    return settings


def short_label(script, args):
    """Such as "PQN ABS 16-64" or "PQN fixed 32"."""
    signal = signal_of(args)
    name = family(script) if family(script) == signal else f"{family(script)} {signal}"
    if signal == "fixed":
        return f"{name} {args['num_steps']}"
    return f"{name} {args['rollout_length_min']}-{args['rollout_length_max']}"


def defaults_of(script):
    """The defaults of a script's settings, read from its source; none where that does not stand above this folder."""
    path = Path(__file__).resolve().parent.parent / script
    tree = ast.parse(path.read_text() if path.is_file() else "")
    fields = [n for c in tree.body if isinstance(c, ast.ClassDef) and c.name == "Args" for n in c.body]
    return {n.target.id: n.value.value for n in fields if isinstance(n, ast.AnnAssign) and isinstance(n.value, ast.Constant)}


def name_variants(scripts, all_args):
    """The variant of each run: its short label, and what differs from the usual among the runs of that label, which is the
    default where any of them has it (of what only an option needs: none), else what most have."""
    defaults = {script: defaults_of(script) for script in set(scripts)}
    labels = [short_label(script, args) for script, args in zip(scripts, all_args, strict=True)]
    settings = [settings_of(args) for args in all_args]
    names = []
    for label, own, script in zip(labels, settings, scripts, strict=True):
        alike = [s for other, s in zip(labels, settings, strict=True) if other == label]
        keys = sorted({k for s in alike for k in s})
        usual = {k: Counter(s.get(k, "unset") for s in alike).most_common(1)[0][0] for k in keys}
        shared = [k for k in keys if all(k in s for s in alike)]
        usual |= {k: defaults[script][k] for k in shared if defaults[script].get(k) in [s[k] for s in alike]}
        usual |= dict.fromkeys({"num_steps", "schedule_timesteps"} & (set(keys) - set(shared)), "unset")
        values = [(k, own.get(k, "unset")) for k in keys if own.get(k, "unset") != usual[k]]
        names.append(", ".join([label] + [f"{k} {v:,}" if type(v) is int else f"{k} {v}" for k, v in values]))
    return names


def read_runs(paths, window, jobs, out=None):
    """Table of all runs, args and settings of each variant, and curves of all runs that count. The folder `out` is no run."""
    folders = [folder for folder in find_runs(paths) if not out or folder.resolve() != out.resolve()]
    if not folders:
        sys.exit(f"error: no runs in {', '.join(map(str, paths))}; give a folder such as runs/")
    with ProcessPoolExecutor(jobs) if jobs > 1 else contextlib.nullcontext() as pool:
        read = list((pool.map if jobs > 1 else map)(read_run, folders, [window] * len(folders)))
    runs = pd.DataFrame([row for row, _, _ in read])
    if (runs["state"] == "unreadable").all():
        sys.exit(f"error: none of the {len(runs)} folders can be read as a run; {folders[0]}: {runs['note'][0]}")
    evaluation = "score", "hns", "score_std_over_games", "eval_episodes", "eval_policy", "distinct_games", "time_limits"
    for column in evaluation:
        if column not in runs:
            runs[column] = np.nan
    numbers = ["score", "hns", "distinct_games", "time_limits"]
    runs[numbers] = runs[numbers].astype(float)
    if runs["run"].duplicated().any():
        runs["run"] = runs["folder"]
    readable = [i for i, (_, args, _) in enumerate(read) if args]
    names = name_variants(runs["script"][readable], [read[i][1] for i in readable])
    runs["variant"] = pd.Series(names, index=readable, dtype=object)

    # Of several runs of one variant, game and seed the newest finished one counts, else the newest one
    runs["own_state"] = runs["state"]
    times = runs["folder"].str.extract(r"__(\d+)/*$")[0].astype(float).fillna(0)
    best_first = runs.assign(time=times, finished=runs["state"] == "finished").sort_values(["finished", "time"], kind="stable")
    for _, same in best_first.iloc[::-1].dropna(subset="variant").groupby(["variant", "env_id", "seed"]):
        for i in same.index[1:]:
            runs.loc[i, "note"] = f"{runs['state'][i]}; counts instead: {runs['run'][same.index[0]]} " + runs["note"][i]
            runs.loc[i, ["state", "note"]] = "duplicate", runs["note"][i].strip()
    variants = {runs["variant"][i]: {"script": runs["script"][i], "args": read[i][1]} for i in readable}
    curves = [read[i][2].assign(run=runs["run"][i]) for i in readable if runs["state"][i] != "duplicate"]
    order = {
        name: (list(FAMILIES.values()) + [family(v["script"])]).index(family(v["script"])) for name, v in variants.items()
    }
    variants = dict(sorted(variants.items(), key=lambda v: (order[v[0]], signal_of(v[1]["args"]) == "fixed", sort_key(v[0]))))
    return runs, variants, pd.concat(curves, ignore_index=True)


def sort_key(label):
    """Sorts numbers in a label as numbers."""
    return tuple(int(word) if word.isdigit() else word for word in re.split(r"(\d+)", label))


# ---------------------------------------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------------------------------------


def estimate(scores, function, reps):
    """Point estimates, lower and upper ends of their intervals; NaN for the ends where an array has one seed only.

    scores is (seeds, games), or a list of such arrays for a function of several.
    """
    np.random.seed(0)  # rliable 1.2.0 draws from NumPy's global state, whatever random_state it is given
    arrays = scores if isinstance(scores, list) else [scores]
    if min(len(a) for a in arrays) < 2:
        points = function(*arrays)
        return points, np.full_like(points, np.nan), np.full_like(points, np.nan)
    points, intervals = rly.get_interval_estimates({"x": scores}, function, reps=reps)
    return points["x"], *intervals["x"]


def score_matrix(scored, variant, games):
    """HNS (seeds, games) with as many seeds as every game has, the lowest first; and the number of runs left out."""
    own = scored[scored["variant"] == variant].sort_values("seed")
    columns = [own.loc[own["env_id"] == game, "hns"].to_numpy() for game in games]
    seeds = min(len(c) for c in columns)
    return np.stack([c[:seeds] for c in columns], axis=1), sum(len(c) - seeds for c in columns)


def aggregate_functions(scores):
    functions = metrics.aggregate_iqm, metrics.aggregate_mean, metrics.aggregate_median, metrics.aggregate_optimality_gap
    return np.array([f(scores) for f in functions])


def predicted_median(scores):
    """Predicted median HNS of the 57 games in percent from HNS (seeds, 10 games in the order of ATARI10)."""
    x = 100 * scores.mean(axis=0)
    return np.array([10 ** (ATARI10.to_numpy() @ np.log10(1 + np.maximum(0, x))) - 1])


def probability_of_improvement(x, y):
    """metrics.probability_of_improvement a hundred times faster, which the bootstrap needs."""
    return (np.sign(x[:, None] - y).mean() + 1) / 2


def relative_improvement(hns, baseline):
    """In percent, elementwise."""
    return 100 * (hns - baseline) / np.maximum(1, baseline)


def comparison_functions(x, y):
    """Probability of improvement, mean difference in HNS, mean improvement in percent."""
    x_mean, y_mean = x.mean(axis=0), y.mean(axis=0)
    improvement = relative_improvement(x_mean, y_mean).mean()
    return np.array([probability_of_improvement(x, y), (x_mean - y_mean).mean(), improvement])


def permutation_p(x, y, most=20_000):
    """Two-sided p-value of the difference in mean HNS between x (seeds, games) and y (other seeds, same games): permutation
    test within games, exact for up to `most` ways to permute, otherwise of as many random ones (and the observed one)."""
    both, n, games = np.concatenate([x, y]), len(x), x.shape[1]
    if math.comb(len(both), n) ** games <= most:
        chosen = np.array(list(itertools.combinations(range(len(both)), n)))
        x_sums = both[chosen].sum(axis=1)  # (ways, games)
        sums = [sum(ways) for ways in itertools.product(*x_sums.T)]
    else:
        shuffled = np.random.default_rng(0).permuted(np.broadcast_to(both, (most, *both.shape)), axis=1)
        sums = [x.sum(), *shuffled[:, :n].sum(axis=(1, 2))]
    centre = n / len(both) * both.sum()  # the sum of x at which the two means are equal
    return float(np.mean(np.abs(np.array(sums) - centre) >= abs(x.sum() - centre) - 1e-9))


def with_interval(row, names, estimates):
    for name, point, low, high in zip(names, *estimates, strict=True):
        row |= {name: point, f"{name}_low": low, f"{name}_high": high}
    return row


def shared_games(scored, variants):
    """(games of each variant, variants that are compared, games which all of these share)."""
    games = {v: set(scored.loc[scored["variant"] == v, "env_id"]) for v in variants}
    most = max((len(g) for g in games.values()), default=0)
    compared = [v for v in games if len(games[v]) > most / 2]
    return games, compared, sorted(set.intersection(*(games[v] for v in compared))) if compared else []


def aggregates(scored, variants, reps):
    """(aggregates.csv, notes)."""
    rows, notes = [], []
    games, compared, common = shared_games(scored, variants)
    most = max((len(g) for g in games.values()), default=0)
    few = [f"{v} ({len(games[v])})" for v in games if games[v] and v not in compared]
    if few:
        notes.append(f"Left out of the aggregates, with at most half of the {most} games of another: {'; '.join(few)}.")
    left_out = sorted(set().union(*(games[v] for v in compared)) - set(common)) if compared else []
    if left_out:
        names = ", ".join(map(game_name, left_out))
        notes.append(f"Left out of the aggregates, as not every variant has a score in them: {names}.")
    if compared and not common:
        notes.append("No aggregates: no game is common to all variants.")
    for variant in games:
        row = {"variant": variant}
        if variant in compared and common:
            scores, dropped = score_matrix(scored, variant, common)
            row |= {"seeds": len(scores), "games": len(common)}
            names = "iqm", "mean", "median", "optimality_gap"
            with_interval(row, names, estimate(scores, aggregate_functions, reps))
            if dropped:
                notes.append(
                    f"{variant}: {runs_word(dropped)} left out of the aggregates, as not every game has so many seeds."
                )
        if set(ATARI10.index) <= games[variant]:
            scores, _ = score_matrix(scored, variant, list(ATARI10.index))
            row["seeds_atari10"] = len(scores)
            with_interval(row, ["predicted_atari57_median"], estimate(scores, predicted_median, reps))
        if len(row) > 1:
            rows.append(row)
    return pd.DataFrame(rows), notes


def profiles(scored, variants, reps):
    """profiles.csv: a line for every score, where the profiles have their steps."""
    _, compared, common = shared_games(scored, variants)
    if not common:
        return pd.DataFrame()
    scores = {v: score_matrix(scored, v, common)[0] for v in compared}
    ends = np.concatenate([x.ravel() for x in scores.values()])
    thresholds = np.unique([min(0, ends.min()), *ends])
    tables = []
    for variant, x in scores.items():
        shares = estimate(x, lambda x: (x[..., None] > thresholds).mean(axis=(0, 1)), reps)
        columns = {"variant": variant, "seeds": len(x), "games": len(common), "hns": thresholds}
        tables.append(pd.DataFrame(columns | dict(zip(("share", "share_low", "share_high"), shares, strict=True))))
    return pd.concat(tables)


def comparison_pairs(variants):
    """Pairs (A, B) that differ in nothing but what sets the rollout length: adaptive over fixed (with --scale-epochs also in
    epochs); ABS over time, GNS and ABS with other settings, all with the same range; and the shortest rollout, fixed, over
    other fixed ones. Besides, bfloat16 over float32 where nothing else differs."""

    def rest(v):
        script = "pqn_abs_atari.py" if v["script"] == "gns_batch_atari.py" else v["script"]
        out = "num_steps", "adapt_rollout"
        return script, {k: x for k, x in settings_of(v["args"]).items() if k not in out and not ADAPTATION.fullmatch(k)}

    def bounds(v):
        return v["args"]["rollout_length_min"], v["args"]["rollout_length_max"]

    def epochs(v):
        return v["args"].get("scale_epochs"), settings_of(v["args"]).get("num_steps")

    def but_precision(v):
        return v["script"], settings_of(v["args"]) | {"precision": ""}

    for a, b in ((a, b) for b in variants for a in variants if a != b):
        if but_precision(variants[a]) == but_precision(variants[b]) and variants[a]["args"]["precision"] == "bfloat16":
            yield a, b
        if rest(variants[a]) != rest(variants[b]):
            continue
        signals = signal_of(variants[a]["args"]), signal_of(variants[b]["args"])
        if signals[0] == signals[1] == "fixed":
            adaptive = [v for v in variants.values() if rest(v) == rest(variants[a]) and v["args"]["adapt_rollout"]]
            if variants[a]["args"]["num_steps"] in [bounds(v)[0] for v in adaptive]:
                yield a, b
        elif signals[1] == "fixed":
            yield a, b
        elif signals[0] == "ABS" and bounds(variants[a]) == bounds(variants[b]):
            alike = epochs(variants[a]) == epochs(variants[b])
            if set(a.split(", ")) < set(b.split(", ")) if signals[1] == "ABS" else alike:
                yield a, b


def comparisons(scored, variants, reps):
    """(improvement.csv, comparisons.csv, notes)."""
    by_game, rows, notes = [], [], []
    for a, b in comparison_pairs(variants):
        own, other = scored[scored["variant"] == a], scored[scored["variant"] == b]
        games = sorted(set(own["env_id"]) & set(other["env_id"]))
        if not games:
            continue
        for game in games:
            x, y = own.loc[own["env_id"] == game, "hns"], other.loc[other["env_id"] == game, "hns"]
            row = {"variant": a, "baseline": b, "env_id": game, "seeds": len(x), "seeds_baseline": len(y)}
            row |= {"hns": x.mean(), "hns_baseline": y.mean(), "difference": x.mean() - y.mean()}
            by_game.append(row | {"improvement_percent": float(relative_improvement(x.mean(), y.mean()))})
        (x, dropped_x), (y, dropped_y) = score_matrix(scored, a, games), score_matrix(scored, b, games)
        if dropped_x + dropped_y:
            left_out = f"{runs_word(dropped_x + dropped_y)} left out of the comparison, as not every game has so many seeds"
            notes.append(f"{a} over {b}: {left_out}; improvement.csv, game by game, has all.")
        row = {"variant": a, "baseline": b, "seeds": len(x), "seeds_baseline": len(y), "games": len(games)}
        row["runs_left_out"] = dropped_x + dropped_y
        names = "probability_of_improvement", "mean_difference", "mean_improvement_percent"
        rows.append(with_interval(row, names, estimate([x, y], comparison_functions, reps)) | {"p": permutation_p(x, y)})
    return pd.DataFrame(by_game), pd.DataFrame(rows), notes


def per_game(finished):
    """games.csv."""
    if finished.empty:
        return pd.DataFrame(columns="env_id variant seeds score_mean score_std hns_mean hns_std".split())
    grouped = finished.groupby(["env_id", "variant"], sort=False)
    table = grouped.agg(
        seeds=("score", "size"),
        score_mean=("score", "mean"),
        score_std=("score", "std"),
        hns_mean=("hns", "mean"),
        hns_std=("hns", "std"),
    )
    return table.reset_index().sort_values(["env_id", "variant"], key=lambda c: c.map(sort_key))


# ---------------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------------


def game_name(env_id):
    return env_id.removesuffix("-v5")


def file_name(*words):
    """Of at most 120 characters: long ones are cut, and the hash of the whole keeps them apart."""
    name = re.sub(r"[^a-z0-9]+", "_", " ".join(words).lower()).strip("_")
    return name if len(name) <= 120 else f"{name[:111]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def runs_word(n):
    return f"{n} run{'s' * (n != 1)}"


def seeds_text(numbers):
    """Such as "3 seeds" or "1 to 3 seeds"."""
    low, high = int(min(numbers)), int(max(numbers))
    return f"{low} seed{'s' * (low != 1)}" if low == high else f"{low} to {high} seeds"


def runs_text(ended, running):
    """Such as "3 seeds" or "2 seeds; 1 run not ended"; ended and running are numbers of runs, one per game."""
    parts = [seeds_text([n for n in ended if n])] if any(ended) else []
    if sum(running):
        parts.append(f"{runs_word(sum(running))} not ended")
    return "; ".join(parts)


def legend(figure, handles, columns=2, **options):
    """A legend above the panels, in one column where labels are long."""
    if max(len(h.get_label()) for h in handles) > 45:
        columns = 1
    for h in handles:
        h.set_label(textwrap.fill(h.get_label(), 90))
    figure.set_figheight(figure.get_figheight() + 0.16 * -(-len(handles) // columns))
    figure.legend(handles=handles, loc="outside upper center", ncols=min(columns, len(handles)), handlelength=4, **options)


def panels(games):
    """A figure with one axis per game: (figure, dict from game to axis)."""
    columns = min(3, len(games))
    rows = -(-len(games) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(7, 1 + max(1.8, 3 - 0.6 * columns) * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(games) :]:
        axis.remove()
    for axis, game in zip(axes.flat, games, strict=False):
        axis.set_title(game_name(game))
    return figure, dict(zip(games, axes.flat, strict=False))


def seed_curves(curves, runs, column):
    """(table of runs trained to the end, table of the others): steps down, one column per run; missing values are nan."""
    own = curves[curves["run"].isin(runs["run"])] if column in curves else curves.iloc[:0].assign(**{column: np.nan})
    table = own.pivot(index="step", columns="run", values=column).dropna(axis=1, how="all")
    ended = table.columns.isin(runs.loc[runs["state"].isin(["finished", "not evaluated"]), "run"])
    return table.loc[:, ended], table.loc[:, ~ended]


def gap_sizes(values):
    """For each value of a series the number of consecutive missing ones to which it belongs, 0 where it is there."""
    missing = values.isna()
    return missing.groupby((~missing).cumsum()).transform("sum").where(missing, 0)


def draw_curve(axis, curves, runs, column, reps, style):
    """Draws the mean over seeds with its interval, and runs that have not ended one by one. Returns the number of seeds in
    the mean and of the others."""
    ended, running = seed_curves(curves, runs, column)
    if len(ended.columns):
        # No mean over some of the seeds: it would jump where another one joins or leaves
        values = ended.replace(np.inf, np.nan).interpolate(method="index", limit_area="inside")
        values = values.mask(np.isinf(ended))  # a noise scale without bound breaks the line
        if column == "episodic_return":
            values = values[ended.apply(gap_sizes) <= LONGEST_GAP * len(ended)]
        values = values.to_numpy().T[:, None]
        mean, low, high = estimate(values, lambda x: np.mean(x, axis=(0, 1)), min(reps, CURVE_REPS))
        millions = ended.index / 1e6
        axis.plot(millions, mean, markevery=0.2, **style)
        axis.fill_between(millions, low, high, color=style["color"], alpha=0.2, linewidth=0)
    for _, run in running.items():
        run = run.dropna().replace(np.inf, np.nan)
        thin = style | {"linewidth": 0.7, "markersize": 3}
        axis.plot(run.index / 1e6, run, markevery=0.2, **thin)
        last = run.dropna().iloc[-1:]
        axis.plot(last.index / 1e6, last, "x", color=style["color"], markersize=6, zorder=5)
    return len(ended.columns), len(running.columns)


CURVE_REPS = 300  # at most: an interval for every point of every curve
CURVE_NOTE = (
    "Agent steps (millions). Line: mean over runs that ended, where all of them have a value; "
    "shading: its 95 % bootstrap interval\n"
    f"({CURVE_REPS} replications; 2 seeds or more; from fewer than {FEW_SEEDS} too narrow, from 2 it is their range)"
)
RUNNING_NOTE = "; thin line that ends in a cross: one run that has not ended"
UNBOUNDED_NOTE = "; a gap: no bound to the noise scale"


def curve_note(column, running):
    return CURVE_NOTE + (UNBOUNDED_NOTE if column == "b_simple" else "") + (RUNNING_NOTE if running else "")


def curve_figure(curves, runs, styles, column, reps):
    """One panel per game, one line per variant."""
    runs = runs[runs["variant"].isin(styles) & (runs["state"] != "duplicate")]
    drawn = curves.loc[curves[column].notna(), "run"] if column in curves else []
    runs = runs[runs["run"].isin(drawn)]
    if runs.empty:
        return None
    figure, axes = panels(sorted(runs["env_id"].unique()))
    seeds, others = {}, {}
    for (game, variant), own in runs.groupby(["env_id", "variant"]):
        ended, running = draw_curve(axes[game], curves, own, column, reps, styles[variant])
        seeds.setdefault(variant, []).append(ended)
        others.setdefault(variant, []).append(running)
    for axis in axes.values():
        axis.set_xlim(left=0)
        if column == "divergence":
            axis.set_ylim(-0.02, 1.02)
        if column in ("kl", "b_simple"):
            axis.set_yscale("log")
    figure.supylabel(YLABELS[column], fontsize=8)
    handles = [plt.Line2D([], [], **styles[v], label=f"{v} ({runs_text(seeds[v], others[v])})") for v in styles if v in seeds]
    legend(figure, handles)
    figure.supxlabel(curve_note(column, any(map(sum, others.values()))), fontsize=7)
    return figure


def batch_figure(curves, runs, variant, args, reps):
    """Batch size and the signal that drives it, one panel per game."""
    column = "b_simple" if "noise_scale_window" in args else "kl" if "kl_min" in args else "divergence"
    runs = runs[(runs["variant"] == variant) & (runs["state"] != "duplicate")]
    if runs.empty:
        return None
    curves = curves.assign(batch_size=curves["rollout_length"] * args["num_envs"])
    games = sorted(runs["env_id"].unique())
    figure, axes = panels(games)
    styles = {"batch_size": {"color": "black", "linestyle": "-"}, column: {"color": "#D55E00", "linestyle": "--"}}
    seeds, others = [], []
    for i, game in enumerate(games):
        own, last = runs[runs["env_id"] == game], i % 3 == min(3, len(games)) - 1 or i == len(games) - 1
        twin = axes[game].twinx()
        twin.grid(False)
        ended, running = draw_curve(axes[game], curves, own, "batch_size", reps, styles["batch_size"])
        draw_curve(twin, curves, own, column, reps, styles[column])
        seeds.append(ended)
        others.append(running)
        low, high = (args["num_envs"] * args[f"rollout_length_{end}"] for end in ("min", "max"))
        axes[game].set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        axes[game].set_xlim(left=0)
        axes[game].tick_params(labelleft=i % 3 == 0)
        if column == "divergence":
            twin.set_ylim(-0.05, 1.05)
            twin.tick_params(labelright=last)
            if i % 3 == min(3, len(games)) - 1:
                twin.set_ylabel(YLABELS[column], color=styles[column]["color"])
        else:
            twin.set_yscale("log")
            twin.yaxis.set_minor_formatter(plt.NullFormatter())
    figure.supylabel("batch size, samples", fontsize=8)
    labels = {"batch_size": "batch size (left axis)", column: f"{YLABELS[column]} (right axis)"}
    handles = [plt.Line2D([], [], **styles[c], label=labels[c]) for c in styles]
    legend(figure, handles, title=textwrap.fill(f"{variant} ({runs_text(seeds, others)})", 90))
    figure.supxlabel(curve_note(column, any(others)), fontsize=7)
    return figure


def improvement_figure(by_game, a, b):
    """Improvement of A over B per game as bars: difference in HNS, and percent."""
    own = by_game[(by_game["variant"] == a) & (by_game["baseline"] == b)].sort_values("difference")
    figure, axes = plt.subplots(1, 2, figsize=(7, 1.5 + 0.25 * len(own)), sharey=True, layout="constrained")
    titles = "difference in human-normalised score", "difference, % of the larger of baseline and human"
    for axis, column, title in zip(axes, ("difference", "improvement_percent"), titles, strict=True):
        for i, value in enumerate(own[column]):
            up = value >= 0
            color, hatch = ("#56B4E9", "") if up else ("#D55E00", "///")
            axis.barh(i, value, color=color, hatch=hatch, edgecolor="black", linewidth=0.6)
            text = f"{value:+.2f}" if column == "difference" else f"{value:+,.1f} %"
            offset, side = (3, "left") if up else (-3, "right")
            axis.annotate(text, (value, i), (offset, 0), textcoords="offset points", ha=side, va="center", fontsize=7)
        if column != "difference" and own[column].abs().max() > 300:
            axis.set_xscale("symlog", linthresh=100)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.margins(x=0.3)
        axis.grid(axis="y", visible=False)
        axis.set_xlabel(title)
    axes[0].set_yticks(range(len(own)), [game_name(g) for g in own["env_id"]])
    seeds = f"{a} ({seeds_text(own['seeds'])}) over {b} ({seeds_text(own['seeds_baseline'])})"
    figure.suptitle(seeds, fontsize=8)
    figure.supxlabel(
        "Means over all seeds, games in the order of the left panel; intervals over the games: comparisons.csv", fontsize=7
    )
    return figure


def profile_figure(profile):
    """Performance profiles: the further to the right a line falls, the better."""
    if profile.empty:
        return None
    figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
    handles = []
    for i, (variant, own) in enumerate(profile.groupby("variant", sort=False)):
        label = f"{variant} ({seeds_text(own['seeds'])})"
        handles += axis.step(own["hns"], own["share"], where="post", markevery=(0.02 * i, 0.2), label=label, **style_of(i))
        axis.fill_between(
            own["hns"], own["share_low"], own["share_high"], step="post", color=style_of(i)["color"], alpha=0.15, linewidth=0
        )
    if profile["hns"].max() > 20:
        axis.set_xscale("symlog", linthresh=1)
    axis.set_ylim(-0.02, 1.02)
    axis.set_ylabel("share of runs above")
    games = profile["games"].iloc[0]
    axis.set_xlabel(f"human-normalised score (games: {games})\nshading: 95 % bootstrap interval (2 seeds or more)")
    legend(figure, handles)
    return figure


def length_max_points(variants, compared):
    """(family and baseline, L_min, L_max, row of comparisons.csv) of ABS over fixed, where nothing but L_max differs; a fixed
    rollout of the shortest length is a range of one length."""
    rows = []
    for row in compared.to_dict("records"):
        a, b = variants[row["variant"]], variants[row["baseline"]]
        alike = a["script"] == b["script"] and a["args"]["precision"] == b["args"]["precision"]
        if signal_of(b["args"]) == "fixed" and alike and signal_of(a["args"]) in ("ABS", "fixed"):
            settings = {k: v for k, v in settings_of(a["args"]).items() if k != "rollout_length_max"}
            kind = json.dumps(settings, sort_keys=True) if a["args"]["adapt_rollout"] else "fixed"
            ends = ("rollout_length_min", "rollout_length_max") if a["args"]["adapt_rollout"] else ("num_steps", "num_steps")
            row |= dict(zip(("length_min", "length_max"), (a["args"][end] for end in ends), strict=True))
            rows.append(row | {"kind": kind, "line": f"{family(a['script'])} over {row['baseline']}"})
    return pd.DataFrame(rows)


def length_max_figure(points):
    """Mean improvement over a fixed baseline against L_max."""
    lines = []
    for (line, kind), own in points.groupby(["line", "kind"], sort=False) if len(points) else ():
        if kind != "fixed" and own["length_max"].nunique() > 1:
            shortest = own["length_min"].iloc[0]
            fixed = points[(points["line"] == line) & (points["kind"] == "fixed") & (points["length_min"] == shortest)]
            options = max((v.split(", ")[1:] for v in own["variant"]), key=len)
            lines.append((line, shortest, options, pd.concat([own, fixed]).sort_values("length_max")))
    if not lines:
        return None
    if len({line for line, *_ in lines}) < len(lines):  # several lines over one baseline are named by what differs
        lines = [(", ".join([f"{line}, L_min {n}", *options]), n, options, own) for line, n, options, own in lines]
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for i, (line, *_, own) in enumerate(lines):
        mean = own["mean_improvement_percent"]
        ends = [mean - own["mean_improvement_percent_low"], own["mean_improvement_percent_high"] - mean]
        x = own["length_max"] * (1 + 0.015 * (i - (len(lines) - 1) / 2))  # beside each other
        label = f"{line} ({own['games'].min()} games, {seeds_text([*own['seeds'], *own['seeds_baseline']])})"
        axis.errorbar(x, mean, np.clip(ends, 0, None), label=label, capsize=3, **style_of(i))
    axis.set_xscale("log", base=2)
    ticks = sorted({x for *_, own in lines for x in own["length_max"]})
    axis.set_xticks(ticks, [str(x) for x in ticks])
    axis.minorticks_off()
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xlabel("longest rollout, L_max (steps per environment)\nbars: 95 % bootstrap intervals (2 seeds or more)")
    axis.set_ylabel("mean improvement over games, %")
    figure.legend(loc="outside upper center", ncols=min(2, len(lines)), handlelength=4)
    return figure


def style_of(i):
    """Colour, line and marker of the i-th of several lines; every seven lines they are combined anew."""
    turn = i // len(COLORS)
    return {
        "color": COLORS[i % len(COLORS)],
        "linestyle": LINES[(i + turn) % len(LINES)],
        "marker": MARKERS[(i + 2 * turn) % len(MARKERS)],
    }


def draw_figures(folder, runs, variants, curves, by_game, compared, profile, reps):
    """Writes all figures that the runs support. Returns a list of (name or None, caption)."""
    folder.mkdir()
    figures = []

    def save(figure, name, caption, why_not):
        if figure is None:
            figures.append((None, f"{caption}: not drawn, {why_not}."))
            return
        for kind in ("png", "pdf"):
            figure.savefig(folder / f"{name}.{kind}", dpi=150, metadata={"CreationDate": None} if kind == "pdf" else None)
        plt.close(figure)
        figures.append((name, caption))

    scripts = list(dict.fromkeys(v["script"] for v in variants.values()))
    styles = {s: {v: style_of(i) for i, v in enumerate(v for v in variants if variants[v]["script"] == s)} for s in scripts}
    for script in scripts:
        name = family(script)
        unmeasured = "its runs hold no such measurement"
        for column, caption in (("divergence", "Behavioral divergence"), ("kl", "KL divergence"), ("b_simple", "Noise scale")):
            drives = {"kl": "kl_min", "b_simple": "noise_scale_window", "divergence": "env_id"}[column]
            if any(drives in v["args"] for v in variants.values() if v["script"] == script):
                figure = curve_figure(curves, runs, styles[script], column, reps)
                save(figure, file_name(column, name), f"{caption} over training, {name}", unmeasured)
    adaptive = [v for v in variants if variants[v]["args"]["adapt_rollout"]]
    for variant in adaptive:
        figure = batch_figure(curves, runs, variant, variants[variant]["args"], reps)
        save(figure, file_name("batch", variant), f"Batch size and its signal, {variant}", "all its runs are duplicates")
    if not adaptive:
        save(None, "", "Batch size and its signal", "no run adapts its rollout")
    for row in compared.to_dict("records"):
        a, b = row["variant"], row["baseline"]
        save(improvement_figure(by_game, a, b), file_name("improvement", a, "over", b), f"{a} over {b}, per game", "")
    if compared.empty:
        save(None, "", "Improvement per game", "no two comparable variants have finished runs of one game")
    few = "there are no human-normalised scores of finished runs to compare"
    save(profile_figure(profile), "profiles", "Performance profiles over the games that all these variants share", few)
    figure = length_max_figure(length_max_points(variants, compared))
    few = "no script has finished runs with two values of L_max and a fixed baseline"
    save(figure, "length_max", "Mean improvement over the fixed rollout against the longest rollout, L_max", few)
    for script in scripts:
        figure = curve_figure(curves, runs, styles[script], "episodic_return", reps)
        save(figure, file_name("return", family(script)), f"Return in training, {family(script)}", "no game has ended yet")
    return figures


# ---------------------------------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------------------------------


def number(x):
    return "" if pd.isna(x) else f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.3f}"


def estimate_text(row, name):
    """Such as "0.512 [0.433, 0.601]"."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return number(row[name]) + ("" if pd.isna(low) else f" [{number(low)}, {number(high)}]")


def markdown(columns, rows):
    rows = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)


def seeds_cell(n):
    return "1 seed: no interval" if n == 1 else f"{int(n)} seeds"


def find_warnings(runs, finished, scored, variants):
    """Lines about whatever makes the numbers doubtful."""
    lines = []
    counts = scored.groupby(["variant", "env_id"]).size()
    few = counts[counts < FEW_SEEDS].groupby("variant", sort=False).agg(["min", "max"])
    if len(few):
        names = "; ".join(f"{v} ({seeds_text(row)})" for v, row in zip(few.index, few.to_numpy(), strict=True))
        lines.append(
            f"Too few seeds, fewer than {FEW_SEEDS} in a game: {names}. Intervals from so few seeds are too narrow, and from "
            "one seed there are none."
        )
    counting = runs[runs["variant"].notna() & (runs["state"] != "duplicate")]
    for script, own in counting.groupby("script", sort=False):
        for column in ("source", "torch", "envpool"):
            versions = own[column].value_counts()
            if len(versions) > 1:
                text = ", ".join(f"{version} ({runs_word(n)})" for version, n in versions.items())
                rare = own[own[column] != versions.index[0]]
                mixed = rare["variant"].value_counts()
                text += f"; the rarer ones in {', '.join(f'{v} ({runs_word(n)})' for v, n in mixed.items())}"
                named = ", ".join(rare["run"][:5]) + (f" and {len(rare) - 5} more" if len(rare) > 5 else "")
                lines.append(f"Mixed versions: runs of {script} have {column} {text}: {named}.")
    diverged = counting[counting["state"] == "diverged"]
    if len(diverged):
        names = "; ".join(f"{v} ({runs_word(n)})" for v, n in diverged["variant"].value_counts().items())
        lines.append(f"Diverged and without a score, so that the scores are those of the runs that did not: {names}.")
    replaced = runs[runs["variant"].notna() & (runs["state"] == "duplicate")]
    for state, meaning in (
        (
            "diverged",
            "Diverged, but another run of the same settings and seed counts instead, so that the scores are selected ones",
        ),
        ("finished", "Finished more than once with the same settings and seed; the newest counts, and these do not"),
    ):
        own = replaced[replaced["own_state"] == state]
        if len(own):
            lines.append(f"{meaning}: {', '.join(own['run'])}.")
    again = finished[finished["diverged_before"].astype(bool)]
    if len(again):
        lines.append(
            f"Diverged once and continued from before, so that the score is a selected one: {', '.join(again['run'])}."
        )
    same_but_precision = {}
    for name, variant in variants.items():
        key = variant["script"], json.dumps(settings_of(variant["args"]) | {"precision": ""}, sort_keys=True)
        same_but_precision.setdefault(key, []).append(name)
    for names in same_but_precision.values():
        own = counting[counting["variant"].isin(names)]
        if len(names) > 1 and not own.duplicated(["env_id", "seed"]).any():
            lines.append(
                f"No seed in common: {' and '.join(names)} differ in precision only. If --precision auto chose so, on "
                "different machines, give all the same --precision."
            )
    unknown = counting[counting["source"] == "unknown"]
    if len(unknown):
        lines.append(
            f"Unknown version: {len(unknown)} of {len(counting)} runs have no versions.json; their script is the exp_name."
        )
    for column in ("eval_policy", "eval_episodes"):
        if finished[column].nunique() > 1:
            values = []
            for value, own in finished.groupby(column):
                scripts = ", ".join(own["script"].unique())
                values.append(f"{value if isinstance(value, str) else int(value)} ({runs_word(len(own))} of {scripts})")
            lines.append(f"Evaluated differently, {column}: {'; '.join(values)}.")
    alike = finished[2 * finished["distinct_games"] < finished["eval_episodes"]]
    if len(alike):
        low, high = (f"{n:.0f}" for n in (alike["distinct_games"].min(), alike["distinct_games"].max()))
        lines.append(
            f"Few distinct games: in {runs_word(len(alike))} less than half of the evaluated games differ in their actions "
            f"({low if low == high else f'{low} to {high}'} do), and the score rests on these few: emulator and greedy policy "
            "repeat themselves. Some random actions (--eval-only --eval-epsilon 0.01) vary them."
        )
    cut = finished[finished["time_limits"] > 0]
    if len(cut):
        text = ", ".join(f"{run} ({n:.0f})" for run, n in zip(cut["run"][:5], cut["time_limits"], strict=False))
        text += f" and {len(cut) - 5} more" if len(cut) > 5 else ""
        lines.append(f"Games cut by the time limit, which count with the score so far, in {runs_word(len(cut))}: {text}.")
    outside = sorted(finished.loc[finished["hns"].isna(), "env_id"].unique())
    if outside:
        lines.append(f"No human-normalised score, left out of aggregates and comparisons: {', '.join(outside)}.")
    totals = {variants[v]["args"]["total_timesteps"] for v in scored["variant"].unique()}
    if len(totals) > 1:
        lines.append(f"The aggregated variants differ in total_timesteps: {', '.join(f'{t:,}' for t in sorted(totals))}.")
    return lines


def write_report(folder, runs, variants, tables, figures, notes, reps, window):
    games, totals, compared = tables
    settings = {v: settings_of(variant["args"]) for v, variant in variants.items()}
    states = runs["state"].value_counts()
    lines = ["# Report", ""]
    lines.append(
        f"{datetime.now():%Y-%m-%d %H:%M}, {len(runs)} runs: {', '.join(f'{n} {state}' for state, n in states.items())}."
    )
    known = [n for n in ("python", "torch", "envpool", "processor", "source") if n in runs]
    versions = [f"{name} {', '.join(sorted(map(str, runs[name].dropna().unique())))}" for name in known]
    lines += ["", f"Versions: {'; '.join(versions)}.", ""]
    for script in dict.fromkeys(v["script"] for v in variants.values()):
        own = {v: settings[v] for v in variants if variants[v]["script"] == script}
        values = {
            k: {json.dumps(x[k]) for x in own.values() if k in x} for k in dict.fromkeys(k for x in own.values() for k in x)
        }
        same = ", ".join(f"{k} {json.loads(next(iter(x)))}" for k, x in values.items() if len(x) == 1)
        lines += [f"Settings of {script}, where its variants have them: {same}.", ""]
        different = {v: "; ".join(f"{k} {x}" for k, x in s.items() if len(values[k]) > 1) for v, s in own.items()}
        lines += [f"* {v}: {text}" for v, text in different.items() if text] + [""] * any(different.values())
    lines += ["## Warnings", "", *([f"* {note}" for note in notes] or ["None."]), ""]

    lines += ["## Aggregates", ""]
    interval = f"95 % stratified bootstrap intervals over seeds ({reps:,} replications) in brackets"
    if len(totals) and "iqm" in totals:
        own = totals.dropna(subset="iqm")
        names = "iqm", "mean", "median", "optimality_gap"
        rows = [
            [r["variant"], seeds_cell(r["seeds"]), int(r["games"])] + [estimate_text(r, n) for n in names]
            for _, r in own.iterrows()
        ]
        lines += [f"Human-normalised scores over the games that all these variants share; {interval}.", ""]
        lines += [markdown(["variant", "seeds", "games", "IQM", "mean", "median", "optimality gap"], rows), ""]
    else:
        lines += ["None: there are no human-normalised scores of finished runs to aggregate.", ""]
    lines += ["### Predicted Atari-57 median", ""]
    if len(totals) and "predicted_atari57_median" in totals:
        own = totals.dropna(subset="predicted_atari57_median")
        rows = [
            [r["variant"], seeds_cell(r["seeds_atari10"]), estimate_text(r, "predicted_atari57_median")]
            for _, r in own.iterrows()
        ]
        lines += [f"Human-normalised score in percent, predicted from the ten games of Atari-10; {interval}.", ""]
        lines += [markdown(["variant", "seeds", "median, %"], rows), ""]
    else:
        lines += ["None: no variant has scores in all ten games of Atari-10.", ""]
    lines += ["## Comparisons", ""]
    if len(compared):
        rows = []
        for r in compared.to_dict("records"):
            seeds = f"{r['seeds']} and {r['seeds_baseline']}" + (
                ": no interval" if 1 in (r["seeds"], r["seeds_baseline"]) else ""
            )
            seeds += f"; {runs_word(r['runs_left_out'])} left out" if r["runs_left_out"] else ""
            names = "probability_of_improvement", "mean_difference", "mean_improvement_percent"
            cells = [estimate_text(r, n) for n in names]
            cells.append(f"{r['p']:.3f}" if r["p"] >= 0.001 else "<0.001")
            rows.append([r["variant"], r["baseline"], seeds, r["games"], *cells])
        header = ["A", "B", "seeds", "games", "probability of improvement", "mean difference in HNS", "mean improvement, %"]
        text = f"A over B, over the games they share; {interval}. Improvement in percent divides by the HNS of B where that "
        text += "exceeds 1, game by game, so it can differ from the mean difference even in sign. p: permutation test of the "
        lines += [text + "mean difference within games, two-sided, not corrected for the number of comparisons.", ""]
        if (compared["probability_of_improvement_low"] == compared["probability_of_improvement_high"]).any():
            lines += ["A probability of 0 or 1 has an interval without width: the bootstrap cannot see beyond its seeds.", ""]
        lines += [markdown([*header, "p"], rows), ""]
    else:
        lines += ["None: no two comparable variants have finished runs of one game.", ""]

    lines += ["## Scores per game", ""]
    for title, column in (("Raw score", "score"), ("Human-normalised score", "hns")):
        named = [v for v in variants if v in set(games["variant"])]
        cells = {
            (r["env_id"], r["variant"]): f"{number(r[f'{column}_mean'])}"
            + (f" ± {number(r[f'{column}_std'])}" if r["seeds"] > 1 and pd.notna(r[f"{column}_std"]) else "")
            + f" ({r['seeds']})"
            for r in games.to_dict("records")
            if pd.notna(r[f"{column}_mean"])
        }
        rows = [[game_name(g)] + [cells.get((g, v), "") for v in named] for g in sorted(games["env_id"].unique())]
        lines += [f"{title} of the final evaluation: mean ± standard deviation over seeds (number of seeds).", ""]
        lines += [markdown(["game", *named], rows) if rows else "None: no run is finished.", ""]

    lines += ["## Figures", "", f"Curves are means over the trailing {window:.1%} of training.", ""]
    for name, caption in figures:
        lines += [f"![{caption}](figures/{name}.png)", "", f"*{caption}.*", ""] if name else [caption, ""]
    lines += ["## Runs", ""]
    doubtful = runs[runs["state"] != "finished"]
    rows = [[r["folder"], r["state"], r["note"]] for _, r in doubtful.iterrows()]
    lines += ["Not in the scores:", "", markdown(["folder", "state", "why"], rows), ""] if rows else []
    own = runs[runs["state"] == "finished"]
    rows = [[r["run"], r["variant"], game_name(r["env_id"]), int(r["seed"]), number(r["score"])] for _, r in own.iterrows()]
    lines += ["Finished:", "", markdown(["run", "variant", "game", "seed", "score"], rows), ""] if rows else []
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="runs, or folders that hold runs")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; files of an earlier report are replaced")
    parser.add_argument("--reps", type=int, default=2000, help="bootstrap replications (2000)")
    parser.add_argument("--window", type=float, default=0.02, help="window of the curves as a share of training (0.02)")
    parser.add_argument("--jobs", type=int, default=1, help="processes that read runs (1)")
    args = parser.parse_args()
    if args.reps < 1 or args.jobs < 1 or not 0 < args.window <= 1:
        sys.exit("error: --reps and --jobs must be 1 or more, and --window in (0, 1]")
    earlier = args.out / "report.md"
    earlier = earlier.read_text(encoding="utf-8", errors="replace") if earlier.is_file() else ""
    if args.out.exists() and (not args.out.is_dir() or (any(args.out.iterdir()) and not earlier.startswith("# Report\n"))):
        sys.exit(f"error: {args.out} exists and is no earlier report; choose another --out")
    parent = next(p for p in [args.out.resolve(), *args.out.resolve().parents] if p.exists())
    if not can_write(parent):
        sys.exit(f"error: cannot write to {parent}; choose another --out")
    plt.rcParams.update(FONTS)
    runs, variants, curves = read_runs(args.runs, args.window, args.jobs, args.out)
    finished = runs[runs["state"] == "finished"]
    scored = finished.dropna(subset="hns")
    games = per_game(finished)
    totals, notes = aggregates(scored, variants, args.reps)
    by_game, compared, more_notes = comparisons(scored, variants, args.reps)
    profile = profiles(scored, variants, args.reps)
    notes = find_warnings(runs, finished, scored, variants) + notes + more_notes

    with tempfile.TemporaryDirectory() as temporary:  # so that a failure leaves nothing half-written
        folder = Path(temporary) / "report"
        folder.mkdir()  # with the usual permissions, which copytree copies
        csvs = {
            "scores": runs.drop(columns="own_state").astype(dict.fromkeys(("seed", "step", "total_timesteps"), "Int64")),
            "games": games,
            "aggregates": totals,
            "improvement": by_game,
            "comparisons": compared,
        }
        csvs["profiles"] = profile
        for name, table in (csvs | {"curves": curves[["run", "step", *(c for c in CURVES if c in curves)]]}).items():
            table.to_csv(folder / f"{name}.csv", index=False, float_format="%.4g" if name == "curves" else "%.6g")
        figures = draw_figures(folder / "figures", runs, variants, curves, by_game, compared, profile, args.reps)
        write_report(folder, runs, variants, (games, totals, compared), figures, notes, args.reps, args.window)
        for name in set(re.findall(r"\]\(figures/(\w+)\.png\)", earlier)):
            for path in (args.out / "figures").glob(f"{name}.*"):
                path.unlink()
        shutil.copytree(folder, args.out, dirs_exist_ok=True)
    for note in notes:
        print(f"warning: {note}")
    states = ", ".join(f"{n} {state}" for state, n in runs["state"].value_counts().items())
    print(f"{len(runs)} runs ({states}): {args.out / 'report.md'}")


if __name__ == "__main__":
    main()
