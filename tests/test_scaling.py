"""benchmark/scaling.py on made-up curves of known laws; benchmark/scaling.sh prints the grid."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from test_jobs import parse

sys.path.insert(0, str(ROOT / "benchmark"))
import scaling  # noqa: E402

D_MIN, B = 40_000 * 1.5 ** np.arange(4), 1 / 256 * 1.3 ** np.arange(4)  # of levels 1 to 4


def settings(length, m=32, e=2):  # of a fixed rollout, or of ABS where its length is 0
    own = {"adapt_rollout": not length, "num_envs": 128, "num_steps": length, "num_minibatches": m, "update_epochs": e}
    return own if length else own | {"num_steps": 32, "reference_batch_size": 2048, "adapt_interval": 4}


def study(cells, seeds):
    """Tables from [(settings, steps until levels 1 to 4), ...]; seed 2 is exact, 4 never arrives, first returns are luck."""
    runs, curves, steps = [], {}, np.arange(500, 10**6 + 1, 500)
    for i, seed in np.ndindex(len(cells), seeds):
        runs.append({"run": len(curves), "variant": i, "signal": "fixed", "total_timesteps": 10**6, "env_id": "Pong-v5"})
        returns = [10, *np.interp(steps[1:], [0, *cells[i][1] * (1.03 ** (seed - 2) + 99 * (seed > 3))], range(5))]
        curve = {"step": steps, "episodic_return": returns, "rollout_length": np.where(steps <= 20_000, 16, 64)}
        curves[len(curves)] = pd.DataFrame(curve)
    scaling.RESAMPLES = 10
    return scaling.study_game(pd.DataFrame(runs), curves, [own for own, _ in cells], np.arange(1, 5), 1 / 64)


@pytest.mark.parametrize("broken, error", [(1, (-3, 3)), (6, (-60, -40))])
def test_a_law_comes_back(broken, error):
    """Within intervals; the highest level's best sigma, sqrt(b * delta), is predicted unless its b is broken. ABS by hand."""
    b, D, short = B * [1, 1, 1, broken], np.array([100_000, 200_000, 300_000, 400_000]), 20_000
    cells = [(settings(32, m), scaling.law(m / 2048, D_MIN, b, 1)) for m in (8, 16, 32, 64, 128)]
    tables = study([(settings(0), D), *cells], 5)
    table = tables["cells"].head(4).merge(tables["laws"].drop(columns="line"), on="J")
    sigma, passes = (short / 32 + (D - short) / 128) / D, short * (7 + 1 / 16 + 1 / 2) + (D - short) * (7 + 1 / 64 + 1 / 8)
    true = {"D_min": D_MIN, "b": b, "a": 1, "best_sigma": np.sqrt(b / 64), "updates": sigma * D, "forward_passes": passes}
    for name, value in (true | {"steps_over_law": D / scaling.law(sigma, *(table[p] for p in ("D_min", "b", "a")))}).items():
        assert (table[name] / value).tolist() == pytest.approx([1] * 4, 0.05 if name in tables["laws"] else 0.002), name
        assert ((table[f"{name}_low"] <= value) & (value <= table[f"{name}_high"])).all(), name
    assert table["error_percent"].between(*error).all()


def test_the_grid():
    """Its cells come for one seed after the other, each in its own folder; they identify B* at two sigmas."""
    jobs = [parse(line)[1] for line in subprocess.getoutput(f"{ROOT}/benchmark/scaling.sh").splitlines()]
    names = "num-steps rollout-length-min num-minibatches update-epochs".split()
    grid = [tuple(int(job.get(name, 0)) for name in names) for job in jobs]
    wanted = {(32, 0, m, e) for m in (8, 32, 128) for e in (1, 2, 4)} | {(16, 0, 32, 2), (0, 64, 32, 2), (0, 0, 32, 2)}
    assert set(grid[:12]) == set(grid[12:]) == wanted and [job["seed"] for job in jobs] == ["1"] * 12 + ["2"] * 12
    assert len({job["run-dir"] for job in jobs}) == 24
    cells = [(settings(a or b, m, e), e * (a or b) * 128 / m) for a, b, m, e in wanted if a or b]  # e * B, 512 for the best
    batches = study([(own, D_MIN * (1 + np.log(x / 512) ** 2)) for own, x in cells], 1)["batches"]
    np.testing.assert_allclose(batches[["B at 1/128", "B at 1/32", "exponent"]], [[256, 128, -0.5]] * 4)


def test_odd_input(monkeypatch, capsys):
    """One seed at one sigma, and levels that nobody reaches: a clear line."""
    lacks = "e = 2, J = 1, 2, 3, 4: a is not identified, as fewer than three sigmas get there"
    assert {"one seed, so no interval, in 1 of 1 cells", lacks} <= {*scaling.notes_of(**study([(settings(32), D_MIN)], 1))}
    monkeypatch.setattr(sys, "argv", ["", f"{ROOT}/benchmark/results/pqn-two-games", "--out", "", "--thresholds", "1e3"])
    with pytest.raises(SystemExit, match="2"):
        scaling.main()
    assert capsys.readouterr().err == "error: no fixed rollout reaches any J in Breakout-v5, that is no median over seeds\n"
