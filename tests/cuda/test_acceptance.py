"""The acceptance script, rehearsed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_acceptance_script_rehearses(tmp_path):
    script = Path(__file__).parents[2] / "benchmarks" / "gpu" / "acceptance.sh"
    stages = ["build", "layers1", "network", "training", "losses", "energy", "table"]
    environment = {**os.environ, "PYTHON": sys.executable, "TMPDIR": str(tmp_path)}
    environment.pop("SPARSEKD_PLAN")
    subprocess.run(["bash", script, "--rehearse", *stages], env=environment, check=True, timeout=500)
    table = (tmp_path / "sparsekd-gpu-rehearsal" / "table.md").read_text()
    assert "rehearsal: True" in table and "train-tiny" in table and "grad_values" not in table
    assert "| quick sad nchw float32 |" in table
