"""The README cannot go stale: its code stands in the scripts, its flags and files exist."""

import ast
import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = README + "".join((ROOT / "docs" / f"{name}.md").read_text() for name in ("own_script", "evidence", "many_runs"))
RESULTS = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("benchmark/results/*/README.md"))]


def quoted_fragments():
    """(script, code) of every piece of code that a page says it copied; "..." lines separate the pieces of a block."""
    for script, block in re.findall(r"<!-- from (\S+) -->\n```python\n(.*?)```", PAGES, flags=re.S):
        for fragment in re.split(r"^\.\.\.\n", block, flags=re.M):
            yield script, fragment.strip("\n")


def without_indentation(code):
    return textwrap.dedent(code).strip("\n")


def test_quoted_code_is_the_scripts_code():
    """Each quoted piece stands in its script line by line, but for a common indentation."""
    fragments = list(quoted_fragments())
    assert len(fragments) >= 7
    for script, fragment in fragments:
        lines = (ROOT / script).read_text().split("\n")
        size = len(fragment.split("\n"))
        windows = ("\n".join(lines[i : i + size]) for i in range(len(lines)))
        assert any(without_indentation(window) == without_indentation(fragment) for window in windows), fragment


def test_flags_exist():
    """Every --flag on the pages is an argument of the script (or of one of the named tools)."""
    known = set()
    for script in ROOT.glob("*_atari.py"):
        fields = next(n for n in ast.parse(script.read_text()).body if isinstance(n, ast.ClassDef) and n.name == "Args").body
        known |= {"--" + node.target.id.replace("_", "-") for node in fields if isinstance(node, ast.AnnAssign)}
    known |= {flag.replace("--", "--no-", 1) for flag in known} | {"--help", "--logdir"}
    known |= set(re.findall(r'add_argument\("(--[a-z-]+)"', "".join(p.read_text() for p in (ROOT / "benchmark").glob("*.py"))))
    known |= {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint"}  # torchrun
    known |= {"--gpus", "--array", "--dist"}  # Slurm and pytest-xdist
    known |= set(re.findall(r"^#SBATCH (--[a-z-]+)", (ROOT / "benchmark" / "slurm_array.sh").read_text(), re.M))
    known |= set("--bar --joblog --resume-failed --results --termseq --sshlogin --workdir".split())  # GNU parallel
    known |= set(re.findall(r"--[a-z]+", (ROOT / "benchmark" / "atari10.sh").read_text()))
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", PAGES))
    assert flags - known == set()
    assert len(flags) > 15


@pytest.mark.parametrize(
    "page", ["README.md", "docs/speed.md", "docs/evidence.md", "docs/own_script.md", "docs/many_runs.md", *RESULTS]
)
def test_linked_files_exist(page):
    """Every relative link and picture leads to a file of the repository, and one to a heading to a heading."""
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert links
    for link in links:
        name, _, heading = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.M)
            assert heading in [re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings], link


def test_nothing_left_to_fill_in():
    """No placeholder was forgotten."""
    assert not re.search(r"@@|TODO|TBD|XXX", PAGES)
