"""README and docs: their code runs, their commands parse, their links lead somewhere."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from sparsekd import cli

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.name for page in PAGES]


def blocks(page, language):
    """The code of a page; what stands behind ``<!-- needs: package -->`` is left out where that is not installed."""
    found = re.findall(rf"(?:<!-- needs: (\w+) -->\n)?```{language}\n(.*?)```", page.read_text(), re.DOTALL)
    return [code for package, code in found if not package or importlib.util.find_spec(package)]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_the_commands_of_a_page_are_commands(page):
    inline = re.findall(r"`(sparsekd (?:run|bench|report) [^`]+)`", page.read_text())
    lines = [line for block in blocks(page, "bash") for line in re.split(r"\n|&&", block)]
    for line in [*inline, *lines]:
        command, *arguments = shlex.split(line.replace("\n", " "), comments=True) or [""]
        if command == "sparsekd" and arguments[-1:] != ["--help"]:
            given = [a.replace("DIR...", "DIR") for a in arguments]
            cli._parser(given).parse_args(given)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_the_links_of_a_page_lead_to_files(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_first_page_is_short_and_has_the_two_commands():
    text = README.read_text()
    assert len(blocks(README, "python")) == 2
    assert re.findall(r"<!-- command: (\w+) -->", text) == ["run", "tests"]
    assert len(text) < 6200, "what is longer belongs to docs/"


def test_every_page_is_in_the_table_of_contents():
    listed = re.findall(r"^([a-z-]+)$", (ROOT / "docs" / "index.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(page.stem for page in PAGES if page.name not in ("README.md", "index.md"))
