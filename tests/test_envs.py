"""The environment's bookkeeping, evaluation and video, against raw EnvPool, ale-py and arithmetic."""

import csv
import dataclasses
import math
from types import SimpleNamespace

import ale_py
import cv2
import envpool
import numpy as np
import pytest
import torch
from conftest import MODULES, ROOT, modules_with

# The other scripts have the same environment, word for word (test_twins.py).
scripts = pytest.mark.parametrize("script", modules_with("AtariEnvs")[:1])
ppo_scripts = pytest.mark.parametrize("script", modules_with("Agent"))
CPU = torch.device("cpu")


class Always(torch.nn.Module):
    """A network whose greedy action never changes."""

    def __init__(self, num_actions, action):
        super().__init__()
        self.q_values = torch.zeros(num_actions)
        self.q_values[action] = 1.0

    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1:] == (4, 84, 84)
        return self.q_values.repeat(len(x), 1)


class Mostly(torch.nn.Module):
    """PPO's kind of network, with a policy that is the same everywhere."""

    def __init__(self, *probabilities):
        super().__init__()
        self.logits = torch.tensor(probabilities).log()

    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1:] == (4, 84, 84)
        return self.logits.repeat(len(x), 1), torch.zeros(len(x))


def step(envs, actions):
    envs.send(np.asarray(actions))
    return envs.recv()


def emulator(rom):
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    ale = ale_py.ALEInterface()
    ale.setFloat("repeat_action_probability", 0.0)
    ale.loadROM(ale_py.roms.get_rom_path(rom))
    return ale


def replay_reset(ale, ram):
    """Starts a game in ale-py that is where EnvPool is after its random no-ops: the first of 0 to 31 with the same RAM."""
    for fires in (1, 0):
        for noops in range(32):
            ale.reset_game()
            for _ in range(noops):
                ale.act(ale_py.Action.NOOP)
            for _ in range(fires):
                ale.act(ale_py.Action.FIRE)
            if (ale.getRAM() == ram).all():
                return
    pytest.fail("no number of no-ops leads to EnvPool's first state")


@scripts
@pytest.mark.parametrize("game, rom, games", [("Breakout", "breakout", 3), ("MsPacman", "ms_pacman", 2)])
def test_whole_games_replayed_in_ale(script, game, rom, games):
    """Scores, lengths, rewards, ends, reset marks and pictures of whole games equal a replay of the actions in ale-py."""
    seeds = script.env_seeds(1, 1)
    envs = script.AtariEnvs(f"{game}-v5", seeds, 1)
    raw = envpool.make(f"{game}-v5", env_type="gymnasium", num_envs=1, env_seed=seeds, num_threads=1)
    ale = emulator(rom)
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
        raw_observations, _, _, _, info = raw.step(np.array([action], dtype=np.int32))
        assert (observations == raw_observations).all()
        assert is_reset[0] == over
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
        assert rewards[0] == np.sign(reward)
        assert terminations[0] == over and dones[0] == over
        if over:
            expected.append((score, length, 0))
        else:
            picture = np.maximum(previous, ale.getScreenGrayscale())
            picture = cv2.resize(picture, (84, 84), interpolation=cv2.INTER_AREA)
            assert np.abs(picture.astype(int) - observations[0, -1]).max() <= 1
        reported += ended
    assert reported == expected
    assert len({s for s, _, _ in expected}) > 1 or len({n for _, n, _ in expected}) > 1


@scripts
def test_time_limit(script):
    """A time limit truncates and never terminates; the step after it is the reset; score and length start anew."""
    envs = script.AtariEnvs("MsPacman-v5", script.env_seeds(1, 3), 1, max_episode_steps=100)
    assert envs.reset().shape == (3, 4, 84, 84)
    rng = np.random.default_rng(0)
    score = np.zeros(3)
    scores = []
    for t in range(101 * 4):
        _, rewards, terminations, dones, is_reset, games = step(envs, rng.integers(envs.num_actions, size=3))
        assert rewards.shape == terminations.shape == dones.shape == is_reset.shape == (3,)
        assert not terminations.any()  # nobody loses all lives within 100 steps
        assert (dones == (t % 101 == 99)).all() and (is_reset == (t % 101 == 100)).all()
        if is_reset.any():
            assert (rewards == 0).all() and not dones.any() and not games
            score[:] = 0
        score += rewards * 10  # every reward in the first steps of this game is a pellet of ten points
        assert sorted(i for *_, i in games) == ([0, 1, 2] if dones.all() else [])
        for episodic_return, episodic_length, i in games:
            assert episodic_length == 100
            assert episodic_return == score[i]
            scores.append(episodic_return)
    assert len(scores) == 12 and min(scores) > 0  # so a score carried over would show


@scripts
def test_game_over_at_the_time_limit_is_a_termination(script):
    """Where game over and time limit fall on the same step, nothing is left to bootstrap from."""
    policy = np.random.default_rng(3)
    envs = script.AtariEnvs("Breakout-v5", script.env_seeds(1, 1), 1)
    envs.reset()
    actions = []
    while True:
        actions.append(policy.integers(envs.num_actions, size=1))
        *_, games = step(envs, actions[-1])
        if games:
            break
    for limit, terminated in [(len(actions), True), (len(actions) - 1, False)]:
        limited = script.AtariEnvs("Breakout-v5", script.env_seeds(1, 1), 1, max_episode_steps=limit)
        limited.reset()
        for action in actions[:limit]:
            _, _, terminations, dones, _, games = step(limited, action)
        assert dones[0] and bool(terminations[0]) == terminated
        assert [g[1] for g in games] == [limit]


@scripts
def test_the_action_of_a_reset_step_has_no_effect(script):
    """Two copies of a game that act differently on reset steps only stay equal, picture by picture."""
    first, second = (script.AtariEnvs("Breakout-v5", script.env_seeds(1, 2), 1, max_episode_steps=30) for _ in range(2))
    first.reset(), second.reset()
    rng = np.random.default_rng(0)
    resets, done = 0, np.zeros(2, dtype=bool)
    for _ in range(100):
        actions = rng.integers(first.num_actions, size=2)
        other = np.where(done, (actions + 1) % first.num_actions, actions)
        a, b = step(first, actions), step(second, other)
        assert all((x == y).all() for x, y in zip(a[:5], b[:5], strict=True)) and a[5] == b[5]
        resets, done = resets + int(a[4].sum()), a[3]
    assert resets >= 4


@scripts
def test_episodic_life(script):
    """A lost life terminates but reports no game; the game's score and length run over all its lives."""
    seeds = script.env_seeds(1, 2)
    envs = script.AtariEnvs("Breakout-v5", seeds, 1, episodic_life=True)
    raw = envpool.make(
        "Breakout-v5", env_type="gymnasium", num_envs=2, env_seed=seeds, num_threads=1, episodic_life=True, reward_clip=False
    )
    envs.reset(), raw.reset()
    rng = np.random.default_rng(1)
    score, length, lives, ended, lost = np.zeros(2), np.zeros(2, dtype=int), np.zeros(2, dtype=int), [], 0
    while len(ended) < 4:
        actions = rng.integers(envs.num_actions, size=2).astype(np.int32)
        _, _, terminations, dones, is_reset, games = step(envs, actions)
        _, raw_rewards, *_, info = raw.step(actions)
        score, length = score + raw_rewards, length + ~is_reset
        assert (dones == terminations).all()
        over = info["lives"] == 0
        assert (terminations[~is_reset] == (info["lives"] < lives)[~is_reset]).all() or not lives.all()
        assert sorted(i for *_, i in games) == np.flatnonzero(dones & over).tolist()
        lost += int((dones & ~over).sum())
        for episodic_return, episodic_length, i in games:
            assert (episodic_return, episodic_length) == (score[i], length[i])
            ended.append(episodic_return)
            score[i] = length[i] = 0
        lives = info["lives"].copy()
    assert lost >= 4 * 4  # five lives each


@scripts
def test_rewards_are_clipped_and_scores_raw(script):
    """Learning sees -1, 0 or 1, episode statistics the points of the game; a lost point is -1."""
    for game, seed in [("MsPacman-v5", 1), ("Pong-v5", 1)]:
        seeds = script.env_seeds(seed, 2)
        envs = script.AtariEnvs(game, seeds, 1, max_episode_steps=120)
        raw = envpool.make(game, env_type="gymnasium", num_envs=2, env_seed=seeds, num_threads=1, max_episode_steps=120)
        envs.reset(), raw.reset()
        rng = np.random.default_rng(0)
        score, seen = np.zeros(2), set()
        for _ in range(120):
            actions = rng.integers(envs.num_actions, size=2).astype(np.int32)
            _, rewards, *_, games = step(envs, actions)
            raw_rewards = raw.step(actions)[1]
            assert (rewards == np.sign(raw_rewards)).all()
            score, seen = score + raw_rewards, seen | set(rewards.tolist())
        assert seen == ({0.0, 1.0} if game == "MsPacman-v5" else {0.0, -1.0})
        assert sorted(games, key=lambda g: g[2]) == [(score[i], 120, i) for i in range(2)]
        assert game == "Pong-v5" or score.max() >= 50


@scripts
def test_partial_steps(script):
    """Games stepped alone keep their own statistics: the env_ids of send() and recv() are not positions."""
    envs = script.AtariEnvs("Breakout-v5", script.env_seeds(1, 3), 1, max_episode_steps=10)
    envs.reset()
    reports = []
    for _ in range(10):
        envs.send(np.zeros(1, dtype=np.int64), np.array([2], dtype=np.int32))
        observations, *flags, games = envs.recv()
        assert len(observations) == 1 and all(len(flag) == 1 for flag in flags)
        reports += games
    assert [(length, i) for _, length, i in reports] == [(10, 2)]


@scripts
def test_seeds(script):
    """Training and evaluation never share a game's seed, nor do runs with different seeds; all is reproducible."""
    runs = {(seed, ev): script.env_seeds(seed, 1000, ev) for seed in range(1, 6) for ev in (False, True)}
    for seeds in runs.values():
        assert len(seeds) == 1000 and len(set(seeds)) >= 999
        assert all(type(s) is int and 0 <= s < 2**31 for s in seeds)
    training = set().union(*(runs[seed, False] for seed in range(1, 6)))
    evaluation = set().union(*(runs[seed, True] for seed in range(1, 6)))
    assert not training & evaluation
    assert not set(runs[1, False]) & set(runs[2, False]) and not set(runs[1, True]) & set(runs[2, True])
    assert not set(script.env_seeds(1, 1000, start=2048)) & {*runs[1, False], *script.env_seeds(1, 1000, start=4096)}
    assert runs[3, False] == script.env_seeds(3, 1000) and runs[3, False][:7] == script.env_seeds(3, 7)


@scripts
@pytest.mark.parametrize(
    "files, environment, cores",
    [
        ({}, {}, 16),
        ({"cpu.max": "max 100000\n"}, {}, 16),
        ({"cpu.max": "350000 100000\n"}, {}, 4),
        ({"cpu.max": "5000 100000\n"}, {}, 1),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, {}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, {}, 16),
        ({}, {"SLURM_CPUS_PER_TASK": "6", "SLURM_CPUS_ON_NODE": "12"}, 6),
        ({}, {"SLURM_CPUS_ON_NODE": "12"}, 12),
        ({}, {"SLURM_CPUS_PER_TASK": "64"}, 16),
        ({"cpu.max": "300000 100000\n"}, {"SLURM_CPUS_PER_TASK": "8"}, 3),
    ],
)
def test_granted_cores(script, files, environment, cores, monkeypatch, tmp_path):
    """The least of what affinity, the container and Slurm grant, on a machine of 16 cores."""
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(script, "Path", lambda root, name: tmp_path / name)
    monkeypatch.setattr(script.os, "sched_getaffinity", lambda process: range(16), raising=False)
    assert script.granted_cores() == cores


@scripts
def test_seeds_decide_the_games(script):
    """Equal seeds give equal first pictures and random starts differ from seed to seed."""
    first, again, other = (script.AtariEnvs("MsPacman-v5", script.env_seeds(s, 6), 1) for s in (1, 1, 2))
    pictures = [envs.reset() for envs in (first, again, other)]
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] != pictures[2]).any()


def score_table(script):
    """(game, random, human) of every entry of the script's own table."""
    entries = [e.split() for e in script.RANDOM_AND_HUMAN_SCORES.replace("\n", "|").split("|") if e.strip()]
    return {f"{name}-v5": (float(random), float(human)) for name, random, human in entries}


@scripts
def test_score_table(script):
    """The 57 games and their scores are those of the data file, and EnvPool has every one of them."""
    with open(ROOT / "benchmark" / "atari57_scores.csv", newline="") as file:
        expected = {row["env_id"]: (float(row["random"]), float(row["human"])) for row in csv.DictReader(file)}
    table = score_table(script)
    assert len(table) == 57 and table == expected
    assert set(table) <= set(script.atari_ids())


@scripts
def test_human_normalized_score(script):
    """A random player has 0, a human 1, a game outside the table none."""
    for env_id, (random, human) in score_table(script).items():
        assert script.human_normalized_score(env_id, random) == 0
        assert script.human_normalized_score(env_id, human) == 1
    assert script.human_normalized_score("Skiing-v5", -4336.9 + 12761.19) == pytest.approx(2)
    assert script.human_normalized_score("Adventure-v5", 1.0) is None
    assert script.human_normalized_score("Nonsense-v5", 1.0) is None


@scripts
def test_atari_ids(script):
    """The accepted ids exist in EnvPool and are games: EnvPool's registry holds much else that ends in -v5."""
    ids = script.atari_ids()
    assert len(ids) == len(set(ids)) and set(ids) <= set(envpool.list_all_envs())
    assert "Breakout-v5" in ids and "Ant-v5" not in ids and "Ant-v5" in envpool.list_all_envs()


@scripts
def test_action_sets_equal_the_emulators(script):
    """EnvPool and ale-py agree on the number of actions of every accepted game, so a model plays in both."""
    differ = []
    for env_id in script.atari_ids():
        spec = envpool.make_spec(env_id)
        if len(emulator(spec.config.task).getMinimalActionSet()) != spec.action_space.n:
            differ.append(env_id)
    assert not differ


@scripts
@pytest.mark.parametrize("episodes", [1, 5, 131])
def test_evaluation_plays_each_share(script, episodes):
    """Exactly the wanted number of games, each cut at the time limit, 128 at a time, and right statistics of raw scores."""
    result = script.evaluate(Always(9, 2), "MsPacman-v5", episodes, 0.0, 1, CPU, 2, max_episode_steps=12)
    assert len(result["returns"]) == len(result["lengths"]) == result["episodes"] == episodes
    assert set(result["lengths"]) == {12} and result["mean_length"] == 12
    assert result["mean"] == pytest.approx(sum(result["returns"]) / episodes)
    variance = sum((r - result["mean"]) ** 2 for r in result["returns"]) / episodes
    assert result["std"] == pytest.approx(math.sqrt(variance))
    assert result["median"] == pytest.approx(sorted(result["returns"])[episodes // 2])
    assert (result["min"], result["max"]) == (min(result["returns"]), max(result["returns"]))
    assert result["human_normalized_score"] == script.human_normalized_score("MsPacman-v5", result["mean"])
    assert (result["env_id"], result["epsilon"], result["seed"]) == ("MsPacman-v5", 0.0, 1)
    assert result["time_limits"] == episodes
    assert result["distinct_games"] == 1  # the one action, whatever the ghosts do


@scripts
def test_distinct_games_have_different_actions(script):
    """A greedy policy in Breakout plays as many games as there are no-op starts that matter, 4, also where an environment
    plays two; random actions make all differ."""
    network = script.QNetwork(4).eval()
    greedy, random = (script.evaluate(network, "Breakout-v5", 140, e, 1, CPU, 2, max_episode_steps=40) for e in (0.0, 0.5))
    assert 1 <= greedy["distinct_games"] <= 4 < 140 == random["distinct_games"]


@pytest.mark.parametrize(
    "script, network, greedy, varied",
    [("pqn_abs_atari", Always(4, 1), {"eval_epsilon": 0.0}, {"eval_epsilon": 0.5})]
    + [("ppo_abs_atari", Mostly(0.4, 0.2, 0.2, 0.2), {"eval_greedy": True}, {"eval_greedy": False})],
)
def test_games_that_repeat_are_said(script, network, greedy, varied, tmp_path, capsys):
    """Where less than half of the games differ, a line says how many do and what would vary them."""
    script = MODULES[f"{script}.py"]
    for settings, repeat in ((greedy, True), (varied, False)):
        args = script.Args(env_id="Breakout-v5", eval_episodes=4, max_episode_steps=12, **settings)
        script.evaluate_and_record(network, args, CPU, tmp_path)
        assert ("these games repeat 1 sequence(s) of actions; " in capsys.readouterr().out) is repeat


@scripts
def test_evaluation_is_deterministic(script):
    """The same seed gives the same games, also with random actions; another seed or epsilon gives others."""

    def play(epsilon, seed):
        return script.evaluate(Always(9, 2), "MsPacman-v5", 6, epsilon, seed, CPU, 2, max_episode_steps=100)

    assert play(0.5, 1) == play(0.5, 1)
    assert play(0.5, 1)["returns"] != play(0.5, 2)["returns"]
    assert play(0.5, 1)["returns"] != play(0.0, 1)["returns"]


@ppo_scripts
def test_ppo_evaluation_draws_its_own_noise(script, monkeypatch):
    """Not what training with the same seed begins with."""
    seeds, draw = [], script.gumbel_noise
    monkeypatch.setattr(script, "gumbel_noise", lambda shape, rng: seeds.append(rng.initial_seed()) or draw(shape, rng))
    for seed in (5, 6):
        script.evaluate(Mostly(*[1 / 9] * 9), "MsPacman-v5", 2, False, seed, CPU, 1, max_episode_steps=3)
    assert len(set(seeds)) == 2 and not set(seeds) & {5, 6}


@ppo_scripts
def test_ppo_evaluation_samples_or_is_greedy(script):
    """Sampled as trained, the games are those of the seed and repeat; greedy, they are those of the most likely action,
    whatever its probability; scores and lengths count the wanted number of games, each cut at the time limit."""

    def play(greedy, seed, *probabilities):
        return script.evaluate(Mostly(*probabilities), "MsPacman-v5", 6, greedy, seed, CPU, 1, max_episode_steps=100)

    uniform = [1 / 9] * 9
    mild, strong = [0.1] * 9, [1e-30] * 9
    mild[3], strong[3] = 0.2, 1.0
    assert play(True, 1, *mild) == play(True, 1, *strong) == play(False, 1, *strong) | {"greedy": True}
    sampled = play(False, 1, *uniform)
    assert sampled == play(False, 1, *uniform) and sampled["greedy"] is False
    assert sampled["returns"] != play(True, 1, *mild)["returns"] and sampled["returns"] != play(False, 2, *uniform)["returns"]
    assert sampled["episodes"] == len(sampled["returns"]) == 6 and set(sampled["lengths"]) == {100}
    assert len(set(sampled["returns"])) > 1  # every game has samples of its own
    assert sampled["mean"] == pytest.approx(sum(sampled["returns"]) / 6)
    assert sampled["human_normalized_score"] == script.human_normalized_score("MsPacman-v5", sampled["mean"])


@ppo_scripts
def test_ppo_video(script, tmp_path):
    """One mp4 and one raw score for each game, sampled or greedy; a sure policy plays the same either way."""
    sure, scores = [1e-30] * 9, []
    sure[2] = 1.0
    for greedy, policy in [(True, sure), (False, sure), (False, [1 / 9] * 9)]:
        folder = tmp_path / f"videos{len(scores)}"
        scores.append(script.record_video(Mostly(*policy), "MsPacman-v5", 2, greedy, 1, CPU, folder, max_episode_steps=100))
        assert len(scores[-1]) == len(list(folder.glob("*.mp4"))) == 2
    assert scores[0] == scores[1] != scores[2]


@scripts
def test_video(script, tmp_path):
    """One mp4 and one raw score for each game, in Gymnasium's own view of the game, within the time limit."""
    scores = script.record_video(Always(9, 2), "MsPacman-v5", 2, 0.0, 1, CPU, tmp_path / "videos", max_episode_steps=30)
    videos = sorted((tmp_path / "videos").glob("*.mp4"))
    assert len(scores) == len(videos) == 2 and all(type(s) is float and s >= 0 and s % 10 == 0 for s in scores)
    for video in videos:
        capture = cv2.VideoCapture(str(video))
        counted = 0
        while capture.read()[0]:
            counted += 1
        assert 20 <= counted <= 140 and capture.get(cv2.CAP_PROP_FRAME_WIDTH) == 160


def test_score_file_names_the_atari10():
    """Ten games carry a weight, for the median predicted from Atari-10."""
    with open(ROOT / "benchmark" / "atari57_scores.csv", newline="") as file:
        assert sum(bool(row["atari10_weight"]) for row in csv.DictReader(file)) == 10


@scripts
def test_args_default_to_the_published_environment(script):
    """No sticky actions, whole games, 108,000 frames, unless asked for."""
    defaults = {field.name: field.default for field in dataclasses.fields(script.Args)}
    assert (defaults["sticky_action_probability"], defaults["episodic_life"], defaults["max_episode_steps"]) == (
        0,
        False,
        27000,
    )


class Uneven:
    """Behind EnvPool's interface, games of 1, 2, 3, ... steps, one length and score per environment, whose picture tells which
    action, a number of its own, is right; another one fails the test."""

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

    def close(self):
        pass


class Reading(torch.nn.Module):
    """A network that is sure of the action that the first pixel names."""

    def __init__(self, with_values):
        super().__init__()
        self.with_values = with_values

    def forward(self, x):
        scores = 1000.0 * torch.nn.functional.one_hot(x[:, 0, 0, 0].long(), 4)
        return (scores, torch.zeros(len(x))) if self.with_values else scores


@pytest.mark.parametrize("script", [MODULES["pqn_abs_atari.py"], MODULES["ppo_abs_atari.py"]], ids=lambda s: s.__name__)
@pytest.mark.parametrize("episodes", [6, 131])
def test_long_games_count_as_much_as_short_ones(script, episodes, monkeypatch):
    """Every environment plays its share, the long games too, each by what it shows; seeds are those of evaluation, limit and
    stickiness arrive."""
    asked = []
    monkeypatch.setattr(envpool, "make", lambda *a, **options: asked.append(options) or Uneven(options["num_envs"]))
    result = script.evaluate(Reading(hasattr(script, "Agent")), "Pong-v5", episodes, 0.0, 5, CPU, 1, 500, 0.25)
    numbers = [*range(min(episodes, 128)), *range(max(0, episodes - 128))]
    assert sorted(zip(result["returns"], result["lengths"], strict=True)) == sorted((10.0 * i, i + 1) for i in numbers)
    (options,) = asked
    assert options["env_seed"] == script.env_seeds(5, min(episodes, 128), evaluation=True)
    assert (options["max_episode_steps"], options["repeat_action_probability"]) == (500, 0.25)
    assert (options["episodic_life"], options["reward_clip"]) == (False, True)


@scripts
def test_sticky_actions_stick(script):
    """The same actions lead the same way twice with probability 0, and another way with 0.9."""
    plain, again, sticky = (
        script.AtariEnvs("Breakout-v5", script.env_seeds(1, 2), 1, sticky_action_probability=p) for p in (0, 0, 0.9)
    )
    plain.reset(), again.reset(), sticky.reset()
    pictures = [
        [step(envs, a)[0] for envs in (plain, again, sticky)] for a in np.random.default_rng(0).integers(4, size=(30, 2))
    ]
    assert all((a == b).all() for a, b, _ in pictures) and any((a != c).any() for a, _, c in pictures)
