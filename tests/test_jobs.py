"""benchmark/atari10.sh: the lists are complete; benchmark/slurm_array.sh runs them."""

import os
import re
import shlex
import signal
import subprocess
import time
from collections import Counter

import pandas as pd
import pytest
from conftest import ROOT

TEN = list(pd.read_csv(ROOT / "benchmark" / "atari57_scores.csv").dropna().env_id)
SLURM = str(ROOT / "benchmark" / "slurm_array.sh")
PQN, L, XL, PPO, GNS = (f"{name}_atari.py" for name in ("pqn_abs", "pqn_l_abs", "pqn_xl_abs", "ppo_abs", "gns_batch"))


def job_list(*options, script="atari10.sh"):
    """The lines that a script of benchmark/ prints."""
    command = ["bash", str(ROOT / "benchmark" / script), *map(str, options)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/")
    assert result.returncode == 0 and not result.stderr
    return result.stdout.splitlines()


def parse(line):
    """(script, dict of flags) of a command; flags without a value are True."""
    python, script, *words = shlex.split(line)
    assert python == "python" and (ROOT / script).is_file()
    ends = zip(words, [*words[1:], "--"], strict=True)
    flags = {a[2:]: True if b.startswith("--") else b for a, b in ends if a.startswith("--")}
    known = set(re.findall(r"^    (\w+): ", (ROOT / script).read_text().split("class Args:")[1].split("\n\n\n")[0], re.M))
    assert {name.removeprefix("no-").replace("-", "_") for name in flags} <= known
    return script, flags


def kind(flags):
    longest = flags.get("rollout-length-max", "")
    is_fixed = "no-adapt-rollout" in flags or flags.get("rollout-length-min") == longest != ""
    return f"fixed {longest or flags['num-steps']}" if is_fixed else f"to {longest}"


SWEEP = ["fixed 32", "to 32", "to 64", "to 128"]
FIGURES = dict.fromkeys("1235", {PQN: ["to ", "fixed 32", "fixed 64"]}) | {"4": dict.fromkeys((PQN, L, XL), SWEEP)}
FIGURES |= {"6": {L: ["to ", "fixed 32", "fixed 128"]}, "7": {XL: ["to ", "fixed 32", "fixed 128"]}}
FIGURES |= {"gns": {PQN: ["to ", "fixed 32"], GNS: ["to "]}, "ppo": {PPO: ["to ", "fixed 32"]}}


@pytest.mark.parametrize("figure", FIGURES)
def test_the_runs_of_a_figure(figure):
    """Every run that a figure needs is there once, for each of the ten games and three seeds, in a folder of its own."""
    runs = [parse(line) for line in job_list("--figure", figure)]
    wanted = [(script, variant) for script, variants in FIGURES[figure].items() for variant in variants]
    found = Counter((script, kind(flags), flags["env-id"], flags["seed"]) for script, flags in runs)
    assert found == Counter((*run, game, seed) for run in wanted for game in TEN for seed in "123") and len(TEN) == 10
    assert len({flags["run-dir"] for _, flags in runs}) == len(runs)
    assert {(flags["total-timesteps"], flags["adapt-interval"]) for _, flags in runs} == {("20000000", "50")}


def test_all_variants_scripts_and_games():
    """What is asked for comes once, with a variant's own flags last; yoked runs follow the runs that they replay."""
    public = "public public-fixed public-longest"
    every = f"yoked adaptive fixed longest shortest max-32 max-64 max-128 time scale-epochs literal {public}"
    options = ["--games", "atari57 Pong-v5", "--scripts", "pqn l xl ppo gns pqn", "--seeds", "7 11 7", "--variants", every]
    extra = "--budget 1500000 -- --num-minibatches 32 --num-steps 48 --exp-name".split()
    runs = [parse(line) for line in job_list("--runs", "/data/my a", *options, *extra, "my run's")]
    assert len(runs) == 57 * 2 * (4 * 13 + 4)  # max-64 (L and XL: max-128) is adaptive; of a fixed batch GNS is PQN
    names = "total-timesteps", "adapt-interval", "num-minibatches", "exp-name"
    assert {tuple(flags[name] for name in names) for _, flags in runs} == {("1500000", "4", "32", "my run's")}
    folders = {flags["run-dir"]: (script, flags) for script, flags in runs}
    assert len(folders) == len(runs) and len({flags["env-id"] for _, flags in runs}) == 57
    for script, longest in ((PQN, "64"), (L, "128"), (XL, "128"), (PPO, "64")):
        own = {f["run-dir"].split("/")[3]: f for name, f in runs if (name, f["env-id"], f["seed"]) == (script, "Pong-v5", "7")}
        fixed = {"fixed": "fixed 32", "longest": f"fixed {longest}", "public-fixed": "fixed 32", "shortest": "fixed 16"}
        fixed |= {"public": "to ", "public-longest": f"fixed {longest}"}
        assert {name: kind(own[name]) for name in fixed} == fixed
        assert all(own[name]["scale-epochs"] and own[name]["episodic-life"] for name in public.split())
        assert own["time"]["adapt-signal"] == "time" and "episodic-life" not in own["scale-epochs"]
        assert (own["literal"]["divergence-window"], own["literal"]["divergence-warmup"]) == ("1", "0")
        replayed, flags = folders[own["yoked"]["replay"].removesuffix("/checkpoint.pt")]
        assert (replayed, flags["env-id"], flags["seed"], kind(flags)) == (script, "Pong-v5", "11", "to ")
    assert [i for i, (_, flags) in enumerate(runs) if "replay" in flags] == list(range(len(runs) - 57 * 2 * 5, len(runs)))


RUN = "bash task --run-dir runs/x"
CASES = [(RUN, "limit", 143, True), (RUN, "limit", 1, False)]  # saved at the time limit, or could not
CASES += [("torchrun task --run-dir runs/x", "limit", 1, True)]  # which makes 1 of its processes' 143
CASES += [("bash task --seed 1", "limit", 143, False), (RUN, "cancelled", 143, False), (RUN, "ended", 7, False)]


@pytest.mark.parametrize("command, event, code, requeued", CASES)
def test_slurm_queues_again_what_would_go_on(tmp_path, command, event, code, requeued):
    """What has saved at the limit and says where it goes on comes back; the exit code is the command's. A list of Windows."""
    for name, text in (("scontrol", 'echo "$@" > requeued'), ("torchrun", 'exec bash "$@"')):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    wait = "[[ $2 =~ [x1]$ ]] && touch ready\nwhile [ ! -e go ]; do sleep 0.05; done"
    (tmp_path / "task").write_text(f"trap 'touch go' TERM\n{wait}\nexit {code}\n")
    (tmp_path / "jobs").write_bytes(f"false\r\nSOME=thing {command}\r\nfalse\r\n".encode())
    slurm = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "2"}
    options = {"cwd": tmp_path, "env": os.environ | slurm, "stdout": subprocess.PIPE, "text": True}
    process, deadline = subprocess.Popen(["bash", SLURM, "jobs"], **options), time.monotonic() + 60
    try:
        while not (tmp_path / "ready").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        if event != "ended":
            process.send_signal(signal.SIGUSR1 if event == "limit" else signal.SIGTERM)
            while not (tmp_path / "go").exists():
                assert time.monotonic() < deadline
    finally:
        (tmp_path / "go").touch()
        output, _ = process.communicate(timeout=60)
    assert process.returncode == code and command in output
    assert ((tmp_path / "requeued").read_text() if (tmp_path / "requeued").exists() else "") == "requeue 70_2\n" * requeued
    assert ("not queued again" in output) == (event == "limit" and not requeued)
