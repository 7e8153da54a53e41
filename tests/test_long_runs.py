"""Checkpoints, resuming, signals and several processes: a run that is stopped anywhere goes on as if it had not been."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import envpool
import pytest
import torch
from conftest import DISTINCT, MODULES, ROOT, run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_learning import EXPLORATION, LAMPS
from test_speed import fresh_network, gradients_and_logs, minibatch

PQN = "pqn_abs_atari.py"
SIZE = (
    "--env-id Pong-v5 --num-envs 8 --rollout-length-min 4 --rollout-length-max 16 --num-minibatches 2 --adapt-interval 2 "
    "--max-episode-steps 200 --eval-episodes 2 --torch-threads 1 --env-threads 1 --total-timesteps"
).split()
SCALARS_OF_EVERY_ITERATION = "abs/rollout_length charts/SPS charts/learning_rate losses/grad_norm time/learning".split()


def start(script, *arguments, cwd, command=(sys.executable,)):
    """Starts a script in the background."""
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {} if "cuda" in arguments else {"CUDA_VISIBLE_DEVICES": ""}
    arguments = [*command, str(ROOT / script), *map(str, arguments)]
    return subprocess.Popen(arguments, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process, seconds=300):
    """Waits until something is so while the process runs; ends the process where it does not come to be."""
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        if time.time() > end:
            process.kill()
            pytest.fail(f"waited in vain: {process.communicate()}")
        time.sleep(0.05)


def interrupt(script, folder, *arguments, after=1):
    """Runs a script until it has so many checkpoints, then sends SIGTERM. Returns its folder, return code and output."""
    process = start(script, *arguments, cwd=folder)
    wait_for(lambda: len(list(folder.glob("runs/*/checkpoint_*.pt"))) >= after, process)
    process.terminate()
    output, errors = process.communicate(timeout=60)
    (run_dir,) = folder.glob("runs/*")
    return run_dir, process.returncode, output, errors


def children_of(process):
    """Process ids of the children, the oldest first."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")  # of Linux, where pgrep may be missing
    pgrep = ["pgrep", "-P", str(process.pid)]
    found = children.read_text() if children.exists() else subprocess.run(pgrep, capture_output=True, text=True).stdout
    return [int(pid) for pid in found.split()]


def checkpoints(run_dir):
    return sorted(run_dir.glob("checkpoint_*.pt"))


def load(path):
    return torch.load(path, weights_only=True)


def curves(run_dir):
    """Every scalar as (step, value), as TensorBoard shows it."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def assert_curves_are_whole(run_dir, num_envs=8):
    """Every agent step belongs to one iteration: no gap, no double."""
    scalars = curves(run_dir)
    batches = scalars["abs/batch_size"]
    assert [step for step, _ in batches] == list(itertools.accumulate(int(b) for _, b in batches))
    for name in SCALARS_OF_EVERY_ITERATION:
        assert [step for step, _ in scalars[name]] == [step for step, _ in batches], name
    return scalars


def same(a, b):
    """Equality of nested dicts, lists and tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.fixture(scope="module", params=DISTINCT)
def stopped(request, tmp_path_factory):
    """A run that SIGTERM ended after a checkpoint or two: (script, run folder, return code, output, errors)."""
    folder = tmp_path_factory.mktemp("stopped")
    return request.param, *interrupt(request.param, folder, *SIZE, 2400, "--checkpoint-interval", 100, after=2)


@pytest.fixture
def copy(stopped, tmp_path):
    """A copy of that run which a test may spoil: (script, run folder)."""
    script, run_dir, *_ = stopped
    return script, shutil.copytree(run_dir, tmp_path / "runs" / run_dir.name)


pqn_only = pytest.mark.parametrize("stopped", [PQN], indirect=True)


def test_sigterm_saves_and_says_how_to_go_on(stopped):
    """Exit code 143, one line with the command to resume, a checkpoint of the last iteration, no half-written file."""
    script, run_dir, code, output, errors = stopped
    assert code == 143 and not errors
    last = output.splitlines()[-1]
    assert f"python {ROOT / script} --resume runs/{run_dir.name}" in last
    step = load(checkpoints(run_dir)[-1])["global_step"]
    assert f"step {step:,};" in last and curves(run_dir)["abs/batch_size"][-1][0] == step
    assert len(checkpoints(run_dir)) == 2
    names = sorted(p.name for p in run_dir.iterdir() if not p.name.startswith("events."))
    assert names == sorted([".lock", "args.json", *(p.name for p in checkpoints(run_dir)), script, "versions.json"])


def test_resume_continues_to_the_end(copy, tmp_path):
    """--resume alone takes the run's own arguments to its end; curves have neither gap nor double; then it is finished."""
    script, run_dir = copy
    before = curves(run_dir)
    result = run_script(script, "--resume", run_dir.relative_to(tmp_path), "--checkpoint-interval", 0, cwd=tmp_path)
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert re.search(r"continuing at step [\d,]+ of 2,400", result.stdout)
    after = assert_curves_are_whole(run_dir)
    for name, points in before.items():
        assert after[name][: len(points)] == points, name
    assert after["abs/batch_size"][-1][0] == load(run_dir / "model.pt")["global_step"] > 2200
    assert (run_dir / "eval.json").exists() and len(checkpoints(run_dir)) == 2
    again = run_script(script, "--resume", run_dir.relative_to(tmp_path), cwd=tmp_path)
    assert again.returncode == 0 and "finished" in again.stdout and len(again.stdout.splitlines()) == 1 and not again.stderr
    assert assert_curves_are_whole(run_dir) == after


def test_nothing_but_the_games_differs(copy, tmp_path):
    """A run resumed with no step left to do saves again what it loaded: weights, optimizer, counters, window."""
    script, run_dir = copy
    old = load(checkpoints(run_dir)[-1]) | {"rollout_length": 7.3, "recent_returns": [1.5, -2.0]}
    torch.save(old, checkpoints(run_dir)[-1])  # so early in a run the length is still the shortest
    args = json.loads((run_dir / "args.json").read_text())
    (run_dir / "args.json").write_text(json.dumps(args | {"total_timesteps": old["global_step"] + 1}))
    result = run_script(script, "--resume", run_dir, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    new = load(checkpoints(run_dir)[-1])
    assert new.pop("finished") and not old.pop("finished")
    assert old.pop("args")["total_timesteps"] == 2400 and new.pop("args")["total_timesteps"] == old["global_step"] + 1
    for content in (old, new):
        content["optimizer"]["param_groups"][0].pop("lr")  # it follows from the arguments and the step
    assert same(old, new) and old["num_measurements"] > 2 and old["optimizer"]["state"]
    assert old["iteration"] > 4 and old["divergences"] and len(old["random_states"]) == 1


@pqn_only
def test_a_resumed_run_plays_other_games(copy, run_here, monkeypatch):
    """The step goes into the seeds, or a run that is often stopped would see the beginning of the same games only."""
    script, run_dir = copy
    asked, step = [], load(checkpoints(run_dir)[-1])["global_step"]
    monkeypatch.setattr(envpool, "make", lambda *a, **k: asked.append(k["env_seed"]) or sys.exit())
    run_here(script, "--resume", run_dir, "--device", "cpu")
    assert asked == [MODULES[script].env_seeds(1, 8, start=step)] and asked != [MODULES[script].env_seeds(1, 8)]


@pqn_only
def test_points_beyond_the_checkpoint_are_taken_out(copy, tmp_path):
    """After a crash the curves reach further than the checkpoint; the resumed run draws them anew, once."""
    script, run_dir = copy
    first, last = checkpoints(run_dir)
    last.unlink()
    step = load(first)["global_step"]
    assert curves(run_dir)["abs/batch_size"][-1][0] > step
    assert run_script(script, "--resume", run_dir, cwd=tmp_path).returncode == 0
    assert_curves_are_whole(run_dir)


@pqn_only
def test_killed_at_any_moment(stopped, tmp_path):
    """kill -9 leaves a run that can be resumed from its last checkpoint."""
    script, moment = stopped[0], random.SystemRandom().uniform(0, 3)
    process = start(script, *SIZE, 1_000_000, "--checkpoint-interval", 32, cwd=tmp_path)  # saves nearly all the time
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint_*.pt")), process)
    time.sleep(moment)
    assert process.poll() is None
    process.kill()
    process.communicate()
    (run_dir,) = tmp_path.glob("runs/*")
    steps = max(int(path.stem.split("_")[1]) for path in checkpoints(run_dir))
    args = json.loads((run_dir / "args.json").read_text())
    (run_dir / "args.json").write_text(json.dumps(args | {"total_timesteps": steps + 300}))
    result = run_script(script, "--resume", run_dir, "--checkpoint-interval", 0, cwd=tmp_path)
    assert result.returncode == 0 and not result.stderr, (moment, result.stderr)
    assert f"continuing at step {steps:,} " in result.stdout, moment
    assert_curves_are_whole(run_dir)


@pqn_only
@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_damaged_checkpoint(copy, damage, tmp_path):
    """A checkpoint that cannot be read is named, and the one before is used."""
    script, run_dir = copy
    first, last = checkpoints(run_dir)
    step, content = load(first)["global_step"], bytearray(last.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 0xFF
    last.write_bytes({"truncated": content[: len(content) // 2], "empty": b""}.get(damage, content))
    result = run_script(script, "--resume", run_dir, cwd=tmp_path)
    assert result.returncode == 0
    (line,) = result.stderr.splitlines()
    assert last.name in line and "damaged" in line
    assert f"continuing at step {step:,} " in result.stdout
    assert_curves_are_whole(run_dir)


def test_a_damaged_checkpoint_is_none_of_the_last_two(tmp_path):
    """One that a run has gone on without, from the one before, goes away, though it is of a later step."""
    for age, step in ((20, 100), (10, 200)):
        MODULES[PQN].save_checkpoint(tmp_path, {"global_step": step})
        os.utime(tmp_path / f"checkpoint_{step:012d}.pt", (time.time() - age,) * 2)
    (tmp_path / f"checkpoint_{200:012d}.pt").write_bytes(b"")
    os.utime(tmp_path / f"checkpoint_{200:012d}.pt", (time.time() - 5,) * 2)
    MODULES[PQN].save_checkpoint(tmp_path, {"global_step": 150})
    MODULES[PQN].save_checkpoint(tmp_path, {"global_step": 190})
    assert [load(path)["global_step"] for path in checkpoints(tmp_path)] == [150, 190]


@pytest.mark.parametrize("module", MODULES.values(), ids=lambda module: module.__name__)
def test_what_kill_9_left_half_written_goes_away(module, tmp_path):
    """With the next checkpoint, since that has another name and would not write over it."""
    (tmp_path / "checkpoint_000000000100.pt.part").write_bytes(b"half")
    module.save_checkpoint(tmp_path, {"global_step": 200})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_000000000200.pt"]


def test_computing_in_another_way(copy, tmp_path):
    """A checkpoint of a run with --cudagraphs goes on where there is no GPU, and in another memory format."""
    script, run_dir = copy
    for path in checkpoints(run_dir):
        content = load(path)
        torch.save(content | {"args": content["args"] | {"cudagraphs": True}}, path)
    args = json.loads((run_dir / "args.json").read_text())
    (run_dir / "args.json").write_text(json.dumps(args | {"cudagraphs": True}))
    result = run_script(script, "--resume", run_dir, "--memory-format", "channels_last", cwd=tmp_path)
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert "finds no CUDA device here: running without" in result.stdout


@pqn_only
def test_no_checkpoint_left(copy, tmp_path):
    """Where nothing can be read, --resume says so and changes nothing; --auto-resume starts anew."""
    script, run_dir = copy
    for path in checkpoints(run_dir):
        path.write_bytes(b"")
    result = run_script(script, "--resume", run_dir, cwd=tmp_path)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 3
    assert result.stderr.splitlines()[-1].startswith("error: ") and "no checkpoint" in result.stderr
    arguments = (*SIZE, 2400, "--auto-resume", "--total-timesteps", 100, "--eval-episodes", 0)
    assert run_script(script, *arguments, cwd=tmp_path).returncode == 0
    assert len(list(tmp_path.glob("runs/*"))) == 2


@pqn_only
def test_other_arguments_are_refused(copy, run_here, tmp_path):
    """What would change the result is named and refused; what only says where and how it runs is not."""
    script, run_dir = copy
    changed = "--learning-rate 1e-3 --no-adapt-rollout --seed 2 --total-timesteps 2000".split()
    result = run_here(script, "--resume", run_dir, *changed)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    for flag in ("--learning-rate (was 0.00025, not 0.001)", "--adapt-rollout", "--seed", "--total-timesteps"):
        assert flag in result.stderr
    assert "--num-envs" not in result.stderr
    for arguments, hint in (
        (["--resume", tmp_path / "runs"], "no run of"),
        (["--resume", run_dir, "--auto-resume"], "exclude each other"),
        (["--resume", run_dir, "--env-id", "Breakot-v5"], "Breakout-v5"),
    ):
        result = run_here(script, *arguments)
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and hint in result.stderr, result.stderr
    for hint in ("no run of pqn_l_abs_atari.py", "another network"):
        result = run_here("pqn_l_abs_atari.py", "--resume", run_dir)
        assert result.returncode == 2 and hint in result.stderr and len(result.stderr.splitlines()) == 1
        (run_dir / "versions.json").unlink(missing_ok=True)  # runs of earlier versions do not say whose they are


@pqn_only
def test_what_is_no_run_is_refused(copy, run_here):
    """Files that can be read but are not what they should be, and a folder that was forgotten, each get their line."""
    script, run_dir = copy
    for arguments in (["--resume", ""], ["--resume="]):
        result = run_here(script, *arguments)
        assert result.returncode == 2 and "no run of" in result.stderr and len(result.stderr.splitlines()) == 1
    for path in checkpoints(run_dir):
        torch.save({"a": 1}, path)
    result = run_here(script, "--resume", run_dir)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 3
    assert result.stderr.count("not a checkpoint") == 2 and "no checkpoint that can be read" in result.stderr
    args = json.loads((run_dir / "args.json").read_text())
    for name, content in (("versions.json", [{"script": [script]}]), ("args.json", args | {"seed": "abc"})):
        (run_dir / name).write_text(json.dumps(content))
        result = run_here(script, "--resume", run_dir)
        assert result.returncode == 2 and "no run of" in result.stderr and len(result.stderr.splitlines()) == 1
        (run_dir / "versions.json").unlink(missing_ok=True)


@pqn_only
def test_a_run_belongs_to_one_process(copy, tmp_path):
    """While a process runs it, a second one with the same arguments is refused, and takes over when that is gone."""
    script, run_dir = copy
    steps = (*SIZE[:-1], "--total-timesteps", 2400)
    first = start(script, "--resume", run_dir, "--eval-episodes", 10**6, cwd=tmp_path)
    wait_for(lambda: len(list(run_dir.glob("events.*"))) > 1, first)
    for arguments in (("--resume", run_dir), (*steps, "--auto-resume")):
        second = run_script(script, *arguments, cwd=tmp_path)
        assert second.returncode == 2 and "in use by another process" in second.stderr and not second.stdout
        assert len(second.stderr.splitlines()) == 1 and first.poll() is None
    first.kill()
    first.communicate()
    third = run_script(script, *steps, "--auto-resume", cwd=tmp_path)
    assert third.returncode == 0 and "continuing" in third.stdout, third.stderr
    assert len(list(tmp_path.glob("runs/*"))) == 1
    assert_curves_are_whole(run_dir)


@pytest.mark.parametrize("stopped", ["gns_batch_atari.py"], indirect=True)
def test_resume_where_the_next_iteration_measures_nothing(copy, tmp_path):
    """The progress line needs no noise scale of this very process."""
    script, run_dir = copy
    path = checkpoints(run_dir)[-1]
    content = load(path)
    assert content["noise_scales"]
    torch.save(content | {"iteration": content["iteration"] // 2 * 2}, path)  # measured at even ones
    result = run_script(script, "--resume", run_dir, cwd=tmp_path)
    assert result.returncode == 0 and not result.stderr, result.stderr


@pqn_only
def test_auto_resume(copy, tmp_path):
    """Continues the newest run with the same arguments, starts a new one where there is none, and leaves a finished one."""
    script, run_dir = copy
    arguments = (*SIZE, 2400, "--checkpoint-interval", 100, "--auto-resume")
    other = run_script(script, *arguments, "--gamma", 0.5, "--total-timesteps", 100, "--eval-episodes", 0, cwd=tmp_path)
    assert other.returncode == 0 and "continuing" not in other.stdout and len(list(tmp_path.glob("runs/*"))) == 2
    result = run_script(script, *arguments, cwd=tmp_path)
    assert result.returncode == 0 and "continuing" in result.stdout and run_dir.name in result.stdout, result.stderr
    again = run_script(script, *arguments, cwd=tmp_path)
    assert again.returncode == 0 and f"{run_dir.name} is finished" in again.stdout
    assert len(list(tmp_path.glob("runs/*"))) == 2
    assert_curves_are_whole(run_dir)


@pqn_only
def test_auto_resume_after_a_divergence(copy, tmp_path):
    """It leaves a run that diverged alone, until --resume has got past that step to a later checkpoint."""
    script, run_dir = copy
    arguments = (*SIZE, 2400, "--checkpoint-interval", 100, "--auto-resume", "--eval-episodes", 0)
    step = load(checkpoints(run_dir)[-1])["global_step"]
    (run_dir / "diverged.json").write_text(json.dumps({"global_step": step + 1}))
    refused = run_script(script, *arguments, cwd=tmp_path)
    assert refused.returncode == 2 and f"{run_dir.name} has the same arguments and diverged; --resume" in refused.stderr
    (run_dir / "diverged.json").write_text(json.dumps({"global_step": step}))
    result = run_script(script, *arguments, cwd=tmp_path)
    assert result.returncode == 0 and f"continuing at step {step:,} of 2,400" in result.stdout, result.stderr


@pqn_only
def test_what_runs_it_may_change_but_not_unseen(copy, tmp_path):
    """A run that other code or another library continues says so, and versions.json lists both."""
    script, run_dir = copy
    path = run_dir / "versions.json"
    (now,) = json.loads(path.read_text())
    old = now | {"torch": "2.11.0", "source": "0123456789ab"}
    path.write_text(json.dumps([old]))
    for repeat in range(2):
        result = run_script(script, "--resume", run_dir, "--total-timesteps", 2600 + 200 * repeat, cwd=tmp_path)
        assert result.returncode == 0
        assert json.loads(path.read_text()) == [old, now]
        warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
        assert len(warnings) == 1 - repeat
        if warnings:
            assert "source (was 0123456789ab), torch (was 2.11.0)" in warnings[0] and "envpool" not in warnings[0]


@pqn_only
def test_an_extended_run_is_another_than_a_long_one(copy, tmp_path):
    """Since its schedules are those of the first total, --auto-resume with the larger total starts a run of its own; and what
    an extension does not evaluate has no evaluation, least of all that of the run before."""
    script, run_dir = copy
    assert run_script(script, "--resume", run_dir, "--eval-episodes", 2, cwd=tmp_path).returncode == 0
    assert (run_dir / "eval.json").exists()
    extension = ("--total-timesteps", 2600, "--eval-episodes", 0)
    assert run_script(script, "--resume", run_dir, *extension, cwd=tmp_path).returncode == 0
    assert not (run_dir / "eval.json").exists()
    arguments = (*SIZE, 2600, "--checkpoint-interval", 100, "--auto-resume", "--eval-episodes", 0)
    result = run_script(script, *arguments, cwd=tmp_path)
    assert result.returncode == 0 and "continuing" not in result.stdout and len(list(tmp_path.glob("runs/*"))) == 2


@pytest.mark.parametrize("script", [PQN, "ppo_abs_atari.py"])
def test_extension_keeps_the_schedules(script, tmp_path):
    """A finished run goes on with a larger total; epsilon and learning rate stay on the first run's lines, as a line says."""
    anneals = script != PQN  # by default: PQN decays epsilon alone, PPO the learning rate
    flags = "--adapt-signal time --adapt-interval 1 --rollout-smoothing 1".split()
    flags += [] if anneals else ["--exploration-fraction", 1]
    assert run_script(script, *SIZE, 1000, *flags, cwd=tmp_path).returncode == 0
    (run_dir,) = tmp_path.glob("runs/*")
    result = run_script(script, "--resume", run_dir, "--total-timesteps", 2500, cwd=tmp_path)
    assert json.loads((run_dir / "args.json").read_text())["schedule_timesteps"] == 1000
    line = "schedules stay those of the first 1,000 steps" + ", so the learning rate is 0 from there on" * anneals
    assert result.returncode == 0 and line in result.stdout.splitlines(), result.stderr
    scalars = assert_curves_are_whole(run_dir)
    batches = scalars["abs/batch_size"]
    assert batches[-1][0] > 2300
    assert {length for step, length in scalars["abs/rollout_length"] if step > 1200} == {16}
    for (step, batch), (_, rate) in zip(batches, scalars["charts/learning_rate"], strict=True):
        assert rate == pytest.approx(2.5e-4 * (max(0, 1 - (step - batch) / 1000) if anneals else 1), abs=1e-9)
    for step, epsilon in scalars.get("charts/epsilon", []):
        assert epsilon == pytest.approx(max(0.001, 1 - 0.999 * step / 1000), abs=1e-6)
    assert ("charts/epsilon" in scalars) is not anneals
    assert json.loads((run_dir / "args.json").read_text())["total_timesteps"] == 2500
    assert run_script(script, "--resume", run_dir, cwd=tmp_path).stdout.count("finished") == 1


@pqn_only
def test_sigint_and_impatience(stopped, tmp_path):
    """Ctrl-C saves and exits with 130, also where it comes a second time at once, as from a terminal and torchrun; during the
    evaluation, which can be done again, a signal ends the run at once."""
    script = stopped[0]
    process = start(script, *SIZE, 2400, "--checkpoint-interval", 100, cwd=tmp_path)
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint_*.pt")), process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.02)
    process.terminate()
    output, errors = process.communicate(timeout=60)
    (run_dir,) = tmp_path.glob("runs/*")
    assert process.returncode == 130 and not errors
    assert "stopped by a signal" in output and "--resume runs/" in output.splitlines()[-1]
    resume = ("--resume", run_dir, "--checkpoint-interval", 0, "--eval-episodes", 1_000_000, "--max-episode-steps", 200)
    process = start(script, *resume, cwd=tmp_path)
    wait_for(lambda: (run_dir / "model.pt").exists(), process)
    process.terminate()
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 143 and not errors and "--resume" in output.splitlines()[-1]
    assert not (run_dir / "eval.json").exists()
    assert run_script(script, "--resume", run_dir, "--eval-episodes", 2, cwd=tmp_path).returncode == 0
    assert json.loads((run_dir / "eval.json").read_text())["episodes"] == 2


@pytest.mark.parametrize("script", DISTINCT)
def test_a_signal_while_the_evaluation_is_set_up(script, run_here, monkeypatch):
    """--eval-only has no iteration at whose end it would look: it stops before it plays."""
    monkeypatch.setattr(torch, "set_num_threads", lambda n: signal.raise_signal(signal.SIGTERM))
    result = run_here(script, "--eval-only", "--model", "model.pt")
    assert result.returncode == 143 and "stopped at once" in result.stdout


@pytest.mark.parametrize("module", MODULES.values(), ids=lambda module: module.__name__)
def test_a_second_signal(module, monkeypatch, capsys):
    """Within two seconds it is the first one once more; later it ends the script at once, as any does where none need wait."""
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        received = module.catch_signals()
        for clock[0] in (100.0, 100.1, 101.9):
            signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGTERM]
        clock[0] = 102.1
        with pytest.raises(SystemExit) as stop:
            signal.raise_signal(signal.SIGINT)
        assert stop.value.code == 130 and "stopped at once; --resume" in capsys.readouterr().out
        module.catch_signals().append(0)
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pqn_only
def test_a_signal_before_the_evaluation(stopped, tmp_path):
    """A run of which only the evaluation is left stops at a signal too, though no iteration is left to notice it."""
    script = stopped[0]
    process = start(script, *SIZE, 200, "--eval-episodes", 100, cwd=tmp_path)
    wait_for(lambda: list(tmp_path.glob("runs/*/model.pt")), process)
    process.kill()
    process.communicate()
    (run_dir,) = tmp_path.glob("runs/*")
    assert not (run_dir / "eval.json").exists()
    process = start(script, "--resume", run_dir, "--eval-episodes", 2, cwd=tmp_path)
    for line in process.stdout:
        if " parameters, " in line:  # the first line, long after the script began to catch signals
            break
    process.terminate()
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and not errors and "stopped at once; --resume" in output
    assert not (run_dir / "eval.json").exists() and load(checkpoints(run_dir)[-1])["finished"] is False


@pqn_only
def test_a_checkpoint_that_cannot_be_written(stopped, tmp_path):
    """A full disk costs the checkpoint, not the run: a warning, and training goes on."""
    script = stopped[0]
    code = (
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**23, 2**23)); "  # a model of 7 MB fits, a checkpoint of 20 MB does not
        f"sys.argv = sys.argv[1:]; runpy.run_path({str(ROOT / script)!r}, run_name='__main__')"
    )
    arguments = [*SIZE, "500", "--checkpoint-interval", "200"]
    result = subprocess.run([sys.executable, "-c", code, script, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(line.startswith("warning: cannot write runs/") and "too large" in line for line in result.stderr.splitlines())
    assert len(result.stderr.splitlines()) >= 3
    (run_dir,) = tmp_path.glob("runs/*")
    assert not list(run_dir.glob("checkpoint*")) and (run_dir / "eval.json").exists()


@pytest.mark.parametrize("script", [MODULES[name] for name in DISTINCT], ids=DISTINCT)
@pytest.mark.parametrize("error", [SystemExit, OSError])
def test_a_file_is_whole_or_the_old_one(script, error, tmp_path, monkeypatch):
    """What is written stands complete beside the old file before it takes its place; where that fails, the old one stays."""
    path, seen = tmp_path / "model.pt", []
    script.write_file(path, b"old")

    def dies(part, whole):
        seen.append((Path(part).read_bytes(), Path(whole).read_bytes()))
        raise error

    monkeypatch.setattr(os, "replace", dies)
    monkeypatch.setattr(os, "fsync", lambda file: seen.append("on the disk"))
    with pytest.raises(error):
        script.write_file(path, b"new")
    assert seen == ["on the disk", (b"new", b"old")] and path.read_bytes() == b"old"
    assert error is SystemExit or [p.name for p in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("script", [MODULES[name] for name in DISTINCT], ids=DISTINCT)
def test_averages_over_processes(script, monkeypatch):
    """The gradient and logged numbers are means over the processes, not sums, and a maximum is one."""
    other = torch.tensor([4.0, -2.0])

    def all_reduce(x, op=torch.distributed.ReduceOp.SUM):
        x.copy_(torch.maximum(x, other.to(x)) if op == torch.distributed.ReduceOp.MAX else x + other.to(x))

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    network = torch.nn.Linear(1, 1)
    network.weight.grad, network.bias.grad = torch.tensor([[2.0]]), torch.tensor([6.0])
    script.average_gradients(network)
    assert (float(network.weight.grad), float(network.bias.grad)) == (3, 2)
    assert script.reduce_numbers([2.0, 6.0]) == [3, 2]
    assert script.reduce_numbers([2.0, 6.0], torch.distributed.ReduceOp.MAX) == [4, 6]
    assert script.reduce_numbers([2.0, 6.0], torch.distributed.ReduceOp.SUM) == [6, 4]
    assert float(script.average(torch.tensor([2.0, 6.0])).sum()) == 3 + 2


@pytest.mark.parametrize("script", [MODULES[name] for name in DISTINCT], ids=DISTINCT)
def test_the_noise_scale_counts_the_samples_of_all_processes(script, monkeypatch):
    """Two processes of the same gradients have minibatches twice as large: so much more noise in one sample."""
    network = torch.nn.Linear(3, 1)
    batch = (torch.randn((8, 3), generator=torch.Generator().manual_seed(0)),)

    def gradient_step(x, weights):
        network.zero_grad()
        (network(x).squeeze(1) * weights).sum().backward()

    alone, _ = script.measure_noise_scale(network, gradient_step, batch, torch.ones(8), 2, 0)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, *op: x.mul_(2))
    together, _ = script.measure_noise_scale(network, gradient_step, batch, torch.ones(8), 2, 0)
    assert alone > 0 and together == pytest.approx(2 * alone)


GRADIENTS_OF_HALVES = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
sys.path.insert(0, sys.argv[2])
from conftest import MODULES
from test_speed import fresh_network, gradients_and_logs, minibatch
script = MODULES[Path(sys.argv[1]).name]
dist.init_process_group("gloo")
*samples, _ = minibatch(script, size=32)
half = slice(16 * dist.get_rank(), 16 * dist.get_rank() + 16)
results = []
for weights in torch.load("weights.pt"):
    mb_weights = script.mean_weights(weights[half])
    gradient, logs = gradients_and_logs(script, fresh_network(script), *(x[half] for x in samples), mb_weights)
    results.append((gradient, torch.tensor(script.reduce_numbers(logs.tolist()))))
torch.save(results, f"rank{dist.get_rank()}.pt")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("script", [PQN, "ppo_abs_atari.py"])
def test_two_processes_compute_the_gradient_of_one(script, tmp_path):
    """The mean over the transitions of both, PPO's advantages normalised over both, however unevenly the reset steps fall."""
    module, weights = MODULES[script], torch.ones((5, 32))
    weights[1, [1, 20, 21, 22, 23, 24, 25, 26, 27, 28]] = 0
    weights[2, 16:] = 0  # the second process has none but reset steps
    weights[3] = 0
    weights[4] = torch.arange(32) == 3  # a single transition
    torch.save(weights, tmp_path / "weights.pt")
    (tmp_path / "halves.py").write_text(GRADIENTS_OF_HALVES)
    process = start(script, ROOT / "tests", cwd=tmp_path, command=(*TORCHRUN, str(tmp_path / "halves.py")))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    *samples, _ = minibatch(module, size=32)
    for rank in range(2):
        for (gradient, logs), of_all in zip(torch.load(tmp_path / f"rank{rank}.pt"), weights, strict=True):
            plain, plain_logs = gradients_and_logs(module, fresh_network(module), *samples, module.mean_weights(of_all))
            torch.testing.assert_close(gradient, plain, rtol=1e-3, atol=1e-5 * float(plain.abs().max()) + 1e-12)
            torch.testing.assert_close(logs, plain_logs.to(logs), rtol=1e-4, atol=1e-6)


def test_checkpoints_come_by_the_clock(run_here, monkeypatch):
    """Without --checkpoint-interval too a run saves on the way, not at its end alone."""
    clock, replace, saved = time.time, os.replace, []
    monkeypatch.setattr(time, "time", lambda: 3000 * clock())
    monkeypatch.setattr(os, "replace", lambda a, b: saved.append(Path(b).name) or replace(a, b))
    size = (
        "--num-envs 4 --num-steps 4 --no-adapt-rollout --total-timesteps 400 --eval-episodes 0 --torch-threads 1 --device cpu"
    )
    assert run_here(PQN, "--env-id", "Pong-v5", *size.split()).returncode == 0
    assert len({name for name in saved if name.startswith("checkpoint")}) > 2


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")
KEEP_PARAMETERS = """
import os, runpy, sys, torch
script, sys.argv = sys.argv[1], sys.argv[1:]
import torch.distributed as dist
rank = int(os.environ["RANK"])
# as machines of two kinds would: other first weights, other instructions, other rounding of gradients
manual_seed = torch.manual_seed
torch.manual_seed = lambda seed: manual_seed(seed + rank)
torch.cpu.get_capabilities = lambda: {"amx_bf16": rank == 1}
to_vector = torch.nn.utils.parameters_to_vector
torch.nn.utils.parameters_to_vector = lambda parameters: to_vector(parameters) * (1 + 1e-3 * rank)
destroy = dist.destroy_process_group
def keep_then_destroy():
    g = sys._getframe(1).f_globals
    kept = {k: g[k] for k in ("rollout_length", "iteration", "num_measurements", "seeds")}
    kept |= {"noise_scales": list(g["noise_scales"]), "precision": g["args"].precision}
    kept |= {"weights": g["network"].state_dict(), "random_states": [g[k].get_state() for k in ("rng", "reference_rng")]}
    torch.save(kept, f"rank{os.environ['RANK']}.pt")
    destroy()
dist.destroy_process_group = keep_then_destroy
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize("script", DISTINCT)
def test_two_processes_stay_one_policy(script, tmp_path):
    """After many adaptations both processes have the same parameters and length, but games and actions of their own."""
    (tmp_path / "keep.py").write_text(KEEP_PARAMETERS)
    command = (*TORCHRUN, str(tmp_path / "keep.py"))
    lives = ("--env-id", "Breakout-v5", "--episodic-life")  # the processes differ in their number of reset steps
    noise = () if script == "gns_batch_atari.py" else ("--log-noise-scale",)
    process = start(script, *SIZE, 1500, "--adapt-interval", 1, *lives, *noise, cwd=tmp_path, command=command)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    first, second = (load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    for name in ("weights", "rollout_length", "iteration", "num_measurements", "noise_scales", "precision"):
        assert same(first[name], second[name]), name
    assert first["precision"] == "float32"  # the second process alone would take bfloat16
    assert first["num_measurements"] > 20
    if script != "gns_batch_atari.py":  # the noise scale of so few samples asks for the shortest rollout
        assert first["rollout_length"] != 4
    assert not set(first["seeds"]) & set(second["seeds"]) and len(first["seeds"]) == 4
    for one, other in zip(first["random_states"], second["random_states"], strict=True):
        assert not torch.equal(one, other)
    (run_dir,) = tmp_path.glob("runs/*")
    scalars = assert_curves_are_whole(run_dir)
    assert [2 * m for _, m in scalars["abs/minibatch_size"]] == [b for _, b in scalars["abs/batch_size"]]  # of both together
    assert same(load(run_dir / "model.pt")["weights"], first["weights"])
    checkpoint = load(checkpoints(run_dir)[-1])
    assert len(checkpoint["random_states"]) == 2
    steps = {int(state["step"]) for state in checkpoint["optimizer"]["state"].values()}
    assert steps == {2 * MODULES[script].Args.update_epochs * first["iteration"]}  # two minibatches, as one process has
    assert output.count("trained") == 1 and "2 processes" in output
    again = start(script, "--resume", run_dir, cwd=tmp_path, command=command)
    assert again.communicate(timeout=120)[0].count("is finished") == 1


OTHER_REWARDS = """
import os, runpy, sys
import envpool, numpy as np
reward, sys.argv = float(sys.argv[1]), sys.argv[2:]
make = envpool.make
def make_other(*arguments, **options):
    pool = make(*arguments, **options)
    recv = pool.recv
    def receive(**how):
        result = recv(**how)
        return result if how else (result[0], np.full_like(result[1], reward), *result[2:])
    if os.environ["RANK"] == "1":
        pool.recv = receive
    return pool
envpool.make = make_other
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script, loss", [(PQN, "td_loss"), ("ppo_abs_atari.py", "value_loss")])
def test_losses_are_those_of_all_processes(script, loss, tmp_path):
    """The curve is the mean; where one process has a loss that is not finite, all stop, and the first one notes it."""
    (tmp_path / "rewards.py").write_text(OTHER_REWARDS)
    command = (*TORCHRUN, str(tmp_path / "rewards.py"))
    once = ("--no-adapt-rollout", "--num-steps", 4, "--num-minibatches", 1, "--update-epochs", 1)
    process = start(script, *SIZE, 32, *once, cwd=tmp_path, command=(*command, "1000"))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    (run_dir,) = tmp_path.glob("runs/*")
    ((_, value),) = curves(run_dir)[f"losses/{loss}"]
    assert value > 1e4  # the rewards of the first process are 0 or 1 here, so its own loss is small
    shutil.rmtree(run_dir)
    process = start(script, *SIZE, 10**6, *once, cwd=tmp_path, command=(*command, "nan"))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "error: the loss is no longer finite at step 32;" in errors
    (run_dir,) = tmp_path.glob("runs/*")
    assert json.loads((run_dir / "diverged.json").read_text()) == {"global_step": 32}


SECOND_ELSEWHERE = """
import os, runpy, sys
if os.environ["RANK"] == "1":
    os.makedirs("elsewhere", exist_ok=True)
    os.chdir("elsewhere")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pqn_only
def test_processes_that_see_other_folders(stopped, tmp_path):
    """Where one process finds a checkpoint and another none, the run does not go on with two policies."""
    (tmp_path / "elsewhere.py").write_text(SECOND_ELSEWHERE)
    command = (*TORCHRUN, str(tmp_path / "elsewhere.py"))
    arguments = (*SIZE, 10**6, "--checkpoint-interval", 100, "--auto-resume")
    process = start(PQN, *arguments, cwd=tmp_path, command=command)
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint_*.pt")), process)
    process.terminate()
    process.communicate(timeout=60)
    process = start(PQN, *arguments, cwd=tmp_path, command=command)
    output, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "error: the processes found different checkpoints; runs/ must be" in errors
    assert len(list(tmp_path.glob("runs/*"))) == 1 and not list(tmp_path.glob("elsewhere/runs/*"))


def test_a_lost_process_ends_the_others(tmp_path):
    """kill -9 of one process ends the run with an error within a minute; it does not hang."""
    process = start(PQN, *SIZE, 10**6, cwd=tmp_path, command=TORCHRUN)
    wait_for(lambda: list(tmp_path.glob("runs/*/args.json")), process)
    time.sleep(2)
    os.kill(children_of(process)[-1], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode not in (0, None)


def test_sigterm_through_torchrun(tmp_path):
    """SIGTERM to torchrun saves one checkpoint of all processes, from which as many go on."""
    process = start(PQN, *SIZE, 10**6, cwd=tmp_path, command=TORCHRUN)
    wait_for(lambda: list(tmp_path.glob("runs/*/args.json")), process)
    time.sleep(2)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    (run_dir,) = tmp_path.glob("runs/*")
    (path,) = checkpoints(run_dir)
    assert process.returncode != 0 and f"to continue: torchrun ... {ROOT / PQN} --resume runs/{run_dir.name}" in output
    step, points = load(path)["global_step"], len(curves(run_dir)["abs/batch_size"])
    again = start(PQN, "--resume", run_dir, cwd=tmp_path, command=TORCHRUN)
    wait_for(lambda: len(curves(run_dir)["abs/batch_size"]) > points, again)
    again.terminate()
    output, _ = again.communicate(timeout=60)
    checkpoint = load(checkpoints(run_dir)[-1])
    assert f"continuing at step {step:,}" in output and checkpoint["global_step"] > step
    for one, other in zip(*checkpoint["random_states"], strict=True):
        assert not torch.equal(one, other)
    assert_curves_are_whole(run_dir)


SLOW_TO_SAVE = """
import os, runpy, sys, time
import torch.distributed as dist
gather, replace = dist.all_gather_object, os.replace
dist.all_gather_object = lambda *a: (time.sleep(2.5), gather(*a))
os.replace = lambda *a: (time.sleep(4), replace(*a))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_first_process_has_time_to_save(tmp_path):
    """SIGTERM to one process: the others wait until the first has saved, since torchrun stops all as soon as one has ended."""
    (tmp_path / "slow.py").write_text(SLOW_TO_SAVE)
    process = start(PQN, *SIZE, 10**6, cwd=tmp_path, command=(*TORCHRUN, str(tmp_path / "slow.py")))
    wait_for(lambda: list(tmp_path.glob("runs/*/events*")), process)
    time.sleep(2)
    os.kill(children_of(process)[0], signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    (run_dir,) = tmp_path.glob("runs/*")
    assert "stopped by a signal" in output and len(checkpoints(run_dir)) == 1


def test_processes_must_share_evenly(tmp_path, run_here, monkeypatch):
    """Environments that do not divide into the processes are refused in one line."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    result = run_here(PQN, "--num-envs", 128)
    assert result.returncode == 2 and "use a multiple of 3" in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_run_is_known_by_its_arguments_from_the_start(run_here, monkeypatch, tmp_path):
    """args.json is there before curves or Weights & Biases, which take a while: --auto-resume elsewhere looks for it."""
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", lambda *arguments, **options: sys.exit("stopped"))
    run_here(PQN, *SIZE, 1500)
    (run_dir,) = tmp_path.glob("runs/*")
    assert json.loads((run_dir / "args.json").read_text())["total_timesteps"] == 1500


def test_advantages_are_normalised_over_all_processes(monkeypatch, capsys):
    """So one sample of a minibatch for each of two processes is enough; for a single process it is not."""
    ppo = MODULES["ppo_abs_atari.py"]
    args = ppo.Args(num_envs=4, adapt_rollout=False, num_steps=4, num_minibatches=8, device="cpu")
    monkeypatch.setattr(ppo, "WORLD_SIZE", 2)
    ppo.check_args(args)
    monkeypatch.setattr(ppo, "WORLD_SIZE", 1)
    args.num_minibatches = 16
    with pytest.raises(SystemExit):
        ppo.check_args(args)
    assert "--norm-adv needs minibatches of 2 samples" in capsys.readouterr().err


LEARN_LAMPS = """
import os, runpy, sys
sys.path.insert(0, sys.argv.pop(1))
import envpool
from test_learning import Lamps
envpool.make = lambda *arguments, num_envs, **options: Lamps(num_envs, seed=int(os.environ.get("RANK", 0)))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script", [PQN, "ppo_abs_atari.py"])
def test_two_processes_learn_like_one(script, tmp_path):
    """The same number of environments, split over two processes, learns the made-up game of test_learning.py as one does."""
    (tmp_path / "learn.py").write_text(LEARN_LAMPS)
    exploration = EXPLORATION if script == PQN else ()
    command = (*TORCHRUN, str(tmp_path / "learn.py"), str(ROOT / "tests"))
    process = start(script, *LAMPS, *exploration, cwd=tmp_path, command=command)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    (run_dir,) = tmp_path.glob("runs/*")
    scores = [score for _, score in curves(run_dir)["charts/episodic_return"]]
    assert sum(scores[-50:]) / 50 > 6  # one process: test_lamps_are_learned
