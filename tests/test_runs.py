"""Long runs: stopped anywhere, a run goes on as if it had not been, and says what it did."""

import itertools
import json
import multiprocessing
import os
import pty
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import termios
import time
import types
from pathlib import Path

import envpool
import filelock
import numpy as np
import pytest
import torch
from conftest import DISTINCT, MODULES, ROOT, SCRIPTS, go
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as PluginEventAccumulator
from tensorboard.util import tensor_util
from torch.utils._pytree import tree_flatten
from torch.utils.tensorboard import SummaryWriter

PQN, PPO, GNS = DISTINCT
SIZE = (
    "--env-id Pong-v5 --num-envs 4 --rollout-length-min 4 --rollout-length-max 8 --num-minibatches 2 --adapt-interval 2 "
    "--adapt-signal time --rollout-smoothing 0.4 --max-episode-steps 24 --eval-episodes 2 --torch-threads 1 --env-threads 1 "
    "--device cpu --update-epochs 1 --total-timesteps 200"
).split()
SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")


def start(*command, cwd):
    """Starts a Python command in a process of its own."""
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *map(str, command)]
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process):
    """Waits until something is so while the process runs."""
    end = time.time() + 120
    while not condition():
        if process.poll() is not None or time.time() > end:
            process.kill()
            pytest.fail(f"waited in vain: {process.communicate()}")
        time.sleep(0.05)


def load(path):
    return torch.load(path, weights_only=True)


def curves(run_dir, whole=True):
    """Every scalar as (step, value), the same in both of TensorBoard's loaders; whole: without gaps and doubles."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    events = PluginEventAccumulator(str(run_dir), size_guidance={"tensors": 0}).Reload()  # tensorboard --load_fast=false
    for tag, points in scalars.items():
        assert [(e.step, float(tensor_util.make_ndarray(e.tensor_proto))) for e in events.Tensors(tag)] == points, tag
    if whole:
        batches = scalars["abs/batch_size"]
        assert [step for step, _ in batches] == list(itertools.accumulate(int(b) for _, b in batches))
        for tag in "abs/rollout_length charts/SPS charts/learning_rate losses/grad_norm time/learning".split():
            assert [step for step, _ in scalars[tag]] == [step for step, _ in batches], tag
        assert all(len(points) == 1 for tag, points in scalars.items() if tag.startswith("eval/"))
    return scalars


def last_step(run_dir):
    events = EventAccumulator(str(run_dir)).Reload()  # one loader, as the run may go on meanwhile
    return events.Scalars("abs/batch_size")[-1].step if "abs/batch_size" in events.Tags()["scalars"] else 0


def same(a, b):
    """Equality of nested dicts, lists and tensors."""
    (xs, one), (ys, other) = tree_flatten(a), tree_flatten(b)
    return one == other and all(torch.equal(x, y) if hasattr(x, "shape") else x == y for x, y in zip(xs, ys, strict=True))


@pytest.fixture(autouse=True)
def signals_arrive():
    """Though the tests themselves may run under nohup or in the background."""
    handlers = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def at_step(monkeypatch):
    """at_step(n, action) calls the action when the points of the first iteration that ends at step n or later are logged."""

    def at_step(n, action):
        add_scalar, called = SummaryWriter.add_scalar, []

        def add_scalar_and_act(writer, tag, value, step):
            if tag == "charts/SPS" and step >= n and not called:
                called.append(step)
                action()
            add_scalar(writer, tag, value, step)

        monkeypatch.setattr(SummaryWriter, "add_scalar", add_scalar_and_act)

    return at_step


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """finished(script) is the folder of a run that came to its end and kept its checkpoints on the way; to be copied."""
    folders = {}

    def finished(script):
        if script not in folders:
            folders[script] = tmp_path_factory.mktemp("finished") / "run"
            keep = ("--checkpoint-interval", 60, "--keep-checkpoints", "--run-dir", "run")
            assert go(folders[script].parent, script, *SIZE, *keep)[::2] == (0, "")
        return folders[script]

    return finished


@pytest.fixture
def copy(finished, tmp_path):
    """copy(script) is a copy of that run at tmp_path/run, without the checkpoints on the way."""
    return lambda script: shutil.copytree(finished(script), tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint_*"))


def kept(run_dir):
    """The checkpoints on the way, by their steps."""
    return {int(path.stem.split("_")[1]): path for path in run_dir.glob("checkpoint_*.pt")}


@pytest.mark.parametrize("script", DISTINCT)
def test_files(script, finished):
    """Everything that says what ran and what was evaluated, and nothing half-written."""
    run_dir, scalars = finished(script), curves(finished(script))
    args, evaluation = (json.loads((run_dir / f"{name}.json").read_text()) for name in ("args", "eval"))
    computed_with = args.pop("computed_with")
    assert args == load(run_dir / "checkpoint.pt")["args"] and args["precision"] == "auto" and args["total_timesteps"] == 200
    assert computed_with["torch"] == torch.__version__ and computed_with["script"] == script
    assert {"envpool", "numpy", "python", "processor", "device", "processes"} <= set(computed_with)
    assert (run_dir / script).read_bytes() == (ROOT / script).read_bytes()
    last, steps = scalars["abs/batch_size"][-1][0], sorted(kept(run_dir))
    assert steps[-1] == last and len(steps) > 2 and all(60 <= b - a < 92 for a, b in itertools.pairwise([0, *steps[:-1]]))
    assert all(load(path)["global_step"] == step for step, path in kept(run_dir).items())
    names = {path.name for path in run_dir.iterdir() if not path.name.startswith("events.")} - {".lock"}
    assert names == {"args.json", "checkpoint.pt", "eval.json", script, *(path.name for path in kept(run_dir).values())}
    settings = {"sticky_action_probability": 0.0, "max_episode_steps": 24, "episodes": 2, "time_limits": 2, "seed": 1}
    settings |= {"global_step": last, "precision": computed_with["precision"], "lengths": [24, 24]}
    settings |= {"greedy": False} if script == PPO else {"epsilon": 0.0}
    assert settings.items() <= evaluation.items() and evaluation["distinct_games"] == len(set(evaluation["returns"]))
    assert scalars["eval/mean"] == [(last + 1, evaluation["mean"])]


@pytest.mark.parametrize("number", SIGNALS)
def test_stopped_and_continued(number, tmp_path, at_step, monkeypatch):
    """A signal ends the iteration: exit code, checkpoint, and a line on how to go on; --run-dir alone goes on to the end."""
    at_step(80, lambda: [signal.raise_signal(number) for _ in range(2)])  # as from a terminal and from torchrun
    stopped = go(tmp_path, PQN, *SIZE, "--seed", 3)
    (run_dir,) = (tmp_path / "runs").iterdir()
    checkpoint, before = load(run_dir / "checkpoint.pt"), curves(run_dir)
    step = checkpoint["global_step"]
    assert stopped.code == 128 + number and not stopped.err and 80 < step == last_step(run_dir) < 140
    assert stopped.out.splitlines()[-1] == f"stopped at step {step}; {ROOT / PQN} --run-dir runs/{run_dir.name} continues"
    make, asked = envpool.make, []
    monkeypatch.setattr(envpool, "make", lambda *a, **k: asked.append(k["env_seed"]) or make(*a, **k))
    continued = go(tmp_path, PQN, "--run-dir", f"runs/{run_dir.name}")
    assert asked[0] == MODULES[PQN].env_seeds(3, 4, start=step) != MODULES[PQN].env_seeds(3, 4)  # not the same games again
    assert continued.code == 0 and not continued.err and f"from step {step}:" in continued.out and "score" in continued.out
    after = curves(run_dir)
    assert all(after[tag][: len(points)] == points for tag, points in before.items())
    assert last_step(run_dir) == load(run_dir / "checkpoint.pt")["global_step"] > 160
    assert after["abs/rollout_length"][len(before["abs/batch_size"])][1] == round(checkpoint["rollout_length"]) > 4
    assert json.loads((run_dir / "args.json").read_text())["seed"] == 3 and list((tmp_path / "runs").iterdir()) == [run_dir]


def test_signals_that_do_not_end_the_iteration(tmp_path, at_step, monkeypatch):
    """A hangup under nohup ends nothing; a second signal, two seconds later or more, ends all at once."""
    clock = time.time

    def twice():
        signal.raise_signal(signal.SIGTERM)
        monkeypatch.setattr(time, "time", lambda: clock() + 2.1)
        signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_step(40, lambda: signal.raise_signal(signal.SIGHUP))
    at_step(100, twice)
    result = go(tmp_path, PQN, *SIZE, "--run-dir", "run")
    assert result.code == 130 and last_step(tmp_path / "run") > 80 and not (tmp_path / "run/checkpoint.pt").exists()


def test_the_terminal_is_gone(tmp_path):
    """A lost ssh connection: SIGHUP, and nothing can be printed any more."""
    pid, terminal = pty.fork()
    if pid == 0:
        words = [*SIZE, "--total-timesteps", "1e6", "--run-dir", str(tmp_path / "run")]
        os.execve(sys.executable, [sys.executable, str(ROOT / PQN), *words], os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    termios.tcsetwinsize(terminal, (24, 120))
    while b"divergence=0" not in os.read(terminal, 9999):
        pass
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    assert load(tmp_path / "run/checkpoint.pt")["global_step"] == last_step(tmp_path / "run") > 0


@pytest.mark.parametrize("script", DISTINCT)
def test_nothing_but_the_games_differs(script, copy, tmp_path):
    """A finished run ends soon, and saves what it loaded: weights, optimizer, counters, window, the float length, curves."""
    run_dir = copy(script)
    old, before = load(run_dir / "checkpoint.pt") | {"rollout_length": 7.3, "recent_returns": [1.5, -2.0]}, curves(run_dir)
    torch.save(old, run_dir / "checkpoint.pt")
    result = go(tmp_path, script, "--run-dir", run_dir)
    assert result.code == 0 and not result.err and "score" not in result.out and "is finished" in result.out
    new = load(run_dir / "checkpoint.pt")
    assert new["args"].pop("run_dir") and old["args"].pop("run_dir") and same(old, new) and curves(run_dir) == before
    assert old["iteration"] > 5 and len(old["divergences"]) > 2 and len(old["lengths"]) > 2 and old["optimizer"]["state"]
    assert script != GNS or len(old["noise_scales"]) > 2


@pytest.mark.parametrize("script, crash", [*itertools.product(DISTINCT, ["after a checkpoint"]), (PQN, "before the first")])
def test_after_a_crash(script, crash, finished, copy, tmp_path):
    """What the curves have beyond the checkpoint, with half a record at their end, is drawn anew, once."""
    first, run_dir = min(kept(finished(script))), copy(script)
    (events,) = run_dir.glob("events.*")
    events.write_bytes(events.read_bytes()[:-5])
    (run_dir / "eval.json").unlink()
    (run_dir / "checkpoint.pt").unlink()
    if crash == "after a checkpoint":
        shutil.copy(kept(finished(script))[first], run_dir / "checkpoint.pt")
    assert last_step(run_dir) > first + 60
    result = go(tmp_path, script, *SIZE, "--run-dir", run_dir)
    assert result.code == 0 and not result.err, result.err
    assert f"from step {first if crash == 'after a checkpoint' else 0}:" in result.out and curves(run_dir)["eval/mean"]


MAY_DIFFER = set(
    "torch_deterministic device torch_threads compile track wandb_project_name wandb_entity run_dir checkpoint_interval "
    "keep_checkpoints env_threads eval_episodes eval_epsilon eval_greedy capture_video video_episodes".split()
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_arguments_that_may_differ(script, tmp_path, monkeypatch, capsys):
    """Each argument that would change the result is refused and named; where and how it runs is not asked."""
    module = MODULES[script]
    args = vars(module.Args(num_envs=256, total_timesteps=10**5))
    others = {"env_id": "Qbert-v5", "schedule": "exp", "adapt_signal": "time", "device": "cpu", "precision": "float32"}
    others |= {"noise_scale_groups": "environments", "run_dir": tmp_path, "total_timesteps": 10**6}
    others |= {"sticky_action_probability": 1, "rollout_length_max": 200, "eval_epsilon": 0.5}
    torch.save({"args": args, "network": {}, "optimizer": {}, "lengths": [], "global_step": 0}, tmp_path / "checkpoint.pt")
    for name, value in args.items():
        option = f"--{name.replace('_', '-')}"
        words = [option, others.get(name, value / 2 if isinstance(value, float) and value else 3)]
        if isinstance(value, bool):
            words = [option.replace("--", "--no-" if value else "--", 1)]
        monkeypatch.setattr(sys, "argv", ["script", "--run-dir", str(tmp_path), *map(str, words)])
        if name in MAY_DIFFER:
            assert module.parse_args()[2]["args"] == args, name
        elif name not in ("init_from", "replay"):  # which would have to be there
            with pytest.raises(SystemExit, match="2"):
                module.parse_args()
            message = capsys.readouterr().err
            assert f"{option} (was {value})" in message and message.count("(was") == 1, message


@pytest.mark.parametrize("script, words", [(PQN, "--eval-epsilon 0.5"), (PQN, "--eval-episodes 3"), (PPO, "--eval-greedy")])
def test_evaluated_anew(script, words, copy, tmp_path):
    """A finished run is, where other settings of evaluation are given, and only once."""
    run_dir = copy(script)
    before = curves(run_dir)
    result = go(tmp_path, script, "--run-dir", run_dir, *words.split())
    new, after = json.loads((run_dir / "eval.json").read_text()), curves(run_dir)
    changed = {"--eval-epsilon 0.5": {"epsilon": 0.5}, "--eval-episodes 3": {"episodes": 3}, "--eval-greedy": {"greedy": True}}
    assert result.code == 0 and "score" in result.out and changed[words].items() <= new.items()
    assert after == before | {tag: [(last_step(run_dir) + 1, pytest.approx(new[tag[5:]]))] for tag in after if "eval/" in tag}
    assert "score" not in go(tmp_path, script, "--run-dir", run_dir).out and curves(run_dir) == after


@pytest.mark.parametrize("script", [PQN, PPO])
def test_init_from(script, finished, tmp_path):
    """A new run, steps and schedules its own, with the network, the optimizer and, unless given, the game of another."""
    parent = finished(script) / "checkpoint.pt"
    words = [*SIZE[2:], "--total-timesteps", 32, "--learning-rate", "1e-6", "--eval-episodes", 0, "--run-dir", "new"]
    result = go(tmp_path, script, "--init-from", parent, *words)
    assert result.code == 0 and not result.err and "Pong-v5 on cpu" in result.out, result.err
    old, new = load(parent), load(tmp_path / "new/checkpoint.pt")
    assert curves(tmp_path / "new")["charts/learning_rate"][0] == (16, pytest.approx(1e-6))
    assert (new["args"]["env_id"], new["lengths"], new["global_step"]) == ("Pong-v5", [(0, 4)], 32)
    for name, weights in old["network"].items():
        assert torch.allclose(new["network"][name], weights, atol=1e-4) and not torch.equal(new["network"][name], weights)
    assert new["optimizer"]["state"][0]["step"] == old["optimizer"]["state"][0]["step"] + 4
    for other, game in ((script, "Breakout-v5"), (SCRIPTS[1], "Pong-v5")):
        refused(go(tmp_path, other, "--init-from", parent, *words[:-1], "other", "--env-id", game), "another network")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_only_evaluate(finished, copy, tmp_path):
    """--total-timesteps 0: in a folder of its own under its own settings, as the checkpoint of the step that it was at."""
    parent, step = copy(PQN), min(kept(finished(PQN)))
    shutil.copy(kept(finished(PQN))[step], parent / "checkpoint.pt")
    before = (parent / "eval.json").read_text()
    words = "--total-timesteps 0 --sticky-action-probability 0.25 --max-episode-steps 11 --eval-episodes 3".split()
    command = ("--init-from", parent / "checkpoint.pt", "--run-dir", "other", "--device", "cpu", *words)
    result = go(tmp_path, PQN, *command)
    evaluation = json.loads((tmp_path / "other/eval.json").read_text())
    settings = {"sticky_action_probability": 0.25, "max_episode_steps": 11, "global_step": step, "env_id": "Pong-v5"}
    assert result.code == 0 and settings.items() <= evaluation.items() and evaluation["lengths"] == [11] * 3
    assert f"3 games, {evaluation['distinct_games']} distinct, 3 cut by time limit: other/eval" in result.out
    shutil.copy(finished(PQN) / "checkpoint.pt", parent / "checkpoint.pt")  # the parent has gone on since
    again = go(tmp_path, PQN, *command)
    assert again.code == 0 and "score" not in again.out and (parent / "eval.json").read_text() == before
    assert json.loads((tmp_path / "other/eval.json").read_text()) == evaluation
    shutil.rmtree(parent)
    assert go(tmp_path, PQN, *command).code == 0  # which needs it no more


def refused(result, words):
    assert result.code == 2 and len(result.err.splitlines()) == 1 and not result.out
    assert re.fullmatch(f"error: .*{words}.*\n", result.err), result.err


def test_folders_that_cannot_be_used(copy, tmp_path, monkeypatch):
    """Of another process or script, not to be written, no folder at all: one line, and what is there stays."""
    run_dir = copy(PQN)
    before = {path: path.stat().st_mtime_ns for path in run_dir.iterdir() if path.name != ".lock"}
    with filelock.FileLock(run_dir / ".lock"):
        refused(go(tmp_path, PQN, "--run-dir", run_dir), "in use by another process")
    for script, message in ((PPO, "of another script"), (GNS, "of another script"), (SCRIPTS[1], "another network")):
        refused(go(tmp_path, script, "--run-dir", run_dir), message)
    real = filelock.UnixFileLock  # and while this one waits for the folder another process trains in it
    monkeypatch.setattr(filelock, "UnixFileLock", lambda path: (path.with_name("checkpoint.pt").touch(), real(path))[1])
    refused(go(tmp_path, PQN, *SIZE, "--run-dir", "other"), "another process has just trained")
    monkeypatch.undo()
    for place in ("/proc/run", run_dir / "args.json", run_dir / "args.json/run"):
        refused(go(tmp_path, PQN, *SIZE, "--run-dir", place), "cannot use")
    assert before == {path: path.stat().st_mtime_ns for path in run_dir.iterdir() if path.name != ".lock"}


@pytest.mark.parametrize("option", ["--run-dir", "--init-from", "--replay"])
def test_what_is_no_checkpoint(option, finished, tmp_path):
    """Is named in one line, and nothing is written beside it."""
    path = tmp_path / "checkpoint.pt"
    path.write_bytes((finished(PQN) / path.name).read_bytes()[:99999])
    words = ["--run-dir", tmp_path] if option == "--run-dir" else [option, path, "--adapt-signal", "replay", "--replay", path]
    refused(go(tmp_path, PQN, *words), f"cannot use {path} as a checkpoint")
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def file_size_limit():
    """limit(bytes): no file of this process can grow beyond, as on a full disk; limit() lifts it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size=soft: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk(tmp_path, file_size_limit):
    """Costs checkpoints, each with a warning, not the run, and leaves no half of one."""
    file_size_limit(2**20)
    result = go(tmp_path, PQN, *SIZE, "--checkpoint-interval", 100, "--run-dir", "run")
    assert result.code == 0 and len(result.err.splitlines()) == 2, result.err  # one on the way, one at the end
    assert all(re.match(r"warning: no checkpoint at step \d+ \(.*too large", line) for line in result.err.splitlines())
    assert not list(tmp_path.glob("run/*checkpoint*")) and curves(tmp_path / "run")["eval/mean"]


def die_in(function, script, path):
    """kill -9 when the file is written and not yet on the disk, or on the disk and not yet in its place."""
    setattr(os, function, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    MODULES[script].write_file(path, b"new" * 10**6)


@pytest.mark.parametrize("script, function", [*itertools.product(DISTINCT, ["fsync", "replace"])])
def test_killed_inside_a_checkpoint(script, function, tmp_path):
    """The old one is whole, and the next one takes the place of what was left beside it."""
    path = tmp_path / "checkpoint.pt"
    MODULES[script].write_file(path, b"old")
    child = multiprocessing.get_context("fork").Process(target=die_in, args=(function, script, path))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL and path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2
    MODULES[script].write_file(path, b"next")
    assert path.read_bytes() == b"next" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("repeat", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 21))])
def test_killed_at_any_moment(repeat, tmp_path):
    """kill -9 leaves a run that goes on from its last checkpoint."""
    moment, run_dir = random.SystemRandom().uniform(0, 3), tmp_path / "run"
    size = [*SIZE, "--total-timesteps", 10**6, "--checkpoint-interval", 16]  # saves nearly all the time
    process = start(ROOT / PQN, *size, "--run-dir", run_dir, cwd=tmp_path)
    wait_for((run_dir / "checkpoint.pt").exists, process)
    time.sleep(moment)
    assert process.poll() is None
    process.kill()
    process.communicate()
    time.sleep(1)  # as TensorBoard sorts its files by the second in which they begin
    checkpoint = load(run_dir / "checkpoint.pt")
    step = checkpoint["global_step"]
    torch.save(checkpoint | {"args": checkpoint["args"] | {"total_timesteps": step + 60}}, run_dir / "checkpoint.pt")
    result = go(tmp_path, PQN, "--run-dir", run_dir)
    assert result.code == 0 and not result.err and f"from step {step:,}:" in result.out, (moment, result.err)
    assert curves(run_dir) and last_step(run_dir) > step, moment


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in that knows what its one run was sent, and goes on there."""

    def init(**options):
        module.inits.append(options)
        module.run = types.SimpleNamespace(id="its-id", step=max((step + 1 for step, _ in module.sent), default=0))

    def log(scalars, step):
        assert step >= module.run.step
        module.run.step = step
        module.sent.extend((step, name) for name in scalars if "episodic" not in name)  # games end together

    module = types.ModuleType("wandb")
    module.init, module.log, module.inits, module.sent = init, log, [], []
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb(wandb, tmp_path, at_step):
    """A run of any name is one run there too: continued after kill -9, it is sent no step twice; a second process none."""
    words = ("--track", "--exp-name", "abs:min16", "--checkpoint-interval", 70, "--wandb-entity", "team")
    at_step(150, lambda: sys.exit("killed"))
    assert go(tmp_path, PQN, *SIZE, *words).code == "killed"
    (run_dir,) = (tmp_path / "runs").iterdir()
    expected = {"name": run_dir.name, "id": None, "entity": "team", "project": "adaptive-batch-scaling"}
    assert expected.items() <= wandb.inits[0].items() and wandb.inits[0]["config"]["num_envs"] == 4
    with filelock.FileLock(run_dir / ".lock"):
        refused(go(tmp_path, PQN, "--run-dir", run_dir), "in use by another process")
    assert len(wandb.inits) == 1 and wandb.sent[-1][0] > load(run_dir / "checkpoint.pt")["global_step"] + 50
    assert go(tmp_path, PQN, "--run-dir", run_dir).code == 0 and wandb.inits[1]["id"] == "its-id"
    assert len(wandb.sent) == len(set(wandb.sent)) and [s for s, _ in wandb.sent] == sorted(s for s, _ in wandb.sent)
    for tag in ("abs/batch_size", "eval/mean"):
        assert [step for step, name in wandb.sent if name == tag] == [step for step, _ in curves(run_dir)[tag]]
    assert go(tmp_path, PQN, "--run-dir", run_dir, "--no-track").code == 0
    assert load(run_dir / "checkpoint.pt")["wandb_id"] == "its-id"


@pytest.mark.parametrize("fault", ["missing", "not logged in"])
def test_wandb_that_cannot_be_used(fault, wandb, copy, tmp_path, monkeypatch):
    """One line that says what to do, no new run folder, and an old one stays."""

    def init(**options):
        raise RuntimeError("api_key not configured (no-tty).\nCall wandb.login() with your API key")

    monkeypatch.setitem(sys.modules, "wandb", None if fault == "missing" else wandb)
    wandb.init = init
    refused(go(tmp_path, PQN, *SIZE, "--track"), "pip install wandb")
    assert not list(tmp_path.glob("runs/*"))
    refused(go(tmp_path, PQN, "--run-dir", copy(PQN), "--track"), "pip install wandb")
    assert (tmp_path / "run/checkpoint.pt").exists()


ONE_UPDATE = (
    "--env-id Pong-v5 --num-envs 8 --no-adapt-rollout --num-steps 16 --num-minibatches 1 --update-epochs 1 --adapt-interval 1 "
    "--total-timesteps 128 --max-grad-norm 1e9 --eval-episodes 0 --torch-threads 1 --env-threads 1 --device cpu"
).split()


class MadeUpEnvs:
    """Stands in for EnvPool: what a game shows follows from its seed alone, and games end early, some nearly always."""

    def __init__(self, env_seed):
        self.action_space = types.SimpleNamespace(n=6)
        self.rngs = [np.random.default_rng(seed) for seed in env_seed]
        self.chances, self.dones = np.array([rng.random() for rng in self.rngs]), np.zeros(len(env_seed), dtype=bool)

    def reset(self):
        return np.stack([rng.integers(256, size=(4, 84, 84), dtype=np.uint8) for rng in self.rngs]), {}

    def send(self, actions, env_ids=None):
        pass

    def recv(self):
        rewards, chances = np.array([rng.random(2) for rng in self.rngs]).T
        rewards = np.where(self.dones, 0, 3 * rewards).astype(np.float32)
        self.dones = ~self.dones & (chances < self.chances)
        info = {"env_id": np.arange(len(rewards)), "reward": rewards, "terminated": self.dones, "elapsed_step": 0 * rewards}
        return self.reset()[0], rewards, self.dones, np.zeros_like(self.dones), info


def update_once(script, *words):
    """One update on made-up games, in which no random number decides an action."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(envpool, "make", lambda *_, env_seed, **options: MadeUpEnvs(env_seed))
        patch.setattr(torch.Tensor, "exponential_", lambda self, generator=None: self.fill_(1))  # PPO's likeliest action
        greedy = () if script == PPO else ("--start-e", 0, "--end-e", 0)
        assert go(Path.cwd(), script, *ONE_UPDATE, *greedy, *words)[::2] == (0, "")


AS_ONE_OF_TWO = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch, test_runs
import torch.distributed as dist
rank, manual_seed = int(os.environ["RANK"]), torch.manual_seed
torch.manual_seed = lambda seed: manual_seed(seed + rank)  # as machines that differ in the last bits of the first weights
torch.cpu.get_capabilities = lambda: {"amx_bf16": rank == 1}  # and in what they would compute with
def keep():  # instead of destroying the process group, which the second script needs
    run = sys._getframe(1).f_globals
    kept = {"precision": run["precision"], "seeds": run["seeds"], "network": run["network"].state_dict()}
    torch.save(kept, f"{test_runs.script}-{rank}.pt")
dist.destroy_process_group = keep
for test_runs.script in (test_runs.PQN, test_runs.PPO):
    test_runs.update_once(test_runs.script, "--run-dir", f"two-{test_runs.script}")
    dist.init_process_group = lambda *_: None
"""


def test_two_processes_compute_what_one_computes(tmp_path, monkeypatch):
    """Gradient, losses and PPO's advantages are those of the minibatch of both, however unevenly its transitions fall."""
    (tmp_path / "two.py").write_text(AS_ONE_OF_TWO)
    process = start(*TORCHRUN, tmp_path / "two.py", ROOT / "tests", cwd=tmp_path)
    monkeypatch.chdir(tmp_path)
    for script in (PQN, PPO):
        update_once(script, "--precision", "float32", "--run-dir", f"one-{script}")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    for script in (PQN, PPO):
        one, two = (load(tmp_path / f"{how}-{script}/checkpoint.pt") for how in ("one", "two"))
        for i, state in one["optimizer"]["state"].items():
            gradient, other = state["exp_avg"], two["optimizer"]["state"][i]["exp_avg"]
            torch.testing.assert_close(other, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
        scalars, others = (curves(tmp_path / f"{how}-{script}") for how in ("one", "two"))
        for tag in scalars:
            if tag.startswith("losses/") and "explained" not in tag:  # which the first process takes from its own part
                assert others[tag] == [(128, pytest.approx(scalars[tag][0][1], rel=1e-3, abs=1e-6))], tag
        first, second = (load(tmp_path / f"{script}-{rank}.pt") for rank in range(2))
        assert same(first["network"], second["network"]) and same(first["network"], two["network"])
        assert first["precision"] == second["precision"] == "float32"  # the second alone would take bfloat16
        assert first["seeds"] + second["seeds"] == MODULES[script].env_seeds(1, 8)


def test_torchrun_stopped_and_continued(tmp_path):
    """SIGTERM and SIGHUP to torchrun save a checkpoint, and the run goes on from it."""
    run_dir, step = tmp_path / "run", 0
    for number, words in ((signal.SIGTERM, [*SIZE, "--total-timesteps", 10**6]), (signal.SIGHUP, [])):
        process = start(*TORCHRUN, ROOT / PQN, *words, "--run-dir", run_dir, cwd=tmp_path)
        wait_for(lambda old=step: list(run_dir.glob("events.*")) and last_step(run_dir) > old, process)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode and "2 processes" in output and f"from step {step:,}:" in output
        old, step = step, load(run_dir / "checkpoint.pt")["global_step"]
        assert f"stopped at step {step:,};" in output and curves(run_dir)["abs/batch_size"][-1][0] == step > old


FAILS_AT_START = """
import os, pathlib, runpy, sys, time
import torch.distributed as dist
if os.environ["RANK"] == "1":
    dist.init_process_group = lambda *_: (time.sleep(3), pathlib.Path("failed").touch(), sys.exit(3))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_process_that_fails_at_start(tmp_path):
    """The other, which waits for it, ends within seconds; torchrun would kill it half a minute later."""
    (tmp_path / "fails.py").write_text(FAILS_AT_START)
    process = start(*TORCHRUN, tmp_path / "fails.py", ROOT / PQN, *SIZE, cwd=tmp_path)
    process.communicate(timeout=120)
    assert process.returncode and time.time() - (tmp_path / "failed").stat().st_mtime < 20 and not (tmp_path / "runs").exists()
