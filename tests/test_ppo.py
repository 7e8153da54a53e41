"""PPO's pieces against independent definitions: advantages, KL, acting, loss and gradient."""

import math
from functools import partial

import pytest
import torch
from conftest import modules_with
from test_targets import forward_view, random_rollout
from torch.distributions import Categorical, kl_divergence

scripts = pytest.mark.parametrize("script", modules_with("generalized_advantages", "kl_divergence"))


def explicit_advantages(rewards, values, terminations, dones, next_values, gamma, gae_lambda):
    """The advantage of every step as the sum of (gamma lambda)^(k - t) times the k-th TD error, up to the first end."""
    num_steps, num_envs = rewards.shape
    advantages = torch.zeros((num_steps, num_envs), dtype=torch.float64)
    for env in range(num_envs):
        for t in range(num_steps):
            for k in range(t, num_steps):
                bootstrap = 0.0 if terminations[k, env] else float(next_values[k, env])
                error = float(rewards[k, env]) + gamma * bootstrap - float(values[k, env])
                advantages[t, env] += (gamma * gae_lambda) ** (k - t) * error
                if dones[k, env]:
                    break
    return advantages


def rollout_with_values(num_steps, num_envs, generator, end_share):
    """rewards, values, terminations, dones and next_values; about half of the ends are time limits. The step after an end has
    a value of its own: no transition leads there."""
    rewards, terminations, dones, next_values = random_rollout(num_steps, num_envs, generator, end_share)
    values = torch.randn((num_steps, num_envs), generator=generator) * 3
    values[1:] = torch.where(dones[:-1], values[1:], next_values[:-1])
    return rewards, values, terminations, dones, next_values


@scripts
@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95, 1.0])
def test_advantages_are_discounted_sums_of_td_errors(script, gae_lambda):
    """The backward recursion is the explicit sum, and advantage plus value is the lambda-return, over random episodes that
    end, are cut off, or outlive the rollout."""
    generator = torch.Generator().manual_seed(0)
    for num_steps, num_envs in [(1, 1), (1, 5), (2, 3), (7, 4), (16, 8), (33, 3)]:
        for end_share in (0.0, 0.15, 0.6, 1.0):
            for gamma in (0.99, 0.5):
                rollout = rollout_with_values(num_steps, num_envs, generator, end_share)
                advantages = script.generalized_advantages(*rollout, gamma, gae_lambda)
                assert advantages.shape == (num_steps, num_envs) and advantages.dtype == torch.float32
                explicit = explicit_advantages(*rollout, gamma, gae_lambda)
                torch.testing.assert_close(advantages.double(), explicit, rtol=1e-5, atol=3e-5)
                rewards, values, *ends, next_values = rollout
                returns = forward_view(rewards, *ends, next_values, gamma, gae_lambda)
                torch.testing.assert_close((advantages + values).double(), returns, rtol=1e-5, atol=3e-5)


@scripts
def test_known_advantages(script):
    """Three steps by hand: gamma 0.5, lambda 0.5, values 2, 4, 8 and 16 at the end."""
    rewards, values, next_values = (torch.tensor(x).unsqueeze(1) for x in ([1.0, 2.0, 3.0], [2.0, 4.0, 8.0], [4.0, 8.0, 16.0]))
    none = torch.zeros((3, 1), dtype=torch.bool)
    middle = torch.tensor([[False], [True], [False]])
    # TD errors: 1 + 2 - 2 = 1, 2 + 4 - 4 = 2 (or 2 - 4 = -2 where step 1 terminates), 3 + 8 - 8 = 3; gamma lambda = 1 / 4
    advantages = script.generalized_advantages(rewards, values, none, none, next_values, 0.5, 0.5)
    assert advantages.flatten().tolist() == [1 + (2 + 3 / 4) / 4, 2 + 3 / 4, 3]
    advantages = script.generalized_advantages(rewards, values, middle, middle, next_values, 0.5, 0.5)
    assert advantages.flatten().tolist() == [1 - 2 / 4, -2, 3]
    advantages = script.generalized_advantages(rewards, values, none, middle, next_values, 0.5, 0.5)
    assert advantages.flatten().tolist() == [1 + 2 / 4, 2, 3]


@scripts
@pytest.mark.parametrize("terminated", [True, False], ids=["termination", "truncation"])
def test_reset_steps_do_not_reach_advantages(script, terminated):
    """As EnvPool stores it: the step after an end belongs to no episode, and nothing of it or after it changes what was
    before, but for the value of the last observation where a time limit cut the episode."""
    generator = torch.Generator().manual_seed(2)
    rewards, values, terminations, dones, _ = rollout_with_values(21, 3, generator, 0.0)
    dones[9, 1], terminations[9, 1], rewards[10, 1] = True, terminated, 0

    def advantages():
        shifted = values[1:]  # the loop's next_values: one more value than steps
        return script.generalized_advantages(rewards[:-1], values[:-1], terminations[:-1], dones[:-1], shifted, 0.99, 0.95)

    before = advantages()
    values[11:, 1] -= 5000
    rewards[10:, 1] += 1000
    after = advantages()
    assert torch.equal(before[:10], after[:10]) and torch.equal(before[:, [0, 2]], after[:, [0, 2]])
    assert (before[10:, 1] != after[10:, 1]).all()
    values[10, 1] += 100  # the value of the last observation
    assert torch.equal(before[:10], advantages()[:10]) == terminated
    if not terminated:
        assert advantages()[9, 1] - before[9, 1] == pytest.approx(99, rel=1e-4)


@scripts
def test_flags_may_be_bool_or_float(script):
    """Terminations and dones mean the same as bool, float or uint8 tensors, float64 stays float64, nothing is changed in
    place."""
    rollout = rollout_with_values(12, 4, torch.Generator().manual_seed(3), 0.3)
    copies = [x.clone() for x in rollout]
    rewards, values, terminations, dones, next_values = rollout
    expected = script.generalized_advantages(*rollout, 0.99, 0.95)
    for dtype in (torch.float32, torch.uint8):
        ends = terminations.to(dtype), dones.to(dtype)
        assert torch.equal(script.generalized_advantages(rewards, values, *ends, next_values, 0.99, 0.95), expected)
    exact = script.generalized_advantages(rewards.double(), values.double(), *rollout[2:4], next_values.double(), 0.99, 0.95)
    assert exact.dtype == torch.float64
    integers = rewards.round().long()
    whole, fractions = (script.generalized_advantages(r, *rollout[1:], 0.99, 0.95) for r in (integers, integers.float()))
    assert torch.equal(whole, fractions)
    torch.testing.assert_close(exact, explicit_advantages(*rollout, 0.99, 0.95), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(rollout, copies, strict=True))


@scripts
def test_kl_divergence(script):
    """The mean of KL(old || new) over the states, as torch.distributions has it, whatever is added to a state's logits."""
    generator = torch.Generator().manual_seed(0)
    for num_states, num_actions in [(1, 2), (7, 4), (300, 18)]:
        new, old = (3 * torch.randn((num_states, num_actions), generator=generator) for _ in range(2))
        expected = float(kl_divergence(Categorical(logits=old), Categorical(logits=new)).mean())
        backward = float(kl_divergence(Categorical(logits=new), Categorical(logits=old)).mean())
        assert script.kl_divergence(new, old) == pytest.approx(expected, rel=1e-5)
        assert type(script.kl_divergence(new, old)) is float
        assert abs(expected - backward) > 0.01 * expected or num_actions == 2  # so the direction shows
        shift = torch.randn((num_states, 1), generator=generator)
        assert script.kl_divergence(new + shift, old - shift) == pytest.approx(expected, rel=1e-4)
        assert script.kl_divergence(old, old.clone()) == 0


@scripts
def test_kl_divergence_has_a_direction(script):
    """KL(old || new) by hand: what the old policy does and the new one hardly ever does counts, not the reverse."""
    old, new = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.99, 0.01]]).log()
    assert script.kl_divergence(new, old) == pytest.approx(0.5 * math.log(0.5 / 0.99) + 0.5 * math.log(0.5 / 0.01), rel=1e-5)
    assert script.kl_divergence(old, new) == pytest.approx(0.99 * math.log(0.99 / 0.5) + 0.01 * math.log(0.01 / 0.5), rel=1e-5)


@scripts
@pytest.mark.parametrize("shapes", [((4, 3), (3, 3)), ((4, 3), (1, 3)), ((4, 3), (4, 1)), ((0, 3), (0, 3))], ids=str)
def test_kl_divergence_refuses_shapes_that_differ_or_are_empty(script, shapes):
    """Broadcasting would give a plausible wrong number, an empty mean NaN."""
    new, old = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError):
        script.kl_divergence(new, old)


class Fixed(torch.nn.Module):
    """A network that says the same whatever it sees."""

    def __init__(self, logits, value=0.5):
        super().__init__()
        self.logits, self.value = torch.tensor(logits), value

    def forward(self, x):
        return self.logits.repeat(len(x), 1), torch.full((len(x),), self.value)


@scripts
def test_actions_are_samples_of_the_policy(script):
    """With Gumbel noise every action has its softmax probability, to chance; log-probabilities and values are those of the
    policy."""
    probabilities, n = torch.tensor([0.5, 0.3, 0.15, 0.05]), 20000
    network = Fixed((probabilities.log() + 3).tolist())
    noise = script.gumbel_noise((n, 4), torch.Generator().manual_seed(0))
    actions, log_probs, values = script.act(network, torch.zeros(n, 4, 1, 1, dtype=torch.uint8), noise)
    assert actions.shape == log_probs.shape == values.shape == (n,) and actions.dtype == torch.int64
    counts = actions.bincount(minlength=4)
    chi_square = float(((counts - n * probabilities) ** 2 / (n * probabilities)).sum())
    assert len(counts) == 4 and chi_square < 21  # three degrees of freedom: beyond 21 once in ten thousand
    torch.testing.assert_close(log_probs, probabilities[actions].log(), rtol=1e-5, atol=1e-5)
    assert (values == 0.5).all()
    first, second = actions[: n // 2], actions[n // 2 :]  # samples do not follow one another: a table of pairs
    pairs = torch.stack([((first == a) & (second == b)).float().mean() for a in range(4) for b in range(4)]).view(4, 4)
    assert (pairs - torch.outer(probabilities, probabilities)).abs().max() < 4 * math.sqrt(0.25 * 0.75 / (n / 2))


@scripts
def test_gumbel_noise(script):
    """Mean 0.5772, variance pi^2 / 6, a generator's next draw each time, and always finite enough to choose by."""
    generator = torch.Generator().manual_seed(0)
    noise, again = script.gumbel_noise((200, 500), generator), script.gumbel_noise((200, 500), generator)
    assert noise.shape == (200, 500) and noise.dtype == torch.float32 and not noise.isnan().any()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.05)
    assert not torch.equal(noise, again)
    assert torch.equal(script.gumbel_noise((200, 500), torch.Generator().manual_seed(0)), noise)


@scripts
def test_actions_without_noise_are_greedy(script):
    """With zero noise the most likely action is taken, which is what --eval-greedy asks for."""
    actions, log_probs, _ = script.act(Fixed([0.1, 0.3, 0.2]), torch.zeros(5, 4, 1, 1, dtype=torch.uint8), torch.zeros(5, 3))
    assert actions.tolist() == [1] * 5
    torch.testing.assert_close(log_probs, torch.tensor([0.1, 0.3, 0.2]).log_softmax(0)[1].expand(5))


class TinyAgent(torch.nn.Module):
    """A network in float64, so that two ways to the same gradient agree to ten digits."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.encoder, self.actor, self.critic = torch.nn.Linear(6, 16), torch.nn.Linear(16, 5), torch.nn.Linear(16, 1)
        self.double()

    def forward(self, x):
        hidden = self.encoder(x).tanh()
        return self.actor(hidden), self.critic(hidden).squeeze(1)


def minibatch(size=64, seed=1):
    """Observations, actions, log-probabilities, advantages, returns, values of an older policy, and who is a transition."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((size, 6), generator=generator, dtype=torch.float64)
    actions = torch.randint(5, (size,), generator=generator)
    advantages, returns, noise = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(3))
    with torch.no_grad():
        logits, values = TinyAgent()(x)
    log_probs = logits.log_softmax(1).gather(1, actions.unsqueeze(1)).squeeze(1)
    values = values + 0.2 * torch.randn(size, generator=generator, dtype=torch.float64)
    is_transition = torch.rand(size, generator=generator) < 0.8
    return [x, actions, log_probs + 0.2 * noise, 2 * advantages + 1, returns, values], is_transition


def expected_terms(network, batch, is_transition, args):
    """PPO's loss as the paper and CleanRL write it, on the transitions alone: the loss, and what is logged."""
    x, actions, old_log_probs, advantages, returns, values = (t[is_transition] for t in batch)
    logits, new_values = network(x)
    policy = Categorical(logits=logits)
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std(unbiased=False) + 1e-8)
    ratio = torch.exp(policy.log_prob(actions) - old_log_probs)
    inside = torch.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    surrogate = torch.minimum(ratio * advantages, inside * advantages).mean()
    squared_error = (new_values - returns).square()
    if args.clip_vloss:
        near = torch.minimum(torch.maximum(new_values, values - args.clip_coef), values + args.clip_coef)
        squared_error = torch.maximum(squared_error, (near - returns).square())
    value_loss, entropy = squared_error.mean() / 2, policy.entropy().mean()
    share_clipped = ((ratio - 1).abs() > args.clip_coef).double().mean()
    approx_kl = (ratio - 1 - ratio.log()).mean()
    loss = -surrogate - args.ent_coef * entropy + args.vf_coef * value_loss
    return loss, torch.stack([-surrogate, value_loss, entropy, approx_kl, share_clipped]).detach()


def gradient(network):
    return torch.cat([p.grad.flatten() for p in network.parameters()])


VARIANTS = [
    {},
    {"norm_adv": False},
    {"clip_vloss": False},
    {"norm_adv": False, "clip_vloss": False},
    {"clip_coef": 0.3, "ent_coef": 0.5, "vf_coef": 2.0},
    {"ent_coef": 0.0},
]


@scripts
@pytest.mark.parametrize("microbatch_size", [1000, 64, 17, 1])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gradient_is_that_of_ppos_loss(script, variant, microbatch_size):
    """Ratio and value clipped, entropy bonus, advantages normalised over the transitions alone: gradient and logs equal
    those of a loss written down independently, in microbatches of any size."""
    args, network = script.Args(**variant), TinyAgent()
    batch, is_transition = minibatch()
    loss, terms = expected_terms(network, batch, is_transition, args)
    assert 0.1 < terms[4] < 0.9  # some ratios are clipped and some are not
    loss.backward()
    expected = gradient(network)
    weights = is_transition.double() / is_transition.sum()
    logs = script.compute_gradient(network, *batch, weights, args, microbatch_size)
    torch.testing.assert_close(gradient(network), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logs.double(), terms, rtol=1e-4, atol=1e-5)


@scripts
@pytest.mark.parametrize("variant", VARIANTS[:4], ids=str)
def test_samples_without_weight_do_not_count(script, variant):
    """Reset steps: whatever stands in them, gradient and logs stay what they are, advantage normalisation included."""
    batch, is_transition = minibatch()
    weights, args, results = is_transition.double() / is_transition.sum(), script.Args(**variant), []
    for disturbance in (0, 7):
        network = TinyAgent()
        changed = [t.clone() for t in batch]
        for t in (changed[0], *changed[3:]):
            t[~is_transition] += disturbance
        changed[1][~is_transition] = 0 if disturbance else changed[1][~is_transition]
        logs = script.compute_gradient(network, *changed, weights, args, 20)
        results.append((gradient(network), logs))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-9)


@scripts
def test_update_clips_the_gradients_norm(script):
    """One step goes along the gradient clipped to max_grad_norm, and the norm before clipping is logged last."""
    batch, is_transition = minibatch()
    weights = is_transition.double() / is_transition.sum()
    for max_grad_norm in (0.01, 1e6):
        network, args = TinyAgent(), script.Args()
        loss, terms = expected_terms(network, batch, is_transition, args)
        loss.backward()
        expected = gradient(network)
        before = torch.nn.utils.parameters_to_vector(network.parameters()).detach().clone()
        optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
        gradient_step = partial(script.compute_gradient, network, args=args, microbatch_size=30)
        logs = script.update(network, optimizer, gradient_step, *batch, weights, max_grad_norm=max_grad_norm)
        step = torch.nn.utils.parameters_to_vector(network.parameters()).detach() - before
        scale = min(1.0, max_grad_norm / float(expected.norm()))
        torch.testing.assert_close(step, -scale * expected, rtol=1e-4, atol=1e-8)
        assert len(logs) == len(script.LOSSES) and float(logs[-1]) == pytest.approx(float(expected.norm()), rel=1e-5)
        torch.testing.assert_close(logs[:5].double(), terms, rtol=1e-4, atol=1e-5)
        assert script.LOSSES == ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "grad_norm")
