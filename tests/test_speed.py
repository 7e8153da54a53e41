"""What makes the script faster changes nothing else: pools, microbatches, compilation and CUDA graphs against plain code."""

import contextlib
import copy
import ctypes
import gc
import math
import os
import platform
import re
import runpy
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import MODULES, ROOT
from torch._dynamo.utils import counters

import pqn_abs_atari as pqn

# The other scripts have acting and learning from pqn_abs_atari.py, word for word (test_twins.py).
DIFFERENT_LEARNERS = [MODULES["pqn_abs_atari.py"], MODULES["ppo_abs_atari.py"]]
learners = pytest.mark.parametrize("script", DIFFERENT_LEARNERS, ids=lambda script: script.__name__)


def minibatch(script, size=96, num_actions=4, device="cpu"):
    """What update() takes: observations, actions, targets and weights, one sample in seven without weight."""
    generator = torch.Generator().manual_seed(0)
    observations = torch.randint(0, 256, (size, 4, 84, 84), generator=generator, dtype=torch.uint8)
    actions = torch.randint(num_actions, (size,), generator=generator)
    weights = torch.rand(size, generator=generator)
    weights[::7] = 0  # reset steps
    targets = [torch.randn(size, generator=generator)]
    if hasattr(script, "Agent"):  # log-probabilities, advantages, returns and values
        targets = [math.log(1 / num_actions) + 0.2 * targets[0], *(torch.randn(size, generator=generator) for _ in range(3))]
    return [x.to(device) for x in (observations, actions, *targets, weights / weights.sum())]


def gradient_step_of(script, network, microbatch_size=1000):
    """What update() calls with a minibatch."""
    settings = {"args": script.Args()} if hasattr(script, "Agent") else {}
    return partial(script.compute_gradient, network, **settings, microbatch_size=microbatch_size)


def gradients_and_logs(script, network, *batch, microbatch_size=1000):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    gradient_step = gradient_step_of(script, network, microbatch_size)
    logs = script.update(network, optimizer, gradient_step, *batch, max_grad_norm=math.inf)
    return torch.cat([p.grad.flatten() for p in network.parameters()]), logs


def relative_error(x, reference):
    return float((x - reference).detach().norm() / reference.detach().norm())


def fresh_network(script):
    torch.manual_seed(1)
    return script.Agent(4) if hasattr(script, "Agent") else script.QNetwork(4)


def outputs(script, network, observations):
    """Q-values, or logits and values side by side."""
    with torch.no_grad():
        result = network(observations)
    return torch.cat([result[0], result[1].unsqueeze(1)], 1) if hasattr(script, "Agent") else result


@learners
def test_microbatches_add_up_to_the_minibatch(script):
    """Also where the minibatch is no multiple of the microbatch."""
    batch = minibatch(script)
    plain, plain_logs = gradients_and_logs(script, fresh_network(script), *batch)
    chunked, chunked_logs = gradients_and_logs(script, fresh_network(script), *batch, microbatch_size=40)
    assert relative_error(chunked, plain) < 1e-4
    torch.testing.assert_close(chunked_logs, plain_logs, rtol=1e-4, atol=1e-5)


@learners
def test_samples_without_weight_do_not_count(script):
    """Reset steps: whatever stands in them, loss and gradient stay what they are."""
    batch = minibatch(script)
    plain, plain_logs = gradients_and_logs(script, fresh_network(script), *batch)
    observations, _, *targets, _ = batch
    observations[::7] = 0
    for target in targets:
        target[::7] = 1e3 if target is not targets[0] or len(targets) == 1 else -2  # log-probabilities are small numbers
    other, other_logs = gradients_and_logs(script, fresh_network(script), *batch)
    assert relative_error(other, plain) < 1e-5
    torch.testing.assert_close(other_logs, plain_logs)


@learners
def test_bfloat16_stays_near_float32(script):
    """Within 3 % of the network's outputs and 10 % of the gradient (measured for PQN at initialisation: 0.7 %, 2 to 3 %)."""
    batch = minibatch(script)
    plain, _ = gradients_and_logs(script, fresh_network(script), *batch)
    network = script.speed_up(fresh_network(script), "bfloat16", torch.device("cpu"))
    rounded, _ = gradients_and_logs(script, network, *batch)
    assert 0 < relative_error(rounded, plain) < 0.1
    result = outputs(script, network, batch[0])
    assert result.dtype == torch.float32
    assert 0 < relative_error(result, outputs(script, fresh_network(script), batch[0])) < 0.03


DISTINCT_NETWORKS = [*DIFFERENT_LEARNERS, MODULES["pqn_l_abs_atari.py"]]


@pytest.mark.parametrize("script", DISTINCT_NETWORKS, ids=lambda script: script.__name__)
def test_memory_formats_compute_the_same(script):
    """Outputs, losses and gradients, also after the layer norms have learned to tell channels, rows and columns apart."""
    plain = fresh_network(script)
    for layer in plain.modules():
        if isinstance(layer, torch.nn.LayerNorm):
            torch.nn.init.normal_(layer.weight, 1.0, 0.5)
            torch.nn.init.normal_(layer.bias, 0.0, 0.5)
    other = script.speed_up(copy.deepcopy(plain), "float32", torch.device("cpu"), memory_format="channels_last")
    assert relative_error(outputs(script, other, minibatch(script)[0]), outputs(script, plain, minibatch(script)[0])) < 1e-5
    gradient, logs = gradients_and_logs(script, plain, *minibatch(script))
    other_gradient, other_logs = gradients_and_logs(script, other, *minibatch(script))
    assert relative_error(other_gradient, gradient) < 1e-4
    torch.testing.assert_close(other_logs, logs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("script", DISTINCT_NETWORKS, ids=lambda script: script.__name__)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_first_layer_is_the_same_convolution_in_every_layout(script, precision):
    """Bit for bit, its gradient too, where whole numbers leave nothing to round: also as a convolution of blocks."""
    generator = torch.Generator().manual_seed(1)
    layer = copy.deepcopy(fresh_network(script).encoder[0])
    whole = torch.randint(-1, 2, layer.weight.shape, generator=generator).float()
    layer.weight.data, layer.bias.data = 255 * whole, torch.arange(len(whole)).float()
    observations = minibatch(script, 3)[0]
    expected = torch.nn.functional.conv2d(observations.double(), whole.double(), layer.bias.double(), stride=4)
    signs = torch.randint(-1, 2, expected.shape, generator=generator)
    gradients = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        layer.memory_format = memory_format
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            output = layer(observations)
        assert output.is_contiguous(memory_format=memory_format)
        assert torch.equal(output, expected.to(getattr(torch, precision)))
        output.backward(signs.to(output.dtype))
        gradients.append(layer.weight.grad)
    assert gradients[0].abs().max() > 1 and torch.equal(*gradients)


@pytest.mark.parametrize("script", DISTINCT_NETWORKS, ids=lambda script: script.__name__)
@pytest.mark.parametrize(
    "memory_format, precision, device, expected",
    [
        ("auto", "float32", "cpu", torch.channels_last),
        ("auto", "bfloat16", "cpu", torch.channels_last),
        ("auto", "float32", "cuda", torch.contiguous_format),
        ("contiguous", "float32", "cpu", torch.contiguous_format),
        ("channels_last", "bfloat16", "cpu", torch.channels_last),
        ("channels_last", "float32", "cuda", torch.channels_last),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_features_keep_the_memory_format(script, memory_format, precision, device, expected, layout):
    """From the first convolution to the last, gradients too, in whatever layout the observations come: no layer gives back
    another one, which would cost copies."""
    network = script.speed_up(fresh_network(script), precision, torch.device(device), memory_format=memory_format)
    observations = minibatch(script, 5)[0].contiguous(memory_format=layout)
    layouts = []

    def note(module, inputs, output):
        layouts.append(output.is_contiguous(memory_format=expected))
        output.register_hook(lambda gradient: layouts.append(gradient.is_contiguous(memory_format=expected)))

    flatten = next(i for i, layer in enumerate(network.encoder) if isinstance(layer, torch.nn.Flatten))
    for layer in network.encoder[:flatten]:
        layer.register_forward_hook(note)
    network.encoder(observations).sum().backward()
    layouts.pop(flatten)  # the gradient that comes first, from what is flat
    assert len(layouts) == 2 * flatten - 1 and all(layouts)


@pytest.mark.parametrize("script", ["pqn_abs_atari.py", "ppo_abs_atari.py", "gns_batch_atari.py"])
@pytest.mark.parametrize(
    "flags, expected", [([], True), (["--memory-format", "contiguous"], False)], ids=["auto", "contiguous"]
)
def test_scripts_use_the_memory_format(script, flags, expected, run_here, monkeypatch):
    """The networks that act, learn, measure and, later, without the flag, only evaluate."""
    layouts, flatten = [], torch.nn.Flatten.forward

    def forward(self, x):
        layouts.append(x.is_contiguous(memory_format=torch.channels_last))
        return flatten(self, x)

    monkeypatch.setattr(torch.nn.Flatten, "forward", forward)
    small = "--env-id Pong-v5 --num-envs 4 --num-steps 16 --total-timesteps 128 --adapt-interval 1 --rollout-length-max 16"
    common = ["--device", "cpu", "--precision", "float32", "--eval-episodes", "1", "--max-episode-steps", "8"]
    assert run_here(script, *small.split(), *common, *flags).returncode == 0
    assert len(layouts) > 32 and set(layouts) == {expected}
    layouts.clear()
    model = str(next(Path("runs").glob("*/model.pt")))
    assert run_here(script, "--eval-only", "--model", model, *common).returncode == 0
    assert layouts and set(layouts) == {expected}


@pytest.mark.parametrize(
    "capabilities, fast",
    [
        ({"cpu_name": "AMD EPYC 9R14", "avx512_bf16": True, "amx_bf16": False}, True),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, False),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, True),
        ({"cpu_name": "AMD EPYC 7763", "avx512_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"architecture": "arm64", "bf16": True}, False),
        ({}, False),
    ],
)
def test_auto_takes_bfloat16_where_it_is_faster(capabilities, fast, monkeypatch):
    """On a CPU; nobody measured it on ARM."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert pqn.bfloat16_is_fast(torch.device("cpu")) is fast


PAGE_FAULTS = """
import resource, torch, pqn_abs_atari
pqn_abs_atari.keep_freed_memory()
for i in range(16):
    if i == 6:  # the heap has grown to its size
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(4_000_000) for _ in range(6)]  # 96 MB
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_freed_memory_is_kept():
    """Tensors take the memory of those before them, whose pages the system need not clear anew; with the environment variables
    of malloc nothing is set, and the system clears the pages of 96 MB ten times."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}

    def faults(**extra):
        command = [sys.executable, "-c", PAGE_FAULTS]
        return int(subprocess.run(command, cwd=ROOT, env=environment | extra, capture_output=True, check=True).stdout)

    # Something small that happens to lie above the tensors keeps the heap from shrinking, in one process of four
    assert max(faults() for _ in range(3)) < 1000
    for extra in ({"MALLOC_TOP_PAD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=8"}):
        assert any(faults(**extra) > 100_000 for _ in range(8))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
@pytest.mark.parametrize("script", ["pqn_abs_atari.py", "ppo_abs_atari.py", "gns_batch_atari.py"])
def test_scripts_keep_freed_memory(script, run_here, monkeypatch):
    """The scripts call that before they allocate anything, here before they find no model."""
    calls = []
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(name)
    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda *a: calls.append(a)))
        assert run_here(script, "--eval-only", "--model", "none.pt", "--device", "cpu").returncode == 2
    assert calls == [(-3, 2**25), (-1, 2**31 - 1)]


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch for Linux brings GNU's OpenMP, others have others")
@pytest.mark.parametrize("script", ["pqn_abs_atari", "ppo_abs_atari", "gns_batch_atari"])
def test_idle_threads_wait_less(script):
    """OpenMP, which reads its settings when it is loaded, has the script's; one that the environment sets stands instead."""
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"} | {
        "OMP_DISPLAY_ENV": "VERBOSE"
    }
    for extra, count in (({}, 30_000), ({"GOMP_SPINCOUNT": "7"}, 7)):
        command = [sys.executable, "-c", f"import {script}"]
        result = subprocess.run(command, cwd=ROOT, env=environment | extra, capture_output=True, text=True, check=True)
        assert re.findall(r"GOMP_SPINCOUNT = '(\d+)'", result.stderr) == [str(count)]


@pytest.mark.skipif(not pqn.compiler_is_there(torch.device("cpu")), reason="torch.compile needs a C++ compiler")
@learners
def test_compiled_equals_eager(script):
    """Same loss and gradient on the same data, same actions, in float32."""
    batch = minibatch(script, 32)
    eager = fresh_network(script)
    compiled = script.speed_up(fresh_network(script), "float32", torch.device("cpu"), use_compile=True)
    plain, plain_logs = gradients_and_logs(script, eager, *batch)
    fast, fast_logs = gradients_and_logs(script, compiled, *batch)
    assert relative_error(fast, plain) < 1e-3
    torch.testing.assert_close(fast_logs, plain_logs, rtol=1e-3, atol=1e-4)
    chance = torch.arange(32) % 2 == 0, torch.full((32,), 3)
    if hasattr(script, "Agent"):
        chance = (script.gumbel_noise((32, 4), torch.Generator().manual_seed(0)),)
    with torch.no_grad():
        assert torch.equal(script.act(compiled, batch[0], *chance)[0], script.act(eager, batch[0], *chance)[0])


class FakeGraph:
    """Stands in for a CUDA graph on a CPU: replaying it does to the recorded tensors what the function below does."""

    def replay(self):
        _, (x, y), (total, product) = self.owner.recorded
        total.copy_(x + y)
        product.copy_(x * y)


def test_only_the_graph_of_the_latest_shapes_is_kept(monkeypatch):
    """The first call with new shapes runs plainly, the second records, the others replay, with the inputs of the moment; what
    a call returned stays as it was; where the shapes change, the graph goes."""
    recorded, calls = [], []

    @contextlib.contextmanager
    def recording(graph, stream):
        graph.owner = graphed
        recorded.append(weakref.ref(graph))
        assert not gc.isenabled()  # a dead graph that is collected now would spoil this one
        yield

    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: SimpleNamespace(wait_stream=lambda other: None))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", recording)

    def function(x, y):
        calls.append(len(x))
        return x + y, x * y

    graphed, results = pqn.CUDAGraphed(function), []
    for i, size in enumerate([4] * 5 + [6] * 3 + [4] * 3):
        results.append((size, i, graphed(torch.full((size,), float(i)), torch.full((size,), 3.0))))
        if i == 5:
            assert recorded[0]() is None
    assert calls == [4, 4, 6, 6, 4, 4] and len(recorded) == 3 and gc.isenabled()
    assert [graph() is None for graph in recorded] == [True, True, False]
    for size, i, (total, product) in results:
        assert total.tolist() == [i + 3.0] * size and product.tolist() == [3.0 * i] * size


@pytest.mark.parametrize(
    "device, environment, programs, there",
    [
        ("cpu", {}, ["g++"], True),
        ("cpu", {}, ["gcc", "clang++"], False),  # Inductor looks for g++ only
        ("cpu", {"CXX": "clang++"}, ["clang++"], True),
        ("cpu", {"CXX": "icpx"}, ["g++"], False),
        ("cpu", {"CXX": ""}, ["g++", ""], False),
        ("cpu", {}, ["g++", "no Python.h"], False),
        ("cuda", {}, ["gcc"], True),
        ("cuda", {}, ["clang"], True),
        ("cuda", {}, ["g++"], False),  # Triton compiles C
        ("cuda", {"CC": "icx"}, ["gcc"], False),
        ("cuda", {"CC": "gcc -pthread"}, ["gcc"], False),  # Triton takes it for one program
        ("cuda", {}, ["gcc", "no triton"], False),
        ("cuda", {}, ["gcc", "no Python.h"], False),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="the compilers of Linux")
def test_what_compilation_needs(device, environment, programs, there, monkeypatch, tmp_path):
    """Python's headers, and Triton with a C compiler on CUDA, the one C++ compiler that Inductor takes on the CPU."""
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(pqn.shutil, "which", lambda name: f"/usr/bin/{name}" if name and name in programs else None)
    monkeypatch.setattr(pqn.importlib.util, "find_spec", lambda name: None if "no triton" in programs else object())
    monkeypatch.setattr(pqn.sysconfig, "get_path", lambda name: tmp_path)
    if "no Python.h" not in programs:
        (tmp_path / "Python.h").touch()
    assert pqn.compiler_is_there(torch.device(device)) is there


def test_what_is_missing_is_said(run_here, monkeypatch):
    """Without a compiler and without a GPU, one line each says so, and the run goes on plainly."""
    monkeypatch.setattr(pqn.shutil, "which", lambda name: None)
    size = "--num-envs 4 --rollout-length-min 4 --rollout-length-max 8 --num-minibatches 2 --total-timesteps 64".split()
    result = run_here("pqn_abs_atari.py", "--compile", "--cudagraphs", "--device", "cpu", "--eval-episodes", 0, *size)
    assert result.returncode == 0 and "trained 64 steps" in result.stdout
    assert result.stdout.splitlines()[:2] == [
        "--compile finds no C++ compiler or Python.h (python3-dev) here: running eagerly",
        "--cudagraphs finds no CUDA device here: running without",
    ]
    assert '"compile": false' in next(Path("runs").glob("*/args.json")).read_text()


class Replayed:
    """A gradient step that does to the gradients what the replay of a CUDA graph does: it writes to the tensors of its first
    call, whatever p.grad is by then."""

    def __init__(self, step, network):
        self.step, self.parameters, self.gradients = step, list(network.parameters()), None

    def __call__(self, *batch):
        before = [p.grad for p in self.parameters]
        logs = self.step(*batch)
        if self.gradients is None:
            self.gradients = [p.grad for p in self.parameters]
            return logs
        for p, gradient, own in zip(self.parameters, before, self.gradients, strict=True):
            own.copy_(p.grad)
            p.grad = gradient
        return logs


@learners
def test_gradients_stay_where_a_graph_writes_them(script):
    """Neither updates nor measurements of the noise scale put other tensors in their place, which a graph would not fill."""
    weights, measured = [], []
    for replayed in (False, True):
        network = fresh_network(script)
        optimizer = torch.optim.RAdam(network.parameters(), lr=1e-2, foreach=True)
        gradient_step = gradient_step_of(script, network)
        gradient_step = Replayed(gradient_step, network) if replayed else gradient_step
        for i in range(8):
            batch = [x.roll(i, 0) for x in minibatch(script, 32)]
            script.update(network, optimizer, gradient_step, *batch, max_grad_norm=10.0)
            if i % 2:
                is_transition = (batch[-1] > 0).float()
                measured.append(script.measure_noise_scale(network, gradient_step, batch[:-1], is_transition, 4, 0))
        weights.append(torch.nn.utils.parameters_to_vector(network.parameters()))
    assert torch.equal(*weights) and measured[:4] == measured[4:] and len(set(measured)) == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need CUDA")
@learners
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("precision, error", [("float32", 1e-2), ("bfloat16", 0.3)])
def test_cuda_graphs_equal_plain_steps(script, precision, error, memory_format, monkeypatch):
    """Five updates each at three minibatch sizes, plain and recorded, the first size anew, end at the same weights, while the
    learning rate changes; gradients taken between two steps, as for the noise scale, are the same and disturb neither.

    In bfloat16, on a CPU, samples in another order give weights 3e-4 and gradients 0.15 apart, gradients at the first weights
    all the time, as of a graph that had kept a bfloat16 copy of them, weights 4e-3 and gradients 0.57 apart or more."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    device, between = torch.device("cuda"), [[], []]
    networks = [script.speed_up(fresh_network(script).to(device), precision, device, False, memory_format) for _ in range(2)]
    for network, graphed in zip(networks, (False, True), strict=True):
        # RAdam begins without its adaptive part, whose steps are small: so large a rate that a wrong one would show
        kind, rate = (torch.optim.Adam, 1e-3) if hasattr(script, "Agent") else (torch.optim.RAdam, 1e-2)
        optimizer = kind(network.parameters(), lr=rate, foreach=True)
        gradient_step = gradient_step_of(script, network)
        gradient_step = script.CUDAGraphed(gradient_step) if graphed else gradient_step
        for i, size in enumerate([96] * 5 + [64] * 5 + [96] * 5):
            optimizer.param_groups[0]["lr"] = rate / (i + 1)
            batch = minibatch(script, size, device=device)
            logs = script.update(network, optimizer, gradient_step, *batch, max_grad_norm=10.0)
            assert logs.isfinite().all() and len(logs) == len(script.LOSSES)
            if i % 2:  # else the next step finds the gradients of this one, also where its graph is dropped
                gradient_step(*(x.roll(1, 0) for x in batch))
                between[graphed].append(torch.nn.utils.parameters_to_vector(p.grad for p in network.parameters()))
    plain, graphed = (torch.nn.utils.parameters_to_vector(network.parameters()) for network in networks)
    assert relative_error(graphed, plain) < 1e-3
    for plain, graphed in zip(*between, strict=True):
        assert relative_error(graphed, plain) < error


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need CUDA")
@learners
@pytest.mark.parametrize("precision, error", [("float32", 1e-3), ("bfloat16", 2e-2)])
def test_cuda_graphs_act_as_plain_steps(script, precision, error):
    """Recorded acting gives each group of games its own actions and values, also after another group's replay and after the
    weights have changed."""
    device = torch.device("cuda")
    network = script.speed_up(fresh_network(script).to(device), precision, device)
    acting = script.CUDAGraphed(lambda *inputs: script.act(network, *inputs))
    generator = torch.Generator(device).manual_seed(0)
    groups = [minibatch(script, 16, device=device)[0], minibatch(script, 32, device=device)[0][16:]]
    chance = [torch.rand(16, 4, generator=generator, device=device)]
    if not hasattr(script, "Agent"):
        chance = [chance[0][:, 0] < 0.5, torch.full((16,), 3, device=device)]
    with torch.no_grad():
        for _ in range(3):
            results = [acting(group, *chance) for group in groups]
            expected = [script.act(network, group, *chance) for group in groups]
            for result, plain in zip(results, expected, strict=True):
                torch.testing.assert_close(tuple(result), tuple(plain), rtol=error, atol=error)
            torch._foreach_mul_(list(network.parameters()), 1.2)


def final_storage(script, monkeypatch, tmp_path, *flags):
    """Runs the script in this process and returns its storage after the last rollout."""
    monkeypatch.chdir(tmp_path)
    arguments = "--env-id Breakout-v5 --num-envs 8 --rollout-length-min 8 --num-minibatches 4 --total-timesteps 800".split()
    arguments += "--max-episode-steps 30 --eval-episodes 0 --precision float32 --device cpu".split()
    names = "obs actions rewards terminations dones is_transition".split()
    if hasattr(script, "Agent"):
        names += ["advantages", "log_probs", "values"]
        arguments += ["--learning-rate", "1e-14"]  # Adam makes much of a rounding error
    else:
        arguments += "--start-e 1 --end-e 1".split()
        names += ["returns"]
    monkeypatch.setattr(sys, "argv", [script.__file__, *arguments, *flags])
    variables = runpy.run_path(script.__file__, run_name="__main__")
    return {name: variables[name] for name in names}


@learners
def test_pools_collect_the_same_rollout(script, monkeypatch, tmp_path):
    """Games in two or four overlapped pools, or emulated by one thread: the same transitions in the same places."""
    plain = final_storage(script, monkeypatch, tmp_path, "--env-pools", "1")
    assert plain["dones"].any() and not plain["is_transition"].all() and plain["obs"].any()
    computed = {"returns", "advantages", "log_probs", "values"}
    for flags in (["--env-pools", "2"], ["--env-pools", "4", "--env-threads", "1"]):
        overlapped = final_storage(script, monkeypatch, tmp_path, *flags)
        for name in plain.keys() - computed:
            assert torch.equal(plain[name], overlapped[name]), name
        # Values may differ in the last bits, since the network sees batches of another size.
        for name in plain.keys() & computed:
            torch.testing.assert_close(overlapped[name], plain[name], rtol=1e-3, atol=1e-3)


MOVING = "--adapt-signal time --adapt-interval 1 --rollout-smoothing 1"  # another length at almost every iteration


def peak_memory(tmp_path, *flags):
    """Peak resident memory in MiB of a run of its own process."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    arguments = "--env-id Pong-v5 --num-envs 8 --num-minibatches 2 --total-timesteps 8000 --eval-episodes 0 --torch-threads 1 "
    arguments += "--device cpu"
    code = f"import resource, runpy, sys; sys.argv = {['script', *arguments.split(), *flags]}; "
    code += f"runpy.run_path({pqn.__file__!r}, run_name='__main__'); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    output = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    return int(output.splitlines()[-1]) / unit


@pytest.mark.skipif(sys.platform == "win32", reason="needs the resource module")
def test_many_lengths_do_not_grow_memory(tmp_path):
    """A run through 14 lengths, 211 MiB of rollouts, takes little more memory than one that always has the longest: the
    matrix library caches something per shape (measured with 16 of them: 60 to 90 MiB at 2,000 as well as at 20,000 steps)."""
    fixed = peak_memory(tmp_path, "--no-adapt-rollout", "--num-steps", "36")
    moving = peak_memory(tmp_path, "--rollout-length-min", "8", "--rollout-length-max", "36", *MOVING.split())
    assert moving < fixed + 140


@pytest.mark.skipif(not pqn.compiler_is_there(torch.device("cpu")), reason="torch.compile needs a C++ compiler")
def test_many_lengths_do_not_recompile(monkeypatch, tmp_path):
    """A run through 10 lengths compiles acting and learning a handful of times, not once per length."""
    flags = "--env-id Pong-v5 --num-envs 8 --num-minibatches 2 --rollout-length-min 8 --rollout-length-max 28 --compile "
    flags += "--device cpu"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["script", *flags.split(), *MOVING.split(), *"--total-timesteps 3000 --eval-episodes 0".split()]
    )
    torch._dynamo.reset()
    counters.clear()
    script = runpy.run_path(pqn.__file__, run_name="__main__")
    assert script["length"] >= 26
    assert 1 <= counters["stats"]["unique_graphs"] <= 6
