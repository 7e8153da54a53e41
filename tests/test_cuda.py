"""On a GPU: every script trains, adapts, is stopped, resumed and evaluated, and computes what the CPU computes.

python -m pytest -o addopts= -n 8 --dist worksteal -k cuda tests/test_cuda.py tests/test_speed.py     # two cores a worker
"""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import DISTINCT, MODULES, ROOT, SCRIPTS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_learning import play_lamps
from test_long_runs import SIZE, assert_curves_are_whole, interrupt
from test_speed import fresh_network, gradients_and_logs, learners, minibatch, outputs, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICE = "cuda"
PQN = "pqn_abs_atari.py"
# Another length at almost every iteration, from 4 to 16, in steps of 2
MOVING = "--adapt-signal time --adapt-interval 1 --rollout-smoothing 1".split()
SPEED = {"default": [], "cudagraphs": ["--cudagraphs"], "compile": ["--compile"], "float32": ["--precision", "float32"]}
SPEED |= {"both": ["--cudagraphs", "--compile"], "channels_last": ["--memory-format", "channels_last"]}
SPEED["all"] = SPEED["both"] + SPEED["channels_last"]
# A run may be continued in another way; where there is nothing, in the same
THEN = {"default": ["--device", "cpu"], "cudagraphs": ["--device", "cpu", "--no-cudagraphs"], "float32": ["--cudagraphs"]}
THEN |= {"both": ["--no-cudagraphs", "--no-compile"], "channels_last": ["--memory-format", "contiguous"]}
THEN |= {"compile": [], "all": []}


def run(script, *arguments, cwd, **environment):
    """Runs a script on the GPU; returns what it printed. All that it is asked to compute with is there."""
    command = [sys.executable, str(ROOT / script), "--device", DEVICE, *map(str, arguments)]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"} | environment
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert "finds no" not in result.stdout and "recompile_limit" not in result.stderr, result.stdout + result.stderr
    return result.stdout


def losses(run_dir):
    """The curves of all losses, by name."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return {n: [e.value for e in events.Scalars(n)] for n in events.Tags()["scalars"] if n.startswith("losses/")}


@pytest.mark.parametrize("speed", SPEED)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run(script, speed, tmp_path):
    """From the first line to eval.json, with rollouts that grow and the noise scale measured, in every way to compute."""
    noise_scale = [] if script == "gns_batch_atari.py" else ["--log-noise-scale"]
    assert f"Pong-v5 on {DEVICE} (" in run(script, *SIZE, 2400, *MOVING, *noise_scale, *SPEED[speed], cwd=tmp_path)
    (run_dir,) = tmp_path.glob("runs/*")
    lengths = [value for _, value in assert_curves_are_whole(run_dir)["abs/rollout_length"]]
    assert lengths[0] == 4 and lengths[-1] >= 14 and len(set(lengths)) >= 5
    assert all(len(set(curve)) > 1 for name, curve in losses(run_dir).items() if "clipfrac" not in name)
    assert json.loads((run_dir / "eval.json").read_text())["episodes"] == 2
    run(script, "--eval-only", "--model", run_dir / "model.pt", "--eval-episodes", 3, *SPEED[speed], cwd=tmp_path)
    assert json.loads((run_dir / "eval.json").read_text())["episodes"] == 3


@pytest.mark.parametrize("speed", SPEED)
@pytest.mark.parametrize("script", DISTINCT)
def test_stopped_and_resumed(script, speed, tmp_path):
    """SIGTERM saves, --resume goes on to the end, also on a CPU or with other ways to compute."""
    flags = *SIZE, 4000, "--checkpoint-interval", 100, *SPEED[speed]
    run_dir, code, output, errors = interrupt(script, tmp_path, "--device", DEVICE, *flags)
    assert code == 143, errors
    assert "continuing at step" in run(script, "--resume", run_dir, *THEN[speed], cwd=tmp_path)
    assert_curves_are_whole(run_dir)


@pytest.mark.parametrize("script", ["pqn_abs_atari.py", "ppo_abs_atari.py"])
def test_ways_to_compute_agree(script, tmp_path):
    """The losses of five iterations with random actions, in float32: CUDA graphs, compilation and layout."""
    five = *SIZE, 160, "--no-adapt-rollout", "--num-steps", 4
    random = ["--start-e", 1, "--end-e", 1] if script == PQN else ["--learning-rate", 1e-7]
    curves = {}
    for speed in ("float32", "cudagraphs", "compile", "both", "channels_last", "all"):
        (tmp_path / speed).mkdir()
        flags = "--precision", "float32", *SPEED[speed]  # without TF32, whose rounding depends on the layout
        run(script, *five, *random, *flags, cwd=tmp_path / speed, NVIDIA_TF32_OVERRIDE="0")
        curves[speed] = losses(next(tmp_path.glob(f"{speed}/runs/*")))
    for speed in ("cudagraphs", "compile", "both", "channels_last", "all"):
        for name in ("losses/td_loss", "losses/value_loss", "losses/entropy", "losses/grad_norm"):
            if name in curves["float32"]:
                assert len(curves["float32"][name]) == 5
                assert curves[speed][name] == pytest.approx(curves["float32"][name], rel=2e-2, abs=1e-6), (speed, name)


@learners
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("precision, error", [("float32", 1e-2), ("bfloat16", 0.15)])  # cuDNN's float32 may be TF32
def test_the_gpu_computes_what_the_cpu_computes(script, precision, error, memory_format):
    """Outputs, loss and gradient of the same network on the same data."""
    plain, plain_logs = gradients_and_logs(script, fresh_network(script), *minibatch(script))
    network = fresh_network(script).to(DEVICE)
    network = script.speed_up(network, precision, torch.device(DEVICE), memory_format=memory_format)
    batch = minibatch(script, device=DEVICE)
    gradient, logs = gradients_and_logs(script, copy.deepcopy(network) if precision == "float32" else network, *batch)
    assert relative_error(gradient.cpu(), plain) < max(error, 3e-2)  # TF32 flips a ReLU here and there
    torch.testing.assert_close(logs.cpu(), plain_logs, rtol=5 * error, atol=error)
    expected = outputs(script, fresh_network(script), minibatch(script)[0])
    assert relative_error(outputs(script, network, batch[0]).cpu(), expected) < error


@pytest.mark.parametrize("speed", SPEED)
@pytest.mark.parametrize("script", ["pqn_abs_atari.py", "ppo_abs_atari.py"])
def test_lamps_are_learned(script, speed, run_here, monkeypatch, tmp_path):
    """The made-up game of test_learning.py, in one of two attempts: on a CPU every seed tried scored 7.8 or more."""
    flags = "--device", DEVICE, *SPEED[speed]
    assert any(play_lamps(script, run_here, monkeypatch, tmp_path, seed, *flags)[0] > 6 for seed in (1, 2))


def test_many_lengths_take_no_more_memory():
    """A second pass through many lengths hardly adds to what the first has reserved; recording a graph for each of 13 lengths,
    from short to long, takes little more than recording the longest alone, since the one before is dropped."""
    script = MODULES[PQN]
    network = script.speed_up(fresh_network(script).to(DEVICE), "bfloat16", torch.device(DEVICE))

    def step(*batch):
        return script.compute_gradient(network, *batch, 10**6)

    def reserved(step, lengths, afresh=True):
        if afresh:
            torch.cuda.empty_cache()
        for length in lengths:
            for _ in range(3):
                step(*minibatch(script, 32 * length, device=DEVICE))
        return torch.cuda.memory_reserved()

    lengths = range(16, 65, 4)
    first, second = reserved(step, lengths), reserved(step, lengths, afresh=False)
    assert second <= 1.3 * first
    longest = reserved(script.CUDAGraphed(step), lengths[-1:])
    assert reserved(script.CUDAGraphed(step), lengths) <= 1.5 * longest
