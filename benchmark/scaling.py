"""What a score costs in steps, updates and compute: python benchmark/scaling.py runs/ --out report/

Folders are read as by report.py; written are scaling.md, scaling.png and tables as CSV. The method is that of Rybkin et al.,
"Value-Based Deep RL Scales Predictably" (arXiv 2502.04327), with rollouts of L steps, E environments, m minibatches, e epochs:

* Updates per step: sigma = e * m / (E * L); minibatch: B = E * L / m; so sigma * B = e. Of ABS: updates made over steps made.
* D_J, steps to reach return J: first crossing of the isotonic regression of a run's returns in training; median over the seeds
  of a cell (a variant in a game). A run that never crosses is censored: it counts as infinite.
* Levels J, unless given: 40, 60, 80, 100 % of the way from the first returns to what most runs of 3/4 of fixed cells reach.
* Law: D_J(sigma) = D_min * (1 + (sigma / b)^-a), over the fixed cells of one e, and over the best batch of each sigma where
  several e were tried, B*(sigma). Least squares in log D; an infinite median only lifts a law that lies below its runs' end.
* Compute, in forward passes a step: 1 + 1/L (acting) + 3 e (learning) + 2 M / (K E L) (measuring M states every K rollouts).
* Budget: F = updates + delta * steps, as compute hardly depends on sigma at one e; what larger batches save are sequential
  updates. The best sigma between those tried is a power law of F, fitted to all levels but the highest, which is held out.
* Intervals: 95 % percentile bootstrap over the seeds of each cell, of resamples that identify the value; too narrow from few.
"""

import argparse
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import report
import seaborn as sns
from matplotlib import ticker
from scipy import optimize, stats

RESAMPLES = 200


def read_study(paths):
    """(runs that have ended, dict from run to curve, dict from variant to settings); ValueError if they cannot be compared."""
    runs, curves, variants = report.read_runs(paths)
    runs, kinds = runs[runs["state"].isin(["finished", "not evaluated", "diverged"]) & runs["run"].isin(curves["run"])], []
    variants = {v: own | {"script": script.replace("gns_batch", "pqn_abs")} for v, (script, own) in variants.items()}
    for own in map(variants.get, runs["variant"].unique()):
        usual = report.defaults_of(own["script"])
        kinds.append({k: v for k, v in own.items() if not re.fullmatch(report.UPDATES + "|num_envs", k) and v != usual.get(k)})
    mixed = ", ".join(sorted({k for kind in kinds for k in kind if any(kind[k] != other.get(k) for other in kinds)}))
    if mixed or not kinds:
        raise ValueError(f"these runs differ in more than batch and updates: {mixed}" if mixed else "no run here has ended")
    runs = runs.assign(signal=[report.signal_of(variants[variant]) for variant in runs["variant"]])
    return runs, dict(list(curves.groupby("run"))), variants


def choose_levels(runs, curves):
    """The levels of one game that are used unless others are given, (4,)."""
    fits = runs["run"].map(lambda run: optimize.isotonic_regression(curves[run]["episodic_return"].dropna()).x)
    last = fits[runs["signal"] == "fixed"].str[-1].astype(float)
    reached = last.groupby(runs["variant"]).quantile(0.5, interpolation="lower")
    first, top = fits.str[0].median(), reached.quantile(0.25, interpolation="lower")
    return first + np.array([0.4, 0.6, 0.8, 1]) * (top - first)


def crossings(curve, own, levels):
    """(levels, 3): steps until a run reaches each level, infinite if never; updates and forward passes a step until then."""
    length = own["num_steps"] if report.signal_of(own) == "fixed" else curve["rollout_length"].ffill().bfill()
    epochs, batch = own["update_epochs"], own["num_envs"] * length
    epochs = np.maximum(epochs, bool(own.get("scale_epochs")) * epochs * length // own.get("num_steps", 1))
    measuring = 2 * own.get("reference_batch_size", 0) / (own.get("adapt_interval", 1) * batch)
    rates = epochs * own["num_minibatches"] / batch, 1 + 1 / length + 3 * epochs + measuring
    spent = [np.cumsum(rate * np.diff(curve["step"], prepend=0)) / curve["step"] for rate in rates]
    table = np.column_stack([curve["step"], *spent]).round(9)
    table = np.vstack([table[curve["episodic_return"].notna()], [np.inf, *table[-1, 1:]]])
    return table[np.searchsorted(optimize.isotonic_regression(curve["episodic_return"].dropna()).x, levels)]


def law(sigma, D_min, b, a):
    return D_min * (1 + (sigma / b) ** -a)  # steps until a level, arXiv 2502.04327


def fit_law(sigma, steps, limit, least):
    """D_min, b, a from steps (cells,), infinite where over limit, the length of the runs; NaN if < least sigmas arrive."""
    reached = np.isfinite(steps)
    if len(np.unique(sigma[reached])) < least:
        return np.full(3, np.nan)
    target, most = np.log(np.where(reached, steps, limit)), np.where(reached, np.inf, 0)
    bounds = np.log([[1, sigma.min() / 30, 0.2], [np.inf, sigma.max() * 30, 5]])
    start = np.log([steps.min() / 2, np.median(sigma), 1])
    fit = optimize.least_squares(lambda x: np.minimum(np.log(law(sigma, *np.exp(x))) - target, most), start, bounds=bounds).x
    return np.exp(fit)


def hold_out(grid, budget):
    """The highest level's best sigma predicted from those of lower levels that lie inside the grid; budget: (levels, grid)."""
    best, least = budget.argmin(axis=1), np.log(budget.min(axis=1))
    inside, exponent, predicted = np.flatnonzero(best[:-1] % (len(grid) - 1)), np.nan, np.nan
    if len(inside) > 1 and not np.isnan(least).any():
        exponent, constant = np.polyfit(least[inside], np.log(grid[best[inside]]), 1)
        predicted = np.exp(constant + exponent * least[-1])
    over = np.interp(predicted, grid, budget[-1]) / budget[-1].min() - 1
    error = predicted / grid[best[-1]] - 1
    return {"F_exponent": exponent, "error_percent": 100 * error, "F_excess_percent": 100 * over}


def best_batches(fixed):
    """B*(sigma): a row per level; the best batch at each sigma at which several were tried, and its exponent over sigma."""
    rows, fixed = [], fixed[fixed.groupby(["J", "sigma"])["e"].transform("nunique") > 1]
    for level, own in fixed.groupby("J"):
        own = own.loc[own.groupby("sigma")["steps"].idxmin()]
        B = (own["e"] / own["sigma"]).where(np.isfinite(own["steps"])).to_list()
        slope = stats.linregress(np.log(own["sigma"]), np.log(B)).slope if len(own) > 1 else np.nan
        rows.append(
            {"J": level} | dict(zip((f"B at 1/{1 / s:.0f}" for s in own["sigma"]), B, strict=True)) | {"exponent": slope}
        )
    return pd.DataFrame(rows)


def analyse(reached, variants, levels, limit, delta, least=1):
    """Dict of the tables of one game; reached: dict from variant to crossings (seeds, levels, 3)."""
    cells, laws = [], []
    for variant, cell in reached.items():
        own, (steps, sigma, passes) = variants[variant], np.median(cell, axis=0).T
        row = {"variant": variant, "signal": report.signal_of(own), "e": own["update_epochs"], "J": levels, "seeds": len(cell)}
        row["line"] = f"e = {row['e']}" + ", scaled" * bool(own.get("scale_epochs"))
        row |= {"censored": np.isinf(cell[..., 0]).sum(axis=0).astype(object), "of_steps": limit, "sigma": sigma}
        cells.append(pd.DataFrame(row | {"steps": steps, "updates": sigma * steps, "forward_passes": passes * steps}))
    cells = pd.concat(cells, ignore_index=True)
    fixed = cells[cells["signal"] == "fixed"]
    lines = dict(list(fixed.groupby("line")))
    lines |= {"best": fixed.loc[fixed.groupby(["J", "sigma"])["steps"].idxmin()]} if len(lines) > 1 else {}
    for line, own in lines.items():
        fits = np.stack([fit_law(at["sigma"].to_numpy(), at["steps"].to_numpy(), limit, least) for _, at in own.groupby("J")])
        grid = np.geomspace(own["sigma"].min(), own["sigma"].max(), 401)
        budget = (grid + delta) * law(grid, *fits.T[..., None])
        row = {"line": line, "J": levels} | dict(zip(("D_min", "b", "a"), fits.T, strict=True)) | {"F": budget.min(axis=1)}
        row |= {"best_sigma": grid[budget.argmin(axis=1)], "first_sigma": grid[0], "last_sigma": grid[-1]}
        laws.append(pd.DataFrame(row | hold_out(grid, budget)))
    laws = pd.concat(laws, ignore_index=True)
    own = cells[["line", "J"]].merge(laws, how="left")
    cells["steps_over_law"] = cells["steps"] / law(cells["sigma"], own["D_min"], own["b"], own["a"])
    return {"cells": cells, "laws": laws, "batches": best_batches(fixed)}


def study_game(runs, curves, variants, levels, delta):
    """Dict of the tables of one game, with the ends of intervals; none where resampling the seeds changes nothing."""
    rng, limit = np.random.default_rng(0), int(runs["total_timesteps"].max())
    cells = runs.groupby("variant", sort=False)["run"]
    samples = [{v: np.stack([crossings(curves[run], variants[v], levels) for run in own]) for v, own in cells}]
    if np.isinf([np.median(samples[0][v][..., 0], axis=0) for v in runs.loc[runs["signal"] == "fixed", "variant"]]).all():
        raise ValueError(f"no fixed rollout reaches any J in {runs['env_id'].iloc[0]}, that is no median over seeds")
    samples += [{v: cell[rng.integers(len(cell), size=len(cell))] for v, cell in samples[0].items()} for _ in range(RESAMPLES)]
    estimates = analyse(samples[0], variants, levels, limit, delta, least=3)  # a law of fewer sigmas would be a guess
    resamples = [analyse(sample, variants, levels, limit, delta) for sample in samples[1:]]
    laws = estimates["laws"]
    laws.loc[~laws["b"].between(laws["first_sigma"] / 29, 29 * laws["last_sigma"]), ["D_min", "b"]] = np.nan  # at a bound
    laws.loc[~laws["best_sigma"].between(laws["first_sigma"], laws["last_sigma"], inclusive="neither"), "best_sigma"] = np.nan
    for name, table in estimates.items():
        for column in table.select_dtypes("number"):
            values = pd.DataFrame([resample[name][column] for resample in resamples])
            ends = values.quantile([0.025, 0.975], interpolation="nearest").to_numpy(float)
            ends[:, (ends[0] == ends[1]) | table[column].isna()] = np.nan
            table[f"{column}_low"], table[f"{column}_high"] = ends
        table.insert(0, "game", runs["env_id"].iloc[0])
    return estimates


def told(row, name):
    """A number of a table in words, with its interval."""
    ends = [report.number(row.get(name + end, np.nan)) for end in ("_low", "_high")]
    return (report.number(row[name]) or "unknown") + (f" [{', '.join(ends)}]" if all(ends) else "")


def notes_of(cells, laws, batches):
    """Lines on one game: what is censored, what is not identified and why, the held-out error, where adaptive runs lie."""
    for level, own in cells.groupby("J"):
        yield f"J = {level:.3g}: {own['censored'].sum()} of {own['seeds'].sum()} runs never get there (censored)"
    if single := cells.loc[cells["seeds"] == 1, "variant"].nunique():
        yield f"one seed, so no interval, in {single} of {cells['variant'].nunique()} cells"
    if batches.empty:
        yield "B*(sigma) is not identified, as sigma * B = e, and one e, so one batch, was tried at each sigma"
    for row in batches.drop(columns="game").to_dict("records"):
        yield "B*: " + ", ".join(f"{name} {told(row, name)}" for name in row if not name.endswith(("_low", "_high")))
    why = {"a": "fewer than three sigmas get there", "b": "steps are level, or fall like a power of sigma"}
    why |= {"best_sigma": "it is the first or last one tried", "F_exponent": "two lower levels need a best sigma"}
    for line, own in laws.groupby("line", sort=False):
        for name, reason in why.items():
            if (unknown := own[name].isna() & (own["a"].notna() | (name == "a"))).any():
                yield f"{line}, J = {', '.join(f'{j:.3g}' for j in own['J'][unknown])}: {name} is not identified, as {reason}"
        if not np.isnan((row := own.iloc[-1])["F_exponent"]):
            cost = f"error {told(row, 'error_percent')} %, F {told(row, 'F_excess_percent')} % above the least"
            yield f"{line}: best sigma ~ F^{told(row, 'F_exponent')}; held out, J = {row['J']:.3g}: {cost}"
    for row in cells[(cells["signal"] != "fixed") & (cells["J"] == cells["J"].max())].to_dict("records"):
        yield f"{row['variant']}, J = {row['J']:.3g}: {told(row, 'steps_over_law')} of the steps of the law at its sigma"


def draw(games, path):
    """A row of panels per game: steps over updates per step, over sequential updates, over forward passes; lines: the laws."""
    panels = {"sigma": "updates per step", "updates": "sequential updates", "forward_passes": "forward passes"}
    figure, axes = plt.subplots(len(games), 3, figsize=(13, 4 * len(games)), squeeze=False, layout="constrained")
    for row, (game, tables) in zip(axes, games.items(), strict=True):
        cells = tables["cells"].query("steps <= of_steps").sort_values(["signal", "J"], key=lambda x: x.replace({"fixed": ""}))
        colours = dict(zip(cells["J"].unique(), sns.color_palette("viridis", cells["J"].nunique()), strict=True))
        look = {"hue": [f"J = {j:.3g}" for j in cells["J"]], "palette": [*colours.values()], "s": 100, "zorder": 3}
        look["style"] = (cells["signal"] + ", " + cells["line"]).to_list()
        for axis, (name, title) in zip(row, panels.items(), strict=True):
            sns.scatterplot(x=cells[name].to_list(), y=cells["steps"].to_list(), ax=axis, legend=axis is row[-1], **look)
            for cell in cells.to_dict("records"):
                ends = np.minimum([cell["steps_low"], cell["steps_high"]], cell["of_steps"])
                x = np.full(2, cell[name]) if name == "sigma" else ends * cell[name] / cell["steps"]
                axis.plot(x, ends, color=colours[cell["J"]], alpha=0.4)
            axis.set(title=f"{game}: steps over {title}", xlabel=f"{title} until J", ylabel="agent steps until J")
            axis.loglog()
            axis.minorticks_off()
            for side in axis.xaxis, axis.yaxis:
                side.set(major_locator=ticker.LogLocator(subs=(1, 2, 5)), major_formatter=ticker.EngFormatter())
        fixed = tables["cells"][tables["cells"]["signal"] == "fixed"]
        for level, own in fixed[fixed["line"] == fixed["line"].mode()[0]].groupby("J"):
            sigma = np.geomspace(own["sigma"].min(), own["sigma"].max())
            steps = law(sigma, *fit_law(own["sigma"].to_numpy(), own["steps"].to_numpy(), own["of_steps"].max(), 3))
            row[0].plot(sigma, steps, color=colours.get(level))
            row[1].plot(sigma * steps, steps, color=colours.get(level))
        row[0].set_xticks(ticks := fixed["sigma"].unique(), [f"1/{1 / sigma:.3g}" for sigma in ticks])
        sns.move_legend(row[-1], "upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(f"Steps until return J in training: medians over seeds, 95 % intervals, laws at {fixed['line'].mode()[0]}")
    figure.savefig(path, dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="runs, or folders that hold runs")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--thresholds", type=float, nargs="+", help="levels J, for every game")
    parser.add_argument("--delta", type=float, default=1 / 64, help="price of an agent step in updates")
    args = parser.parse_args()
    games, notes = {}, []
    try:
        runs, curves, variants = read_study(args.runs)
        for game, own in runs.groupby("env_id"):
            levels = np.unique(args.thresholds) if args.thresholds else choose_levels(own, curves)
            games[game] = study_game(own, curves, variants, levels, args.delta)
            notes += [f"{game}: {note}" for note in notes_of(**games[game])]
    except ValueError as e:
        parser.exit(2, f"error: {e}\n")
    args.out.mkdir(parents=True, exist_ok=True)
    draw(games, args.out / "scaling.png")
    sections = ["# What a score costs", "\n".join(f"* {note}." for note in notes), "![Steps until J](scaling.png)"]
    for name in "cells", "laws", "batches":
        table = pd.concat([tables[name].dropna(axis=1, how="all") for tables in games.values()])
        if len(table):
            table.to_csv(args.out / f"{name}.csv", index=False, float_format="%.6g")
            sections += [f"## {name.capitalize()}", report.markdown(table)]
    (args.out / "scaling.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    print("\n".join([*notes, f"{len(runs)} runs: {args.out / 'scaling.md'}"]))


if __name__ == "__main__":
    main()
