"""The network: size, types, initialisation, what it computes, and that bfloat16 changes nothing that matters."""

import copy
from functools import partial

import pytest
import torch
from conftest import modules_with

scripts = pytest.mark.parametrize("script", modules_with("QNetwork"))
large_scripts = pytest.mark.parametrize("script", modules_with("MultiSkipMLP"))
ppo_scripts = pytest.mark.parametrize("script", modules_with("Agent"))
BLOCKS = {"pqn_l_abs_atari": 5, "pqn_xl_abs_atari": 10}
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


def features(layers, obs, with_layer_norm):
    """The features after three convolutions and a linear layer, written out with the layers' own weights."""
    functional, x = torch.nn.functional, obs / 255
    convolutions = [layer for layer in layers if isinstance(layer, torch.nn.Conv2d)]
    for layer, stride in zip(convolutions, (4, 2, 1), strict=True):
        x = functional.conv2d(x, layer.weight, layer.bias, stride)
        x = (functional.layer_norm(x, x.shape[1:]) if with_layer_norm else x).relu()
    linear = next(layer for layer in layers if isinstance(layer, torch.nn.Linear))
    x = functional.linear(x.flatten(1), linear.weight, linear.bias)
    return functional.layer_norm(x, (512,)) if with_layer_norm else x


@scripts
def test_q_values_written_out(script):
    """Every layer is followed by LayerNorm, the identity in its parameters at the start, and ReLU."""
    q_network, obs = network(script), frames(5)
    linears = [layer for layer in q_network.encoder.modules() if isinstance(layer, torch.nn.Linear)]
    with torch.no_grad():
        x = features(list(q_network.encoder), obs, True)
        if hasattr(script, "MultiSkipMLP"):  # the blocks have tests of their own
            x = multi_skip(q_network)(x)
            x = torch.nn.functional.linear(x, linears[-1].weight, linears[-1].bias)
            x = torch.nn.functional.layer_norm(x, (512,))
        expected = q_network.head(x.relu())
        torch.testing.assert_close(q_network(obs), expected, rtol=1e-3, atol=1e-3)


@ppo_scripts
def test_policy_and_value_written_out(script):
    """Every layer is followed by ReLU; there is no LayerNorm."""
    network, obs = agent(script), frames(5)
    with torch.no_grad():
        x = features(list(network.encoder), obs, False).relu()
        logits, values = network(obs)
        torch.testing.assert_close(logits, network.actor(x), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(values, network.critic(x).squeeze(1), rtol=1e-3, atol=1e-4)


@scripts
def test_bfloat16_is_close_to_float32(script):
    """The faster precision agrees on Q-values to 3 % and gradients to 10 %; weights and Q-values stay float32."""
    plain, obs = network(script), frames(32)
    fast = script.speed_up(copy.deepcopy(plain), "bfloat16", torch.device("cpu"))
    same = script.speed_up(copy.deepcopy(plain), "float32", torch.device("cpu"), memory_format="contiguous")
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


def multi_skip(q_network):
    (mlp,) = (m for m in q_network.modules() if hasattr(m, "blocks"))
    return mlp


@large_scripts
def test_number_of_blocks(script):
    """Five residual blocks in L and ten in XL, of 527,360 parameters each."""
    blocks = multi_skip(network(script)).blocks
    assert len(blocks) == BLOCKS[script.__name__]
    assert {sum(p.numel() for p in block.parameters()) for block in blocks} == {527_360}


@large_scripts
def test_every_block_adds_the_encoders_features(script):
    """With silent blocks N of them turn g into (N + 1) g; a block that speaks adds its output to that and nothing else."""
    mlp, g = multi_skip(network(script)), torch.randn(7, 512, generator=torch.Generator().manual_seed(0))
    n = len(mlp.blocks)
    silenced = copy.deepcopy(mlp)
    for block in silenced.blocks:
        torch.nn.init.zeros_(block[-1].weight)
    with torch.no_grad():
        torch.testing.assert_close(silenced(g), (n + 1) * g, rtol=1e-5, atol=1e-5)
        for i in (0, n - 1):
            torch.nn.init.ones_(silenced.blocks[i][-1].weight)
            added = mlp.blocks[i]((i + 1) * g)  # which sees h = (i + 1) g
            torch.testing.assert_close(silenced(g), (n + 1) * g + added, rtol=1e-4, atol=1e-4)
            torch.nn.init.zeros_(silenced.blocks[i][-1].weight)


@large_scripts
def test_blocks_are_chained(script):
    """h = h + LN(W2 relu(LN(W1 relu(h)))) + g, written out with the layers' own weights; inputs recorded block by block."""
    q_network = network(script)
    mlp, inputs, features = multi_skip(q_network), [], []
    mlp.register_forward_hook(lambda module, arguments, output: features.extend([arguments[0], output]))
    for block in mlp.blocks:
        block.register_forward_hook(lambda module, arguments, output: inputs.append(arguments[0]))
    functional = torch.nn.functional
    with torch.no_grad():
        q_network(frames(3))
        g, output = features
        h = g
        torch.testing.assert_close(g.std(1, unbiased=False), torch.ones(3), rtol=1e-3, atol=1e-3)  # normalised, no ReLU yet
        assert (g < 0).any() and len(inputs) == BLOCKS[script.__name__]
        for block, seen in zip(mlp.blocks, inputs, strict=True):
            torch.testing.assert_close(seen, h, rtol=1e-4, atol=1e-4)
            w1, w2 = (layer for layer in block if isinstance(layer, torch.nn.Linear))
            x = functional.layer_norm(functional.linear(h.relu(), w1.weight, w1.bias), (512,))
            h = h + functional.layer_norm(functional.linear(x.relu(), w2.weight, w2.bias), (512,)) + g
        torch.testing.assert_close(output, h, rtol=1e-4, atol=1e-4)


@large_scripts
def test_gradients_are_even_over_the_blocks(script):
    """At initialisation no block's gradient is ten times another's: the skips carry it to the first block and beyond."""
    q_network = network(script)
    backward(q_network, frames(16), torch.arange(16) % 4, torch.linspace(-3, 3, 16), 16)
    norms = [torch.cat([p.grad.flatten() for p in block.parameters()]).norm() for block in multi_skip(q_network).blocks]
    assert min(norms) > 0 and max(norms) / min(norms) < 10


@scripts
def test_q_values_are_not_normalised(script):
    """Q-values may have any level: the head is linear, and its bias moves them freely."""
    q_network, obs = network(script), frames(4)
    with torch.no_grad():
        before = q_network(obs)
        q_network.head.bias += 100
        torch.testing.assert_close(q_network(obs), before + 100, rtol=1e-5, atol=1e-3)
        q_network.head.weight *= 2
        torch.testing.assert_close(q_network(obs), 2 * before + 100, rtol=1e-5, atol=1e-3)


@large_scripts
def test_the_residual_stream_is_float32(script):
    """In a bfloat16 encoder the blocks compute in bfloat16 and their sum does not: what ten blocks add is not rounded away."""
    q_network = script.speed_up(network(script), "bfloat16", torch.device("cpu"))
    mlp, streams, products = multi_skip(q_network), [], []
    for block in mlp.blocks:
        block.register_forward_hook(lambda module, arguments, output: streams.append(arguments[0]))
        block[1].register_forward_hook(lambda module, arguments, output: products.append(output))
    mlp.register_forward_hook(lambda module, arguments, output: streams.append(output))
    with torch.no_grad():
        assert q_network(frames(2)).dtype == torch.float32
    assert {x.dtype for x in streams} == {torch.float32} and {x.dtype for x in products} == {torch.bfloat16}
    assert (streams[-1].bfloat16().float() != streams[-1]).float().mean() > 0.5


def agent(script, num_actions=4, seed=0):
    torch.manual_seed(seed)
    return script.Agent(num_actions)


@ppo_scripts
def test_agent_parameter_count(script):
    """CleanRL's network for Atari, counted by hand: three convolutions, a hidden layer, actor and critic."""
    convolutions = (4 * 8 * 8 + 1) * 32 + (32 * 4 * 4 + 1) * 64 + (64 * 3 * 3 + 1) * 64
    for num_actions in (4, 18):
        expected = convolutions + (64 * 7 * 7 + 1) * 512 + 513 * num_actions + 513
        assert sum(p.numel() for p in agent(script, num_actions).parameters()) == expected
    assert sum(p.numel() for p in agent(script, 4).parameters()) == 1_686_693


@ppo_scripts
def test_agent_initialisation(script):
    """Orthogonal weights of gain sqrt 2, in the actor 0.01 and in the critic 1, and zero biases: the first policy is almost
    uniform."""
    network, layers = agent(script), 0
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            gain = {network.actor: 0.01, network.critic: 1.0}.get(layer, 2**0.5)
            layers += 1
            weight = layer.weight.detach().double().flatten(1)
            gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
            torch.testing.assert_close(gram / gain**2, torch.eye(len(gram), dtype=torch.float64), rtol=0, atol=1e-4)
            assert (layer.bias == 0).all()
    assert layers == 6 and not any(isinstance(m, torch.nn.LayerNorm) for m in network.modules())
    policy = network(frames(16))[0].softmax(1)
    assert (policy - 0.25).abs().max() < 0.02


@ppo_scripts
def test_agent_outputs(script):
    """uint8 observations of any batch size give finite float32 logits and values, each sample its own, in bfloat16 as well;
    the heads are float32 whatever the encoder's precision."""
    plain, obs = agent(script, 6), frames(17)
    with torch.no_grad():
        logits, values = plain(obs)
        for n in (1, 2):
            part = plain(obs[:n])
            assert part[0].shape == (n, 6) and part[1].shape == (n,)
            torch.testing.assert_close(part, (logits[:n], values[:n]), rtol=1e-4, atol=1e-5)
        assert logits.dtype == values.dtype == torch.float32 and logits.isfinite().all() and values.isfinite().all()
        fast = script.speed_up(copy.deepcopy(plain), "bfloat16", torch.device("cpu"))(obs)
        for rounded, expected in zip(fast, (logits, values), strict=True):
            assert rounded.dtype == torch.float32
            assert 0 < (rounded - expected).norm() / expected.norm() < 0.03
            assert (rounded.bfloat16().float() != rounded).float().mean() > 0.9


@pytest.mark.parametrize("script", [s for s in modules_with("QNetwork") if not hasattr(s.values[0], "MultiSkipMLP")])
def test_update_clips_the_gradients_norm(script):
    """The step follows the gradient, scaled down to the largest norm where it is longer; logged is the norm before."""
    torch.manual_seed(0)
    network = script.QNetwork(3)
    batch = (
        torch.randint(256, (4, 4, 84, 84), dtype=torch.uint8),
        torch.tensor([0, 1, 2, 0]),
        torch.ones(4),
        torch.full((4,), 0.25),
    )
    for max_norm in (0.01, 1e6):
        script.compute_gradient(network, *batch, microbatch_size=4)
        gradient = torch.nn.utils.parameters_to_vector([p.grad for p in network.parameters()]).clone()
        before = torch.nn.utils.parameters_to_vector(network.parameters()).detach().clone()
        optimizer = torch.optim.SGD(network.parameters(), lr=1)
        gradient_step = partial(script.compute_gradient, network, microbatch_size=4)
        logs = script.update(network, optimizer, gradient_step, *batch, max_grad_norm=max_norm)
        step = torch.nn.utils.parameters_to_vector(network.parameters()).detach() - before
        norm = float(gradient.norm())
        assert 0.01 < norm < 1e6 and float(logs[-1]) == pytest.approx(norm, rel=1e-4)
        assert torch.allclose(step, -min(1, max_norm / norm) * gradient, atol=1e-4 * max_norm if max_norm < 1 else 1e-5)
