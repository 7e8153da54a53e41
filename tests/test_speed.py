"""What makes the script faster changes nothing else: pools, microbatches, compilation and CUDA graphs against plain code."""

import copy
import math
import runpy
import subprocess
import sys

import pytest
import torch
from torch._dynamo.utils import counters

import pqn_abs_atari as pqn


def minibatch(size=96, num_actions=4, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    observations = torch.randint(0, 256, (size, 4, 84, 84), generator=generator, dtype=torch.uint8)
    actions = torch.randint(num_actions, (size,), generator=generator)
    weights = torch.rand(size, generator=generator)
    weights[::7] = 0  # reset steps
    tensors = observations, actions, torch.randn(size, generator=generator), weights / weights.sum()
    return [x.to(device) for x in tensors]


def gradients_and_logs(q_network, *batch, microbatch_size=1000):
    optimizer = torch.optim.SGD(q_network.parameters(), lr=0.0)
    logs = pqn.update(q_network, optimizer, *batch, max_grad_norm=math.inf, microbatch_size=microbatch_size)
    return torch.cat([p.grad.flatten() for p in q_network.parameters()]), logs


def relative_error(x, reference):
    return float((x - reference).detach().norm() / reference.detach().norm())


def fresh_network():
    torch.manual_seed(1)
    return pqn.QNetwork(4)


def test_microbatches_add_up_to_the_minibatch():
    """Also where the minibatch is no multiple of the microbatch."""
    batch = minibatch()
    plain, plain_logs = gradients_and_logs(fresh_network(), *batch)
    chunked, chunked_logs = gradients_and_logs(fresh_network(), *batch, microbatch_size=40)
    assert relative_error(chunked, plain) < 1e-4
    torch.testing.assert_close(chunked_logs, plain_logs, rtol=1e-4, atol=1e-5)


def test_samples_without_weight_do_not_count():
    """Reset steps: whatever stands in them, loss and gradient stay what they are."""
    observations, actions, returns, weights = minibatch()
    plain, plain_logs = gradients_and_logs(fresh_network(), observations, actions, returns, weights)
    observations[::7], returns[::7] = 0, 1e3
    other, other_logs = gradients_and_logs(fresh_network(), observations, actions, returns, weights)
    assert relative_error(other, plain) < 1e-5
    torch.testing.assert_close(other_logs, plain_logs)


def test_bfloat16_stays_near_float32():
    """Within 3 % of the Q-values and 10 % of the gradient (measured at initialisation: 0.7 % and 2 to 3 %)."""
    batch = minibatch()
    plain, _ = gradients_and_logs(fresh_network(), *batch)
    network = pqn.speed_up(fresh_network(), "bfloat16", torch.device("cpu"))
    rounded, _ = gradients_and_logs(network, *batch)
    assert 0 < relative_error(rounded, plain) < 0.1
    q_values = network(batch[0])
    assert q_values.dtype == torch.float32
    assert 0 < relative_error(q_values, fresh_network()(batch[0])) < 0.03


@pytest.mark.skipif(not pqn.compiler_is_there(torch.device("cpu")), reason="torch.compile needs a C++ compiler")
def test_compiled_equals_eager():
    """Same loss and gradient on the same data, same actions, in float32."""
    batch, device = minibatch(32), torch.device("cpu")
    eager, compiled = fresh_network(), pqn.speed_up(fresh_network(), "float32", torch.device("cpu"), use_compile=True)
    plain, plain_logs = gradients_and_logs(eager, *batch)
    fast, fast_logs = gradients_and_logs(compiled, *batch)
    assert relative_error(fast, plain) < 1e-3
    torch.testing.assert_close(fast_logs, plain_logs, rtol=1e-3, atol=1e-4)
    explore, random_actions = torch.arange(32, device=device) % 2 == 0, torch.full((32,), 3)
    with torch.no_grad():
        assert torch.equal(
            pqn.act(compiled, batch[0], explore, random_actions)[0], pqn.act(eager, batch[0], explore, random_actions)[0]
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need CUDA")
def test_cuda_graphs_equal_plain_steps():
    """Five updates each at two minibatch sizes in turn, plain and recorded, end at the same weights."""
    networks, device = [fresh_network().cuda()], torch.device("cuda")
    networks.append(copy.deepcopy(networks[0]))
    for q_network, graphed in zip(networks, (False, True), strict=True):
        optimizer = torch.optim.RAdam(
            q_network.parameters(), lr=torch.tensor(1e-3, device=device), foreach=True, capturable=True
        )

        def step(*batch, q_network=q_network, optimizer=optimizer):
            return pqn.update(q_network, optimizer, *batch, max_grad_norm=10.0, microbatch_size=1000)

        step = pqn.CUDAGraphed(step) if graphed else step
        for _ in range(5):
            for size in (96, 64):
                step(*minibatch(size, device=device))
    for plain, graphed in zip(*(network.parameters() for network in networks), strict=True):
        torch.testing.assert_close(graphed, plain, rtol=1e-3, atol=1e-4)


def final_storage(monkeypatch, tmp_path, *flags):
    """Runs the script in this process and returns its storage after the last rollout."""
    monkeypatch.chdir(tmp_path)
    arguments = "--env-id Breakout-v5 --num-envs 8 --rollout-length-min 8 --num-minibatches 4 --total-timesteps 800".split()
    arguments += "--max-episode-steps 30 --eval-episodes 0 --start-e 1 --end-e 1 --precision float32".split()
    monkeypatch.setattr(sys, "argv", ["pqn_abs_atari.py", *arguments, *flags])
    script = runpy.run_path(pqn.__file__, run_name="__main__")
    return {name: script[name] for name in "obs actions rewards terminations dones is_transition returns".split()}


def test_pools_collect_the_same_rollout(monkeypatch, tmp_path):
    """Games in two or four overlapped pools, or emulated by one thread: the same transitions in the same places."""
    plain = final_storage(monkeypatch, tmp_path, "--env-pools", "1")
    assert plain["dones"].any() and not plain["is_transition"].all() and plain["obs"].any()
    for flags in (["--env-pools", "2"], ["--env-pools", "4", "--env-threads", "1"]):
        overlapped = final_storage(monkeypatch, tmp_path, *flags)
        for name in plain.keys() - {"returns"}:
            assert torch.equal(plain[name], overlapped[name]), name
        # Values may differ in the last bits, since the network sees batches of another size.
        torch.testing.assert_close(overlapped["returns"], plain["returns"], rtol=1e-3, atol=1e-3)


MOVING = "--adapt-signal time --adapt-interval 1 --rollout-smoothing 1"  # another length at almost every iteration


def peak_memory(tmp_path, *flags):
    """Peak resident memory in MiB of a run of its own process."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    arguments = "--env-id Pong-v5 --num-envs 8 --num-minibatches 2 --total-timesteps 8000 --eval-episodes 0 --torch-threads 1"
    code = f"import resource, runpy, sys; sys.argv = {['script', *arguments.split(), *flags]}; "
    code += f"runpy.run_path({pqn.__file__!r}, run_name='__main__'); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    output = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    return int(output.splitlines()[-1]) / unit


@pytest.mark.skipif(sys.platform == "win32", reason="needs the resource module")
def test_many_lengths_do_not_grow_memory(tmp_path):
    """A run through 17 lengths, 215 MiB of rollouts, takes little more memory than one that always has the longest: the
    matrix library caches something per shape (measured: 60 to 90 MiB at 2,000 as well as at 20,000 steps)."""
    fixed = peak_memory(tmp_path, "--no-adapt-rollout", "--num-steps", "36")
    moving = peak_memory(tmp_path, "--rollout-length-min", "4", "--rollout-length-max", "36", *MOVING.split())
    assert moving < fixed + 140


@pytest.mark.skipif(not pqn.compiler_is_there(torch.device("cpu")), reason="torch.compile needs a C++ compiler")
def test_many_lengths_do_not_recompile(monkeypatch, tmp_path):
    """A run through 13 lengths compiles acting and learning a handful of times, not once per length."""
    flags = "--env-id Pong-v5 --num-envs 8 --num-minibatches 2 --rollout-length-min 4 --rollout-length-max 28 --compile"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["script", *flags.split(), *MOVING.split(), *"--total-timesteps 3000 --eval-episodes 0".split()]
    )
    torch._dynamo.reset()
    counters.clear()
    script = runpy.run_path(pqn.__file__, run_name="__main__")
    assert script["length"] >= 26
    assert 1 <= counters["stats"]["unique_graphs"] <= 6
