"""The training loop against its definition: EnvPool is recorded, and losses, divergence, KL and gradient noise scale are
computed anew from the record."""

import itertools
import math
from collections import Counter

import envpool
import numpy as np
import pytest
import torch
from conftest import DISTINCT, MODULES
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_ppo import explicit_advantages
from test_targets import forward_view
from torch.distributions import Categorical, kl_divergence

scripts = pytest.mark.parametrize("script", [name for name in DISTINCT if hasattr(MODULES[name], "q_lambda_returns")])
ppo_scripts = pytest.mark.parametrize(
    "script", [name for name in DISTINCT if hasattr(MODULES[name], "generalized_advantages")]
)
PLAIN = (
    "--num-envs 4 --update-epochs 1 --eval-episodes 0 --precision float32 --device cpu --env-pools 1 "
    "--torch-threads 1 --env-threads 1"
).split()


class Recorder:
    """An EnvPool that keeps what went in and out of it. With `paint`, a function of the observations' shape, it shows the
    script what that returns instead of the game."""

    def __init__(self, pool, options, paint=None):
        self.pool, self.options, self.paint = pool, options, paint
        self.observations, self.actions, self.rewards, self.terminations, self.dones = [], [], [], [], []

    def __getattr__(self, name):
        return getattr(self.pool, name)

    def reset(self):
        observations, info = self.pool.reset()
        observations = self.paint(observations.shape) if self.paint else observations
        self.observations.append(observations.copy())
        return observations, info

    def send(self, actions, env_ids=None):
        self.actions.append(actions.copy())
        self.pool.send(actions, env_ids)

    def recv(self):
        observations, rewards, terminated, truncated, info = self.pool.recv()
        assert (info["env_id"] == np.arange(4)).all()
        observations = self.paint(observations.shape) if self.paint else observations
        self.observations.append(observations.copy())
        self.rewards.append(rewards.copy())
        self.terminations.append(terminated | info["terminated"].astype(bool))
        self.dones.append(terminated | truncated | info["terminated"].astype(bool))
        return observations, rewards, terminated, truncated, info


@pytest.fixture
def record(run_here, monkeypatch, tmp_path):
    """Runs a script in this process; returns the record, the scalars and the trained network."""

    def record(script, *arguments, paint=None):
        recorders = []
        make = envpool.make
        with monkeypatch.context() as patch:
            patch.setattr(
                envpool, "make", lambda *a, **k: recorders.append(Recorder(make(*a, **k), k, paint)) or recorders[-1]
            )
            before = set(tmp_path.glob("runs/*"))
            minibatches = ("--num-minibatches", 2 if script == "gns_batch_atari.py" else 1)  # one has no noise scale
            result = run_here(script, *PLAIN, *minibatches, *arguments)
        assert result.returncode == 0, result.stderr
        (run_dir,) = set(tmp_path.glob("runs/*")) - before
        events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
        scalars = {name: [e.value for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
        network, _ = MODULES[script].load_model(run_dir / "model.pt", torch.device("cpu"))
        (recorder,) = recorders
        return recorder, scalars, network

    return record


@torch.no_grad()
def q_values_of(q_network, observations):
    """(steps, environments, actions) of recorded observations (steps, environments, 4, 84, 84)."""
    return torch.stack([q_network(torch.from_numpy(o)) for o in observations])


@scripts
@pytest.mark.parametrize("minibatches", [1, 2])
def test_loss_and_values_are_their_definition(script, minibatches, record):
    """With a learning rate too small to move the weights, every rollout's logged loss is the mean over its real transitions
    of (Q(s, a) - lambda-return)^2: no reset step among them, time limits bootstrapped, lost lives not, nothing shifted."""
    if script == "gns_batch_atari.py" and minibatches == 1:
        pytest.skip("one minibatch has no noise scale")
    options = "--env-id Breakout-v5 --episodic-life --max-episode-steps 45 --learning-rate 1e-14 --total-timesteps 2400"
    lengths = "--adapt-signal time --adapt-interval 1 --rollout-smoothing 1 --rollout-length-min 5 --rollout-length-max 24"
    settings = "--gamma", 0.9, "--q-lambda", 0.7, "--num-minibatches", minibatches
    recorder, scalars, q_network = record(script, *options.split(), *lengths.split(), *settings)
    q_values = q_values_of(q_network, recorder.observations)
    rewards, terminations, dones = (
        torch.from_numpy(np.array(x)) for x in (recorder.rewards, recorder.terminations, recorder.dones)
    )
    taken = q_values[:-1].gather(2, torch.from_numpy(np.array(recorder.actions)).long().unsqueeze(2)).squeeze(2)
    is_reset = torch.cat([torch.zeros(1, 4, dtype=torch.bool), dones[:-1]])
    assert rewards.any() and terminations.any() and (dones & ~terminations).any()
    begin = compared = 0
    for i, length in enumerate(map(int, scalars["abs/rollout_length"])):
        part = slice(begin, begin + length)
        next_values = q_values[begin + 1 : begin + length + 1].max(2).values
        returns = forward_view(rewards[part], terminations[part], dones[part], next_values, 0.9, 0.7)
        real = ~is_reset[part]
        begin += length
        if minibatches == 2 and not real.all():
            continue  # samples of the minibatch with more reset steps count more
        compared += 1
        loss = ((taken[part] - returns) ** 2)[real].mean()
        assert scalars["losses/td_loss"][i] == pytest.approx(float(loss), rel=1e-4)
        assert scalars["losses/q_values"][i] == pytest.approx(float(taken[part][real].mean()), rel=1e-4, abs=1e-6)
    assert begin == len(rewards) and len(set(scalars["abs/rollout_length"])) > 3 and compared > 5


def patches():
    """For `paint`: every observation another pattern of 7 x 7 patches, in the same order each time. An untrained network takes
    all states of a game for nearly the same and prefers one action in all of them; between these it tells."""
    rng = np.random.default_rng(0)
    return lambda shape: rng.integers(0, 256, (*shape[:2], 7, 7), dtype=np.uint8).repeat(12, 2).repeat(12, 3)


@pytest.mark.parametrize("script", DISTINCT)
def test_minibatches_are_random_divisions_of_the_rollout(script, record):
    """Every epoch goes once through the whole rollout, in an order of its own."""
    seen = []

    def keep(module, inputs):
        if torch.is_grad_enabled() and type(module).__name__ in ("QNetwork", "Agent"):
            seen.append([observation.tobytes() for observation in inputs[0].numpy()])

    options = "--no-adapt-rollout --num-steps 6 --num-minibatches 2 --update-epochs 2 --adapt-interval 9 --total-timesteps 24"
    hook = torch.nn.modules.module.register_module_forward_pre_hook(keep)
    try:
        recorder, *_ = record(script, *options.split(), paint=patches())
    finally:
        hook.remove()
    rollout = [observation.tobytes() for observation in np.concatenate(recorder.observations[:6])]
    assert [len(minibatch) for minibatch in seen] == [12] * 4
    orders = [[rollout.index(observation) for observation in a + b] for a, b in (seen[:2], seen[2:])]
    assert all(sorted(order) == list(range(24)) for order in orders)
    assert orders[0] != orders[1] and list(range(24)) not in orders


@pytest.mark.parametrize("script", DISTINCT)
def test_settings_reach_what_they_set(script, record, monkeypatch):
    """The games have the seeds of training, the time limit and the stickiness, the gradients the largest norm."""
    clip, norms = torch.nn.utils.clip_grad_norm_, []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, norm: norms.append(norm) or clip(p, norm))
    options = "--seed 7 --max-episode-steps 50 --sticky-action-probability 0.25 --episodic-life --max-grad-norm 0.125"
    recorder, *_ = record(script, *options.split(), *"--no-adapt-rollout --num-steps 4 --total-timesteps 32".split())
    asked = recorder.options
    assert asked["env_seed"] == MODULES[script].env_seeds(7, 4)
    assert (asked["max_episode_steps"], asked["repeat_action_probability"], asked["episodic_life"]) == (50, 0.25, True)
    assert len(norms) == (4 if script == "gns_batch_atari.py" else 2) and set(norms) == {0.125}


@scripts
def test_divergence_is_what_one_iteration_changed(script, record):
    """The logged divergence is the share of the rollout's real states whose greedy action differs before and after."""
    options = "--env-id Pong-v5 --max-episode-steps 9 --learning-rate 3e-3 --start-e 1 --end-e 1 --no-adapt-rollout".split()
    options += "--num-steps 30 --reference-batch-size 1000".split()
    *_, old = record(script, *options, "--total-timesteps", 120, "--learning-rate", 1e-14)  # the network at the start
    changes, everywhere = [], []
    for iterations in (1, 2, 3):
        steps = ("--adapt-interval", iterations, "--total-timesteps", 120 * iterations)
        recorder, scalars, new = record(script, *options, *steps, paint=patches())
        begin = 30 * (iterations - 1)
        dones = np.array([np.zeros(4, dtype=bool), *recorder.dones])
        real = torch.from_numpy(~dones[begin : begin + 30])
        states = recorder.observations[begin : begin + 30]
        changed = q_values_of(new, states).argmax(2) != q_values_of(old, states).argmax(2)
        assert len(scalars["abs/divergence"]) == 1 and not real.all()
        changes.append(scalars["abs/divergence"][0])
        assert scalars["abs/divergence"][-1] == pytest.approx(float(changed[real].float().mean()), abs=1e-6)
        everywhere.append(float(changed.float().mean()))
        old = new
    assert 0.02 < min(changes) and max(changes) < 0.98 and len({*changes, *everywhere}) == 6  # reset steps would show


@pytest.mark.parametrize("script", DISTINCT)
def test_reference_states_are_a_random_part_of_the_real_ones(script, record):
    """Old and new network are compared on the same --reference-batch-size states, drawn from the rollout without putting back
    and without reset steps; the next measurement draws anew."""
    batches = []

    def keep(module, inputs):  # only measurements look at 23 observations at once
        if inputs[0].shape == (23, 4, 84, 84) and type(module).__name__ in ("QNetwork", "Agent"):
            batches.append(inputs[0].numpy().copy())

    options = "--env-id Assault-v5 --max-episode-steps 9 --no-adapt-rollout --num-steps 30 --adapt-interval 1".split()
    hook = torch.nn.modules.module.register_module_forward_pre_hook(keep)
    try:
        recorder, _, _ = record(script, *options, "--reference-batch-size", 23, "--total-timesteps", 240)
    finally:
        hook.remove()
    assert len(batches) == 4
    drawn = []
    for i, (new, old) in enumerate((batches[:2], batches[2:])):
        assert (new == old).all()
        observations = np.stack(recorder.observations[30 * i : 30 * i + 30])
        is_reset = np.array([np.zeros(4, dtype=bool), *recorder.dones])[30 * i : 30 * i + 30]
        real = [state.tobytes() for state in observations[~is_reset]]  # in this game hardly two are equal
        resets = {state.tobytes() for state in observations[is_reset]}
        assert is_reset.any() and len(real) < 120 and not resets <= set(real)
        states = [state.tobytes() for state in new]
        assert not Counter(states) - Counter(real)
        assert set(states) - set(real[:46]) and set(states) - set(real[-46:])
        drawn.append([real.index(state) for state in states])
    assert drawn[0] != drawn[1]


@scripts
def test_actions_are_greedy_but_for_epsilon(script, record):
    """Without exploration every action is the greedy one, with epsilon 1 actions are uniformly random."""
    options = "--env-id Pong-v5 --learning-rate 1e-14 --no-adapt-rollout --num-steps 50 --total-timesteps 1200".split()
    recorder, _, q_network = record(script, *options, "--start-e", 0, "--end-e", 0)
    greedy = q_values_of(q_network, recorder.observations[:-1]).argmax(2)
    assert (greedy.numpy() == np.array(recorder.actions)).mean() > 0.99  # ties may break otherwise
    recorder, _, _ = record(script, *options, "--start-e", 1, "--end-e", 1)
    counts = np.bincount(np.array(recorder.actions).flatten(), minlength=6)
    assert len(counts) == 6 and counts.min() > 150 and counts.max() < 250  # 200 expected, standard deviation 13
    recorder, _, q_network = record(script, *options, "--start-e", 0.5, "--end-e", 0.5)  # drawn anew for every step and game
    greedy = q_values_of(q_network, recorder.observations[:-1]).argmax(2)
    explored = (greedy.numpy() != np.array(recorder.actions)).reshape(6, 50, 4)
    for share in (explored.mean(1), explored.mean((0, 2)).reshape(10, 5).mean(1)):
        assert 0.15 < share.min() and share.max() < 0.7  # 0.42 expected, standard deviation 0.07 and less
    assert explored.any(2).mean() > 0.75  # 0.88 expected, 0.48 if all games explored at once
    assert (explored[0] != explored[1]).mean() > 0.35  # 0.49 expected, 0.28 if all rollouts explored at the same steps


@pytest.fixture
def sharp_policy(monkeypatch):
    """PPO's policy starts almost uniform, which many a wrong policy is; here its first one has clear preferences."""
    orthogonal = torch.nn.init.orthogonal_
    monkeypatch.setattr(torch.nn.init, "orthogonal_", lambda weight, gain=1: orthogonal(weight, 10 if gain == 0.01 else gain))


@torch.no_grad()
def policy_and_values_of(agent, observations):
    """The policy over (steps, environments) and the values (steps, environments) of recorded observations."""
    logits, values = zip(*(agent(torch.from_numpy(o)) for o in observations), strict=True)
    return Categorical(logits=torch.stack(logits)), torch.stack(values)


def record_tensors(recorder):
    """rewards, terminations, dones, actions and is_reset of a record, all (steps, environments)."""
    names = ("rewards", "terminations", "dones", "actions")
    rewards, terminations, dones, actions = (torch.from_numpy(np.array(getattr(recorder, name))) for name in names)
    return rewards, terminations, dones, actions.long(), torch.cat([torch.zeros(1, 4, dtype=torch.bool), dones[:-1]])


@ppo_scripts
@pytest.mark.parametrize("minibatches", [1, 2])
def test_ppo_losses_are_their_definition(script, minibatches, record, sharp_policy):
    """With a learning rate too small to move the weights, ratios are 1, and every rollout's logged losses are means over its
    real transitions: policy loss minus the advantage, value loss half its square, entropy of the policy; time limits are
    bootstrapped, lost lives not, nothing shifted."""
    options = "--env-id Breakout-v5 --episodic-life --max-episode-steps 45 --learning-rate 1e-14 --total-timesteps 2400"
    lengths = "--adapt-signal time --adapt-interval 1 --rollout-smoothing 1 --rollout-length-min 5 --rollout-length-max 24"
    settings = "--gamma", 0.9, "--gae-lambda", 0.7, "--no-norm-adv", "--num-minibatches", minibatches
    recorder, scalars, agent = record(script, *options.split(), *lengths.split(), *settings)
    policy, values = policy_and_values_of(agent, recorder.observations)
    rewards, terminations, dones, _, is_reset = record_tensors(recorder)
    assert rewards.any() and terminations.any() and (dones & ~terminations).any()
    entropy, begin, compared = policy.entropy(), 0, 0
    assert entropy.mean() < 0.9 * math.log(4)
    for i, length in enumerate(map(int, scalars["abs/rollout_length"])):
        part, shifted = slice(begin, begin + length), slice(begin + 1, begin + length + 1)
        begin += length
        if minibatches == 2 and is_reset[part].any():
            continue  # samples of the minibatch with more reset steps count more
        compared += 1
        rollout = (rewards[part], values[part], terminations[part], dones[part], values[shifted])
        advantages = explicit_advantages(*rollout, 0.9, 0.7)[~is_reset[part]]
        assert scalars["losses/policy_loss"][i] == pytest.approx(-float(advantages.mean()), rel=1e-4, abs=1e-5)
        assert scalars["losses/value_loss"][i] == pytest.approx(float(advantages.square().mean()) / 2, rel=1e-4)
        assert scalars["losses/entropy"][i] == pytest.approx(float(entropy[part][~is_reset[part]].mean()), rel=1e-4)
    assert begin == len(rewards) and len(set(scalars["abs/rollout_length"])) > 3 and compared > 5
    assert max(map(abs, scalars["losses/approx_kl"])) < 1e-5 and max(scalars["losses/clipfrac"]) == 0


@ppo_scripts
def test_kl_is_what_one_iteration_moved(script, record, sharp_policy):
    """abs/kl is the mean KL(old || new) over the rollout's real states, abs/divergence the share of them whose most likely
    action differs, both between the networks before and after one iteration."""
    options = "--env-id MsPacman-v5 --max-episode-steps 5 --learning-rate 1e-4 --no-anneal-lr --no-adapt-rollout".split()
    options += "--num-steps 30 --reference-batch-size 1000 --update-epochs 3".split()
    *_, old = record(script, *options, "--total-timesteps", 120, "--learning-rate", 1e-14)  # the network at the start
    distances = []
    changes = []
    for iterations in (1, 2, 3):
        recorder, scalars, new = record(
            script, *options, "--adapt-interval", iterations, "--total-timesteps", 120 * iterations
        )
        begin = 30 * (iterations - 1)
        *_, is_reset = record_tensors(recorder)
        real, states = ~is_reset[begin : begin + 30], recorder.observations[begin : begin + 30]
        (new_policy, _), (old_policy, _) = (policy_and_values_of(agent, states) for agent in (new, old))
        kl = float(kl_divergence(old_policy, new_policy)[real].mean())
        changed = new_policy.logits.argmax(2) != old_policy.logits.argmax(2)
        assert len(scalars["abs/kl"]) == len(scalars["abs/divergence"]) == 1 and not real.all()
        changes.append(scalars["abs/divergence"][0])
        assert scalars["abs/kl"][-1] == pytest.approx(kl, rel=3e-4, abs=1e-7)
        assert scalars["abs/divergence"][-1] == pytest.approx(float(changed[real].float().mean()), abs=1e-6)
        everywhere = float(kl_divergence(old_policy, new_policy).mean())
        backward = float(kl_divergence(new_policy, old_policy)[real].mean())
        distances.append((abs(everywhere / kl - 1), abs(backward / kl - 1)))
        old = new
    assert max(changes) > 0
    assert min(map(max, zip(*distances, strict=True))) > 0.003, distances  # a wrong mean or direction would show


@ppo_scripts
def test_ppo_acts_as_its_policy(script, record, sharp_policy):
    """Actions are samples of the policy at the state before them: as often as it says, and as likely as it expects."""
    options = "--env-id Pong-v5 --learning-rate 1e-14 --no-adapt-rollout --num-steps 50 --total-timesteps 2000".split()
    recorder, _, agent = record(script, *options)
    policy, _ = policy_and_values_of(agent, recorder.observations[:-1])
    actions, n = record_tensors(recorder)[3], 2000
    assert actions.numel() == n and policy.entropy().mean() < 0.9 * math.log(6)
    counts = actions.flatten().bincount(minlength=6)
    expected, variance = policy.probs.sum((0, 1)), (policy.probs * (1 - policy.probs)).sum((0, 1))
    assert ((counts - expected).abs() < 4 * variance.sqrt() + 1).all(), (counts, expected)
    surprise, spread = policy.log_prob(actions) + policy.entropy(), (policy.probs * policy.logits**2).sum(2)
    deviation = (spread - policy.entropy() ** 2).clamp(min=0).sum().sqrt()
    assert abs(float(surprise.sum())) < 4 * float(deviation)


def sample_gradients(q_network, observations, actions, targets):
    """Gradient of every sample's squared error, (samples, parameters) in float64."""
    rows = []
    for observation, action, target in zip(observations, actions, targets, strict=True):
        q_network.zero_grad()
        (q_network(observation[None])[0, action] - target).square().backward()
        rows.append(torch.cat([p.grad.flatten() for p in q_network.parameters()]).double())
    return torch.stack(rows)


@scripts
def test_noise_scale_is_that_of_the_rollouts_minibatches(script, record):
    """gns/noise and gns/signal are those of some division of the rollout into disjoint equal minibatches, computed from the
    gradient of each sample; reset steps have no gradient and do not count as samples."""
    options = "--env-id Pong-v5 --max-episode-steps 9 --learning-rate 1e-14 --start-e 1 --end-e 1 --no-adapt-rollout".split()
    options += "--num-steps 2 --num-minibatches 2 --adapt-interval 1 --total-timesteps 48 --gamma 0.9 --q-lambda 0.7".split()
    options += ["--log-noise-scale"] * hasattr(MODULES[script].Args, "log_noise_scale")
    recorder, scalars, q_network = record(script, *options)
    next_values = q_values_of(q_network, recorder.observations[1:]).max(2).values
    rewards, terminations, dones, actions, is_reset = record_tensors(recorder)
    assert len(scalars["gns/noise"]) == len(scalars["gns/signal"]) == 6
    for i in range(6):
        part = slice(2 * i, 2 * i + 2)
        returns = forward_view(rewards[part], terminations[part], dones[part], next_values[part], 0.9, 0.7).float()
        observations = torch.from_numpy(np.array(recorder.observations[part])).flatten(0, 1)
        gradients = sample_gradients(q_network, observations, actions[part].flatten(), returns.flatten())
        real = ~is_reset[part].flatten()
        assert int(real.sum()) == (4 if i == 4 else 8)
        products, candidates, size = gradients @ gradients.T, [], float(real.sum()) / 2  # all that the norms need
        for first in itertools.combinations(range(8), 4):
            half = torch.zeros(8, dtype=torch.bool)
            half[list(first)] = True
            a, b = (part.double() / max(1, int(part.sum())) for part in (half & real, ~half & real))
            mean, difference = (a + b) / 2, a - b
            noise = size * float(difference @ products @ difference) / 2
            candidates.append((noise, float(mean @ products @ mean) - noise / (2 * size)))
        logged = scalars["gns/noise"][i], scalars["gns/signal"][i]
        errors = [max(abs(x - y) for x, y in zip(logged, c, strict=True)) / abs(c[0]) for c in candidates]
        assert min(errors) < 1e-3, (logged, candidates)
        assert sum(error < 0.01 for error in errors) <= 20  # of 70, each division twice: most are told apart
