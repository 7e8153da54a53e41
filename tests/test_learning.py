"""The learning check: after a short training the network must know what untaught or wrongly taught ones do not.

In seconds: a made-up game of three lamps, one of which is lit. One step later the reward is 1 where the action was that of the
lit lamp, else -1, and a second picture shows which is about to come. Of ten steps 9 is the best score; random play has -3.
In a minute, on UpNDown: Q-values of a random player's actions in unseen games are correlated with the rewards that followed,
at 0.49 to 0.56 after 50,000 steps with four seeds, 0.02 before training. Scores of short trainings differ too much.
"""

from types import SimpleNamespace

import envpool
import numpy as np
import pytest
import torch
from conftest import MODULES, scalars


class Lamps:
    """The made-up game behind EnvPool's interface: it too resets on the step after the end."""

    def __init__(self, num_envs, seed=0):
        self.action_space, self.num_envs, self.rng = SimpleNamespace(n=3), num_envs, np.random.default_rng(seed)
        self.lit, self.coming, self.step = np.zeros((3, num_envs), int)

    def pictures(self):
        """Frame 0 shows the lit lamp, frame 1 the reward that is about to come: right, wrong or none."""
        frames = np.zeros((self.num_envs, 4, 84, 84), dtype=np.uint8)
        for env in range(self.num_envs):
            frames[env, 0, 28 * self.lit[env] : 28 * self.lit[env] + 28] = 255
            if self.coming[env]:
                frames[env, 1, :, slice(42) if self.coming[env] > 0 else slice(42, 84)] = 255
        return frames

    def reset(self):
        self.lit = self.rng.integers(3, size=self.num_envs)
        return self.pictures(), {}

    def send(self, actions, env_ids=None):
        self.actions = actions

    def recv(self):
        resetting = self.step == 10
        rewards = np.where(resetting, 0, self.coming)
        self.coming = np.where(resetting, 0, np.where(self.actions == self.lit, 1, -1))
        self.lit, self.step = self.rng.integers(3, size=self.num_envs), np.where(resetting, 0, self.step + 1)
        over, none = self.step == 10, np.zeros(self.num_envs, dtype=bool)
        env_ids = np.arange(self.num_envs)
        info = {"env_id": env_ids, "terminated": over, "reward": rewards.astype(float), "elapsed_step": self.step}
        return self.pictures(), rewards.astype(np.float32), over, none, info


LAMPS = (
    "--env-id Pong-v5 --num-envs 16 --rollout-length-min 8 --rollout-length-max 16 --adapt-interval 5 "
    "--gamma 0.8 --learning-rate 1e-3 --eval-episodes 0 --torch-threads 1 --precision float32 --device cpu --run-dir lamps"
).split()
PQN = "--total-timesteps 3000 --start-e 1 --end-e 0 --exploration-fraction 0.7".split()
PPO = "--total-timesteps 1800".split()


@pytest.mark.parametrize("script, flags", [("pqn_abs_atari.py", PQN), ("ppo_abs_atari.py", PPO)])  # gns learns as pqn does
def test_lamps_are_learned(script, flags, run_here, monkeypatch, tmp_path):
    """Soon the script plays the made-up game almost perfectly, and knows what a coming reward is worth."""
    monkeypatch.setattr(envpool, "make", lambda *arguments, num_envs, **options: Lamps(num_envs))
    result = run_here(script, *LAMPS, *flags)
    assert result.code == 0, result.err
    scores = list(scalars(tmp_path / "lamps")["charts/episodic_return"].values())
    module = MODULES[script]
    network = module.Agent(3) if hasattr(module, "Agent") else module.QNetwork(3)
    network.load_state_dict(module.load_checkpoint(tmp_path / "lamps" / "checkpoint.pt")["network"])
    game = Lamps(6)
    game.lit, game.coming = np.array([0, 1, 2] * 2), np.array([1] * 3 + [-1] * 3)
    with torch.no_grad():
        outputs = network(torch.from_numpy(game.pictures()))
    values = outputs[:, 3] if hasattr(module, "Agent") else outputs.max(1).values
    assert np.mean(scores[-len(scores) // 5 :]) > 5
    assert (outputs[:, :3].argmax(1) == torch.tensor([0, 1, 2] * 2)).sum() >= 5
    assert 1 < float(values[:3].mean() - values[3:].mean()) < 3  # a reward of 1 rather than -1


def value_correlation(module, network, num_games=16, length=200, horizon=40):
    """Correlation of Q(s_t, a_t) with sum_k 0.9^k r_{t+k} over random play; the last `horizon` steps only are future."""
    args = module.Args(env_id="UpNDown-v5", max_episode_steps=length)
    envs, rng = module.AtariEnvs(args, module.env_seeds(5, num_games, evaluation=True), 1), np.random.default_rng(0)
    observations, predicted, steps = envs.reset(), [], []
    for _ in range(length - 1):
        actions = rng.integers(envs.num_actions, size=num_games)
        with torch.no_grad():
            predicted.append(network(torch.from_numpy(observations)).numpy()[np.arange(num_games), actions])
        envs.send(actions)
        observations, reward, _, done, *_ = envs.recv()
        steps.append((reward, ~done))
    returns = [np.zeros(num_games)]
    for reward, goes_on in reversed(steps):
        returns.insert(0, reward + 0.9 * returns[0] * goes_on)
    return np.corrcoef(np.ravel(predicted[:-horizon]), np.ravel(returns[: -horizon - 1]))[0, 1]


@pytest.mark.slow
def test_values_of_a_real_game_are_learned(run_here, tmp_path):
    """The trained network's values are correlated with what follows, far more than those of a network before training."""
    flags = "--env-id UpNDown-v5 --max-episode-steps 200 --total-timesteps 50000 --num-envs 32 --rollout-length-min 8 "
    flags += "--rollout-length-max 16 --adapt-interval 10 --gamma 0.9 --exploration-fraction 0.5 --end-e 0.2 --anneal-lr "
    result = run_here("pqn_abs_atari.py", *flags.split(), *"--learning-rate 1e-3 --eval-episodes 0 --run-dir game".split())
    assert result.code == 0, result.err
    module = MODULES["pqn_abs_atari.py"]
    torch.manual_seed(0)
    network = module.QNetwork(6)
    assert abs(value_correlation(module, network)) < 0.2
    network.load_state_dict(module.load_checkpoint(tmp_path / "game" / "checkpoint.pt")["network"])
    assert value_correlation(module, network) > 0.35
