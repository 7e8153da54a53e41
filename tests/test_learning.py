"""The learning check: after a short real training the network must know what untaught or wrongly taught ones do not.

A score is no good measure of minutes: greedy policies still change from one iteration to the next, and the scores of equal
short trainings with other seeds lie between those of a random and of a very good player. What is reliable after 50,000 steps
of UpNDown (games cut at 200 agent steps, gamma 0.9, learning rate 1e-3) is the knowledge of values: in 16 games of a random
player, with emulator seeds that training did not use, Q(s, a) of the actions taken is correlated with the discounted rewards
that followed. Measured on a CPU: 0.54, 0.56, 0.55 and 0.49 with seeds 1 to 4 (float32), 0.54 with seed 1 in
bfloat16. Learners broken on purpose (seed 1): targets of the wrong sign -0.04, random targets -0.04. Networks before
training: 0.02, -0.02 and 0.02.

Every script also learns a game made up here, in which seconds are enough: three lamps, one of which is lit, and an action per
lamp; one step later the reward is 1 where the action was that of the lit lamp, -1 where it was not, and a second picture shows
which of the two is about to come. Ten steps are a game, so 9 is the best score, and random play has -3 on average.
Measured after 8,000 steps: 7.8, 8.3 and 9.0 (PQN), 9.0, 9.0 and 9.0 (PPO) with seeds 1, 2 and 3. Broken on purpose, seed 1:
rewards or advantages of the wrong sign -8.1 (PQN) and -9.0 (PPO), no discounted future -3.0 and -3.3. The value of a coming 1
was above that of a coming -1 by 2.2, 2.8 and 1.7 (PQN), 2.4, 1.8 and 2.1 (PPO); without a value loss by -0.7 (PPO).
"""

from types import SimpleNamespace

import envpool
import numpy as np
import pytest
import torch
from conftest import MODULES, run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SETTINGS = (
    "--env-id UpNDown-v5 --max-episode-steps 200 --total-timesteps 50000 --num-envs 32 --rollout-length-min 8 "
    "--rollout-length-max 16 --num-minibatches 4 --adapt-interval 10 --gamma 0.9 --exploration-fraction 0.5 --end-e 0.2 "
    "--learning-rate 1e-3 --anneal-lr --eval-episodes 0 --seed 1"
).split()


def value_correlation(module, q_network, gamma=0.9, num_games=16, length=200, horizon=40):
    """Correlation of Q(s_t, a_t) with sum_k gamma^k r_{t+k} over random play; the last `horizon` steps only are future."""
    envs = module.AtariEnvs("UpNDown-v5", module.env_seeds(5, num_games, evaluation=True), 1, max_episode_steps=length)
    rng = np.random.default_rng(0)
    observations = envs.reset()
    predicted, rewards, dones = [], [], []
    for _ in range(length - 1):
        actions = rng.integers(envs.num_actions, size=num_games)
        with torch.no_grad():
            predicted.append(q_network(torch.from_numpy(observations)).numpy()[np.arange(num_games), actions])
        envs.send(actions)
        observations, reward, _, done, *_ = envs.recv()
        rewards.append(reward)
        dones.append(done)
    returns, future = np.zeros((length - 1, num_games)), np.zeros(num_games)
    for t in reversed(range(length - 1)):
        future = returns[t] = rewards[t] + gamma * future * ~dones[t]
    return float(np.corrcoef(np.array(predicted)[:-horizon].ravel(), returns[:-horizon].ravel())[0, 1])


@pytest.mark.parametrize("script", ["pqn_abs_atari.py"])
def test_a_short_training_learns_values(script, tmp_path):
    """The trained network's values are correlated with what follows, far more than those of a network before training."""
    result = run_script(script, *SETTINGS, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    module = MODULES[script]
    trained, _ = module.load_model(next(tmp_path.glob("runs/*/model.pt")), torch.device("cpu"))
    torch.manual_seed(0)
    untrained = module.QNetwork(len(trained.head.bias))
    assert abs(value_correlation(module, untrained)) < 0.2
    assert value_correlation(module, trained) > 0.35


class Lamps:
    """The made-up game behind EnvPool's interface: it too resets on the step after the end."""

    def __init__(self, num_envs, seed=0):
        self.action_space, self.num_envs, self.rng = SimpleNamespace(n=3), num_envs, np.random.default_rng(seed)
        self.lit, self.coming, self.step = np.zeros(num_envs, int), np.zeros(num_envs, int), np.zeros(num_envs, int)

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

    def close(self):
        pass


LAMPS = (
    "--env-id Pong-v5 --num-envs 32 --total-timesteps 8000 --rollout-length-min 8 --rollout-length-max 16 --adapt-interval 5 "
    "--gamma 0.8 --learning-rate 1e-3 --eval-episodes 0 --env-pools 1 --torch-threads 1 --precision float32 --device cpu"
).split()
EXPLORATION = "--start-e 1 --end-e 0 --exploration-fraction 0.7".split()


def play_lamps(script, run_here, monkeypatch, folder, seed, *flags):
    """Trains a script on the made-up game; returns the mean score of the last fifth of the games and the network."""
    monkeypatch.setattr(envpool, "make", lambda *arguments, num_envs, **options: Lamps(num_envs))
    exploration = EXPLORATION if hasattr(MODULES[script].Args, "start_e") else ()
    result = run_here(script, *LAMPS, *exploration, "--seed", seed, *flags)
    assert result.returncode == 0, result.stderr
    (run_dir,) = folder.glob(f"runs/*__{seed}__*")
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    scores = [e.value for e in events.Scalars("charts/episodic_return")]
    network, _ = MODULES[script].load_model(run_dir / "model.pt", torch.device("cpu"))
    return float(np.mean(scores[-len(scores) // 5 :])), network


@pytest.mark.parametrize("script", ["pqn_abs_atari.py", "ppo_abs_atari.py"])  # gns_batch_atari.py learns as PQN does
def test_lamps_are_learned(script, run_here, monkeypatch, tmp_path):
    """After 8,000 steps the script plays the made-up game almost perfectly, and knows what a coming reward is worth."""
    score, network = play_lamps(script, run_here, monkeypatch, tmp_path, seed=1)
    game = Lamps(6)
    game.lit, game.coming = np.array([0, 1, 2] * 2), np.array([1] * 3 + [-1] * 3)
    with torch.no_grad():
        outputs = network(torch.from_numpy(game.pictures()))
    preferences, values = outputs if isinstance(outputs, tuple) else (outputs, outputs.max(1).values)
    assert score > 6
    assert (preferences.argmax(1) == torch.tensor([0, 1, 2] * 2)).sum() >= 5
    assert 1 < float(values[:3].mean() - values[3:].mean()) < 3  # a reward of 1 rather than -1
