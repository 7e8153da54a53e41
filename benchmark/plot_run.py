"""Plots one run: mean return of the last 100 games, behavioral divergence and rollout length over agent steps.

    python benchmark/plot_run.py runs/<run> --out figure.png [--csv figure.csv]

The CSV holds what is drawn: one row per iteration, empty where nothing was measured.
"""

import argparse
import csv
import json
import logging
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of every run that was continued


def read_scalars(run_dir):
    """All scalars of a run: a dict from name to (steps, values), two arrays of one length."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    scalars = {}
    for name in events.Tags()["scalars"]:
        points = events.Scalars(name)
        scalars[name] = np.array([p.step for p in points]), np.array([p.value for p in points])
    return scalars


def can_write(folder):
    """Whether files can be made in a folder, found out by trying."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
        return True
    except OSError:
        return False


def table(scalars):
    """Rows of (step, return, rollout length, divergence, mean divergence), one per iteration; None where not measured."""
    game_steps, game_returns = scalars.get("charts/episodic_return", (np.array([]), np.array([])))
    returns = pd.Series(game_returns).rolling(100, min_periods=1).mean().to_numpy()
    divergence = {
        name: dict(zip(*scalars.get(name, ((), ())), strict=True)) for name in ("abs/divergence", "abs/divergence_mean")
    }
    for step, length in zip(*scalars["abs/rollout_length"], strict=True):
        games = np.searchsorted(game_steps, step, side="right")
        mean_return = float(returns[games - 1]) if games else None
        yield [int(step), mean_return, int(length), *(divergence[name].get(step) for name in divergence)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a folder under runs/")
    parser.add_argument("--out", type=Path, required=True, help="the figure to write (png, pdf or svg)")
    parser.add_argument("--csv", type=Path, help="the table to write")
    args = parser.parse_args()
    scalars = read_scalars(args.run) if args.run.is_dir() else {}
    if "abs/rollout_length" not in scalars:
        sys.exit(f"error: {args.run} holds no run of these scripts; give a folder such as runs/Pong-v5__pqn_abs_atari__1__...")
    if args.out.suffix not in (".png", ".pdf", ".svg"):
        sys.exit(f"error: --out {args.out} must be a file that ends in .png, .pdf or .svg")
    for path in filter(None, (args.out, args.csv)):
        if path.is_dir() or not can_write(path.resolve().parent):
            sys.exit(f"error: cannot write {path}; choose a file in a folder that exists and that you may write to")
    try:
        settings = json.loads((args.run / "args.json").read_text())
        title = f"{settings['env_id']}, {settings['exp_name']}, seed {settings['seed']} (one run)"
    except (OSError, ValueError, TypeError, KeyError):
        sys.exit(f"error: {args.run / 'args.json'} is missing or damaged; it says which run this is")
    header = ["step", "return_mean_100_games", "rollout_length", "divergence", "divergence_mean"]
    rows = list(table(scalars))
    if args.csv:
        with args.csv.open("w", newline="") as f:
            writer = csv.writer(f)
            writer.writerow(header)
            for row in rows:
                writer.writerow(["" if x is None else round(float(x), 4) if isinstance(x, float) else x for x in row])
    steps, returns, lengths, divergence, divergence_mean = (np.array(c, dtype=float) for c in zip(*rows, strict=True))
    millions = steps / 1e6
    figure, axes = plt.subplots(3, 1, figsize=(7, 6), sharex=True, layout="constrained")
    axes[0].plot(millions, returns, color="black", linewidth=1.5)
    axes[0].set_ylabel("return\n(mean of last 100 games)")
    axes[0].set_title(title)
    measured = ~np.isnan(divergence)
    axes[1].plot(millions[measured], divergence[measured], ".", color="0.7", markersize=3, label="each measurement")
    if not np.isnan(divergence_mean).all():  # PPO is fed the KL divergence instead
        axes[1].plot(millions[measured], divergence_mean[measured], color="black", linewidth=1.5, label="mean that ABS is fed")
    axes[1].set_ylabel("behavioral\ndivergence")
    axes[1].set_ylim(0, 1)
    axes[1].legend(loc="upper right", fontsize="small")
    axes[2].step(millions, lengths, where="pre", color="black", linewidth=1.5)
    axes[2].set_ylabel("rollout length\n(steps per environment)")
    axes[2].set_xlabel("agent steps (millions)")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(args.out, dpi=120)


if __name__ == "__main__":
    main()
