"""The scripts are twins: what two of them share is word for word the same, and what differs is listed here.

A script is cut into functions, classes, arguments and passages of the main loop. Each piece of pqn_abs_atari.py stands in
every other script, equal but for the script's own name; what stands in DIFFERENT may differ or be missing, and must really do
so, or it has to leave the list.
"""

import ast
import difflib
import re
import subprocess

import pytest
from conftest import ROOT, SCRIPTS

BASE = "pqn_abs_atari.py"
TWINS = [script for script in SCRIPTS if script != BASE]
OF_THE_LOOP = "main: "

# What may differ from pqn_abs_atari.py or be missing: the name of a function, class, assignment or argument, or how a passage
# of the main loop begins (it goes from one comment to the next).
NETWORK = {"docstring", "Args.rollout_length_max", "QNetwork"}
DIFFERENT = {
    "pqn_l_abs_atari.py": NETWORK,
    "pqn_xl_abs_atari.py": NETWORK,
    "gns_batch_atari.py": set(
        "docstring target_rollout_length check_args Args.adapt_rollout Args.adapt_signal Args.adapt_interval "
        "Args.divergence_min Args.divergence_max Args.schedule Args.divergence_window Args.divergence_warmup "
        "Args.log_noise_scale".split()
    )
    | {"Args # Adaptive Batch Scaling", "header: Adaptive Batch Scaling and targets: pure functions"}
    | {"main: Adaptive Batch Scaling", "main: The gradient noise scale", "main: Adaptive Batch Scaling: how many"},
    "ppo_abs_atari.py": set(
        "docstring LayerNormCHW QNetwork q_lambda_returns greedy_actions act LOSSES compute_gradient "
        "linear_schedule evaluate load_model record_video evaluate_and_record check_args Args.anneal_lr Args.q_lambda "
        "Args.update_epochs Args.max_grad_norm Args.start_e Args.end_e Args.exploration_fraction Args.adapt_rollout "
        "Args.adapt_signal Args.adapt_interval Args.divergence_min Args.divergence_max Args.schedule "
        "Args.reference_batch_size Args.log_noise_scale Args.eval_epsilon".split()
    )
    | {"Args # PQN"}
    | {"main: Network", "main: Storage", "main: Rollout", "main: Targets", "main: Batch:", "main: Every K-th iteration"}
    | {"main: Adaptive Batch Scaling: how many"},
}
MOST_CHANGED_LINES = [
    (BASE, "pqn_l_abs_atari.py", 80),
    ("pqn_l_abs_atari.py", "pqn_xl_abs_atari.py", 16),
    (BASE, "gns_batch_atari.py", 150),
    (BASE, "ppo_abs_atari.py", 300),
]


def source(script):
    """The script with its own name put out of sight."""
    return (ROOT / script).read_text().replace(script, "SCRIPT.py")


def passages(script):
    """Name and text of every piece of a script: together they are all of it, in order."""
    text = source(script)
    lines = text.splitlines(keepends=True)
    cuts = [(1, "head")]
    for node in ast.parse(text).body:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            cuts.append((first, node.name))
            if node.name == "Args":
                cuts += [(field.lineno, f"Args.{field.target.id}") for field in node.body if isinstance(field, ast.AnnAssign)]
                for number in range(node.lineno, node.end_lineno + 1):
                    if lines[number - 1].startswith("    # "):
                        cuts.append((number, f"Args {lines[number - 1].strip()}"))
        elif isinstance(node, ast.Assign):
            cuts.append((first, ast.unparse(node.targets[0])))
        elif isinstance(node, ast.Expr) and first < 40:
            cuts += [(first, "docstring"), (node.end_lineno + 1, "imports")]
        elif isinstance(node, ast.If):
            cuts.append((first, OF_THE_LOOP + "start"))
            comments = [
                (number, line.strip()[2:])
                for number, line in enumerate(lines[first:], first + 1)
                if line.startswith(("    # ", "        # ")) and not line.startswith("            ")
            ]
            cuts += [(number, OF_THE_LOOP + comment) for number, comment in comments]
    for number, line in enumerate(lines, 1):
        if line.startswith("# ------") and lines[number].startswith("# ") and lines[number + 1].startswith("# ------"):
            cuts.append((number, "header: " + lines[number].removeprefix("# ").strip()))
    cuts.sort()
    ends = [number for number, _ in cuts[1:]] + [len(lines) + 1]
    return [(name, "".join(lines[begin - 1 : end - 1])) for (begin, name), end in zip(cuts, ends, strict=True)]


def allowed_by(allowed, name):
    return name == allowed or (allowed.startswith(OF_THE_LOOP) and name.startswith(allowed))


def may_differ(name, script):
    return any(allowed_by(allowed, name) for allowed in DIFFERENT[script])


def changed_lines(a, b):
    """How many lines `diff` marks with < or >."""
    a, b = ((ROOT / script).read_text().splitlines() for script in (a, b))
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    return sum(i2 - i1 + j2 - j1 for tag, i1, i2, j1, j2 in matcher.get_opcodes() if tag != "equal")


@pytest.mark.parametrize("script", [BASE, *TWINS])
def test_the_pieces_are_the_whole(script):
    """The comparison leaves no line out, and no two pieces share a name."""
    pieces = passages(script)
    assert "".join(text for _, text in pieces) == source(script)
    assert len(pieces) > 100
    assert len({name for name, _ in pieces}) == len(pieces)


@pytest.mark.parametrize("script", TWINS)
def test_shared_passages_are_the_same(script):
    """Every piece of the one that the other has too is equal, unless it is listed; a piece of its own needs no listing in
    the twin, but one of pqn_abs_atari.py that the twin lacks does."""
    base, twin = ({name: text.rstrip() for name, text in passages(s)} for s in (BASE, script))
    wrong = []
    for name, text in base.items():
        if twin.get(name) != text and not may_differ(name, script):
            wrong.append(f"{name}:\n" + "".join(difflib.unified_diff(text.splitlines(1), twin.get(name, "").splitlines(1))))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("script", TWINS)
def test_listed_differences_exist(script):
    """What is listed as different is different: the list may not rot."""
    base, twin = ({name: text.rstrip() for name, text in passages(s)} for s in (BASE, script))
    differing = [name for name, text in base.items() if twin.get(name) != text]
    for allowed in DIFFERENT[script]:
        assert any(allowed_by(allowed, name) for name in differing), f"{allowed} is the same in {script}: take it off the list"


@pytest.mark.parametrize("script", TWINS)
def test_shared_passages_stand_in_the_same_order(script):
    """Reading one script is reading the other: sections, functions and passages come in one order."""
    base, twin = ([name for name, _ in passages(s)] for s in (BASE, script))
    shared = [name for name in base if name in twin]
    assert shared == [name for name in twin if name in base]
    assert len(shared) > 85


@pytest.mark.parametrize("a, b, most", MOST_CHANGED_LINES)
def test_diffs_are_short(a, b, most):
    """`diff` between two scripts shows what they differ in, and nothing else."""
    assert 0 < changed_lines(a, b) < most


def test_the_readme_counts_the_changed_lines():
    """The numbers in the README's table are those of `diff`."""
    rows = re.findall(r"^\| `(\S+\.py) (\S+\.py)` \| (\d+):", (ROOT / "README.md").read_text(), re.M)
    assert len(rows) == 4
    for a, b, stated in rows:
        lines = subprocess.run(["diff", ROOT / a, ROOT / b], capture_output=True, text=True).stdout.splitlines()
        assert sum(line[0] in "<>" for line in lines) == int(stated), f"{a} {b}"
