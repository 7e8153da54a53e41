"""The gradient noise scale: its two estimates against gradients of known noise and signal, and the length they ask for."""

import math

import pytest
import torch
from conftest import modules_with

scripts = pytest.mark.parametrize("script", modules_with("gradient_noise_scale"))
rules = pytest.mark.parametrize("script", modules_with("noise_scale_rollout_length"))


def synthetic_gradients(draws, num_minibatches, minibatch_size, expected, deviation, seed=0):
    """(draws, num_minibatches, dimensions): means of minibatch_size independent per-sample gradients each."""
    generator = torch.Generator().manual_seed(seed)
    shape = (draws, num_minibatches, len(expected))
    return expected + deviation * torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(minibatch_size)


@scripts
@pytest.mark.parametrize("num_minibatches, minibatch_size", [(2, 8), (4, 32), (32, 1)])
def test_noise_and_signal_are_unbiased(script, num_minibatches, minibatch_size):
    """Over many draws their means are the trace of one sample's covariance and the squared norm of the expected gradient,
    within four standard errors; the squared norm of the mean gradient, which is biased, is not."""
    expected, deviation = torch.linspace(-0.5, 1, 10).double(), torch.linspace(0.2, 3, 10).double()
    true_noise, true_signal = float(deviation.square().sum()), float(expected.square().sum())
    gradients = synthetic_gradients(4000, num_minibatches, minibatch_size, expected, deviation)
    estimates = torch.tensor([script.gradient_noise_scale(g, minibatch_size) for g in gradients], dtype=torch.float64)
    error = 4 * estimates.std(0) / math.sqrt(len(estimates))
    assert abs(float(estimates[:, 0].mean()) - true_noise) < error[0] < 0.1 * true_noise
    assert abs(float(estimates[:, 1].mean()) - true_signal) < error[1]
    naive = gradients.mean(1).square().sum(1).mean()
    assert abs(float(naive) - true_signal) > 2 * error[1]
    if num_minibatches == 2:
        assert (estimates[:, 1] < 0).any()  # unbiased means that it can be negative


@scripts
def test_known_noise_and_signal(script):
    """Two gradients by hand: (1, 2) and (3, 2) of 5 samples each; a list, a tuple and a tensor mean the same."""
    gradients = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])]
    for given in (gradients, tuple(gradients), torch.stack(gradients), (g for g in gradients)):
        noise, signal = script.gradient_noise_scale(given, 5)
        assert (noise, signal) == (10.0, 7.0) and type(noise) is type(signal) is float  # 5 * (1 + 1) / 1; 4 + 4 - 10 / 10
    assert script.gradient_noise_scale([gradients[0]] * 3, 5) == (0.0, 5.0)  # no noise: the signal alone
    gradient = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    noise, signal = script.gradient_noise_scale([gradient] * 7, 5)  # no noise, but for the last bits of float64
    assert abs(noise) < 1e-8 and signal == pytest.approx(float(gradient.double().square().sum()))
    noise, signal = script.gradient_noise_scale([gradients[0], -gradients[0]], 5)
    assert (noise, signal) == (50.0, -5.0)  # nothing but noise


@scripts
@pytest.mark.parametrize("gradients", [torch.ones(1, 3), [torch.ones(3)], []], ids=["tensor", "list", "none"])
def test_one_gradient_has_no_noise_scale(script, gradients):
    """Fewer than two minibatches cannot be compared: an error, not NaN or a division by zero."""
    with pytest.raises(ValueError):
        script.gradient_noise_scale(gradients, 8)


@rules
def test_length_is_the_noise_scale_over_the_environments(script):
    """B_simple samples, rounded down to whole ones, over the environments, within the range."""
    assert script.noise_scale_rollout_length(3200.0, 1.0, 128, 16, 64) == 25
    assert script.noise_scale_rollout_length(3200.9, 1.0, 128, 16, 64) == 25  # whole samples
    assert script.noise_scale_rollout_length(3201.0, 1.0, 128, 16, 64) == 3201 / 128  # but not whole steps
    assert script.noise_scale_rollout_length(1.0, 1 / 3200, 128, 16, 64) == 25
    assert script.noise_scale_rollout_length(2047.9, 1.0, 128, 16, 64) == 16
    assert script.noise_scale_rollout_length(8192.9, 1.0, 128, 16, 64) == 64
    lengths = [script.noise_scale_rollout_length(noise, 1.0, 128, 16, 64) for noise in (-1.0, 1.0, 3200.0, 1e9)]
    assert [type(length) for length in lengths] == [float] * 4


@rules
@pytest.mark.parametrize(
    "noise, signal, length",
    [
        (0.0, 1.0, 16),
        (1.0, 1e9, 16),
        (1e9, 1.0, 64),
        (1.0, 0.0, 64),
        (1.0, -1.0, 64),
        (0.0, 0.0, 64),
        (1.0, 1e-320, 64),
        (1e300, 1e-300, 64),
        (math.inf, 1.0, 64),
        (math.inf, -math.inf, 64),
        (1.0, math.inf, 16),
    ],
)
def test_extreme_noise_and_signal_stay_in_the_range(script, noise, signal, length):
    """No signal means as long as allowed, no noise as short as allowed, never a crash, a warning or a negative batch."""
    assert script.noise_scale_rollout_length(noise, signal, 128, 16, 64) == length
    assert 1 <= script.noise_scale_rollout_length(noise, signal, 3, 1, 1) <= 1


@rules
def test_length_grows_with_noise(script):
    """Never falls with the noise nor grows with the signal, and reaches both ends of the range."""
    lengths = [script.noise_scale_rollout_length(1.2**i, 1.0, 128, 16, 64) for i in range(60)]
    assert lengths == sorted(lengths) and (lengths[0], lengths[-1]) == (16, 64) and len(set(lengths)) > 5
    lengths = [script.noise_scale_rollout_length(1e4, 1.2**i, 128, 16, 64) for i in range(60)]
    assert lengths == sorted(lengths, reverse=True) and (lengths[0], lengths[-1]) == (64, 16)
