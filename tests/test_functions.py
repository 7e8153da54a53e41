"""The pure functions against their definitions: targets, advantages, divergence, KL, target length, noise scale."""

import math

import pytest
import torch
from conftest import modules_with
from torch.distributions import Categorical, kl_divergence

pqn_scripts = pytest.mark.parametrize("script", modules_with("q_lambda_returns"))
ppo_scripts = pytest.mark.parametrize("script", modules_with("generalized_advantages"))
gns_scripts = pytest.mark.parametrize("script", modules_with("gradient_noise_scale"))
all_scripts = pytest.mark.parametrize("script", modules_with("behavioral_divergence", "target_rollout_length"))
PUBLISHED = (16, 64, 0.05, 0.95)  # L_min, L_max, delta_min, delta_max


def forward_view(rewards, terminations, dones, next_values, gamma, q_lambda):
    """The lambda-return of every step as an explicit weighted sum of n-step returns, in plain Python floats.

    From step t of an environment there are n-step returns for n = 1 .. N, where step t + N - 1 is the last of the episode
    or of the rollout. The n-th has weight (1 - lambda) lambda^(n - 1), the last one has all the weight that is left.
    """
    num_steps, num_envs = rewards.shape
    returns = torch.zeros((num_steps, num_envs), dtype=torch.float64)
    for env in range(num_envs):
        r, v = rewards[:, env].tolist(), next_values[:, env].tolist()
        terminated, done = terminations[:, env].tolist(), dones[:, env].tolist()
        for t in range(num_steps):
            last = next((k for k in range(t, num_steps) if done[k]), num_steps - 1)
            total = 0.0
            for k in range(t, last + 1):
                n_step = sum(gamma ** (i - t) * r[i] for i in range(t, k + 1))
                if not terminated[k]:
                    n_step += gamma ** (k + 1 - t) * v[k]
                total += q_lambda ** (k - t) * (1.0 if k == last else 1 - q_lambda) * n_step
            returns[t, env] = total
    return returns


def random_rollouts():
    """Rewards, terminations, dones and next values of random rollouts, whose episodes end, are cut off or outlive them."""
    generator = torch.Generator().manual_seed(0)
    for shape in [(1, 1), (1, 5), (2, 3), (7, 4), (16, 8), (33, 3)]:
        for end_share in (0.0, 0.15, 0.6, 1.0):
            rewards = torch.randint(-1, 2, shape, generator=generator).float()
            dones = torch.rand(shape, generator=generator) < end_share
            terminations = dones & (torch.rand(shape, generator=generator) < 0.5)
            yield rewards, terminations, dones, torch.randn(shape, generator=generator) * 3


@pqn_scripts
@pytest.mark.parametrize("q_lambda", [0.0, 0.3, 0.65, 1.0])
def test_returns_are_the_weighted_sum_of_n_step_returns(script, q_lambda):
    """The backward recursion is the lambda-return, and changes no argument in place."""
    for rollout in random_rollouts():
        copies = [x.clone() for x in rollout]
        for gamma in (0.99, 0.5):
            returns = script.q_lambda_returns(*rollout, gamma, q_lambda)
            assert returns.shape == rollout[0].shape and returns.dtype == torch.float32
            torch.testing.assert_close(returns.double(), forward_view(*rollout, gamma, q_lambda), rtol=1e-5, atol=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(rollout, copies, strict=True))


@ppo_scripts
@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95, 1.0])
def test_advantages_are_returns_less_values(script, gae_lambda):
    """Advantage plus value is the lambda-return. The step after an end has a value of its own: no transition leads there."""
    generator = torch.Generator().manual_seed(1)
    for rewards, terminations, dones, next_values in random_rollouts():
        values = torch.randn(rewards.shape, generator=generator) * 3
        values[1:] = torch.where(dones[:-1], values[1:], next_values[:-1])
        for gamma in (0.99, 0.5):
            advantages = script.generalized_advantages(rewards, values, terminations, dones, next_values, gamma, gae_lambda)
            assert advantages.shape == rewards.shape and advantages.dtype == torch.float32
            returns = forward_view(rewards, terminations, dones, next_values, gamma, gae_lambda)
            torch.testing.assert_close((advantages + values).double(), returns, rtol=1e-5, atol=3e-5)


@all_scripts
def test_divergence_of_known_actions(script):
    """The share of states whose greedy action changed, an exact Python float, whatever the size of the change."""
    old = torch.arange(9) % 4
    for changed in range(10):
        divergence = script.behavioral_divergence(old + 7 * (torch.arange(9) < changed), old)
        assert divergence == changed / 9 and type(divergence) is float  # not rounded to float32


@all_scripts
@pytest.mark.parametrize("schedule", ["log", "linear", "exp"])
def test_target_falls_from_the_longest_to_the_shortest(script, schedule):
    """L_max at delta_min and below, 0 included, L_min at delta_max and above, strictly falling floats in between."""
    for divergence, length in [(0.0, 64), (1e-9, 64), (0.049, 64), (0.05, 64), (0.95, 16), (0.951, 16), (1.0, 16)]:
        assert script.target_rollout_length(divergence, *PUBLISHED, schedule) == pytest.approx(length, abs=1e-12)
    targets = [script.target_rollout_length(0.05 + 0.9 * i / 200, *PUBLISHED, schedule) for i in range(201)]
    assert all(a > b for a, b in zip(targets, targets[1:], strict=False)) and {type(target) for target in targets} == {float}


@all_scripts
def test_target_in_the_middle(script):
    """Half way lies at the geometric mean for log (the default) and at the arithmetic mean for linear; exp falls late."""
    geometric, arithmetic = math.sqrt(0.05 * 0.95), (0.05 + 0.95) / 2
    assert script.target_rollout_length(geometric, *PUBLISHED) == pytest.approx(40, abs=1e-9)
    assert script.target_rollout_length(arithmetic, *PUBLISHED, "linear") == pytest.approx(40, abs=1e-9)
    exp = 64 - 48 * (math.exp(0.5) - 1) / (math.e - 1)
    assert script.target_rollout_length(arithmetic, *PUBLISHED, "exp") == pytest.approx(exp, abs=1e-9)
    a = math.log(0.2 / 0.05) / math.log(0.95 / 0.05)
    assert script.target_rollout_length(0.2, 16, 128, 0.05, 0.95, "log") == pytest.approx(128 - a * 112, abs=1e-9)


@ppo_scripts
def test_kl_divergence(script):
    """The mean of KL(old || new) over the states, as torch.distributions has it, whatever is added to a state's logits."""
    generator = torch.Generator().manual_seed(0)
    for num_states, num_actions in [(1, 2), (7, 4), (300, 18)]:
        new, old = (3 * torch.randn((num_states, num_actions), generator=generator) for _ in range(2))
        expected = float(kl_divergence(Categorical(logits=old), Categorical(logits=new)).mean())
        assert script.kl_divergence(new, old) == pytest.approx(expected, rel=1e-5)
        assert script.kl_divergence(new + 3, old - 4) == pytest.approx(expected, rel=1e-4)
        assert script.kl_divergence(old, old.clone()) == 0 and type(script.kl_divergence(new, old)) is float
    # The direction, by hand: what the old policy does and the new one hardly ever does counts, not the reverse
    old, new = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.99, 0.01]]).log()
    assert script.kl_divergence(new, old) == pytest.approx(0.5 * math.log(0.5 / 0.99) + 0.5 * math.log(0.5 / 0.01), rel=1e-5)


@gns_scripts
@pytest.mark.parametrize("num_groups, group_size", [(2, 8), (4, 32), (32, 1)])
def test_noise_and_signal_are_unbiased(script, num_groups, group_size):
    """Over many draws of synthetic gradients their means are the trace of one sample's covariance and the squared norm of the
    expected gradient, within four standard errors; the squared norm of the mean gradient, which is biased, is not."""
    expected, deviation = torch.linspace(-0.5, 1, 10).double(), torch.linspace(0.2, 3, 10).double()
    true_noise, true_signal = float(deviation.square().sum()), float(expected.square().sum())
    draws = torch.randn((4000, num_groups, 10), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = expected + deviation * draws / math.sqrt(group_size)
    estimates = torch.tensor([script.gradient_noise_scale(g, group_size) for g in gradients], dtype=torch.float64)
    error = 4 * estimates.std(0) / math.sqrt(len(estimates))
    assert abs(float(estimates[:, 0].mean()) - true_noise) < error[0] < 0.1 * true_noise
    assert abs(float(estimates[:, 1].mean()) - true_signal) < error[1]
    assert abs(float(gradients.mean(1).square().sum(1).mean()) - true_signal) > 2 * error[1]


@gns_scripts
@pytest.mark.parametrize("noise, signal, length", [(3201.9, 1, 3201 / 128), (2047.9, 1, 16), (8192.9, 1, 64), (1, -1, 64)])
def test_length_is_the_noise_scale_over_the_environments(script, noise, signal, length):
    """B_simple, rounded down to whole samples, over 128 environments, within [16, 64]; as long as allowed without a signal."""
    assert script.noise_scale_rollout_length(noise, signal, 128, 16, 64) == length
