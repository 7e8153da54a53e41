"""benchmark/atari10.sh: the lists are complete, and the scripts accept every line; benchmark/slurm_array.sh runs them."""

import csv
import os
import shlex
import signal
import subprocess
import time
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


def test_no_run_twice(monkeypatch):
    """What is asked for twice is listed once, also under two names: two jobs with equal arguments would train side by side."""
    twice = job_list(
        "--games", "Qbert Qbert-v5 atari10", "--seeds", "1 1", "--scripts", "pqn pqn", "--variants", "fixed fixed"
    )
    assert len(twice) == len(set(twice)) == 10
    every = "max-64 max-128 adaptive max-32 fixed longest shortest time scale-epochs literal"
    lines = job_list("--games", "Pong", "--seeds", "1", "--scripts", "pqn l xl ppo gns", "--variants", every)
    runs = [parse(line, monkeypatch) for line in lines]
    assert max(Counter((script, str(args)) for script, args in runs).values()) == 1
    for script in (PQN, L, XL, PPO):  # max-64 or max-128 is the default that adaptive takes
        assert {args.rollout_length_max for name, args in runs if name == script} == {32, 64, 128}
        assert sum(name == script for name, _ in runs) == 9
    assert sorted(args.rollout_length_max for name, args in runs if name == GNS) == [32, 64, 128]
    (line,) = job_list("--games", "Pong", "--seeds", "1", "--variants", "max-64")
    assert kind(parse(line, monkeypatch)[1]) == ("adaptive", 64)


def test_flags_that_no_variant_sets(monkeypatch):
    """A flag of a variant may follow after -- where that variant is not listed, and is then the same in all lines."""
    lines = job_list(
        "--games", "Pong", "--seeds", "1", "--variants", "adaptive", "--", "--no-adapt-rollout", "--num-steps", 48
    )
    assert [kind(parse(line, monkeypatch)[1]) for line in lines] == [("fixed", 48)]
    lines = job_list("--games", "Pong", "--seeds", "1", "--variants", "adaptive fixed", "--", "--rollout-length-max", 48)
    assert [kind(parse(line, monkeypatch)[1]) for line in lines] == [("adaptive", 48), ("fixed", 32)]


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
        (("--games", "Pong'"), "'Pong''"),
        (("--seeds", "1 \\"), "4294967295, not '\\'"),
        (("--", "--seed", "5"), "--seeds"),
        (("--", "--total_timesteps=99"), "--budget"),
        (("--", "--num-steps", "16"), "'fixed'"),
        (("--", "--no-adapt-rollout"), "'fixed'"),
        (("--", "--adapt_rollout"), "'fixed'"),
        (("--variants", "adaptive max-32", "--", "--rollout-length-max=64"), "'max-32'"),
        (("--variants", "adaptive scale-epochs", "--", "--no-scale-epochs"), "'scale-epochs'"),
        (("--variants", "literal", "--", "--divergence-window", "2"), "'literal'"),
        (("--variants", "adaptive longest", "--", "--rollout-length-max", "32"), "'longest'"),
        (("--variants", "shortest", "--", "--rollout_length_min=8"), "'shortest'"),
    ],
    ids=lambda value: "_".join(value).strip("-") if isinstance(value, tuple) else "",
)
def test_bad_options(options, help):
    """One line that says what would be right, exit code 2, and no half of a list."""
    (line,) = job_list(*options, code=2)
    assert line.startswith("error: ") and help in line


TASK = """
code={at_end}
trap 'code={after_term}; touch go' TERM
echo $$ > pid
mv pid ready
while [ ! -e go ]; do sleep 0.05; done
exit $code
"""


@pytest.mark.parametrize(
    "program, event, after_term, at_end, code, requeued",
    [
        ("bash", "limit", 143, 0, 143, True),  # saved at the time limit
        ("bash", "limit", 1, 0, 1, False),  # could not save
        ("torchrun", "limit", 1, 0, 1, True),  # which makes 1 of its processes' 143
        ("torchrun", "limit", 0, 0, 0, False),  # was at its end
        ("bash", "", 143, 0, 0, False),
        ("bash", "", 143, 7, 7, False),
        ("torchrun", "", 143, 1, 1, False),
        ("bash", "cancelled", 143, 0, 143, False),
        ("bash", "cancelled", 0, 7, 0, False),
        ("bash", "all cancelled", 143, 0, 143, False),
    ],
)
def test_slurm_requeues_what_has_saved_at_the_limit(tmp_path, program, event, after_term, at_end, code, requeued):
    """A task that reached its time limit and has saved comes back, under its own number; one that failed, ended or was
    cancelled does not; the exit code is always the command's."""
    for name, text in (("scontrol", f'echo "$@" >> {shlex.quote(str(tmp_path))}/requeued'), ("torchrun", 'exec bash "$@"')):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "task").write_text(TASK.format(after_term=after_term, at_end=at_end))
    (tmp_path / "jobs.txt").write_text(f"false\nSOME=thing {program} task 'two words'\nfalse\n")
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_ARRAY_JOB_ID": "70",
        "SLURM_ARRAY_TASK_ID": "2",
    }
    command = ["bash", str(ROOT / "benchmark" / "slurm_array.sh"), "jobs.txt"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "ready").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        if event == "limit":
            process.send_signal(signal.SIGUSR1)
        elif event == "cancelled":  # under proctrack/cgroup, scancel sends TERM to the shell alone
            process.terminate()
        elif event == "all cancelled":  # and elsewhere to all processes of the task
            os.killpg(process.pid, signal.SIGTERM)
        else:
            (tmp_path / "go").touch()
        output, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code
    assert f"{program} task 'two words'" in output
    calls = (tmp_path / "requeued").read_text() if (tmp_path / "requeued").exists() else ""
    assert calls == ("requeue 70_2\n" if requeued else "")


@pytest.mark.parametrize(
    "task, file, help",
    [("", "jobs.txt", "--array"), ("1", "none.txt", "none.txt")]
    + [(n, "jobs.txt", f"line {n}") for n in "239"],  # `env` of nothing would print the environment into the log
)
def test_slurm_without_a_job(tmp_path, task, file, help):
    """One line and exit code 2."""
    (tmp_path / "jobs.txt").write_text("true\n  \n # seed 1\ntrue\n")
    command = ["bash", str(ROOT / "benchmark" / "slurm_array.sh"), file]
    result = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"SLURM_ARRAY_TASK_ID": task}, capture_output=True, text=True, timeout=60
    )
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2 and not result.stdout and line.startswith("error: ") and help in line
