# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "envpool==1.2.5", "filelock==4.3.1", "imageio-ffmpeg==0.8.1", "joblib==1.6.0", "numpy==2.4.6", "tensorboard==2.21.0",
#   "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.17",
# ]
# ///
"""PQN with Adaptive Batch Scaling (ABS) and the L network on Atari, in one file.

PQN (Gallici et al., arXiv 2407.04811) is Q-learning without replay buffer or target network: collect a rollout, compute
Q(lambda) targets once, fit them, throw the rollout away. ABS (Park, arXiv 2605.21557) changes the rollout's length, and with
it the batch, as training goes on: short while the policy still moves, long once it has settled. How much it moves is its
behavioral divergence, the share of states whose greedy action one iteration changed. The network is a multi-skip
residual MLP on a wide CNN (Castanyer et al., arXiv 2506.15544), and rollouts grow to 128 steps.

    python pqn_l_abs_atari.py --env-id Breakout-v5                  # ABS, the published settings
    python pqn_l_abs_atari.py --env-id Pong-v5 --no-adapt-rollout   # the fixed-batch baseline
    python pqn_l_abs_atari.py --run-dir runs/X                      # begin run X, or continue it, or evaluate it
    torchrun --nproc_per_node=4 pqn_l_abs_atari.py                  # on four GPUs

A step is an agent step (4 frames).
"""

import ctypes
import difflib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import envpool
import joblib
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import tyro
from envpool.atari.registration import atari_game_list
from filelock import FileLock
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# torchrun starts several processes that train one policy, each on its share of the environments; rank 0 logs and saves
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
DISTRIBUTED = set(NAMES) <= set(os.environ)  # WORLD_SIZE alone is left over from something else
RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE = (int(os.environ[n]) for n in NAMES) if DISTRIBUTED else (0, 1, 0, 1)
ATARI_IDS = ["".join(word.capitalize() for word in game.split("_")) + "-v5" for game in atari_game_list]


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # the name of this experiment, part of the run folder's name
    seed: int = 1  # seed of network, actions, minibatches and games
    torch_deterministic: bool = True  # if toggled, cuDNN uses deterministic algorithms only
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where the network runs; auto is CUDA where there is one
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of the encoder; auto is bfloat16 where that is faster
    torch_threads: int = 0  # CPU cores for the network; 0 is all that this process may use
    compile: bool = False  # if toggled, torch.compile the network
    track: bool = False  # if toggled, the run is also sent to Weights & Biases (needs `pip install wandb`)
    wandb_project_name: str = "adaptive-batch-scaling"  # the Weights & Biases project
    wandb_entity: str | None = None  # the Weights & Biases entity (team)
    run_dir: str = ""  # folder of the run, continued if it holds one; empty: runs/<game>__<experiment>__<seed>__<time>
    init_from: str = ""  # checkpoint.pt of another run; a new run begins with its network and optimizer
    checkpoint_interval: int = 0  # agent steps between two checkpoints; 0 is about every 5 minutes
    keep_checkpoints: bool = False  # if toggled, all checkpoints stay, as checkpoint_<step>.pt

    # Environment
    env_id: str = "Breakout-v5"  # the EnvPool id of the Atari game
    num_envs: int = 128  # number of parallel games, E
    env_threads: int = 0  # threads of the emulator; 0 is one per core that this process may use
    episodic_life: bool = False  # if toggled, losing a life ends the episode in training (scores still count whole games)
    sticky_action_probability: float = 0.0  # probability that the game repeats the previous action
    max_episode_steps: int = 27000  # time limit of a game in agent steps (108,000 frames)

    # PQN
    total_timesteps: int = 20_000_000  # length of training in agent steps; with --init-from, 0 only evaluates
    learning_rate: float = 2.5e-4  # learning rate of the optimizer
    anneal_lr: bool = False  # if toggled, the learning rate falls linearly to 0
    num_steps: int = 32  # steps per environment of a rollout that is not adapted, and the base of --scale-epochs
    gamma: float = 0.99  # discount factor per agent step
    q_lambda: float = 0.65  # lambda of the Q(lambda) targets
    num_minibatches: int = 4  # minibatches per epoch
    update_epochs: int = 2  # passes over each rollout
    max_grad_norm: float = 10.0  # gradients are clipped to this norm
    start_e: float = 1.0  # epsilon (share of random actions) at the start
    end_e: float = 0.001  # epsilon after the decay
    exploration_fraction: float = 0.1  # share of total-timesteps over which epsilon falls linearly from start-e to end-e

    # Adaptive Batch Scaling
    adapt_rollout: bool = True  # if toggled off, all rollouts have num-steps steps: the fixed-batch baseline
    adapt_signal: Literal["divergence", "time", "replay"] = "divergence"  # what sets the target length; time: linear growth
    replay: str = ""  # for --adapt-signal replay: checkpoint.pt of another run, whose lengths this run walks through
    rollout_length_min: int = 16  # shortest rollout in steps per environment, L_min; also the first one
    rollout_length_max: int = 128  # longest rollout in steps per environment, L_max
    adapt_interval: int = 50  # measure the divergence and adapt the length every so many iterations, K
    divergence_min: float = 0.05  # divergence at or below which the target is L_max
    divergence_max: float = 0.95  # divergence at or above which the target is L_min
    schedule: Literal["log", "linear", "exp"] = "log"  # how the target falls from L_max to L_min between the two
    rollout_smoothing: float = 0.1  # share of the way to the target that one adaptation goes
    divergence_window: int = 20  # the rule is fed the mean of so many latest measurements
    divergence_warmup: int = 10  # the length stays at L_min until so many measurements exist
    reference_batch_size: int = 2048  # number of states of the rollout on which divergence is measured, M
    scale_epochs: bool = False  # if toggled, rollouts longer than num-steps get more epochs in proportion, rounded down

    # Evaluation
    eval_episodes: int = 100  # number of full games that the trained policy plays; 0 skips the evaluation
    eval_epsilon: float = 0.0  # share of random actions in evaluation and videos
    capture_video: bool = False  # if toggled, the trained policy is recorded in colour to <run folder>/videos (mp4)
    video_episodes: int = 3  # number of full games to record

    def __post_init__(self):
        """ValueError, which tyro shows in a box and with exit code 2, for values that cannot work."""
        if self.env_id not in ATARI_IDS:
            game = re.sub(r"^ALE/|(-ram|NoFrameskip|Deterministic)*-v\d$", "", self.env_id)
            close = difflib.get_close_matches(f"{game}-v5", ATARI_IDS, cutoff=0.5) or ["Breakout-v5", "Pong-v5"]
            raise ValueError(f"--env-id {self.env_id} is no Atari game of EnvPool; did you mean {' or '.join(close)}?")
        at_least = dict.fromkeys("num_envs num_minibatches update_epochs adapt_interval divergence_window".split(), 1)
        at_least |= {"video_episodes": 1, "num_steps": 2, "rollout_length_min": 2, "max_episode_steps": 2}
        at_least |= dict.fromkeys("learning_rate max_grad_norm divergence_min rollout_smoothing".split(), 1e-15)
        shares = "gamma q_lambda start_e end_e exploration_fraction sticky_action_probability divergence_max rollout_smoothing"
        for name, value in vars(self).items():
            low, high = at_least.get(name, 0), 1 if name in f"{shares} eval_epsilon".split() else 10**15
            if isinstance(value, int | float) and not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')} {value} must lie between {low} and {high}")
        smallest = self.num_envs * (self.rollout_length_min if self.adapt_rollout else self.num_steps)
        wrong = {
            "--rollout-length-min is above --rollout-length-max": self.rollout_length_min > self.rollout_length_max,
            "--divergence-min must be less than --divergence-max": self.divergence_min >= self.divergence_max,
            "--adapt-signal replay needs --replay <run>/checkpoint.pt, and that nothing else": bool(self.replay)
            != (self.adapt_rollout and self.adapt_signal == "replay"),
            f"--num-envs must be a multiple of the {WORLD_SIZE} processes": self.num_envs % WORLD_SIZE,
            "--num-minibatches is more than the samples of a rollout": self.num_minibatches * WORLD_SIZE > smallest,
            f"--total-timesteps must be {smallest} or more": self.total_timesteps < smallest and not self.init_from,
        }
        if messages := [message for message, is_wrong in wrong.items() if is_wrong]:
            raise ValueError("; ".join(messages))


# What may differ when a run is continued: where and how it runs, and what is done beside training (eval_greedy is PPO's)
MAY_CHANGE = set(
    "torch_deterministic device torch_threads compile track wandb_project_name wandb_entity run_dir checkpoint_interval "
    "keep_checkpoints env_threads eval_episodes eval_epsilon eval_greedy capture_video video_episodes".split()
)


# ---- Environment ----------------------------------------------------------------------------------------------------------
class AtariEnvs:
    """EnvPool with the bookkeeping that it leaves to its caller.

    EnvPool resets on the step after the end: that step ignores the action, has reward 0 and returns the first observation of
    the next episode. It is no transition, and `is_reset` marks it. A time limit is `truncated`, never `terminated`.
    """

    def __init__(self, args, seeds, num_threads, **options):
        self.max_episode_steps = args.max_episode_steps
        self.envpool = envpool.make(
            args.env_id,
            env_type="gymnasium",
            num_envs=len(seeds),
            env_seed=seeds,
            num_threads=min(num_threads, len(seeds)),
            max_episode_steps=args.max_episode_steps,
            repeat_action_probability=args.sticky_action_probability,
            reward_clip=True,
            **options,
        )
        self.num_actions = int(self.envpool.action_space.n)
        self.episode_return = np.zeros(len(seeds))  # raw score of the running game, all lives
        self.episode_length = np.zeros(len(seeds), dtype=np.int64)  # its agent steps
        self.done = np.zeros(len(seeds), dtype=bool)

    def reset(self):
        """Starts all games. Returns observations (num_envs, 4, 84, 84) uint8."""
        return self.envpool.reset()[0]

    def send(self, actions, env_ids=None):
        """Starts one step with actions (num_envs,), or with (n,) in the n games env_ids only."""
        self.envpool.send(actions.astype(np.int32), env_ids)

    def recv(self):
        """Waits for the step. Returns observations (n, 4, 84, 84) uint8, clipped rewards, terminations, dones, is_reset, all
        (n,), and the (raw return, length in agent steps, game) of every game that ended in this step."""
        observations, rewards, terminated, truncated, info = self.envpool.recv()
        env_ids = info["env_id"]
        is_reset = self.done[env_ids]
        game_over = info["terminated"].astype(bool)  # unlike `terminated`, also where it coincides with the time limit
        terminations = terminated | game_over
        dones = terminations | truncated
        self.done[env_ids] = dones
        self.episode_return[env_ids] += info["reward"]
        self.episode_length[env_ids] += ~is_reset
        # A lost life may end an episode, but only game over and the time limit end a game
        ended = env_ids[dones & (game_over | truncated | (info["elapsed_step"] >= self.max_episode_steps))]
        games = [(float(self.episode_return[i]), int(self.episode_length[i]), int(i)) for i in ended]
        self.episode_return[ended] = self.episode_length[ended] = 0
        return observations, rewards, terminations, dones, is_reset, games


def env_seeds(seed, num_envs, evaluation=False, start=0):
    """One emulator seed per game, (num_envs,). Training seeds are even and evaluation seeds odd; hashing keeps runs with
    neighbouring seeds apart. `start`, the step at which a run is continued, gives it other games than it began with."""
    seeds = np.random.SeedSequence([seed, evaluation, start]).generate_state(num_envs)
    return [int(s) // 4 * 2 + evaluation for s in seeds]


# ---- Network --------------------------------------------------------------------------------------------------------------
def layer_init(layer, std=2**0.5, bias_const=0.0):
    nn.init.orthogonal_(layer.weight, std)
    nn.init.constant_(layer.bias, bias_const)
    return layer


class PixelConv2d(nn.Conv2d):
    """Convolution of pixels 0..255 (uint8) as if scaled to [0, 1], by its weights, which costs nothing. In channels_last."""

    def forward(self, x):
        dtype = torch.bfloat16 if torch.is_autocast_enabled(x.device.type) else torch.float32
        x = torch.stack(x.unbind(1), -1).permute(0, 3, 1, 2)  # to channels_last, while a pixel is one byte
        return self._conv_forward(x.to(dtype), self.weight / 255, self.bias)


class LayerNormCHW(nn.LayerNorm):
    """nn.LayerNorm over channels, height and width, without the copies that it would make of channels_last features."""

    def forward(self, x):
        weight, bias = self.weight.permute(1, 2, 0), self.bias.permute(1, 2, 0)
        return nn.functional.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, self.eps).permute(0, 3, 1, 2)


class MultiSkipMLP(nn.Module):
    """Residual blocks that all see the encoder's features g directly: h = h + LN(W2 relu(LN(W1 relu(h)))) + g.
    Features (batch, width) to (batch, width) float32."""

    def __init__(self, num_blocks, width):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(),
                layer_init(nn.Linear(width, width)),
                nn.LayerNorm(width),
                nn.ReLU(),
                layer_init(nn.Linear(width, width)),
                nn.LayerNorm(width),
            )
            for _ in range(num_blocks)
        )

    def forward(self, g):
        h = g = g.float()  # the sum over the blocks stays float32 in a bfloat16 encoder
        for block in self.blocks:
            h = h + block(h) + g
        return h


class QNetwork(nn.Module):
    """CNN and multi-skip MLP. Observations (batch, 4, 84, 84) uint8 to Q-values (batch, num_actions) float32."""

    def __init__(self, num_actions, precision=torch.float32):
        super().__init__()
        self.encoder = nn.Sequential(
            layer_init(PixelConv2d(4, 64, 8, stride=4)),
            LayerNormCHW([64, 20, 20]),
            nn.ReLU(),
            layer_init(nn.Conv2d(64, 128, 4, stride=2)),
            LayerNormCHW([128, 9, 9]),
            nn.ReLU(),
            layer_init(nn.Conv2d(128, 128, 3, stride=1)),
            LayerNormCHW([128, 7, 7]),
            nn.Flatten(),  # before the ReLU, whose backward pass is slow where gradient and features differ in layout
            nn.ReLU(),
            layer_init(nn.Linear(6272, 512)),
            nn.LayerNorm(512),
            MultiSkipMLP(5, 512),
            layer_init(nn.Linear(512, 512)),
            nn.LayerNorm(512),
            nn.ReLU(),
        )
        self.head = layer_init(nn.Linear(512, num_actions))
        self.precision = precision

    def forward(self, x, precision=None):
        precision = precision or self.precision
        with torch.autocast(x.device.type, precision, enabled=precision != torch.float32):
            features = self.encoder(x)
        return self.head(features.float())  # float32 in any case: rounded Q-values would tie


# ---- Adaptive Batch Scaling and targets: pure functions -------------------------------------------------------------------
def behavioral_divergence(new_actions, old_actions):
    """Share of states whose greedy action changed, a float in [0, 1] (Park, arXiv 2605.21557).

    new_actions and old_actions, (M,): greedy actions of the updated policy and of the one before, on the same M states.
    """
    return int((new_actions != old_actions).sum()) / len(new_actions)


def target_rollout_length(divergence, length_min, length_max, divergence_min, divergence_max, schedule="log"):
    """Rollout length in steps per environment, a float, that ABS wants at this divergence (Park, arXiv 2605.21557).

    Falls monotonically from length_max at divergence_min and below to length_min at divergence_max and above: linearly in
    log(divergence) ("log"), in divergence ("linear") or in exp(divergence), divergence scaled to [0, 1] ("exp").
    """
    clipped = min(max(divergence, divergence_min), divergence_max)
    a = (clipped - divergence_min) / (divergence_max - divergence_min)
    if schedule == "log":
        a = math.log(clipped / divergence_min) / math.log(divergence_max / divergence_min)
    elif schedule == "exp":
        a = math.expm1(a) / math.expm1(1)
    return length_max - a * (length_max - length_min)


def q_lambda_returns(rewards, terminations, dones, next_values, gamma, q_lambda):
    """Q(lambda) returns (Gallici et al., arXiv 2407.04811, with time limits bootstrapped). All tensors (num_steps, num_envs).

    next_values[t] = max_a Q(s_{t+1}, a) at the state actually reached, the last one of the episode where it ended.
    terminations cut the bootstrap; dones (terminations and time limits) cut only the lambda trace.
    """
    returns = torch.zeros_like(next_values)
    for t in reversed(range(len(rewards))):
        bootstrap = next_values[t]
        if t + 1 < len(rewards):
            trace = q_lambda * returns[t + 1] + (1 - q_lambda) * next_values[t]
            bootstrap = torch.where(dones[t].bool(), bootstrap, trace)
        returns[t] = rewards[t] + gamma * torch.where(terminations[t].bool(), torch.zeros_like(bootstrap), bootstrap)
    return returns


def td_loss(network, batch, inds):
    """Squared error of Q(s, a), summed over the samples inds (n,) of a batch of observations, actions, returns and weights.
    Returns the loss and, detached, (2,): loss and weighted sum of Q."""
    observations, actions, returns, weights = (x.index_select(0, inds) for x in batch)
    q_values = network(observations).gather(1, actions.unsqueeze(1)).squeeze(1)
    loss = (weights * (q_values - returns) ** 2).sum()
    return loss, torch.stack([loss.detach(), (weights * q_values.detach()).sum()])


# ---- Acting and learning, in parts that run side by side on a CPU's cores ------------------------------------------------
class Workers:
    """Maps a function over parts of a batch: on CUDA the whole batch at once, on a CPU one Python thread per core, with one
    thread of PyTorch each. They meet once per minibatch, not at every operation, where a busy core would hold up the rest."""

    def __init__(self, device, cores):
        self.device, self.cores = device, cores
        if device.type == "cpu":
            torch.set_num_threads(1)
        self.threads = ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,))

    def map(self, function, x):
        """Results of the function on x, on a CPU on equal parts of at most 512 samples, as many for each core."""
        if self.device.type == "cuda":
            return [function(x)]
        num_parts = self.cores * math.ceil(len(x) / self.cores / 512)
        return list(self.threads.map(function, x.tensor_split(min(num_parts, len(x)))))

    def forward(self, network, observations, precision=None):
        """Outputs of the network without gradient on observations (n, 4, 84, 84), a tensor or array."""
        network = torch.no_grad()(partial(network, precision=precision))  # each thread has a grad mode of its own
        return torch.cat(self.map(network, torch.as_tensor(observations, device=self.device)))

    def gradient(self, loss_of, parameters, inds):
        """Sets p.grad to the gradient of loss_of(inds)[0] over parts and processes. Returns the sum of loss_of(inds)[1]."""

        def part_gradient(part):
            loss, logs = loss_of(part)
            return logs, *torch.autograd.grad(loss, parameters)

        logs, *gradients = (sum(x[1:], x[0]) for x in zip(*self.map(part_gradient, inds), strict=True))
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient.contiguous()
        if WORLD_SIZE > 1:
            gradients = all_reduce(nn.utils.parameters_to_vector(p.grad for p in parameters))
            nn.utils.vector_to_parameters(gradients, (p.grad for p in parameters))
        return logs


# ---- Evaluation -----------------------------------------------------------------------------------------------------------
def evaluate(network, args, workers, episodes, video_folder=None):
    """Plays full games with the epsilon-greedy policy and returns a dict of statistics of their raw scores.

    Each of up to 128 environments plays exactly its share of the games, because the first to finish would be the short ones.
    Lengths are agent steps, emulator seeds never those of a training run. With video_folder, games are recorded, in colour.
    """
    num_envs = min(episodes, 128)
    seeds, num_threads = env_seeds(args.seed, num_envs, evaluation=True), args.env_threads or workers.cores
    envs = AtariEnvs(args, seeds, num_threads, render_mode="rgb_array" if video_folder else None)
    rng = np.random.default_rng([args.seed, 1])
    share = np.full(num_envs, episodes // num_envs)
    share[: episodes % num_envs] += 1
    games, observations, active = [], envs.reset(), np.arange(num_envs, dtype=np.int32)
    videos = []
    if video_folder:
        import imageio_ffmpeg

        video_folder.mkdir()
        height, width, _ = envs.envpool.render()[0].shape
        for path in [str(video_folder / f"{args.env_id}-{i + 1}.mp4") for i in range(num_envs)]:
            videos.append(imageio_ffmpeg.write_frames(path, (width, height), fps=15, macro_block_size=2))
            videos[-1].send(None)
    bar = ProgressBar(total=episodes, unit=" games")
    while len(active):
        actions = workers.forward(network, observations).argmax(1).cpu().numpy()
        explore = rng.random(len(active)) < args.eval_epsilon
        actions[explore] = rng.integers(envs.num_actions, size=explore.sum())
        envs.send(actions, active)
        observations, *_, ended = envs.recv()
        for i in active if videos else ():
            videos[i].send(envs.envpool.render(env_ids=[i])[0])
        games += ended
        share[[i for *_, i in ended]] -= 1
        playing = share[active] > 0
        observations, active = observations[playing], active[playing]
        bar.update(len(ended))
    bar.close()
    for video in videos:
        video.close()
    returns, lengths, _ = map(np.array, zip(*games, strict=True))
    names = ("env_id", "seed", "sticky_action_probability", "max_episode_steps")
    settings = {name: getattr(args, name) for name in names} | {"episodes": episodes, "epsilon": args.eval_epsilon}
    statistics = {name: float(getattr(np, name)(returns)) for name in ("mean", "std", "median", "min", "max")}
    statistics |= {"mean_length": float(lengths.mean()), "time_limits": int((lengths >= args.max_episode_steps).sum())}
    statistics |= {"distinct_games": len({*zip(returns, lengths, strict=True)})}  # seeds choose the first no-ops only
    statistics |= {"returns": returns.tolist(), "lengths": lengths.tolist()}
    return settings | statistics


# ---- Long runs: command line, run folder, signals, processes ---------------------------------------------------------------
def fail(message, code=2):
    """Ends the script with one line on stderr."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def write_file(path, content):
    """Writes bytes to a file, beside and then renamed, so that neither a crash nor a full disk leaves half of it."""
    part = Path(f"{path}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_checkpoint(path):
    """The content of a checkpoint, a dict of tensors on the CPU and plain values."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return {name: content[name] for name in ("args", "network", "optimizer", "lengths", "global_step")} | content
    except Exception as e:
        fail(f"cannot use {path} as a checkpoint: {e!r:.200}")


def parse_args():
    """The command line as Args, the run's folder, and its checkpoint (None for a new run), whose arguments are defaults."""
    words = [part for word in sys.argv[1:] for part in (word.split("=", 1) if word.startswith("--") else [word])]
    words = [f"{float(word):.15g}" if re.fullmatch(r"\d+(\.\d+)?e\d", word) else word for word in words]  # 1e6 steps
    given = {option.replace("_", "-"): value for option, value in itertools.pairwise(words)}
    for option, value in given.items():
        if value.lower() in ("true", "false") and isinstance(getattr(Args, option[2:].replace("-", "_"), None), bool):
            fail(f"{option} takes no value: write {option} or --no-{option[2:]}")
    path, checkpoint, default = Path(given.get("--run-dir", ""), "checkpoint.pt"), None, tyro.MISSING_NONPROP
    if given.get("--run-dir") and path.exists():
        checkpoint = load_checkpoint(path)
        if checkpoint["args"].keys() != Args.__dataclass_fields__.keys():
            fail(f"{path} is of another script")
        default = Args(**checkpoint["args"])
    elif "--init-from" in given:
        words = ["--env-id", load_checkpoint(given["--init-from"])["args"]["env_id"], *words]
    args = tyro.cli(Args, args=words, default=default, description=__doc__)
    saved = (checkpoint["args"] if checkpoint else {}).items()
    if changed := {n: was for n, was in saved if n not in MAY_CHANGE and vars(args)[n] != was}:
        options = ", ".join(f"--{n.replace('_', '-')} (was {was})" for n, was in changed.items())
        fail(f"{path.parent} holds a run with other settings: leave out {options}, or give another --run-dir")
    gpus = torch.cuda.device_count() if args.device != "cpu" else 0
    if (given.get("--device") == "cuda" and gpus == 0) or 0 < gpus < LOCAL_WORLD_SIZE:
        fail(f"{LOCAL_WORLD_SIZE} processes on CUDA, but PyTorch finds {gpus} GPUs here; use as many, or --device cpu")
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
    return args, Path(args.run_dir or f"runs/{name}"), checkpoint


class ProgressBar(tqdm):
    """A bar on a terminal, elsewhere a plain line every 30 seconds."""

    def __init__(self, **options):
        super().__init__(file=sys.stdout, miniters=1, mininterval=0.5 if sys.stdout.isatty() else 30, **options)

    @staticmethod
    def status_printer(file):
        return tqdm.status_printer(file) if file.isatty() else partial(print, file=file, flush=True)


def bfloat16_is_fast(device):
    """Whether the hardware multiplies bfloat16 faster than float32; Intel's with avx512_bf16 but without AMX does not."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    cpu = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(cpu.get("amx_bf16") or (cpu.get("avx512_bf16") and "Intel" not in cpu.get("cpu_name", "")))


def all_reduce(x, op=dist.ReduceOp.SUM):
    """Sum (or another reduction) of a number or tensor over the processes of torchrun; alone, the same."""
    if WORLD_SIZE > 1:
        x = torch.as_tensor(x, device=device)
        dist.all_reduce(x, op)
    return x


if __name__ == "__main__":
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    args, run_dir, checkpoint = parse_args()
    source = checkpoint or (load_checkpoint(args.init_from) if args.init_from else None)

    # Progress, from the start or from where the checkpoint left it
    state = {"global_step": 0, "iteration": 0, "divergences": [], "recent_returns": [], "lengths": []}
    state |= checkpoint or {"parent_step": source["global_step"] if source else 0}
    global_step, iteration, lengths = state["global_step"], state["iteration"], state["lengths"]
    divergences = deque(state["divergences"], maxlen=args.divergence_window)
    recent_returns = deque(state["recent_returns"], maxlen=100)
    length_min, length_max = (args.rollout_length_min, args.rollout_length_max) if args.adapt_rollout else [args.num_steps] * 2
    replayed = []
    if args.replay:
        parent = load_checkpoint(args.replay)
        replayed, batch_size = parent["lengths"], parent["args"]["num_envs"] * round(parent["rollout_length"])
        if not replayed or parent["global_step"] + batch_size <= parent["args"]["total_timesteps"]:
            fail(f"--replay {args.replay} is of an unfinished run, at step {parent['global_step']:,}")
        length_min, length_max = min(length for _, length in replayed), max(length for _, length in replayed)
    rollout_length = state.get("rollout_length", float(length_min))  # a float, or smoothing would freeze short of its target

    # Processes, device, precision
    device = torch.device("cuda", LOCAL_RANK) if args.device != "cpu" and torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if all_reduce(global_step, dist.ReduceOp.MAX) != global_step:
        fail("the processes found different checkpoints; the run's folder must be one that all machines see")
    precision = state.get("precision", args.precision)
    if precision == "auto":
        precision = "bfloat16" if all_reduce(int(bfloat16_is_fast(device)), dist.ReduceOp.MIN) else "float32"
    cores = max(1, joblib.cpu_count() // LOCAL_WORLD_SIZE)
    workers = Workers(device, args.torch_threads or cores)
    if sys.platform == "linux":  # glibc keeps the memory of freed tensors for the next minibatch (M_MMAP_, M_TRIM_THRESHOLD)
        ctypes.CDLL(None).mallopt(-3, 2**25)
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.manual_seed(args.seed)
    rng_seed = int(np.random.SeedSequence([args.seed, RANK, global_step]).generate_state(1)[0])
    rng = torch.Generator(device).manual_seed(rng_seed)
    reference_rng = torch.Generator(device).manual_seed(rng_seed)  # its own, so that measuring changes no run

    # Environments, in two groups on CUDA: one is emulated while the network acts for the other
    num_envs = args.num_envs // WORLD_SIZE
    num_pools = 2 if device.type == "cuda" and num_envs % 2 == 0 else 1
    seeds = env_seeds(args.seed, args.num_envs, start=global_step)[RANK * num_envs : (RANK + 1) * num_envs]
    groups = [slice(i, i + num_envs // num_pools) for i in range(0, num_envs, num_envs // num_pools)]
    pools = [AtariEnvs(args, seeds[group], args.env_threads or cores, episodic_life=args.episodic_life) for group in groups]
    num_actions = pools[0].num_actions

    # Network
    network = QNetwork(num_actions, getattr(torch, precision)).to(device)
    parameters = list(network.parameters())
    optimizer = torch.optim.RAdam(parameters, lr=args.learning_rate, foreach=True)
    if source:
        try:
            network.load_state_dict(source["network"])
            optimizer.load_state_dict(source["optimizer"])
        except (RuntimeError, ValueError) as e:
            fail(f"{args.init_from or run_dir} holds another network: {str(e).splitlines()[-1].strip()}")
    for parameter in parameters if WORLD_SIZE > 1 else ():
        dist.broadcast(parameter.data, 0)  # different machines may not agree in the last bits of the first weights
    if args.compile:
        network.compile(dynamic=True)

    # Storage, allocated once for the longest rollout; shorter ones use its beginning
    obs = torch.zeros((length_max + 1, num_envs, 4, 84, 84), dtype=torch.uint8, device=device)
    actions = torch.zeros((length_max, num_envs), dtype=torch.int64, device=device)
    values = torch.zeros((length_max + 1, num_envs), device=device)
    rewards = torch.zeros((length_max, num_envs))
    terminations, dones, is_transition = torch.zeros((3, length_max, num_envs), dtype=torch.bool)

    # Run folder and logs
    if RANK == 0:
        is_new = not run_dir.exists()
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            folder_lock = FileLock(run_dir / ".lock")
            folder_lock.acquire(timeout=0)
            if checkpoint is None and (run_dir / "checkpoint.pt").exists():
                fail(f"another process has just trained in {run_dir}; the same command again continues it")
        except OSError as e:
            fail(f"cannot use {run_dir}, which may be read-only or in use by another process: {e}")
        if args.track:
            try:
                import wandb

                names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": run_dir.name}
                wandb.init(**names, id=state.get("wandb_id"), resume="allow", config=vars(args), save_code=True)
            except Exception as e:
                if is_new:
                    shutil.rmtree(run_dir)
                fail(f"--track needs `pip install wandb` and `wandb login`, or WANDB_MODE=offline: {' '.join(str(e).split())}")
        processor = torch.cuda.get_device_name() if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
        computed_with = {"script": Path(__file__).name, "precision": precision, "device": device.type, "processor": processor}
        computed_with |= {"torch_threads": workers.cores, "processes": WORLD_SIZE, "python": sys.version.split()[0]}
        computed_with |= {module.__name__: module.__version__ for module in (torch, envpool, np)}
        write_file(run_dir / "args.json", json.dumps(vars(args) | {"computed_with": computed_with}, indent=2).encode())
        write_file(run_dir / Path(__file__).name, Path(__file__).read_bytes())
        writer = SummaryWriter(str(run_dir), purge_step=global_step + 1 if checkpoint else 0)  # without what lies beyond
        writer.add_text("hyperparameters", "|param|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in vars(args).items()))

    def log(scalars, step):
        """Adds points at an agent step to TensorBoard and W&B, which keeps what it had of them before a crash."""
        global writer
        try:
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)
        except OSError as e:
            print(f"warning: no curves at step {step:,} ({e})", file=sys.stderr)
            writer = SummaryWriter(str(run_dir), purge_step=step)
        if args.track and step >= wandb.run.step:
            wandb.log(scalars, step=step)

    def save_checkpoint():
        """Everything but the games, which the emulator cannot save. A full disk costs this checkpoint, not the run."""
        content = {"args": vars(args), "network": network.state_dict(), "optimizer": optimizer.state_dict()}
        content |= {"global_step": global_step, "iteration": iteration, "rollout_length": rollout_length, "lengths": lengths}
        content |= {"divergences": list(divergences), "recent_returns": list(recent_returns), "precision": precision}
        content |= {"parent_step": state["parent_step"], "wandb_id": wandb.run.id if args.track else state.get("wandb_id")}
        buffer = io.BytesIO()
        torch.save(content, buffer)
        try:
            writer.flush()  # the curves on disk reach as far as the checkpoint
            for name in ["checkpoint.pt"] + [f"checkpoint_{global_step}.pt"] * args.keep_checkpoints:
                write_file(run_dir / name, buffer.getbuffer())
        except OSError as e:
            print(f"warning: no checkpoint at step {global_step:,} ({e})", file=sys.stderr)

    on_terminal, signals = sys.stdout.isatty(), []  # (number, time) of each signal

    def on_signal(number, frame):
        """The first signal ends training after its iteration; one two seconds later or more, at once."""
        if signals and time.time() > signals[0][1] + 2:
            sys.exit(128 + number)
        signals.append((number, time.time()))
        if number == signal.SIGHUP and on_terminal:  # which is gone
            sys.stdout = sys.stderr = open(os.devnull, "w")

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, on_signal)
    about = f"{args.env_id} on {device.type} ({precision}, {workers.cores} threads, {WORLD_SIZE} processes)"
    print(f"{about}, rollouts of {length_min} to {length_max}, from step {global_step:,}: {run_dir}", flush=True)
    bar = ProgressBar(total=args.total_timesteps, initial=global_step, unit=" steps", unit_scale=True)
    last_checkpoint, last_checkpoint_step, stop = time.time(), global_step, 0
    obs[0] = torch.from_numpy(np.concatenate([envs.reset() for envs in pools]))
    iteration_start = time.time()

    while not stop:
        if replayed:
            rollout_length = [length for step, length in replayed if step <= global_step][-1]
        length = round(rollout_length)
        batch_size = args.num_envs * length
        if global_step + batch_size > args.total_timesteps:
            break
        iteration += 1
        if not lengths or lengths[-1][1] != length:
            lengths.append((global_step, length))
        learning_rate = args.learning_rate * (1 - global_step / args.total_timesteps if args.anneal_lr else 1)
        optimizer.param_groups[0]["lr"] = learning_rate

        # Step 1, data collection: pass t stores what the actions of pass t - 1 led to (obs[t], rewards[t - 1]), then acts
        epsilon = np.interp(global_step / args.total_timesteps, (0, args.exploration_fraction), (args.start_e, args.end_e))
        explore = torch.rand((length, num_envs), generator=rng, device=device) < epsilon
        random_actions = torch.randint(num_actions, (length, num_envs), generator=rng, device=device)
        emulation_time, start = 0.0, time.time()
        torch.autocast_increment_nesting()  # keeps the weights' casts, which do not change until the update
        for t, (envs, group) in itertools.product(range(length + 1), zip(pools, groups, strict=True)):
            if t > 0:
                step, wait_start = global_step + args.num_envs * t, time.time()
                next_obs, reward, terminated, done, is_reset, games = envs.recv()
                emulation_time += time.time() - wait_start
                obs[t, group] = torch.from_numpy(next_obs)
                rewards[t - 1, group] = torch.from_numpy(reward)
                terminations[t - 1, group] = torch.from_numpy(terminated)
                dones[t - 1, group] = torch.from_numpy(done)
                is_transition[t - 1, group] = torch.from_numpy(~is_reset)
                for episodic_return, episodic_length, _ in games if RANK == 0 else ():
                    recent_returns.append(episodic_return)
                    log({"charts/episodic_return": episodic_return, "charts/episodic_length": episodic_length}, step)
            values[t, group], greedy_actions = workers.forward(network, obs[t, group]).max(1)
            if t < length:  # the last pass only takes the values to bootstrap from
                actions[t, group] = torch.where(explore[t, group], random_actions[t, group], greedy_actions)
                envs.send(actions[t, group].cpu().numpy())
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        rollout_time = time.time() - start
        global_step += batch_size

        # Targets, once per rollout: s_{t+1} is obs[t + 1] also where the episode ended, since EnvPool resets a step later
        rollout_values, mask = values[: length + 1].cpu(), is_transition[:length]
        ends = terminations[:length], dones[:length]
        returns = q_lambda_returns(rewards[:length], *ends, rollout_values[1:], args.gamma, args.q_lambda)

        # Batch: reset steps have weight 0
        b_obs, b_actions = obs[:length].flatten(0, 1), actions[:length].flatten()
        b_returns, b_weights = returns.flatten().to(device), mask.flatten().float().to(device)
        epochs = args.update_epochs
        if args.scale_epochs:
            epochs = max(epochs, epochs * length // args.num_steps)

        # Every K-th iteration, what the policy does before the update, in float32: bfloat16 alone flips greedy actions
        measure = iteration % args.adapt_interval == 0
        if measure:
            num_states = min(max(1, args.reference_batch_size // WORLD_SIZE), int(b_weights.sum()))
            reference = b_obs[torch.multinomial(b_weights, num_states, generator=reference_rng)]
            old_actions = workers.forward(network, reference, torch.float32).argmax(1)

        # Step 2, policy update: epochs of random minibatches, each with the mean over its transitions as its loss
        logs = torch.zeros(3, device=device)
        for _ in range(epochs):
            for inds in torch.randperm(len(b_obs), generator=rng, device=device).tensor_split(args.num_minibatches):
                weights = b_weights / all_reduce(b_weights[inds].sum()).clamp(min=1)
                loss_of = partial(td_loss, network, (b_obs, b_actions, b_returns, weights))
                logs[:2] += workers.gradient(loss_of, parameters, inds)
                logs[2] += nn.utils.clip_grad_norm_(parameters, args.max_grad_norm) / WORLD_SIZE
                optimizer.step()
        losses = (all_reduce(logs) / (epochs * args.num_minibatches)).tolist()
        if not math.isfinite(sum(losses)):
            fail(f"the loss is no longer finite at step {global_step}; a lower --learning-rate may help ({run_dir})", code=1)
        scalars = dict(zip(("losses/td_loss", "losses/q_values", "losses/grad_norm"), losses, strict=True))
        scalars["losses/explained_variance"] = float(1 - (returns - rollout_values[:-1])[mask].var() / returns[mask].var())

        # Step 3, adaptive scaling: how many greedy actions did this iteration change, how long should the next rollouts be?
        if measure:
            new_actions = workers.forward(network, reference, torch.float32).argmax(1)
            divergences.append(float(all_reduce(behavioral_divergence(new_actions, old_actions))) / WORLD_SIZE)
            mean_divergence = sum(divergences) / len(divergences)
            target = rollout_length
            if args.adapt_signal == "time":
                target = length_min + (length_max - length_min) * global_step / args.total_timesteps
            elif iteration // args.adapt_interval >= args.divergence_warmup:
                bounds = (length_min, length_max, args.divergence_min, args.divergence_max)
                target = target_rollout_length(mean_divergence, *bounds, args.schedule)
            rollout_length = (1 - args.rollout_smoothing) * rollout_length + args.rollout_smoothing * target
            scalars |= {"abs/divergence": divergences[-1], "abs/divergence_mean": mean_divergence}

        # Logs and checkpoint
        obs[0] = obs[length]  # the next rollout begins where this one ended
        iteration_time, iteration_start = time.time() - iteration_start, time.time()
        scalars |= {"abs/rollout_length": length, "abs/batch_size": batch_size, "charts/epsilon": epsilon}
        scalars |= {"abs/minibatch_size": batch_size / args.num_minibatches, "charts/learning_rate": learning_rate}
        scalars |= {"charts/SPS": batch_size / iteration_time, "time/learning": iteration_time - rollout_time}
        scalars |= {"time/emulation": emulation_time, "time/inference": rollout_time - emulation_time}
        stop = int(all_reduce(max((n for n, _ in signals), default=0), dist.ReduceOp.MAX))  # all processes stop together
        if RANK == 0:
            log(scalars, global_step)
            mean_return, divergence = np.mean(recent_returns or math.nan), (divergences or "-")[-1]
            bar.set_postfix({"return": mean_return, "length": length, "divergence": divergence}, refresh=False)
            bar.update(batch_size)
            interval, steps_since = args.checkpoint_interval, global_step - last_checkpoint_step
            if stop or (steps_since >= interval if interval else time.time() - last_checkpoint >= 300):
                save_checkpoint()
                last_checkpoint, last_checkpoint_step = time.time(), global_step

    bar.close()
    stop = stop or int(all_reduce(max((n for n, _ in signals), default=0), dist.ReduceOp.MAX))
    signals.append((0, 0.0))  # from here on, one ends the script at once
    if RANK == 0:
        save_checkpoint()
    if WORLD_SIZE > 1:
        dist.barrier()  # torchrun would end the first process while it saves as soon as another has ended
        dist.destroy_process_group()
    if stop:
        print(f"stopped at step {global_step:,}; {sys.argv[0]} --run-dir {run_dir} continues", flush=True)
    if stop or RANK > 0:
        sys.exit(128 + stop if stop else 0)

    # Evaluation, where there is none of this checkpoint with these settings yet
    path, evaluated_step = run_dir / "eval.json", global_step or state["parent_step"]
    statistics = json.loads(path.read_text()) if path.exists() else {}
    wanted = {"global_step": evaluated_step, "episodes": args.eval_episodes, "epsilon": args.eval_epsilon}
    if args.eval_episodes and not wanted.items() <= statistics.items():
        statistics = evaluate(network, args, workers, args.eval_episodes)
        statistics |= {"global_step": evaluated_step, "precision": precision}
        write_file(path, json.dumps(statistics, indent=2).encode())
        line = "score {mean:.2f} +- {std:.2f} in {episodes} games, {distinct_games} distinct, {time_limits} cut by time limit"
        print(f"{line.format(**statistics)}: {path}", flush=True)
    # one step later, so that a run that is continued purges them
    log({f"eval/{n}": statistics[n] for n in ("mean", "std", "median", "mean_length") if statistics}, global_step + 1)
    if args.capture_video and not (run_dir / "videos").exists():
        returns = evaluate(network, args, workers, args.video_episodes, run_dir / "videos")["returns"]
        print(f"recorded games with scores {returns}: {run_dir / 'videos'}", flush=True)
    writer.close()
    print(f"{run_dir} is finished", flush=True)
