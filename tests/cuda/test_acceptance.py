"""Both runs of the quarter of an hour on a GPU, rehearsed whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("run", ["first", "second"])
def test_the_runs_rehearse(run, tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu.run", run, "--rehearse", "--out", str(tmp_path / "gpu")]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True, timeout=1200)
    state = json.loads((tmp_path / "gpu" / "state.json").read_text())
    assert {step["status"] for step in state.values()} == {"done"}
    table = (tmp_path / "gpu" / "table.md").read_text()
    assert "rehearsal: True" in table and "grad_values" in table
    assert (tmp_path / "gpu.tar.gz").stat().st_size > 1000
