"""Measures agent steps per second: EnvPool alone, a script at several rollout lengths, and optionally a peer beside it.

    python benchmark/throughput.py                                            # pqn_abs_atari.py on this machine
    python benchmark/throughput.py --peer ../cleanrl/pqn_atari_envpool.py     # and CleanRL's in turn: see cleanrl_pqn.sed
    python benchmark/throughput.py --scripts *_atari.py --lengths moving      # all scripts, a measurement at every iteration
    python benchmark/throughput.py --flags= --flags=--compile --flags="--compile --precision float32"    # three ways, in turn

Every line is a training run of its own process with the same number of samples and epochs (128 environments, 4 minibatches, 2
epochs, with PPO 4), and so of updates where the length is the same. It is timed by the wall clock between its TensorBoard
points: emulation, inference, learning and logging are all in it, the first quarter of the run is not. Speed is the median over
windows of 8,192 steps or more, in whole rollouts; lowest and highest are their range, mean is their harmonic mean, in
which a pause counts that the median does not see, such as a compilation. EnvPool alone, our runs and the peer's alternate.
Emulation, inference and learning are shares of the time, as the script logs them: waiting for the emulator; acting and
storing; everything else. Where L moves, it grows through its whole range; the lengths that the windows hold are in
rollout_lengths. Prints a table and writes it as CSV, which is written anew after every run, so that a benchmark that is cut
short leaves what it has measured. A run that fails, or cannot compute in the way its flags ask for, is named and not repeated.
"""

import argparse
import csv
import itertools
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import envpool
import numpy as np
from plot_run import can_write
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
ENVIRONMENT = dict(os.environ)  # for the runs, the peer's too; the following import sets GOMP_SPINCOUNT here
from pqn_abs_atari import atari_ids, granted_cores  # noqa: E402

FIELDS = "name steps_per_second lowest highest mean windows of_emulator emulation inference learning peak_memory_gib".split()
FIELDS += ["rollout_lengths"]


def measure_envpool(env_id, num_envs, num_threads, seconds, warmup):
    """Agent steps per second of EnvPool with random actions, in windows of a second: a list of floats."""
    envs = envpool.make(env_id, env_type="gymnasium", num_envs=num_envs, num_threads=num_threads, reward_clip=True)
    envs.reset()
    rng = np.random.default_rng(0)
    actions = rng.integers(envs.action_space.n, size=(1024, num_envs), dtype=np.int32)
    speeds, start, window_start, steps = [], time.perf_counter(), time.perf_counter(), 0
    while (now := time.perf_counter()) - start < warmup + seconds:
        if now - window_start >= 1:
            if window_start - start >= warmup:
                speeds.append(steps / (now - window_start))
            window_start, steps = now, 0
        envs.step(actions[rng.integers(1024)])
        steps += num_envs
    envs.close()
    return speeds


def run_script(command):
    """Runs a training script to its end in a folder of its own.

    Returns (speeds of the windows, shares of emulation, inference and learning or None, peak resident memory in GiB or None,
    rollout lengths in the windows or an empty list). RuntimeError where it fails, or says that it runs without a compiler or
    CUDA graphs though asked to use them, or has been compiled so often that PyTorch gave up, or is too short for a window.
    """
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w+") as log:
        process, peak_memory = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=log, stderr=log), None
        while process.poll() is None:
            time.sleep(0.5)
            peak_memory = peak_memory_so_far(process.pid) or peak_memory
        log.seek(0)
        output = log.read()
        if process.returncode:
            raise RuntimeError(f"{shlex.join(command)} ended with {process.returncode}:\n{output[-2000:]}")
        if missing := re.search(r"^--\w+ finds no .*$|torch._dynamo hit .*limit.*", output, re.M):
            raise RuntimeError(f"{shlex.join(command)}: {missing[0]}")
        events = EventAccumulator(str(next(Path(folder).glob("runs/*"))), size_guidance={"scalars": 0})
        events.Reload()
    points = [(p.wall_time, p.step) for p in events.Scalars("charts/SPS")]
    points = [p for p in points if p[1] > points[-1][1] / 4]
    speeds, start = [], points[0]
    for point in points:
        if point[1] - start[1] >= 8192:
            speeds.append((point[1] - start[1]) / (point[0] - start[0]))
            start = point
    if not speeds:
        raise RuntimeError(f"{shlex.join(command)} is over before it has a window of 8,192 steps; use more --steps")
    shares, lengths = None, []
    if "abs/rollout_length" in events.Tags()["scalars"]:
        lengths = [int(p.value) for p in events.Scalars("abs/rollout_length") if points[0][1] < p.step <= start[1]]
    if "time/learning" in events.Tags()["scalars"]:
        times = [[p.value for p in events.Scalars(f"time/{n}")] for n in ("emulation", "inference", "learning")]
        seconds = [sum(t[len(t) // 4 :]) for t in times]
        shares = [s / sum(seconds) for s in seconds]
    return speeds, shares, peak_memory, lengths


def peak_memory_so_far(pid):
    """Largest resident memory of a process in GiB, None where /proc does not tell (it has ended, or this is not Linux)."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) / 2**20 if found else None
    except OSError:
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scripts", nargs="+", default=["pqn_abs_atari.py"], help="scripts of this repository")
    parser.add_argument("--peer", type=Path, help="a script with CleanRL's flags, run at the base length")
    parser.add_argument("--lengths", nargs="+", default=["16", "32", "max", "moving"], help='steps, "max" and "moving"')
    parser.add_argument("--env-id", default="Breakout-v5", help="the game")
    parser.add_argument("--steps", type=int, default=65536, help="agent steps of each run; on a GPU take 300000")
    parser.add_argument("--rounds", type=int, default=2, help="how often all runs are repeated, in turn")
    parser.add_argument("--flags", action="append", help="more flags for our scripts (--flags=...); given again, all are run")
    parser.add_argument("--out", type=Path, default=Path("throughput.csv"), help="the CSV to write")
    args = parser.parse_args()

    lengths = all(n in ("max", "moving") or (n.isdigit() and int(n) > 0) for n in args.lengths)
    if args.rounds < 1 or not lengths:
        sys.exit('error: --rounds must be 1 or more, and --lengths numbers of steps, "max" or "moving"')
    longest_of = {script: 128 if Path(script).name.startswith(("pqn_l_", "pqn_xl_")) else 64 for script in args.scripts}
    needed = max(4 * 8192, *(2 * 128 * int(n) for n in args.lengths if n.isdigit()), 0)
    if "moving" in args.lengths:
        needed = max(needed, 4 * 128 * max(longest_of.values()))
    if args.steps < needed:
        sys.exit(f"error: --steps {args.steps} is too few for these --lengths; use {needed} or more")
    if args.env_id not in atari_ids():
        sys.exit(f"error: --env-id {args.env_id} is not one of EnvPool's Atari games; use one, such as Breakout-v5")
    for path in [ROOT / script for script in args.scripts] + [args.peer] * bool(args.peer):
        if not path.is_file():
            sys.exit(f"error: there is no script {path}")
    epochs = {4 if Path(script).name.startswith("ppo_") else 2 for script in args.scripts}  # their defaults
    if args.peer and len(epochs) > 1:
        sys.exit(
            "error: --peer gets the number of epochs of our scripts, and PPO has another; measure it in a call of its own"
        )
    if args.out.is_dir() or not can_write(args.out.resolve().parent):
        sys.exit(f"error: cannot write {args.out}; choose a file in a folder that exists and that you may write to")

    cores = granted_cores()
    common = f"--env-id {args.env_id} --num-envs 128 --num-minibatches 4 --total-timesteps {args.steps}"
    commands = {}
    for script, more_flags in itertools.product(args.scripts, args.flags or [""]):
        longest = longest_of[script]
        for length in dict.fromkeys(str(longest) if n == "max" else n for n in args.lengths):
            name, flags = f"L = {length}", f"--no-adapt-rollout --num-steps {length}"
            if length == "moving":
                # In multiples of the number of minibatches from 16 to the longest, which at least the last rollout has
                name, growth = "L moving", args.steps - 2 * 128 * longest
                flags = f"--rollout-length-max {longest} --adapt-interval 1 --adapt-signal time --rollout-smoothing 1"
                flags += f" --schedule-timesteps {growth}"
            flags = shlex.split(f"{common} --eval-episodes 0 {flags} {more_flags}")
            name = f"{script}, {name}" + f", {more_flags}" * bool(more_flags)
            commands[name] = [sys.executable, str(ROOT / script), *flags]
    if args.peer:
        peer_name = f"peer {args.peer.name}, L = 32"
        common += f" --update-epochs {min(epochs)} --num-steps 32"
        commands[peer_name] = [sys.executable, str(args.peer.resolve()), *shlex.split(common)]
    emulator, runs, failed = [], {name: [] for name in commands}, []
    in_turn = sorted(commands, key=lambda name: not name.startswith("peer "))  # first, or what is cut short has no ratio
    for i in range(args.rounds):
        emulator += measure_envpool(args.env_id, 128, min(cores, 128), seconds=10, warmup=3)
        rows = table(emulator, runs)
        for name in in_turn:
            if name in failed:
                continue
            try:
                runs[name].append(run_script(commands[name]))
            except RuntimeError as e:
                failed.append(name)
                print(f"error: {e}", file=sys.stderr, flush=True)
                continue
            print(f"round {i + 1} of {args.rounds}: {name}: {np.median(runs[name][-1][0]):.0f} steps/s", flush=True)
            rows = table(emulator, runs)
            with args.out.open("w", newline="") as f:
                writer = csv.DictWriter(f, FIELDS)
                writer.writeheader()
                writer.writerows(rows)

    width = max(len(r["name"]) for r in rows)
    for r in [dict(zip(FIELDS, FIELDS, strict=True)), *rows]:
        print("  ".join(str(r[f]).ljust(width if f == "name" else max(10, len(f))) for f in FIELDS))
    for r in rows[1:-1] if rows[-1]["name"].startswith("peer ") else []:
        print(f"{r['name']}: {r['steps_per_second'] / rows[-1]['steps_per_second']:.2f} times the speed of the peer")
    print(f"{cores} cores, {platform.machine()}, Python {platform.python_version()}, EnvPool {envpool.__version__}")
    if failed:
        sys.exit(f"error: {len(failed)} of {len(commands)} failed, see above: {'; '.join(failed)}")


def table(emulator, runs):
    """A row for the emulator's speeds and one for every script that has run; runs maps names to what run_script returned."""
    rate = float(np.median(emulator))
    rows = [row("EnvPool, random actions", emulator, rate)]
    for name, results in runs.items():
        if results:
            speeds = [speed for r in results for speed in r[0]]
            shares = [r[1] for r in results if r[1]]
            mean_shares = np.mean(shares, axis=0) if shares else None
            peaks = [r[2] for r in results if r[2]]
            lengths = sorted({length for r in results for length in r[3]})
            lengths = " to ".join(map(str, lengths[:1] + lengths[1:][-1:]))
            rows.append(row(name, speeds, rate, mean_shares, max(peaks, default=None), lengths))
    return rows


def row(name, speeds, rate, shares=None, memory=None, lengths=""):
    median = float(np.median(speeds))
    mean = len(speeds) / sum(1 / speed for speed in speeds)  # windows are of steps, not of time
    cells = [name, *map(round, (median, min(speeds), max(speeds), mean)), len(speeds), round(median / rate, 3)]
    cells += ["", "", ""] if shares is None else [round(float(s), 3) for s in shares]
    return dict(zip(FIELDS, [*cells, "" if memory is None else round(memory, 2), lengths], strict=True))


if __name__ == "__main__":
    main()
