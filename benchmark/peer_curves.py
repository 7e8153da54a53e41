"""Learning curves of one of these scripts and of a peer that logs CleanRL's scalars, at settings that you made equal.

    python benchmark/peer_curves.py --ours runs/A runs/B --peer ../cleanrl/runs/C ../cleanrl/runs/D --out peers

Each folder is one seed. Prints a line per run: mean return of the games that ended in the last tenth of training and in all of
it, and agent steps per second of wall-clock time from the end of the first iteration to that of the last. Then the difference
of the means over seeds, ours less the peer's, with Welch's 95 % interval, for which both need two seeds. Writes peers.csv, the
curves at 100 points of training, and peers.png: thin lines are seeds, thick ones their means. A point of a curve is the mean
return of the games that ended in the 5 % of training before it.
"""

import argparse
import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from plot_run import can_write
from report import windowed_means
from scipy.stats import ttest_ind
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read_run(folder):
    """A run as (steps and returns of its games, agent steps of the run, agent steps per second); fails with one line."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    if folder.is_dir():
        events.Reload()
    try:
        games, iterations = events.Scalars("charts/episodic_return"), events.Scalars("charts/SPS")
    except KeyError:
        sys.exit(f"error: {folder} holds no charts/episodic_return and charts/SPS; give the folder of one run, runs/<run>")
    first, last = iterations[0], iterations[-1]
    speed = (last.step - first.step) / max(last.wall_time - first.wall_time, 1e-9)
    return (np.array([p.step for p in games]), np.array([p.value for p in games])), last.step, speed


def difference(ours, peer):
    """Difference of means with Welch's 95 % interval, as text; ours and peer hold one number per seed."""
    text = f"{np.mean(ours) - np.mean(peer):+.2f}"
    if min(len(ours), len(peer)) < 2:
        return f"{text}, no interval (one seed)"
    low, high = ttest_ind(ours, peer, equal_var=False).confidence_interval(0.95)
    return f"{text}, 95 % interval {low:+.2f} to {high:+.2f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", type=Path, nargs="+", required=True, help="run folders of one of these scripts")
    parser.add_argument("--peer", type=Path, nargs="+", required=True, help="run folders of the peer")
    parser.add_argument("--out", type=Path, required=True, help="the files to write, without .csv and .png")
    args = parser.parse_args()
    folders = [folder.resolve() for folder in args.ours + args.peer]
    if len(set(folders)) < len(folders):
        sys.exit("error: a run is given twice; give each seed's folder once")
    if not can_write(args.out.resolve().parent) or any(Path(f"{args.out}.{kind}").is_dir() for kind in ("csv", "png")):
        sys.exit(f"error: cannot write {args.out}.csv; choose a name in a folder that exists and that you may write to")
    runs = [(who, folder, *read_run(folder)) for who in ("ours", "peer") for folder in getattr(args, who)]
    lengths = {total for *_, total, _ in runs}
    if max(lengths) > 1.02 * min(lengths):
        sys.exit(f"error: the runs differ in length ({min(lengths):,} to {max(lengths):,} steps); compare equal budgets")

    grid = np.linspace(min(lengths) / 100, min(lengths), 100).round()
    curves, last, whole, speeds = ({"ours": [], "peer": []} for _ in range(4))
    lines = [f"{'':64}  last tenth  whole run  steps/s"]
    for who, folder, (steps, returns), total, speed in runs:
        if not (steps > 0.9 * total).any():
            sys.exit(f"error: no game of {folder} ended in the last tenth of its {total:,} steps; compare longer runs")
        curves[who].append(windowed_means(steps, returns, grid, grid[-1] / 20))
        last[who].append(returns[steps > 0.9 * total].mean())
        whole[who].append(returns.mean())
        speeds[who].append(speed)
        lines.append(f"{who}  {folder.name:58}  {last[who][-1]:10.2f}  {whole[who][-1]:9.2f}  {speed:7.0f}")
    print("\n".join(lines))
    print(f"difference, last tenth: {difference(last['ours'], last['peer'])}")
    print(f"difference, whole run: {difference(whole['ours'], whole['peer'])}")
    print(f"speed: {np.mean(speeds['ours']) / np.mean(speeds['peer']):.2f} times the peer's")

    with open(f"{args.out}.csv", "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["step", *(f"{who} {folder.name}" for who, folder, *_ in runs)])
        for step, *values in zip(grid.astype(int), *curves["ours"], *curves["peer"], strict=True):
            writer.writerow([step, *("" if np.isnan(value) else f"{value:.3f}" for value in values)])
    figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
    for who, color, line in (("ours", "#0072B2", "-"), ("peer", "#E69F00", "--")):
        label = f"{who} ({len(curves[who])} seed{'s' * (len(curves[who]) > 1)})"
        axis.plot(grid / 1e6, np.array(curves[who]).T, color=color, linestyle=line, linewidth=0.6)
        axis.plot(grid / 1e6, np.mean(curves[who], axis=0), color=color, linestyle=line, linewidth=1.8, label=label)
    axis.set(xlabel="agent steps (millions)", ylabel="return in training", xlim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(f"{args.out}.png", dpi=150)


if __name__ == "__main__":
    main()
