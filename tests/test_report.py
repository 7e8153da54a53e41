"""benchmark/report.py on made-up runs whose statistics are known, and on runs that are missing, broken, mixed or double."""

import dataclasses
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import tyro
from conftest import MODULES, ROOT
from rliable import metrics
from scipy import stats
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(ROOT / "benchmark"))
import report  # noqa: E402
import throughput  # noqa: E402

PQN = MODULES["pqn_abs_atari.py"]
TABLE = pd.read_csv(ROOT / "benchmark" / "atari57_scores.csv", index_col="env_id")
ATARI_10 = [game.removesuffix("-v5") for game in TABLE.index[TABLE.atari10_weight.notna()]]
VERSIONS = {"script": "", "source": "a" * 12, "python": "3.11", "torch": "2.13", "envpool": "1.2", "processor": "CPU"}
BUDGET = 100_000


def make_run(folder, game="Pong", seed=1, hns=0.5, script="pqn_abs_atari.py", at=0, steps=BUDGET, source=None, **settings):
    """A run as the scripts leave it: args.json from the script's own defaults, curves up to `steps`, and, where it reached the
    end, an evaluation whose human-normalised score is `hns` exactly."""
    name = script.removesuffix(".py")
    run = folder / f"{game}-v5__{name}__{seed}__{1_700_000_000 + 1000 * seed + at}"
    run.mkdir(parents=True)
    args = MODULES[script].Args(env_id=f"{game}-v5", exp_name=name, seed=seed, total_timesteps=BUDGET, precision="float32")
    args = dataclasses.replace(args, **settings)
    (run / "args.json").write_text(json.dumps(dataclasses.asdict(args)))
    versions = VERSIONS | {"script": script} | ({"source": source} if source else {})
    (run / "versions.json").write_text(json.dumps([versions]))
    random, human = TABLE.random[args.env_id], TABLE.human[args.env_id]
    score = random + hns * (human - random)
    rng = np.random.default_rng([seed, len(game)])
    with SummaryWriter(str(run)) as writer:
        length, step = (args.rollout_length_min if args.adapt_rollout else args.num_steps), 0
        while step + length * args.num_envs <= steps:
            step += length * args.num_envs
            progress = step / BUDGET
            writer.add_scalar("abs/rollout_length", length, step)
            writer.add_scalar("abs/batch_size", length * args.num_envs, step)
            writer.add_scalar("losses/td_loss", 1 - progress, step)
            writer.add_scalar("abs/divergence", np.clip(math.exp(-3 * progress) + rng.normal() / 20, 0, 1), step)
            writer.add_scalar("charts/episodic_return", random + (score - random) * progress * rng.uniform(0.8, 1.2), step)
            if "kl_min" in dataclasses.asdict(args):
                writer.add_scalar("abs/kl", 0.003 * math.exp(-3 * progress), step)
            if script == "gns_batch_atari.py":
                writer.add_scalar("gns/b_simple", 10 + 3000 * progress, step)
            if args.adapt_rollout:
                length = round(args.rollout_length_min + (args.rollout_length_max - args.rollout_length_min) * progress)
    if steps == BUDGET:
        evaluation = {"env_id": args.env_id, "episodes": 100, "epsilon": 0.0, "seed": seed, "mean": score, "std": 1.0}
        (run / "eval.json").write_text(json.dumps(evaluation | {"human_normalized_score": hns}))
    return run


def make_report(folder, out, *options, code=0):
    command = [
        sys.executable,
        str(ROOT / "benchmark" / "report.py"),
        str(folder),
        "--out",
        str(out),
        "--reps",
        "200",
        *options,
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == code, result.stderr
    return result


FIXED = {"adapt_rollout": False, "num_steps": 32}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Ten games, two seeds, ABS with HNS 1.1 and 1.3 everywhere, fixed at 32 with 0.4 and 0.6; ABS up to 32 in one seed, with
    0.5: (folder of the report, what the program printed)."""
    folder = tmp_path_factory.mktemp("study")
    for game in ATARI_10:
        for seed in (1, 2):
            make_run(folder / "runs", game, seed, 1.0 + 0.1 * (2 * seed - 1))
            make_run(folder / "runs", game, seed, 0.3 + 0.1 * (2 * seed - 1), at=1, **FIXED)
        make_run(folder / "runs", game, 1, 0.5, at=2, rollout_length_max=32)
    return folder / "report", make_report(folder / "runs", folder / "report")


def table(study, name):
    return pd.read_csv(study[0] / f"{name}.csv")


def test_scores_per_game(study):
    """Mean, standard deviation over seeds (ddof 1) and human-normalised score of every game and variant."""
    games = table(study, "games").set_index(["env_id", "variant"])
    assert len(games) == 30 and set(games.index.get_level_values(1)) == {"PQN ABS 16-64", "PQN ABS 16-32", "PQN fixed 32"}
    own = games.loc[("Qbert-v5", "PQN ABS 16-64")]
    random, human = TABLE.random["Qbert-v5"], TABLE.human["Qbert-v5"]
    assert own.seeds == 2 and own.hns_mean == pytest.approx(1.2) and own.hns_std == pytest.approx(0.2 / math.sqrt(2), rel=1e-5)
    assert own.score_mean == pytest.approx(random + 1.2 * (human - random), rel=1e-5)
    assert own.score_std == pytest.approx(0.2 / math.sqrt(2) * (human - random), rel=1e-5)
    assert math.isnan(games.loc[("Qbert-v5", "PQN ABS 16-32")].score_std)


def test_aggregates(study):
    """IQM, mean, median and optimality gap; the prediction of the 57 games by the published formula; intervals around them."""
    rows = table(study, "aggregates").set_index("variant")
    own, fixed, single = (rows.loc[v] for v in ("PQN ABS 16-64", "PQN fixed 32", "PQN ABS 16-32"))
    for name, value in (("iqm", 1.2), ("mean", 1.2), ("median", 1.2), ("optimality_gap", 0.0)):
        assert own[name] == pytest.approx(value), name
        assert own[f"{name}_low"] <= value + 1e-6 and value - 1e-6 <= own[f"{name}_high"]
    assert 1.1 <= own["mean_low"] < 1.2 < own["mean_high"] <= 1.3
    assert fixed["optimality_gap"] == pytest.approx(0.5) and fixed["seeds"] == 2 and fixed["games"] == 10
    weights = TABLE.atari10_weight.dropna()
    for row, hns in ((own, 1.2), (fixed, 0.5)):
        assert row["predicted_atari57_median"] == pytest.approx(
            10 ** (weights.sum() * math.log10(1 + 100 * hns)) - 1, rel=1e-4
        )
    assert single["seeds"] == 1 and math.isnan(single["iqm_low"]) and single["iqm"] == pytest.approx(0.5)


def test_profiles(study):
    """The share of runs above each human-normalised score, from all to none; with an interval where there are two seeds."""
    rows = table(study, "profiles")
    for variant, low, high in (("PQN ABS 16-64", 1.1, 1.3), ("PQN fixed 32", 0.4, 0.6), ("PQN ABS 16-32", 0.5, 0.5)):
        own = rows[rows["variant"] == variant]
        assert own["hns"].is_monotonic_increasing and own["hns"].iloc[0] == 0 and own["hns"].iloc[-1] == pytest.approx(1.3)
        assert set(own["games"]) == {10} and set(own["seeds"]) == {1 if low == high else 2}
        expected = ((low - own["hns"] > 1e-5).astype(float) + (high - own["hns"] > 1e-5)) / 2
        assert own["share"].to_numpy() == pytest.approx(expected.to_numpy())
        if low == high:
            assert own["share_low"].isna().all()
        else:
            assert (own["share_low"] <= own["share"]).all() and (own["share"] <= own["share_high"]).all()
            half = own[own["share"] == 0.5]
            assert len(half) and (half["share_low"] < 0.5).all() and (half["share_high"] > 0.5).all()


def test_profiles_of_games_far_apart():
    """One score of 200 times the human's takes no detail from the others."""
    scored = pd.DataFrame({"variant": "x", "env_id": ["Pong-v5", "VideoPinball-v5"] * 2, "seed": [1, 1, 2, 2]})
    scored["hns"] = [0.5, 200.0, 0.7, 0.6]
    rows = report.profiles(scored, ["x"], 50)
    assert rows["hns"].tolist() == [0, 0.5, 0.6, 0.7, 200] and rows["share"].tolist() == [1, 0.75, 0.5, 0.25, 0]


def test_comparisons(study):
    """Probability of improvement, difference and improvement over each baseline, per game and over all."""
    rows = table(study, "comparisons").set_index(["variant", "baseline"])
    own = rows.loc[("PQN ABS 16-64", "PQN fixed 32")]
    assert own.probability_of_improvement == 1 and own.mean_difference == pytest.approx(0.7)
    assert own.mean_improvement_percent == pytest.approx(70)  # the human, 1, is more than the baseline's 0.5
    assert own.mean_improvement_percent_low < 70 < own.mean_improvement_percent_high
    other = rows.loc[("PQN ABS 16-32", "PQN fixed 32")]
    assert other.probability_of_improvement == pytest.approx(0.5) and math.isnan(other.mean_difference_low)
    assert own.p == pytest.approx(1 / 20_001, rel=1e-4)  # of 6^10 ways, two differ as much as the observed one
    assert other.p == 1
    games = table(study, "improvement")
    assert len(games) == 20 and set(games.seeds_baseline) == {2}
    x, y = np.array([[0.1, 2.0], [0.3, 1.0]]), np.array([[0.2, 1.0], [0.2, 3.0], [0.3, 0.0]])
    assert report.probability_of_improvement(x, y) == pytest.approx(metrics.probability_of_improvement(x, y))
    assert report.relative_improvement(np.array([3.0]), np.array([2.0])) == pytest.approx(50)


def test_permutation_p():
    """SciPy's exact test where there is one game and the groups are equal; all ways counted by hand in two games and with
    unequal groups; random ways come near to all ways."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(0.5, 1, (4, 1)), rng.normal(0, 1, (4, 1))
    exact = stats.permutation_test((x[:, 0], y[:, 0]), lambda x, y: np.mean(x) - np.mean(y), n_resamples=np.inf)
    assert report.permutation_p(x, y) == pytest.approx(exact.pvalue)
    assert report.permutation_p(np.array([[3.0, 9.0], [4.0, 8.0]]), np.array([[1.0, 2.0], [2.0, 1.0]])) == 2 / 36
    # Means of one score minus those of the other two: 5 - 1.5, 1 - 3.5, 2 - 3; only the first is as far from 0 as itself
    assert report.permutation_p(np.array([[5.0]]), np.array([[1.0], [2.0]])) == pytest.approx(1 / 3)
    assert report.permutation_p(np.array([[2.0]]), np.array([[1.0], [5.0]])) == 1
    x, y = rng.normal(0.7, 1, (3, 3)), rng.normal(0, 1, (3, 3))
    assert report.permutation_p(x, y, most=7999) == pytest.approx(report.permutation_p(x, y), abs=0.02)


def test_curves(study):
    """Every run has its curve, on a grid that ends with the budget; returns are there only once a game has ended."""
    curves = table(study, "curves")
    assert curves.run.nunique() == 50 and 0.97 * BUDGET < curves.step.max() <= BUDGET
    own = curves[curves.run.str.startswith("Pong") | curves.run.str.startswith("Qbert-v5__pqn_abs_atari__1__1700001000")]
    assert own.rollout_length.max() > 50 and own.divergence.iloc[-5:].mean() < 0.3 < own.divergence.dropna().iloc[0]
    assert math.isnan(own.episodic_return.iloc[0])
    assert (study[0] / "curves.csv").stat().st_size < 1_000_000


def test_mean_curves_have_no_gap_and_no_jump():
    """A mean curve is drawn where every seed has a value, points between two measurements being on the line that joins them;
    runs that have not ended are no part of it."""
    values = {"a": [None, 1, 2, None, 4, 5], "b": [10, 11, None, 13, 14, None], "c": [100] * 6}
    curves = pd.concat(pd.DataFrame({"run": r, "step": range(0, 60, 10), "kl": np.array(v, float)}) for r, v in values.items())
    runs = pd.DataFrame({"run": ["a", "b", "c"], "state": ["finished", "not evaluated", "unfinished"]})
    figure, axis = report.plt.subplots()
    assert report.draw_curve(axis, curves, runs, "kl", 50, report.style_of(0)) == (2, 1)
    np.testing.assert_allclose(axis.lines[0].get_xdata() * 1e6, range(0, 60, 10))
    np.testing.assert_allclose(axis.lines[0].get_ydata(), [np.nan, 6, 7, 8, 9, np.nan])
    assert set(axis.lines[1].get_ydata()) == {100}
    report.plt.close(figure)


def test_a_noise_scale_without_bound_breaks_the_line():
    """Where a seed has no bound to its noise scale, no line is drawn, neither of the mean nor of a run that has not ended."""
    values = {"a": [10, np.inf, 30, 10], "b": [10, 20, 30, 40], "c": [5, np.inf, 7, np.inf]}
    curves = pd.concat(pd.DataFrame({"run": r, "step": range(4), "b_simple": v}) for r, v in values.items())
    runs = pd.DataFrame({"run": ["a", "b", "c"], "state": ["finished", "finished", "unfinished"]})
    figure, axis = report.plt.subplots()
    assert report.draw_curve(axis, curves, runs, "b_simple", 50, report.style_of(0)) == (2, 1)
    mean, running, cross = (line.get_ydata() for line in axis.lines)
    np.testing.assert_allclose(mean, [10, np.nan, 30, 25])
    np.testing.assert_allclose(running, [5, np.nan, 7, np.nan])
    assert list(cross) == [7] and list(axis.lines[2].get_xdata()) == [2e-6]
    report.plt.close(figure)


def test_no_two_lines_look_alike():
    """Up to 14 lines of one figure differ also in black and white."""
    styles = [report.style_of(i) for i in range(14)]
    assert len({(str(s["linestyle"]), s["marker"]) for s in styles}) == 14


def test_figures(study):
    """All figures of the paper are drawn, as pictures with something on them, and shown in report.md."""
    text = (study[0] / "report.md").read_text()
    names = {p.stem for p in (study[0] / "figures").glob("*.png")}
    assert names >= {"divergence_pqn", "return_pqn", "batch_pqn_abs_16_64", "length_max", "profiles"}
    assert "improvement_pqn_abs_16_64_over_pqn_fixed_32" in names
    for name in names:
        picture = cv2.imread(str(study[0] / "figures" / f"{name}.png"))
        assert picture.shape[1] > 600 and (picture < 128).mean() > 0.005, name
        assert (study[0] / "figures" / f"{name}.pdf").stat().st_size > 1000 and f"figures/{name}.png" in text


def test_few_seeds_are_a_warning(study):
    """The number of seeds stands beside every number, and too few are called so."""
    text, printed = (study[0] / "report.md").read_text(), study[1].stdout
    assert "Too few seeds" in text and "Too few seeds" in printed
    assert "PQN ABS 16-32 (1 seed)" in text and "1 seed: no interval" in text and "2 seeds" in text


def test_the_same_report_twice(study, tmp_path):
    """Bootstrap intervals do not depend on chance."""
    folder = study[0].parent
    make_report(folder / "runs", tmp_path / "again")
    for name in ("aggregates", "comparisons"):
        assert (tmp_path / "again" / f"{name}.csv").read_text() == (study[0] / f"{name}.csv").read_text()


def test_doubtful_runs_are_named(tmp_path):
    """Unfinished, diverged, damaged, double and mixed runs each get their line; only sound ones count."""
    runs = tmp_path / "runs"
    sound = [make_run(runs, "Pong", seed, 0.5) for seed in (1, 2)]
    older = make_run(runs, "Pong", 2, 0.1, at=-100)
    unfinished = make_run(runs, "Pong", 3, steps=50_000)
    diverged = make_run(runs, "Pong", 4, steps=60_000)
    with SummaryWriter(str(diverged)) as writer:
        writer.add_scalar("losses/td_loss", math.nan, 62_000)
    other_version = make_run(runs, "Pong", 5, 0.5, source="b" * 12)
    empty = runs / "Pong-v5__pqn_abs_atari__6__1"
    empty.mkdir()
    damaged = make_run(runs, "Pong", 7)
    (damaged / "args.json").write_text('{"env_id": "Po')
    no_score = make_run(runs, "Pong", 8)
    (no_score / "eval.json").unlink()
    null_score = make_run(runs, "Pong", 9)
    (null_score / "eval.json").write_text('{"mean": null}')
    (null_score / "model.pt").touch()
    (other_score := make_run(runs, "Pong", 11) / "eval.json").write_text('{"mean": 1.0, "human_normalized_score": 0.1}')
    double = make_run(runs, "Pong", 1, steps=30_000, at=50)  # begun again after the sound one
    lost = make_run(runs, "Pong", 5, steps=40_000, at=-50, source="b" * 12)
    with SummaryWriter(str(lost)) as writer:
        writer.add_scalar("losses/td_loss", math.nan, 42_000)
    make_report(runs, tmp_path / "report")
    scores = pd.read_csv(tmp_path / "report" / "scores.csv").set_index("run")
    states = scores.state.to_dict()
    for run, state in [(r, "finished") for r in (*sound, other_version)] + [
        (older, "duplicate"),
        (double, "duplicate"),
        (lost, "duplicate"),
        (other_score.parent, "not evaluated"),
        (unfinished, "unfinished"),
        (diverged, "diverged"),
        (empty, "unreadable"),
        (damaged, "unreadable"),
        (no_score, "not evaluated"),
        (null_score, "not evaluated"),
    ]:
        assert states[run.name] == state, (run.name, states[run.name])
    games = pd.read_csv(tmp_path / "report" / "games.csv").set_index("env_id")
    assert games.loc["Pong-v5"].seeds == 3 and games.loc["Pong-v5"].hns_mean == pytest.approx(0.5)
    text = (tmp_path / "report" / "report.md").read_text()
    for run in (older, unfinished, diverged, empty, damaged, no_score, double, other_version):
        assert run.name in text
    assert f"{no_score.name} | not evaluated | trained to the end or nearly so, but no eval.json" in text
    assert (
        f"{null_score.name} | not evaluated | trained to the end, but eval.json lacks the mean or the number of episodes"
        in text
    )
    words = "Diverged, but another run of the same settings and seed counts instead, so that the scores are selected ones"
    assert f"{words}: {lost.name}." in text
    assert (
        f"Finished more than once with the same settings and seed; the newest counts, and these do not: {older.name}." in text
    )
    assert re.search(r"step 4\d,\d{3} of 100,000 \(4\d%\)", text)  # how far the unfinished one has come
    (mixed,) = [line for line in text.splitlines() if "Mixed versions" in line]
    assert "b" * 12 in mixed and other_version.name in mixed


def test_a_run_of_two_versions(tmp_path):
    """A run that other code continued is of both."""
    run = make_run(tmp_path / "runs")
    (versions,) = json.loads((run / "versions.json").read_text())
    (run / "versions.json").write_text(json.dumps([versions, versions | {"source": "c" * 12}]))
    row, args, _ = report.read_run(run)
    assert row["source"] == f"{'a' * 12} then {'c' * 12}" and row["torch"] == "2.13" and args["seed"] == 1
    (run / "versions.json").unlink()
    assert report.read_run(run)[0]["source"] == "unknown" and report.read_run(run)[0]["script"] == "pqn_abs_atari.py"


def labels(*runs):
    """Names of variants of runs with these scripts and settings."""
    all_args = [dataclasses.asdict(MODULES[s].Args(**settings)) for s, settings in runs]
    return report.name_variants([s for s, _ in runs], all_args)


def test_names_of_variants():
    """Short where that is enough, with what is unusual added; what cannot change a result makes no variant."""
    pqn, xl, ppo, gns = "pqn_abs_atari.py", "pqn_xl_abs_atari.py", "ppo_abs_atari.py", "gns_batch_atari.py"
    names = labels((pqn, {}), (pqn, FIXED), (pqn, {"adapt_signal": "time"}), (xl, {}), (ppo, {}), (gns, {}))
    assert names == ["PQN ABS 16-64", "PQN fixed 32", "PQN time 16-64", "PQN-XL ABS 16-128", "PPO ABS 16-64", "GNS 16-64"]
    same = {"seed": 2, "env_id": "Pong-v5", "env_threads": 3, "exp_name": "x", "log_noise_scale": True, "num_steps": 8}
    assert set(labels((pqn, {}), (pqn, same))) == {"PQN ABS 16-64"}
    assert set(labels((pqn, FIXED), (pqn, FIXED | {"rollout_length_max": 9, "divergence_min": 0.2}))) == {"PQN fixed 32"}
    names = labels(
        (pqn, {}), (pqn, {"seed": 2}), (pqn, {"scale_epochs": True, "num_steps": 32}), (pqn, {"learning_rate": 0.1})
    )
    assert names[:2] == ["PQN ABS 16-64"] * 2 and "scale_epochs True" in names[2] and names[3].endswith("learning_rate 0.1")
    # however many runs have other settings, the plain name is that of the default
    names = labels((pqn, {}), *[(pqn, {"divergence_window": 1, "seed": seed}) for seed in (1, 2, 3)])
    assert names == ["PQN ABS 16-64"] + ["PQN ABS 16-64, divergence_window 1"] * 3
    names = labels((pqn, {"gamma": 0.9}), (pqn, {"gamma": 0.9}), (pqn, {"gamma": 0.8}))  # no run has the default
    assert names == ["PQN ABS 16-64"] * 2 + ["PQN ABS 16-64, gamma 0.8"]
    # a run that was extended has the schedules of its first total
    names = labels((pqn, {}), (pqn, {}), (pqn, {"schedule_timesteps": 5_000_000}))
    assert names == ["PQN ABS 16-64"] * 2 + ["PQN ABS 16-64, schedule_timesteps 5,000,000"]
    # also where an option has most of the runs, or the first one
    scaled = {"scale_epochs": True}
    names = labels((pqn, scaled), (pqn, scaled), (pqn, {}))
    assert names == ["PQN ABS 16-64, num_steps 32, scale_epochs True"] * 2 + ["PQN ABS 16-64"]
    names = labels((pqn, {"schedule_timesteps": 5_000_000}), (pqn, {}))
    assert names == ["PQN ABS 16-64, schedule_timesteps 5,000,000", "PQN ABS 16-64"]
    assert set(labels((gns, {}), (gns, {"reference_batch_size": 1024}))) == {"GNS 16-64"}  # it feeds no rule
    assert labels((pqn, {}), (pqn, {"reference_batch_size": 1024}))[1] == "PQN ABS 16-64, reference_batch_size 1,024"
    new = dataclasses.asdict(PQN.Args())
    old = {name: value for name, value in new.items() if name != "schedule_timesteps"}  # of a script that did not know it
    assert report.name_variants([pqn, pqn], [new, old]) == ["PQN ABS 16-64"] * 2


def test_who_is_compared_with_whom():
    """ABS with fixed rollouts of its own script and settings, with the control, the rival and its own options."""
    pqn, gns = "pqn_abs_atari.py", "gns_batch_atari.py"
    slow = {"learning_rate": 1e-5}
    runs = [(pqn, {}), (pqn, {}), (pqn, FIXED), (pqn, {"adapt_signal": "time"}), (pqn, {"scale_epochs": True}), (gns, {})]
    runs += [(pqn, FIXED | slow), (pqn, {"rollout_length_max": 128}), ("ppo_abs_atari.py", FIXED)]
    runs = [(script, settings | {"precision": "bfloat16"}) for script, settings in runs]
    runs += [(pqn, FIXED | {"precision": "float32"})]
    all_args = [dataclasses.asdict(MODULES[s].Args(**settings)) for s, settings in runs]
    variants = {
        name: {"script": script, "args": args} for name, (script, _), args in zip(labels(*runs), runs, all_args, strict=True)
    }
    pairs = set(report.comparison_pairs(variants))
    own, fixed = "PQN ABS 16-64", next(v for v in variants if v == "PQN fixed 32")
    assert {(own, fixed), (own, "PQN time 16-64"), (own, "GNS 16-64"), ("GNS 16-64", fixed)} <= pairs
    assert {("PQN ABS 16-128", fixed), ("PQN time 16-64", fixed)} <= pairs
    assert any(a == own and "scale_epochs True" in b for a, b in pairs)
    assert not any("learning_rate" in a + b or "PPO" in a + b for a, b in pairs)
    assert [(a, b) for a, b in pairs if "float32" in a + b] == [(fixed, "PQN fixed 32, precision float32")]


def compared_pairs(*runs):
    all_args = [dataclasses.asdict(MODULES[script].Args(**settings)) for script, settings in runs]
    named = zip(labels(*runs), runs, all_args, strict=True)
    variants = {name: {"script": script, "args": args} for name, (script, _), args in named}
    return set(report.comparison_pairs(variants)), variants


def test_more_epochs_are_compared_with_as_many():
    """What --scale-epochs adds is no difference between two signals; over fixed rollouts and plain ABS it may stand."""
    pqn, time, scaled = "pqn_abs_atari.py", {"adapt_signal": "time"}, {"scale_epochs": True}
    pairs, _ = compared_pairs((pqn, scaled), (pqn, {}), (pqn, time), (pqn, time | scaled), (pqn, FIXED))
    own, clock, more = "PQN ABS 16-64", "PQN time 16-64", ", num_steps 32, scale_epochs True"
    assert {(a, b) for a, b in pairs if "time" in b} == {(own, clock), (own + more, clock + more)}
    assert {(a, b) for a, b in pairs if "ABS" in b} == {(own, own + more)}
    assert {a for a, b in pairs if b == "PQN fixed 32"} == {own, own + more, clock, clock + more}


def test_lines_over_length_max():
    """Only points of one L_min and one precision belong to a line, which a fixed rollout of that length begins; lines over the
    same baseline have names of their own."""
    pqn, lengths = "pqn_abs_atari.py", ((16, 64), (16, 128), (32, 64), (32, 128))
    runs = [(pqn, {"rollout_length_min": low, "rollout_length_max": high}) for low, high in lengths]
    runs += [(pqn, FIXED | {"num_steps": n}) for n in (16, 32, 64)]
    other = [runs[i][1] | {"precision": "float32"} for i in (2, 3, 5)]  # 32 to 64, 32 to 128, fixed 32
    runs = [(script, settings | {"precision": "bfloat16"}) for script, settings in runs]
    runs += [(pqn, settings) for settings in other]
    pairs, variants = compared_pairs(*runs)
    numbers = {f"mean_improvement_percent{end}": 1.0 for end in ("", "_low", "_high")}
    numbers |= {"games": 2, "seeds": 2, "seeds_baseline": 2}
    compared = pd.DataFrame([{"variant": a, "baseline": b} | numbers for a, b in sorted(pairs)])
    assert ("PQN fixed 32", "PQN fixed 32, precision float32") in pairs  # of which only the arithmetic differs
    figure = report.length_max_figure(report.length_max_points(variants, compared))
    lines = {
        c.get_label(): [2 ** round(math.log2(x)) for x in c.lines[0].get_xdata()]  # drawn beside each other
        for c in figure.axes[0].containers
        if "over PQN fixed 64" in c.get_label() or "float32" in c.get_label()
    }
    assert {name.split(" (")[0]: x for name, x in lines.items()} == {
        "PQN over PQN fixed 64, L_min 16": [16, 64, 128],
        "PQN over PQN fixed 64, L_min 32": [32, 64, 128],
        "PQN over PQN fixed 32, precision float32, L_min 32, precision float32": [64, 128],
    }
    plt.close(figure)


def test_options_are_compared_at_each_budget():
    """Also at the one that is not the plain name's."""
    pqn = "pqn_abs_atari.py"
    small = {"total_timesteps": 1000}
    runs = [(pqn, {}), (pqn, {"scale_epochs": True}), (pqn, small), (pqn, small | {"scale_epochs": True})]
    all_args = [dataclasses.asdict(MODULES[script].Args(**settings)) for script, settings in runs]
    names = labels(*runs)
    variants = {name: {"script": pqn, "args": args} for name, args in zip(names, all_args, strict=True)}
    assert set(report.comparison_pairs(variants)) == {(names[0], names[1]), (names[2], names[3])}


@pytest.mark.parametrize("folder", ["nothing", "missing"])
def test_nothing_to_report(folder, tmp_path):
    """One line, and no half of a report."""
    (tmp_path / "nothing").mkdir()
    result = make_report(tmp_path / folder, tmp_path / "report", code=1)
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: ") and folder in result.stderr
    assert not (tmp_path / "report").exists()


def test_a_folder_of_something_else_is_kept(tmp_path):
    """--out does not write into a folder that holds anything but an earlier report."""
    make_run(tmp_path / "runs")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    result = make_report(tmp_path / "runs", tmp_path / "mine", code=1)
    assert "choose another --out" in result.stderr and [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_report_of_somebody_else_is_kept(tmp_path):
    """A report.md of another kind is no earlier report; in an earlier one only what that had drawn is replaced, and who may
    read the folder stays."""
    make_run(tmp_path / "runs")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.md").write_text("my thesis")
    assert "choose another --out" in make_report(tmp_path / "runs", tmp_path / "mine", code=1).stderr
    assert (tmp_path / "mine" / "report.md").read_text() == "my thesis"
    out = tmp_path / "runs" / "report"
    out.mkdir(mode=0o755)
    make_report(tmp_path / "runs", out)
    (old,) = (out / "figures").glob("batch_*.png")
    (out / "figures" / "hand.png").write_text("mine")
    shutil.copy(old, out / "figures" / "batch_gone.png")
    (out / "report.md").write_text((out / "report.md").read_text().replace(old.name, "batch_gone.png"))
    make_report(tmp_path / "runs", out)
    assert (out / "figures" / "hand.png").exists() and not (out / "figures" / "batch_gone.png").exists()
    assert out.stat().st_mode & 0o777 == 0o755
    assert len(pd.read_csv(out / "scores.csv")) == 1  # the report itself is no run


def test_large_numbers_stay_whole(tmp_path):
    """Seeds and steps, though an unreadable folder has none."""
    make_run(tmp_path / "runs", seed=4_294_967_295)
    (tmp_path / "runs" / "junk").mkdir()
    make_report(tmp_path / "runs", tmp_path / "report")
    assert ",4294967295," in (tmp_path / "report" / "scores.csv").read_text()


def test_a_gap_is_no_curve():
    """Returns are drawn across a short gap without an ended game, not across a long one; short and long add up to nothing."""
    steps = np.arange(500, 100_001, 500)
    returns = pd.Series(np.linspace(0, 1, 200))
    returns[[10, 11, *range(50, 90), 199]] = np.nan
    assert report.gap_sizes(returns)[[9, 10, 11, 12, 49, 50, 89, 90, 199]].tolist() == [0, 2, 2, 0, 0, 40, 40, 0, 1]
    curves = pd.DataFrame({"run": "a", "step": steps, "episodic_return": returns, "divergence": returns})
    runs = pd.DataFrame({"run": ["a"], "state": ["finished"]})
    # What is measured seldom is drawn from point to point, and nothing beyond the last one
    for column, missing in (("episodic_return", 41), ("divergence", 1)):
        _, axis = report.plt.subplots()
        report.draw_curve(axis, curves, runs, column, 10, {"color": "black"})
        drawn = axis.lines[0].get_ydata()
        assert np.isnan(drawn).sum() == missing and np.nanmax(np.abs(drawn - np.linspace(0, 1, 200)[: len(drawn)])) < 1e-9


def test_what_diverged_is_missed(tmp_path):
    """A warning says whose scores are those of the surviving runs only."""
    for seed in (1, 2):
        make_run(tmp_path / "runs", seed=seed)
    broken = make_run(tmp_path / "runs", seed=3, steps=BUDGET // 2)
    with SummaryWriter(str(broken)) as writer:
        writer.add_scalar("losses/td_loss", math.nan, BUDGET // 2)
    make_report(tmp_path / "runs", tmp_path / "report")
    warnings = (tmp_path / "report" / "report.md").read_text().split("## Aggregates")[0]
    assert "those of the runs that did not: PQN ABS 16-64 (1 run)." in warnings


def test_long_names_fit_a_file_system():
    """However many settings a variant has, its figures can be saved, and two never under one name."""
    names = [report.file_name("improvement", "a b" * 100, "over", other) for other in ("x", "y")]
    assert len(set(names)) == 2 and all(len(name) == 120 for name in names)
    assert report.file_name("Return", "PQN ABS 16-64") == "return_pqn_abs_16_64"


def test_versions_of_another_form(tmp_path):
    """A versions.json that is no list costs the version, not the report."""
    run = make_run(tmp_path / "runs")
    (run / "versions.json").write_text('{"script": "pqn_abs_atari.py"}')
    make_report(tmp_path / "runs", tmp_path / "report")
    assert "Unknown version: 1 of 1 runs" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.parametrize("script", ["gns_batch_atari.py", "pqn_xl_abs_atari.py"])
def test_scripts_that_are_compared_are_evaluated_alike(script, tmp_path):
    """All scripts stand in one table of aggregates, so an evaluation that differs between them is named."""
    make_run(tmp_path / "runs")
    other = make_run(tmp_path / "runs", script=script)
    evaluation = json.loads((other / "eval.json").read_text())
    (other / "eval.json").write_text(json.dumps(evaluation | {"epsilon": 0.01}))
    make_report(tmp_path / "runs", tmp_path / "report")
    report_text = (tmp_path / "report" / "report.md").read_text()
    policies = f"epsilon 0.0 (1 run of pqn_abs_atari.py); epsilon 0.01 (1 run of {script})"
    assert f"* Evaluated differently, eval_policy: {policies}." in report_text


def test_a_run_that_diverged_and_went_on_is_named(tmp_path):
    """Its curves no longer show it, but its score is that of another trial."""
    first, second = (make_run(tmp_path / "runs", seed=seed) for seed in (1, 2))
    (second / "diverged.json").write_text('{"global_step": 50000}')
    make_report(tmp_path / "runs", tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert f"Diverged once and continued from before, so that the score is a selected one: {second.name}." in text


def test_seeds_split_by_precision_are_named(tmp_path):
    """Two machines that chose differently leave each variant with a part of the seeds; a comparison on purpose has all."""
    for seed, precision in ((1, "float32"), (2, "float32"), (3, "bfloat16")):
        make_run(tmp_path / "runs", seed=seed, precision=precision)
    make_report(tmp_path / "runs", tmp_path / "report")
    split = "No seed in common: PQN ABS 16-64 and PQN ABS 16-64, precision bfloat16 differ in precision only."
    assert split in (tmp_path / "report" / "report.md").read_text()
    make_run(tmp_path / "runs", seed=1, precision="bfloat16", at=1)
    make_report(tmp_path / "runs", tmp_path / "report")
    assert "No seed in common" not in (tmp_path / "report" / "report.md").read_text()


def test_unequal_seeds(tmp_path):
    """A game with a seed less than another: aggregates and comparisons take as many as every game has, games.csv and
    improvement.csv all; the warnings say so."""
    for game, seeds in (("Pong", (1, 2, 3)), ("Qbert", (1, 2))):
        for seed in seeds:
            make_run(tmp_path / "runs", game, seed, seed / 10)
        make_run(tmp_path / "runs", game, 1, 0.0, at=1, **FIXED)
    said = make_report(tmp_path / "runs", tmp_path / "out").stdout
    assert "PQN ABS 16-64: 1 run left out of the aggregates" in said
    assert "PQN ABS 16-64 over PQN fixed 32: 1 run left out of the comparison" in said
    by_game = pd.read_csv(tmp_path / "out" / "improvement.csv").set_index("env_id")
    assert by_game.difference["Pong-v5"] == pytest.approx(0.2) and by_game.difference["Qbert-v5"] == pytest.approx(0.15)
    compared = pd.read_csv(tmp_path / "out" / "comparisons.csv").iloc[0]
    assert compared.seeds == 2 and compared.mean_difference == pytest.approx(0.15) and compared.runs_left_out == 1
    assert "; 1 run left out |" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize("out", ["/dev/null/x", "/proc/no/report"])
def test_a_place_where_nothing_can_be_written(out, tmp_path):
    """Said before the runs are read."""
    make_run(tmp_path, steps=4096)
    (line,) = make_report(tmp_path, out, code=1).stderr.splitlines()
    assert line.startswith("error: cannot write")


def tool(*command):
    result = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=100)
    return result.returncode, result.stderr.splitlines()


def test_plot_run(tmp_path):
    """The table holds what the run logged; what is no run or no place for a figure is one line and leaves nothing."""
    script, run = ROOT / "benchmark" / "plot_run.py", make_run(tmp_path / "runs")
    assert tool(script, run, "--out", tmp_path / "a.png", "--csv", tmp_path / "a.csv") == (0, [])
    assert cv2.imread(str(tmp_path / "a.png")).std() > 1
    drawn = pd.read_csv(tmp_path / "a.csv")
    assert drawn.step.is_monotonic_increasing and drawn.rollout_length.dtype == int and drawn.rollout_length[0] == 16
    assert drawn.return_mean_100_games.notna().all() and drawn.divergence.between(0, 1).all()
    (tmp_path / "empty").mkdir()
    for folder, out in ((tmp_path / "empty", "b.png"), (run, "b.xyz"), (run, "runs"), (run, "none/b.png")):
        code, lines = tool(script, folder, "--out", tmp_path / out)
        assert code == 1 and len(lines) == 1 and lines[0].startswith("error: "), lines
    (run / "args.json").write_text("{")
    code, lines = tool(script, run, "--out", tmp_path / "b.png")
    assert code == 1 and len(lines) == 1 and "args.json" in lines[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "a.png", "empty", "runs"]


def make_cleanrl_run(folder, level, speed, steps=BUDGET, last_game=BUDGET):
    """A run as CleanRL's scripts leave it: every game of the last tenth scores `level`, those before it half of that. No game
    ends after step `last_game`."""
    with SummaryWriter(str(folder)) as writer:
        for step in range(1000, steps + 1, 1000):
            score = level if step > 0.9 * steps else level / 2
            if step <= last_game:
                writer.add_scalar("charts/episodic_return", score, step, walltime=1e9 + step / speed)
            writer.add_scalar("charts/SPS", 1, step, walltime=1e9 + step / speed)
    return folder


def test_peer_curves(tmp_path):
    """Means, speed and Welch's interval, worked out by hand; one seed has no interval; unequal budgets are refused."""
    script = ROOT / "benchmark" / "peer_curves.py"
    ours = [make_cleanrl_run(tmp_path / f"ours{level}", level, speed=600) for level in (10, 12)]
    peer = [make_cleanrl_run(tmp_path / f"peer{level}", level, speed=300) for level in (9, 10)]
    command = [sys.executable, script, "--ours", *ours, "--peer", *peer, "--out", tmp_path / "two"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout
    # Standard errors 1 and 0.5, so 1.25 ** 0.5 together with 1.5625 / 1.0625 degrees of freedom
    assert "difference, last tenth: +1.50, 95 % interval -5.42 to +8.42" in result
    assert "speed: 2.00 times the peer's" in result
    assert re.search(r"ours  ours12 +12\.00 +6\.60 +600\n", result), result
    curves = pd.read_csv(tmp_path / "two.csv", index_col="step")
    assert list(curves) == ["ours ours10", "ours ours12", "peer peer9", "peer peer10"]
    assert (
        curves.index[-1] == BUDGET and (curves.iloc[-1] == [10, 12, 9, 10]).all() and (curves.iloc[50] == [5, 6, 4.5, 5]).all()
    )
    assert cv2.imread(str(tmp_path / "two.png")).std() > 1
    command = [sys.executable, script, "--ours", ours[0], "--peer", *peer, "--out", tmp_path / "one"]
    assert "no interval" in subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout
    (tmp_path / "folder.csv").mkdir()
    short = make_cleanrl_run(tmp_path / "short", 10, speed=300, steps=BUDGET // 2)
    long = make_cleanrl_run(tmp_path / "long", 10, speed=300, last_game=BUDGET // 2)
    for theirs, out, word in (
        (short, "c", "budgets"),
        (long, "c", "last tenth"),
        (tmp_path / "none", "c", "none"),
        (peer[0], "none/c", "write"),
        (peer[0], "folder", "write"),
        (ours[0], "c", "twice"),
    ):
        code, lines = tool(script, "--ours", ours[0], "--peer", theirs, "--out", tmp_path / out)
        assert code == 1 and len(lines) == 1 and lines[0].startswith("error: ") and word in lines[0]
    assert not (tmp_path / "c.csv").exists()


def test_alike_and_cut_games_are_named(tmp_path):
    """A score that rests on few distinct games, or on games that the time limit cut, is a warning."""
    for seed, distinct_games, time_limits in ((1, 2, 0), (2, 100, 0), (3, 94, 7)):
        run = make_run(tmp_path / "runs", seed=seed)
        evaluation = json.loads((run / "eval.json").read_text())
        evaluation |= {"distinct_games": distinct_games, "time_limits": time_limits}
        (run / "eval.json").write_text(json.dumps(evaluation))
    make_report(tmp_path / "runs", tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Few distinct games: in 1 run less than half" in text and "(2 do)" in text
    assert re.search(r"time limit.*in 1 run: Pong-v5__pqn_abs_atari__3__\d+ \(7\)\.", text)
    scores = pd.read_csv(tmp_path / "out" / "scores.csv").set_index("seed")
    assert list(scores.loc[[1, 2, 3], "distinct_games"]) == [2, 100, 94]
    assert list(scores.loc[[1, 2, 3], "time_limits"]) == [0, 0, 7]


@pytest.mark.parametrize(
    "options",
    [
        ("--scripts", "none.py"),
        ("--steps", 0),
        ("--steps", 65536, "--lengths", 16, 512),
        ("--rounds", 0),
        ("--lengths", "x"),
        ("--env-id", "No-v5"),
        ("--env-id", "Ant-v5"),
        ("--peer", ROOT / "pqn_abs_atari.py", "--scripts", "pqn_abs_atari.py", "ppo_abs_atari.py"),
        ("--out", "/proc/a/b"),
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_throughput_looks_before_it_measures(options):
    code, lines = tool(ROOT / "benchmark" / "throughput.py", *options)
    assert (
        code == 1
        and len(lines) == 1
        and lines[0].startswith("error: ")
        and options[0] in lines[0].replace("script", "--scripts").replace("write", "--out")
    )


def test_throughput_leaves_what_it_measured(monkeypatch, tmp_path):
    """A benchmark that ends in the middle has written the median, range and shares of the runs that it made."""
    results = iter([([100.0, 300.0, 200.0], [0.5, 0.2, 0.3], 1.5, [28, 48, 32])])

    def run_script(command):
        result = next(results, None)
        return result or sys.exit("error: stopped")

    monkeypatch.setattr(throughput, "run_script", run_script)
    monkeypatch.setattr(throughput, "measure_envpool", lambda *arguments, **options: [900.0, 1000.0, 1100.0])
    monkeypatch.setattr(sys, "argv", ["throughput.py", "--lengths", "16", "32", "--out", str(tmp_path / "speed.csv")])
    with pytest.raises(SystemExit, match="stopped"):
        throughput.main()
    emulator, script = pd.read_csv(tmp_path / "speed.csv").to_dict("records")
    assert emulator["steps_per_second"] == 1000 and script["name"] == "pqn_abs_atari.py, L = 16"
    expected = {"steps_per_second": 200, "lowest": 100, "highest": 300, "of_emulator": 0.2, "learning": 0.3}
    expected |= {"mean": round(3 / (1 / 100 + 1 / 200 + 1 / 300)), "windows": 3, "rollout_lengths": "28 to 48"}
    assert expected.items() <= script.items()


def test_throughput_goes_on_where_a_run_fails(monkeypatch, tmp_path, capsys):
    """The others are measured, the peer before them, and the one that failed is named and not tried again."""
    commands = []

    def run_script(command):
        commands.append(command[-1])
        if command[-1] == "--compile":
            raise RuntimeError("no compiler")
        return [100.0 * len(commands)], None, None, []

    monkeypatch.setattr(throughput, "run_script", run_script)
    monkeypatch.setattr(throughput, "measure_envpool", lambda *arguments, **options: [1000.0])
    peer = ROOT / "pqn_l_abs_atari.py"
    options = ["--lengths", "16", "--flags=--compile", "--flags=--torch-threads 2", "--peer", str(peer)]
    monkeypatch.setattr(sys, "argv", ["throughput.py", *options, "--out", str(tmp_path / "speed.csv")])
    with pytest.raises(SystemExit, match=r"1 of 3 failed, see above: .*L = 16, --compile$"):
        throughput.main()
    assert commands == ["32", "--compile", "2", "32", "2"]
    output = capsys.readouterr()
    assert output.err == "error: no compiler\n"
    names = list(pd.read_csv(tmp_path / "speed.csv")["name"])
    assert names[1:] == ["pqn_abs_atari.py, L = 16, --torch-threads 2", "peer pqn_l_abs_atari.py, L = 32"]
    assert f"{names[1]}: 1.60 times the speed of the peer" in output.out


SCALARS = """
from torch.utils.tensorboard import SummaryWriter
writer, step = SummaryWriter("runs/one"), 0
for length, seconds in {iterations}:
    step += 128 * length
    writer.add_scalar("charts/SPS", 0, step, walltime=seconds)
    writer.add_scalar("abs/rollout_length", length, step, walltime=seconds)
writer.close()
"""


def test_throughput_times_windows(tmp_path):
    """Of 8,192 steps or more by the wall clock, after the first quarter; the lengths are those of the windows alone."""
    iterations = [(16, 5), (24, 6), (32, 8), (32, 10), (48, 16), (16, 17), (36, 20), (20, 21), (4, 22)]  # 228 x 128 steps
    (tmp_path / "script.py").write_text(SCALARS.format(iterations=iterations))
    speeds, shares, memory, lengths = throughput.run_script([sys.executable, str(tmp_path / "script.py")])
    # the first quarter ends with the third rollout, from whose end on time is taken: 32 + 48 rows of 128, then 16 + 36 + 20;
    # the last rollout fills no window
    assert speeds == pytest.approx([80 * 128 / 8, 72 * 128 / 5])
    assert shares is None and lengths == [32, 48, 16, 36, 20]


def test_throughput_needs_a_window(tmp_path):
    """A run of a few long rollouts may end before there is one: that is said, and no error of Python's."""
    (tmp_path / "script.py").write_text(SCALARS.format(iterations=[(512, 1)]))
    with pytest.raises(RuntimeError, match="window of 8,192 steps; use more --steps"):
        throughput.run_script([sys.executable, str(tmp_path / "script.py")])


@pytest.mark.parametrize(
    "lines, error",
    [
        ("import sys; print('lost'); sys.exit(3)", r"ended with 3:\s+lost"),
        ("print('--compile finds no C++ compiler or Python.h here: running eagerly')", "finds no C.. compiler"),
        ("print('--cudagraphs finds no CUDA device here: running without')", "finds no CUDA device"),
        ("import sys; print('W1 torch._dynamo hit config.recompile_limit (8)', file=sys.stderr)", "recompile_limit"),
    ],
)
def test_throughput_knows_a_run_that_failed(lines, error, tmp_path):
    """Also one that computed in another way than asked."""
    (tmp_path / "script.py").write_text(lines)
    with pytest.raises(RuntimeError, match=error):
        throughput.run_script([sys.executable, str(tmp_path / "script.py")])


def test_throughput_runs_others_as_a_user_would(tmp_path):
    """Without GOMP_SPINCOUNT, which our scripts set for themselves when they are imported."""
    (tmp_path / "peer.py").write_text("import os, sys; print(os.environ.get('GOMP_SPINCOUNT')); sys.exit(3)")
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmark')!r}); import throughput; "
    code += f"throughput.run_script([sys.executable, {str(tmp_path / 'peer.py')!r}])"
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.stderr.rstrip().endswith("ended with 3:\nNone"), result.stderr


def test_throughput_compares_flags(monkeypatch, tmp_path):
    """A line for each set of flags that --flags gives, in turn, and the flags in its name; none for no flags."""
    commands = []
    monkeypatch.setattr(throughput, "run_script", lambda command: commands.append(command) or ([100.0, 200.0], None, 1.0, []))
    monkeypatch.setattr(throughput, "measure_envpool", lambda *arguments, **options: [1000.0])
    flags = ["--flags=", "--flags=--compile", "--flags=--precision float32"]
    options = ["--lengths", "32", "--rounds", "2", *flags, "--out", str(tmp_path / "speed.csv")]
    monkeypatch.setattr(sys, "argv", ["throughput.py", *options])
    throughput.main()
    names = list(pd.read_csv(tmp_path / "speed.csv")["name"])
    script = "pqn_abs_atari.py, L = 32"
    assert names == ["EnvPool, random actions", script, f"{script}, --compile", f"{script}, --precision float32"]
    assert [c[-1] for c in commands] == 2 * ["32", "--compile", "float32"]


def test_throughput_gives_the_peer_as_many_epochs(monkeypatch, tmp_path):
    """As the script beside it has by default; the emulator alone is measured in every round."""
    commands, emulator = [], []
    monkeypatch.setattr(throughput, "run_script", lambda command: commands.append(command) or ([100.0, 200.0], None, None, []))
    monkeypatch.setattr(throughput, "measure_envpool", lambda *arguments, **options: emulator.append(1) or [1000.0])
    for script in ("pqn_abs_atari.py", "ppo_abs_atari.py"):
        options = ["--scripts", script, "--peer", str(ROOT / script), "--lengths", "32", "--out", str(tmp_path / "speed.csv")]
        monkeypatch.setattr(sys, "argv", ["throughput.py", *options])
        throughput.main()
        epochs = importlib.import_module(script.removesuffix(".py")).Args.update_epochs
        assert f"--update-epochs {epochs} --num-steps 32" in " ".join(commands[-2])  # before our second run
    assert len(emulator) == 4 and pd.read_csv(tmp_path / "speed.csv")["peak_memory_gib"].isna().all()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_throughput_reads_the_peak_of_memory():
    """Also where it is past."""
    command = "b = bytearray(2**27); del b; print(flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    assert throughput.peak_memory_so_far(process.pid) > 2**27 / 2**30
    process.communicate(b"\n")
    assert throughput.peak_memory_so_far(process.pid) is None


def test_throughput_knows_the_longest_rollout(monkeypatch, tmp_path):
    """However a script is named."""
    commands = []
    monkeypatch.setattr(throughput, "run_script", lambda command: commands.append(command) or sys.exit("error: stopped"))
    monkeypatch.setattr(throughput, "measure_envpool", lambda *arguments, **options: [900.0, 1000.0, 1100.0])
    options = ["--scripts", "./pqn_xl_abs_atari.py", "--lengths", "max", "--out", str(tmp_path / "speed.csv")]
    monkeypatch.setattr(sys, "argv", ["throughput.py", *options])
    with pytest.raises(SystemExit, match="stopped"):
        throughput.main()
    assert "--num-steps 128" in " ".join(map(str, commands[0]))


@pytest.mark.parametrize("script", ["pqn_abs_atari.py", "pqn_xl_abs_atari.py", "ppo_abs_atari.py", "gns_batch_atari.py"])
@pytest.mark.parametrize("steps", [32768, 40960, 65536, 100_000, 300_000])
def test_throughput_moves_through_the_whole_range(script, steps, monkeypatch, tmp_path):
    """Where L moves, the last rollouts have the longest length, whatever --steps; too few of them are refused."""
    commands = []
    monkeypatch.setattr(throughput, "run_script", lambda command: commands.append(command) or ([100.0], None, None, []))
    monkeypatch.setattr(throughput, "measure_envpool", lambda *arguments, **options: [1000.0])
    options = ["--scripts", script, "--lengths", "moving", "--steps", str(steps), "--out", str(tmp_path / "speed.csv")]
    monkeypatch.setattr(sys, "argv", ["throughput.py", *options])
    module = importlib.import_module(script.removesuffix(".py"))
    if steps < 4 * 128 * module.Args.rollout_length_max:
        with pytest.raises(SystemExit, match="too few for these --lengths; use 65536 or more"):
            throughput.main()
        return
    throughput.main()
    args = tyro.cli(module.Args, args=commands[0][2:])
    assert (args.adapt_signal, args.adapt_interval, args.rollout_smoothing) == ("time", 1, 1)
    low, high, multiple = module.rollout_range(args)
    step, rollout_length, lengths = 0, low, []
    while step + 128 * (length := module.round_rollout_length(rollout_length, low, high, multiple)) <= steps:
        lengths.append(length)
        step += 128 * length
        rollout_length = low + (high - low) * min(1, step / args.schedule_timesteps)
    assert (lengths[0], lengths[-1]) == (16, module.Args.rollout_length_max) and lengths == sorted(lengths)
