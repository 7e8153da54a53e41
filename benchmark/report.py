"""Statistics and figures of finished and running runs: python benchmark/report.py runs/ --out report/

Folders given are runs, hold runs at any depth, or are the --out of an earlier report, whose tables of runs are read. Written
are report.md, figures/, scores.csv (runs), games.csv, aggregates.csv (variants), comparisons.csv (pairs), curves.csv (runs).
A variant is a script with the settings that matter: where and how a run was computed does not, nor do settings of adaptation
where the rollout is fixed. Definitions:

* Score: mean of the final evaluation; --returns: of the last tenth of training. HNS: 0 for a random player, 1 for a human.
* Aggregates (Agarwal et al., arXiv 2108.13264): over the games that all variants share but those with less than half of them.
* Predicted Atari-57 median (Aitchison et al., arXiv 2210.02019), in percent, from the ten games of Atari-10 with weights w:
  10^(sum of w * log10(1 + max(0, x))) - 1, x being the mean HNS of a game in percent.
* Compared are variants of one budget that differ in one thing: what sets batch and updates, one other setting, or the script.
* Probability of improvement of A over B: mean over games of the probability that a run of A scores higher, ties half.
* Improvement of A over B in a game: 100 * (HNS of A - HNS of B) / max(1, HNS of B) percent (Wang et al., arXiv 1511.06581).
* p: two-sided permutation test, within games, of the mean difference in HNS; exact up to 20,000 ways, and not corrected.
* Intervals: 95 % stratified bootstrap (percentile, 2,000 resamples) over seeds, at least two, and about these games only.
* Curves: mean over 1 % of training, held for at most 5 % where no game ended; then over runs, shaded from lowest to highest.
"""

import argparse
import ast
import hashlib
import itertools
import json
import math
import os
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from rliable import library, metrics, plot_utils
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = {"pqn_abs_atari.py": "PQN", "pqn_l_abs_atari.py": "PQN-L", "pqn_xl_abs_atari.py": "PQN-XL"}
FAMILIES |= {"ppo_abs_atari.py": "PPO", "gns_batch_atari.py": "GNS"}
SIGNALS = {"divergence": "ABS", "kl": "ABS", "noise-scale": "GNS", "replay": "yoked", "time": "time", "fixed": "fixed"}
NO_MATTER = (  # for the result; from eval_only on, flags of runs before the redesign
    "exp_name|env_id|seed|torch_deterministic|device|compile|track|wandb_.*|run_dir|checkpoint_interval|keep_checkpoints|"
    "env_threads|torch_threads|eval_(episodes|epsilon|greedy)|capture_video|video_episodes|replay|eval_only|model|resume|"
    "auto_resume|cudagraphs|microbatch_size|env_pools|memory_format|schedule_timesteps|log_noise_scale|noise_scale_(window|warmup)"
)
FED = "(divergence|kl)_(min|max)|schedule|reference_batch_size"  # to the rule of ABS
MEASURED = FED + "|divergence_(window|warmup)|noise_scale_groups"
ADAPTATION = MEASURED + "|adapt_interval|adapt_signal|rollout_.*"
UPDATES = ADAPTATION + "|adapt_rollout|num_steps|num_minibatches|update_epochs|scale_epochs"
IDLE = {"ABS": "noise_scale_groups", "GNS": FED, "time": MEASURED, "fixed": ADAPTATION + "|scale_epochs"}
IDLE["yoked"] = IDLE["time"] + "|adapt_interval|rollout_smoothing"
CURVES = {"episodic_return": "charts/episodic_return", "divergence": "abs/divergence", "kl": "abs/kl"}
CURVES |= {"noise_scale": "gns/b_simple", "rollout_length": "abs/rollout_length"}
EVALUATION = "policy episodes eval_sticky_action_probability eval_max_episode_steps eval_precision".split()
COLUMNS = "run variant state note script env_id seed step total_timesteps score hns".split() + EVALUATION
COLUMNS += "distinct_games time_limits source started settings".split()
METRICS = "iqm", "mean", "median", "optimality_gap"
ATARI57 = pd.read_csv(Path(__file__).parent / "atari57_scores.csv", index_col="env_id")
ATARI10 = ATARI57["atari10_weight"].dropna()


def find_runs(path):
    """Run folders at any depth, and empty folders."""
    for folder, below, files in os.walk(path, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith(".") and name not in ("videos", "wandb"))
        if not below + files or any(map(re.compile(r"(args|eval)\.json|checkpoint.*\.pt|events\.out|\.lock").match, files)):
            yield Path(folder)


def read_json(path):
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))}
    except OSError:
        raise ValueError(f"no {path.name}") from None
    except (ValueError, TypeError):
        raise ValueError(f"{path.name} is damaged") from None


def read_scalars(folder):
    """All scalars of a run: dict from name to (steps, values). A point that a resumed run wrote again counts once."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    scalars = {}
    for name in events.Tags()["scalars"]:
        steps, values = np.array([(p.step, p.value) for p in events.Scalars(name)]).T
        again = np.where(np.diff(steps) < 0, steps[1:], np.inf)  # where a resumed run begins behind its checkpoint
        last = steps < np.minimum.accumulate([np.inf, *again[::-1]])[::-1]
        scalars[name] = steps[last], values[last]
    return scalars


def read_evaluation(folder, args, step, longest):
    """What scores.csv holds of eval.json; ValueError if that is not the evaluation of this run's end."""
    content = read_json(folder / "eval.json")
    evaluated = content.get("global_step", step)  # old runs do not say
    if not all(math.isfinite(content.get(n, math.nan)) for n in ("mean", "episodes")):
        raise ValueError("eval.json lacks the mean or the number of episodes")
    if content.get("env_id") != args["env_id"] or evaluated + longest <= args["total_timesteps"]:
        raise ValueError(f"eval.json is of {content.get('env_id')} at step {evaluated:,}")
    policy = f"epsilon {content['epsilon']}" if "epsilon" in content else "greedy" if content.get("greedy") else "sampled"
    game = "sticky_action_probability", "max_episode_steps", "precision"  # of old runs those of training
    row = {f"eval_{name}": content.get(name, args.get(name)) for name in game}
    row |= {name: content.get(name) for name in ("episodes", "distinct_games", "time_limits")}
    return row | {"state": "finished", "score": content["mean"], "policy": policy}


def read_run(folder):
    """(row of scores.csv, rows of curves.csv); ValueError where it is no run."""
    if not any(folder.iterdir()):
        raise ValueError("an empty folder")
    args = read_json(folder / "args.json")
    types = {"env_id": str, "seed": int, "total_timesteps": int | float, "num_envs": int, "num_steps": int}
    if wrong := [name for name, kind in types.items() if not isinstance(args.get(name), kind)]:
        raise ValueError(f"args.json lacks {', '.join(wrong)}")
    total = args["total_timesteps"]
    if total <= 0:
        raise ValueError(f"no training, an evaluation of {args.get('init_from')}")
    sources = sorted(folder.glob("*.py"))
    versions = folder / "versions.json"  # of runs before the redesign
    computed = args.pop("computed_with", None) or (json.loads(versions.read_text())[-1] if versions.exists() else {})
    args["precision"] = computed.get("precision", args.get("precision"))  # what "auto" became
    row = {"run": folder.as_posix(), "settings": json.dumps(settings_of(args), sort_keys=True)}
    row |= {name: args[name] for name in ("env_id", "seed", "total_timesteps")}
    row["script"] = computed.get("script") or (sources[0].name if sources else f"{args.get('exp_name')}.py")
    row["source"] = hashlib.sha256(sources[0].read_bytes()).hexdigest()[:12] if sources else None
    row["started"] = max([int(t) for f in folder.glob("events*") for t in re.findall(r"tfevents\.(\d+)", f.name)], default=0)
    scalars = {k: points for k, points in read_scalars(folder).items() if not k.startswith("eval/")}
    longest = args["num_envs"] * args["rollout_length_max" if args.get("adapt_rollout") else "num_steps"]
    ends = [steps.max() for steps, _ in scalars.values()] or [total * (folder / "eval.json").exists()]
    row["step"] = step = int(max(ends))
    losses = [points for name, points in scalars.items() if name.startswith("losses/")]
    infinite = min([steps[~np.isfinite(values)].min(initial=math.inf) for steps, values in losses], default=math.inf)
    if infinite < math.inf:
        row |= {"state": "diverged", "note": f"a loss is not finite at step {infinite:,.0f} of {total:,.0f}"}
    elif step + longest <= total:
        row |= {"state": "unfinished", "note": f"step {step:,} of {total:,.0f} ({step / total:.0%})"}
    else:
        try:
            row |= read_evaluation(folder, args, step, longest)
        except ValueError as e:
            row |= {"state": "not evaluated", "note": str(e)}
    curves = pd.DataFrame({"run": row["run"], "step": np.arange(1, 101) * int(total) // 100}, index=range(1, 101))
    for name, scalar in CURVES.items():
        if scalar in scalars:
            curves[name] = pd.Series(scalars[scalar][1]).groupby(np.ceil(100 * scalars[scalar][0] / total)).mean()
    return row, curves[(curves["step"] < step + total / 100) & bool(scalars)]


def signal_of(settings):
    return SIGNALS.get(settings.get("adapt_signal"), "ABS") if settings.get("adapt_rollout") else "fixed"


def settings_of(args):
    """The settings that matter for the result of a run."""
    settings = args | {"init_from": Path(args.get("init_from", "")).name}  # each seed may begin with a parent of its own
    if args.get("adapt_rollout") and args["rollout_length_min"] == args["rollout_length_max"]:  # so a fixed rollout
        length, epochs = args["rollout_length_max"], args.get("update_epochs", 0)
        scaled = max(epochs, epochs * length // args["num_steps"]) if args.get("scale_epochs") else epochs
        settings |= {"adapt_rollout": False, "num_steps": length, "update_epochs": scaled}
    signal = signal_of(settings)
    idle = f"{NO_MATTER}|{IDLE[signal]}" + "|num_steps" * (signal != "fixed" and not args.get("scale_epochs"))
    return {k: v for k, v in settings.items() if not re.fullmatch(idle, k) and v not in ("", None)}


def defaults_of(script):
    """The defaults of one of our scripts, read from its source; of another one none."""
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8") if script in FAMILIES and (ROOT / script).is_file() else "")
    fields = [n for c in tree.body if isinstance(c, ast.ClassDef) and c.name == "Args" for n in c.body]
    return {n.target.id: n.value.value for n in fields if isinstance(n, ast.AnnAssign) and isinstance(n.value, ast.Constant)}


def name_variants(keys):
    """Dict from (script, settings as JSON) to a name: "PQN ABS 16-64" or "PQN fixed 32", followed by what differs among
    those of that name and is no default. What a run does not know has its default."""
    groups, names = {}, {}
    for script, text in keys:
        own, family = json.loads(text), FAMILIES.get(script, script.removesuffix(".py"))
        signal = signal_of(own)
        longest = own["num_steps" if signal == "fixed" else "rollout_length_max"]
        lengths = str(longest) if signal == "fixed" else f"{own['rollout_length_min']}-{longest}"
        place = list(SIGNALS.values()).index(signal), [*FAMILIES, script].index(script), longest
        groups.setdefault((place, f"{family} {signal} {lengths}".replace("GNS GNS", "GNS")), {})[script, text] = own
    for (place, short), same in groups.items():
        usual = defaults_of(next(iter(same))[0])
        for key, own in same.items():
            own = {k: v for k, v in sorted(own.items()) if v != usual.get(k)}
            words = [f"{k} {v}" for k, v in own.items() if any(other.get(k) != v for other in same.values())]
            names[key] = place, len(words), ", ".join([short, *words])
    return {key: name for key, (*_, name) in sorted(names.items(), key=lambda item: item[1])}


def normalised(env_ids, scores):
    return (scores - env_ids.map(ATARI57["random"])) / env_ids.map(ATARI57["human"] - ATARI57["random"])


def read_runs(paths, returns=False):
    """(table of all runs, their curves, dict from variant to (script, settings)); returns: in place of scores."""
    rows, curves = [], []
    for path in paths:
        for stored in sorted(path.rglob("scores.csv")):  # an earlier report's, or a study's
            rows += pd.read_csv(stored).to_dict("records")
            curves.append(pd.read_csv(stored.with_name("curves.csv")))
        for folder in find_runs(path):
            try:
                row, curve = read_run(folder)
                rows.append(row)
                curves.append(curve)
            except Exception as e:  # whatever one folder holds, the others are reported
                note = f"{type(e).__name__}: {e}".removeprefix("ValueError: ")
                rows.append({"run": folder.as_posix(), "state": "unreadable", "note": note})
    runs = pd.DataFrame(rows, columns=COLUMNS).drop_duplicates("run", ignore_index=True).fillna({"note": ""})
    runs = runs.astype(dict.fromkeys(("seed", "step", "total_timesteps", "started", "distinct_games", "time_limits"), "Int64"))
    curves = pd.concat([c for c in curves if len(c)] or [pd.DataFrame()]).reindex(columns=["run", "step", *CURVES])
    curves = curves.drop_duplicates(["run", "step"])
    if returns:
        late = curves[curves["step"] > 0.9 * curves["run"].map(runs.set_index("run")["total_timesteps"])].groupby("run")
        runs["score"] = runs["run"].map(late["episodic_return"].mean()).where(runs["state"] == "finished")
    runs["hns"] = normalised(runs["env_id"], runs["score"].astype(float))
    keys = list(zip(runs["script"], runs["settings"], strict=True))
    names = name_variants({key for key in keys if isinstance(key[1], str)})
    runs["variant"] = [names.get(key) for key in keys]
    runs = runs.sort_values("variant", key=lambda c: c.map({v: i for i, v in enumerate(names.values())}), kind="stable")
    # Of several runs of one variant, game and seed the newest finished one counts, else the newest one
    best = runs[runs["variant"].notna() & (runs["state"] != "duplicate")]
    best = best.assign(ended=best["state"] == "finished").sort_values(["ended", "started", "run"], ascending=False)
    for _, same in best.groupby(["variant", "env_id", "seed"]):
        for i in same.index[1:]:
            runs.loc[i, "note"] = f"{same['run'].iloc[0]} counts instead; {runs['state'][i]} {runs['note'][i]}".strip()
            runs.loc[i, "state"] = "duplicate"
    variants = {name: (script, json.loads(text)) for (script, text), name in names.items()}
    return runs, curves, variants


def estimate(names, scores, function):
    """Dict of estimates and the ends of their intervals, NaN where an array has one seed; scores: (seeds, games) or a list."""
    np.random.seed(0)  # rliable 1.2.0 draws from NumPy's global state, whatever random_state it is given
    arrays = scores if isinstance(scores, list) else [scores]
    point, ends = function(*arrays), np.full((2, len(names)), np.nan)
    if min(map(len, arrays)) > 1:
        ends = library.get_interval_estimates({0: scores}, function, reps=2000)[1][0]
    return dict(zip([n + end for end in ("", "_low", "_high") for n in names], np.concatenate([point, *ends]), strict=True))


def score_matrix(own, games):
    """HNS (seeds, games) of one variant's runs, with as many seeds as every game has, the lowest first."""
    columns = [own[own["env_id"] == game].sort_values("seed")["hns"].to_numpy() for game in games]
    return np.stack([c[: min(map(len, columns))] for c in columns], axis=1)


def predicted_median(scores):
    """Predicted median HNS of the 57 games in percent from HNS (seeds, 10 games in the order of ATARI10)."""
    return 10 ** (np.log10(1 + 100 * scores.mean(axis=0, keepdims=True).clip(0)) @ ATARI10.to_numpy()) - 1


def aggregates(scored):
    """(aggregates.csv, HNS (seeds, games) of each variant over the games that all share)."""
    games = scored.groupby("variant", sort=False)["env_id"].agg(set)
    many = games[games.map(len) > games.map(len).max() / 2]
    common = sorted(set.intersection(*many)) if len(many) else []
    rows, matrices = [], {}
    for variant, own in scored.groupby("variant", sort=False):
        row = {"variant": variant, "games": len(games[variant])}
        if common and variant in many:
            x = matrices[variant] = score_matrix(own, common)
            values = estimate(METRICS, x, lambda x: np.array([getattr(metrics, f"aggregate_{name}")(x) for name in METRICS]))
            row |= {"games": len(common), "seeds": len(x)} | values
        if set(ATARI10.index) <= games[variant]:
            row |= estimate(["predicted_atari57_median"], score_matrix(own, ATARI10.index), predicted_median)
        rows.append(row)
    return pd.DataFrame(rows), matrices


def compare(x, y):
    """Probability of improvement, difference in HNS, improvement in percent; means over games."""
    x_mean, y_mean = x.mean(axis=0), y.mean(axis=0)
    probability = (np.sign(x[:, None] - y).mean() + 1) / 2  # as metrics.probability_of_improvement, but fast
    return np.array([probability, (x_mean - y_mean).mean(), (100 * (x_mean - y_mean) / np.maximum(1, y_mean)).mean()])


def permutation_p(x, y, most=20_000):
    """p of the difference in means of x (seeds, games) and y. SciPy's test cannot permute runs within each game."""
    both, n = np.concatenate([x, y]), len(x)
    if math.comb(len(both), n) ** x.shape[1] <= most:
        chosen = np.array(list(itertools.combinations(range(len(both)), n)))
        sums = np.array([sum(ways) for ways in itertools.product(*both[chosen].sum(axis=1).T)])
    else:
        shuffled = np.random.default_rng(0).permuted(np.broadcast_to(both, (most, *both.shape)), axis=1)
        sums = np.append(shuffled[:, :n].sum(axis=(1, 2)), x.sum())
    centre = n / len(both) * both.sum()  # the sum of x at which the two means are equal
    return float(np.mean(np.abs(sums - centre) >= abs(x.sum() - centre) - 1e-9))


def pairs(variants):
    """(A, B): the adaptive over the fixed, ABS over another rule of the same range, a user's script over ours."""
    for (a, (script_a, own)), (b, (script_b, other)) in itertools.combinations(variants.items(), 2):
        same_script = script_a == script_b or {script_a, script_b} == {"pqn_abs_atari.py", "gns_batch_atari.py"}
        keys = own.keys() | other.keys() if same_script else own.keys() & other.keys()  # a copy may have new flags
        things = {"updates" if re.fullmatch(UPDATES, k) else k for k in keys if own.get(k) != other.get(k)}
        fixed = [signal_of(settings) == "fixed" for settings in (own, other)]
        same_range = all(own.get(k) == other.get(k) for k in ("rollout_length_min", "rollout_length_max"))
        if not same_script and not things and script_a in FAMILIES and script_b not in FAMILIES:
            yield b, a
        elif same_script and things == {"updates"} and not fixed[0] and (fixed[1] or signal_of(own) == "ABS" and same_range):
            yield a, b
        elif same_script and len(things) == 1 and not things & {"updates", "total_timesteps"}:
            yield a, b


def comparisons(scored, variants):
    """comparisons.csv: for each pair a row over all games that they share, with intervals, and one per game."""
    rows, names = [], ["probability_of_improvement", "difference", "improvement_percent"]
    for a, b in pairs(variants):
        own, other = scored[scored["variant"] == a], scored[scored["variant"] == b]
        games = sorted(set(own["env_id"]) & set(other["env_id"]))
        for chosen in [games, *([game] for game in games)] if games else []:
            x, y = score_matrix(own, chosen), score_matrix(other, chosen)
            row = {"variant": a, "baseline": b, "env_id": "all" if chosen is games else chosen[0], "games": len(chosen)}
            values = estimate(names, [x, y], compare) if chosen is games else dict(zip(names, compare(x, y), strict=True))
            rows.append(row | {"seeds": len(x), "seeds_baseline": len(y)} | values | {"p": permutation_p(x, y)})
    return pd.DataFrame(rows, columns=None if rows else ["variant", "baseline", "env_id"])


def draw_curves(data, variants, save):
    """Curves by budget and figure: a panel per game, a line per variant; besides the IQM of human-normalised returns."""
    family = {v: FAMILIES.get(s, "PPO" if "clip_coef" in own else "PQN") for v, (s, own) in variants.items()}
    for (total, figure), own in data.groupby(["total_timesteps", data["variant"].map(family).replace("GNS", "PQN")]):
        own, ended = own.copy(), own["state"].isin(["finished", "not evaluated"])
        own["variant"] += np.where(ended, "", ", " + own["state"])
        runs = own.groupby(["variant", "env_id"])["run"].transform("nunique")
        for column in CURVES:
            own["value"] = own.groupby("run")[column].ffill(limit=5).replace(np.inf, np.nan)
            complete = own.groupby(["variant", "env_id", "step"])["value"].transform("count") == runs
            drawn = own[complete | ~ended].dropna(subset="value")  # a mean of some runs would jump where another one joins
            games = sorted(drawn["env_id"].unique())
            if column == "episodic_return" and len(games) > 1:
                hns = drawn.assign(value=normalised(drawn["env_id"], drawn["value"])).dropna(subset="value")
                hns = hns[hns.groupby(["variant", "step"])["env_id"].transform("nunique") == len(games)]
                hns = [(*key, stats.trim_mean(x, 0.25), "IQM of HNS") for key, x in hns.groupby(["variant", "step"])["value"]]
                drawn = pd.concat([drawn, pd.DataFrame(hns, columns=["variant", "step", "value", "env_id"])])
                games += ["IQM of HNS"] * bool(hns)
            if games:
                look = {"hue": "variant", "style": "variant", "palette": "colorblind", "errorbar": ("pi", 100)}
                look |= {"height": 2.2, "aspect": 1.4, "col_wrap": 3, "facet_kws": {"sharey": False, "legend_out": False}}
                grid = sns.relplot(drawn, kind="line", x="step", y="value", col="env_id", col_order=games, **look)
                sns.move_legend(grid, "upper center", bbox_to_anchor=(0.5, 0), ncol=3, title=None)
                grid.set_titles("{col_name}").set_axis_labels("agent steps", column.replace("_", " "))
                save(grid, f"{column} {figure} {total}", f"{column.replace('_', ' ').capitalize()}: {figure}, {total:,} steps")


def draw_scores(compared, matrices, save):
    """Performance profiles, improvement per game, improvement against the longest rollout."""
    if matrices:
        tau = np.unique(np.concatenate([[0], *(x.ravel() for x in matrices.values())]))
        fast = {"custom_profile_func": lambda x, tau: (x[..., None] > tau).mean((0, 1))}
        shares, ends = library.create_performance_profile(matrices, tau, **fast)
        axis = plot_utils.plot_performance_profiles(shares, tau, ends, xlabel="human-normalised score", legend=True)
        sns.move_legend(axis, "upper center", bbox_to_anchor=(0.5, -0.2))
        save(axis.figure, "profiles", "Share of runs above a score, over the games that these variants share")
    for variant, own in compared[compared["env_id"] != "all"].groupby("variant", sort=False):
        grid = sns.catplot(own, kind="bar", x="improvement_percent", y="env_id", col="baseline", col_wrap=3, height=4)
        grid.set_titles("over {col_name}").set_axis_labels("improvement, %", "")
        save(grid, f"improvement {variant}", f"Improvement per game: {variant}")
    sweep = compared[(compared["env_id"] == "all") & compared["baseline"].str.contains(" fixed ")]
    sweep = sweep.assign(longest=sweep["variant"].str.extract(r" ABS \d+-(\d+)")[0].astype(float)).sort_values("longest")
    sweep["line"] = sweep["variant"].str.replace(r"-\d+", "-L_max", n=1, regex=True) + " over " + sweep["baseline"]
    sweep = sweep[sweep.groupby("line")["longest"].transform("nunique") > 1]
    if len(sweep):
        axis = sns.lineplot(sweep, x="longest", y="improvement_percent", hue="line", style="line", markers=True)
        axis.set(xlabel="longest rollout, L_max", ylabel="mean improvement over games, %")
        sns.move_legend(axis, "upper center", bbox_to_anchor=(0.5, -0.15), title=None)
        save(axis.figure, "longest_rollout", "Improvement over fixed rollouts against the longest rollout")


def number(x):
    return str(x) if isinstance(x, str | int) else "" if pd.isna(x) else f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def markdown(table):
    """A Markdown table; columns x_low and x_high become the interval of x."""
    columns = [c for c in table if not c.endswith(("_low", "_high"))]
    lines = ["| " + " | ".join(c.replace("_", " ") for c in columns) + " |", "|---" * len(columns) + "|"]
    for row in table.to_dict("records"):
        known = [c for c in columns if pd.notna(row.get(c + "_low"))]
        ends = {c: f" [{number(row[c + '_low'])}, {number(row[c + '_high'])}]" for c in known}
        lines.append("| " + " | ".join(number(row[c]) + ends.get(c, "") for c in columns) + " |")
    return "\n".join(lines) if len(table) else ""


def doubts(runs, finished):
    """Lines on whatever makes the numbers doubtful."""
    groups = [(column, "Runs", finished) for column in EVALUATION]
    for column, who, own in groups + [("source", f"Runs of {script}", own) for script, own in runs.groupby("script")]:
        if own[column].nunique() > 1:
            values = (f"{value} ({len(r)}, such as {r.run.iloc[0]})" for value, r in own.groupby(column))
            yield f"{who} differ in {column}: {'; '.join(values)}."
    seeds = finished.groupby(["variant", "env_id"], sort=False).size().groupby("variant", sort=False).min()
    if few := [f"{variant} ({n})" for variant, n in seeds.items() if n < 5]:
        yield f"Fewer than 5 seeds in a game, so intervals are too narrow: {'; '.join(few)}."
    problems = {"Evaluated games were cut by the time limit": finished[finished["time_limits"] > 0]}
    problems["Less than half of the evaluated games differ"] = finished[2 * finished["distinct_games"] < finished["episodes"]]
    problems["No human-normalised score, so in no aggregate"] = finished[finished["hns"].isna()]
    problems["Diverged, so scores are those of the others"] = runs[runs["state"] == "diverged"]
    yield from (f"{problem}: {len(own)} runs, such as {own['run'].iloc[0]}." for problem, own in problems.items() if len(own))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="runs, or folders that hold runs")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--returns", action="store_true", help="compare returns late in training, not scores")
    args = parser.parse_args()
    runs, curves, variants = read_runs(args.runs, args.returns)
    if not variants:
        parser.error("\n".join(["there is no run in these folders", *(runs["run"] + ": " + runs["note"])]))
    finished, pictures = runs[runs["state"] == "finished"], []
    scored = finished.dropna(subset="hns")
    columns = {f"{c}_{f}": (c, f) for c in ("score", "hns") for f in ("mean", "std")} | {"seeds": ("score", "size")}
    games = finished.groupby(["env_id", "variant"], sort=False).agg(**columns).reset_index()
    (totals, matrices), compared = aggregates(scored), comparisons(scored, variants)
    (args.out / "figures").mkdir(parents=True, exist_ok=True)
    tables = {"scores": runs, "games": games, "aggregates": totals, "comparisons": compared, "curves": curves}
    for name, table in tables.items():
        table.to_csv(args.out / f"{name}.csv", index=False, float_format={"scores": None, "curves": "%.4g"}.get(name, "%.6g"))

    def save(figure, name, caption):
        name = re.sub(r"[^a-z0-9]+", "_", name.lower())[:200]
        figure.savefig(args.out / "figures" / f"{name}.png", dpi=120, bbox_inches="tight")
        plt.close("all")
        pictures.append(f"![{caption}](figures/{name}.png)\n\n*{caption}.*")

    draw_curves(runs[runs["state"] != "duplicate"].drop(columns="step").merge(curves, on="run"), variants, save)
    draw_scores(compared, matrices, save)
    states = ", ".join(f"{n} {state}" for state, n in runs["state"].value_counts().items())
    left_out = [f"{r.run}: {r.state}, {r.note}" for r in runs.itertuples() if r.state != "finished"]
    notes = list(doubts(runs, finished))
    cells = [f"{number(r.score_mean)} ± {number(r.score_std)} ({r.seeds}), {number(r.hns_mean)}" for r in games.itertuples()]
    per_game = games.assign(cell=cells).pivot(index="env_id", columns="variant", values="cell")[games["variant"].unique()]
    about = f"{len(runs)} runs: {states}. Definitions: `python benchmark/report.py --help`. In brackets: 95 % intervals."
    sections = {"Report": about, "Doubtful": "\n".join(f"* {note}" for note in notes)}
    sections |= {"Aggregates": markdown(totals), "Comparisons": markdown(compared[compared["env_id"] == "all"])}
    sections["Score ± standard deviation (seeds), HNS"] = markdown(per_game.reset_index())
    sections |= {"Figures": "\n\n".join(pictures), "Left out of the scores": "\n".join(f"* {line}" for line in left_out)}
    text = "\n\n".join(f"## {title}\n\n{content or 'None.'}" for title, content in sections.items())
    (args.out / "report.md").write_text(f"{text[1:]}\n", encoding="utf-8")
    print("\n".join([*left_out, *notes, f"{len(runs)} runs ({states}): {args.out / 'report.md'}"]))


if __name__ == "__main__":
    main()
