"""Measures agent steps per second: EnvPool alone, a script at several rollout lengths, and optionally a peer beside it.

    python benchmark/throughput.py                                            # pqn_abs_atari.py on this machine
    python benchmark/throughput.py --peer ../cleanrl/pqn_atari_envpool.py     # and CleanRL's in turn: see cleanrl_pqn.sed
    python benchmark/throughput.py --busy                                     # also beside a process that keeps one core busy
    python benchmark/throughput.py --scripts *_atari.py --lengths moving      # all scripts, measuring at every iteration
    python benchmark/throughput.py --flags= --flags=--compile --flags="--compile --precision float32"    # three ways, in turn

Every line is a training run of its own process with the same number of samples and epochs (128 environments, 4 minibatches,
2 epochs, with PPO 4). It is timed by the wall clock between its TensorBoard points: emulation, inference, learning and
logging are all in it, the first quarter of the run is not. Speed is the median over windows of 8,192 steps or more, in
whole rollouts; mean is their harmonic mean, which counts pauses. Emulation, inference and learning are shares of the time, as
the script logs them. All alternate, also quiet and busy. Where L moves, it grows from 16 to the longest.
"""

import argparse
import contextlib
import csv
import itertools
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import envpool
import joblib
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
BUSY = """import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
parent = os.getppid()
while os.getppid() == parent:  # or it would outlive a benchmark that is killed
    sum(range(100_000))
"""


@contextlib.contextmanager
def busy_core(machine):
    """A process that keeps the first of our cores busy, if the machine is to be "busy"."""
    process = subprocess.Popen([sys.executable, "-c", BUSY]) if machine == "busy" else None
    try:
        yield
    finally:
        if process:
            process.kill()
            process.wait()


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
    """Runs a training script to its end in a folder of its own: {"speeds": of its windows, "lengths": of its
    rollouts, and seconds of emulation, inference and learning}. RuntimeError where it fails."""
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w+") as log:
        process = subprocess.run(command, cwd=folder, stdout=log, stderr=log)
        log.seek(0)
        output = log.read()
        if process.returncode:
            raise RuntimeError(f"{shlex.join(command)} ended with {process.returncode}:\n{output[-2000:]}")
        if limit := re.search(r"torch._dynamo hit .*limit.*", output):  # from here on it ran without being compiled
            raise RuntimeError(f"{shlex.join(command)}: {limit[0]}")
        events = EventAccumulator(str(next(Path(folder).glob("runs/*"))), size_guidance={"scalars": 0})
        events.Reload()
    scalars = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    points = [(p.wall_time, p.step) for p in scalars["charts/SPS"]]
    points = [p for p in points if p[1] > points[-1][1] / 4]
    speeds, start = [], points[0]
    for point in points:
        if point[1] - start[1] >= 8192:
            speeds.append((point[1] - start[1]) / (point[0] - start[0]))
            start = point
    if not speeds:
        raise RuntimeError(f"{shlex.join(command)} is over before it has a window of 8,192 steps; use more --steps")
    result = {"speeds": speeds}
    result["lengths"] = [p.value for p in scalars.get("abs/rollout_length", []) if points[0][1] < p.step <= start[1]]
    for name in ("emulation", "inference", "learning"):
        values = [p.value for p in scalars.get(f"time/{name}", [])]
        result[name] = sum(values[len(values) // 4 :])
    return result


def table(results):
    """A dict per name and machine; results maps (name, machine) to a list of what run_script returned."""
    rows = []
    for (name, machine), runs in results.items():
        speeds = np.concatenate([run["speeds"] for run in runs])
        rate = np.median(np.concatenate([run["speeds"] for run in results["EnvPool, random actions", machine]]))
        numbers = np.median(speeds), speeds.min(), speeds.max(), 1 / np.mean(1 / speeds)
        row = {"name": name, "machine": machine}
        row |= zip(("steps_per_second", "lowest", "highest", "mean"), [round(float(x)) for x in numbers], strict=True)
        row |= {"windows": len(speeds), "of_emulator": round(float(np.median(speeds) / rate), 3)}
        seconds = {part: sum(run.get(part, 0) for run in runs) for part in ("emulation", "inference", "learning")}
        row |= {part: round(s / sum(seconds.values()), 3) for part, s in seconds.items() if sum(seconds.values())}
        lengths = sorted({int(n) for run in runs for n in run.get("lengths", [])})
        row |= {"rollout_lengths": " to ".join(map(str, dict.fromkeys([lengths[0], lengths[-1]])))} if lengths else {}
        rows.append(row)
    peers = {row["machine"]: row["steps_per_second"] for row in rows if row["name"].startswith("peer ")}
    rows = [
        row | {"times_the_peer": round(row["steps_per_second"] / peers[row["machine"]], 2)} if peers else row for row in rows
    ]
    columns = dict.fromkeys(column for row in rows for column in row)
    return [{column: row.get(column, "") for column in columns} for row in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scripts", nargs="+", default=["pqn_abs_atari.py"], help="scripts of this repository")
    parser.add_argument("--peer", type=Path, help="a script with CleanRL's flags, run at the base length")
    parser.add_argument("--lengths", nargs="+", default=["16", "32", "max", "moving"], help='steps, "max" and "moving"')
    parser.add_argument("--env-id", default="Breakout-v5", help="the game")
    parser.add_argument("--steps", type=int, default=65536, help="agent steps of each run; on a GPU take 300000")
    parser.add_argument("--rounds", type=int, default=2, help="how often all runs are repeated, in turn")
    parser.add_argument("--busy", action="store_true", help="everything also beside a process that keeps a core busy (Linux)")
    parser.add_argument("--flags", action="append", help="more flags for our scripts (--flags=...); given again, all are run")
    parser.add_argument("--out", type=Path, default=Path("throughput.csv"), help="the CSV to write")
    args = parser.parse_args()
    if args.rounds < 1 or not all(n in ("max", "moving") or n.isdigit() and int(n) > 0 for n in args.lengths):
        parser.error('--rounds must be 1 or more, and --lengths numbers of steps, "max" or "moving"')
    if args.env_id not in envpool.list_all_envs():
        parser.error(f"--env-id {args.env_id} is not one of EnvPool's games, such as Breakout-v5")
    for path in [ROOT / script for script in args.scripts] + [args.peer] * bool(args.peer):
        if not path.is_file():
            parser.error(f"there is no script {path}")
    epochs = {4 if Path(script).name.startswith("ppo_") else 2 for script in args.scripts}  # their defaults
    if args.peer and len(epochs) > 1:
        parser.error("--peer gets the number of epochs of our scripts, and PPO has another; measure it in a call of its own")
    args.out.open("a").close()  # fails here where it cannot be written, not after the first run

    common = f"--env-id {args.env_id} --num-envs 128 --num-minibatches 4 --total-timesteps {args.steps}"
    commands = {}
    if args.peer:  # first, or what is cut short has no ratio
        flags = shlex.split(f"{common} --update-epochs {min(epochs)} --num-steps 32")
        commands[f"peer {args.peer.name}, L = 32"] = [sys.executable, str(args.peer.resolve()), *flags]
    for script, more_flags in itertools.product(args.scripts, args.flags or [""]):
        longest = "128" if Path(script).name.startswith(("pqn_l_", "pqn_xl_")) else "64"
        for length in dict.fromkeys(longest if n == "max" else n for n in args.lengths):
            flags = f"{common} --eval-episodes 0 --no-adapt-rollout --num-steps {length}"
            if length == "moving":
                flags = f"{common} --eval-episodes 0 --rollout-length-max {longest} --adapt-interval 1"
                flags += " --adapt-signal time --rollout-smoothing 1"
            name = f"{script}, L {'moving' if length == 'moving' else f'= {length}'}" + f", {more_flags}" * bool(more_flags)
            commands[name] = [sys.executable, str(ROOT / script), *shlex.split(f"{flags} {more_flags}")]

    results, failed = {}, []
    for i, machine in itertools.product(range(args.rounds), ["quiet", "busy"] if args.busy else ["quiet"]):
        with busy_core(machine):
            speeds = measure_envpool(args.env_id, 128, min(joblib.cpu_count(), 128), seconds=10, warmup=3)
            results.setdefault(("EnvPool, random actions", machine), []).append({"speeds": speeds})
            for name in commands:
                if name in failed:
                    continue
                try:
                    run = run_script(commands[name])
                except RuntimeError as e:
                    failed.append(name)
                    print(f"error: {e}", file=sys.stderr, flush=True)
                    continue
                results.setdefault((name, machine), []).append(run)
                print(f"round {i + 1}, {machine}: {name}: {np.median(run['speeds']):.0f} steps/s", flush=True)
                rows = table(results)
                with args.out.open("w", newline="") as file:
                    writer = csv.DictWriter(file, rows[0])
                    writer.writeheader()
                    writer.writerows(rows)

    rows = table(results)
    lines = [[*map(str, line)] for line in (rows[0], *(row.values() for row in rows))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print("\n".join("  ".join(map(str.ljust, line, widths)) for line in lines))
    print(
        joblib.cpu_count(), "cores,", platform.machine(), f"Python {platform.python_version()}, EnvPool {envpool.__version__}"
    )
    if failed:
        sys.exit(f"error: {len(failed)} of {len(commands)} failed, see above: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
