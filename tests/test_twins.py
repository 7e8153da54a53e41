"""The scripts are twins: what two of them share is word for word the same, in the same order, but for their own names."""

import ast
import difflib

import pytest
from conftest import ROOT, SCRIPTS

BASE = "pqn_abs_atari.py"
DIFFERENT = {  # functions, classes and arguments that may differ from BASE's or be missing, and must
    "pqn_l_abs_atari.py": "rollout_length_max QNetwork",
    "pqn_xl_abs_atari.py": "rollout_length_max QNetwork",
    "gns_batch_atari.py": "adapt_signal adapt_interval __post_init__ main",
    "ppo_abs_atari.py": "anneal_lr q_lambda update_epochs max_grad_norm start_e end_e exploration_fraction adapt_signal "
    "adapt_interval divergence_min divergence_max reference_batch_size eval_epsilon __post_init__ LayerNormCHW QNetwork "
    "q_lambda_returns td_loss evaluate main",
}
CHANGED_LINES = [(BASE, SCRIPTS[1], 70), (*SCRIPTS[1:3], 14), (BASE, SCRIPTS[4], 110), (BASE, SCRIPTS[3], 240)]  # at most


def pieces(script):
    """{name: lines} of a script's arguments, functions, classes and main block, in order."""
    nodes = ast.parse(text := (ROOT / script).read_text().replace(script, BASE)).body
    arguments = next(node for node in nodes if getattr(node, "name", "") == "Args").body
    named = {node.target.id: node for node in arguments if isinstance(node, ast.AnnAssign)} | {"main": nodes.pop()}
    named |= {node.name: node for node in [*arguments, *nodes] if hasattr(node, "name") and node.name != "Args"}
    return {name: text.splitlines()[node.lineno - 1 : node.end_lineno] for name, node in named.items()}


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_what_is_shared_is_the_same(script):
    base, twin = pieces(BASE), pieces(script)
    assert {name for name in base if twin.get(name) != base[name]} == set(DIFFERENT[script].split())
    assert [name for name in base if name in twin] == [name for name in twin if name in base]


@pytest.mark.parametrize("a, b, most", CHANGED_LINES)
def test_diffs_are_short(a, b, most):
    assert sum(line[0] in "+-" for line in difflib.ndiff(*((ROOT / s).read_text().splitlines() for s in (a, b)))) <= most
