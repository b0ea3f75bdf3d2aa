"""The README's code runs, and its two commands name what exists."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES, ids=[f"example{i}" for i in range(len(EXAMPLES))])
def test_examples_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(README), "exec"), {"__name__": "__main__"})


def test_there_are_examples_and_two_commands():
    assert len(EXAMPLES) >= 2
    assert re.findall(r"<!-- command: (\w+) -->", README.read_text()) == ["run", "tests"]
