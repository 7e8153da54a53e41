"""The command line: bad input ends with exit code 2 and one helpful message before anything is written; help; small forms."""

import dataclasses
import re
import sys

import envpool
import pytest
from conftest import DISTINCT, MODULES, ROOT, SCRIPTS

PQN, PPO, GNS = DISTINCT
scripts = pytest.mark.parametrize("script", SCRIPTS)
distinct_scripts = pytest.mark.parametrize("script", DISTINCT)
LOWEST = {
    1: "num-envs num-minibatches update-epochs adapt-interval divergence-window video-episodes",
    2: "num-steps rollout-length-min max-episode-steps",
    0: "divergence-warmup reference-batch-size eval-episodes env-threads torch-threads checkpoint-interval seed",
}
UNIT = "gamma q-lambda gae-lambda start-e end-e exploration-fraction sticky-action-probability eval-epsilon rollout-smoothing"
POSITIVE = "learning-rate max-grad-norm divergence-min kl-min clip-coef rollout-smoothing"
BAD_ARGUMENTS = [
    *((f"--{name} {low - 1}", f"--{name} {low - 1} must lie between {low}") for low in LOWEST for name in LOWEST[low].split()),
    *((f"--{name} {bad}", f"--{name} {bad} must lie") for name in UNIT.split() for bad in ("-0.1", "1.01", "nan")),
    *((f"--{name} {bad}", f"--{name} {bad} must lie") for name in POSITIVE.split() for bad in ("0.0", "-1.0", "nan", "inf")),
    *((f"--{name} {bad}", f"--{name} {bad} must lie") for name in ("ent-coef", "vf-coef") for bad in ("-0.1", "inf")),
    ("--env-id Breakot-v5", "did you mean Breakout-v5"),
    ("--env-id ALE/Pong-v5", "did you mean Pong-v5"),
    ("--env-id PongNoFrameskip-v4", "did you mean Pong-v5"),
    ("--env-id PongDeterministic-v4", "did you mean Pong-v5"),
    ("--env-id Ant-v5", "no Atari game"),
    ("--rollout-length-min 300", "--rollout-length-min is above --rollout-length-max"),
    ("--divergence-min 0.5 --divergence-max 0.5", "less than"),
    ("--kl-min 0.1 --kl-max 0.001", "less than"),
    ("--total-timesteps 0", "--total-timesteps must be 2048 or more"),
    ("--total-timesteps 4095 --no-adapt-rollout", "--total-timesteps must be 4096 or more"),
    ("--num-envs 1 --num-minibatches 100", "--num-minibatches"),
    ("--num-envs 2 --rollout-length-min 2 --num-minibatches 4 --norm-adv", "--norm-adv"),
    ("--num-minibatches 1 --noise-scale-groups minibatches", "--num-minibatches 2"),
    ("--num-envs 1 --noise-scale-groups environments", "2 environments"),
    ("--adapt-signal reward", "adapt-signal"),
    ("--adapt-signal replay", "needs --replay"),
    ("--replay x", "needs --replay"),
    ("--no-adapt-rollout --adapt-signal replay --replay x", "needs --replay"),
    ("--adapt-rollout False", "--no-adapt-rollout"),
    ("--adapt-rollout=False", "--no-adapt-rollout"),
    ("--anneal-lr True", "takes no value: write --anneal-lr"),
]


def has(script, arguments):
    """Whether the script has all these options."""
    fields = {field.name for field in dataclasses.fields(MODULES[script].Args)}
    return all(name.replace("-", "_") in fields for name in re.findall(r"--(?:no-)?([a-z-_]+)", arguments))


CASES = [(script, *case) for case in BAD_ARGUMENTS for script in DISTINCT if has(script, case[0])]
assert {case[1:] for case in CASES} == set(BAD_ARGUMENTS), "an option is mistyped"


def plain(text):
    """Text without the lines of tyro's boxes, which break sentences; where the encoding has none, they are of hyphens."""
    return " ".join(re.sub(r"[╭╮╰╯─│]|-{5,}", " ", text).split())


def is_one_message(result, hint):
    """One line, or one box of tyro's, and not a traceback."""
    text, lines = plain(result.err), result.err.splitlines()
    assert result.code == 2 and hint in text and not result.out, (result.out, result.err)
    assert text.startswith("error: ") and len(lines) == 1 or text.count("For full helptext") == 1 and len(lines) < 20
    assert "Traceback" not in text


@pytest.mark.parametrize("script, arguments, hint", CASES, ids=[f"{script} {arguments}" for script, arguments, _ in CASES])
def test_bad_arguments(script, arguments, hint, run_here, tmp_path, monkeypatch):
    """One message on stderr that names the option and the way out, exit code 2, and nothing left on disk."""
    monkeypatch.setattr(envpool, "make", lambda *_, **options: sys.exit("accepted"))
    is_one_message(run_here(script, *arguments.split()), hint)
    assert list(tmp_path.iterdir()) == []


@distinct_scripts
def test_forms_that_are_accepted(script, run_here, tmp_path, monkeypatch):
    """Numbers of steps in powers of ten, options with = and _, switches, and the last of two that contradict each other."""

    def accepted(*arguments):
        with pytest.raises(ZeroDivisionError) as stop:
            run_here(script, *arguments)
        return next(frame.frame.f_globals["args"] for frame in stop.traceback if "ATARI_IDS" in frame.frame.f_globals)

    monkeypatch.setattr(envpool, "make", lambda *_, **options: 1 / 0)  # the command line was accepted
    monkeypatch.setenv("WORLD_SIZE", "2")  # left over from something else
    words = "--total-timesteps 1e6 --num_envs=17 --no-adapt-rollout --anneal-lr --learning-rate 1e-3 --seed 1 --seed=2"
    args = accepted(*words.split())
    assert (args.total_timesteps, args.num_envs, args.adapt_rollout, args.anneal_lr) == (1_000_000, 17, False, True)
    assert (args.learning_rate, args.seed, args.env_id) == (1e-3, 2, "Breakout-v5")
    assert accepted("--total-timesteps", "2.5e6", "--max-grad-norm", "1.5e0").total_timesteps == 2_500_000
    assert list(tmp_path.iterdir()) == []


@scripts
def test_help(script, run_here):
    """--help shows each option with its sentence, the comment at the end of its line."""
    result, source = run_here(script, "--help"), (ROOT / script).read_text()
    text, fields = plain(result.out), dataclasses.fields(MODULES[script].Args)
    assert result.code == 0 and not result.err and len(fields) > 40
    for field in fields:
        assert f"--{field.name.replace('_', '-')}" in text
        comment = re.search(rf"^    {field.name}: .*?(?:  # (.*))?$", source, re.M)[1]  # two of GNS have it above
        assert comment in text if comment else script == GNS, field.name


def test_progress_without_a_terminal(run_here, monkeypatch):
    """A plain line every 30 seconds, and no carriage return that would make one long line of a log file."""
    seconds = iter(range(0, 10**6, 8))
    monkeypatch.setattr("tqdm.std.time", lambda: next(seconds))  # which is asked once an iteration
    size = "--num-envs 4 --no-adapt-rollout --num-steps 4 --num-minibatches 2 --total-timesteps 256 --eval-episodes 0"
    result = run_here(PQN, *size.split(), "--env-id", "Pong-v5", "--device", "cpu", "--torch-threads", 1)
    assert result.code == 0 and "\r" not in result.out and not result.err
    bars = [line for line in result.out.splitlines() if "%|" in line]
    assert 3 <= len(bars) <= 8 and all("return=" in line and "length=4" in line for line in bars[1:]), result.out
    assert "Pong-v5 on cpu" in result.out.splitlines()[0] and result.out.endswith("is finished\n")


@scripts
def test_script_stands_alone(script):
    """Its PEP 723 header pins packages as requirements.txt does, and it imports no file of ours."""
    source = (ROOT / script).read_text()
    pins = re.findall(r'"([\w-]+==[\d.]+)"', source.split("# ///")[1])
    assert len(pins) == 9 and set(pins) <= set((ROOT / "requirements.txt").read_text().splitlines())
    assert not re.search(
        rf"^\s*(?:import|from) (?:{'|'.join(m.__name__ for m in MODULES.values())}|benchmark|tests)\b", source, re.M
    )
