"""The Q(lambda) returns against their forward-view definition."""

import pytest
import torch
from conftest import modules_with

scripts = pytest.mark.parametrize("script", modules_with("q_lambda_returns"))


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


def random_rollout(num_steps, num_envs, generator, end_share):
    """Rewards, terminations, dones and next values of a random rollout; about half of the ends are time limits."""
    rewards = torch.randint(-1, 2, (num_steps, num_envs), generator=generator).float()
    next_values = torch.randn((num_steps, num_envs), generator=generator) * 3
    dones = torch.rand((num_steps, num_envs), generator=generator) < end_share
    terminations = dones & (torch.rand((num_steps, num_envs), generator=generator) < 0.5)
    return rewards, terminations, dones, next_values


@scripts
@pytest.mark.parametrize("q_lambda", [0.0, 0.3, 0.65, 1.0])
def test_equals_the_weighted_sum_of_n_step_returns(script, q_lambda):
    """The backward recursion is the lambda-return, over random episodes that end, are cut off, or outlive the rollout."""
    generator = torch.Generator().manual_seed(0)
    for num_steps, num_envs in [(1, 1), (1, 5), (2, 3), (7, 4), (16, 8), (33, 3)]:
        for end_share in (0.0, 0.15, 0.6, 1.0):
            for gamma in (0.99, 0.5):
                rollout = random_rollout(num_steps, num_envs, generator, end_share)
                expected = forward_view(*rollout, gamma, q_lambda)
                returns = script.q_lambda_returns(*rollout, gamma, q_lambda)
                assert returns.shape == (num_steps, num_envs) and returns.dtype == torch.float32
                torch.testing.assert_close(returns.double(), expected, rtol=1e-5, atol=1e-5)


@scripts
def test_rewards_may_be_integers(script):
    """As an emulator gives them: the returns have fractions all the same."""
    rewards, *rollout = random_rollout(7, 4, torch.Generator().manual_seed(0), 0.15)
    for kind in (torch.int64, torch.int8):
        assert torch.equal(
            script.q_lambda_returns(rewards.to(kind), *rollout, 0.99, 0.65),
            script.q_lambda_returns(rewards, *rollout, 0.99, 0.65),
        )


@scripts
def test_known_returns(script):
    """Three steps by hand: gamma 0.5, lambda 0.5, values 4, 8, 16."""
    rewards, values = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[4.0], [8.0], [16.0]])
    none = torch.zeros((3, 1), dtype=torch.bool)
    middle = torch.tensor([[False], [True], [False]])
    returns = script.q_lambda_returns(rewards, none, none, values, 0.5, 0.5)
    assert returns.flatten().tolist() == [1 + 0.5 * (0.5 * 6.75 + 2), 2 + 0.5 * (0.5 * 11 + 4), 3 + 0.5 * 16]
    terminated = script.q_lambda_returns(rewards, middle, middle, values, 0.5, 0.5)
    assert terminated.flatten().tolist() == [1 + 0.5 * (0.5 * 2 + 2), 2, 11]
    truncated = script.q_lambda_returns(rewards, none, middle, values, 0.5, 0.5)
    assert truncated.flatten().tolist() == [1 + 0.5 * (0.5 * 6 + 2), 2 + 0.5 * 8, 11]


@scripts
def test_termination_cuts_the_bootstrap_and_truncation_does_not(script):
    """At an end the return is the reward alone, at a time limit it has the value of the state reached, whatever lambda is."""
    generator = torch.Generator().manual_seed(1)
    rewards, terminations, dones, values = random_rollout(40, 6, generator, 0.3)
    truncations = dones & ~terminations
    assert terminations.any() and truncations.any()
    for q_lambda in (0.0, 0.65, 1.0):
        returns = script.q_lambda_returns(rewards, terminations, dones, values, 0.9, q_lambda)
        torch.testing.assert_close(returns[terminations], rewards[terminations])
        torch.testing.assert_close(returns[truncations], (rewards + 0.9 * values)[truncations])


@scripts
@pytest.mark.parametrize("terminated", [True, False], ids=["termination", "truncation"])
def test_nothing_leaks_over_the_end_of_an_episode(script, terminated):
    """What happens after an end changes no return before it, and what one environment does changes no other's."""
    generator = torch.Generator().manual_seed(2)
    rewards, terminations, dones, values = random_rollout(20, 3, generator, 0.0)
    dones[9, 1], terminations[9, 1] = True, terminated
    before = script.q_lambda_returns(rewards, terminations, dones, values, 0.99, 0.65)
    rewards[10:, 1] += 1000
    values[10:, 1] -= 5000
    after = script.q_lambda_returns(rewards, terminations, dones, values, 0.99, 0.65)
    assert torch.equal(before[:10], after[:10])
    assert torch.equal(before[:, [0, 2]], after[:, [0, 2]])
    assert (before[10:, 1] != after[10:, 1]).all()


@scripts
def test_flags_may_be_bool_or_float(script):
    """Terminations and dones mean the same as bool, float or uint8 tensors, and no argument is changed in place."""
    rollout = random_rollout(12, 4, torch.Generator().manual_seed(3), 0.3)
    copies = [x.clone() for x in rollout]
    rewards, terminations, dones, values = rollout
    expected = script.q_lambda_returns(rewards, terminations, dones, values, 0.99, 0.65)
    for dtype in (torch.float32, torch.uint8):
        returns = script.q_lambda_returns(rewards, terminations.to(dtype), dones.to(dtype), values, 0.99, 0.65)
        assert torch.equal(returns, expected)
    assert all(torch.equal(a, b) for a, b in zip(rollout, copies, strict=True))
