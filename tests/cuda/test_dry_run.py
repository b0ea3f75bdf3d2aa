"""The real dispatch on a GPU that is not there: what it would compile, and what a launch costs the host."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def dry_run(*options):
    """In a process of its own: the kernels of this one may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.gpu.dry_run", *options]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


def test_variants_the_steady_state_and_the_cost_of_a_launch():
    found = dry_run()
    assert found["ops"] == 7 * 3 * (3 * 2 + 2)  # layers, directions, densities of both masks, blocks of 64x32
    assert 30 <= found["variants"] <= 60
    assert found["compiled_in_the_steady_state"] == 0
    # 15 us on an idle host; processes beside this one take their share of its caches.
    assert found["launch_us"] <= 45 and found["launch_us"] < found["triton_launch_us"] + 15


@pytest.mark.slow
def test_what_is_compiled_beforehand_is_what_a_driver_asks_for(tmp_path):
    """A cache filled by one process: another one, which has forgotten everything, finds every variant there."""
    layer = ["--layers", "resnet50-1x1-1024-256", "--density", "0.3", "--mask", "wide", "--fewest"]
    built = dry_run(*layer, "--compile", str(tmp_path / "cache"))
    assert built["variants"] >= 3 and built["compiled"] == built["variants"]
    again = dry_run(*layer, "--compile", str(tmp_path / "cache"))
    assert again["variants"] == built["variants"] and again["compiled"] == 0
