"""The training loop against its definition: EnvPool is recorded, and losses, divergence, KL, noise scale and rollout lengths
are computed anew from the record and from the checkpoints."""

import itertools
import math
from collections import Counter

import envpool
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DISTINCT, MODULES, scalars
from test_functions import forward_view
from test_network import written_ppo_loss
from torch.distributions import Categorical, kl_divergence

PQN, PPO, GNS = DISTINCT
PLAIN = (
    "--num-envs 4 --eval-episodes 0 --precision float32 --device cpu --torch-threads 1 --env-threads 1 --num-minibatches 2 "
    "--update-epochs 1"
).split()


def patches():
    """For `paint`: every observation another pattern of 7 x 7 patches, in the same order each time."""
    rng = np.random.default_rng(0)
    return lambda obs: rng.integers(0, 256, (*obs.shape[:2], 7, 7), dtype=np.uint8).repeat(12, 2).repeat(12, 3)


class Recorder:
    """An EnvPool that keeps what goes in and out of it."""

    def __init__(self, pool, options, paint, points):
        self.pool, self.options, self.paint, self.points = pool, options, paint, points
        self.obs, self.actions, self.rewards, self.terminations, self.dones = [], [], [], [], []

    def __getattr__(self, name):
        return getattr(self.pool, name)

    def reset(self):
        self.obs.append(self.paint(self.pool.reset()[0]))
        return self.obs[-1], {}

    def send(self, actions, env_ids=None):
        self.actions.append(actions.copy())
        self.pool.send(actions, env_ids)

    def recv(self):
        obs, rewards, terminated, truncated, info = self.pool.recv()
        assert (info["env_id"] == np.arange(len(obs))).all()
        rewards = self.points(rewards)
        self.obs.append(self.paint(obs))
        self.rewards.append(rewards.copy())
        self.terminations.append(terminated | info["terminated"].astype(bool))
        self.dones.append(self.terminations[-1] | truncated)
        return self.obs[-1], rewards, terminated, truncated, info


class Run:
    """What went through EnvPool, tensors (steps, environments, ...), and what the run left behind."""

    def __init__(self, script, recorder, run_dir, batches):
        self.module, self.recorder, self.run_dir, self.batches = MODULES[script], recorder, run_dir, batches
        kept = (recorder.obs, recorder.actions, recorder.rewards, recorder.terminations, recorder.dones)
        self.obs, self.actions, self.rewards, self.terminations, self.dones = (torch.from_numpy(np.array(x)) for x in kept)
        self.is_reset = torch.cat([torch.zeros_like(self.dones[:1]), self.dones[:-1]])
        self.scalars = {tag: list(points.values()) for tag, points in scalars(run_dir).items()}
        self.steps = list(scalars(run_dir)["abs/rollout_length"])
        self.lengths = [int(length) for length in self.scalars["abs/rollout_length"]]
        self.checkpoint = self.module.load_checkpoint(run_dir / "checkpoint.pt")

    def network(self, step=None):
        """The network at the end, or after so many agent steps."""
        content = self.checkpoint if step is None else self.module.load_checkpoint(self.run_dir / f"checkpoint_{step}.pt")
        network = getattr(self.module, "Agent", getattr(self.module, "QNetwork", None))(self.recorder.action_space.n)
        network.load_state_dict(content["network"])
        return network

    def outputs(self, part=slice(None), step=None):
        """Those of the network on recorded observations, (steps, environments, outputs)."""
        network = self.network(step)
        with torch.no_grad():
            return torch.stack([network(obs) for obs in self.obs[part]])

    def rollouts(self):
        """A slice of steps for every rollout."""
        ends = list(itertools.accumulate(self.lengths))
        return [slice(end - length, end) for end, length in zip(ends, self.lengths, strict=True)]

    def minibatches(self, part):
        """The places in a flattened rollout of the samples of every gradient that was computed after it."""
        place = {observation.numpy().tobytes(): i for i, observation in enumerate(self.obs[part].flatten(0, 1))}
        batches = [batch for steps, grad, batch in self.batches if grad and steps == part.stop]
        return [torch.tensor([place[observation.numpy().tobytes()] for observation in batch]) for batch in batches]


@pytest.fixture
def record(run_here, monkeypatch, tmp_path):
    """record(script, *arguments) runs a script in this process and returns the Run."""

    def record(script, *arguments, paint=lambda obs: obs, points=lambda rewards: rewards, watch=False):
        recorders, batches, make, before = [], [], envpool.make, set(tmp_path.glob("runs/*"))

        def keep(module, inputs):
            if type(module).__name__ in ("QNetwork", "Agent"):
                batches.append((len(recorders[0].dones), torch.is_grad_enabled(), inputs[0].clone()))

        def recorded_make(*arguments, **options):
            recorders.append(Recorder(make(*arguments, **options), options, paint, points))
            return recorders[-1]

        hook = torch.nn.modules.module.register_module_forward_pre_hook(keep) if watch else None
        with monkeypatch.context() as patch:
            patch.setattr(envpool, "make", recorded_make)
            result = run_here(script, *PLAIN, *arguments)
        if hook:
            hook.remove()
        assert result.code == 0, result.err
        (run_dir,) = set(tmp_path.glob("runs/*")) - before
        return Run(script, *recorders, run_dir.rename(run_dir.with_name(f"{len(before)}")), batches)

    return record


@pytest.fixture
def sharp_policy(monkeypatch):
    """PPO's policy starts almost uniform, which many a wrong policy is; here its first one has clear preferences."""
    orthogonal = torch.nn.init.orthogonal_
    monkeypatch.setattr(torch.nn.init, "orthogonal_", lambda weight, gain=1: orthogonal(weight, 3 if gain == 0.01 else gain))


def q_loss(network, obs, actions, returns, advantages):
    q_values = network(obs).gather(1, actions.unsqueeze(1)).squeeze(1)
    loss = F.mse_loss(q_values, returns)
    return loss, {"td_loss": loss, "q_values": q_values.mean()}


def ppo_loss(network, obs, actions, returns, advantages):
    """At the policy that acted: ratios are 1 and values where they were."""
    outputs = network(obs)
    advantages = (advantages - advantages.mean()) / (advantages.std(unbiased=False) + 1e-8)
    log_probs = Categorical(logits=outputs[:, :-1]).log_prob(actions)
    rest = (actions, log_probs.detach(), advantages, returns, outputs[:, -1].detach())
    loss, terms = written_ppo_loss(outputs, MODULES[PPO].Args(), *rest)
    return loss, dict(zip(("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac"), terms, strict=True))


@pytest.mark.parametrize("script, loss_of", [(PQN, q_loss), (PPO, ppo_loss)])
def test_losses_are_their_definition(script, loss_of, record, sharp_policy):
    """With a learning rate too small to move the weights, minibatches are random divisions of the rollout into parts that
    differ by one sample at most, anew in each epoch, and logged are the means over them of loss, gradient norm and the rest,
    each a mean over its real transitions: no reset step among them, time limits bootstrapped, lost lives not, nothing shifted.
    Explained variance is that of the record."""
    options = "--env-id Breakout-v5 --episodic-life --max-episode-steps 45 --learning-rate 1e-14 --total-timesteps 440"
    options += " --adapt-signal time --adapt-interval 1 --rollout-smoothing 1 --rollout-length-min 5 --rollout-length-max 15"
    lambda_flag = "--q-lambda" if script == PQN else "--gae-lambda"
    options = [*options.split(), "--gamma", 0.9, lambda_flag, 0.7, "--num-minibatches", 3, "--update-epochs", 2]
    rng = np.random.default_rng(1)
    points = lambda rewards: rng.integers(-1, 2, len(rewards)).astype(np.float32)  # noqa: E731
    run = record(script, *options, paint=patches(), points=points, watch=True)
    outputs, network, compared = run.outputs(), run.network(), 0
    values = outputs.max(2).values if script == PQN else outputs[:, :, -1]
    assert run.terminations.any() and (run.dones & ~run.terminations).any()
    assert len(set(run.lengths)) > 5 and sum(length % 3 > 0 for length in run.lengths) > 3
    for i, part in enumerate(run.rollouts()):
        rewards, *ends = run.rewards[part], run.terminations[part], run.dones[part]
        next_values, real = values[part.start + 1 : part.stop + 1], ~run.is_reset[part]
        returns = forward_view(rewards, *ends, next_values, 0.9, 0.7).float()
        unexplained = np.var((returns - values[part])[real].numpy()) / np.var(returns[real].numpy())
        assert run.scalars["losses/explained_variance"][i] == pytest.approx(1 - unexplained, rel=1e-3, abs=1e-3)

        obs, minibatches = run.obs[part].flatten(0, 1), run.minibatches(part)
        assert len(minibatches) == 6 and {len(obs) // 3, math.ceil(len(obs) / 3)} == set(map(len, minibatches))
        orders = [torch.cat(epoch) for epoch in (minibatches[:3], minibatches[3:])]
        assert all(torch.equal(order.sort()[0], torch.arange(len(obs))) for order in orders) and (orders[0] != orders[1]).any()
        sums = Counter()
        for inds in minibatches:
            inds = inds[real.flatten()[inds]]
            batch = (x.flatten()[inds] for x in (run.actions[part].long(), returns, returns - values[part]))
            loss, logs = loss_of(network, obs[inds], *batch)
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, network.parameters())])
            for name, value in {**logs, "grad_norm": gradient.norm()}.items():
                sums[name] += value.item() / 6
        for name, value in sums.items():
            assert run.scalars[f"losses/{name}"][i] == pytest.approx(value, rel=2e-3, abs=1e-5), name
        compared += not real.all()
    assert compared > 3 and part.stop == len(run.rewards)


MEASURED = "--max-episode-steps 9 --no-adapt-rollout --num-steps 20 --adapt-interval 1".split()


@pytest.mark.parametrize("script, precision", [(PQN, "float32"), (PQN, "bfloat16"), (PPO, "float32"), (PPO, "bfloat16")])
def test_signal_is_what_one_iteration_changed(script, precision, record, sharp_policy):
    """abs/divergence is the share of real states whose greedy action differs, in float32; abs/kl the mean KL over them."""
    options = [*MEASURED, "--keep-checkpoints", "--checkpoint-interval", 1, "--precision", precision, "--learning-rate"]
    run = record(script, *options, 3e-3 if script == PQN else 2e-4, "--total-timesteps", 320, paint=patches())
    signals, everywhere, wrong = [], [], []
    for i in (1, 2, 3):
        part, real = run.rollouts()[i], ~run.is_reset[run.rollouts()[i]]
        old, new = (run.outputs(part, step) for step in (80 * i, 80 * i + 80))
        if script == PPO:
            old, new = old[:, :, :-1], new[:, :, :-1]
            kl, backward = (kl_divergence(Categorical(logits=a), Categorical(logits=b)) for a, b in ((old, new), (new, old)))
            assert run.scalars["abs/kl"][i] == pytest.approx(float(kl[real].mean()), rel=1e-3, abs=1e-7)
            wrong.append([float(abs(x.mean() / kl[real].mean() - 1)) for x in (kl, backward[real])])
        changed = (new.argmax(2) != old.argmax(2)).float()
        signals.append(run.scalars["abs/divergence"][i])
        everywhere.append(float(changed.mean()))
        assert signals[-1] == pytest.approx(float(changed[real].mean()), abs=1e-6) and not real.all()
    assert script == PPO or signals != pytest.approx(everywhere, abs=1e-6)  # so reset steps would show
    assert max(signals) > 0.02 and min(signals) < 0.98
    assert script == PQN or min(map(max, zip(*wrong, strict=True))) > 0.003  # as would a wrong direction


def test_actions_are_greedy_but_for_epsilon(record):
    """Epsilon falls linearly; actions are random in its share, drawn for every step and game, and greedy otherwise."""
    options = "--no-adapt-rollout --num-steps 25 --total-timesteps 1000 --exploration-fraction 0.5 --end-e 0 --learning-rate"
    run = record(PQN, *options.split(), 1e-14, paint=patches())
    explored = (run.outputs(slice(-1)).argmax(2) != run.actions).view(10, 25, 4).float()
    for i, share in enumerate(explored.mean((1, 2)).tolist()):
        epsilon = max(0, 1 - 0.2 * i)
        assert run.scalars["charts/epsilon"][i] == pytest.approx(epsilon, abs=1e-6)
        assert share == pytest.approx(0.75 * epsilon, abs=0.19 * math.sqrt(epsilon))  # 4 actions, four standard deviations
    counts = run.actions[:25].flatten().bincount(minlength=4)
    assert len(counts) == 4 and counts.min() > 7 and counts.max() < 43  # 25 expected, standard deviation 4.3
    assert explored[1:4].amax(2).mean() > 0.8  # 0.9 expected, 0.45 if all games explored at once


def test_ppo_acts_as_its_policy(record, sharp_policy):
    """Actions are samples of the policy at the state before them: as likely as it expects."""
    options = "--no-adapt-rollout --num-steps 50 --total-timesteps 800 --learning-rate 1e-14".split()
    run = record(PPO, *options, paint=patches())
    policy = Categorical(logits=run.outputs(slice(-1))[:, :, :-1])
    assert policy.entropy().mean() < 0.95 * math.log(4)
    surprise, spread = policy.log_prob(run.actions) + policy.entropy(), (policy.probs * policy.logits**2).sum(2)
    deviation = (spread - policy.entropy() ** 2).clamp(min=0).sum().sqrt()
    assert abs(float(surprise.sum())) < 4 * float(deviation)


SHORT = "--adapt-interval 2 --divergence-window 3 --divergence-warmup 2 --rollout-smoothing 0.4 --rollout-length-min 3 "
SHORT += "--rollout-length-max 14 --total-timesteps 440 --learning-rate 1e-3"


@pytest.mark.parametrize(
    "script, signal, flags",
    [
        (PQN, "divergence", ("--schedule", "log")),
        (PQN, "divergence", ("--schedule", "exp")),
        (PQN, "time", ()),
        (PPO, "kl", ("--kl-min", 1e-6, "--kl-max", 0.5)),
        (GNS, "noise-scale", ()),
        (GNS, "divergence", ()),
        (GNS, "time", ()),
    ],
)
def test_length_follows_its_rule(script, signal, flags, record):
    """Every second iteration measures; after two measurements the float length, never rounded in itself, goes 0.4 of the way
    to the target of the mean of the last three. Rollouts have its rounded value. Whatever drives, all signals are logged."""
    run = record(script, *SHORT.split(), "--adapt-signal", signal, *flags, paint=patches())
    name, length, step, measurements, targets, changes = "abs/kl" if script == PPO else "abs/divergence", 3.0, 0, [], [], []
    measured = {tag: iter(values) for tag, values in run.scalars.items() if tag.startswith(("abs/", "gns/"))}
    for i, logged in enumerate(run.lengths, 1):
        assert logged == round(length) and run.scalars["abs/batch_size"][i - 1] == 4 * logged
        changes += [(step, logged)] if not changes or changes[-1][1] != logged else []
        step += 4 * logged
        if i % 2 == 0:
            noise = [next(measured[tag]) for tag in ("gns/noise", "gns/signal")] if script == GNS else []
            measurements.append([next(measured[name]), *noise])
            mean, *noise = np.mean(measurements[-3:], axis=0)
            assert next(measured[f"{name}_mean"]) == pytest.approx(mean, rel=1e-5)
            target = length
            if signal == "time":
                target = 3 + 11 * step / 440
            elif i >= 4 and signal == "noise-scale":
                target = run.module.noise_scale_rollout_length(*noise, 4, 3, 14)
            elif i >= 4:
                bounds = flags[1::2] if script == PPO else (0.05, 0.95)
                schedule = flags[1] if "--schedule" in flags else "log"
                target = run.module.target_rollout_length(mean, 3, 14, *bounds, schedule)
            targets.append(target)
            length += 0.4 * (target - length)
    assert step == run.steps[-1] and step + 4 * round(length) > 440 >= step
    assert run.checkpoint["rollout_length"] == pytest.approx(length, rel=1e-3) and run.checkpoint["lengths"] == changes
    assert len(changes) > 2 and len(set(targets)) > 3 and 0.01 < abs(length - round(length))
    count = {"abs/divergence": len(measurements), "losses/explained_variance": len(run.lengths)}
    count |= dict.fromkeys(("gns/b_simple", "gns/noise", "gns/signal"), len(measurements)) if script == GNS else {}
    assert {tag: len(run.scalars[tag]) for tag in count} == count


def test_replay_walks_through_anothers_lengths(record):
    """--adapt-signal replay gives a run of any script the lengths of another, and its last one beyond its end."""
    first = record(PQN, *SHORT.split(), "--adapt-signal", "time", "--total-timesteps", 240)
    assert len(set(first.lengths)) > 2
    for script in (PQN, GNS):
        replay = ["--adapt-signal", "replay", "--replay", first.run_dir / "checkpoint.pt", "--seed", 2]
        run = record(script, *SHORT.split(), *replay, "--total-timesteps", 300)
        known = len(first.lengths)
        assert run.lengths[:known] == first.lengths and run.steps[:known] == first.steps and len(run.lengths) > known
        assert set(run.lengths[known:]) == {first.lengths[-1]} and run.checkpoint["lengths"] == first.checkpoint["lengths"]
        assert not torch.equal(run.actions[:20], first.actions[:20])
    path = first.run_dir / "checkpoint.pt"
    torch.save(first.checkpoint | {"args": first.checkpoint["args"] | {"total_timesteps": 10**6}}, path)
    with pytest.raises(AssertionError, match="is of an unfinished run, at step 2"):
        record(PQN, *SHORT.split(), "--adapt-signal", "replay", "--replay", path)


@pytest.mark.parametrize("script", [PPO, GNS])
def test_runs_repeat_and_measuring_changes_nothing(script, record):
    """On two cores, bit for bit, whether the signals are measured in every iteration or never."""
    options = "--torch-threads 2 --no-adapt-rollout --num-steps 9 --total-timesteps 150".split()
    weights = [record(script, *options, "--adapt-interval", k).checkpoint["network"] for k in (1, 99)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_noise_scale_is_that_of_its_groups(record):
    """gns/noise and gns/signal are those of the gradients of disjoint groups of samples, random minibatches or whole
    environments; reset steps have no gradient and do not count. In data made up so that the steps of an environment are alike
    and environments differ, the noise of whole environments is several times larger: that of a rollout."""
    pictures, points = patches()(np.zeros((8, 4, 84, 84))), np.array([1, -1, 1, 1, -1, -1, 1, -1], dtype=np.float32)
    options = "--num-envs 8 --no-adapt-rollout --num-steps 8 --max-episode-steps 13 --gamma 0 --start-e 0 --end-e 0".split()
    options += "--learning-rate 1e-14 --num-minibatches 4 --adapt-interval 1 --total-timesteps 256".split()
    noises, time = [], itertools.count()

    def almost_still(obs):
        pictures[:, 0, 0, 0] = next(time)
        return pictures.copy()

    for groups, m in (("minibatches", 4), ("environments", 8)):
        flags = *options, "--noise-scale-groups", groups
        run = record(GNS, *flags, paint=almost_still, points=lambda rewards: points, watch=True)
        network, environment = run.network(), torch.arange(64) % 8
        for i, part in enumerate(run.rollouts()):
            batch, real = [x[part].flatten(0, 1) for x in (run.obs, run.actions, run.rewards)], ~run.is_reset[part].flatten()
            divided, gradients = run.minibatches(part)[:m], []
            assert torch.equal(torch.cat(divided).sort()[0], torch.arange(64)) and {len(inds) for inds in divided} == {64 // m}
            assert {len(environment[inds].unique()) == 1 for inds in divided} == {groups == "environments"}
            for inds in divided:
                loss, _ = q_loss(network, *(x[inds[real[inds]]] for x in batch), None)
                gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, network.parameters())]).double())
            gradients, size = torch.stack(gradients), float(real.sum()) / m
            noise = size / (m - 1) * float((gradients - gradients.mean(0)).square().sum())
            signal = float(gradients.mean(0).square().sum()) - noise / (m * size)
            logged = run.scalars["gns/noise"][i], run.scalars["gns/signal"][i]
            assert logged == pytest.approx((noise, signal), rel=1e-3, abs=1e-4 * noise)
        assert run.is_reset.any()
        noises.append(np.mean(run.scalars["gns/noise"]))
    assert 4 < noises[1] / noises[0] < 20  # 9 expected


def test_scaled_epochs_are_rounded_down(record):
    """As in the public code: 2 * 7 / 4 epochs are 3, of 2 minibatches each."""
    words = "--scale-epochs --rollout-length-min 7 --rollout-length-max 7 --num-steps 4 --update-epochs 2 --num-minibatches 2"
    run = record(PQN, *words.split(), "--total-timesteps", 28)
    assert run.checkpoint["optimizer"]["state"][0]["step"] == 6
