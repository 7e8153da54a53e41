"""The command line: bad input ends with exit code 2 and one helpful message before anything is written; help; small forms."""

import ast
import dataclasses
import re
import sys
import tomllib

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
SHARES = (
    "gamma q-lambda gae-lambda start-e end-e exploration-fraction sticky-action-probability eval-epsilon rollout-smoothing"
)
POSITIVE = "learning-rate max-grad-norm divergence-min kl-min clip-coef rollout-smoothing"
BAD_ARGUMENTS = [
    *((f"--{name} {low - 1}", f"--{name} {low - 1} must lie between {low}") for low in LOWEST for name in LOWEST[low].split()),
    *((f"--{name} {bad}", f"--{name} {bad} must lie") for name in SHARES.split() for bad in ("-0.1", "1.01", "nan")),
    *((f"--{name} {bad}", f"--{name} {bad} must lie") for name in POSITIVE.split() for bad in ("0.0", "-1.0", "nan", "inf")),
    *((f"--{name} {bad}", f"--{name} {bad} must lie") for name in ("ent-coef", "vf-coef") for bad in ("-0.1", "inf")),
    ("--env-id Breakot-v5", "did you mean Breakout-v5"),
    ("--env-id ALE/Pong-v5", "did you mean Pong-v5"),
    ("--env-id PongNoFrameskip-v4", "did you mean Pong-v5"),
    ("--env-id PongDeterministic-v4", "did you mean Pong-v5"),
    ("--env-id Pong-ramNoFrameskip-v4", "did you mean Pong-v5"),
    ("--env-id zzzzzzzz", "did you mean"),
    ("--env-id Ant-v5", "no Atari game"),
    ("--rollout-length-min 300", "--rollout-length-min is above --rollout-length-max"),
    ("--divergence-min 0.5 --divergence-max 0.5", "less than"),
    ("--kl-min 0.1 --kl-max 0.001", "less than"),
    ("--total-timesteps 0", "--total-timesteps must be 2048 or more"),
    ("--total-timesteps 4095 --no-adapt-rollout", "--total-timesteps must be 4096 or more"),
    ("--num-envs 1 --num-minibatches 100", "--num-minibatches"),
    ("--num-envs 3 --no-adapt-rollout --num-steps 5 --num-minibatches 16", "--num-minibatches"),
    ("--num-envs 2 --rollout-length-min 2 --num-minibatches 4 --norm-adv", "--norm-adv"),
    ("--num-minibatches 1 --noise-scale-groups minibatches", "--num-minibatches 2"),
    ("--num-envs 1 --noise-scale-groups environments", "2 environments"),
    ("--adapt-signal reward", "adapt-signal"),
    ("--adapt-signal replay", "needs --replay"),
    ("--replay x", "needs --replay"),
    ("--no-adapt-rollout --adapt-signal replay --replay x", "needs --replay"),
    ("--num-envs 1.5", "num-envs"),
    ("--learning-rate fast", "learning-rate"),
    ("--num-envs", "num-envs"),
    ("--adapt-rollout False", "--no-adapt-rollout"),
    ("--adapt-rollout=False", "--no-adapt-rollout"),
    ("--adapt_rollout false", "--no-adapt-rollout"),
    ("--anneal-lr True", "takes no value: write --anneal-lr"),
    ("--no-such-flag 1", "--no-such-flag"),
    ("--num-env 8", "--num-env"),
    ("stray", "stray"),
]


def has(script, arguments):
    """Whether the script has all these options."""
    fields = {field.name for field in dataclasses.fields(MODULES[script].Args)} | {"no_such_flag", "num_env"}
    return all(name.replace("-", "_") in fields for name in re.findall(r"--(?:no-(?!such))?([a-z-_]+)", arguments))


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
    """--help shows each option with its sentence, the comment at or above its line, and no heading of a group before it."""
    result, lines = run_here(script, "--help"), (ROOT / script).read_text().splitlines()
    assert result.code == 0 and not result.err
    text = plain(result.out).partition("show this help message and exit")[2]
    (args,) = (node for node in ast.parse("\n".join(lines)).body if isinstance(node, ast.ClassDef) and node.name == "Args")
    fields = [node for node in args.body if isinstance(node, ast.AnnAssign)]
    assert len(fields) == len(dataclasses.fields(MODULES[script].Args)) > 40
    for field in fields:
        assert field.lineno == field.end_lineno, f"{field.target.id} takes several lines"
        sentence, number = lines[field.lineno - 1].partition("  # ")[2], field.lineno - 2
        while "  # " not in lines[field.lineno - 1] and lines[number].startswith("    # "):
            sentence, number = f"{lines[number].removeprefix('    # ')} {sentence}".strip(), number - 1
        option = f"--{field.target.id.replace('_', '-')}"
        flags = rf"{option}(, --no-\S+)?( \S+)?( STR)?"
        assert len(sentence.split()) >= 3 and re.search(
            rf"{flags} {re.escape(sentence)} \((default|optional|required)", text
        ), option


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
    """It imports no file of ours, and its PEP 723 header pins what it imports as requirements.txt does."""
    source = (ROOT / script).read_text()
    block = re.search(r"^# /// script\n((?:# ?.*\n)*?)# ///$", source, re.MULTILINE)[1]
    header = tomllib.loads("".join(line.removeprefix("#").removeprefix(" ") for line in block.splitlines(keepends=True)))
    assert set(header["dependencies"]) <= set((ROOT / "requirements.txt").read_text().splitlines())
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    names = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"wandb"}
    names |= {"tensorboard"}  # which torch.utils.tensorboard imports
    assert names == {line.partition("==")[0].replace("-", "_") for line in header["dependencies"]}
