"""The networks written out by hand, their losses, and the gradient that Workers assemble from parts of a minibatch."""

import contextlib
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import MODULES, modules_with
from torch.distributions import Categorical

all_scripts = pytest.mark.parametrize("script", modules_with("Workers"))
large_scripts = pytest.mark.parametrize("script", modules_with("MultiSkipMLP"))
distinct_scripts = pytest.mark.parametrize("script", [m for m in modules_with("Workers") if "l_abs" not in m.id])
ppo_scripts = pytest.mark.parametrize("script", modules_with("ppo_loss"))
PARAMETERS = dict(zip(MODULES, (1_729_444, 6_495_044, 9_131_844, 1_686_693, 1_729_444), strict=True))
BLOCKS = {"pqn_l_abs_atari": 5, "pqn_xl_abs_atari": 10}
CPU = torch.device("cpu")


def network_of(script, num_actions=4, precision=torch.float32):
    torch.manual_seed(0)
    return (script.Agent if hasattr(script, "Agent") else script.QNetwork)(num_actions, precision)


def frames(n, seed=0):
    """Observations that look like games: flat areas and a few bright blocks, not noise alone."""
    coarse = torch.randint(0, 256, (n, 4, 12, 12), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return coarse.repeat_interleave(7, 2).repeat_interleave(7, 3)


def layers(network, kind):
    return [layer for layer in network.modules() if isinstance(layer, kind)]


def flat_gradient(network):
    return torch.cat([p.grad.flatten() for p in network.parameters()])


@all_scripts
def test_parameters_and_outputs(script):
    """The published architecture; float32 outputs for bytes."""
    network, obs = network_of(script), frames(9)
    count = sum(p.numel() for p in network.parameters())
    assert count == PARAMETERS[f"{script.__name__}.py"]
    assert sum(p.numel() for p in network_of(script, 18).parameters()) == count + 14 * 513
    together = network(obs)
    assert together.shape == (9, 4 + hasattr(script, "Agent")) and together.dtype == torch.float32


@all_scripts
def test_outputs_written_out(script):
    """Pixels / 255, three convolutions and a linear layer, each followed by LayerNorm (not in PPO) and ReLU; the multi-skip
    MLP h = h + LN(W2 relu(LN(W1 relu(h)))) + g of the large networks; linear heads that nothing normalises. The parameters of
    the norms are random here, so that one in the wrong place or layout shows."""
    network, obs = network_of(script), frames(5)
    for norm in layers(network, torch.nn.LayerNorm):
        torch.nn.init.normal_(norm.weight, 1, 0.2), torch.nn.init.normal_(norm.bias, 0, 0.2)
    norms, linears = iter(layers(network, torch.nn.LayerNorm)), iter(layers(network, torch.nn.Linear))

    def normalized(x):
        if hasattr(script, "Agent"):
            return x
        norm = next(norms)
        return F.layer_norm(x, x.shape[1:], norm.weight, norm.bias)

    def linear(x):
        layer = next(linears)
        return F.linear(x, layer.weight, layer.bias)

    with torch.no_grad():
        x = obs / 255
        for layer, stride in zip(layers(network, torch.nn.Conv2d), (4, 2, 1), strict=True):
            x = normalized(F.conv2d(x, layer.weight, layer.bias, stride)).relu()
        x = normalized(linear(x.flatten(1)))
        if blocks := BLOCKS.get(script.__name__):
            h = g = x
            for _ in range(blocks):
                h = h + normalized(linear(normalized(linear(h.relu())).relu())) + g
            x = normalized(linear(h))
        heads = [linear(x.relu()) for _ in (range(2) if hasattr(script, "Agent") else range(1))]
        assert next(norms, None) is next(linears, None) is None
        torch.testing.assert_close(network(obs), torch.cat(heads, 1), rtol=1e-3, atol=2e-3)


def minibatch(script, n=41):
    """Network, and a loss over n of 50 samples, some of which are reset steps without weight, as the loop has it."""
    network, generator = network_of(script), torch.Generator().manual_seed(1)
    actions, inds = torch.randint(4, (50,), generator=generator), torch.randperm(50, generator=generator)[:n]
    returns, advantages, log_probs, values = torch.randn((4, 50), generator=generator)
    weights = (torch.rand(50, generator=generator) < 0.8).float()
    weights = weights / weights[inds].sum()
    if hasattr(script, "Agent"):
        batch = (frames(50), actions, log_probs.abs().neg(), advantages, returns, values, weights)
        return network, batch, partial(script.ppo_loss, network, script.Args(), batch), inds
    batch = (frames(50), actions, returns, weights)
    return network, batch, partial(script.td_loss, network, batch), inds


@distinct_scripts
@pytest.mark.parametrize("cores", [1, 2, 3])
def test_gradients_of_parts_add_up(script, cores):
    """Workers of any number of cores set the gradient of the whole minibatch's loss, and the same logs, bit for bit the same
    each time; what a gradient held before, and what reset steps hold, does not count."""
    network, batch, loss_of, inds = minibatch(script)
    parameters = list(network.parameters())
    loss, logs = loss_of(inds)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    workers, parts, results = script.Workers(CPU, cores), [], []

    def recorded_loss(part):
        parts.append(len(part))
        return loss_of(part)

    for p in parameters:
        p.grad = torch.full_like(p, 7.0)
    for _ in range(3):
        results.append((workers.gradient(recorded_loss, parameters, inds), flat_gradient(network)))
    assert len(parts) == 3 * cores and sum(parts) == 3 * len(inds) and max(parts) - min(parts) <= 1
    torch.testing.assert_close(results[0], (logs, expected), rtol=1e-4, atol=1e-6)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))
    batch[0][batch[-1] == 0] = 0
    for tensor in batch[2:-1]:
        tensor[batch[-1] == 0] = 100.0
    changed = workers.gradient(loss_of, parameters, inds)
    torch.testing.assert_close((changed, flat_gradient(network)), (logs, expected), rtol=1e-4, atol=1e-6)
    for tensor in parameters:
        assert tensor.grad.is_contiguous()


def written_ppo_loss(outputs, args, actions, log_probs, advantages, returns, values):
    """PPO's loss with torch.distributions, as the paper and CleanRL have it, means over samples; and what is logged."""
    policy, new_values = Categorical(logits=outputs[:, :-1]), outputs[:, -1]
    ratio = torch.exp(policy.log_prob(actions) - log_probs)
    inside = torch.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    surrogate = torch.minimum(ratio * advantages, inside * advantages).mean()
    squared_error = (new_values - returns).square()
    if args.clip_vloss:
        near = torch.minimum(torch.maximum(new_values, values - args.clip_coef), values + args.clip_coef)
        squared_error = torch.maximum(squared_error, (near - returns).square())
    value_loss, entropy = squared_error.mean() / 2, policy.entropy().mean()
    clipped = ((ratio - 1).abs() > args.clip_coef).to(ratio.dtype).mean()
    loss = -surrogate - args.ent_coef * entropy + args.vf_coef * value_loss
    return loss, [-surrogate, value_loss, entropy, (ratio - 1 - ratio.log()).mean(), clipped]


VARIANTS = [{}, {"clip_vloss": False}, {"clip_coef": 0.3, "ent_coef": 0.5, "vf_coef": 2.0}, {"ent_coef": 0.0}]


@ppo_scripts
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_ppos_loss_and_gradient(script, variant):
    """Loss, logs and gradient equal those of the written loss, on the transitions alone."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 6)).double()
    args, generator = script.Args(**variant), torch.Generator().manual_seed(1)
    x = torch.randn((64, 6), generator=generator, dtype=torch.float64)
    actions = torch.randint(5, (64,), generator=generator)
    advantages, returns, *noise = torch.randn((4, 64), generator=generator, dtype=torch.float64)
    with torch.no_grad():
        outputs = network(x)
    log_probs = Categorical(logits=outputs[:, :-1]).log_prob(actions) + 0.2 * noise[0]
    values = outputs[:, -1] + 0.2 * noise[1]
    weights = (torch.rand(64, generator=generator) < 0.8).double()
    weights /= weights.sum()
    batch = (x, actions, log_probs, 2 * advantages + 1, returns, values, weights)
    loss, logs = script.ppo_loss(network, args, batch, torch.arange(64))

    x, *rest = (t[weights > 0] for t in batch[:-1])
    expected, terms = written_ppo_loss(network(x), args, *rest)
    terms = torch.stack(terms).detach()
    assert 0.1 < terms[-1] < 0.9  # some ratios are clipped and some are not
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logs.double(), terms, rtol=1e-4, atol=1e-5)
    gradients = (torch.cat([g.flatten() for g in torch.autograd.grad(y, network.parameters())]) for y in (loss, expected))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@all_scripts
def test_no_tensor_is_left_on_the_cpu(script, monkeypatch):
    """Acting and one update on another device, meta, on which nothing is computed and where a tensor of the CPU fails."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **options: contextlib.nullcontext())  # which meta does not have
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    meta = torch.device("meta")
    _, batch, *_ = minibatch(script)
    batch, network, workers = [x.to(meta) for x in batch], network_of(script).to(meta), script.Workers(meta, 1)
    parameters = list(network.parameters())
    loss_of = (
        partial(script.ppo_loss, network, script.Args()) if hasattr(script, "Agent") else partial(script.td_loss, network)
    )
    logs = workers.gradient(partial(loss_of, batch), parameters, torch.randperm(50, device=meta)[:41])
    torch.optim.RAdam(parameters, foreach=True).step()
    assert {workers.forward(network, batch[0]).device, logs.device, *(p.grad.device for p in parameters)} == {meta}
