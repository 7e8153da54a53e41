"""The training loop against its definition: EnvPool is recorded, and loss and divergence are computed anew from the record."""

import envpool
import numpy as np
import pytest
import torch
from conftest import DISTINCT, MODULES
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_targets import forward_view

scripts = pytest.mark.parametrize("script", [name for name in DISTINCT if hasattr(MODULES[name], "q_lambda_returns")])
PLAIN = (
    "--num-envs 4 --num-minibatches 1 --update-epochs 1 --eval-episodes 0 --precision float32 --device cpu --env-pools 1 "
    "--torch-threads 1 --env-threads 1"
).split()


class Recorder:
    """An EnvPool that keeps what went in and out of it."""

    def __init__(self, pool):
        self.pool = pool
        self.observations, self.actions, self.rewards, self.terminations, self.dones = [], [], [], [], []

    def __getattr__(self, name):
        return getattr(self.pool, name)

    def reset(self):
        observations, info = self.pool.reset()
        self.observations.append(observations.copy())
        return observations, info

    def send(self, actions, env_ids=None):
        self.actions.append(actions.copy())
        self.pool.send(actions, env_ids)

    def recv(self):
        observations, rewards, terminated, truncated, info = result = self.pool.recv()
        assert (info["env_id"] == np.arange(4)).all()
        self.observations.append(observations.copy())
        self.rewards.append(rewards.copy())
        self.terminations.append(terminated | info["terminated"].astype(bool))
        self.dones.append(terminated | truncated | info["terminated"].astype(bool))
        return result


@pytest.fixture
def record(run_here, monkeypatch, tmp_path):
    """Runs a script in this process; returns the record, the scalars and the trained network."""

    def record(script, *arguments):
        recorders = []
        make = envpool.make
        with monkeypatch.context() as patch:
            patch.setattr(envpool, "make", lambda *a, **k: recorders.append(Recorder(make(*a, **k))) or recorders[-1])
            before = set(tmp_path.glob("runs/*"))
            result = run_here(script, *PLAIN, *arguments)
        assert result.returncode == 0, result.stderr
        (run_dir,) = set(tmp_path.glob("runs/*")) - before
        events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
        scalars = {name: [e.value for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
        weights = torch.load(run_dir / "model.pt", weights_only=True)["weights"]
        q_network = MODULES[script].QNetwork(len(weights["head.bias"]))
        q_network.load_state_dict(weights)
        (recorder,) = recorders
        return recorder, scalars, q_network

    return record


@torch.no_grad()
def q_values_of(q_network, observations):
    """(steps, environments, actions) of recorded observations (steps, environments, 4, 84, 84)."""
    return torch.stack([q_network(torch.from_numpy(o)) for o in observations])


@scripts
def test_loss_and_values_are_their_definition(script, record):
    """With a learning rate too small to move the weights, every rollout's logged loss is the mean over its real transitions
    of (Q(s, a) - lambda-return)^2: no reset step among them, time limits bootstrapped, lost lives not, nothing shifted."""
    options = "--env-id Breakout-v5 --episodic-life --max-episode-steps 45 --learning-rate 1e-14 --total-timesteps 2400"
    lengths = "--adapt-signal time --adapt-interval 1 --rollout-smoothing 1 --rollout-length-min 5 --rollout-length-max 24"
    recorder, scalars, q_network = record(script, *options.split(), *lengths.split(), "--gamma", 0.9, "--q-lambda", 0.7)
    q_values = q_values_of(q_network, recorder.observations)
    rewards, terminations, dones = (
        torch.from_numpy(np.array(x)) for x in (recorder.rewards, recorder.terminations, recorder.dones)
    )
    taken = q_values[:-1].gather(2, torch.from_numpy(np.array(recorder.actions)).long().unsqueeze(2)).squeeze(2)
    is_reset = torch.cat([torch.zeros(1, 4, dtype=torch.bool), dones[:-1]])
    assert rewards.any() and terminations.any() and (dones & ~terminations).any()
    begin = 0
    for i, length in enumerate(map(int, scalars["abs/rollout_length"])):
        part = slice(begin, begin + length)
        next_values = q_values[begin + 1 : begin + length + 1].max(2).values
        returns = forward_view(rewards[part], terminations[part], dones[part], next_values, 0.9, 0.7)
        real = ~is_reset[part]
        loss = ((taken[part] - returns) ** 2)[real].mean()
        assert scalars["losses/td_loss"][i] == pytest.approx(float(loss), rel=1e-4)
        assert scalars["losses/q_values"][i] == pytest.approx(float(taken[part][real].mean()), rel=1e-4, abs=1e-6)
        begin += length
    assert begin == len(rewards) and len(set(scalars["abs/rollout_length"])) > 3


@scripts
def test_divergence_is_what_one_iteration_changed(script, record):
    """The logged divergence is the share of the rollout's real states whose greedy action differs before and after."""
    options = "--env-id Pong-v5 --max-episode-steps 9 --learning-rate 1e-3 --start-e 1 --end-e 1 --no-adapt-rollout".split()
    options += "--num-steps 30 --adapt-interval 1 --reference-batch-size 1000".split()
    *_, old = record(script, *options, "--total-timesteps", 120, "--learning-rate", 1e-14)  # the network at the start
    for iterations in (1, 2, 3):
        recorder, scalars, new = record(script, *options, "--total-timesteps", 120 * iterations)
        begin = 30 * (iterations - 1)
        dones = np.array([np.zeros(4, dtype=bool), *recorder.dones])
        real = torch.from_numpy(~dones[begin : begin + 30])
        states = recorder.observations[begin : begin + 30]
        changed = q_values_of(new, states).argmax(2) != q_values_of(old, states).argmax(2)
        assert len(scalars["abs/divergence"]) == iterations and not real.all()
        assert scalars["abs/divergence"][-1] == pytest.approx(float(changed[real].float().mean()), abs=1e-6)
        old = new
    assert max(scalars["abs/divergence"]) > 0


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
