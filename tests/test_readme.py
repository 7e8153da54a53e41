"""Links on the pages lead somewhere, and the README's two commands, first training and tests, are what they should be."""

import re

import pytest
import tyro
from conftest import MODULES, ROOT

README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))])
def test_links(page):
    """Every relative link and picture leads to a file of the repository, and one to a heading to a heading."""
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        name, _, heading = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert "://" in link or target.exists(), link
        if heading and "://" not in link:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.M)
            assert heading in [re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings], link


def test_commands():
    """The script of the first command takes its arguments; the block that CI runs installs the requirements and tests."""
    script, arguments = re.search(r"^(?:\S*python|uv run) (\w+_atari\.py)(.*)$", README, flags=re.M).groups()
    tyro.cli(MODULES[script].Args, args=arguments.split("#")[0].split())
    (block,) = re.findall(r"^<!-- ci: test -->\n```\w*\n(.*?)^```", README, flags=re.M | re.S)
    assert "requirements.txt" in block and "pytest" in block and (ROOT / "requirements.txt").exists()
