"""The network: size, types, initialisation, and that micro-batches and bfloat16 change nothing that matters."""

import copy

import pytest
import torch
from conftest import modules_with

scripts = pytest.mark.parametrize("script", modules_with("QNetwork"))
PARAMETERS = {
    "pqn_abs_atari": 1_729_444,
    "gns_batch_atari": 1_729_444,
    "pqn_l_abs_atari": 6_495_044,
    "pqn_xl_abs_atari": 9_131_844,
}


def network(script, num_actions=4, seed=0):
    torch.manual_seed(seed)
    return script.QNetwork(num_actions)


def frames(n, seed=0):
    """Observations that look like games: flat areas and a few bright blocks, not noise alone."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (n, 4, 12, 12), generator=generator, dtype=torch.uint8)
    return coarse.repeat_interleave(7, 2).repeat_interleave(7, 3)


def gradients(q_network):
    return torch.cat([p.grad.flatten() for p in q_network.parameters()])


def backward(q_network, obs, actions, returns, chunk):
    """Accumulates the gradient of the mean squared error over all samples, chunk by chunk."""
    q_network.zero_grad()
    for i in range(0, len(obs), chunk):
        q = q_network(obs[i : i + chunk]).gather(1, actions[i : i + chunk, None]).squeeze(1)
        (((q - returns[i : i + chunk]) ** 2).sum() / len(obs)).backward()
    return gradients(q_network)


@scripts
def test_parameter_count(script):
    """The published architecture, to the last bias; each further action costs one row of the head."""
    count = sum(p.numel() for p in network(script, 4).parameters())
    assert count == PARAMETERS[script.__name__]
    assert sum(p.numel() for p in network(script, 18).parameters()) == count + 14 * 513


@scripts
def test_output_shape_and_type(script):
    """uint8 observations of any batch size give finite float32 Q-values that depend on the observation."""
    q_network = network(script, 6)
    for n in (1, 2, 17):
        q_values = q_network(frames(n))
        assert q_values.shape == (n, 6) and q_values.dtype == torch.float32 and q_values.isfinite().all()
    assert (q_values[0] != q_values[1]).any()
    extreme = torch.stack([torch.zeros(4, 84, 84, dtype=torch.uint8), torch.full((4, 84, 84), 255, dtype=torch.uint8)])
    assert q_network(extreme).isfinite().all()  # LayerNorm of constant images divides by almost nothing


@scripts
def test_initialisation(script):
    """Convolutions and linear layers are orthogonal with gain sqrt 2 and have zero biases; LayerNorms start as identity."""
    layers = 0
    for layer in network(script).modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            layers += 1
            weight = layer.weight.detach().double().flatten(1)
            gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
            torch.testing.assert_close(gram, 2 * torch.eye(len(gram), dtype=torch.float64), rtol=0, atol=1e-4)
            assert (layer.bias == 0).all()
        elif isinstance(layer, torch.nn.LayerNorm):
            assert (layer.weight == 1).all() and (layer.bias == 0).all()
    assert layers >= 5


@scripts
def test_pixels_count_from_0_to_1(script):
    """The first layer sees pixels / 255: an ordinary convolution of scaled pixels gives the same output and gradient."""
    first, obs = next(m for m in network(script).modules() if isinstance(m, torch.nn.Conv2d)), frames(4)
    plain = torch.nn.Conv2d(4, first.out_channels, 8, stride=4)
    plain.load_state_dict(first.state_dict())
    output, expected = first(obs), plain(obs / 255)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    output.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(first.weight.grad, plain.weight.grad, rtol=1e-3, atol=1e-2)


@scripts
def test_samples_do_not_mix(script):
    """A sample's Q-values do not depend on its companions, or micro-batches would not add up; no dropout, no batch norm."""
    q_network, obs = network(script), frames(8)
    with torch.no_grad():
        together = q_network(obs)
        torch.testing.assert_close(torch.cat([q_network(o[None]) for o in obs]), together, rtol=1e-4, atol=1e-5)
        changed = obs.clone()
        changed[1:] = 255 - changed[1:]
        torch.testing.assert_close(q_network(changed)[0], together[0], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(q_network(changed)[1:], together[1:], rtol=1e-2)
        q_network.eval()
        torch.testing.assert_close(q_network(obs), together, rtol=1e-5, atol=1e-6)


@scripts
def test_micro_batches_accumulate_to_the_full_gradient(script):
    """Chunks of any size, also one that does not divide the minibatch, give the gradient of the whole minibatch."""
    q_network, obs = network(script), frames(24)
    actions, returns = torch.arange(24) % 4, torch.linspace(-3, 3, 24)
    full = backward(q_network, obs, actions, returns, 24)
    assert full.norm() > 0
    for chunk in (8, 7, 1):
        torch.testing.assert_close(backward(q_network, obs, actions, returns, chunk), full, rtol=1e-3, atol=1e-5 * full.norm())


@scripts
def test_bfloat16_is_close_to_float32(script):
    """The faster precision agrees on Q-values to 3 % and gradients to 10 %; weights and Q-values stay float32."""
    plain, obs = network(script), frames(32)
    fast = script.speed_up(copy.deepcopy(plain), "bfloat16", torch.device("cpu"))
    same = script.speed_up(copy.deepcopy(plain), "float32", torch.device("cpu"))
    with torch.no_grad():
        expected, q_values = plain(obs), fast(obs)
        assert torch.equal(same(obs), expected)
    assert q_values.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in fast.parameters())
    assert not torch.equal(q_values, expected)  # or this test compares float32 with itself
    assert (q_values - expected).norm() / expected.norm() < 0.03
    # the head itself is float32: Q-values need more digits than bfloat16 has, or they tie
    assert (q_values.bfloat16().float() != q_values).float().mean() > 0.9

    actions, returns = torch.arange(32) % 4, torch.linspace(-3, 3, 32)
    full, approximate = backward(plain, obs, actions, returns, 32), backward(fast, obs, actions, returns, 8)
    assert (approximate - full).norm() / full.norm() < 0.1
    assert torch.nn.functional.cosine_similarity(approximate, full, dim=0) > 0.995
