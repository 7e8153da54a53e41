"""Draws the returns in training of five variants of PQN, over all seeds that each has, from the tables in this folder.

    python benchmark/results/all_seeds.py returns_all_seeds.png

The event files of the runs are not in the repository; their curves at 200 points of training are, in each report's curves.csv.
"""

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

RESULTS = Path(__file__).parent
sys.path.insert(0, str(RESULTS.parent))
import report  # noqa: E402

REPORTS = [RESULTS / name / "report" for name in ("2026-11-21", "2026-11-26-seed-3", "2026-11-26-seed-4")]
VARIANTS = ["PQN ABS 16-64", "PQN time 16-64", "PQN fixed 16", "PQN fixed 32", "PQN fixed 64"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the picture to write")
    args = parser.parse_args()
    plt.rcParams.update(report.FONTS)
    runs, curves = (pd.concat(pd.read_csv(folder / f"{name}.csv") for folder in REPORTS) for name in ("scores", "curves"))
    styles = {variant: report.style_of(i) for i, variant in enumerate(VARIANTS)}
    runs = runs[runs["variant"].isin(VARIANTS) & (runs["state"] == "finished")]
    report.curve_figure(curves, runs, styles, "episodic_return", 2000).savefig(args.out, dpi=150)


if __name__ == "__main__":
    main()
