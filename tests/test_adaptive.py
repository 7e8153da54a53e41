"""Behavioral divergence, target length and rounding."""

import math

import numpy as np
import pytest
import torch
from conftest import modules_with

scripts = pytest.mark.parametrize("script", modules_with("behavioral_divergence", "target_rollout_length"))
all_scripts = pytest.mark.parametrize("script", modules_with("behavioral_divergence", "rollout_range"))
schedules = pytest.mark.parametrize("schedule", ["log", "linear", "exp"])
PUBLISHED = (16, 64, 0.05, 0.95)  # L_min, L_max, delta_min, delta_max


@all_scripts
def test_divergence_of_known_actions(script):
    """The share of states whose greedy action changed, an exact Python float."""
    old = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    for changed in range(9):
        new = old.clone()
        new[:changed] += 1
        divergence = script.behavioral_divergence(new, old)
        assert divergence == changed / 8 and type(divergence) is float
        assert script.behavioral_divergence(old, new) == divergence
    new, old = torch.zeros(3, dtype=torch.int64), torch.tensor([0, 0, 7])
    assert script.behavioral_divergence(new, old) == 1 / 3  # neither float32 nor the size of the difference


@all_scripts
@pytest.mark.parametrize("shapes", [((4,), (3,)), ((4,), (4, 1)), ((1,), (4,)), ((0,), (0,)), ((3, 0), (3, 0))], ids=str)
def test_divergence_refuses_shapes_that_differ_or_are_empty(script, shapes):
    """Broadcasting (4,) with (4, 1) would give a plausible wrong number, an empty mean NaN."""
    new, old = (torch.zeros(shape, dtype=torch.int64) for shape in shapes)
    with pytest.raises(ValueError):
        script.behavioral_divergence(new, old)


@scripts
@schedules
def test_target_at_and_beyond_the_bounds(script, schedule):
    """L_max at delta_min and below, 0 included; L_min at delta_max and above."""
    for divergence in (0.05, 0.049, 1e-9, 0.0):
        assert script.target_rollout_length(divergence, *PUBLISHED, schedule) == pytest.approx(64, abs=1e-12)
    for divergence in (0.95, 0.951, 1.0):
        assert script.target_rollout_length(divergence, *PUBLISHED, schedule) == pytest.approx(16, abs=1e-12)


@scripts
@schedules
def test_target_falls_strictly_between_the_bounds(script, schedule):
    """Every schedule is strictly decreasing, a float, and not constant anywhere inside the bounds."""
    targets = [script.target_rollout_length(0.05 + 0.9 * i / 200, *PUBLISHED, schedule) for i in range(201)]
    assert all(a > b for a, b in zip(targets, targets[1:], strict=False))
    assert all(isinstance(target, float) and 16 <= target <= 64 for target in targets)
    for divergence in (torch.tensor(0.5), np.float32(0.5)):
        target = script.target_rollout_length(divergence, *PUBLISHED, schedule)
        assert type(target) is float and target == script.target_rollout_length(0.5, *PUBLISHED, schedule)


@scripts
def test_target_in_the_middle(script):
    """Half way lies at the geometric mean for log (the default) and at the arithmetic mean for linear, as the paper has it."""
    geometric, arithmetic = math.sqrt(0.05 * 0.95), (0.05 + 0.95) / 2
    assert script.target_rollout_length(geometric, *PUBLISHED) == pytest.approx(40, abs=1e-9)
    assert script.target_rollout_length(geometric, *PUBLISHED, "log") == pytest.approx(40, abs=1e-9)
    assert script.target_rollout_length(arithmetic, *PUBLISHED, "linear") == pytest.approx(40, abs=1e-9)
    a = math.log(0.2 / 0.05) / math.log(0.95 / 0.05)
    assert script.target_rollout_length(0.2, 16, 128, 0.05, 0.95, "log") == pytest.approx(128 - a * 112, abs=1e-9)
    assert 40 < script.target_rollout_length(arithmetic, *PUBLISHED, "exp") < 64  # convex: falls late


@scripts
def test_target_refuses_what_has_no_meaning(script):
    """Bounds out of order, NaN and unknown schedules raise instead of setting a wrong length."""
    for arguments in [
        (math.nan, *PUBLISHED),
        (0.5, 64, 16, 0.05, 0.95),
        (0.5, 0, 16, 0.05, 0.95),
        (0.5, -16, 16, 0.05, 0.95),
        (0.5, 16, 64, 0.95, 0.05),
        (0.5, 16, 64, 0.05, 0.05),
        (0.5, 16, 64, 0.0, 0.95),
        (0.5, 16, 64, -0.1, 0.95),
        (0.5, *PUBLISHED, "cosine"),
        (0.5, *PUBLISHED, ""),
    ]:
        with pytest.raises(ValueError):
            script.target_rollout_length(*arguments)
    with pytest.raises(ValueError, match="cosine"):
        script.target_rollout_length(0.5, *PUBLISHED, "cosine")


@all_scripts
@pytest.mark.parametrize("adapt_rollout", [True, False])
def test_lengths_are_multiples_in_range_and_minibatches_equal(script, adapt_rollout):
    """For any accepted sizes: every length an adaptation can ask for is in range and divides into whole equal minibatches."""
    accepted = 0
    for num_envs in (1, 3, 4, 8, 32, 96, 128):
        for num_minibatches in (1, 2, 3, 4, 8, 32, 64, 256):
            for low, high in [(1, 1), (2, 5), (4, 16), (16, 64), (16, 128), (17, 63), (30, 32), (32, 32)]:
                args = script.Args(
                    num_envs=num_envs,
                    num_minibatches=num_minibatches,
                    rollout_length_min=low,
                    rollout_length_max=high,
                    num_steps=high,
                    adapt_rollout=adapt_rollout,
                )
                try:
                    length_min, length_max, multiple = script.rollout_range(args)
                except SystemExit:
                    smallest = num_minibatches // math.gcd(num_minibatches, num_envs)
                    assert high // smallest * smallest < (low if adapt_rollout else high), "refused though a length fits"
                    continue
                accepted += 1
                assert (length_min, length_max) == ((low, high) if adapt_rollout else (high, high))
                lengths = [length_min + i * (length_max - length_min) / 50 for i in range(51)]
                lengths = [script.round_rollout_length(length, length_min, length_max, multiple) for length in lengths]
                for length in lengths:
                    assert type(length) is int and length_min <= length <= length_max and length % multiple == 0
                    assert num_envs * length % num_minibatches == 0
                assert lengths == sorted(lengths)
    assert accepted > 100


@all_scripts
@pytest.mark.parametrize(
    "num_minibatches, multiple", [(1, 1), (3, 3), (4, 4), (5, 5), (6, 3), (8, 1), (16, 1), (32, 1), (48, 3)]
)
def test_many_minibatches_leave_the_steps_between_lengths_small(script, num_minibatches, multiple):
    """With 16 to 64 steps: multiples of the number of minibatches up to a quarter of 16, then of the least that divides; of 5
    with 128 environments there is none smaller."""
    args = script.Args(num_minibatches=num_minibatches, rollout_length_min=16, rollout_length_max=64)
    assert script.rollout_range(args) == (16, 64, multiple)


@all_scripts
def test_rounding_takes_the_nearest_length(script):
    """Rounding adds no drift: never further from the wanted length than half a step, except at the ends of the range."""
    for wanted in [16 + i / 7 for i in range(48 * 7 + 1)]:
        assert abs(script.round_rollout_length(wanted, 16, 64, 4) - wanted) <= 2
    assert script.round_rollout_length(16.0, 16, 64, 4) == 16 and script.round_rollout_length(64.0, 16, 64, 4) == 64
    assert script.round_rollout_length(17.0, 17, 63, 4) == 20 and script.round_rollout_length(63.0, 17, 63, 4) == 60


@all_scripts
def test_published_settings(script):
    """The defaults are the paper's: 128 environments, [16, 64] steps, 4 minibatches, so batches of 2,048 to 8,192."""
    args = script.Args()
    assert script.rollout_range(args) == (args.rollout_length_min, args.rollout_length_max, 4)
    assert (args.num_envs, args.num_steps, args.rollout_length_min, args.num_minibatches) == (128, 32, 16, 4)
    longest = 128 if script.__name__ in ("pqn_l_abs_atari", "pqn_xl_abs_atari") else 64
    assert (args.rollout_length_max, args.adapt_interval) == (longest, 50)
    assert getattr(args, "schedule", "log") == "log"
    if script.__name__.startswith("pqn"):
        assert (args.divergence_min, args.divergence_max) == (0.05, 0.95)
    assert (args.rollout_smoothing, args.gamma, args.total_timesteps) == (0.1, 0.99, 20_000_000)
    assert (args.learning_rate, args.anneal_lr) == (2.5e-4, hasattr(script, "Agent"))
    if hasattr(script, "Agent"):  # CleanRL's PPO for Atari
        assert (args.update_epochs, args.gae_lambda, args.clip_coef, args.max_grad_norm) == (4, 0.95, 0.1, 0.5)
        assert (args.ent_coef, args.vf_coef, args.norm_adv, args.clip_vloss) == (0.01, 0.5, True, True)
    else:
        assert (args.update_epochs, args.q_lambda, args.max_grad_norm) == (2, 0.65, 10)
        assert (args.start_e, args.end_e, args.exploration_fraction, args.eval_epsilon) == (1, 0.001, 0.1, 0)
