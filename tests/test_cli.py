"""The command line: bad input ends in one helpful line before anything is written, every flag is documented."""

import ast
import importlib.machinery
import importlib.util
import json
import math
import re
import time
import tomllib
from pathlib import Path

import pytest
import torch
from conftest import DISTINCT, MODULES, ROOT, SCRIPTS, run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

scripts = pytest.mark.parametrize("script", SCRIPTS)
distinct_scripts = pytest.mark.parametrize("script", DISTINCT)

BAD_ARGUMENTS = [
    # unknown games name the nearest ones, what is no game says so
    ("--env-id Breakot-v5", "Breakout-v5"),
    ("--env-id breakout-v5", "Breakout-v5"),
    ("--env-id Breakout-v4", "Breakout-v5"),
    ("--env-id ALE/Pong-v5", "Pong-v5"),
    ("--env-id zzzzzzzz", "did you mean"),
    ("--env-id Ant-v5", "not an Atari game"),
    ("--env-id CartPole-v1", "not an Atari game"),
    # the range of lengths and divergences
    ("--rollout-length-min 65", "--rollout-length-max 64"),
    ("--rollout-length-max 8", "--rollout-length-min 16"),
    ("--rollout-length-min 0", "--rollout-length-min 0"),
    ("--rollout-length-min -16", "--rollout-length-min -16"),
    ("--divergence-min 0.95 --divergence-max 0.05", "--divergence-min 0.95"),
    ("--divergence-min 0.5 --divergence-max 0.5", "less than"),
    ("--divergence-min 0", "--divergence-min 0.0"),
    ("--divergence-min -0.1", "--divergence-min -0.1"),
    ("--divergence-max 1.5", "--divergence-max 1.5"),
    ("--divergence-min nan", "--divergence-min nan"),
    ("--divergence-max inf", "--divergence-max inf"),
    ("--rollout-smoothing 0", "--rollout-smoothing 0.0"),
    ("--rollout-smoothing 1.1", "--rollout-smoothing 1.1"),
    ("--kl-min 0.1 --kl-max 0.001", "--kl-min 0.1"),
    ("--kl-min 0.5 --kl-max 0.5", "less than"),
    ("--kl-min 0", "--kl-min 0.0"),
    ("--kl-min -0.1", "--kl-min -0.1"),
    ("--kl-max inf", "--kl-max inf"),
    ("--kl-min nan", "--kl-min nan"),
    ("--schedule cosine", "schedule"),
    ("--adapt-signal reward", "adapt-signal"),
    # sizes
    ("--num-envs 0", "--num-envs 0"),
    ("--microbatch-size 99999999999999999999", "too large"),
    ("--divergence-window 99999999999999999999", "too large"),
    ("--reference-batch-size 99999999999999999999", "too large"),
    ("--num-envs -8", "--num-envs -8"),
    ("--num-steps 0", "--num-steps 0"),
    ("--num-minibatches 0", "--num-minibatches 0"),
    ("--update-epochs 0", "--update-epochs 0"),
    ("--update-epochs -1", "--update-epochs -1"),
    ("--reference-batch-size 0", "--reference-batch-size 0"),
    ("--divergence-window 0", "--divergence-window 0"),
    ("--divergence-warmup -1", "--divergence-warmup -1"),
    ("--noise-scale-window 0", "--noise-scale-window 0"),
    ("--noise-scale-warmup -1", "--noise-scale-warmup -1"),
    ("--adapt-interval 0", "--adapt-interval 0"),
    ("--adapt-interval -50", "--adapt-interval -50"),
    ("--max-episode-steps 0", "--max-episode-steps 0"),
    ("--eval-episodes -1", "--eval-episodes -1"),
    ("--video-episodes 0", "--video-episodes 0"),
    ("--env-threads -1", "--env-threads -1"),
    ("--schedule-timesteps -1", "--schedule-timesteps -1"),
    ("--torch-threads -1", "--torch-threads -1"),
    ("--microbatch-size -1", "--microbatch-size -1"),
    ("--seed -1", "--seed -1"),
    ("--seed 99999999999999999999999", "4294967295 or less"),
    ("--num-envs 1000000000", "65536 or less"),
    ("--rollout-length-max 1000000000", "65536 or less"),
    ("--no-adapt-rollout --num-steps 1000000000", "65536 or less"),
    ("--rollout-length-max 65536 --num-envs 65536", "no memory"),
    ("--max-episode-steps 9999999999999", "10000000 or less"),
    ("--torch-threads 100000", "1024 or less"),
    ("--env-threads 100000", "1024 or less"),
    ("--exp-name a/b", "'a/b'"),
    ("--exp-name ../../x", "'../../x'"),
    ("--exp-name=", "--exp-name ''"),
    # batches that do not come out even, or at all
    ("--num-envs 1 --num-minibatches 100", "minibatches"),
    ("--num-envs 3 --no-adapt-rollout --num-steps 5 --num-minibatches 4", "minibatches"),
    ("--total-timesteps 100", "2048"),
    ("--total-timesteps 0", "--total-timesteps 0"),
    ("--total-timesteps 4095 --no-adapt-rollout", "4096"),
    # numbers that are none, or beyond their meaning
    ("--learning-rate 0", "--learning-rate 0.0"),
    ("--learning-rate -0.001", "--learning-rate -0.001"),
    ("--learning-rate nan", "--learning-rate nan"),
    ("--learning-rate inf", "--learning-rate inf"),
    ("--max-grad-norm 0", "--max-grad-norm 0.0"),
    ("--gamma 1.01", "--gamma 1.01"),
    ("--gamma nan", "--gamma nan"),
    ("--q-lambda -0.1", "--q-lambda -0.1"),
    ("--gae-lambda 1.1", "--gae-lambda 1.1"),
    ("--norm-adv --num-envs 1 --no-adapt-rollout --num-steps 4", "--no-norm-adv"),
    ("--clip-coef 0", "--clip-coef 0.0"),
    ("--clip-coef nan", "--clip-coef nan"),
    ("--ent-coef -0.01", "--ent-coef -0.01"),
    ("--vf-coef -0.5", "--vf-coef -0.5"),
    ("--vf-coef inf", "--vf-coef inf"),
    ("--start-e 2", "--start-e 2.0"),
    ("--eval-epsilon nan", "--eval-epsilon nan"),
    ("--exploration-fraction 1.5", "--exploration-fraction 1.5"),
    ("--sticky-action-probability 25", "--sticky-action-probability 25"),
    ("--num-envs many", "num-envs"),
    ("--num-envs 1.5", "num-envs"),
    ("--learning-rate fast", "learning-rate"),
    ("--num-envs", "num-envs"),
    # what does not go together
    ("--log-noise-scale --num-minibatches 1", "--num-minibatches"),
    ("--eval-only", "--model"),
    ("--model runs/x/model.pt", "--eval-only"),
    ("--eval-only --model missing.pt", "missing.pt"),
    ("--eval-only --model missing.pt --eval-episodes 0", "--eval-episodes"),
]


def is_one_helpful_line(result, hint):
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ") and hint in lines[0], lines[0]
    assert "Traceback" not in result.stderr and not result.stdout.strip()


@distinct_scripts
@pytest.mark.parametrize("arguments, hint", BAD_ARGUMENTS, ids=[a for a, _ in BAD_ARGUMENTS])
def test_bad_arguments(script, arguments, hint, run_here, tmp_path):
    """One line on stderr that names the flag and the way out, exit code 2, and nothing left on disk."""
    flags = re.findall(r"--(?:no-)?([a-z-]+)", arguments)
    if any(flag.replace("-", "_") not in MODULES[script].Args.__dataclass_fields__ for flag in flags):
        pytest.skip("not a flag of this script")
    result = run_here(script, *arguments.split())
    assert result.returncode == 2
    is_one_helpful_line(result, hint)
    assert list(tmp_path.iterdir()) == []


@distinct_scripts
@pytest.mark.parametrize("arguments", ["--no-such-flag 1", "--num-env 8", "-x", "stray"])
def test_unknown_flags(script, arguments, run_here, tmp_path):
    """A mistyped flag is named, never ignored."""
    result = run_here(script, *arguments.split())
    assert result.returncode == 2
    is_one_helpful_line(result, arguments.split()[0])
    assert list(tmp_path.iterdir()) == []


def test_noise_scale_of_one_minibatch(run_here, tmp_path):
    """Where the rule is the noise scale, a single minibatch is refused at once, not at the first measurement."""
    result = run_here("gns_batch_atari.py", "--num-minibatches", 1)
    assert result.returncode == 2
    is_one_helpful_line(result, "--num-minibatches 2")
    assert list(tmp_path.iterdir()) == []


def test_every_bad_argument_is_a_scripts():
    """No case of the list is skipped by all scripts, as one with a mistyped flag would be."""
    known = [{f"--{name.replace('_', '-')}" for name in MODULES[script].Args.__dataclass_fields__} for script in DISTINCT]
    for arguments, _ in BAD_ARGUMENTS:
        flags = {flag.replace("--no-", "--") for flag in re.findall(r"--[a-z-]+", arguments)}
        assert any(flags <= flags_of_script for flags_of_script in known), arguments


OFTEN = [BAD_ARGUMENTS[0], ("--gamma 1.01", "--gamma 1.01"), ("--num-envs many", "num-envs")]


@distinct_scripts
@pytest.mark.parametrize("arguments, hint", OFTEN, ids=[a for a, _ in OFTEN])
def test_bad_arguments_in_a_process_of_their_own(script, arguments, hint, tmp_path):
    """The same as a user sees it, including what libraries print at import or at exit."""
    result = run_script(script, *arguments.split(), cwd=tmp_path)
    assert result.returncode == 2
    is_one_helpful_line(result, hint)
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments_without_unicode(tmp_path, monkeypatch):
    """Where the terminal's encoding has no box to draw, the line is the same."""
    lines = []
    for encoding in ("utf-8", "latin-1"):
        monkeypatch.setenv("PYTHONIOENCODING", encoding)
        lines.append(run_script("pqn_abs_atari.py", "--num-envs", "many", cwd=tmp_path).stderr)
    assert lines[0] == lines[1] and "'many'" in lines[0] and "---" not in lines[0]


@distinct_scripts
@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_no_place_for_runs(script, kind, run_here, tmp_path, monkeypatch):
    """Where runs/ cannot be a folder, one line says so; nothing waits for it to become one."""
    if kind == "file":
        (tmp_path / "runs").write_text("mine")
    else:
        (tmp_path / "runs").symlink_to("/no/such/place")
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waits"))
    result = run_here(script, "--num-envs", 4, "--total-timesteps", 10_000)
    assert result.returncode == 2
    is_one_helpful_line(result, "cannot make the run folder")
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]


@distinct_scripts
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(script, run_here, tmp_path):
    """--device cuda says that there is none instead of training on the CPU unasked."""
    result = run_here(script, "--device", "cuda")
    assert result.returncode == 2
    is_one_helpful_line(result, "CUDA")
    assert list(tmp_path.iterdir()) == []


@distinct_scripts
@pytest.mark.parametrize(
    "spec", [None, importlib.machinery.ModuleSpec("wandb", None, is_package=True)], ids=["none", "folder"]
)
def test_tracking_without_wandb(script, spec, run_here, tmp_path, monkeypatch):
    """--track says how to install Weights & Biases where it is missing, also beside a folder wandb/ that it left once."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: spec if name == "wandb" else find_spec(name, *a))
    result = run_here(script, "--track")
    assert result.returncode == 2
    is_one_helpful_line(result, "pip install wandb")
    assert list(tmp_path.iterdir()) == []


@distinct_scripts
def test_more_processes_than_gpus(script, run_here, tmp_path, monkeypatch):
    """torchrun with four processes on two GPUs is told to take two, and may have four on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    result = run_here(script)
    assert result.returncode == 2
    is_one_helpful_line(result, "--nproc_per_node=2")
    is_one_helpful_line(run_here(script, "--device", "cpu", "--model", "x"), "--eval-only")  # the next check
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    is_one_helpful_line(run_here(script, "--model", "x"), "--eval-only")
    assert list(tmp_path.iterdir()) == []


@distinct_scripts
def test_evaluation_is_for_one_process(script, run_here, tmp_path, monkeypatch):
    """Under torchrun all would play the same games and write the same file."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run_here(script, "--eval-only", "--model", "model.pt")
    assert result.returncode == 2
    is_one_helpful_line(result, "not torchrun")
    assert list(tmp_path.iterdir()) == []


@distinct_scripts
@pytest.mark.parametrize("missing", ["ale_py", "cv2", "moviepy"])
def test_video_without_its_packages(script, missing, run_here, tmp_path, monkeypatch):
    """--capture-video says what is missing before the training, not after it."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == missing else find_spec(name, *a))
    short = "--total-timesteps 2048 --eval-episodes 0 --video-episodes 1 --max-episode-steps 50".split()
    result = run_here(script, "--capture-video", *short)
    assert result.returncode == 2
    is_one_helpful_line(result, "pip install -r requirements.txt")
    assert list(tmp_path.iterdir()) == []


def network_of(module, num_actions):
    """The script's network, and the name of the bias that tells the number of actions."""
    if hasattr(module, "Agent"):
        return module.Agent(num_actions), "actor"
    return module.QNetwork(num_actions), "head"


class LeavesAFile:
    """An object that writes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@distinct_scripts
@pytest.mark.parametrize(
    "kind", ["text", "empty", "tensor", "weights", "network", "no args", "types", "truncated", "folder", "pickle"]
)
def test_models_that_are_none(script, kind, run_here, tmp_path):
    """A file that is no model of this script is named in one line, and nothing is written beside it."""
    module = MODULES[script]
    model = tmp_path / "model.pt"
    network, head = network_of(module, 4)
    weights = network.state_dict()
    if kind == "text":
        model.write_text("not a model\n")
    elif kind == "empty":
        model.write_bytes(b"")
    elif kind == "tensor":
        torch.save(torch.zeros(3), model)
    elif kind == "weights":
        torch.save(weights, model)
    elif kind == "network":
        other = {f"{head}.weight": torch.zeros(4, 512), f"{head}.bias": torch.zeros(4)}
        other["encoder.0.weight"] = torch.zeros(9, 4, 8, 8)
        torch.save({"weights": other, "args": {"env_id": "Breakout-v5"}, "global_step": 0}, model)
    elif kind == "no args":
        torch.save({"weights": weights}, model)
    elif kind == "types":
        torch.save({"weights": weights, "args": {"env_id": "Breakout-v5", "seed": "one"}, "global_step": 0}, model)
    elif kind == "truncated":
        torch.save({"weights": weights, "args": {"env_id": "Breakout-v5"}, "global_step": 0}, model)
        model.write_bytes(model.read_bytes()[:1_000_000])
    elif kind == "folder":
        model.mkdir()
    elif kind == "pickle":
        torch.save({"weights": weights, "args": LeavesAFile(tmp_path / "the code in the pickle ran")}, model)
    result = run_here(script, "--eval-only", "--model", model)
    assert result.returncode == 2
    is_one_helpful_line(result, str(model))
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


@distinct_scripts
@pytest.mark.parametrize("game", ["Boxing-v5", "Breakout-v5"])
def test_model_of_another_game(script, game, run_here, tmp_path):
    """--eval-only plays the game of the model; asking for another one is refused, the default game too."""
    module = MODULES[script]
    content = {"weights": network_of(module, 6)[0].state_dict(), "args": {"env_id": "Pong-v5"}, "global_step": 0}
    torch.save(content, tmp_path / "model.pt")
    result = run_here(script, "--eval-only", "--model", tmp_path / "model.pt", "--env-id", game)
    assert result.returncode == 2
    is_one_helpful_line(result, "Pong-v5")
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


FOREIGN = [
    ("ppo_abs_atari.py", "pqn_abs_atari.py"),
    ("pqn_abs_atari.py", "ppo_abs_atari.py"),
    ("gns_batch_atari.py", "ppo_abs_atari.py"),
    ("pqn_abs_atari.py", "pqn_l_abs_atari.py"),
    ("pqn_l_abs_atari.py", "pqn_xl_abs_atari.py"),
    ("pqn_xl_abs_atari.py", "pqn_l_abs_atari.py"),
]


@pytest.mark.parametrize("script, other", FOREIGN)
def test_model_of_another_script(script, other, run_here, tmp_path):
    """The model of a script with another network is refused in one line that names the script it is for."""
    content = {"weights": network_of(MODULES[other], 4)[0].state_dict(), "args": {"env_id": "Pong-v5"}, "global_step": 0}
    torch.save(content, tmp_path / "model.pt")
    result = run_here(script, "--eval-only", "--model", tmp_path / "model.pt")
    assert result.returncode == 2
    is_one_helpful_line(result, script)
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


@scripts
def test_help(script, run_here, tmp_path):
    """--help shows every flag with its sentence and ends well."""
    result = run_here(script, "--help")
    assert result.returncode == 0 and not result.stderr
    for name in MODULES[script].Args.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in result.stdout
    assert list(tmp_path.iterdir()) == []


@scripts
def test_every_argument_is_documented(script):
    """Under each field of Args stands its sentence, which is what --help prints."""
    tree = ast.parse((ROOT / script).read_text())
    (args,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    fields = [node for node in args.body if isinstance(node, ast.AnnAssign)]
    assert len(fields) == len(MODULES[script].Args.__dataclass_fields__)
    for field in fields:
        below = args.body[args.body.index(field) + 1] if field is not args.body[-1] else None
        text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else ""
        assert isinstance(text, str) and len(text.split()) >= 3, f"{field.target.id} has no docstring"


@distinct_scripts
def test_a_loss_that_is_not_finite_stops_the_run(script, tmp_path):
    """A run that diverges says when and stops; its arguments and curves stay, a useless model is not saved. --auto-resume,
    as in a list of jobs that is submitted again, does not try until the luck is better."""
    size = "--num-envs 4 --rollout-length-min 4 --rollout-length-max 4 --num-minibatches 2 --total-timesteps 4000".split()
    arguments = (*size, "--learning-rate", "1e30", "--env-id", "Pong-v5", "--eval-episodes", 1, "--auto-resume")
    result = run_script(script, *arguments, cwd=tmp_path)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: ")
    step = int(re.search(r"step (\d+)", result.stderr)[1])
    assert 0 < step < 4000 and step % 16 == 0
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert json.loads((run_dir / "args.json").read_text())["learning_rate"] == 1e30
    assert sorted(p.name for p in run_dir.iterdir() if not p.name.startswith("events.")) == [
        ".lock",
        "args.json",
        "diverged.json",
        script,
        "versions.json",
    ]
    assert json.loads((run_dir / "diverged.json").read_text()) == {"global_step": step}
    events = EventAccumulator(str(run_dir)).Reload()
    last_points = {name: events.Scalars(name)[-1] for name in events.Tags()["scalars"] if name.startswith("losses/")}
    assert {point.step for point in last_points.values()} == {step}
    assert not all(math.isfinite(point.value) for point in last_points.values())
    again = run_script(script, *arguments, cwd=tmp_path)
    assert again.returncode == 2 and again.stderr.endswith("has the same arguments and diverged; remove its folder\n")
    assert len(again.stderr.splitlines()) == 1
    assert list((tmp_path / "runs").iterdir()) == [run_dir]


@scripts
def test_script_metadata_agrees_with_the_requirements(script):
    """The PEP 723 header, for uv and pipx, pins what requirements.txt pins."""
    block = re.search(r"^# /// script\n((?:# ?.*\n)*?)# ///$", (ROOT / script).read_text(), re.MULTILINE)[1]
    header = tomllib.loads("".join(line.removeprefix("#").removeprefix(" ") for line in block.splitlines(keepends=True)))
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert header["requires-python"].startswith(">=3.")
    assert header["dependencies"] and all(line in lines for line in header["dependencies"])
    assert all("==" in line for line in header["dependencies"])


@scripts
def test_script_is_self_contained(script):
    """A script imports no other file of the repository, so it can be copied away alone."""
    own = {path.stem for path in ROOT.rglob("*.py") if ".venv" not in path.parts} | {"tests", "benchmark"}
    imported = set()
    for node in ast.walk(ast.parse((ROOT / script).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert "torch" in imported and not imported & own
