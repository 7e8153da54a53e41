"""benchmark/atari10.sh: the lists are complete, and every line is a command that the scripts accept."""

import csv
import shlex
import subprocess
from collections import Counter

import pytest
from conftest import MODULES, ROOT, SCRIPTS

with open(ROOT / "benchmark" / "atari57_scores.csv", newline="") as file:
    TABLE = list(csv.DictReader(file))
ATARI_57 = {row["env_id"] for row in TABLE}
ATARI_10 = {row["env_id"] for row in TABLE if row["atari10_weight"]}


def job_list(*options, code=0):
    """The lines that atari10.sh prints, or its errors where it must fail."""
    command = ["bash", str(ROOT / "benchmark" / "atari10.sh"), *map(str, options)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/")
    assert result.returncode == code, result.stderr
    assert not (result.stderr if code == 0 else result.stdout)
    return (result.stdout if code == 0 else result.stderr).splitlines()


def parse(line, monkeypatch):
    """(script, Args) of a command, as the script itself parses and checks them."""
    python, script, *arguments = shlex.split(line)
    assert python == "python" and script in MODULES
    monkeypatch.setattr("sys.argv", [script, *arguments])
    args = MODULES[script].parse_args()
    MODULES[script].check_args(args)
    return script, args


def kind(args):
    return ("adaptive", args.rollout_length_max) if args.adapt_rollout else ("fixed", args.num_steps)


PQN, L, XL, PPO, GNS = SCRIPTS
SWEEP = [("fixed", 32), ("adaptive", 32), ("adaptive", 64), ("adaptive", 128)]
FIGURES = {
    "1": [(PQN, ("adaptive", 64)), (PQN, ("fixed", 32)), (PQN, ("fixed", 64))],
    "4": [(script, variant) for script in (PQN, L, XL) for variant in SWEEP],
    "6": [(L, ("adaptive", 128)), (L, ("fixed", 32)), (L, ("fixed", 128))],
    "7": [(XL, ("adaptive", 128)), (XL, ("fixed", 32)), (XL, ("fixed", 128))],
    "gns": [(PQN, ("adaptive", 64)), (PQN, ("fixed", 32)), (GNS, ("adaptive", 64))],
    "ppo": [(PPO, ("adaptive", 64)), (PPO, ("fixed", 32))],
}
FIGURES |= dict.fromkeys("235", FIGURES["1"])


@pytest.mark.parametrize("figure", FIGURES)
def test_the_runs_of_a_figure(figure, monkeypatch):
    """Every run that a figure needs is there once, for each of the ten games and three seeds, at the published budget."""
    runs = [parse(line, monkeypatch) for line in job_list("--figure", figure)]
    found = Counter((script, kind(args), args.env_id, args.seed) for script, args in runs)
    assert found == Counter((*run, game, seed) for run in FIGURES[figure] for game in ATARI_10 for seed in (1, 2, 3))
    assert len(ATARI_10) == 10
    for _, args in runs:
        assert (args.total_timesteps, args.adapt_interval, args.auto_resume) == (20_000_000, 50, True)


def test_all_scripts_variants_and_games(monkeypatch):
    """All 57 games with all scripts; what is asked for is what comes, and no two lines are the same run."""
    every = "adaptive fixed longest shortest max-32 time scale-epochs literal"
    lines = job_list("--games", "atari57", "--scripts", "pqn l xl ppo gns", "--variants", every, "--seeds", "7")
    assert len(set(lines)) == len(lines) == 57 * (4 * 8 + 2)  # GNS has two variants: with a fixed batch it is PQN
    one_game = [parse(line, monkeypatch) for line in lines if "Pong-v5" in line]
    assert {line.split("--env-id ")[1].split()[0] for line in lines} == ATARI_57 and len(ATARI_57) == 57
    for script in (PQN, L, XL, PPO):
        runs = [args for name, args in one_game if name == script]
        longest = MODULES[script].Args.rollout_length_max
        fixed = {args.num_steps for args in runs if not args.adapt_rollout}
        assert fixed == {16, 32, longest}
        assert sum(args.adapt_signal == "time" for args in runs) == 1 and sum(args.scale_epochs for args in runs) == 1
        assert sum((args.divergence_window, args.divergence_warmup) == (1, 0) for args in runs) == 1
        assert all(args.seed == 7 for args in runs)


def test_a_smaller_study(monkeypatch):
    """Budget, games, seeds and further flags reach every line; K shrinks with the budget; seeds come one after the other."""
    extra = ("--", "--num-minibatches", 32, "--exp-name", "my study's runs", "--adapt-interval", 7)
    lines = job_list("--games", "Pong Breakout-v5", "--seeds", "3 11", "--budget", 1500000, *extra)
    runs = [parse(line, monkeypatch)[1] for line in lines]
    assert [args.seed for args in runs] == [3] * 6 + [11] * 6 and {args.env_id for args in runs} == {"Pong-v5", "Breakout-v5"}
    assert {(a.total_timesteps, a.num_minibatches, a.exp_name, a.adapt_interval) for a in runs} == {
        (1500000, 32, "my study's runs", 7)
    }
    for budget, interval in ((20_000_000, 50), (2_000_000, 5), (1_500_000, 4), (4096, 1), (40_000_000, 100)):
        (line, *_) = job_list("--budget", budget)
        assert parse(line, monkeypatch)[1].adapt_interval == interval


def test_no_run_twice():
    """What is asked for twice is listed once: two jobs with the same arguments would train side by side."""
    twice = job_list(
        "--games", "Qbert Qbert-v5 atari10", "--seeds", "1 1", "--scripts", "pqn pqn", "--variants", "fixed fixed"
    )
    assert len(twice) == len(set(twice)) == 10


@pytest.mark.parametrize(
    "options, help",
    [
        (("--games", "Pung"), "Pong"),
        (("--scripts", "dqn"), "pqn l xl ppo gns"),
        (("--variants", "best"), "adaptive"),
        (("--seeds", "1 two"), "'two'"),
        (("--budget", "20M"), "20000000"),
        (("--budget", "0"), "20000000"),
        (("--figure", "8"), "1 to 7"),
        (("--games",), "needs a value"),
        (("--seeds", ""), "needs a value"),
        (("--num-envs", "8"), "after --"),
        (("--scripts", "gns", "--variants", "fixed"), "pqn"),
        (("--scripts", "gns ppo", "--variants", "adaptive literal"), "'literal'"),
        (("--figure", "4", "--scripts", "l"), "--figure sets"),
        (("--budget", "010"), "'010'"),
        (("--budget", "99999999999999999999"), "20000000"),
        (("--seeds", "4294967296"), "4294967295"),
        (("--scripts", "*"), "'*'"),
        (("--games", " "), "needs a value"),
        (("--", "--seed", "5"), "--seeds"),
        (("--", "--total_timesteps=99"), "--budget"),
    ],
    ids=lambda value: "_".join(value).strip("-") if isinstance(value, tuple) else "",
)
def test_bad_options(options, help):
    """One line that says what would be right, exit code 2, and no half of a list."""
    (line,) = job_list(*options, code=2)
    assert line.startswith("error: ") and help in line
