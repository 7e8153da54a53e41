"""The README's evidence is what the published measurements say: its figures, computed anew from benchmark/results and docs."""

import itertools
import json
import math
import re
import subprocess
import sys
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import MODULES, ROOT, SCRIPTS
from scipy.stats import ttest_ind
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(ROOT / "benchmark"))
import report  # noqa: E402

STUDY = ROOT / "benchmark" / "results" / "2026-11-21"
MAIN, DETAILS = (ROOT / "README.md").read_text(), (STUDY / "README.md").read_text()
SPEED, EVIDENCE = ((ROOT / "docs" / f"{name}.md").read_text() for name in ("speed", "evidence"))
BUDGET = 1_500_000
GAMES = ["Pong-v5", "Breakout-v5"]
ABS, CLOCK = "PQN ABS 16-64", "PQN time 16-64"
LETTER, EPOCHS = f"{ABS}, divergence_warmup 0, divergence_window 1", f"{ABS}, num_steps 32, scale_epochs True"
FIXED = [f"PQN fixed {n}" for n in (16, 32, 64)]
# Names in the tables of both READMEs
ROWS = {"ABS 16-64": ABS, "growth with time, 16-64": CLOCK, "ABS to the letter": LETTER, "ABS, `--scale-epochs`": EPOCHS}
ROWS |= {name.removeprefix("PQN "): name for name in FIXED}

KEY = ["variant", "env_id", "seed"]
scores = pd.read_csv(STUDY / "report" / "scores.csv")
finished = scores[scores["state"] == "finished"].set_index(KEY).sort_index()
compared = pd.read_csv(STUDY / "report_complete" / "comparisons.csv").set_index(["variant", "baseline"])
measured = dict(list(pd.read_csv(STUDY / "measurements.csv").groupby("run")))
curves = dict(list(pd.read_csv(STUDY / "report" / "curves.csv").groupby("run")))

# Further seeds of some variants, run later
LATER = {seed: ROOT / "benchmark" / "results" / f"2026-11-26-seed-{seed}" for seed in (3, 4)}
LATER_TEXT = {seed: (folder / "README.md").read_text() for seed, folder in LATER.items()}
FIVE = (ABS, CLOCK, *FIXED)
later = pd.concat([pd.read_csv(folder / "report" / "scores.csv") for folder in LATER.values()]).set_index(KEY).sort_index()
later_runs, later_curves = (
    dict(list(pd.concat([pd.read_csv(folder / name) for folder in LATER.values()]).groupby("run")))
    for name in ("measurements.csv", "report/curves.csv")
)


def assert_says(text, words, *values):
    """The text has these words, and in the place of each {} the value, rounded to as many digits as stand there."""
    number = r"([-+]?[\d,]*\.?\d+)"
    found = re.search(re.escape(words).replace(r"\{\}", number), " ".join(text.split()))
    assert found, words
    for word, value in zip(found.groups(), values, strict=True):
        digits = len(word.partition(".")[2])
        assert abs(float(word.replace(",", "")) - value) <= 0.5 * 10**-digits + 1e-6, f"{words}: {word} for {value}"


def row_of(text, name):
    return next(line for line in text.split("\n") if line.startswith(f"| {name} |"))


def runs_of(variant):
    """The measurements of each finished run of a variant: Breakout, seeds 1 and 2, then Pong."""
    return [measured[run] for run in finished.loc[variant, "run"]]


def tenth(run, column, number):
    """Mean of what was measured in a tenth of training, from 1 to 10."""
    return run.loc[(run["step"] > (number - 1) * BUDGET / 10) & (run["step"] <= number * BUDGET / 10), column].mean()


def gradient_steps(run, variant):
    """After each iteration: 32 minibatches per epoch, 2 epochs, and with --scale-epochs more beyond 32 steps."""
    epochs = np.round(run["rollout_length"] / 16).clip(lower=2) if variant == EPOCHS else np.full(len(run), 2)
    return 32 * np.cumsum(np.asarray(epochs, dtype=int))


def mean_return(variant, game, seed, after, until):
    """Mean over the points of a run's curve in this part of training, in agent steps."""
    curve = curves[finished.run[variant, game, seed]]
    return curve.loc[(curve["step"] > after) & (curve["step"] <= until), "episodic_return"].mean()


def early_return(variant, game, seed, steps):
    """Mean return over 5 % of training, up to so many gradient steps."""
    run = measured[finished.run[variant, game, seed]]
    until = run["step"].iloc[np.searchsorted(gradient_steps(run, variant), steps)]
    return mean_return(variant, game, seed, until - 0.05 * BUDGET, until)


def hns(*variants):
    """Human-normalised scores (runs of these variants in a game, games)."""
    runs = finished.reset_index().groupby(["variant", "env_id"])["hns"].apply(list)
    return np.array([sum((runs[v, game] for v in variants), []) for game in GAMES]).T


def further_seeds(variant):
    """Seeds with which the variant ran later."""
    return [seed for seed in LATER if (variant, GAMES[0], seed) in later.index]


def pooled(variant, seeds):
    """Human-normalised scores (seeds, games) of the study and of these further seeds."""
    return np.vstack([hns(variant), *([later.hns[variant, game, seed] for game in GAMES] for seed in seeds)])


def paired(variant):
    """Human-normalised scores of ABS and of the variant, over the seeds that both have."""
    return pooled(ABS, further_seeds(variant)), pooled(variant, further_seeds(variant))


def later_run(variant, game, seed):
    """Its measurements."""
    return later_runs[later.run[variant, game, seed]]


@pytest.mark.parametrize("name", ROWS)
def test_scores(name):
    """Score of every run, in the detailed table with the standard error from its 100 games."""
    own = finished.loc[ROWS[name]]
    values = [own.score[game, seed] for game in GAMES for seed in (1, 2)]
    errors = [own.score_std_over_games[game, seed] / 99**0.5 for game in GAMES for seed in (1, 2)]
    assert set(own["eval_episodes"]) == {100}
    pong, breakout = (
        [*values[i : i + 2], *(later.score[ROWS[name], game, seed] for seed in further_seeds(ROWS[name]))]
        for i, game in ((0, GAMES[0]), (2, GAMES[1]))
    )
    cell = ", ".join(["{}"] * len(pong))
    assert_says(row_of(MAIN, name), f"| {name} | {cell} | {cell} |", *pong, *breakout)
    row = re.sub(r" \([-\d.]+\)", "", row_of(DETAILS, name))  # without the greedy scores
    assert_says(row, f"| {name}" + " | {} ± {}" * 4 + " |", *sum(zip(values, errors, strict=True), ()))


@pytest.mark.parametrize("name", ROWS)
def test_gradient_steps(name):
    """What a whole run takes."""
    further = [later_run(ROWS[name], game, seed) for game in GAMES for seed in further_seeds(ROWS[name])]
    runs = runs_of(ROWS[name]) + further
    steps = {int(gradient_steps(run, ROWS[name])[-1]) for run in runs}
    ends = sorted({min(steps), max(steps)})
    assert_says(row_of(MAIN, name), " | " + " to ".join(["{}"] * len(ends)) + " |", *ends)


@pytest.mark.parametrize("name", [n for n in ROWS if ROWS[n] != ABS])
def test_comparisons(name):
    """ABS minus each other variant, the probability that it scores higher, and p, computed as the report does, over the seeds
    that both have."""
    x, y = paired(ROWS[name])
    improvement, difference, _ = zip(*report.estimate([x, y], report.comparison_functions, 2000), strict=True)
    words = " | {} ({} to {})" * 2 + " | {} |"
    assert_says(row_of(MAIN, name), words, *difference, *improvement, report.permutation_p(x, y))
    row = compared.loc[(ABS, ROWS[name])]
    assert hns(ABS).mean() - hns(ROWS[name]).mean() == pytest.approx(row["mean_difference"], abs=1e-5)


def test_permutation_tests():
    """Every p-value, also of ABS and its variants taken together."""

    def p(*group):
        return [report.permutation_p(hns(*group), hns(baseline)) for baseline in (FIXED[2], CLOCK, FIXED[1], FIXED[0])]

    over_64, over_clock, *_ = p(ABS)
    assert over_64 == pytest.approx(2 / 6**2)  # two of the ways to deal four runs out to two variants, in each of two games
    over_all = [report.permutation_p(*paired(baseline)) for baseline in (FIXED[2], CLOCK)]
    words = "Than at 64, over both games, yes (p = {}, and {} by Holm's correction for the table's seven comparisons; both"
    assert over_all[0] == min(report.permutation_p(*paired(v)) for v in ROWS.values() if v != ABS)  # Holm: 7 times
    assert_says(EVIDENCE, words, over_all[0], 7 * over_all[0])
    own, long = paired(FIXED[2])
    in_pong, in_breakout = (report.permutation_p(own[:, [i]], long[:, [i]]) for i in (0, 1))
    assert in_breakout == 2 / math.comb(8, 4)
    assert_says(
        EVIDENCE, "Breakout alone {}, the least that four runs against four can give, Pong alone {})", in_breakout, in_pong
    )
    words = "fixed rollout of 64 steps (p = {}, by Holm's correction for the table's seven comparisons {})"
    assert_says(MAIN, words, over_all[0], 7 * over_all[0])
    values = sum(
        ([(x - long).mean(), report.permutation_p(x, long)] for x in (paired(v)[1] for v in (FIXED[0], CLOCK, FIXED[1]))), []
    )
    assert values[0] > (own - long).mean()
    words = "fixed 16 by more than ABS ({}, p = {}), growth with time ({}, p = {}) and fixed 32 ({}, p = {};"
    assert_says(EVIDENCE, words, *values)
    assert_says(MAIN, "So does a fixed 16 (p = {}, uncorrected and not one of the seven):", values[1])
    assert_says(EVIDENCE, "over the four, p = {}. So nothing", over_all[1])
    pairs = [(own - long).ravel(), (paired(FIXED[2])[0] - equal_hns()).ravel()]
    flipped = [np.abs(np.array(list(itertools.product((1, -1), repeat=8))) @ x) for x in pairs]
    values = [np.mean(sums >= abs(x.sum()) - 1e-9) for sums, x in zip(flipped, pairs, strict=True)]
    assert values[0] == 2 / 2**8
    assert_says(EVIDENCE, "p is {} for 64, the least that eight pairs can give, and {} for the control", *values)
    assert_says(DETAILS, "permutation test of ABS against 64 gives p = {} (two-sided", over_64)
    assert_says(DETAILS, "permutation test p = {}. With these seeds it looks worse", over_clock)
    over_64, *others = p(ABS, LETTER, EPOCHS)
    assert_says(DETAILS, "p = {} (exact permutation test within games)", over_64)
    for name, value in zip(("growth by the clock", "32:", "16:"), others, strict=True):
        assert re.search(rf"Over {name} [-+.\d]+, p = {value:.2f}[:.]", " ".join(DETAILS.split())), name
    assert_says(DETAILS, "alone: p = {} over 64, {} over the clock, {} over 32, {} over 16.", *p(ABS, LETTER))


def test_divergence():
    """It falls in all 16 runs of ABS and fixed rollouts, and hardly after the third tenth."""
    runs = sum(map(runs_of, (ABS, *FIXED)), [])
    first, third, last = ([tenth(run, "divergence", n) for run in runs] for n in (1, 3, 10))
    assert len(runs) == 16 and all(b < a for a, b in zip(first, third, strict=True))
    ends = min(first), max(first), min(third), max(third)
    rises = sum(b > a for a, b in zip(third, last, strict=True))
    words = "in all 16 runs of ABS and fixed rollouts with seeds 1 and 2: it averages {} to {} in the first tenth of training "
    assert_says(EVIDENCE, words + "and {} to {} in the third tenth, then changes little (it rises in {})", *ends, rises)
    late = [tenth(later_run(FIXED[2], "Pong-v5", seed), "divergence", n) for seed in (3, 4) for n in (1, 3, 10)]
    words = "took longer (Pong, 64 steps: {}, {}, in the last tenth {}), and so it did in one of ten with seed 4 (Pong, 64 "
    assert_says(EVIDENCE, words + "steps: {}, {}, in the last tenth {})", *late)
    words = "{} to {} over the first tenth of training, {} to {} over the third, {} to {} over the last"
    assert_says(DETAILS, words, *ends, min(last), max(last))
    assert_says(DETAILS, "rises in {} of the 16", rises)


def returns_within(start, end, variant, game="Breakout-v5"):
    """Mean returns of both seeds in this part of training, from 0 to 1."""
    return [mean_return(variant, game, seed, start * BUDGET, end * BUDGET) for seed in (1, 2)]


def later_return(seed, variant, game, start, end):
    curve = later_curves[later.run[variant, game, seed]]
    return curve.loc[(curve["step"] > start * BUDGET) & (curve["step"] <= end * BUDGET), "episodic_return"].mean()


def all_returns(variant, start, end):
    """In Breakout, of every seed that the variant has."""
    return returns_within(start, end, variant) + [
        later_return(seed, variant, "Breakout-v5", start, end) for seed in further_seeds(variant)
    ]


half_way = partial(returns_within, 0.45, 0.55)


@pytest.mark.parametrize("name", [name for name in ROWS if ROWS[name] in FIVE])
def test_returns_in_training(name):
    """In Breakout, after a fifth of training, half-way, and in its last tenth, of all seeds."""
    parts = (0.2, 0.25), (0.45, 0.55), (0.9, 1)
    values = sum((all_returns(ROWS[name], *part) for part in parts), [])
    cell = ", ".join(["{}"] * (len(values) // 3))
    assert_says(row_of(EVIDENCE, name), f"| {name} | {cell} | {cell} | {cell} |", *values)


def test_early_returns():
    """Every rollout that grows is ahead of 32 and 64 early in Breakout; seeds 1 and 2 half-way."""
    for part in ((0.2, 0.25), (0.45, 0.55)):
        growing = sum((all_returns(v, *part) for v in (ABS, LETTER, EPOCHS, CLOCK)), [])
        fixed = sum((all_returns(v, *part) for v in FIXED[1:]), [])
        assert min(growing) > max(fixed)
    assert_says(DETAILS, "ABS returned {} and {} (seeds 1 and 2)", *half_way(ABS))
    values = sum(map(half_way, FIXED), [])
    assert_says(DETAILS, "the shortest rollout ({} and {}) and more than 32 ({} and {}) and 64 ({} and {})", *values)
    values = sum(map(half_way, (LETTER, EPOCHS, CLOCK)), [])
    assert_says(DETAILS, "to the letter {} and {}, `--scale-epochs` {} and {}, by the clock {} and {}", *values)
    values = sum((half_way(variant, "Pong-v5") for variant in (FIXED[2], ABS, FIXED[0], FIXED[1])), [])
    assert_says(DETAILS, "(64: {} and {}; ABS: {} and {}; 16: {} and {}; 32: {} and {})", *values)


def test_scale_epochs_begins_as_abs():
    """Three of its four runs measure what ABS measures, number by number, for about half of training or more."""
    shares = []
    for game in GAMES:
        for seed in (1, 2):
            own, other = (measured[finished.run[v, game, seed]][["rollout_length", "divergence"]] for v in (EPOCHS, ABS))
            n = min(len(own), len(other))
            parted = (own[:n].fillna(-1).to_numpy() != other[:n].fillna(-1).to_numpy()).any(axis=1)
            shares.append(100 * measured[finished.run[ABS, game, seed]]["step"].iloc[parted.argmax() - 1] / BUDGET)
    assert_says(EVIDENCE, "`--scale-epochs` are those of ABS for {} to {} % of training", *sorted(shares)[1::2])
    assert_says(DETAILS, "are runs of ABS for {}, {} and {} % of training", *sorted(shares)[1:])


def test_returns_at_equal_gradient_steps():
    """After as many as a run with 64 takes."""

    def equal_steps(variant, game):
        return [early_return(variant, game, seed, 11_712) for seed in (1, 2)]

    assert gradient_steps(runs_of(FIXED[2])[0], FIXED[2])[-1] == 11_712
    at_equal = [equal_steps(variant, game) for game in GAMES for variant in (FIXED[2], FIXED[1], FIXED[0], ABS)]
    pong, breakout = sum(at_equal[:4], []), sum(at_equal[4:], [])
    words = "Breakout returned {} and {} with 64, {} and {} with 32, {} and {} with 16, {} and {} with ABS"
    assert_says(DETAILS, words, *breakout)
    (long, middle, short, adaptive), (long_pong, middle_pong, *others) = at_equal[4:], at_equal[:4]
    for i in (0, 1):
        assert max(short[i], middle[i]) < long[i] < adaptive[i]
        assert max(other[i] for other in others) < min(long_pong[i], middle_pong[i])
    words = "in Breakout, {} and {} against {} and {} and {} and {}, and behind ABS, {} and {}"
    assert_says(EVIDENCE, words, *long, *short, *middle, *adaptive)
    assert_says(DETAILS, "with ABS, {} with `--scale-epochs`, seed 1,", early_return(EPOCHS, "Breakout-v5", 1, 11_712))
    assert_says(DETAILS, "{} and {} with 64, {} and {} with 32, {} and {} with 16, {} and {} with ABS, so that", *pong)


def test_the_first_figure():
    """Its caption: how far the rollout had grown while the policy still lost, at most and at the end; the scores."""
    run = pd.read_csv(ROOT / "docs" / "pong_abs.csv")
    before = run[run["step"] < run.loc[run["return_mean_100_games"] > -17, "step"].min()]
    lengths = run["rollout_length"]
    losing = before.loc[before["rollout_length"] == 36, "return_mean_100_games"]
    assert_says(MAIN, "still loses ({} steps at a return of {})", 36, losing.min())
    assert losing.min() > losing.max() - 0.05
    words = "the rollout grows from {} to {} steps, then goes back to {} as the divergence rises again."
    assert_says(MAIN, words, lengths[0], max(lengths), lengths.iloc[-1])
    own, greedy = (json.loads((ROOT / "docs" / f"pong_abs_eval{x}.json").read_text()) for x in ("_epsilon", ""))
    assert_says(MAIN, "policy scored {} ± {} (100 games with 1 % random actions", own["mean"], own["std"] / 99**0.5)
    assert_says(EVIDENCE, "Greedy, its policy scored {}.", greedy["mean"])


def test_coverage_of_the_intervals():
    """How often the bootstrap's 95 % interval of a difference in mean score, two games, holds the truth."""
    rng, coverage = np.random.default_rng(1), []
    for seeds in (4, 2):
        runs = rng.standard_normal((2, 4000, 1, seeds, 2))  # of two variants whose scores differ by nothing but chance
        drawn = np.take_along_axis(runs, rng.integers(seeds, size=(2, 4000, 500, seeds, 2)), 3).mean(axis=(3, 4))
        low, high = np.percentile(drawn[0] - drawn[1], [2.5, 97.5], axis=1)
        coverage.append(100 * np.mean((low <= 0) & (high >= 0)))
    words = r"from four seeds they cover the truth in some (\d+) % of cases only, from two in (\d+) %"
    said = map(int, re.search(words, " ".join(EVIDENCE.split())).groups())
    assert list(said) == pytest.approx(coverage, abs=1.5)  # three standard errors


@pytest.mark.parametrize("text", [EVIDENCE, DETAILS], ids=["evidence", "results"])
def test_rollout_lengths(text):
    """Where ABS ends; where growth with time does."""
    ends = sorted(run["rollout_length"].iloc[-1] for run in runs_of(ABS))
    assert_says(text, "In ABS to {}, {}, {} and {} steps, not to 64", *ends)
    runs = *runs_of(CLOCK), *(later_run(CLOCK, game, seed) for game in GAMES for seed in LATER)
    (last,) = {run["rollout_length"].iloc[-1] for run in runs}
    assert len(runs) == 8 and max(run["rollout_length"].max() for run in runs) == last
    assert_says(EVIDENCE, "so that the last rollouts had {} steps, not 64", last)
    assert_says(MAIN, "(in our runs the last rollouts had {} of 64 steps)", last)


def test_noise_scale():
    """B_simple in the two runs of ABS that measured it, far below the smallest rollout."""
    both = [measured[finished.run[ABS, game, 1]]["b_simple"].dropna() for game in GAMES]
    pong, breakout = (np.percentile(values, [5, 95]) for values in both)
    assert_says(DETAILS, "between {} and {} samples in Pong and between {} and {} in Breakout", *pong, *breakout)
    lowest, highest = min(pong[0], breakout[0]), max(pong[1], breakout[1])
    assert_says(EVIDENCE, "lay between {} and {} samples (5 to 95 % of its points)", lowest, highest)
    assert highest < 128 * 16


def test_ppo():
    """Scores of the four runs; KL and changed actions in tenths of training; in how many decisions, from the tenth measurement
    on, the mean of the last 20 KLs lay above --kl-max; in how many measurements B_simple exceeded the largest batch; when the
    rollout left its minimum."""
    own = pd.concat([finished, pd.read_csv(STUDY / "report_ppo" / "scores.csv").set_index(KEY)]).loc["PPO ABS 16-64"]
    assert len(own) == 4 and set(own["eval_episodes"]) == {100}
    runs = {f"{game.removesuffix('-v5')}, seed {seed}": own.loc[game, seed] for game in GAMES for seed in (1, 2)}
    results, decisions, exceeds, grown, changed = [], [], [], [], []
    for name, row in (runs | {"Breakout, seed 1, stopped": None}).items():
        run = measured["Breakout-v5__ppo_abs_atari__1__1795316589" if row is None else row["run"]]
        mean_kl = run["kl"].dropna().rolling(20, min_periods=10).mean().dropna()
        b_simple, until_32 = run["b_simple"].dropna(), run.loc[run["rollout_length"] == 16, "step"].iloc[-1]
        numbers = (1, 5) if row is None else (1, 5, 10)
        tenths = [tenth(run, column, n) for column in ("kl", "divergence") for n in numbers]
        score = [] if row is None else [row.score, row.score_std_over_games / 99**0.5]
        above, large = (mean_kl > 0.003).sum(), (b_simple > 8192).sum()
        first = run.loc[run["step"] <= BUDGET / 10, "b_simple"].median()
        values = *score, *tenths, above, len(mean_kl), first, large, len(b_simple), np.isinf(b_simple).sum()
        three = ", ".join(["{}"] * len(numbers))
        words = f"| {name} | " + "{} ± {}" * bool(score) + f" | {three} | {three} |"
        words += " {} of {} | {} | {} of {} | {} | {} |"
        assert_says(row_of(DETAILS, name), " ".join(words.split()), *values, run["step"].iloc[-1] - until_32)
        assert large > len(b_simple) / 2
        changed += [tenth(run, "divergence", n) for n in range(2, 11)]
        if row is not None:
            results += score
            decisions.append(above / len(mean_kl))
            exceeds.append(large / len(b_simple))
            grown.append(run["step"].iloc[-1] - until_32)
    assert_says(DETAILS, "changed was {} or less after the first tenth", np.nanmax(changed))
    assert_says(EVIDENCE, "Scores: {} ± {} and {} ± {} in Pong, {} ± {} and {} ± {} in Breakout", *results)
    assert_says(EVIDENCE, "the rule is fed, in {} to {} % of the decisions", 100 * min(decisions), 100 * max(decisions))
    assert_says(EVIDENCE, "exceeded the largest batch of 8,192 in {} to {} % of the", 100 * min(exceeds), 100 * max(exceeds))
    assert min(exceeds) > 0.5  # "more than half of the time"
    for text in (EVIDENCE, DETAILS):
        assert_says(text, "at 16 until the last {} to {} steps", round(min(grown), -3), round(max(grown), -3))


def mean_returns(folder, group):
    """Mean returns of each seed of a group of runs, from the folder's table: over the last tenth, and over all of training."""
    rows = re.findall(rf"^{group} +seed +(\d+) +(\S+) +(\S+)$", (STUDY / folder / "table.txt").read_text(), re.M)
    return np.array(sorted(tuple(map(float, row)) for row in rows))[:, 1:].T


def welch(first, second):
    """Difference of the means of two groups of numbers, and Welch's 95 % interval."""
    return first.mean() - second.mean(), *ttest_ind(first, second, equal_var=False).confidence_interval(0.95)


FOUR = "{}, {}, {} and {}"


def test_against_cleanrl():
    """Mean returns of PQN in both arithmetics and of CleanRL's script, four seeds each, and their differences."""
    bfloat16, float32, peers = (mean_returns("peer", group) for group in ("bfloat16", "float32", "CleanRL"))
    for group, values in (("bfloat16", bfloat16), ("float32", float32)):
        assert (values == mean_returns("precision", group)).all()
    words = f"{FOUR} here in float32 (the runs of the next point), {FOUR} there (seeds 1, 1001, 2001 and 3001), difference "
    words += "{} (Welch's 95 % interval {} to {}); with bfloat16 {} ({} to {})"
    differences = *welch(float32[1], peers[1]), *welch(bfloat16[1], peers[1])
    assert_says(DETAILS, words, *float32[1], *peers[1], *differences)
    assert_says(EVIDENCE, "can tell: {} ({} to {}) with float32, {} ({} to {}) with bfloat16", *differences)
    words = f"Over the last tenth {FOUR} against {FOUR}, {{}} ({{}} to {{}}); with bfloat16 {{}} ({{}} to {{}})"
    assert_says(DETAILS, words, *float32[0], *peers[0], *welch(float32[0], peers[0]), *welch(bfloat16[0], peers[0]))


def test_bfloat16_learns_as_float32():
    """Mean returns in both arithmetics, seeds 1, 2, 3 and 1001, and their difference."""
    (last, whole), (other_last, other_whole) = (mean_returns("precision", group) for group in ("bfloat16", "float32"))
    words = f"{FOUR} with bfloat16 (seeds 1, 2, 3 and 1001), {FOUR} with float32, difference "
    words += "{} (Welch's 95 % interval {} to {}"
    difference, *interval = welch(whole, other_whole)
    assert_says(DETAILS, words, *whole, *other_whole, difference, *interval)
    mean = np.mean([whole, other_whole])
    low, high = (100 * x / mean for x in interval)
    words = "some {}, is {} (Welch's 95 % interval {} to {}, that is {} to {} % of the mean;"
    assert_says(EVIDENCE, words, mean, difference, *interval, low, high)
    assert_says(MAIN, "(95 % interval {} to {} % of the mean), and neither", low, high)
    words = f"over the last tenth {FOUR} against {FOUR}, {{}} ({{}} to {{}})"
    assert_says(DETAILS, words, *last, *other_last, *welch(last, other_last))


@pytest.mark.parametrize("script", SCRIPTS)
def test_speed_of_each_script(script):
    """The first table: parameters with 4 actions, smallest and largest batch, and the measured steps per second."""
    module = MODULES[script]
    network = (module.Agent if hasattr(module, "Agent") else module.QNetwork)(4)
    values = [sum(p.numel() for p in network.parameters()), 128 * 16, 128 * module.Args.rollout_length_max]
    rates = pd.read_csv(ROOT / "docs" / "speed_one_core.csv", index_col="name")["steps_per_second"]
    row = next(line for line in MAIN.split("\n") if line.startswith(f"| `{script}` | ") and line.endswith(" |"))
    assert_says(row, " | {} | {} to {} | {} |", *values, rates[f"{script}, L = 32"])


SPEEDS = {"EnvPool alone, random actions": "EnvPool, random actions"}
SPEEDS |= {f"`pqn_abs_atari.py`, L = {n}": f"pqn_abs_atari.py, L = {n}" for n in (16, 32, 64)}
MOVING = "pqn_abs_atari.py, L moving"
SPEEDS["`pqn_abs_atari.py`, L moving, 28 to 48"] = MOVING
SPEEDS["CleanRL's `pqn_atari_envpool.py`, L = 32"] = "peer pqn_atari_envpool.py, L = 32"


def throughput_call(name):
    """What a call of throughput.py measured. Before version 6b58b73 the row of growing rollouts had another name."""
    call = pd.read_csv(ROOT / "docs" / f"{name}.csv", index_col="name")
    return call.rename(index={"pqn_abs_atari.py, L = 16 to 64, moving": MOVING})


@pytest.mark.parametrize("name", SPEEDS)
@pytest.mark.parametrize("machine", ["", "_intel", "_zen3"])
def test_throughput(machine, name):
    """The tables of README and docs/speed.md: rate, range, share of the emulator's rate, times CleanRL's, memory."""
    measured_here = throughput_call(f"throughput_cpu{machine}")
    own, rates = measured_here.loc[SPEEDS[name]], measured_here["steps_per_second"]
    values = [own.steps_per_second, own.lowest, own.highest, 100 * own.steps_per_second / rates["EnvPool, random actions"]]
    section = SPEED.split("## Without AVX-512")[machine == "_zen3"]
    row = row_of(section if machine else MAIN, name)
    words = f"| {name} | {{}} | {{}} to {{}} | {{}} % |"
    if own.name.endswith("random actions"):
        return assert_says(row, words, *values)
    times_cleanrl = own.steps_per_second / rates["peer pqn_atari_envpool.py, L = 32"]
    assert_says(row, words + " {} | {} GiB |", *values, times_cleanrl, own.peak_memory_gib)


def calls_beside_cleanrl(*names):
    """The tables of all calls of throughput.py: rates, and how many times CleanRL's they are. Returns the calls, and these
    ratios at L = 32 and with L moving."""
    calls = [throughput_call(name) for name in names]
    fixed_ratios, moving_ratios = [], []
    for name, call in zip(names, calls, strict=True):
        rates = call["steps_per_second"]
        values = [rates[SPEEDS[row]] for row in SPEEDS if not row.endswith(("L = 16", "L = 64"))]
        emulator, fixed, moving, peer = values
        fixed_ratios.append(fixed / peer)
        moving_ratios.append(moving / peer)
        row = next(line for line in SPEED.split("\n") if f"({name}.csv)" in line)
        assert_says(row, ") | {} | {} | {} | {} | {} | {} |", *values, fixed_ratios[-1], moving_ratios[-1])
    return calls, fixed_ratios, moving_ratios


def test_costs():
    """Hours of a run of 20 million steps, and days of the 90 of the first list, at the measured speeds."""
    two, one = (
        pd.read_csv(ROOT / "docs" / name, index_col="name")["steps_per_second"]["pqn_abs_atari.py, L = 32"]
        for name in ("throughput_cpu.csv", "speed_one_core.csv")
    )
    hours = 20e6 / two / 3600
    words = (
        "at {} steps/s (two cores, see [Speed](#speed)) a run of 20 million steps takes {} hours without its evaluation and "
    )
    words += "the 90 runs of the first list {} days; at {} steps/s on one core, two runs at a time, {} days"
    assert_says(MAIN, words, two, hours, 90 * hours / 24, one, 45 * 20e6 / one / 86400)
    slow = throughput_call("throughput_cpu_zen3_second")["steps_per_second"][MOVING]
    assert "three to fourteen hours on [two cores]" in " ".join(MAIN.split())
    assert (round(hours), round(20e6 / slow / 3600)) == (3, 14)


def test_all_calls():
    """On the machine where bfloat16 is the default."""
    calls, fixed, moving = calls_beside_cleanrl(
        *(
            f"throughput_cpu{name}"
            for name in (
                "",
                "_e8fd955",
                "_e8fd955_first",
                "_6f069d0",
                "_2228fcf",
                "_c85f1d3",
                "_be16aab",
                "_1a00068",
                "_first",
            )
        )
    )
    words = "docs/speed.md#beside-cleanrls-script-on-amd) | bfloat16 | 9 | {} to {} | {} to {} |"
    assert_says(MAIN, words, *(f(ratios) for ratios in (fixed, moving) for f in (min, max)))
    assert len(calls) == 9
    float32 = pd.read_csv(ROOT / "docs" / "flags_amd.csv", index_col="name")["steps_per_second"].loc[
        "pqn_abs_atari.py, L = 32, --precision float32"
    ]
    assert_says(SPEED, "on AMD {} to {} times in nine calls, so three times in some only", min(fixed), max(fixed))
    memory = calls[0]["peak_memory_gib"].filter(like="pqn_abs")
    assert_says(SPEED, "up to 64 steps, {} to {} GiB", min(memory), max(memory))
    assert_says(SPEED, "{} GB: 129 x 128 x {} bytes", 129 * 128 * 4 * 84 * 84 / 1e9, 4 * 84 * 84)
    peers = [call["steps_per_second"].iloc[-1] for call in calls]
    assert_says(MAIN, "ours ran at {} steps/s on the first machine", float32)
    assert_says(MAIN, "{} to {} times CleanRL's rates; the rest is bfloat16", float32 / max(peers), float32 / min(peers))


def test_throughput_without_bfloat16():
    """All calls on a machine where float32 is the default, and the most that its arithmetic allows."""
    names = (f"throughput_cpu_intel{name}" for name in ("", "_earlier", "_noon", "_slow_hour", "_contiguous"))
    calls, fixed_ratios, moving_ratios = calls_beside_cleanrl(*names)
    ends = calls[0].loc["EnvPool, random actions"]
    assert_says(SPEED, "EnvPool alone ranged from {} to {} within the first of them", ends.lowest, ends.highest)
    ends = [end(ratios) for ratios in (fixed_ratios, moving_ratios) for end in (min, max)]
    assert_says(MAIN, "docs/speed.md#where-bfloat16-has-no-higher-rate) | float32 | 5 | {} to {} | {} to {} |", *ends)
    assert_says(SPEED, "on the Xeon {} to {}, on Zen 3", *ends[:2])
    assert len(calls) == 5
    assert_bound_by_arithmetic(SPEED.split("## Without AVX-512")[0], calls[0]["steps_per_second"], 328)


def test_throughput_without_avx_512():
    """The same on a third machine."""
    calls, fixed_ratios, moving_ratios = calls_beside_cleanrl("throughput_cpu_zen3_second", "throughput_cpu_zen3")
    ends = [end(ratios) for ratios in (fixed_ratios, moving_ratios) for end in (min, max)]
    assert_says(MAIN, "docs/speed.md#without-avx-512) | float32 | 2 | {} to {} | {} |", *ends[:3])
    assert_says(SPEED, "on Zen 3 {} to {} |", *ends[:2])
    assert round(ends[2], 1) == round(ends[3], 1)
    assert calls[0]["rollout_lengths"].dropna().to_dict() == {"pqn_abs_atari.py, L = 32": "32", MOVING: "32 to 56"}
    assert_bound_by_arithmetic(SPEED.split("## Without AVX-512")[1], calls[1]["steps_per_second"], 135)


def assert_bound_by_arithmetic(text, rates, gflops):
    """The most that a processor's rate of arithmetic and the emulator allow, beside CleanRL's script."""
    assert_says(text, "at {} GFLOP/s, the rate of a large matrix product in float32", gflops)
    observation, network = torch.zeros((1, 4, 84, 84), dtype=torch.uint8), MODULES["pqn_abs_atari.py"].QNetwork(4)
    with FlopCounterMode(display=False) as acting, torch.no_grad():
        network(observation)
    with FlopCounterMode(display=False) as learning:
        network(observation).sum().backward()
    operations = acting.get_total_flops() * 33 / 32 + 2 * learning.get_total_flops()  # at L = 32, with 2 epochs
    times = [operations / gflops / 1e9, 1 / rates.iloc[0]]
    words = "the {} MFLOP of a step would take {} ms and its emulation takes {}, which is {} steps/s or {} times CleanRL if"
    assert_says(text, words, operations / 1e6, *(1e3 * t for t in times), 1 / sum(times), 1 / sum(times) / rates.iloc[-1])


def test_what_makes_it_fast():
    """The figures that the choice of precision, layout, microbatches and memory rests on."""

    def rates(name, *rows, machine="intel"):
        measured_here = pd.read_csv(ROOT / "docs" / f"{name}_{machine}.csv", index_col="name")["steps_per_second"]
        return [measured_here[row] for row in rows]

    kept, runs = "freed memory kept, run", (1, 2, 3)
    values = rates("freed_memory", *(f"{p}, {kept} {i}" for p in ("bfloat16", "float32") for i in runs))
    assert_says(SPEED, "tie: {}, {} and {} steps/s in bfloat16, {}, {} and {} in float32", *values)
    given_back = ["bfloat16, freed memory given back", "float32, microbatches of 256, freed memory given back"]
    bfloat16, float32 = rates("freed_memory", *given_back)
    assert_says(SPEED, "clear every page anew: {} instead of {} steps/s in bfloat16", values[0], bfloat16)
    assert_says(SPEED, "microbatches of 128 instead of 256, {} instead of {} in float32", values[3], float32)
    script = "pqn_abs_atari.py, L = 32"
    assert_says(
        SPEED, "float32 leads, {} against {}, one run each", *rates("flags", script, f"{script}, --precision bfloat16")
    )
    flags = ["", ", --memory-format contiguous", ", --precision float32", ", --compile"]
    default, contiguous, float32, compiled = rates("flags", *(script + flag for flag in flags), machine="amd")
    assert_says(SPEED, "In bfloat16 on AMD {} steps/s against {} (", default, contiguous)
    assert_says(SPEED, "**bfloat16** on AMD: {} steps/s against {} in float32", default, float32)
    assert_says(SPEED, "makes bfloat16 slower on AMD, {} steps/s instead of {}", compiled, default)
    assert_says(MAIN, "makes the script slower ({} instead of {} steps/s on AMD,", compiled, default)
    layouts = [f"{layout}, run {i}" for layout in ("channels_last", "contiguous") for i in (1, 2)]
    assert_says(SPEED, "there: {} and {} steps/s against {} and {}", *rates("memory_format", *layouts))
    assert_says(SPEED, "float32 reaches {} steps/s instead of {}", *rates("microbatch", "after, L = 32", "before, L = 32"))


NEWER = ROOT / "benchmark" / "results" / "2026-11-26"
NEWER_TEXT = (NEWER / "README.md").read_text()
newer = pd.read_csv(NEWER / "report" / "scores.csv").set_index("run")
newer_runs = dict(list(pd.read_csv(NEWER / "measurements.csv").groupby("run")))


def newer_run(script, game):
    """What was measured in the one run of a script in a game."""
    (run,) = (run for run in newer_runs if run.startswith(f"{game}-v5__{script}__1__"))
    return newer_runs[run]


@pytest.mark.parametrize("run", newer_runs)
def test_newer_runs(run):
    """Steps, rollouts and scores of the runs of 2026-11-26, in their table."""
    game, script, *_ = run.split("__")
    row = next(x for x in NEWER_TEXT.split("\n") if f"| `{script}.py` | {game.removesuffix('-v5')} |" in x)
    lengths, (*_, last_step) = newer_runs[run]["rollout_length"], newer_runs[run]["step"]
    assert_says(row, "| {} | {} ({}) |", last_step, lengths.iloc[-1], lengths.max())
    score, deviation = newer.score[run], newer.score_std_over_games[run]
    greedy = json.loads((NEWER / "evaluations" / "greedy" / f"{run}.json").read_text())["mean"]
    assert_says(row, ") | {} ± {} ({}) |", score, deviation / 99**0.5, greedy)


def test_the_rival_rule():
    """It stayed at its minimum, and what it cost."""
    breakout, pong = (newer_run("gns_batch_atari", game) for game in ("Breakout", "Pong"))
    points = [run["b_simple"].dropna() for run in (breakout, pong)]
    assert all((run["rollout_length"] == 16).all() and len(run) == 732 for run in (breakout, pong))
    ends = np.array([np.percentile(x, [5, 95, 100]) for x in points])
    words = "lay between {} and {} samples (5 to 95 % of its points; at most {})"
    assert_says(NEWER_TEXT, words, ends[:, 0].min(), ends[:, 1].max(), ends[:, 2].max())
    tenths = [run.loc[(run["step"] - 1) // 150_000 == n, "b_simple"].median() for run in (breakout, pong) for n in (0, 9)]
    words = "median was {} in the first tenth of training and {} in the last in Breakout, {} and {} in Pong"
    assert_says(NEWER_TEXT, words, *tenths)
    noise, divergence = (
        [100 * run[f"{name}_seconds"].sum() / run["seconds"].sum() for run in (breakout, pong)]
        for name in ("noise_scale", "divergence")
    )
    words = "took {} and {} % of training time (Breakout, Pong), measuring the divergence in the same runs {} %: {} and {} s"
    medians = [breakout[f"{name}_seconds"].median() for name in ("noise_scale", "divergence")]
    assert_says(NEWER_TEXT, words, *noise, np.mean(divergence), *medians)
    assert_says(EVIDENCE, "never left its minimum of 16 steps: B_simple was {} samples at most", ends[:, 2].max())
    assert_says(MAIN, "the gradient noise scale asked for {} samples at most", ends[:, 2].max())
    above = [100 * (x > 16 * 128 // 32).mean() for x in points]
    assert_says(MAIN, "It is more than the minibatch, of {} samples, in {} and {} % of the", 16 * 128 // 32, *above)
    assert_says(
        EVIDENCE, "a minibatch of {} samples: in {} and {} % of the measurements (Breakout, Pong)", 16 * 128 // 32, *above
    )
    assert_says(
        EVIDENCE, "cost {} and {} % of the time of these runs, measuring the divergence {} %", *noise, np.mean(divergence)
    )
    own = [
        newer[newer["env_id"].eq(f"{game}-v5") & newer["variant"].str.startswith("GNS")].score.item()
        for game in ("Breakout", "Pong")
    ]
    words = "{} in Breakout, above all runs of ABS, and {} in Pong, where fixed 16 with the same seed scored {}"
    assert_says(EVIDENCE, words, *own, finished.score[FIXED[0], "Pong-v5", 1])
    assert own[0] > max(finished.score[ABS, "Breakout-v5"].max(), later.score[ABS, "Breakout-v5"].max())
    words = "divergence takes {} s on one core (AMD, medians of"
    assert_says(MAIN, words, medians[1])
    assert_says(MAIN, "noise scale {} s at 16 steps and in proportion", medians[0])
    assert_says(SPEED, "they took {} and, at 16 steps, {} s (medians of", *medians[::-1])


def test_large_networks():
    """Their divergence and rollout lengths, in tenths of training."""
    l_breakout, l_pong = (newer_run("pqn_l_abs_atari", game) for game in ("Breakout", "Pong"))
    xl = newer_run("pqn_xl_abs_atari", "Breakout")
    breakout = [tenth(run, "divergence", n) for run in (l_breakout, xl) for n in (1, 4, 10)]
    words = "from {} in the first tenth of training to {} in the fourth and {} in the last with L, {}, {} and {} with XL"
    assert_says(NEWER_TEXT, words, *breakout)
    longest_and_last = [f(run["rollout_length"]) for run in (l_breakout, xl) for f in (max, lambda x: x.iloc[-1])]
    assert_says(
        NEWER_TEXT, "grew to {} and {} steps and went back to {} and {}", *longest_and_last[::2], *longest_and_last[1::2]
    )
    pong = tenth(l_pong, "divergence", 1), tenth(l_pong, "divergence", 10), l_pong["rollout_length"].iloc[-1]
    assert_says(
        NEWER_TEXT, "In Pong (L) it fell from {} to {}, and the rollout was still growing at the end, at {} steps", *pong
    )
    last = [tenth(run, "divergence", 10) for run in (l_breakout, xl, l_pong)]
    assert_says(
        NEWER_TEXT, "In the last tenth it was {} to {}, with the small network {} to {}", min(last), max(last), *small_last()
    )
    assert_says(
        EVIDENCE,
        "divergence fell to {} and {} in the fourth tenth of training and rose again to {} and {}",
        *breakout[1::3],
        *breakout[2::3],
    )
    (longest,), (last,) = set(longest_and_last[::2]), set(longest_and_last[1::2])
    words = "the rollout reached {} of 128 steps and went back to {}; in Pong it was still growing, at {}"
    assert_says(EVIDENCE, words, longest, last, pong[2])


def small_last():
    """Least and largest divergence in the last tenth of the study's 16 runs of ABS and fixed rollouts."""
    last = [tenth(run, "divergence", 10) for run in sum(map(runs_of, (ABS, *FIXED)), [])]
    return min(last), max(last)


@pytest.mark.parametrize("seed, name", [(seed, name) for name in ROWS for seed in further_seeds(ROWS[name])])
def test_later_seed(seed, name):
    """Scores, rollouts and gradient steps of its runs."""
    values, lengths, steps = [], [], []
    for game in GAMES:
        run = later.loc[(ROWS[name], game, seed)]
        greedy = json.loads((LATER[seed] / "evaluations" / "greedy" / f"{run['run']}.json").read_text())["mean"]
        values += [run.score, run.score_std_over_games / 99**0.5, greedy]
        own = later_runs[run["run"]]
        lengths += [own["rollout_length"].iloc[-1], own["rollout_length"].max()]
        steps.append(gradient_steps(own, ROWS[name])[-1])
        assert run.eval_episodes == 100 and run.state == "finished"
    words = f"| {name} | {{}} ± {{}} ({{}}) | {{}} ± {{}} ({{}}) | {{}} ({{}}) and {{}} ({{}}) | {{}} and {{}} |"
    assert_says(row_of(LATER_TEXT[seed], name), words, *values, *lengths, *steps)


def test_three_seeds():
    """ABS minus the other variants over the study's two seeds and the third one; what no longer holds of 64."""
    values, two = [], []
    for baseline in (FIXED[2], CLOCK, FIXED[1], FIXED[0]):
        x, y = pooled(ABS, [3]), pooled(baseline, [3])
        values += [x.mean() - y.mean(), report.probability_of_improvement(x, y), report.permutation_p(x, y)]
        two.append(hns(ABS).mean() - hns(baseline).mean())
    words = "ABS minus 64 is {} in human-normalised score (probability of improvement {}; exact permutation test within games "
    words += "p = {}), minus growth with time {} ({}; p = {}), minus 32 {} ({}; p = {}), minus 16 {} ({}; p = {})"
    assert_says(LATER_TEXT[3], words, *values)
    assert_says(LATER_TEXT[3], "With two seeds these were {}, {}, {} and {}", *two)
    pong = [*finished.score[ABS, "Pong-v5"], later.score[ABS, "Pong-v5", 3]]
    assert_says(LATER_TEXT[3], "in Pong 64 scored {}, ABS {}, {} and {}.", later.score[FIXED[2], "Pong-v5", 3], *pong)
    breakout = [pooled(v, [3])[:, 1] for v in (ABS, FIXED[2])]
    assert min(breakout[0]) > max(breakout[1]) and pooled(FIXED[2], [3])[2, 0] > pooled(ABS, [3])[1, 0]


def test_training_of_the_third_seed():
    """Returns in parts of training; divergence in tenths; what the study's runs had."""
    parts = (0.2, 0.25), (0.45, 0.55), (0.9, 1)
    values = [later_return(3, variant, "Breakout-v5", *part) for part in parts for variant in FIVE]
    words = (
        "ABS returned {}, growth with time {}, 16, 32 and 64 steps {}, {} and {}, half-way {}, {}, {}, {} and {}, in the last "
    )
    assert_says(LATER_TEXT[3], words + "tenth {}, {}, {}, {} and {}.", *values)
    values = [later_return(3, variant, "Pong-v5", *part) for part in parts[1:] for variant in FIVE]
    words = "had depended on the seed, half-way {}, {}, {}, {} and {}, in the last tenth {}, {}, {}, {} and {}."
    assert_says(LATER_TEXT[3], words, *values)
    late, study = later_run(FIXED[2], "Pong-v5", 3), sum(map(runs_of, (ABS, *FIXED)), [])
    third = [later_run(variant, game, 3) for variant in FIVE for game in GAMES]
    first, third_tenth, last = ([tenth(run, "divergence", n) for run in third if run is not late] for n in (1, 3, 10))
    last.append(tenth(late, "divergence", 10))
    values = [f(x) for x in (first, third_tenth) for f in (min, max)] + [tenth(late, "divergence", n) for n in (1, 3)]
    words = "in nine of the ten runs as in the study, from {} to {} in the first tenth of training to {} to {} in the third "
    words += (
        "tenth; with 64 in Pong it was {} and {} and fell later. In the last tenth it was {} to {} in all ten (the study's "
    )
    words += "16 runs of ABS and fixed rollouts: {} to {}, {} to {}, {} to {})"
    ends = [f(tenth(run, "divergence", n) for run in study) for n in (1, 3, 10) for f in (min, max)]
    assert_says(LATER_TEXT[3], words, *values, min(last), max(last), *ends)
    last = [later_run(ABS, game, 3)["rollout_length"].iloc[-1] for game in GAMES]
    fourth = [later_run(ABS, game, 4)["rollout_length"].iloc[-1] for game in GAMES]
    words = "which asks for a divergence of 0.05 (seed 3: {} and {}, seed 4: {} and {})"
    assert_says(EVIDENCE, words, *sorted(last), *sorted(fourth))
    study = [run["rollout_length"].iloc[-1] for run in runs_of(ABS)]
    assert_says(LATER_TEXT[3], "went to {} and {} steps, in the study to {} to {}", *last, min(study), max(study))
    ends = [*last, *fourth, *study]
    assert_says(MAIN, "the rollout grows**, from 16 to between {} and {} of 64 steps", min(ends), max(ends))
    assert_says(MAIN, "in {} runs of 1.5 million steps in two games", 34 + len(newer_runs) + len(later_runs) + len(equal_runs))


def test_four_seeds():
    """ABS minus the other variants over four seeds, three and two; which runs of 64 are below which of ABS."""
    values, fewer = [], []
    for baseline in (FIXED[2], CLOCK, FIXED[1], FIXED[0]):
        x, y = pooled(ABS, [3, 4]), pooled(baseline, [3, 4])
        values += [x.mean() - y.mean(), report.probability_of_improvement(x, y), report.permutation_p(x, y)]
        fewer.append([pooled(ABS, seeds).mean() - pooled(baseline, seeds).mean() for seeds in ([3], [], [3, 4])])
    three, two, four = zip(*fewer, strict=True)
    pong, breakout = (pooled(ABS, [3, 4]) - pooled(FIXED[0], [3, 4])).mean(axis=0)
    assert pong > 0 > breakout
    assert "rollouts of 16, ahead in the mean by Breakout alone, or of 32" in " ".join(MAIN.split()) and four[3] < 0 < four[2]
    words = "ABS minus 64 is {} in human-normalised score (probability of improvement {}; exact permutation test within games "
    words += "p = {}), minus growth with time {} ({}; p = {}), minus 32 {} ({}; p = {}), minus 16 {} ({}; p = {})."
    assert_says(LATER_TEXT[4], words, *values)
    assert_says(LATER_TEXT[4], f"With three seeds these were {FOUR}, with two {FOUR}.", *three, *two)
    assert_says(LATER_TEXT[3], f"seed-4/README.md) these are {FOUR}.", *four)
    words = "as many gradient steps as ABS ({}, p = {}), and at 16, which takes twice as many ({}, p = {}), these runs"
    assert_says(EVIDENCE, words, four[2], values[8], four[3], values[11])
    (pong, breakout), (pong_64, breakout_64) = (pooled(v, [3, 4]).T for v in (ABS, FIXED[2]))
    assert min(breakout) > max(breakout_64) and list(pong_64 < min(pong)) == [True, True, False, True]
    assert sum(pong < pong_64[2] - 0.05) == 2 and abs(pong - pong_64[2]).min() < 0.005
    for game in GAMES:
        own, clock, short, middle, long = (later.score[v, game, 4] for v in FIVE)
        assert long < own < min(clock, short) and (middle > own) == (game == "Pong-v5")


def test_training_of_the_fourth_seed():
    """Returns in parts of training; divergence in tenths."""
    parts = (0.2, 0.25), (0.45, 0.55), (0.9, 1)
    values = [later_return(4, variant, "Breakout-v5", *part) for part in parts for variant in FIVE]
    words = (
        "ABS returned {}, growth with time {}, 16, 32 and 64 steps {}, {} and {}, half-way {}, {}, {}, {} and {}, in the last "
    )
    assert_says(LATER_TEXT[4], words + "tenth {}, {}, {}, {} and {}.", *values)
    values = [later_return(4, variant, "Pong-v5", *part) for part in parts[1:] for variant in FIVE]
    words = "In Pong half-way {}, {}, {}, {} and {}, in the last tenth {}, {}, {}, {} and {}."
    assert_says(LATER_TEXT[4], words, *values)
    late, runs = later_run(FIXED[2], "Pong-v5", 4), [later_run(v, game, 4) for v in FIVE for game in GAMES]
    first, last = ([tenth(run, "divergence", n) for run in runs] for n in (1, 10))
    third = [tenth(run, "divergence", 3) for run in runs if run is not late]
    words = "in the first tenth of training it was {} to {}, in the third {} to {}, but with 64 in Pong {}; in the last "
    values = *(f(x) for x in (first, third) for f in (min, max)), tenth(late, "divergence", 3), min(last), max(last)
    assert_says(LATER_TEXT[4], words + "tenth it was {} to {} in all ten runs", *values)


EQUAL = ROOT / "benchmark" / "results" / "2026-11-27-equal-steps"
EQUAL_TEXT, EQUAL_NAME = (EQUAL / "README.md").read_text(), "fixed 64, 64 minibatches"
equal, equal_curves = (
    pd.concat(pd.read_csv(EQUAL / folder / f"{name}.csv") for folder in ("report", "report_seeds_3_4"))
    for name in ("scores", "curves")
)
equal = equal[equal["state"] == "finished"].set_index(["env_id", "seed"]).sort_index()
equal_curves = dict(list(equal_curves.groupby("run")))
equal_runs = dict(list(pd.read_csv(EQUAL / "measurements.csv").groupby("run")))
ALL_SEEDS = [1, 2, 3, 4]


def equal_hns():
    """Human-normalised scores (seeds, games) of fixed 64 with as many gradient steps as ABS."""
    return np.array([[equal.hns[game, seed] for game in GAMES] for seed in ALL_SEEDS])


def test_equal_gradient_steps():
    """Scores of fixed 64 with 64 minibatches, and its gradient steps."""
    assert set(equal["eval_episodes"]) == {100} and len(equal_runs) == len(equal) == 8
    assert all((run["rollout_length"] == 64).all() for run in equal_runs.values())
    for folder in ("report", "report_seeds_3_4"):
        assert "num_minibatches 64, update_epochs 2," in (EQUAL / folder / "report.md").read_text()
    (steps,) = {64 * 2 * len(run) for run in equal_runs.values()}
    adaptive_steps = [
        gradient_steps(run, ABS)[-1]
        for run in (*runs_of(ABS), *(later_run(ABS, game, seed) for game in GAMES for seed in LATER))
    ]
    assert_says(EQUAL_TEXT, "({}; ABS took {} to {})", steps, min(adaptive_steps), max(adaptive_steps))
    seconds = pd.read_csv(EQUAL / "durations.csv").set_index("job")["seconds"][6]  # Breakout, seed 3
    evaluating = 1 - equal_runs[equal.run["Breakout-v5", 3]]["seconds"].sum() / seconds
    assert_says(EQUAL_TEXT, "job 6 spent {} % of its time on 100 games", 100 * evaluating)
    scores = {game: [equal.score[game, seed] for seed in ALL_SEEDS] for game in GAMES}
    for game in GAMES:
        values = []
        for seed in ALL_SEEDS:
            run = equal.loc[game, seed]
            greedy = json.loads((EQUAL / "evaluations" / "greedy" / f"{run['run']}.json").read_text())["mean"]
            values += [run.score, run.score_std_over_games / 99**0.5, greedy]
        name = game.removesuffix("-v5")
        assert_says(row_of(EQUAL_TEXT, name), f"| {name} |" + " {} ± {} ({}) |" * 4, *values)
    values = *sum(scores.values(), []), steps
    assert_says(row_of(MAIN, EQUAL_NAME), f"| {EQUAL_NAME}" + " | {}, {}, {}, {}" * 2 + " | {} |", *values)


def test_comparisons_at_equal_gradient_steps():
    """How much of the gap between fixed 64 and ABS they close, and what is left; the other fixed rollouts and the clock."""
    own = equal_hns()
    adaptive, clock, short, middle, long = (pooled(variant, [3, 4]) for variant in FIVE)
    improvement, difference, _ = zip(*report.estimate([adaptive, own], report.comparison_functions, 2000), strict=True)
    p = report.permutation_p(adaptive, own)
    assert_says(row_of(MAIN, EQUAL_NAME), " | {} ({} to {})" * 2 + " | {} |", *difference, *improvement, p)

    closed, gap, p_closed = own.mean() - long.mean(), adaptive.mean() - long.mean(), report.permutation_p(own, long)
    share, *ends = (
        100 * x.item()
        for x in report.estimate(
            [adaptive, own, long],
            lambda a, b, c: np.array([(b.mean() - c.mean()) / (a.mean() - c.mean())]),
            2000,
        )
    )
    over_two = 100 * (own - long)[:2].mean() / (adaptive - long)[:2].mean()
    pong, breakout = zip((own - long).mean(axis=0), (adaptive - long).mean(axis=0), strict=True)
    ps = sorted([p, *(report.permutation_p(*paired(v)) for v in ROWS.values() if v != ABS)])
    assert 45 < share < 55  # "half-way"
    assert len(ps) == 7 and ps.index(p) == 1  # Holm: the second of seven is multiplied by six
    alone = [[report.permutation_p(x[:, [i]], y[:, [i]]) for i in (0, 1)] for x, y in ((own, long), (adaptive, own))]
    (p_pong, p_breakout), (p_ahead, same) = alone
    assert p_ahead == same and p_breakout == 2 / math.comb(8, 4)  # the least that is possible
    assert min(own[:, 1]) > max(long[:, 1]) and list((own < adaptive.min(axis=0)).sum(axis=0)) == [3, 3]

    words = "the variant is {} in human-normalised score above fixed 64 with 32 minibatches (exact permutation test "
    words += "within games p = {}), and ABS {} above the variant (p = {}, by Holm's correction for the table's seven "
    words += "comparisons {}): it closes {} % (95 % bootstrap interval {} to {}, from four seeds too narrow) of the "
    words += "gap of {}. Over seeds 1 and 2 alone it had been {} %. In Breakout it is {} of {}, and each of its runs "
    words += "is above all of 64 with 32 minibatches (p = {}); in Pong it is {} of {}, which cannot be told from none "
    words += "(p = {}). In both games three of its four runs are below all of ABS (p = {} "
    values = closed, p_closed, difference[0], p, 6 * p, share, *ends, gap, over_two, *breakout, p_breakout, *pong, p_pong, same
    assert_says(EQUAL_TEXT, words + "in each).", *values)
    words = "half-way between the two in the mean: {} above 64 (p = {}, not one of the table's comparisons; Breakout "
    words += "alone, where each of its runs is above all of 64, {}, Pong alone {}). That is {} % of the gap of {} (95 "
    words += "% bootstrap interval {} to {} %, from four seeds too narrow; Breakout {} of {}, Pong {} of {}). That ABS"
    words += " is {} above it is not settled (p = {}, by Holm's correction {}; {} in each game alone)"
    values = closed, p_closed, p_breakout, p_pong, share, gap, *ends, *breakout, *pong, difference[0], p, 6 * p, same
    assert_says(EVIDENCE, words, *values)
    words = "closes {} % of the gap (95 % bootstrap interval {} to {}); that ABS is ahead of it is not settled (p = {}, by "
    words += "Holm's correction {})"
    assert_says(MAIN, words, share, *ends, p, 6 * p)

    words = "it is behind by {} (p = {}), beside growth with time by {} (p = {}): these runs cannot tell them apart. "
    words += "Beside fixed 16, with twice as many gradient steps, it is behind by {} (p = {})."
    others = middle, clock, short
    values = sum(([x.mean() - own.mean(), report.permutation_p(x, own)] for x in others), [])
    assert_says(EQUAL_TEXT, words, *values)
    assert_says(EVIDENCE, "has the same minibatches and as many gradient steps ({} below, p = {})", *values[:2])


def test_training_at_equal_gradient_steps():
    """Returns in parts of training; in Breakout, every rollout that grows is ahead."""

    def returns(game, start, end):
        of_seeds = (equal_curves[equal.run[game, seed]] for seed in ALL_SEEDS)
        parts = (c[(c["step"] > start * BUDGET) & (c["step"] <= end * BUDGET)] for c in of_seeds)
        return [part["episodic_return"].mean() for part in parts]

    parts = (0.2, 0.25), (0.45, 0.55), (0.9, 1)
    values = [returns("Breakout-v5", *part) for part in parts]
    assert_says(row_of(EVIDENCE, EQUAL_NAME), f"| {EQUAL_NAME} |" + " {}, {}, {}, {} |" * 3, *sum(values, []))
    words = f"returned {FOUR} after a fifth (20 to 25 %), {FOUR} half-way and {FOUR} in the last tenth"
    assert_says(EQUAL_TEXT, words, *sum(values, []))
    for part, own in zip(parts[:2], values, strict=False):
        assert max(own) < min(sum((all_returns(v, *part) for v in (ABS, LETTER, EPOCHS, CLOCK)), []))
    growing, ratios = [], []
    for variant in (ABS, CLOCK):
        growing += [measured[finished.run[variant, "Breakout-v5", seed]] for seed in (1, 2)]
        growing += [later_run(variant, "Breakout-v5", seed) for seed in LATER]
    for ends in (np.linspace(0.2, 0.25, 6), np.linspace(0.45, 0.55, 11)):  # iterations, as 32's: 4,096 samples each
        done = [(run["step"] <= end * BUDGET).sum() / (end * BUDGET / 4096) for run in growing for end in ends]
        ratios += [min(done), max(done)]
    for text in (MAIN, EVIDENCE):
        assert_says(
            text, "taken {} to {} times as many gradient steps as 32 after a fifth, and {} to {} times half-way", *ratios
        )
    pong = sum((returns("Pong-v5", *part) for part in parts[1:]), [])
    assert_says(EQUAL_TEXT, f"In Pong half-way {FOUR}, in the last tenth {FOUR}.", *pong)
    tenths = [[tenth(run, "divergence", n) for run in equal_runs.values()] for n in (1, 3, 10)]
    words = "it was {} to {} in the first tenth, {} to {} in the third and {} to {} in the last"
    assert_says(EVIDENCE, words, *(f(x) for x in tenths for f in (min, max)))


PUBLISHED = ROOT / "benchmark" / "results" / "2026-11-27-published-settings"


def test_published_settings():
    """What one run at the published settings did in two hours."""
    text, run, games = (
        (PUBLISHED / "README.md").read_text(),
        *(pd.read_csv(PUBLISHED / f"{name}.csv") for name in ("measurements", "returns")),
    )
    lengths, (*_, last), taken = run["rollout_length"], run["step"], run["divergence"].dropna()
    million = 1_000_000

    def part(start, end):
        """Number and mean return of the games that ended in a part of training; the mean divergence."""
        own = games[(games["step"] > start) & (games["step"] <= end)]
        measured_there = run.loc[(run["step"] > start) & (run["step"] <= end), "divergence"]
        return own["games"].sum(), np.average(own["episodic_return"], weights=own["games"]), measured_there.mean()

    assert 100 * last / (20 * million) == pytest.approx(72, abs=0.5) and (run["step"].diff()[1:] == 128 * lengths[1:]).all()
    divergences = []
    for end in [*range(1, 15), last / million]:
        row = row_of(text, f"{end:.1f}" if end % 1 else str(end))
        start = math.ceil(end) - 1
        number, mean, divergence = part(start * million, end * million)
        divergences.append(divergence)
        own = run[(run["step"] > start * million) & (run["step"] <= end * million)]
        values = number, mean, divergence, own["divergence"].count(), own["rollout_length"].iloc[-1]
        assert_says(row, " | {} | {} | {} ({}) | {} |", *values)
    words = "went to step {} of 20 million in two hours"
    assert_says(EVIDENCE, words, last)
    assert_says(text, "stopped it after 1 hour {} minutes at step {},", run["seconds"].sum() / 60 - 60, last)
    late = run["step"] > 4 * million
    values = last / run["seconds"].sum(), 128 * lengths[late].sum() / run.loc[late, "seconds"].sum()
    assert_says(text, "It ran at {} steps/s, at {} after the first 4 million steps", *values)

    end = part(last - million / 2, last)[1]
    assert_says(
        text, "returned {} in the mean of the first million steps and {} in the last 500,000", part(0, million)[1], end
    )
    evaluations = [json.loads((PUBLISHED / "evaluations" / f"{name}.json").read_text()) for name in ("epsilon_0.01", "greedy")]
    own, greedy = evaluations
    assert [e["epsilon"] for e in evaluations] == [0.01, 0] and {e["episodes"] for e in evaluations} == {100}
    score = own["mean"], own["std"] / 99**0.5
    words = (
        "scored {} ± {} with 1 % random actions (mean of 100 games and its standard error; median {}, from {} to {}) and {} "
    )
    assert_says(text, words + "greedy", *score, own["median"], own["min"], own["max"], greedy["mean"])
    assert_says(
        EVIDENCE, "returned {} in the mean of the last 500,000 steps; the policy it ended with scored {} ± {}", end, *score
    )
    assert_says(MAIN, "{} of 20 million steps in two hours on two cores, returned {} in its last", last / million, end)
    words = "fell** from {} in the first million steps to {} in the third, the first after epsilon has decayed, and lay "
    short_runs = [measured[finished.run[ABS, "Breakout-v5", seed]] for seed in (1, 2)]
    short_runs += [later_run(ABS, "Breakout-v5", seed) for seed in LATER]
    short = [tenth(x, "divergence", 10) for x in short_runs]
    values = divergences[0], divergences[2], min(divergences[3:]), max(divergences[3:]), min(short), max(short)
    assert_says(
        text, words + "between {} and {} from the fourth on, below the {} to {} of ABS in Breakout in the last tenth", *values
    )
    assert_says(EVIDENCE, "fell to between {} and {} from the fourth million steps on", *values[2:4])
    assert_says(MAIN, "its divergence fell to between {} and {}, and its rollout grew to {} steps", *values[2:4], max(lengths))

    grown = run["step"].shift(1)[lengths.diff() > 0]
    ends = [x["rollout_length"].iloc[-1] for x in short_runs]
    words = (
        "from 16 steps, first after {} steps, to {} after {}, where it stayed; the runs of ABS in the README's table ended at "
    )
    words += "{} to {} in Breakout. {} adaptations changed the rounded length {} times."
    assert (lengths.diff()[1:] >= 0).all()
    values = grown.min(), max(lengths), grown.max(), min(ends), max(ends), len(taken) - 9, len(grown)
    assert_says(text, words, *values)

    steps = [gradient_steps(x, ABS)[-1] for x in short_runs]
    reached = run["step"][24_000 // 8 - 1]
    there = part(reached - million / 4, reached + million / 4)[1]
    last_tenths = [mean_return(ABS, "Breakout-v5", seed, 0.9 * BUDGET, BUDGET) for seed in (1, 2)]
    last_tenths += [later_return(seed, ABS, "Breakout-v5", 0.9, 1) for seed in LATER]
    words = (
        f"took {{}} to {{}} gradient steps on 1.5 million samples and returned {FOUR} in their last tenth. Here 24,000 of the "
    )
    words += (
        "{} gradient steps had been taken after {} million samples, and the return around there was {}; but from 1.3 to 1.5 "
    )
    values = (
        min(steps),
        max(steps),
        *last_tenths,
        8 * len(run),
        reached / million,
        there,
        part(1.3 * million, 1.5 * million)[1],
    )
    assert_says(text, words + "million samples, where the short runs ended, it was {}, with", *values)
    assert_says(EVIDENCE, "as many as the runs of 1.5 million steps, after {} million", reached / million)
    words = "with the defaults {} in Breakout, after {} of the 20 million steps. After 1.5"
    assert_says(MODULES["pqn_abs_atari.py"].__doc__, words, score[0], last / million)
    values = part(9.75 * million, 10.25 * million)[1], 8 * (run["step"] <= 10 * million).sum()
    assert_says(text, "around 10 million steps was {}, after {} gradient steps instead of", *values)
    assert_says(
        MAIN, "(lives end episodes, seven times as many gradient steps); here the return at that point was {}", values[0]
    )
    assert round(10 * million / (8 * 128) * 16 / values[1]) == 7  # 4 epochs of 4 minibatches of its 8 x 128 samples

    pace = run["seconds"] / lengths
    costs = [pace[i] / pace[i + 1 : i + 4].mean() for i in grown.index]
    for page in (text, SPEED):
        assert_says(page, "at a new length took {} to {} of the time per step", min(costs), max(costs))
    seconds = run["divergence_seconds"]
    assert_says(text, "took {} s, {} % of the run", seconds.median(), 100 * seconds.sum() / run["seconds"].sum())


@pytest.mark.parametrize("script", SCRIPTS)
def test_docstrings(script):
    """What each script has reached, by its docstring."""
    if script == "pqn_abs_atari.py":
        scores = {game: [*finished.score[ABS, game], *later.score[ABS, game]] for game in GAMES}
    elif script == "ppo_abs_atari.py":
        both = pd.concat([finished, pd.read_csv(STUDY / "report_ppo" / "scores.csv").set_index(KEY)])
        scores = {game: [both.score["PPO ABS 16-64", game, seed] for seed in (1, 2)] for game in GAMES}
    else:
        own = newer[newer.index.str.contains(f"__{script.removesuffix('.py')}__")]
        scores = {game: list(own.score[own.env_id == game]) for game in GAMES}
    cells = {1: "{}", 2: "{} and {}", 4: FOUR}
    words = ", ".join(f"{cells[len(x)]} in {game.removesuffix('-v5')}" for game, x in scores.items() if x)
    assert_says(MODULES[script].__doc__, f"K = 4: {words} (", *sum(scores.values(), []))


def test_picture_of_all_seeds(tmp_path):
    """It shows the runs that are in the repository now, and its script draws it."""
    script = ROOT / "benchmark" / "results" / "all_seeds.py"
    subprocess.run([sys.executable, script, tmp_path / "drawn.png"], check=True)
    drawn, shown = (plt.imread(path)[..., :3] for path in (tmp_path / "drawn.png", ROOT / "docs" / "pqn_returns.png"))
    assert drawn.shape == shown.shape and abs(drawn - shown).mean() < 0.005
