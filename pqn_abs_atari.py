# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "ale-py==0.12.1",
#   "envpool==1.2.5",
#   "gymnasium==1.4.0",
#   "moviepy==2.2.1",
#   "numpy==2.4.6",
#   "opencv-python-headless==5.0.0.93",
#   "tensorboard==2.21.0",
#   "torch==2.13.0",
#   "tqdm==4.70.1",
#   "tyro==1.0.17",
# ]
# ///
"""PQN with Adaptive Batch Scaling (ABS) on Atari, in one file.

PQN (Gallici et al., arXiv 2407.04811) is Q-learning without replay buffer or target network: collect a rollout, compute
Q(lambda) targets once, fit them, throw the rollout away. ABS (Park, arXiv 2605.21557) changes the rollout's length, and with
it the batch, as training goes on: short while the policy still moves, long once it has settled. How much it moves is its
behavioral divergence, the share of states whose greedy action one iteration changed.

    python pqn_abs_atari.py --env-id Breakout-v5                  # ABS, the published settings
    python pqn_abs_atari.py --env-id Pong-v5 --no-adapt-rollout   # the fixed-batch baseline
    torchrun --nproc_per_node=4 pqn_abs_atari.py                  # on four GPUs

--resume runs/<run> continues a run that was stopped, --eval-only --model runs/<run>/model.pt evaluates a trained model. A run
leaves events, args.json, checkpoints, model.pt, eval.json and its source in runs/<run>/. A step is an agent step (4 frames).

The algorithm is in the sections from Network to Acting and learning and in the loop at the end, from `while True` on. The
other sections are games, files, evaluation, arguments, long runs and speed.

Reached so far, without a GPU (mean score of 100 games with 1 % random actions, one number per seed): with the defaults 84.6 in
Breakout, after 14.4 of the 20 million steps. After 1.5 million steps, with 32 minibatches and K = 4: 15.1, 9.2, 17.3 and 6.1
in Pong, 19.3, 31.4, 17.9 and 19.9 in Breakout (README.md compares).
"""

import contextlib
import ctypes
import dataclasses
import difflib
import gc
import glob
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import sysconfig
import threading
import time
import zipfile
from collections import deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

# An idle thread of PyTorch on a CPU waits for work in a loop, which keeps its core from the emulator. This, a tenth of GNU
# OpenMP's default, lets it sleep sooner. It is read when PyTorch is imported.
os.environ["GOMP_SPINCOUNT"] = os.environ.get("GOMP_SPINCOUNT", "30000")

import envpool
import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# Set by torchrun, where several processes train one policy: each has its share of the environments, the first one (rank 0)
# logs, evaluates and saves
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """the name of this experiment, part of the run's folder name"""
    seed: int = 1
    """seed of network, actions, minibatches and games"""
    torch_deterministic: bool = True
    """if toggled, cuDNN uses deterministic algorithms only (the CPU does so anyway, for a given number of threads)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the network runs; auto takes CUDA where there is one"""
    track: bool = False
    """if toggled, the run is also sent to Weights & Biases (needs `pip install wandb`)"""
    wandb_project_name: str = "adaptive-batch-scaling"
    """the Weights & Biases project"""
    wandb_entity: str = ""
    """the Weights & Biases entity (team); empty is your default one"""
    capture_video: bool = False
    """if toggled, the trained policy is recorded in colour to runs/<run>/videos (mp4)"""
    video_episodes: int = 3
    """number of games to record with --capture-video"""

    # Environment
    env_id: str = "Breakout-v5"
    """the EnvPool id of the Atari game"""
    num_envs: int = 128
    """number of parallel games, E"""
    episodic_life: bool = False
    """if toggled, losing a life ends the episode in training (scores still count the whole game)"""
    sticky_action_probability: float = 0.0
    """probability that the game repeats the previous action instead of the chosen one"""
    max_episode_steps: int = 27000
    """time limit of one game in agent steps (27,000 are 108,000 frames)"""

    # PQN
    total_timesteps: int = 20_000_000
    """length of training in agent steps over all environments; no rollout is begun that would exceed it"""
    schedule_timesteps: int = 0
    """agent steps over which decays and --adapt-signal time run; 0: total-timesteps (of an extended run, its first total)"""
    learning_rate: float = 2.5e-4
    """learning rate of the optimizer"""
    anneal_lr: bool = False
    """if toggled, the learning rate falls linearly to 0 over schedule-timesteps"""
    num_steps: int = 32
    """rollout length in steps per environment when it is not adapted, and the base length of --scale-epochs"""
    gamma: float = 0.99
    """discount factor per agent step"""
    q_lambda: float = 0.65
    """lambda of the Q(lambda) targets"""
    num_minibatches: int = 4
    """minibatches per epoch"""
    update_epochs: int = 2
    """passes over each rollout"""
    max_grad_norm: float = 10.0
    """gradients are clipped to this norm"""
    start_e: float = 1.0
    """epsilon (share of random actions) at the start"""
    end_e: float = 0.001
    """epsilon after the decay"""
    exploration_fraction: float = 0.1
    """share of schedule-timesteps over which epsilon falls linearly from start-e to end-e"""

    # Adaptive Batch Scaling
    adapt_rollout: bool = True
    """if toggled off, every rollout has num-steps steps: the fixed-batch baseline (divergence is still measured)"""
    adapt_signal: Literal["divergence", "time"] = "divergence"
    """what sets the target length: behavioral divergence, or the open-loop control: it grows linearly with the steps"""
    rollout_length_min: int = 16
    """shortest rollout in steps per environment, L_min; also the first one"""
    rollout_length_max: int = 64
    """longest rollout in steps per environment, L_max"""
    adapt_interval: int = 50
    """measure the divergence and adapt the length every so many iterations, K"""
    divergence_min: float = 0.05
    """divergence at or below which the target is L_max, a share of states in (0, 1]"""
    divergence_max: float = 0.95
    """divergence at or above which the target is L_min, a share of states in (0, 1]"""
    schedule: Literal["log", "linear", "exp"] = "log"
    """how the target falls from L_max to L_min between the two divergences"""
    rollout_smoothing: float = 0.1
    """share of the way to the target that one adaptation goes, in (0, 1]"""
    divergence_window: int = 20
    """the rule is fed the mean of this many latest measurements"""
    divergence_warmup: int = 10
    """the length stays at L_min until this many measurements exist"""
    reference_batch_size: int = 2048
    """number of states of the rollout on which divergence is measured, M (the whole batch if that is smaller)"""
    scale_epochs: bool = False
    """if toggled, rollouts longer than num-steps get proportionally more epochs, so that the number of gradient steps per
    sample stays roughly the same"""
    log_noise_scale: bool = False
    """if toggled, the gradient noise scale is measured and logged beside the divergence (one more epoch of gradients each)"""

    # Evaluation
    eval_episodes: int = 100
    """number of full games that the trained policy plays; 0 skips the evaluation"""
    eval_epsilon: float = 0.0
    """share of random actions in evaluation and videos"""
    eval_only: bool = False
    """if toggled, evaluate --model on its game and exit; eval.json beside the model is written anew. Precision, memory format,
    seed, time limit and sticky actions are those of its training where no flag gives others"""
    model: str = ""
    """path of the model.pt for --eval-only"""

    # Long runs
    checkpoint_interval: int = 0
    """agent steps between two checkpoints; 0 is about every 5 minutes"""
    resume: str = ""
    """path of a run (runs/<run>) to continue from its last checkpoint, with its own arguments"""
    auto_resume: bool = False
    """if toggled, continue the newest run that has these arguments; start a new one if there is none"""

    # Speed
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """arithmetic of the convolutions and matrix products; auto is bfloat16 where that is faster, else float32 (which cuDNN
    may round to TF32 in convolutions, PyTorch's default)"""
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    """layout of what the convolutions compute; auto is channels_last on the CPU, else contiguous"""
    compile: bool = False
    """if toggled, torch.compile the network (needs Triton on CUDA, a C++ compiler on the CPU)"""
    cudagraphs: bool = False
    """if toggled, record acting and the gradient of a minibatch as CUDA graphs (CUDA only)"""
    microbatch_size: int = 0
    """samples per forward and backward pass, whose gradients add up; 0: all on CUDA, 512 on the CPU"""
    env_pools: int = 0
    """emulate the games in this many groups, each while the network acts for the others; 0: 2 on CUDA if they divide into two
    equal ones, else 1"""
    env_threads: int = 0
    """threads of the emulator, for each group of games; 0 is one per core granted to this process"""
    torch_threads: int = 0
    """threads of PyTorch on the CPU; 0 is one per core granted to this process"""


# ---------------------------------------------------------------------------------------------------------------------------
# Environment: EnvPool's Atari games
# ---------------------------------------------------------------------------------------------------------------------------

# Mean score of a random and of a human player, for the human-normalised score: the values in common use since Wang et al.,
# "Dueling Network Architectures for Deep Reinforcement Learning" (arXiv 1511.06581). Some tables have 0 for a random player
# of VideoPinball, who scored 22,745 in 100 of EnvPool's games.
RANDOM_AND_HUMAN_SCORES = """
Alien 227.75 7127.7 | Amidar 5.77 1719.5 | Assault 222.39 742 | Asterix 210 8503.3 | Asteroids 719.1 47388.7
Atlantis 12850 29028.1 | BankHeist 14.2 753.1 | BattleZone 2360 37187.5 | BeamRider 363.88 16926.5 | Berzerk 123.65 2630.4
Bowling 23.11 160.7 | Boxing 0.05 12.1 | Breakout 1.72 30.5 | Centipede 2090.87 12017 | ChopperCommand 811 7387.8
CrazyClimber 10780.5 35829.4 | Defender 2874.5 18688.9 | DemonAttack 152.07 1971 | DoubleDunk -18.55 -16.4 | Enduro 0 860.5
FishingDerby -91.71 -38.7 | Freeway 0.01 29.6 | Frostbite 65.2 4334.7 | Gopher 257.6 2412.5 | Gravitar 173 3351.4
Hero 1026.97 30826.4 | IceHockey -11.15 0.9 | Jamesbond 29 302.8 | Kangaroo 52 3035 | Krull 1598.05 2665.5
KungFuMaster 258.5 22736.3 | MontezumaRevenge 0 4753.3 | MsPacman 307.3 6951.6 | NameThisGame 2292.35 8049
Phoenix 761.4 7242.6 | Pitfall -229.44 6463.7 | Pong -20.71 14.6 | PrivateEye 24.94 69571.3 | Qbert 163.88 13455
Riverraid 1338.5 17118 | RoadRunner 11.5 7845 | Robotank 2.16 11.9 | Seaquest 68.4 42054.7 | Skiing -17098.09 -4336.9
Solaris 1236.3 12326.7 | SpaceInvaders 148.3 1668.7 | StarGunner 664 10250 | Surround -9.99 6.53 | Tennis -23.84 -8.3
TimePilot 3568 5229.2 | Tutankham 11.43 167.6 | UpNDown 533.4 11693.2 | Venture 0 1187.5 | VideoPinball 16256.9 17667.9
WizardOfWor 563.5 4756.5 | YarsRevenge 3092.91 54576.9 | Zaxxon 32.5 9173.3
"""


def atari_ids():
    """All Atari ids that EnvPool knows, such as "Breakout-v5" (its registry also holds "Ant-v5" and other non-games)."""
    from envpool.atari.registration import atari_game_list

    return ["".join(word.capitalize() for word in game.split("_")) + "-v5" for game in atari_game_list]


def human_normalized_score(env_id, score):
    """(score - random) / (human - random): 0 is a random player, 1 a human; None for games outside the 57."""
    for entry in RANDOM_AND_HUMAN_SCORES.replace("\n", "|").split("|"):
        if entry.strip() and entry.split()[0] == env_id.removesuffix("-v5"):
            random_score, human_score = map(float, entry.split()[1:])
            return (score - random_score) / (human_score - random_score)
    return None


def granted_cores():
    """Number of CPU cores this process may use: the least of affinity, container (cgroup) limit and Slurm's grant."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # of cgroup versions 2 and 1
        with contextlib.suppress(OSError, ValueError):  # "max 100000", or a quota of -1, where there is no limit
            quota, period = map(int, " ".join(Path("/sys/fs/cgroup", file).read_text() for file in files).split())
            cores = min(cores, math.ceil(quota / period)) if quota > 0 else cores
    with contextlib.suppress(KeyError, ValueError):
        cores = min(cores, int(os.environ.get("SLURM_CPUS_PER_TASK") or os.environ["SLURM_CPUS_ON_NODE"]))
    return max(1, cores)


def env_seeds(seed, num_envs, evaluation=False, start=0):
    """One emulator seed per game, (num_envs,). Training seeds are even and evaluation seeds odd, so the two never meet.
    Hashing keeps runs with neighbouring seeds apart, where EnvPool's own rule, seed + i, shares all but one game. `start`, the
    agent step at which a run is resumed, gives it other games than it began with."""
    seeds = np.random.SeedSequence([seed, evaluation, start]).generate_state(num_envs)
    return [int(s) // 4 * 2 + evaluation for s in seeds]


class AtariEnvs:
    """EnvPool with the bookkeeping that it leaves to its caller.

    EnvPool resets on the step after the end: that step ignores the action, has reward 0 and returns the first observation of
    the next episode. It is no transition, and `is_reset` marks it. A time limit is `truncated`, never `terminated`.
    """

    def __init__(
        self, env_id, seeds, num_threads, max_episode_steps=27000, sticky_action_probability=0.0, episodic_life=False
    ):
        self.num_envs = len(seeds)
        self.max_episode_steps = max_episode_steps
        self.envpool = envpool.make(
            env_id,
            env_type="gymnasium",
            num_envs=self.num_envs,
            env_seed=seeds,
            num_threads=min(num_threads, self.num_envs),
            max_episode_steps=max_episode_steps,
            repeat_action_probability=sticky_action_probability,
            episodic_life=episodic_life,
            reward_clip=True,
        )
        self.num_actions = int(self.envpool.action_space.n)
        self.episode_return = np.zeros(self.num_envs)  # raw score of the running game, all lives
        self.episode_length = np.zeros(self.num_envs, dtype=np.int64)  # its agent steps
        self.done = np.zeros(self.num_envs, dtype=bool)

    def reset(self):
        """Starts all games. Returns observations (num_envs, 4, 84, 84) uint8."""
        return self.envpool.reset()[0]

    def send(self, actions, env_ids=None):
        """Starts one step with actions (num_envs,), or with (n,) in the n games env_ids only."""
        self.envpool.send(actions.astype(np.int32), env_ids)

    def recv(self):
        """Waits for the step. Returns observations (n, 4, 84, 84) uint8, clipped rewards (n,), terminations (n,), dones (n,),
        is_reset (n,), and the (raw return, length in agent steps, game) of every game that ended in this step."""
        observations, rewards, terminated, truncated, info = self.envpool.recv()
        env_ids = info["env_id"]
        is_reset = self.done[env_ids]
        game_over = info["terminated"].astype(bool)  # unlike `terminated`, also where it coincides with the time limit
        terminations = terminated | game_over
        dones = terminations | truncated
        self.done[env_ids] = dones
        self.episode_return[env_ids] += info["reward"]
        self.episode_length[env_ids] += ~is_reset
        # A lost life may end an episode, but only game over and the time limit end a game.
        ended = env_ids[dones & (game_over | truncated | (info["elapsed_step"] >= self.max_episode_steps))]
        games = [(float(self.episode_return[i]), int(self.episode_length[i]), int(i)) for i in ended]
        self.episode_return[ended] = 0
        self.episode_length[ended] = 0
        return observations, rewards, terminations, dones, is_reset, games

    def close(self):
        self.envpool.close()


# ---------------------------------------------------------------------------------------------------------------------------
# Network
# ---------------------------------------------------------------------------------------------------------------------------


def layer_init(layer, std=2**0.5, bias_const=0.0):
    nn.init.orthogonal_(layer.weight, std)
    nn.init.constant_(layer.bias, bias_const)
    return layer


class PixelConv2d(nn.Conv2d):
    """Convolution of pixels 0..255 (uint8) as if scaled to [0, 1]: it divides the weights instead, which costs nothing.

    Its output lies in self.memory_format, and so do the features after it. Weights and gradients stay contiguous, as
    parameters_to_vector needs them; network.to(memory_format=...) would change that.
    """

    memory_format = torch.contiguous_format

    def forward(self, x):
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        weight = self.weight / 255
        if self.memory_format == torch.channels_last and dtype == torch.bfloat16:
            # The same sums as a 2x2 convolution, stride 1, of blocks of 4x4 pixels laid out as 64 channels, which is faster in
            # bfloat16 (on CPUs; not measured on CUDA). A row of a block, 4 bytes, is moved as one int32.
            rows = x.contiguous().view(torch.int32).unflatten(2, (-1, 4))  # (n, 4, 21, 4, 21)
            rows = rows.transpose(1, 2).flatten(2, 3)  # (n, 21, 16, 21), copied: two steps are faster than one
            x = rows.transpose(2, 3).contiguous().view(torch.uint8).flatten(3).permute(0, 3, 1, 2)  # (n, 64, 21, 21)
            weight = weight.unflatten(3, (2, 4)).unflatten(2, (2, 4)).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
            return nn.functional.conv2d(x.to(dtype), weight, self.bias)
        if self.memory_format == torch.channels_last:  # one byte per pixel is faster to transpose than four
            x = torch.stack(x.unbind(1), -1).permute(0, 3, 1, 2)
        return self._conv_forward(x.to(dtype, memory_format=self.memory_format), weight, self.bias)


class LayerNormCHW(nn.LayerNorm):
    """nn.LayerNorm over channels, height and width, without the two copies that it would make of channels_last features."""

    def forward(self, x):
        if not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        weight, bias = self.weight.permute(1, 2, 0), self.bias.permute(1, 2, 0)
        return nn.functional.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, self.eps).permute(0, 3, 1, 2)


class QNetwork(nn.Module):
    """Nature CNN with LayerNorm. Observations (batch, 4, 84, 84) uint8 to Q-values (batch, num_actions) float32."""

    def __init__(self, num_actions):
        super().__init__()
        self.encoder = nn.Sequential(
            layer_init(PixelConv2d(4, 32, 8, stride=4)),
            LayerNormCHW([32, 20, 20]),
            nn.ReLU(),
            layer_init(nn.Conv2d(32, 64, 4, stride=2)),
            LayerNormCHW([64, 9, 9]),
            nn.ReLU(),
            layer_init(nn.Conv2d(64, 64, 3, stride=1)),
            LayerNormCHW([64, 7, 7]),
            nn.Flatten(),  # before the ReLU, whose backward pass is slow where gradient and features differ in layout
            nn.ReLU(),
            layer_init(nn.Linear(3136, 512)),
            nn.LayerNorm(512),
            nn.ReLU(),
        )
        self.head = layer_init(nn.Linear(512, num_actions))

    def forward(self, x):
        # The head is float32 whatever the encoder's precision: Q-values rounded to bfloat16 tie, and ties hide divergence.
        return self.head(self.encoder(x).float())


# ---------------------------------------------------------------------------------------------------------------------------
# Adaptive Batch Scaling and targets: pure functions
# ---------------------------------------------------------------------------------------------------------------------------


def behavioral_divergence(new_actions, old_actions):
    """Share of states whose greedy action changed, a float in [0, 1] (Park, arXiv 2605.21557).

    new_actions and old_actions, (M,): greedy actions of the updated policy and of the one before, on the same M states.
    ValueError if they differ in shape or are empty.
    """
    if new_actions.shape != old_actions.shape or math.prod(new_actions.shape) == 0:
        raise ValueError(f"need two equal, non-empty shapes, got {tuple(new_actions.shape)} and {tuple(old_actions.shape)}")
    return int((new_actions != old_actions).sum()) / math.prod(new_actions.shape)


def target_rollout_length(divergence, length_min, length_max, divergence_min, divergence_max, schedule="log"):
    """Rollout length in steps per environment, a float, that ABS wants at this divergence (Park, arXiv 2605.21557).

    Falls monotonically from length_max at divergence_min and below to length_min at divergence_max and above: linearly in
    log(divergence) ("log"), in divergence ("linear") or in exp(divergence), divergence scaled to [0, 1] ("exp").
    ValueError for bounds out of order, a divergence that is not a number or an unknown schedule.
    """
    if not (0 < length_min <= length_max and 0 < divergence_min < divergence_max) or math.isnan(divergence):
        raise ValueError("need 0 < length_min <= length_max, 0 < divergence_min < divergence_max and a divergence not NaN")
    clipped = min(max(float(divergence), divergence_min), divergence_max)
    linear = (clipped - divergence_min) / (divergence_max - divergence_min)
    if schedule == "log":
        a = math.log(clipped / divergence_min) / math.log(divergence_max / divergence_min)
    elif schedule == "linear":
        a = linear
    elif schedule == "exp":
        a = math.expm1(linear) / math.expm1(1)
    else:
        raise ValueError(f"unknown schedule {schedule!r}: use log, linear or exp")
    return length_max - a * (length_max - length_min)


def round_rollout_length(length, length_min, length_max, multiple):
    """The multiple of `multiple` nearest to length among those in [length_min, length_max], an int."""
    lowest, highest = math.ceil(length_min / multiple), math.floor(length_max / multiple)
    return multiple * min(max(round(length / multiple), lowest), highest)


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


def gradient_noise_scale(gradients, minibatch_size):
    """Noise and signal of a gradient, two floats (McCandlish et al., arXiv 1812.06162); noise / signal is B_simple.

    gradients: those of m >= 2 disjoint minibatches of minibatch_size samples at the same parameters, (num_parameters,) each,
    also from a generator, so that memory need not hold them all.
    Noise estimates the trace of the covariance of one sample's gradient, signal the squared norm of the expected gradient.
    Both are unbiased, so signal can be zero or negative where noise dominates. ValueError for fewer than two gradients.
    """
    total, squared_norms = 0, []
    for gradient in gradients:
        gradient = gradient.double()  # noise is a small difference of large sums
        total = total + gradient
        squared_norms.append(float(gradient.square().sum()))
    m = len(squared_norms)
    if m < 2:
        raise ValueError("need the gradients of at least two minibatches")
    squared_norm_of_mean = float((total / m).square().sum())
    noise = minibatch_size * (sum(squared_norms) - m * squared_norm_of_mean) / (m - 1)
    return noise, squared_norm_of_mean - noise / (m * minibatch_size)


# ---------------------------------------------------------------------------------------------------------------------------
# Acting and learning
# ---------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def greedy_actions(network, observations):
    """Greedy actions (M,), on the CPU, on observations (M, 4, 84, 84)."""
    chunk_size = 256 if observations.device.type == "cpu" else 2048
    return torch.cat([network(chunk).argmax(1) for chunk in observations.split(chunk_size)]).cpu()


@torch.no_grad()
def act(network, observations, explore, random_actions):
    """Epsilon-greedy actions (n,) and max_a Q (n,) on observations (n, 4, 84, 84); explore (n,) bool: who acts randomly."""
    values, greedy = network(observations).max(1)
    return torch.where(explore, random_actions, greedy), values


# Names, in TensorBoard under losses/, of the values that update returns
LOSSES = ("td_loss", "q_values", "grad_norm")


def compute_gradient(network, observations, actions, returns, weights, microbatch_size):
    """Gradient of a minibatch's loss, the squared error of Q(s, a), weighted: n samples, weights (n,) from mean_weights.

    No layer mixes samples, so it may run in microbatches whose gradients add up. Where several processes train together, the
    gradient is the mean of theirs. Returns (2,): loss and mean Q.
    """
    network.zero_grad()
    logs = torch.zeros(2, device=weights.device)
    minibatch = (observations, actions, returns, weights)
    for chunk in zip(*(x.split(microbatch_size) for x in minibatch), strict=True):
        observations, actions, returns, weights = chunk
        q_values = network(observations).gather(1, actions.unsqueeze(1)).squeeze(1)
        loss = (weights * (q_values - returns) ** 2).sum()
        loss.backward()
        logs[0] += loss.detach()
        logs[1] += (weights * q_values.detach()).sum()
    average_gradients(network)
    return logs


def update(network, optimizer, gradient_step, *minibatch, max_grad_norm):
    """One optimizer step. gradient_step(*minibatch), compute_gradient or its CUDA graph, leaves the gradient in p.grad and
    returns its logs. Returns these and the gradient norm before clipping, (len(LOSSES),)."""
    logs = gradient_step(*minibatch)
    grad_norm = nn.utils.clip_grad_norm_(network.parameters(), max_grad_norm)
    optimizer.step()
    return torch.cat([logs, grad_norm.unsqueeze(0)])


def measure_noise_scale(network, gradient_step, batch, weights, num_minibatches, seed):
    """Noise and signal of the gradient (see gradient_noise_scale) at the present parameters, over one epoch of minibatches,
    each passed to gradient_step. batch: tensors (n, ...); weights (n,) are 1 for transitions and 0 for reset steps."""
    rng = torch.Generator(weights.device).manual_seed(seed)  # its own, so that measuring changes no run

    def gradients():
        for inds in torch.randperm(len(weights), generator=rng, device=weights.device).split(len(weights) // num_minibatches):
            gradient_step(*(x.index_select(0, inds) for x in batch), mean_weights(weights[inds]))
            yield nn.utils.parameters_to_vector(p.grad for p in network.parameters())

    transitions = reduce_numbers([float(weights.sum())], dist.ReduceOp.SUM)[0]
    return gradient_noise_scale(gradients(), transitions / num_minibatches)


def linear_schedule(start, end, duration, t):
    """From start at t = 0 to end at t = duration and after, both in agent steps."""
    return end if t >= duration else start + (end - start) * t / duration


# ---------------------------------------------------------------------------------------------------------------------------
# Errors and files
# ---------------------------------------------------------------------------------------------------------------------------


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
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def write_json(path, content):
    write_file(path, (json.dumps(content, indent=2) + "\n").encode())


def serialize(content):
    """The bytes of a torch.save file. Writing them ourselves keeps the reason of an OSError, which torch.save hides."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()


# ---------------------------------------------------------------------------------------------------------------------------
# Evaluation, model file, video
# ---------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(network, env_id, episodes, epsilon, seed, device, num_threads=0, max_episode_steps=27000, sticky=0.0):
    """Plays full games with the (epsilon-)greedy policy and returns a dict of statistics of their raw scores.

    Up to 128 games run in parallel. Each environment plays exactly its share of the games, because the first `episodes` games
    to finish would be the short ones. Lengths are agent steps. Emulator seeds are never those of a training run.
    distinct_games counts games with different actions: as the emulator is deterministic and its seeds choose the no-ops at the
    start only, a greedy policy may play few. time_limits counts the games that the time limit cut.
    """
    num_envs = min(episodes, 128)
    envs = AtariEnvs(
        env_id, env_seeds(seed, num_envs, evaluation=True), num_threads or granted_cores(), max_episode_steps, sticky
    )
    rng = np.random.default_rng([seed, 1])
    share = np.full(num_envs, episodes // num_envs)
    share[: episodes % num_envs] += 1
    games, last_log = [], time.time()
    actions_hash, distinct_games = np.zeros(num_envs, dtype=np.uint64), set()
    observations, active = envs.reset(), np.arange(num_envs, dtype=np.int32)
    while True:
        actions = network(torch.from_numpy(observations).to(device)).argmax(1).cpu().numpy()
        explore = rng.random(len(active)) < epsilon
        actions[explore] = rng.integers(envs.num_actions, size=explore.sum())
        envs.send(actions, active)
        observations, *_, is_reset, ended = envs.recv()
        actions_hash[active] = np.where(is_reset, 0, 1_000_003 * actions_hash[active] + actions.astype(np.uint64) + 1)
        distinct_games |= {actions_hash[i] for *_, i in ended}
        games += ended
        share[[i for *_, i in ended]] -= 1
        playing = share[active] > 0
        observations, active = observations[playing], active[playing]
        if len(active) == 0:
            break
        if time.time() - last_log >= 30:
            last_log = time.time()
            print(f"{len(games)} of {episodes} games over, {envs.episode_length.max()} steps into the longest", flush=True)
    envs.close()
    returns, lengths = np.array([g[0] for g in games]), np.array([g[1] for g in games])
    return {
        "env_id": env_id,
        "episodes": episodes,
        "epsilon": epsilon,
        "seed": seed,
        "mean": float(returns.mean()),
        "std": float(returns.std()),
        "median": float(np.median(returns)),
        "min": float(returns.min()),
        "max": float(returns.max()),
        "mean_length": float(lengths.mean()),
        "distinct_games": len(distinct_games),
        "time_limits": int((lengths >= max_episode_steps).sum()),
        "human_normalized_score": human_normalized_score(env_id, float(returns.mean())),
        "returns": returns.tolist(),
        "lengths": lengths.tolist(),
    }


def save_model(network, args, global_step, path):
    """Writes weights, arguments and agent steps so far."""
    content = {"weights": network.state_dict(), "args": dataclasses.asdict(args), "global_step": global_step}
    write_file(path, serialize(content))


def load_model(path, device):
    """Reads what save_model wrote. Returns the network and the Args of its training, or fails with one line."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(content, dict):
            raise TypeError
        network = QNetwork(len(content["weights"]["head.bias"])).to(device)
        network.load_state_dict(content["weights"])
        return network, checked_types(Args(**content["args"]))
    except Exception as e:
        reason = os.strerror(e.errno) if isinstance(e, OSError) and e.errno else "not a model of this script"
        fail(f"cannot use --model {path!r} ({reason}); give the model.pt that a run of {Path(__file__).name} left")


@torch.no_grad()
def record_video(network, env_id, episodes, epsilon, seed, device, folder, max_episode_steps=27000, sticky=0.0):
    """Records full games in colour as mp4 files in `folder`, through ale-py and Gymnasium's wrappers instead of EnvPool: an
    independent second view of the preprocessing. Returns the raw score of each game."""
    import ale_py
    from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation, RecordVideo, TimeLimit

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner
    gym.register_envs(ale_py)
    ale_id = next(name for name in gym.registry if name.lower() == f"ale/{env_id}".lower())
    env = gym.make(ale_id, frameskip=1, repeat_action_probability=sticky, max_episode_steps=-1, render_mode="rgb_array")
    fire_on_reset = env.unwrapped.get_action_meanings()[1] == "FIRE"
    env = TimeLimit(FrameStackObservation(AtariPreprocessing(env, noop_max=30), 4), max_episode_steps)
    env = RecordVideo(env, str(folder), episode_trigger=lambda episode: True, name_prefix=env_id, fps=15)
    rng = np.random.default_rng([seed, 2])
    returns = []
    for episode in range(episodes):
        observation, _ = env.reset(seed=env_seeds(seed, episodes, evaluation=True)[episode])
        score, done, first = 0.0, False, True
        while not done:
            action = int(network(torch.from_numpy(observation[None]).to(device)).argmax())
            if rng.random() < epsilon:
                action = int(rng.integers(env.action_space.n))
            if first and fire_on_reset:
                action = 1
            observation, reward, terminated, truncated, _ = env.step(action)
            score, done, first = score + float(reward), terminated or truncated, False
        returns.append(score)
    env.close()
    return returns


def evaluate_and_record(network, args, device, run_dir):
    """The end of a run, and all of --eval-only: evaluation, video and eval.json. Returns what evaluate() does."""
    settings = (args.eval_epsilon, args.seed, device)
    game_options = (args.max_episode_steps, args.sticky_action_probability)
    statistics = {}
    if args.eval_episodes:
        print(f"evaluating {args.eval_episodes} games of {args.env_id} with epsilon {args.eval_epsilon}", flush=True)
        statistics = evaluate(network, args.env_id, args.eval_episodes, *settings, args.env_threads, *game_options)
        write_json(run_dir / "eval.json", statistics)
        rounded = {name: round(value, 3) for name, value in statistics.items() if isinstance(value, float)}
        print(", ".join(f"{name} {value}" for name, value in rounded.items()) + f": {run_dir / 'eval.json'}", flush=True)
        distinct = statistics["distinct_games"]
        if 2 * distinct < args.eval_episodes:
            print(f"these games repeat {distinct} sequence(s) of actions; --eval-epsilon 0.01 varies them", flush=True)
    if args.capture_video:
        scores = record_video(network, args.env_id, args.video_episodes, *settings, run_dir / "videos", *game_options)
        print(f"recorded {args.video_episodes} games with scores {scores}: {run_dir / 'videos'}")
    return statistics


def evaluate_only(args, device):
    """--eval-only: evaluates --model on its own game, with its own settings where no flag gives others."""
    network, trained = load_model(args.model, device)
    if args.env_id != trained.env_id and given("env_id"):
        fail(f"--model {args.model} was trained on {trained.env_id}, not on {args.env_id}; leave --env-id out")
    # Another precision would be another policy, other games would have another score
    for name in "precision memory_format env_id seed max_episode_steps sticky_action_probability".split():
        if not given(name):
            setattr(args, name, getattr(trained, name))
    network = speed_up(network, args.precision, device, args.compile, args.memory_format)
    evaluate_and_record(network, args, device, Path(args.model).parent)


# ---------------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------------


def parse_args(default=None):
    """The command line as Args, what it leaves out from `default`. Where tyro would draw a box around an error, one line says
    the same."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(Args, description=__doc__, default=default)
    except SystemExit as e:
        if e.code:
            lines = re.sub("-{5,}", "", box.getvalue()).splitlines()[1:]  # where it cannot draw, it writes dashes
            words = " ".join(line.strip("│╭╮╰╯─ ") for line in lines)
            fail(re.split(r"\s{2,}For full helptext|\s{2,}Argument helptext", words)[0].strip() + " (see --help)")
        raise


def checked_types(args):
    """The same Args, read from a file; TypeError where a value has another type than its default."""
    for field in dataclasses.fields(Args):
        if type(getattr(args, field.name)) is not type(field.default):
            raise TypeError(f"{field.name} must be of type {type(field.default).__name__}")
    return args


def given(name):
    """Whether the command line sets an option (a field of Args), be it to its default."""
    options = {argument.partition("=")[0].replace("_", "-") for argument in sys.argv}
    return f"--{name.replace('_', '-')}" in options


def rollout_range(args):
    """Shortest and longest rollout in steps per environment that these arguments allow, and the number of which all lengths
    are multiples, so that every minibatch has the same size: the number of minibatches or, where that is more than a quarter
    of the shortest rollout or the range holds no multiple of it, the least number that divides the batch evenly."""
    low, high = (args.rollout_length_min, args.rollout_length_max) if args.adapt_rollout else (args.num_steps, args.num_steps)
    num_envs = args.num_envs // WORLD_SIZE  # each process splits its own part of the batch
    multiple = args.num_minibatches
    if 4 * multiple > low or high // multiple * multiple < low:
        multiple //= math.gcd(multiple, num_envs)
    if high // multiple * multiple < low:
        fail(
            f"a rollout of {high} steps x {num_envs} environments does not divide into {args.num_minibatches} equal "
            f"minibatches; use fewer, or {math.ceil(low / multiple) * multiple} steps"
        )
    return low, high, multiple


def check_args(args):
    """Fails with one line at the first argument that cannot work, before anything is built or written."""
    if args.env_id not in atari_ids():
        close = difflib.get_close_matches(args.env_id, atari_ids(), n=3, cutoff=0.4) or ["Breakout-v5", "Pong-v5"]
        kind = "not an Atari game" if args.env_id in envpool.list_all_envs() else "unknown"
        fail(f"--env-id {args.env_id} is {kind}; did you mean {' or '.join(close)}?")
    at_least = dict.fromkeys("num_envs num_steps total_timesteps num_minibatches update_epochs adapt_interval".split(), 1)
    at_least |= dict.fromkeys("rollout_length_min divergence_window reference_batch_size video_episodes".split(), 1)
    at_least |= {"max_episode_steps": 2}  # all others 0
    at_most = {"num_envs": 65_536, "rollout_length_max": 65_536, "num_steps": 65_536, "max_episode_steps": 10_000_000}
    at_most |= {"seed": 2**32 - 1, "env_threads": 1024, "torch_threads": 1024, "eval_episodes": 1_000_000}
    for name, value in vars(args).items():
        low, high = at_least.get(name, 0), at_most.get(name, 10**15)
        if isinstance(value, int) and not low <= value <= high:
            wrong, limit = ("small", f"{low} or more") if value < low else ("large", f"{high} or less")
            fail(f"--{name.replace('_', '-')} {value} is too {wrong}; use {limit}")
    if not args.exp_name or set(args.exp_name) & set("/\\\0"):
        fail(f"--exp-name {args.exp_name!r} becomes a part of the run folder's name; use letters, digits and the like")
    for name in "learning_rate max_grad_norm divergence_min divergence_max rollout_smoothing".split():
        if not 0 < getattr(args, name) < math.inf:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} must be a positive number")
    shares = "gamma q_lambda start_e end_e exploration_fraction sticky_action_probability eval_epsilon"
    for name in f"{shares} divergence_min divergence_max rollout_smoothing".split():
        if not 0 <= getattr(args, name) <= 1:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} must lie between 0 and 1")
    if args.divergence_min >= args.divergence_max:
        fail(f"--divergence-min {args.divergence_min} must be less than --divergence-max {args.divergence_max}")
    if args.rollout_length_min > args.rollout_length_max:
        fail(f"--rollout-length-min {args.rollout_length_min} is above --rollout-length-max {args.rollout_length_max}")
    if args.num_envs % WORLD_SIZE:
        fail(f"--num-envs {args.num_envs} does not divide into {WORLD_SIZE} equal processes; use a multiple of {WORLD_SIZE}")
    if args.num_envs // WORLD_SIZE % max(1, args.env_pools):
        fail(f"--num-envs {args.num_envs // WORLD_SIZE} does not divide into --env-pools {args.env_pools} equal groups")
    if args.cudagraphs and WORLD_SIZE > 1:
        fail("--cudagraphs works with one process only; leave it out under torchrun")
    if bool(args.resume) + args.auto_resume + args.eval_only > 1:
        fail("--resume, --auto-resume and --eval-only exclude each other; use one of them")
    length_min, length_max, multiple = rollout_range(args)
    first_batch = args.num_envs * round_rollout_length(length_min, length_min, length_max, multiple)
    if args.total_timesteps < first_batch:
        fail(f"--total-timesteps {args.total_timesteps} is less than the first rollout; use {first_batch} or more")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda, but PyTorch finds no CUDA device here; use --device cpu or auto")
    gpus = torch.cuda.device_count()
    if args.device != "cpu" and 0 < gpus < LOCAL_WORLD_SIZE:
        fail(f"{LOCAL_WORLD_SIZE} processes, but {gpus} GPUs here; use torchrun --nproc_per_node={gpus} or --device cpu")
    if args.eval_only and not args.model:
        fail("--eval-only needs --model runs/<run>/model.pt")
    if args.eval_only and WORLD_SIZE > 1:
        fail("--eval-only works with one process only; start it with python, not torchrun")
    if args.model and not args.eval_only:
        fail("--model is for --eval-only; add that, or leave --model out to train")
    if args.eval_only and args.eval_episodes < 1:
        fail("--eval-only needs --eval-episodes of 1 or more")
    if args.eval_only and Path(args.model).is_file() and not os.access(Path(args.model).parent, os.W_OK):
        fail(f"--eval-only writes eval.json beside the model, but {Path(args.model).parent} is read-only; copy the model")
    if args.log_noise_scale and args.num_minibatches < 2:
        fail(f"--log-noise-scale compares minibatches; use --num-minibatches 2 or more, not {args.num_minibatches}")
    if args.track and getattr(importlib.util.find_spec("wandb"), "loader", None) is None:  # a folder wandb/ has no loader
        fail("--track needs Weights & Biases, which is not installed; run `pip install wandb` or leave --track out")
    if args.capture_video and not all(map(importlib.util.find_spec, ("ale_py", "cv2", "moviepy"))):
        needed = "ale-py, moviepy and opencv-python-headless"
        fail(f"--capture-video needs {needed}; run `pip install -r requirements.txt` or leave --capture-video out")


# ---------------------------------------------------------------------------------------------------------------------------
# Long runs: run folder, checkpoints, signals, several processes
# ---------------------------------------------------------------------------------------------------------------------------

# A run may be continued with other values of these (eval_greedy is PPO's): where it runs and what is done beside training.
MAY_CHANGE = set(
    "device torch_deterministic track wandb_project_name wandb_entity capture_video video_episodes eval_episodes eval_epsilon "
    "eval_greedy eval_only model checkpoint_interval resume auto_resume compile cudagraphs microbatch_size env_pools "
    "env_threads torch_threads memory_format".split()
)


def make_run_dir(args):
    """Makes runs/<game>__<experiment>__<seed>__<time>; where another run has the name, it waits for the next second."""
    while True:
        run_dir = Path("runs") / f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
        try:
            run_dir.mkdir(parents=True)
            claim(run_dir)
            return run_dir
        except OSError as e:
            if not os.path.exists(run_dir):
                fail(f"cannot make the run folder {run_dir}: {e.strerror}; start where runs/ is a folder you may write to")
            time.sleep(1)


def keep_source(run_dir, device):
    """Leaves in the run's folder the source of this script and, in versions.json, what runs it: a list that grows by one
    entry, and a warning, where a run is continued by something else."""
    source = Path(__file__).read_bytes()
    versions = {
        "script": Path(__file__).name,
        "source": hashlib.sha256(source).hexdigest()[:12],
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: importlib.metadata.version(package) for package in ("envpool", "numpy")},
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability(),
    }
    path = run_dir / "versions.json"
    past = json.loads(path.read_text()) if path.exists() else []
    if past[-1:] == [versions]:
        return
    if past:
        changed = ", ".join(f"{name} (was {was})" for name, was in past[-1].items() if was != versions.get(name))
        print(f"warning: what runs {run_dir} has changed since: {changed}", file=sys.stderr, flush=True)
    write_file(run_dir / versions["script"], source)
    write_json(path, [*past, versions])


def save_checkpoint(run_dir, content):
    """Writes runs/<run>/checkpoint_<steps>.pt and keeps the last two. A disk that is full costs this checkpoint only: a line
    says so and training goes on."""
    path = run_dir / f"checkpoint_{content['global_step']:012d}.pt"
    try:
        write_file(path, serialize(content))
    except OSError as e:
        print(f"warning: cannot write {path} ({e.strerror}); training goes on without this checkpoint", file=sys.stderr)
        return
    by_age = sorted(run_dir.glob("checkpoint_*.pt"), key=os.path.getmtime)  # a damaged one may be of a later step
    for old in [*by_age[:-2], *run_dir.glob("checkpoint_*.part")]:  # kill -9 leaves what it interrupts
        old.unlink(missing_ok=True)


def load_checkpoint(run_dir):
    """The newest checkpoint of a run that can be read, a dict on the CPU; None where there is none. Names damaged ones."""
    for path in sorted(run_dir.glob("checkpoint_*.pt"), reverse=True):
        try:
            with zipfile.ZipFile(path) as archive:  # PyTorch does not look at the checksums that it writes
                if archive.testzip():
                    raise ValueError("wrong checksum")
            content = torch.load(path, map_location="cpu", weights_only=True)
            if not {"weights", "optimizer", "random_states", "finished", "recent_returns"} <= set(content):
                raise ValueError("not a checkpoint of these scripts")
            return content
        except Exception as e:
            reason = str(e).strip().split("\n")[0][:100] or type(e).__name__
            print(f"warning: {path} is damaged ({reason}); looking for the one before", file=sys.stderr, flush=True)
    return None


def saved_args(run_dir):
    """The Args of a run of this script, from its args.json; None where the folder holds no such run."""
    try:
        args = checked_types(Args(**json.loads((run_dir / "args.json").read_text())))
        versions = run_dir / "versions.json"  # not there yet where the run ended between the two
        scripts = {entry["script"] for entry in json.loads(versions.read_text())} if versions.exists() else set()
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return args if scripts <= {Path(__file__).name} else None


def claim(run_dir):
    """Locks a run's folder for the lifetime of this process (under torchrun, of the first one). False where another process
    holds the lock, True also where the operating system or the file system has no such locks."""
    if RANK == 0:
        with contextlib.suppress(ImportError):
            import fcntl

            try:
                lock = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT)  # writable, or NFS would not lock it
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:
                pass
    return True


def find_run(args):
    """What --resume and --auto-resume continue: (Args, folder, checkpoint), or (args, None, None) where that is a new run.

    Fails with one line where the run has other arguments or no checkpoint, and ends the script where it is finished.
    """
    names = [field.name for field in dataclasses.fields(Args) if field.name not in MAY_CHANGE]
    run_dir = checkpoint = None
    in_use = "is in use by another process; wait until that has ended, or stop it"
    if args.resume or given("resume"):  # the run's arguments stand, but for those that the command line gives again
        run_dir = Path(args.resume)
        saved = saved_args(run_dir) if args.resume else None
        if saved is None:
            fail(f"--resume {args.resume!r} is no run of {Path(__file__).name}; give the folder of one, runs/<run>")
        args = parse_args(default=saved)
    check_args(args)
    if args.resume:
        extended = args.total_timesteps > saved.total_timesteps
        changed = [n for n in names if getattr(args, n) != getattr(saved, n) and not (extended and n == "total_timesteps")]
        if changed:
            was = ", ".join(f"--{n.replace('_', '-')} (was {getattr(saved, n)}, not {getattr(args, n)})" for n in changed)
            fail(f"--resume continues a run with its own arguments; leave out {was}")
        if extended:
            args.schedule_timesteps = args.schedule_timesteps or saved.total_timesteps
        if not os.access(run_dir, os.W_OK):
            fail(f"--resume writes to {run_dir}, which is read-only; copy the run to where you may write")
        if not claim(run_dir):
            fail(f"{run_dir} {in_use}")
        checkpoint = load_checkpoint(run_dir)
        if checkpoint is None:
            fail(f"{run_dir} has no checkpoint that can be read; start the run anew")
    elif args.auto_resume:
        runs = sorted(Path("runs").glob(f"{glob.escape(f'{args.env_id}__{args.exp_name}__{args.seed}__')}*"), reverse=True)
        for run_dir in runs:
            saved = saved_args(run_dir)
            if not saved or any(getattr(args, n) not in ("auto", getattr(saved, n)) for n in names):  # auto: what the run had
                continue
            if not claim(run_dir):
                fail(f"{run_dir} has the same arguments and {in_use}")
            checkpoint = load_checkpoint(run_dir)
            diverged = run_dir / "diverged.json"  # stays there when --resume has got past that step, to a later checkpoint
            if diverged.exists():
                if not checkpoint or checkpoint["global_step"] < json.loads(diverged.read_text())["global_step"]:
                    hint = "--resume continues it from before that, or " if checkpoint else ""
                    fail(f"{run_dir} has the same arguments and diverged; {hint}remove its folder")
            if checkpoint:
                args.precision = saved.precision
                break
    if checkpoint is None:
        return args, None, None
    if checkpoint["finished"] and args.total_timesteps <= checkpoint["args"]["total_timesteps"]:
        print(
            f"{run_dir} is finished ({checkpoint['global_step']:,} steps); --resume with a larger --total-timesteps extends it"
        )
        sys.exit()
    if len(checkpoint["random_states"]) != WORLD_SIZE:
        fail(f"{run_dir} was trained by {len(checkpoint['random_states'])} processes, not {WORLD_SIZE}; use as many again")
    return args, run_dir, checkpoint


def stop_at_once(number):
    """Ends the script as the signal would have, with a line that says how to go on."""
    print("stopped at once; --resume continues a training run from its last checkpoint", flush=True)
    sys.exit(128 + number)


def catch_signals():
    """Returns a list in which the first SIGTERM or SIGINT will appear, so that the training loop stops after its iteration. A
    later one ends the script at once, but not within two seconds: Slurm and the shell it signals may pass on the same one."""
    received, patient_until = [], 0.0

    def handler(number, frame):
        nonlocal patient_until
        if not received:
            received.append(number)
            patient_until = time.monotonic() + 2
        elif time.monotonic() > patient_until:
            stop_at_once(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)
    return received


def explain_os_error(kind, error, traceback):
    """For sys.excepthook: what the operating system refuses, such as space on a full disk, is one line and no traceback."""
    if not issubclass(kind, OSError):
        return sys.__excepthook__(kind, error, traceback)
    hint = "once that is mended, --resume continues a training run from its last checkpoint"
    print(f"error: {error}; {hint}", file=sys.stderr)


def reduce_numbers(numbers, op=dist.ReduceOp.AVG):
    """Mean of each number over the processes of torchrun (or the sum, least or greatest, as `op` says), a list of floats;
    alone, the numbers themselves."""
    if not dist.is_initialized():
        return numbers
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    scale = dist.get_world_size() if op == dist.ReduceOp.AVG else 1  # gloo has no AVG
    numbers = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(numbers, dist.ReduceOp.SUM if op == dist.ReduceOp.AVG else op)
    return (numbers / scale).tolist()


def average(x):
    """Mean of a tensor over the processes of torchrun, which overwrites it; alone, the tensor itself."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x = x / dist.get_world_size()
    return x


def average_gradients(network):
    """Replaces all gradients by their mean over the processes of torchrun; alone, it does nothing."""
    if dist.is_initialized():
        gradients = average(nn.utils.parameters_to_vector(p.grad for p in network.parameters()))
        nn.utils.vector_to_parameters(gradients, (p.grad for p in network.parameters()))


def mean_weights(weights):
    """Weights (n,) that make a sum over a minibatch the mean over its transitions (1 in weights; reset steps are 0). With
    torchrun, the mean of the processes' sums is that over the transitions of all."""
    return weights / average(weights.sum()).clamp(min=1 / WORLD_SIZE)


class NoWriter:
    """Stands in for the SummaryWriter of all processes but the first."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


# ---------------------------------------------------------------------------------------------------------------------------
# Speed: what makes the script faster, changes nothing else but rounding, and can be switched off
# ---------------------------------------------------------------------------------------------------------------------------


def bfloat16_is_fast(device):
    """Whether the hardware multiplies bfloat16 faster than float32. Intel's processors with the instructions (avx512_bf16) but
    without AMX do not: one trained faster in float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    has_faster_avx512 = capabilities.get("avx512_bf16") and "Intel" not in capabilities.get("cpu_name", "")
    return bool(has_faster_avx512 or capabilities.get("amx_bf16"))


def speed_up(network, precision, device, use_compile=False, memory_format="auto"):
    """Makes the encoder compute in `precision` with features in `memory_format`, and compiles. Weights, heads, targets and
    optimizer stay float32; on CUDA, PyTorch's autocast computes LayerNorm in float32 too."""
    if memory_format == "channels_last" or (memory_format == "auto" and device.type == "cpu"):
        network.encoder[0].memory_format = torch.channels_last
    if precision == "bfloat16":
        network.encoder.forward = torch.autocast(device.type, torch.bfloat16)(network.encoder.forward)
    if use_compile:
        network.compile()
    return network


def keep_freed_memory():
    """Makes glibc keep the memory of freed CPU tensors for the next minibatch, instead of returning it to the system, which
    would clear every page anew. Where the environment configures malloc in any way, that stands instead."""
    chosen = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc" and not chosen:
        ctypes.CDLL(None).mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, its maximum of 32 MiB: larger tensors are given back
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def compiler_is_there(device):
    """Whether torch.compile has what it needs: Triton and a C compiler on CUDA, a C++ compiler on the CPU; Python's headers
    (on Linux often in a package of their own)."""
    if sys.platform == "linux" and not Path(sysconfig.get_path("include"), "Python.h").exists():
        return False
    if device.type == "cuda":
        compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang", "cl"]
        return importlib.util.find_spec("triton") is not None and any(map(shutil.which, compilers))
    default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return shutil.which(os.environ.get("CXX", default)) is not None


class CUDAGraphed:
    """Calls function(*tensors) through a CUDA graph, which launches all its kernels at once. The first call with tensors of
    other shapes runs plainly (the warm-up), the second records a graph, and later ones replay it.

    Only the graph of the latest shapes is kept, since each graph holds memory of its own and shapes change with the rollout
    length, once per adaptation at most. It has a stream of its own and is dropped before the next warm-up: when a graph is
    destroyed, PyTorch frees the cuBLAS workspace of its stream, also where another graph uses that (PyTorch issue 193402).

    A recorded compute_gradient writes into the p.grad tensors that it left when recorded. Between its calls nothing may
    replace them or set them to None, as optimizer.zero_grad() would; it does so itself only when run plainly or recorded.
    """

    def __init__(self, function):
        self.function, self.shapes, self.recorded, self.stream = function, None, None, torch.cuda.Stream()

    def __call__(self, *inputs):
        shapes = [x.shape for x in inputs]
        if shapes != self.shapes:
            self.shapes, self.recorded = shapes, None
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                output = self.function(*(x.clone() for x in inputs))  # copies, as when it is recorded
            torch.cuda.current_stream().wait_stream(self.stream)
            return output
        if self.recorded is None:
            static_inputs, graph = [x.clone() for x in inputs], torch.cuda.CUDAGraph()
            gc.disable()  # it may destroy an older graph, which CUDA forbids while one is recorded (PyTorch PR 161037)
            try:
                with torch.cuda.graph(graph, stream=self.stream):
                    static_output = self.function(*static_inputs)
            finally:
                gc.enable()
            self.recorded = graph, static_inputs, static_output
        graph, static_inputs, static_output = self.recorded
        for static_input, x in zip(static_inputs, inputs, strict=True):
            static_input.copy_(x)
        graph.replay()
        return torch.utils._pytree.tree_map(torch.clone, static_output)  # the next replay writes over it


if __name__ == "__main__":
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")

    args, run_dir, checkpoint = find_run(parse_args())
    args.resume, args.auto_resume = "", False  # how it was started is no part of the run
    received_signals = catch_signals()
    sys.excepthook = explain_os_error
    # An OSError in SummaryWriter's thread is raised again here, by a later call of it: no traceback of the thread's own
    threading.excepthook = lambda error: None if issubclass(error.exc_type, OSError) else threading.__excepthook__(error)

    num_envs = args.num_envs // WORLD_SIZE
    cores = max(1, granted_cores() // LOCAL_WORLD_SIZE)

    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device("cuda", LOCAL_RANK) if args.device != "cpu" and torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if WORLD_SIZE > 1:
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
    all_are_fast = reduce_numbers([bfloat16_is_fast(device)], dist.ReduceOp.MIN)[0]
    if args.precision == "auto":
        args.precision = "bfloat16" if all_are_fast else "float32"
    if args.compile and not compiler_is_there(device):
        missing = "Triton, C compiler" if device.type == "cuda" else "C++ compiler"
        print(f"--compile finds no {missing} or Python.h (python3-dev) here: running eagerly", flush=True)
        args.compile = False
    if args.cudagraphs and device.type != "cuda":
        print("--cudagraphs finds no CUDA device here: running without", flush=True)
        args.cudagraphs = False
    env_threads = args.env_threads or cores
    torch.set_num_threads(args.torch_threads or cores)
    keep_freed_memory()

    if args.eval_only:
        received_signals.append(0)  # a signal waits only while the list is empty: from here on, it ends the script at once
        if received_signals[0]:
            stop_at_once(received_signals[0])
        evaluate_only(args, device)
        sys.exit()

    # Adaptive Batch Scaling
    length_min, length_max, length_multiple = rollout_range(args)
    rollout_length = float(length_min)  # stays a float, or smoothing would freeze short of its target
    divergences = deque(maxlen=args.divergence_window)
    noise_scales = deque(maxlen=args.divergence_window)  # (noise, signal)
    num_measurements = 0

    # Storage, allocated once for the longest rollout; shorter ones use its beginning
    shortest, longest = (round_rollout_length(n, length_min, length_max, length_multiple) for n in (length_min, length_max))
    try:
        obs = torch.zeros((longest + 1, num_envs, 4, 84, 84), dtype=torch.uint8, device=device)
    except RuntimeError:
        size = f"{(longest + 1) * num_envs * 4 * 84 * 84 / 2**30:,.1f} GiB"
        fail(f"no memory for a rollout of {longest} steps x {num_envs} environments ({size}); make one of them smaller")
    actions = torch.zeros((longest, num_envs), dtype=torch.int64, device=device)
    values = torch.zeros((longest + 1, num_envs), device=device)
    rewards = torch.zeros((longest, num_envs))
    terminations, dones, is_transition = torch.zeros((3, longest, num_envs), dtype=torch.bool)

    # Environments, in groups (pools) of which one is emulated while the network acts for another
    num_pools = args.env_pools or (2 if device.type == "cuda" and num_envs % 2 == 0 else 1)
    seeds = env_seeds(args.seed, args.num_envs, start=checkpoint["global_step"] if checkpoint else 0)
    seeds = seeds[RANK * num_envs : (RANK + 1) * num_envs]
    groups = [slice(i, i + num_envs // num_pools) for i in range(0, num_envs, num_envs // num_pools)]
    game_options = (args.max_episode_steps, args.sticky_action_probability, args.episodic_life)
    pools = [AtariEnvs(args.env_id, seeds[group], env_threads, *game_options) for group in groups]
    num_actions = pools[0].num_actions

    # Network
    network = speed_up(QNetwork(num_actions).to(device), args.precision, device, args.compile, args.memory_format)
    optimizer = torch.optim.RAdam(network.parameters(), lr=args.learning_rate, foreach=True)
    for parameter in network.parameters() if WORLD_SIZE > 1 else ():
        dist.broadcast(parameter.data, 0)  # different machines may not agree in the last bits of the first weights
    act_step = partial(act, network)
    microbatch_size = args.microbatch_size or (512 if device.type == "cpu" else 2**31)
    gradient_step = partial(compute_gradient, network, microbatch_size=microbatch_size)
    if args.cudagraphs:
        act_step, gradient_step = CUDAGraphed(act_step), CUDAGraphed(gradient_step)
    update_step = partial(update, network, optimizer, gradient_step, max_grad_norm=args.max_grad_norm)
    # Training draws from one generator and measuring from another, so measuring changes no run.
    rank_seed = args.seed + 1_000_003 * RANK
    rng = torch.Generator(device).manual_seed(rank_seed)
    reference_rng = torch.Generator(device).manual_seed(rank_seed)

    # Progress, or where the checkpoint left it
    global_step = iteration = 0
    recent_returns = deque(maxlen=100)
    schedule_timesteps = args.schedule_timesteps or args.total_timesteps
    if checkpoint:
        try:
            network.load_state_dict(checkpoint["weights"])
            optimizer.load_state_dict(checkpoint["optimizer"])
        except (RuntimeError, ValueError):
            fail(f"{run_dir} holds another network; resume it with the script that began it")
        global_step, iteration, num_measurements = (checkpoint[n] for n in ("global_step", "iteration", "num_measurements"))
        rollout_length = checkpoint["rollout_length"]
        for name, kept in (("divergences", divergences), ("noise_scales", noise_scales), ("recent_returns", recent_returns)):
            kept.extend(checkpoint[name])
        for generator, random_state in zip((rng, reference_rng), checkpoint["random_states"][RANK], strict=True):
            try:
                generator.set_state(random_state)
            except RuntimeError:  # another kind of device has another kind of generator
                generator.manual_seed(rank_seed + global_step)

    highest_step, minus_lowest_step = reduce_numbers([global_step, -global_step], dist.ReduceOp.MAX)
    if highest_step != -minus_lowest_step:
        fail("the processes found different checkpoints; runs/ must be one folder that all machines see")

    # Run folder and logs
    run_dir = run_dir or (make_run_dir(args) if RANK == 0 else None)
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(folder := [run_dir])
        run_dir = folder[0]
    if RANK == 0:
        write_json(run_dir / "args.json", vars(args))
        keep_source(run_dir, device)
    threads = f"{torch.get_num_threads()} PyTorch and {sum(min(env_threads, e.num_envs) for e in pools)} emulator threads"
    if WORLD_SIZE > 1:
        threads += f", {WORLD_SIZE} processes"
    print(
        f"{args.env_id} on {device.type} ({args.precision}, {threads}), {sum(p.numel() for p in network.parameters()):,} "
        f"parameters, batches of {args.num_envs * shortest:,} to {args.num_envs * longest:,} samples in multiples of "
        f"{args.num_envs * length_multiple:,}: {run_dir}",
        flush=True,
    )
    if checkpoint:
        print(f"continuing at step {global_step:,} of {args.total_timesteps:,}; running games start anew", flush=True)
    if args.total_timesteps > schedule_timesteps:
        note = ", so the learning rate is 0 from there on" * args.anneal_lr
        print(f"schedules stay those of the first {schedule_timesteps:,} steps{note}", flush=True)
    if args.track and RANK == 0:
        import wandb

        names = {"project": args.wandb_project_name, "entity": args.wandb_entity or None, "name": run_dir.name}
        wandb.init(**names, id=run_dir.name, resume="allow", config=vars(args), sync_tensorboard=True, save_code=True)
    # After a crash the curves may have points beyond the checkpoint: purge_step takes them out
    writer = SummaryWriter(str(run_dir), purge_step=global_step + 1 if checkpoint else None) if RANK == 0 else NoWriter()
    if not checkpoint:
        writer.add_text("hyperparameters", "|param|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in vars(args).items()))

    bar = tqdm(total=args.total_timesteps, initial=global_step, unit=" steps", unit_scale=True, file=sys.stdout, disable=None)
    start_step, last_checkpoint_step, last_log = global_step, global_step, time.time()
    start_time = last_checkpoint_time = last_log

    def training_state():
        """All that a checkpoint holds: everything but the games, which the emulator cannot save."""
        random_states = [[rng.get_state(), reference_rng.get_state()]] * WORLD_SIZE
        if WORLD_SIZE > 1:
            dist.all_gather_object(random_states, random_states[RANK])  # each process has its own
        return {
            "weights": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random_states": random_states,
            "args": vars(args),
            "global_step": global_step,
            "iteration": iteration,
            "num_measurements": num_measurements,
            "rollout_length": rollout_length,
            "divergences": list(divergences),
            "noise_scales": list(noise_scales),
            "recent_returns": list(recent_returns),
            "finished": False,
        }

    obs[0] = torch.from_numpy(np.concatenate([envs.reset() for envs in pools]))
    iteration_start = time.perf_counter()

    while True:
        length = round_rollout_length(rollout_length, length_min, length_max, length_multiple)
        batch_size = args.num_envs * length
        if global_step + batch_size > args.total_timesteps:
            break
        iteration += 1
        learning_rate = args.learning_rate
        if args.anneal_lr:
            learning_rate *= max(0.0, 1 - global_step / schedule_timesteps)
        optimizer.param_groups[0]["lr"] = learning_rate

        # Rollout: pass t stores what the actions of pass t - 1 led to (obs[t]; reward and ends at t - 1), then acts on obs[t]
        steps = [global_step + args.num_envs * (t + 1) for t in range(length)]
        decay_steps = args.exploration_fraction * schedule_timesteps
        epsilons = torch.tensor([linear_schedule(args.start_e, args.end_e, decay_steps, step) for step in steps])
        explore = torch.rand((length, num_envs), generator=rng, device=device) < epsilons.to(device).unsqueeze(1)
        random_actions = torch.randint(num_actions, (length, num_envs), generator=rng, device=device)
        emulation_time = inference_time = 0.0
        for t, (envs, group) in itertools.product(range(length + 1), zip(pools, groups, strict=True)):
            start = time.perf_counter()
            if t > 0:
                next_obs, reward, terminated, done, is_reset, games = envs.recv()
                emulation_time += time.perf_counter() - start
                start = time.perf_counter()
                obs[t, group] = torch.from_numpy(next_obs)
                rewards[t - 1, group] = torch.from_numpy(reward)
                terminations[t - 1, group] = torch.from_numpy(terminated)
                dones[t - 1, group] = torch.from_numpy(done)
                is_transition[t - 1, group] = torch.from_numpy(~is_reset)
                for episodic_return, episodic_length, _ in games:
                    recent_returns.append(episodic_return)
                    writer.add_scalar("charts/episodic_return", episodic_return, steps[t - 1])
                    writer.add_scalar("charts/episodic_length", episodic_length, steps[t - 1])
            draw = min(t, length - 1)  # the last pass acts no more, it only takes the values to bootstrap from
            action, values[t, group] = act_step(obs[t, group], explore[draw, group], random_actions[draw, group])
            if t < length:
                actions[t, group] = action
                envs.send(action.cpu().numpy())
            inference_time += time.perf_counter() - start
        global_step += batch_size

        # Targets, once per rollout: s_{t+1} is obs[t + 1] also where the episode ended, since EnvPool resets a step later
        ends = terminations[:length], dones[:length]
        next_values = values[1 : length + 1].cpu()
        returns = q_lambda_returns(rewards[:length], *ends, next_values, args.gamma, args.q_lambda)

        # Batch: reset steps have weight 0
        b_obs = obs[:length].flatten(0, 1)
        batch = (b_obs, actions[:length].flatten(), returns.flatten().to(device))
        b_weights = is_transition[:length].flatten().float().to(device)
        minibatch_size = length * num_envs // args.num_minibatches
        epochs = args.update_epochs
        if args.scale_epochs:
            epochs = max(epochs, round(epochs * length / args.num_steps))

        # Every K-th iteration, what the policy does before the update; not where all steps of a process are reset steps
        measure = iteration % args.adapt_interval == 0
        measure = measure and not reduce_numbers([float(not b_weights.any())], dist.ReduceOp.MAX)[0]
        if measure:
            start = time.perf_counter()
            states = b_weights.nonzero().squeeze(1)
            states = states[torch.randperm(len(states), generator=reference_rng, device=device)]
            states = b_obs[states[: max(1, args.reference_batch_size // WORLD_SIZE)]]
            old_actions = greedy_actions(network, states)
            divergence_time = time.perf_counter() - start

        # The gradient noise scale, the rival signal
        if measure and args.log_noise_scale:
            start = time.perf_counter()
            epoch = (batch, b_weights, args.num_minibatches, rank_seed + iteration)
            noise_scales.append(reduce_numbers(measure_noise_scale(network, gradient_step, *epoch)))
            mean_noise, mean_signal = np.mean(noise_scales, axis=0)
            b_simple = mean_noise / mean_signal if mean_signal > 0 else math.inf  # a ratio of means, not a mean of ratios
            writer.add_scalar("gns/noise", noise_scales[-1][0], global_step)
            writer.add_scalar("gns/signal", noise_scales[-1][1], global_step)
            writer.add_scalar("gns/b_simple", b_simple, global_step)
            writer.add_scalar("time/noise_scale", time.perf_counter() - start, global_step)

        # Update: epochs of random minibatches, each with the mean over its transitions as its loss
        logs = torch.zeros(len(LOSSES), device=device)
        for _ in range(epochs):
            for inds in torch.randperm(length * num_envs, generator=rng, device=device).split(minibatch_size):
                logs += update_step(*(x.index_select(0, inds) for x in batch), mean_weights(b_weights[inds]))
        losses = reduce_numbers((logs / (epochs * args.num_minibatches)).tolist())  # all processes see where one is not finite
        for name, loss in zip(LOSSES, losses, strict=True):
            writer.add_scalar(f"losses/{name}", loss, global_step)
        if not math.isfinite(sum(losses)):
            writer.close()
            if RANK == 0:
                write_json(run_dir / "diverged.json", {"global_step": global_step})
            fail(f"the loss is no longer finite at step {global_step}; a lower --learning-rate may help ({run_dir})", code=1)

        # Adaptive Batch Scaling: how many greedy actions did this iteration change, and how long should the next rollouts be?
        if measure:
            start = time.perf_counter()
            divergence = behavioral_divergence(greedy_actions(network, states), old_actions)
            divergences.append(reduce_numbers([divergence])[0])
            num_measurements += 1
            mean_divergence = sum(divergences) / len(divergences)
            target = rollout_length
            if args.adapt_signal == "time":
                target = length_min + (length_max - length_min) * min(1, global_step / schedule_timesteps)
            elif num_measurements >= args.divergence_warmup:
                bounds = (length_min, length_max, args.divergence_min, args.divergence_max)
                target = target_rollout_length(mean_divergence, *bounds, args.schedule)
            rollout_length = (1 - args.rollout_smoothing) * rollout_length + args.rollout_smoothing * target
            writer.add_scalar("abs/divergence", divergences[-1], global_step)
            writer.add_scalar("abs/divergence_mean", mean_divergence, global_step)
            writer.add_scalar("time/divergence", divergence_time + time.perf_counter() - start, global_step)

        obs[0] = obs[length]  # the next rollout begins where this one ended
        writer.add_scalar("abs/rollout_length", length, global_step)
        writer.add_scalar("abs/batch_size", batch_size, global_step)
        writer.add_scalar("abs/minibatch_size", batch_size // args.num_minibatches, global_step)
        writer.add_scalar("charts/epsilon", float(epsilons[-1]), global_step)
        writer.add_scalar("charts/learning_rate", learning_rate, global_step)
        now = time.perf_counter()
        iteration_time, iteration_start = now - iteration_start, now
        sps = batch_size / iteration_time
        writer.add_scalar("charts/SPS", sps, global_step)
        writer.add_scalar("time/emulation", emulation_time, global_step)
        writer.add_scalar("time/inference", inference_time, global_step)
        writer.add_scalar("time/learning", iteration_time - emulation_time - inference_time, global_step)
        status = {
            "SPS": f"{sps:.0f}",
            "return": f"{np.mean(recent_returns):.1f}" if recent_returns else "none yet",
            "length": length,
            "divergence": f"{divergences[-1]:.3f}" if divergences else "not measured yet",
        }
        bar.set_postfix(status, refresh=False)
        bar.update(batch_size)
        if bar.disable and (iteration == 1 or time.time() - last_log >= 30):
            last_log = time.time()
            print(
                f"step {global_step:,} of {args.total_timesteps:,}: " + ", ".join(f"{k} {v}" for k, v in status.items()),
                flush=True,
            )

        # Checkpoint, when it is time or a signal asks to stop; the processes do it together
        due = time.time() - last_checkpoint_time >= 300
        if args.checkpoint_interval:
            due = global_step - last_checkpoint_step >= args.checkpoint_interval
        stop, due = reduce_numbers([max(received_signals, default=0), RANK == 0 and due], dist.ReduceOp.MAX)
        if stop or due:
            state = training_state()
            if RANK == 0:
                writer.flush()  # the curves on disk reach as far as the checkpoint
                save_checkpoint(run_dir, state)
            last_checkpoint_step, last_checkpoint_time = global_step, time.time()
        if stop:
            bar.close()
            launcher, command = "python" if WORLD_SIZE == 1 else "torchrun ...", [sys.argv[0], "--resume", run_dir.as_posix()]
            print(f"stopped by a signal at step {global_step:,}; to continue: {launcher} {shlex.join(command)}", flush=True)
            writer.close()
            if WORLD_SIZE > 1:
                dist.barrier()  # torchrun would stop the first process while it saves as soon as another has ended
                dist.destroy_process_group()
            sys.exit(128 + int(stop))

    bar.close()
    for envs in pools:
        envs.close()
    state = training_state()
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
    if RANK > 0:
        sys.exit()
    writer.flush()
    save_checkpoint(run_dir, state)
    (run_dir / "eval.json").unlink(missing_ok=True)  # of the model before, where this run was extended
    save_model(network, args, global_step, run_dir / "model.pt")
    received_signals.append(0)  # a signal waits only while the list is empty: from here on, it ends the script at once
    if received_signals[0]:  # one came where no iteration was left to notice it
        stop_at_once(received_signals[0])
    trained = f"trained {global_step - start_step:,} steps in {time.time() - start_time:.0f} s"
    print(f"{trained}: {run_dir / 'model.pt'}", flush=True)
    for name, value in evaluate_and_record(network, args, device, run_dir).items():
        if isinstance(value, float):
            writer.add_scalar(f"eval/{name}", value, global_step)
    save_checkpoint(run_dir, state | {"finished": True})
    writer.close()
