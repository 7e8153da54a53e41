"""The environment's bookkeeping, evaluation and video, against raw EnvPool, ale-py and arithmetic."""

from types import SimpleNamespace

import ale_py
import cv2
import envpool
import numpy as np
import pytest
import torch
from conftest import MODULES, modules_with

# The other scripts have the same environment, word for word (test_twins.py)
script = MODULES["pqn_abs_atari.py"]
ppo = MODULES["ppo_abs_atari.py"]
two_scripts = pytest.mark.parametrize("module", modules_with("evaluate")[:1] + modules_with("evaluate", "Agent"))
WORKERS = script.Workers(torch.device("cpu"), 2)


def make_envs(env_id, num_envs, seed=1, **args):
    args = script.Args(env_id=env_id, **args)
    return script.AtariEnvs(args, script.env_seeds(seed, num_envs), 1, episodic_life=args.episodic_life)


def raw_envs(env_id, num_envs, **options):
    seeds = script.env_seeds(1, num_envs)  # those of make_envs()
    return envpool.make(env_id, env_type="gymnasium", num_envs=num_envs, env_seed=seeds, num_threads=1, **options)


def step(envs, actions):
    envs.send(np.asarray(actions))
    return envs.recv()


def replay_reset(ale, ram):
    """Starts a game in ale-py that is where EnvPool is after its random no-ops: the first of 0 to 31 with the same RAM."""
    for fires in (1, 0):
        for noops in range(32):
            ale.reset_game()
            for action in [ale_py.Action.NOOP] * noops + [ale_py.Action.FIRE] * fires:
                ale.act(action)
            if (ale.getRAM() == ram).all():
                return
    pytest.fail("no number of no-ops leads to EnvPool's first state")


@pytest.mark.parametrize("game, rom, games", [("Breakout", "breakout", 3), ("MsPacman", "ms_pacman", 2)])
def test_whole_games_replayed_in_ale(game, rom, games):
    """Scores, lengths, rewards, ends, reset marks and pictures of whole games equal a replay of the actions in ale-py."""
    envs, raw, ale = make_envs(f"{game}-v5", 1), raw_envs(f"{game}-v5", 1), ale_py.ALEInterface()
    ale.setFloat("repeat_action_probability", 0.0)
    ale.loadROM(ale_py.roms.get_rom_path(rom))
    actions = ale.getMinimalActionSet()
    assert envs.num_actions == len(actions)
    rng = np.random.default_rng(0)
    observations, (raw_observations, info) = envs.reset(), raw.reset()
    assert (observations == raw_observations).all()
    replay_reset(ale, info["ram"][0])
    reported, expected, score, length, over = [], [], 0.0, 0, False
    while len(expected) < games:
        action = int(rng.integers(len(actions)))
        observations, rewards, terminations, dones, is_reset, ended = step(envs, [action])
        raw_observations, *_, info = raw.step(np.array([action], dtype=np.int32))
        assert (observations == raw_observations).all() and is_reset[0] == over
        if over:  # this step started the next game, whatever the action was
            assert rewards[0] == 0 and not dones[0] and not terminations[0]
            replay_reset(ale, info["ram"][0])
            score, length, over = 0.0, 0, False
            continue
        reward = 0
        for _ in range(4):
            previous = ale.getScreenGrayscale()
            reward += ale.act(actions[action])
            if over := ale.game_over():
                break
        score, length = score + reward, length + 1
        assert (ale.getRAM() == info["ram"][0]).all()
        assert rewards[0] == np.sign(reward) and terminations[0] == dones[0] == over
        if over:
            expected.append((score, length, 0))
        else:
            picture = np.maximum(previous, ale.getScreenGrayscale())
            picture = cv2.resize(picture, (84, 84), interpolation=cv2.INTER_AREA)
            assert np.abs(picture.astype(int) - observations[0, -1]).max() <= 1
        reported += ended
    assert reported == expected
    assert len({s for s, _, _ in expected}) > 1 or len({n for _, n, _ in expected}) > 1


@pytest.mark.parametrize("game, seen", [("MsPacman-v5", {0.0, 1.0}), ("Pong-v5", {0.0, -1.0})])
def test_time_limit_and_clipped_rewards(game, seen):
    """A time limit truncates and never terminates; the step after it is the reset; score and length start anew."""
    envs, raw = make_envs(game, 2, max_episode_steps=100), raw_envs(game, 2, max_episode_steps=100)
    assert envs.reset().shape == (2, 4, 84, 84) and (envs.done == 0).all() and raw.reset()
    rng, score, scores, clipped = np.random.default_rng(0), np.zeros(2), [], set()
    for t in range(101 * 3):
        actions = rng.integers(envs.num_actions, size=2).astype(np.int32)
        (_, rewards, terminations, dones, is_reset, games), points = step(envs, actions), raw.step(actions)[1]
        assert not terminations.any()  # nobody loses a whole game within 100 steps
        assert (dones == (t % 101 == 99)).all() and (is_reset == (t % 101 == 100)).all()
        assert (rewards == np.sign(points)).all() and not (is_reset & (rewards != 0)).any()
        score, clipped = np.where(is_reset, 0, score) + points, clipped | set(rewards.tolist())
        assert sorted(games, key=lambda g: g[2]) == [(score[i], 100, i) for i in range(2) if dones.all()]
        scores += [game[0] for game in games]
    assert len(scores) == 6 and clipped == seen and np.count_nonzero(scores) > 3  # so one carried over shows


def test_game_over_at_the_time_limit_is_a_termination():
    """Where game over and time limit fall on the same step, nothing is left to bootstrap from."""
    rng, envs, actions, games = np.random.default_rng(3), make_envs("Breakout-v5", 1), [], []
    envs.reset()
    while not games:
        actions.append(rng.integers(envs.num_actions, size=1))
        *_, games = step(envs, actions[-1])
    for limit, terminated in [(len(actions), True), (len(actions) - 1, False)]:
        limited = make_envs("Breakout-v5", 1, max_episode_steps=limit)
        limited.reset()
        for action in actions[:limit]:
            _, _, terminations, dones, _, games = step(limited, action)
        assert dones[0] and bool(terminations[0]) == terminated and [g[1] for g in games] == [limit]


def test_episodic_life():
    """A lost life terminates but reports no game; the game's score and length run over all its lives."""
    envs = make_envs("Breakout-v5", 2, episodic_life=True)
    raw = raw_envs("Breakout-v5", 2, episodic_life=True, reward_clip=False)
    envs.reset(), raw.reset()
    rng, score, length, lives = np.random.default_rng(1), np.zeros(2), np.zeros(2, dtype=int), np.zeros(2, dtype=int)
    ended = lost = 0
    while ended < 4:
        actions = rng.integers(envs.num_actions, size=2).astype(np.int32)
        _, _, terminations, dones, is_reset, games = step(envs, actions)
        _, raw_rewards, *_, info = raw.step(actions)
        score, length = score + raw_rewards, length + ~is_reset
        over = info["lives"] == 0
        assert (dones == terminations).all()
        assert (terminations[~is_reset] == (info["lives"] < lives)[~is_reset]).all() or not lives.all()
        assert sorted(games, key=lambda g: g[2]) == [(score[i], length[i], i) for i in np.flatnonzero(dones & over)]
        score[dones & over] = length[dones & over] = 0
        ended, lost, lives = ended + len(games), lost + int((dones & ~over).sum()), info["lives"].copy()
    assert lost >= 4 * 4  # five lives each


def fixed(module):
    """A network, PQN's or PPO's, that says the same whatever it sees, and prefers the third of nine actions a little."""
    outputs = torch.tensor([0, 0, 0.3] + [0.0] * (6 + hasattr(module, "Agent")))
    return lambda x, precision=None: outputs.repeat(len(x), 1)


class Uneven:
    """Behind EnvPool's interface, games of 1, 2, 3, ..."""

    def __init__(self, num_envs):
        self.action_space, self.length, self.step = SimpleNamespace(n=4), np.arange(1, num_envs + 1), np.zeros(num_envs, int)

    def pictures(self, env_ids):
        return np.broadcast_to((env_ids % 4).astype(np.uint8)[:, None, None, None], (len(env_ids), 4, 84, 84)).copy()

    def reset(self):
        return self.pictures(np.arange(len(self.step))), {}

    def send(self, actions, env_ids):
        assert (actions == env_ids % 4).all()
        self.env_ids = env_ids

    def recv(self):
        ids = self.env_ids
        self.step[ids] = np.where(self.step[ids] == self.length[ids], 0, self.step[ids] + 1)
        over, none = self.step[ids] == self.length[ids], np.zeros(len(ids), dtype=bool)
        info = {"env_id": ids, "terminated": over, "reward": 10.0 * ids * over, "elapsed_step": self.step[ids]}
        return self.pictures(ids), np.zeros(len(ids), np.float32), over, none, info


@two_scripts
@pytest.mark.parametrize("episodes", [6, 131])
def test_evaluation(module, episodes, monkeypatch):
    """Every environment plays exactly its share, 128 at a time, long games as well as short ones, each by what it shows; seeds
    are those of evaluation, limit and stickiness arrive, lives do not end games; statistics are those of the raw scores."""
    asked = []

    def network(x, precision=None):  # sure of the action that the first pixel names
        assert x.dtype == torch.uint8 and x.shape[1:] == (4, 84, 84)
        return 1000.0 * torch.nn.functional.one_hot(x[:, 0, 0, 0].long(), 4 + (module is ppo))

    monkeypatch.setattr(envpool, "make", lambda *a, **options: asked.append(options) or Uneven(options["num_envs"]))
    options = {"max_episode_steps": 100, "sticky_action_probability": 0.25, "episodic_life": True, "env_threads": 3}
    args = module.Args(env_id="Pong-v5", seed=5, eval_episodes=9, **options)
    result = module.evaluate(network, args, WORKERS, episodes)
    numbers = np.array([*range(min(episodes, 128)), *range(max(0, episodes - 128))])
    assert sorted(zip(result["returns"], result["lengths"], strict=True)) == sorted((10.0 * i, i + 1) for i in numbers)
    for name in ("mean", "std", "median", "min", "max"):
        assert result[name] == pytest.approx(float(getattr(np, name)(10.0 * numbers)))
    assert result["mean_length"] == pytest.approx(numbers.mean() + 1) and result["episodes"] == episodes
    assert result["distinct_games"] == min(episodes, 128) and result["time_limits"] == sum(numbers >= 99)
    assert (result["env_id"], result["seed"], result["greedy" if module is ppo else "epsilon"]) == ("Pong-v5", 5, 0)
    assert (result["max_episode_steps"], result["sticky_action_probability"]) == (100, 0.25)
    (options,) = asked
    assert options["env_seed"] == module.env_seeds(5, min(episodes, 128), evaluation=True) and options["num_threads"] == 3
    assert (options["max_episode_steps"], options["repeat_action_probability"]) == (100, 0.25)
    assert not options.get("episodic_life") and options["reward_clip"]


@two_scripts
def test_video(module, tmp_path):
    """One mp4 for each game, a picture a step, in the game's own size, and the same scores."""
    args = module.Args(env_id="MsPacman-v5", max_episode_steps=30)
    recorded, plain = (module.evaluate(fixed(module), args, WORKERS, 2, folder) for folder in (tmp_path / "v", None))
    assert recorded == plain and len(list((tmp_path / "v").glob("*.mp4"))) == 2
    for video in (tmp_path / "v").glob("*.mp4"):
        capture, pictures = cv2.VideoCapture(str(video)), []
        while (picture := capture.read()[1]) is not None:
            pictures.append(picture.astype(int))
        assert len(pictures) == 30 and pictures[0].shape == (210, 160, 3) and np.ptp(pictures[0], axis=2).max() > 50
        assert np.abs(np.diff(pictures, axis=0)).max() > 50
