"""benchmark/report.py and benchmark/throughput.py, on made-up runs."""

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
import throughput  # noqa: E402

RANDOM, HUMAN = report.ATARI57["random"], report.ATARI57["human"]
ARGS = {
    "num_envs": 128,
    "total_timesteps": 100_000,
    "learning_rate": 2.5e-4,
    "num_steps": 32,
    "precision": "auto",
    "replay": "",
}
ARGS |= {
    "adapt_rollout": True,
    "adapt_signal": "divergence",
    "rollout_length_min": 16,
    "rollout_length_max": 64,
    "init_from": "",
}
ARGS |= {"divergence_min": 0.05, "divergence_window": 20, "scale_epochs": False, "episodic_life": False, "env_threads": 0}
FIXED = {"adapt_rollout": False, "divergence_min": 0.1, "env_threads": 2}  # the latter two without effect
GAME = {"sticky_action_probability": 0.0, "max_episode_steps": 27000, "precision": "float32"}


def make_run(folder, seed=1, hns=0.5, game="Pong", script="pqn_abs_atari.py", share=1.0, old=False, evaluated=(), **settings):
    """A run as the scripts leave it, trained up to this share, with this human-normalised score at its end."""
    folder.mkdir(parents=True)
    args = ARGS | {"env_id": f"{game}-v5", "seed": seed, "exp_name": script.removesuffix(".py")} | settings
    if old:
        args = {k: v for k, v in args.items() if v != ""} | {
            "precision": "float32",
            "cudagraphs": True,
            "schedule_timesteps": 0,
        }
        (folder / "versions.json").write_text(json.dumps([{"script": script}]))
    elif old is not None:  # where the folder alone tells the script
        args["computed_with"] = {"script": script, "precision": "float32"}
    (folder / "args.json").write_text(json.dumps(args))
    (folder / script).write_text("# the script\n")
    score = RANDOM[f"{game}-v5"] + hns * (HUMAN - RANDOM)[f"{game}-v5"]
    with SummaryWriter(str(folder)) as writer:
        for step in range(2048, int(share * 100_000) + 1, 2048):
            for tag, value in (
                ("charts/episodic_return", score),
                ("abs/rollout_length", 16 + step // 3000),
                ("losses/td_loss", 1),
            ):
                writer.add_scalar(tag, value, step)
    if share == 1:
        content = {
            "env_id": f"{game}-v5",
            "mean": score,
            "episodes": 100,
            "epsilon": 0.0,
            "distinct_games": 99,
            "time_limits": 0,
        }
        (folder / "eval.json").write_text(
            json.dumps(content | ({} if old else GAME | {"global_step": 98_304}) | dict(evaluated))
        )
    return folder


def make_report(monkeypatch, folder, out):
    """(text of report.md, dict of its tables)."""
    monkeypatch.setattr(sys, "argv", ["report.py", str(folder), "--out", str(out)])
    report.main()
    return (out / "report.md").read_text(), {p.stem: pd.read_csv(p) for p in out.glob("*.csv") if p.stat().st_size > 1}


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Reports on tmp_path / "runs" without drawing, which takes most of the time."""
    monkeypatch.setattr(report, "draw_curves", lambda *_: None)
    monkeypatch.setattr(report, "draw_scores", lambda *_: None)
    return lambda: make_report(monkeypatch, tmp_path / "runs", tmp_path / "report")


def test_a_study(tmp_path, monkeypatch):
    """Statistics as computed by hand, figures of each kind, curves as logged; the same again from the same runs, and from the
    tables of the first report."""
    for game, seed in (("Pong", 1), ("Pong", 2), ("Qbert", 1), ("Qbert", 2)):
        make_run(tmp_path / "runs" / "adaptive" / f"{game}_{seed}", seed, 0.9 + 0.2 * seed, game)
        make_run(tmp_path / "runs" / "max-32" / f"{game}_{seed}", seed, 0.5 + 0.2 * seed, game, rollout_length_max=32)
        make_run(tmp_path / "runs" / "fixed" / f"{game}_{seed}", seed, 0.2 + 0.2 * seed, game, **FIXED)
    text, tables = make_report(monkeypatch, tmp_path / "runs", tmp_path / "report")
    own = tables["games"].set_index(["env_id", "variant"]).loc[("Qbert-v5", "PQN ABS 16-64")]
    assert own.seeds == 2 and (own.hns_mean, own.hns_std) == pytest.approx((1.2, 0.2 / math.sqrt(2)))
    assert own.score_mean == pytest.approx(163.88 + 1.2 * (13455 - 163.88))
    totals = tables["aggregates"].set_index("variant")
    assert totals.loc["PQN ABS 16-64", list(report.METRICS)].tolist() == pytest.approx([1.2, 1.2, 1.2, 0])
    assert totals.loc["PQN fixed 32", "optimality_gap"] == pytest.approx(0.5) and set(totals.games) == {2}
    assert 1.1 <= totals.loc["PQN ABS 16-64", "mean_low"] < 1.2 < totals.loc["PQN ABS 16-64", "mean_high"] <= 1.3
    compared = tables["comparisons"].set_index(["variant", "baseline", "env_id"])
    assert {(a, b) for a, b, _ in compared.index} == {(f"PQN ABS 16-{n}", "PQN fixed 32") for n in (32, 64)}
    own = compared.loc["PQN ABS 16-64", "PQN fixed 32", "all"]
    assert (own.probability_of_improvement, own.difference, own.improvement_percent) == pytest.approx((1, 0.7, 70))
    assert own.difference_low < 0.7 < own.difference_high
    assert own.p == pytest.approx(2 / 36, rel=1e-4)  # of 6 * 6 ways to deal, the observed one and its mirror image
    drawn = {p.name for p in (tmp_path / "report" / "figures").iterdir()}
    assert drawn == {part.split(")")[0] for part in text.split("(figures/")[1:]}
    for name in ("episodic_return", "rollout_length", "profiles", "improvement", "longest_rollout"):
        assert any(file.startswith(name) for file in drawn), name
    curve = tables["curves"][tables["curves"].run.str.endswith("adaptive/Qbert_1")].set_index("step")
    assert curve.rollout_length[50_000] == 16 + 49_152 // 3000 and math.isnan(curve.rollout_length[1000])
    for source, out in (("runs", "again"), ("report", "from_tables")):
        again, others = make_report(monkeypatch, tmp_path / source, tmp_path / out)
        assert again == text
        for name, table in tables.items():
            pd.testing.assert_frame_equal(others[name], table)


def test_functions():
    """As rliable and SciPy have it, where they do the same; the rest by hand."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(0.5, 1, (4, 3)), rng.normal(0, 1, (5, 3))
    x[0] = y[0]
    assert report.compare(x, y)[0] == pytest.approx(metrics.probability_of_improvement(x, y))
    assert report.compare(np.array([[3.0, 0.5]]), np.array([[2.0, 0.1]]))[2] == pytest.approx((50 + 40) / 2)
    exact = stats.permutation_test((x[:, 0], y[:4, 0]), lambda a, b: np.mean(a) - np.mean(b), n_resamples=np.inf)
    assert report.permutation_p(x[:, :1], y[:4, :1]) == pytest.approx(exact.pvalue)
    assert report.permutation_p(np.array([[5.0]]), np.array([[1.0], [2.0]])) == pytest.approx(1 / 3)
    assert report.permutation_p(x[:2], y[:2], most=200) == pytest.approx(report.permutation_p(x[:2], y[:2]), abs=0.1)
    scores = rng.uniform(-0.1, 2, (3, 10))
    logs = [w * math.log10(1 + max(0, 100 * h)) for w, h in zip(report.ATARI10, scores.mean(axis=0), strict=True)]
    assert report.predicted_median(scores) == pytest.approx([10 ** sum(logs) - 1])


def test_odd_folders(read, tmp_path):
    """What does not count is named once, with the reason; what counts is what is sound."""
    good = [make_run(tmp_path / "runs" / "a" / "b" / f"pong_{seed}", seed) for seed in (1, 2)]
    reasons, damage = {}, {}
    for reason, options in {
        "unfinished, step 49,152 of 100,000 (49%)": {"share": 0.5},
        "not evaluated, eval.json lacks the mean": {"evaluated": {"mean": math.nan}},
        "not evaluated, eval.json is of Pong-v5 at step 51,200": {"evaluated": {"global_step": 51_200}},
        "not evaluated, eval.json is of Qbert-v5": {"evaluated": {"env_id": "Qbert-v5"}},
        "unreadable, no training, an evaluation of runs/x": {"total_timesteps": 0, "init_from": "runs/x"},
        "unreadable, args.json lacks seed": {"seed": None},
        "unreadable, args.json lacks total_timesteps": {"total_timesteps": "1e6"},
        f"duplicate, finished ; counts instead: {good[0]}": {"seed": 1, "evaluated": {"mean": 21}},
        "diverged, a loss is not finite at step 51,200": {"share": 0.5},
        "not evaluated, no eval.json": {},
        "not evaluated, eval.json is damaged": {"evaluated": {"mean": 3}},
        "unreadable, no args.json": {},
        "unreadable, args.json is damaged": {"learning_rate": 1},
        "unreadable, AttributeError": {},
        "unreadable, KeyError: 'rollout_length_max'": {},
    }.items():
        seed = len(reasons) + 10
        reasons[make_run(tmp_path / "runs" / "odd" / f"run_{seed}", **{"seed": seed} | options)] = reason
        damage[reason.split(", ")[1].split(" in ")[0]] = list(reasons)[-1]
    for event in damage[f"finished ; counts instead: {good[0]}"].glob("events*"):
        event.rename(event.parent / "events.out.tfevents.1000.older")
    with SummaryWriter(str(damage["a loss is not finite at step 51"])) as writer:
        writer.add_scalar("losses/td_loss", math.nan, 51_200)
    (damage["no eval.json"] / "eval.json").unlink()
    (damage["eval.json is damaged"] / "eval.json").write_text('{"mean": 1')
    (damage["no args.json"] / "args.json").unlink()
    (damage["args.json is damaged"] / "args.json").write_bytes(b"\xff\xfe{")
    (damage["AttributeError"] / "args.json").write_text("[1, 2]")
    (damage["KeyError: 'rollout_length_max'"] / "args.json").write_text(json.dumps(ARGS | {"env_id": "Pong-v5", "seed": 3}))
    for name, file in {
        "empty": "",
        "locked": ".lock",
        "weights": "checkpoint_5.pt",
        "scores": "eval.json",
        "log": "events.out.1",
    }.items():
        (folder := tmp_path / "runs" / "odd" / "deep" / name).mkdir(parents=True)
        (folder / file).write_text("{}") if file else None
        reasons[folder] = "unreadable, no args.json" if file else "unreadable, an empty folder"
    text, tables = read()
    lines = text.split("## Left out of the scores")[1].strip().splitlines()
    assert len(lines) == len(reasons) == 20
    for folder, reason in reasons.items():
        assert sum(line.startswith(f"* {folder}: {reason}") for line in lines) == 1, (folder, reason, text)
    assert tables["games"].seeds.tolist() == [2] and tables["games"].hns_mean.tolist() == pytest.approx([0.5])
