"""benchmark/branch.sh, and benchmark/premise.py on made-up branches and on small runs."""

import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, go
from test_jobs import job_list, parse
from test_runs import PQN, SIZE

sys.path.insert(0, str(ROOT / "benchmark"))
import premise  # noqa: E402
from report import ATARI57  # noqa: E402


def test_slopes():
    """Slopes come back within their intervals: -22 % per doubling of L with m constant, none with m proportional to L."""
    rng, rows = np.random.default_rng(0), []
    pairs = [parse(line)[1] for line in job_list("--seeds", "3 4", "a/parent", "a/other", script="branch.sh")]
    assert len(pairs) == 28 and len({flags["run-dir"] for flags in pairs}) == 28
    for flags in pairs:
        length, minibatches = int(flags["num-steps"]), int(flags["num-minibatches"])
        row = {"parent": flags["init-from"], "env_id": "Breakout-v5", "rollout_length": length, "minibatches": minibatches}
        level = 1 - 0.2 * np.log2(length / 32) * (minibatches == 32) + 0.02 * rng.normal()
        row["td_error"] = level * (2 if "other" in row["parent"] else 1)
        human, random = ATARI57.loc["Breakout-v5", ["human", "random"]]
        score = random + (human - random) * row["td_error"]
        rows.append(row | {"score": score, "return": score, "parent_minibatches": 32})
    branches = premise.families(pd.DataFrame(rows))
    table = premise.slopes(branches).set_index(["family", "outcome", "parent"])
    assert branches["family"].value_counts().tolist() == [16, 16] and len(table) == 2 * 3 * 3
    for (family, *_), row in table.iterrows():
        true = -20 / 0.9 if family == "constant m" else 0
        assert row.iloc[2] - 1 < true < row.iloc[3] + 1 and row.iloc[3] - row.iloc[2] < 10, (family, row)


def test_small_runs(tmp_path, monkeypatch):
    """Constant Q-values of 10 have a TD error of (0.99 * 10 - 10)^2 before the first point; churn and signs are measured."""
    size = [*SIZE, "--adapt-signal", "divergence", "--divergence-warmup", 2]
    assert go(tmp_path, PQN, *size, "--run-dir", "parent").code == 0
    for length in (4, 8):
        words = [*SIZE, "--init-from", "parent/checkpoint.pt", "--no-adapt-rollout", "--num-steps", length]
        assert go(tmp_path, PQN, *words, "--run-dir", f"branches/{length}").code == 0
    checkpoint = torch.load(path := tmp_path / "branches" / "4" / "checkpoint.pt", weights_only=True)
    checkpoint["network"] |= {"head.weight": 0 * checkpoint["network"]["head.weight"], "head.bias": torch.full((6,), 10.0)}
    torch.save(checkpoint, path)
    monkeypatch.chdir(tmp_path)
    for folder, out in ((".", "out"), ("out", "again")):
        monkeypatch.setattr(sys, "argv", ["premise.py", folder, "--out", out])
        premise.main()
    tables = {name: pd.read_csv(tmp_path / "out" / f"{name}.csv") for name in ("branches", "churn", "signs")}
    errors = tables["branches"].set_index("rollout_length")["td_error"]
    assert errors[4] == pytest.approx(0.01, rel=1e-3) and errors[8] != errors[4]
    assert tables["churn"][["divergence", "floor"]].mean().between(0, 1, inclusive="neither").all()
    assert set(tables["signs"]["sign"]) == {"losses/explained_variance", "losses/td_loss"}
    assert all((tmp_path / out / "branches.png").exists() for out in ("out", "again"))
    assert (tmp_path / "out/premise.md").read_text() == (tmp_path / "again/premise.md").read_text()
