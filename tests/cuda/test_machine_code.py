"""The machine code of the Triton kernels, compiled here for GPUs that are not: tensor cores, asynchronous copies, no
spilled registers, shared memory within the device's limit. `python -m benchmarks.gpu.aot` sweeps all configurations."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from sparsekd.kernels import tiles

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "benchmarks" / "results" / "gpu_aot.json"


def compiled(*options):
    """How many configurations came out good. In a process of its own: the kernels of this one may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.gpu.aot", *options, "--out", ""]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    print(found.stdout)
    assert found.returncode == 0, found.stderr
    return found.stdout.count("good")


@pytest.mark.parametrize("sm", [80, 90, 100, 942])
def test_the_widest_tile_of_each_family(sm):
    assert compiled("--quick", "--sm", str(sm)) >= 12


@pytest.mark.slow
@pytest.mark.parametrize("sm", [80, 90, 100, 942])
def test_every_configuration_that_may_be_chosen(sm):
    assert compiled("--sm", str(sm)) >= 150


def test_the_kept_sweep_is_good_and_covers_every_tile():
    rows = json.loads(KEPT.read_text())["rows"]
    assert not [row["config"] for row in rows if row["stack_bytes"]]
    for (kind, family), shapes in tiles.FAMILIES.items():
        directions = ("grad_values",) if kind == "products" else ("forward", "grad_input")
        for direction in directions:
            for tile in shapes:
                for sm in (sm for sm in (80, 90, 100) if sm >= tile.since):
                    assert any(
                        row["sm"] == sm and row["config"].startswith(direction) and f"{family} {tile} " in row["config"]
                        for row in rows
                    ), f"{direction} {family} {tile} on sm_{sm}: run python -m benchmarks.gpu.aot"
