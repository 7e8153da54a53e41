"""Short real runs: what a run leaves on disk, logs and repeats."""

import itertools
import json
import shutil

import cv2
import pytest
import torch
from conftest import DISTINCT, MODULES, run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TINY = (
    "--env-id Pong-v5 --num-envs 8 --rollout-length-min 4 --rollout-length-max 16 --num-minibatches 2 --adapt-interval 2 "
    "--divergence-warmup 2 --divergence-window 3 --rollout-smoothing 0.3 --reference-batch-size 64 --eval-episodes 2 "
    "--max-episode-steps 200 --learning-rate 1e-4 --torch-threads 1 --env-threads 1"
).split()
SCALARS = set(
    "charts/episodic_return charts/episodic_length charts/SPS charts/learning_rate charts/epsilon losses/td_loss "
    "losses/q_values losses/grad_norm abs/divergence abs/divergence_mean abs/rollout_length abs/batch_size "
    "abs/minibatch_size eval/mean eval/std eval/median eval/min eval/max eval/mean_length eval/human_normalized_score".split()
)


class Run:
    """A finished run: its folder, what it printed and, by name, its scalars as (step, value)."""

    def __init__(self, script, *arguments, cwd):
        self.result = run_script(script, *TINY, *arguments, cwd=cwd)
        assert self.result.returncode == 0, self.result.stderr
        (self.dir,) = (cwd / "runs").iterdir()
        events = EventAccumulator(str(self.dir), size_guidance={"scalars": 0}).Reload()
        self.scalars = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
        self.args = json.loads((self.dir / "args.json").read_text())

    def values(self, name):
        return [value for _, value in self.scalars[name]]

    def weights(self):
        return torch.load(self.dir / "model.pt", weights_only=True)["weights"]

    def repeatable(self):
        """The scalars without those that measure time."""
        return {k: v for k, v in self.scalars.items() if k != "charts/SPS" and not k.startswith("time/")}


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.weights().values(), b.weights().values(), strict=True))


@pytest.fixture(scope="session", params=DISTINCT)
def script(request):
    return request.param


@pytest.fixture(scope="session")
def start(script, tmp_path_factory):
    """Starts a run, or returns the one that had the same arguments."""
    runs = {}

    def start(*arguments, again=False):
        if again or arguments not in runs:
            run = Run(script, *map(str, arguments), cwd=tmp_path_factory.mktemp("run"))
            if again:
                return run
            runs[arguments] = run
        return runs[arguments]

    return start


STEPS = ("--total-timesteps", 3000)
SHORT = ("--total-timesteps", 1000)


def test_files(script, start):
    """args.json, model.pt and eval.json are complete, and no half-written file is left."""
    run = start(*STEPS)
    names = sorted(p.name for p in run.dir.iterdir() if not p.name.startswith("events."))
    assert names == ["args.json", "eval.json", "model.pt"]
    assert run.dir.name.startswith(f"Pong-v5__{script.removesuffix('.py')}__1__")
    assert set(run.args) == set(MODULES[script].Args.__dataclass_fields__)
    assert run.args["total_timesteps"] == 3000 and run.args["precision"] in ("float32", "bfloat16")

    model = torch.load(run.dir / "model.pt", weights_only=True)
    assert model["global_step"] == run.scalars["abs/batch_size"][-1][0]
    assert model["args"]["env_id"] == "Pong-v5"
    assert all(w.isfinite().all() and w.dtype == torch.float32 for w in model["weights"].values())

    evaluation = json.loads((run.dir / "eval.json").read_text())
    assert evaluation["episodes"] == len(evaluation["returns"]) == len(evaluation["lengths"]) == 2
    assert {"env_id", "epsilon", "seed", "mean", "std", "median", "min", "max", "mean_length"} <= set(evaluation)
    assert max(evaluation["lengths"]) <= 200
    for name in ("mean", "std", "min", "max", "human_normalized_score"):
        ((step, value),) = run.scalars[f"eval/{name}"]
        assert step == model["global_step"] and value == pytest.approx(evaluation[name], rel=1e-6, abs=1e-6)


def test_first_line(script, start):
    """The first line of output says what runs where: game, device, parameters, batches and folder."""
    run = start(*STEPS)
    first = run.result.stdout.splitlines()[0]
    parameters = sum(w.numel() for w in run.weights().values())
    for word in ("Pong-v5", "cpu", f"{parameters:,}", "32 to 128", str(run.dir.relative_to(run.dir.parent.parent))):
        assert word in first
    assert not run.result.stderr


def test_scalars(start):
    """Every documented curve is there, its x axis is agent steps, and its values are possible."""
    run = start(*STEPS)
    assert set(run.scalars) >= SCALARS
    batches, lengths = run.scalars["abs/batch_size"], run.values("abs/rollout_length")
    assert [step for step, _ in batches] == list(itertools.accumulate(int(b) for _, b in batches))
    assert [b for _, b in batches] == [8 * length for length in lengths]
    assert run.values("abs/minibatch_size") == [4 * length for length in lengths]
    for name in "losses/td_loss losses/q_values losses/grad_norm charts/epsilon charts/learning_rate charts/SPS".split():
        assert [step for step, _ in run.scalars[name]] == [step for step, _ in batches]
    assert min(run.values("losses/td_loss")) >= 0 and min(run.values("charts/SPS")) > 0
    assert run.values("charts/learning_rate") == pytest.approx([1e-4] * len(batches))
    epsilon = run.values("charts/epsilon")
    for (step, _), e in zip(batches, epsilon, strict=True):
        assert e == pytest.approx(max(0.001, 1 - 0.999 * step / 300), abs=1e-6)
    games = run.scalars["charts/episodic_length"]
    assert set(v for _, v in games) == {200}  # the time limit; the first games end together after 200 steps each
    assert games[0][0] == 8 * 200 and all(step % 8 == 0 for step, _ in games)
    assert len(run.scalars["charts/episodic_return"]) == len(games) >= 8
    assert all(-21 <= v <= 21 and v == int(v) for v in run.values("charts/episodic_return"))


def test_steps_stay_within_the_total(start):
    """No rollout is begun that would exceed the total, and none is left out that would have fit."""
    run = start(*STEPS)
    last = run.scalars["abs/batch_size"][-1][0]
    assert last <= 3000 and last + 8 * 16 > 3000


def test_length_follows_the_divergence(script, start):
    """The lengths are those of the published rule: windowed mean, warm-up, float smoothing, rounding for the rollout only."""
    module, run = MODULES[script], start(*STEPS)
    lengths, means = run.values("abs/rollout_length"), run.values("abs/divergence_mean")
    measured = run.values("abs/divergence")
    for i, mean in enumerate(means):
        window = measured[max(0, i - 2) : i + 1]
        assert mean == pytest.approx(sum(window) / len(window), abs=1e-6)
    steps = [step for step, _ in run.scalars["abs/batch_size"]]
    assert [step for step, _ in run.scalars["abs/divergence"]] == steps[1::2]
    assert all(0 <= d <= 1 for d in measured) and max(measured) > 0

    expected, length = [], 4.0
    for iteration in range(1, len(lengths) + 1):
        expected.append(module.round_rollout_length(length, 4, 16, 2))
        if iteration % 2 == 0:
            target = length
            if iteration // 2 >= 2:
                target = module.target_rollout_length(means[iteration // 2 - 1], 4, 16, 0.05, 0.95)
            length = 0.7 * length + 0.3 * target
    assert lengths == expected
    assert lengths[:4] == [4] * 4 and len(set(lengths)) > 1


def test_time_as_signal(script, start):
    """The open-loop control grows with the steps done and does not look at the policy."""
    module, run = MODULES[script], start("--adapt-signal", "time", *STEPS)
    lengths, batches = run.values("abs/rollout_length"), run.scalars["abs/batch_size"]
    expected, length = [], 4.0
    for iteration, (step, _) in enumerate(batches, 1):
        expected.append(module.round_rollout_length(length, 4, 16, 2))
        if iteration % 2 == 0:
            length = 0.7 * length + 0.3 * (4 + 12 * step / 3000)
    assert lengths == expected == sorted(lengths) and lengths[-1] > 10
    assert run.scalars["abs/divergence"]


def test_fixed_batch(start):
    """--no-adapt-rollout keeps num-steps; the divergence is measured all the same, and measuring changes no run."""
    fixed = ("--no-adapt-rollout", "--num-steps", 8, *SHORT)
    run, other = start(*fixed), start(*fixed, "--reference-batch-size", 7, "--adapt-interval", 1)
    assert set(run.values("abs/rollout_length")) == {8}
    assert len(run.scalars["abs/divergence"]) == len(run.scalars["abs/batch_size"]) // 2
    assert len(other.scalars["abs/divergence"]) == len(other.scalars["abs/batch_size"])
    assert run.values("losses/td_loss") == other.values("losses/td_loss")
    assert same_weights(run, other)


def test_runs_repeat(start):
    """The same seed gives the same curves and weights bit for bit, another seed does not."""
    run, again, other = start(*STEPS), start(*STEPS, again=True), start(*SHORT, "--seed", 2)
    assert run.repeatable() == again.repeatable()
    assert same_weights(run, again)
    assert (run.dir / "eval.json").read_text() == (again.dir / "eval.json").read_text()
    assert run.values("losses/td_loss")[0] != other.values("losses/td_loss")[0]
    assert not same_weights(run, other)


def test_speed_options_change_nothing_but_speed(start):
    """Environments in two groups and small micro-batches see the same games and take the same steps, up to rounding."""
    # with random actions, since a rounding error may change a greedy one and with it all that follows
    options = ("--no-adapt-rollout", "--num-steps", 16, "--end-e", 1, "--precision", "float32", *SHORT)
    plain, fast = start(*options), start(*options, "--env-pools", 2, "--microbatch-size", 12)
    for name in ("losses/td_loss", "losses/q_values", "losses/grad_norm"):
        assert plain.values(name) == pytest.approx(fast.values(name), rel=1e-2, abs=1e-4)
    assert plain.scalars["abs/batch_size"] == fast.scalars["abs/batch_size"]


def test_eval_only(script, start, tmp_path):
    """--eval-only plays the games of the evaluation after training again, needs no --env-id, and writes eval.json beside."""
    run = start(*STEPS)
    shutil.copy(run.dir / "model.pt", tmp_path)
    limits = ("--eval-episodes", 2, "--max-episode-steps", 200)
    result = run_script(script, "--eval-only", "--model", tmp_path / "model.pt", *limits, cwd=tmp_path)
    assert result.returncode == 0 and not result.stderr
    evaluation, expected = (json.loads((folder / "eval.json").read_text()) for folder in (tmp_path, run.dir))
    assert evaluation == expected and evaluation["env_id"] == "Pong-v5"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["eval.json", "model.pt"]


def test_life_loss_annealing_epochs_and_video(start):
    """The remaining switches, in one run: annealed learning rate, epochs that grow, life-loss episodes and videos."""
    options = (
        "--env-id Breakout-v5 --episodic-life --anneal-lr --scale-epochs --num-steps 4 --capture-video --video-episodes 1"
    )
    run = start(*options.split(), "--sticky-action-probability", 0.25, "--adapt-signal", "time", *SHORT)
    batches, rates = run.scalars["abs/batch_size"], run.values("charts/learning_rate")
    for (step, batch), rate in zip(batches, rates, strict=True):
        assert rate == pytest.approx(1e-4 * (1 - (step - batch) / 1000), rel=1e-5)
    assert all(v.isfinite().all() for v in run.weights().values())
    (video,) = (run.dir / "videos").glob("*.mp4")
    assert cv2.VideoCapture(str(video)).read()[0]


def test_no_evaluation(start):
    """--eval-episodes 0 ends after training, without eval.json."""
    run = start("--eval-episodes", 0, "--total-timesteps", 100)
    assert not (run.dir / "eval.json").exists() and (run.dir / "model.pt").exists()
    assert not any(name.startswith("eval/") for name in run.scalars)


def test_a_rollout_of_nothing_but_resets(script, tmp_path):
    """One game and rollouts of one step: the reset after the time limit leaves no state to measure, and the run goes on."""
    flags = (
        "--env-id Pong-v5 --num-envs 1 --rollout-length-min 1 --rollout-length-max 1 --num-minibatches 1 --adapt-interval 1"
    )
    limits = "--max-episode-steps 10 --total-timesteps 30 --eval-episodes 0"
    result = run_script(script, *flags.split(), *limits.split(), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
