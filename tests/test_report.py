"""benchmark/report.py on made-up runs."""

import json
import math
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from rliable import metrics
from scipy import stats
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(ROOT / "benchmark"))
import report  # noqa: E402

RANDOM, HUMAN = report.ATARI57["random"], report.ATARI57["human"]
ARGS = {"num_envs": 128, "total_timesteps": 100_000, "num_steps": 32, "precision": "auto", "replay": "", "init_from": ""}
ARGS |= {"adapt_rollout": True, "adapt_signal": "divergence", "rollout_length_min": 16, "rollout_length_max": 64}
ARGS |= {"divergence_min": 0.05, "divergence_window": 20, "update_epochs": 2, "scale_epochs": False, "learning_rate": 2.5e-4}
OLD = {"precision": "float32", "cudagraphs": True, "schedule_timesteps": 0}
FIXED = {"adapt_rollout": False, "divergence_min": 0.1, "env_threads": 2}  # the latter two without effect
GAME = {"max_episode_steps": 27000, "precision": "float32", "global_step": 98_304, "sticky_action_probability": 0.0}


def make_run(folder, seed=1, hns=0.5, game="Pong", script="pqn_abs_atari.py", share=1, old=0, evaluated=(), loss=1, **flags):
    """A run as the scripts leave it, trained up to this share, with this human-normalised score at its end."""
    folder.mkdir(parents=True)
    computed_with = {"script": script, "precision": "float32"}
    args = ARGS | {"env_id": f"{game}-v5", "seed": seed} | flags | {"computed_with": computed_with}
    if old:  # the folder alone says which script it was
        args = {k: v for k, v in args.items() if v != "" and k != "computed_with"} | OLD
    (folder / "args.json").write_text(json.dumps(args))
    (folder / script).write_text("# the script\n")
    score = RANDOM[f"{game}-v5"] + hns * (HUMAN - RANDOM)[f"{game}-v5"]
    with SummaryWriter(str(folder)) as writer:
        for step in range(2048, int(share * 100_000) + 1, 2048):
            writer.add_scalar("charts/episodic_return", score, step)
            writer.add_scalar("abs/rollout_length", 16 + step // 3000, step)
            writer.add_scalar("losses/td_loss", loss, step)
    if share == 1:
        content = {"env_id": f"{game}-v5", "mean": score, "epsilon": 0.0, "episodes": 100, "distinct_games": 100}
        (folder / "eval.json").write_text(json.dumps(content | ({} if old else GAME) | dict(evaluated)))
    return folder


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Function that reports on a folder without drawing, which takes most of the time: (report.md, dict of its tables)."""

    def make_report(source="runs", *flags, draw=False):
        for name in () if draw else ("draw_curves", "draw_scores"):
            monkeypatch.setattr(report, name, lambda *_: None)
        monkeypatch.setattr(sys, "argv", ["report.py", f"{tmp_path}/{source}", "--out", f"{tmp_path}/of_{source}", *flags])
        report.main()
        tables = {p.stem: pd.read_csv(p) for p in (tmp_path / f"of_{source}").glob("*.csv") if p.stat().st_size > 1}
        return (tmp_path / f"of_{source}" / "report.md").read_text(), tables

    return make_report


def test_a_study(read, tmp_path):
    """Statistics as computed by hand, figures of each kind, curves as logged; all the same from the report's own tables."""
    for game, seed in (("Pong", 1), ("Pong", 2), ("Qbert", 1), ("Qbert", 2)):
        for hns, name, flags in ((0.9, "adaptive", {}), (0.5, "max-32", {"rollout_length_max": 32}), (0.2, "fixed", FIXED)):
            make_run(tmp_path / "runs" / name / f"{game}_{seed}", seed, hns + 0.2 * seed, game, **flags)
    text, tables = read(draw=True)
    own = tables["games"].set_index(["env_id", "variant"]).loc[("Qbert-v5", "PQN ABS 16-64")]
    wanted = [2, 1.2, 0.2 / math.sqrt(2), 163.88 + 1.2 * (13455 - 163.88)]
    assert own[["seeds", "hns_mean", "hns_std", "score_mean"]].tolist() == pytest.approx(wanted, rel=1e-5)
    totals = tables["aggregates"].set_index("variant")
    assert totals.loc["PQN ABS 16-64", list(report.METRICS)].tolist() == pytest.approx([1.2, 1.2, 1.2, 0])
    assert 1.1 <= totals.loc["PQN ABS 16-64", "mean_low"] < 1.2 < totals.loc["PQN ABS 16-64", "mean_high"] <= 1.3
    compared = tables["comparisons"].set_index(["variant", "baseline", "env_id"])
    own = compared.loc["PQN ABS 16-64", "PQN fixed 32", "all"]
    assert (own.probability_of_improvement, own.difference, own.improvement_percent) == pytest.approx((1, 0.7, 70))
    assert own.p == pytest.approx(2 / 36, rel=1e-4)  # of 6 * 6 ways to deal, the observed one and its mirror image
    assert own.difference_low < 0.7 < own.difference_high and len(compared) == 2 * 3
    drawn = {p.name for p in (tmp_path / "of_runs" / "figures").iterdir()}
    assert drawn == {part.split(")")[0] for part in text.split("(figures/")[1:]}
    kinds = {"episodic_return", "rollout_length", "profiles", "improvement", "longest_rollout"}
    assert {kind for kind in kinds for name in drawn if name.startswith(kind)} == kinds
    curve = tables["curves"][tables["curves"].run.str.endswith("adaptive/Qbert_1")].set_index("step")
    assert curve.rollout_length[50_000] == 16 + 49_152 // 3000 and math.isnan(curve.rollout_length[1000])
    again, others = read("of_runs", draw=True)
    assert again == text
    for name, table in tables.items():
        pd.testing.assert_frame_equal(others[name], table)
    for path in tmp_path.glob("runs/*/*/eval.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"mean": 7.0}))
    pd.testing.assert_frame_equal(read("runs", "--returns")[1]["games"], tables["games"], rtol=1e-4)


def test_functions():
    """As rliable and SciPy have it, where they do the same; the rest by hand."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(0.5, 1, (4, 3)), rng.normal(0, 1, (5, 3))
    x[0] = y[0]
    assert report.compare(x, y)[0] == pytest.approx(metrics.probability_of_improvement(x, y))
    assert report.compare(np.array([[3.0, 0.5]]), np.array([[2.0, 0.1]]))[2] == pytest.approx((50 + 40) / 2)
    exact = stats.permutation_test((x[:, 0], y[:4, 0]), lambda a, b: np.mean(a) - np.mean(b), n_resamples=np.inf)
    assert report.permutation_p(x[:, :1], y[:4, :1]) == pytest.approx(exact.pvalue)
    assert report.permutation_p(x[:2], y[:2], most=200) == pytest.approx(report.permutation_p(x[:2], y[:2]), abs=0.1)
    scores = rng.uniform(-0.1, 2, (3, 10))
    logs = [w * math.log10(1 + max(0, 100 * h)) for w, h in zip(report.ATARI10, scores.mean(axis=0), strict=True)]
    assert report.predicted_median(scores) == pytest.approx([10 ** sum(logs) - 1])


NONE, DAMAGED = "unreadable, no args.json", "unreadable, args.json is damaged"
ODD = [  # (reason that is given, options of the run, file that is then written anew, or deleted)
    ("unfinished, step 49,152 of 100,000 (49%)", {"share": 0.5}),
    ("not evaluated, eval.json lacks the mean", {"evaluated": {"mean": math.nan}}),
    ("not evaluated, eval.json is of Pong-v5 at step 51,200", {"evaluated": {"global_step": 51_200}}),
    ("not evaluated, eval.json is of Qbert-v5", {"evaluated": {"env_id": "Qbert-v5"}}),
    ("not evaluated, eval.json is damaged", {}, "eval.json", '{"mean": 1'),
    ("not evaluated, no eval.json", {}, "eval.json", None),
    ("diverged, a loss is not finite at step 2,048", {"loss": math.nan}),
    ("duplicate, {} counts instead; not evaluated", {"seed": 1, "old": True}, "eval.json", "[]"),
    ("unreadable, no training, an evaluation of runs/x", {"total_timesteps": 0, "init_from": "runs/x"}),
    ("unreadable, args.json lacks seed, total_timesteps", {"seed": None, "total_timesteps": "1e6"}),
    ("unreadable, TypeError", {"init_from": 3}),
    (DAMAGED, {}, "args.json", '{"env_id": "Po'),
    (DAMAGED, {}, "args.json", "[1, 2]"),
    (NONE, {}, "args.json", None),
]


def test_odd_folders(read, tmp_path):
    """What does not count is named once, with the reason; what is sound counts."""
    runs, reasons = tmp_path / "runs", {}
    good = [make_run(runs / "a" / "b" / f"pong_{seed}", seed) for seed in (1, 2)]
    for i, (reason, options, *file) in enumerate(ODD):
        folder = make_run(runs / "odd" / f"run_{i}", **{"seed": 10 + i} | options)
        reasons[folder] = reason.format(good[0])
        for name, text in [file] if file else []:
            (folder / name).write_text(text) if text else (folder / name).unlink()
    for file in ".lock", "checkpoint.pt", "checkpoint_5.pt", "eval.json", "events.out", "":
        (folder := runs / "deep" / "er" / f"with {file}").mkdir(parents=True)
        (folder / file).write_text("{}") if file else None
        reasons[folder] = NONE if file else "unreadable, an empty folder"
    text, tables = read()
    lines = text.split("## Left out of the scores")[1].strip().splitlines()
    assert len(lines) == len(reasons) == 20
    for folder, reason in reasons.items():
        assert sum(line.startswith(f"* {folder}: {reason}") for line in lines) == 1, (folder, reason, text)
    assert tables["games"].seeds.tolist() == [2] and tables["games"].hns_mean.tolist() == pytest.approx([0.5])


OWN, YOKED, EPOCHS = "PQN ABS 16-64", "PQN yoked 16-64", "PQN fixed 64, update_epochs 4"
WINDOW = f"{OWN}, divergence_window 1"
REPLAY = {"adapt_signal": "replay", "replay": "runs/2/checkpoint.pt"}
VARIANTS = [
    (OWN, 1, {"old": True, "evaluated": {"epsilon": 0.01}}),
    (OWN, 2, {"env_threads": 9}),
    (f"{OWN}, learning_rate 0.1", 1, {"learning_rate": 0.1}),
    (WINDOW, 1, {"divergence_window": 1}),
    ("mine ABS 16-64", 1, {"script": "mine.py", "beta": 3, "evaluated": {"max_episode_steps": 99, "time_limits": 7}}),
    ("other ABS 16-64", 1, {"script": "other.py", "learning_rate": 0.2}),
    (YOKED, 1, REPLAY | {"divergence_min": 0.2}),
    (YOKED, 2, REPLAY | {"replay": "runs/1/checkpoint.pt"}),
    ("GNS 16-64", 1, {"script": "gns_batch_atari.py", "adapt_signal": "noise-scale", "evaluated": {"precision": "bfloat16"}}),
    ("PQN fixed 32", 1, FIXED | {"evaluated": {"sticky_action_probability": 0.25}}),
    ("PQN fixed 64", 1, FIXED | {"num_steps": 64, "scale_epochs": True}),
    (EPOCHS, 1, {"rollout_length_min": 64, "scale_epochs": True}),
    ("PPO ABS 16-64", 1, {"script": "ppo_abs_atari.py", "adapt_signal": "kl"}),
]


def test_variants_and_comparisons(read, tmp_path):
    """Old and new runs are of one variant, and yoked ones whatever they replay; what differs in one thing is compared."""
    for i, (_, seed, options) in enumerate(VARIANTS):
        make_run(tmp_path / "runs" / f"{i:02}", seed, **options)
    text, tables = read()
    scores = tables["scores"].sort_values("run")
    assert list(zip(scores.variant, scores.seed, strict=True)) == [run[:2] for run in VARIANTS]
    adaptive, fixed = [OWN, WINDOW, YOKED, "GNS 16-64"], ["PQN fixed 32", "PQN fixed 64", EPOCHS]
    wanted = {(a, b) for a in adaptive for b in fixed} | {(a, b) for a in adaptive[:2] for b in adaptive[2:]}
    wanted |= {(OWN, WINDOW), (OWN, f"{OWN}, learning_rate 0.1"), ("mine ABS 16-64", OWN)}
    assert set(tables["comparisons"].groupby(["variant", "baseline"]).groups) == wanted
    named = "epsilon 0.0 (12,", "; epsilon 0.01 (1,", "steps: 99.0 (1,", "precision: bfloat16 (1,", "0.25 (1,", "limit: 1 runs"
    assert [words for words in named if words not in text] == []
