"""Short real runs: what a run leaves on disk, logs and repeats."""

import hashlib
import itertools
import json
import math
import shutil

import cv2
import envpool
import pytest
import torch
from conftest import DISTINCT, MODULES, ROOT, SCRIPTS, run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TINY = (
    "--env-id Pong-v5 --num-envs 8 --rollout-length-min 4 --rollout-length-max 16 --num-minibatches 2 --adapt-interval 2 "
    "--rollout-smoothing 0.3 --reference-batch-size 24 --eval-episodes 2 --max-episode-steps 200 --learning-rate 1e-4 "
    "--no-anneal-lr --torch-threads 1 --env-threads 1"
).split()
MEASURING = dict.fromkeys(SCRIPTS, "--divergence-warmup 2 --divergence-window 3".split())
MEASURING["pqn_abs_atari.py"] = MEASURING["pqn_abs_atari.py"] + ["--schedule", "exp"]
MEASURING["ppo_abs_atari.py"] = (
    MEASURING["ppo_abs_atari.py"] + "--schedule linear --kl-min 1e-6 --kl-max 1e-2".split()
)  # of so short a run
MEASURING["gns_batch_atari.py"] = "--noise-scale-warmup 2 --noise-scale-window 3".split()
SCALARS = set(
    "charts/episodic_return charts/episodic_length charts/SPS charts/learning_rate losses/grad_norm "
    "abs/divergence abs/rollout_length abs/batch_size abs/minibatch_size "
    "eval/mean eval/std eval/median eval/min eval/max eval/mean_length eval/human_normalized_score".split()
)
LOSSES = dict.fromkeys(SCRIPTS, ["losses/td_loss", "losses/q_values"])
LOSSES["ppo_abs_atari.py"] = [f"losses/{n}" for n in "policy_loss value_loss entropy approx_kl clipfrac".split()]
NOISE_SCALE = ["gns/noise", "gns/signal", "gns/b_simple"]
SIGNAL = dict.fromkeys(SCRIPTS, ["abs/divergence_mean"])
SIGNAL |= {"ppo_abs_atari.py": ["abs/kl", "abs/kl_mean"], "gns_batch_atari.py": ["abs/divergence_mean", *NOISE_SCALE]}


class Run:
    """A finished run: its folder, its output, by name its scalars as (step, value), and the time of each iteration's end."""

    def __init__(self, script, *arguments, cwd):
        self.result = run_script(script, *TINY, *MEASURING[script], *arguments, cwd=cwd)
        assert self.result.returncode == 0, self.result.stderr
        (self.dir,) = (cwd / "runs").iterdir()
        events = EventAccumulator(str(self.dir), size_guidance={"scalars": 0}).Reload()
        self.scalars = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
        self.when = [e.wall_time for e in events.Scalars("charts/SPS")]
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


# gns_batch_atari.py has from pqn_abs_atari.py, word for word, what these tests are about (test_twins.py).
but_for_gns = pytest.mark.parametrize("script", [s for s in DISTINCT if s != "gns_batch_atari.py"], indirect=True)


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


def test_versions_name_the_build_of_pytorch(tmp_path, monkeypatch):
    """As PyTorch says it, since the package's metadata may leave out for which CUDA it was built."""
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    MODULES["pqn_abs_atari.py"].keep_source(tmp_path, torch.device("cpu"))
    assert json.loads((tmp_path / "versions.json").read_text())[0]["torch"] == "2.13.0+cu130"


def test_files(script, start):
    """args.json, model.pt, eval.json and the source are complete, and no half-written file is left."""
    run = start(*STEPS)
    names = sorted(p.name for p in run.dir.iterdir() if not p.name.startswith("events."))
    last = run.scalars["abs/batch_size"][-1][0]
    assert names == sorted(
        [".lock", "args.json", f"checkpoint_{last:012d}.pt", "eval.json", "model.pt", script, "versions.json"]
    )
    (versions,) = json.loads((run.dir / "versions.json").read_text())
    source = (run.dir / script).read_bytes()
    assert source == (ROOT / script).read_bytes() and hashlib.sha256(source).hexdigest().startswith(versions["source"])
    assert versions["script"] == script and versions["torch"] == torch.__version__ and versions["processor"]
    assert run.dir.name.startswith(f"Pong-v5__{script.removesuffix('.py')}__1__")
    assert set(run.args) == set(MODULES[script].Args.__dataclass_fields__)
    assert run.args["total_timesteps"] == 3000 and run.args["precision"] in ("float32", "bfloat16")

    model = torch.load(run.dir / "model.pt", weights_only=True)
    assert model["global_step"] == run.scalars["abs/batch_size"][-1][0]
    assert model["args"]["env_id"] == "Pong-v5"
    assert all(w.isfinite().all() and w.dtype == torch.float32 for w in model["weights"].values())

    evaluation = json.loads((run.dir / "eval.json").read_text())
    assert evaluation["episodes"] == len(evaluation["returns"]) == len(evaluation["lengths"]) == 2
    assert {"env_id", "seed", "mean", "std", "median", "min", "max", "mean_length"} <= set(evaluation)
    if script == "ppo_abs_atari.py":
        assert evaluation["greedy"] is False  # evaluated as trained: sampled
    else:
        assert evaluation["epsilon"] == 0
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


def test_scalars(script, start):
    """Every documented curve is there and no other, its x axis is agent steps, and its values are possible."""
    run = start(*STEPS)
    times = {name for name in run.scalars if name.startswith("time/")}
    epsilon = [] if script == "ppo_abs_atari.py" else ["charts/epsilon"]
    evaluation = {"eval/epsilon"} if epsilon else set()
    assert set(run.scalars) - times == SCALARS | evaluation | {*LOSSES[script], *SIGNAL[script], *epsilon}
    batches, lengths = run.scalars["abs/batch_size"], run.values("abs/rollout_length")
    assert [step for step, _ in batches] == list(itertools.accumulate(int(b) for _, b in batches))
    assert [b for _, b in batches] == [8 * length for length in lengths]
    assert run.values("abs/minibatch_size") == [4 * length for length in lengths]
    for name in [*LOSSES[script], *epsilon, "losses/grad_norm", "charts/learning_rate", "charts/SPS"]:
        assert [step for step, _ in run.scalars[name]] == [step for step, _ in batches]
    assert min(run.values("losses/grad_norm")) > 0 and min(run.values("charts/SPS")) > 0
    assert run.values("charts/learning_rate") == pytest.approx([1e-4] * len(batches))
    if epsilon:
        assert min(run.values("losses/td_loss")) >= 0
        for (step, _), e in zip(batches, run.values("charts/epsilon"), strict=True):
            assert e == pytest.approx(max(0.001, 1 - 0.999 * step / 300), abs=1e-6)
    else:
        assert min(run.values("losses/value_loss")) >= 0 and min(run.values("losses/approx_kl")) > -1e-6
        assert all(0 <= c <= 1 for c in run.values("losses/clipfrac"))
        assert all(0 < e <= math.log(6) + 1e-5 for e in run.values("losses/entropy"))
    games = run.scalars["charts/episodic_length"]
    assert set(v for _, v in games) == {200}  # the time limit; the first games end together after 200 steps each
    assert games[0][0] == 8 * 200 and all(step % 8 == 0 for step, _ in games)
    assert len(run.scalars["charts/episodic_return"]) == len(games) >= 8
    assert all(-21 <= v <= 21 and v == int(v) for v in run.values("charts/episodic_return"))


def test_steps_per_second_leave_no_time_out(script, start):
    """The steps, each at the speed of its iteration, take as long as the clock says, and so do their parts."""
    run = start(*STEPS)
    seconds = [batch / sps for batch, sps in zip(run.values("abs/batch_size"), run.values("charts/SPS"), strict=True)]
    passed = run.when[-1] - run.when[0]
    assert sum(seconds[1:]) == pytest.approx(passed, rel=0.1)
    parts = zip(*(run.values(f"time/{part}") for part in ("emulation", "inference", "learning")), strict=True)
    assert [sum(times) for times in parts] == pytest.approx(seconds, rel=1e-4)
    assert all(min(run.values(f"time/{part}")) > 0 for part in ("emulation", "inference", "learning"))


def test_steps_stay_within_the_total(start):
    """No rollout is begun that would exceed the total, and none is left out that would have fit."""
    run = start(*STEPS)
    last = run.scalars["abs/batch_size"][-1][0]
    assert last <= 3000 and last + 8 * 16 > 3000


def followed_lengths(module, run, targets, length_min, length_max, multiple, warmup=2):
    """The lengths of the published rule in a run of TINY, given the targets at its measurements (every 2nd iteration)."""
    expected, length = [], float(length_min)
    for iteration in range(1, len(run.values("abs/rollout_length")) + 1):
        expected.append(module.round_rollout_length(length, length_min, length_max, multiple))
        if iteration % 2 == 0:
            target = targets[iteration // 2 - 1] if iteration // 2 >= warmup else length
            length = 0.7 * length + 0.3 * target
    return expected


def windowed_means(run, name):
    """Mean of the last three measurements at each one, every second iteration."""
    measured = run.values(name)
    assert [step for step, _ in run.scalars[name]] == [step for step, _ in run.scalars["abs/batch_size"]][1::2]
    windows = [measured[max(0, i - 2) : i + 1] for i in range(len(measured))]
    return [sum(window) / len(window) for window in windows]


@but_for_gns
def test_length_follows_the_divergence(script, start):
    """The lengths are those of the published rule: windowed mean, warm-up, float smoothing, rounding for the rollout only."""
    module, run, signal, bounds = MODULES[script], start(*STEPS), "abs/divergence", (0.05, 0.95)
    if script == "ppo_abs_atari.py":
        signal, bounds = "abs/kl", (1e-6, 1e-2)
    lengths, means = run.values("abs/rollout_length"), run.values(f"{signal}_mean")
    assert means == pytest.approx(windowed_means(run, signal), rel=1e-5, abs=1e-9)
    assert all(0 <= d <= 1 for d in run.values("abs/divergence")) and max(run.values("abs/divergence")) > 0
    targets = [module.target_rollout_length(mean, 4, 16, *bounds, run.args["schedule"]) for mean in means]
    assert any(4 < target < 16 for target in targets)  # not the bounds alone
    assert lengths == followed_lengths(module, run, targets, 4, 16, 1)
    assert lengths[:4] == [4] * 4 and len(set(lengths)) > 1


@pytest.mark.parametrize("script", ["gns_batch_atari.py"], indirect=True)
def test_length_follows_the_noise_scale(script, start):
    """The batch is the ratio of the windowed means of noise and signal, within the range, or the largest where the signal is
    not positive; warm-up, smoothing and rounding are those of ABS."""
    flags = "--rollout-length-min 1 --rollout-length-max 8 --noise-scale-warmup 6"
    module, run = MODULES[script], start(*flags.split(), *SHORT)
    noises, signals = (windowed_means(run, f"gns/{name}") for name in ("noise", "signal"))
    lengths = run.values("abs/rollout_length")
    b_simple = [n / s if s > 0 else math.inf for n, s in zip(noises, signals, strict=True)]
    assert run.values("gns/b_simple") == pytest.approx(b_simple, rel=1e-4) and min(noises) > 0
    targets = [8 if b == math.inf else min(max(math.floor(b) / 8, 1), 8) for b in b_simple]
    assert any(1 < target < 8 for target in targets[5:])  # not the bounds alone
    assert lengths == followed_lengths(module, run, targets, 1, 8, 1, warmup=6)
    early = followed_lengths(module, run, targets, 1, 8, 1, warmup=1)
    assert lengths[:12] == [1] * 12 != early[:12] and len(set(lengths)) > 2  # the warm-up shows
    assert all(0 <= d <= 1 for d in run.values("abs/divergence")) and max(run.values("abs/divergence")) > 0


def test_time_as_signal(script, start):
    """The open-loop control grows with the steps done and does not look at the policy; here in multiples of 2."""
    module, run = MODULES[script], start("--adapt-signal", "time", "--rollout-length-min", 8, *STEPS)
    lengths, batches = run.values("abs/rollout_length"), run.scalars["abs/batch_size"]
    expected, length = [], 8.0
    for iteration, (step, _) in enumerate(batches, 1):
        expected.append(module.round_rollout_length(length, 8, 16, 2))
        if iteration % 2 == 0:
            length = 0.7 * length + 0.3 * (8 + 8 * step / 3000)
    assert lengths == expected == sorted(lengths) and lengths[-1] > 10
    assert run.scalars["abs/divergence"]


def test_fixed_batch(script, start):
    """--no-adapt-rollout keeps num-steps; the divergence is measured all the same, and measuring changes no run."""
    fixed = ("--no-adapt-rollout", "--num-steps", 8, *SHORT)
    run, other = start(*fixed), start(*fixed, "--reference-batch-size", 7, "--adapt-interval", 1)
    assert set(run.values("abs/rollout_length")) == {8}
    assert len(run.scalars["abs/divergence"]) == len(run.scalars["abs/batch_size"]) // 2
    assert len(other.scalars["abs/divergence"]) == len(other.scalars["abs/batch_size"])
    assert all(abs(7 * d - round(7 * d)) < 1e-4 for d in other.values("abs/divergence"))
    assert all(run.values(name) == other.values(name) for name in LOSSES[script])
    assert same_weights(run, other)


@but_for_gns
def test_logging_the_noise_scale_changes_no_run(script, start):
    """--log-noise-scale adds its curves and changes no other curve, length or weight."""
    run, logged = start(*STEPS), start("--log-noise-scale", *STEPS)
    # measurements are made on a part of the rollout: another draw of that part would show
    assert min(run.values("abs/batch_size")) > run.args["reference_batch_size"]
    assert {k: v for k, v in logged.repeatable().items() if k not in NOISE_SCALE} == run.repeatable()
    assert same_weights(run, logged)
    for name in NOISE_SCALE:
        assert [step for step, _ in logged.scalars[name]] == [step for step, _ in run.scalars["abs/divergence"]]
    assert min(logged.values("gns/noise")) > 0


@but_for_gns
def test_runs_repeat(script, start):
    """The same seed gives the same curves and weights bit for bit, another seed does not."""
    run, again, other = start(*STEPS), start(*STEPS, again=True), start(*SHORT, "--seed", 2)
    assert run.repeatable() == again.repeatable()
    assert same_weights(run, again)
    assert (run.dir / "eval.json").read_text() == (again.dir / "eval.json").read_text()
    assert run.values(LOSSES[script][0])[0] != other.values(LOSSES[script][0])[0]
    assert not same_weights(run, other)


@but_for_gns
def test_speed_options_change_nothing_but_speed(script, start):
    """Environments in two groups and small micro-batches see the same games and take the same steps, up to rounding."""
    # with random actions, since a rounding error may change a greedy one and with it all that follows
    random = () if script == "ppo_abs_atari.py" else ("--end-e", 1)
    options = ("--no-adapt-rollout", "--num-steps", 16, *random, "--precision", "float32", *SHORT)
    plain, fast = start(*options), start(*options, "--env-pools", 2, "--microbatch-size", 12)
    assert ("1 emulator threads" in plain.result.stdout) and ("2 emulator threads" in fast.result.stdout)
    for name in (*LOSSES[script][:3], "losses/grad_norm"):
        assert plain.values(name) == pytest.approx(fast.values(name), rel=1e-2, abs=1e-4)
    assert plain.scalars["abs/batch_size"] == fast.scalars["abs/batch_size"]


@pytest.mark.parametrize("script", DISTINCT)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_eval_only_computes_as_the_training_did(script, precision, run_here, tmp_path, monkeypatch):
    """On hardware that would choose otherwise, too; a flag still decides."""
    module = MODULES[script]
    args = module.Args(env_id="Pong-v5", precision=precision, sticky_action_probability=0.25)
    network = next(vars(module)[name] for name in ("QNetwork", "Agent") if hasattr(module, name))(6)
    module.save_model(network, args, 0, tmp_path / "model.pt")
    used, games = [], []
    make, autocast = envpool.make, torch.autocast
    monkeypatch.setattr(envpool, "make", lambda *a, **k: games.append(k) or make(*a, **k))
    monkeypatch.setattr(torch, "autocast", lambda *arguments: used.append(arguments[1]) or autocast(*arguments))
    command = "--eval-only", "--model", tmp_path / "model.pt", "--eval-episodes", 1, "--max-episode-steps", 20
    assert run_here(script, *command).returncode == 0
    assert used == [torch.bfloat16] * (precision == "bfloat16")
    assert run_here(script, *command, "--precision", "float32", "--sticky-action-probability", 0).returncode == 0
    assert used == [torch.bfloat16] * (precision == "bfloat16")
    assert [game["repeat_action_probability"] for game in games] == [0.25, 0]
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network: compiled.append(network))
    result = run_here(script, *command, "--compile")
    assert result.returncode == 0 and (len(compiled) == 1 or "running eagerly" in result.stdout)


@but_for_gns
def test_eval_only(script, start, tmp_path):
    """--eval-only plays the games of the evaluation after training again (game, seed, time limit and sticky actions are those
    of the run unless a flag says otherwise), and writes eval.json beside."""
    run = start(*STEPS, "--seed", 5, "--sticky-action-probability", 0.3)
    shutil.copy(run.dir / "model.pt", tmp_path)
    command = script, "--eval-only", "--model", tmp_path / "model.pt", "--eval-episodes", 2
    result = run_script(*command, cwd=tmp_path)
    assert result.returncode == 0 and not result.stderr
    evaluation, expected = (json.loads((folder / "eval.json").read_text()) for folder in (tmp_path, run.dir))
    assert evaluation == expected and evaluation["env_id"] == "Pong-v5" and evaluation["seed"] == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["eval.json", "model.pt"]
    greedy = ["--eval-greedy"] if script == "ppo_abs_atari.py" else []
    assert run_script(*command, *greedy, "--seed=6", "--max_episode_steps", 90, cwd=tmp_path).returncode == 0
    evaluation = json.loads((tmp_path / "eval.json").read_text())
    assert evaluation["seed"] == 6 and evaluation["lengths"] == [90, 90]
    if script == "ppo_abs_atari.py":
        result = run_script(*command, *greedy, cwd=tmp_path)
        assert result.returncode == 0 and "greedily" in result.stdout
        assert json.loads((tmp_path / "eval.json").read_text())["greedy"] is True


@but_for_gns
def test_life_loss_annealing_epochs_and_video(script, start):
    """The remaining switches, in one run: annealed learning rate, epochs that grow, life-loss episodes and videos."""
    options = (
        "--env-id Breakout-v5 --episodic-life --anneal-lr --scale-epochs --num-steps 4 --capture-video --video-episodes 1"
    )
    run = start(*options.split(), "--sticky-action-probability", 0.25, "--adapt-signal", "time", *SHORT)
    batches, rates = run.scalars["abs/batch_size"], run.values("charts/learning_rate")
    for (step, batch), rate in zip(batches, rates, strict=True):
        assert rate == pytest.approx(1e-4 * (1 - (step - batch) / 1000), rel=1e-5)
    optimizer = torch.load(run.dir / f"checkpoint_{batches[-1][0]:012d}.pt", weights_only=True)["optimizer"]
    base = MODULES[script].Args.update_epochs
    epochs = [max(base, round(base * batch / 8 / 4)) for _, batch in batches]
    assert {int(s["step"]) for s in optimizer["state"].values()} == {2 * sum(epochs)} and max(epochs) > base
    (group,) = optimizer["param_groups"]
    assert group["lr"] == pytest.approx(rates[-1], rel=1e-5) and rates[-1] < 2e-5
    assert (group["eps"], "amsgrad" in group) == ((1e-5, True) if script == "ppo_abs_atari.py" else (1e-8, False))
    assert all(v.isfinite().all() for v in run.weights().values())
    (video,) = (run.dir / "videos").glob("*.mp4")
    assert cv2.VideoCapture(str(video)).read()[0]


@but_for_gns
def test_no_evaluation(start):
    """--eval-episodes 0 ends after training, without eval.json."""
    run = start("--eval-episodes", 0, "--total-timesteps", 100)
    assert not (run.dir / "eval.json").exists() and (run.dir / "model.pt").exists()
    assert not any(name.startswith("eval/") for name in run.scalars)


def test_a_rollout_of_nothing_but_resets(script, tmp_path):
    """Rollouts of one step: the reset after the time limit leaves no state to measure, and the run goes on."""
    n = 2 if script == "gns_batch_atari.py" else 1  # games, and minibatches: the noise scale needs two
    flags = f"--num-envs {n} --rollout-length-min 1 --rollout-length-max 1 --num-minibatches {n} --adapt-interval 1"
    limits = f"--max-episode-steps 10 --total-timesteps {30 * n} --eval-episodes 0 --env-id Pong-v5"
    plain = ["--no-norm-adv"] if script == "ppo_abs_atari.py" else []
    result = run_script(script, *flags.split(), *limits.split(), *plain, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    events = EventAccumulator(str(*tmp_path.glob("runs/*")), size_guidance={"scalars": 0}).Reload()
    # 30 steps, two of which are resets
    assert [len(events.Scalars(name)) for name in ("abs/rollout_length", "abs/divergence")] == [30, 28]


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name not in DISTINCT])
def test_large_networks_run(script, tmp_path):
    """L and XL train, grow their rollouts, save, evaluate and are evaluated again: a run leaves all its files."""
    grow = ("--adapt-signal", "time", "--adapt-interval", 1, "--rollout-length-min", 2, "--rollout-length-max", 8)
    options = ("--total-timesteps", 256, "--max-episode-steps", 20, "--reference-batch-size", 16, *grow)
    run = Run(script, *options, cwd=tmp_path)
    names = [p.name for p in run.dir.iterdir() if p.suffix in (".json", ".pt") and not p.name.startswith("checkpoint_")]
    assert sorted(names) == ["args.json", "eval.json", "model.pt", "versions.json"]
    lengths = run.values("abs/rollout_length")
    assert lengths[0] == 2 < lengths[-1] and set(run.scalars) >= SCALARS | set(LOSSES[script]) | set(SIGNAL[script])
    model = torch.load(run.dir / "model.pt", weights_only=True)
    assert model["global_step"] == 8 * sum(lengths) and all(w.isfinite().all() for w in model["weights"].values())
    torch.manual_seed(1)  # as the script does before it builds its network
    first = MODULES[script].QNetwork(6).state_dict()
    assert all(not torch.equal(w, first[name]) for name, w in run.weights().items())  # every layer has learned
    evaluation = (run.dir / "eval.json").read_text()
    limits = ("--eval-episodes", 2, "--max-episode-steps", 20)
    result = run_script(script, "--eval-only", "--model", run.dir / "model.pt", *limits, cwd=tmp_path)
    assert result.returncode == 0 and (run.dir / "eval.json").read_text() == evaluation
