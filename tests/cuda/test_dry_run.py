"""The real dispatch on a GPU that is not there: what it would compile, and what a launch costs the host."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from .common import tiles

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
    assert found["launched_otherwise"] == 0
    # The calls that the interpreter makes, not a clock, which tells what else runs here: most where parts are added up.
    for direction, most in {"forward": 57, "grad_input": 55, "grad_values": 54}.items():
        assert found["launch_calls"][direction] <= most
        assert found["triton_launch_calls"][direction] >= found["launch_calls"][direction] + 40


LAYER = ["--layers", "resnet50-1x1-1024-256", "--density", "0.3", "--mask", "wide", "--fewest"]


def test_the_cache_of_another_python_has_the_keys_that_the_driver_asks_for(tmp_path):
    """From the list alone, without torch: each variant gets the key that it has where it is launched."""
    steps = dry_run(*LAYER, "--steps", "trips", "losses", "--ask", str(tmp_path / "asked.json"))["steps"]
    assert steps["trips"] >= len(tiles.GATHER_HALF) - 1 and steps["losses"] >= 8
    asked = json.loads((tmp_path / "asked.json").read_text())
    command = [sys.executable, ROOT / "benchmarks" / "gpu" / "cache.py", tmp_path / "asked.json", "--keys"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(asked["keys"]) >= 20 and found.stdout.split() == asked["keys"]


@pytest.mark.slow
def test_whole_networks_ask_for_variants_that_no_layer_alone_does():
    """Frozen layers are fused, dense ones of one pixel are tried, and training has other sizes of blocks."""
    steps = dry_run("--fewest", "--steps", "all")["steps"]
    assert all(steps[name] >= 10 for name in ("network", "training", "embedding")) and steps.pop("embedding") <= 24
    assert sum(steps.values()) <= 120


@pytest.mark.slow
def test_what_is_compiled_beforehand_is_what_a_driver_asks_for(tmp_path):
    """A cache filled by one process: another one, which has forgotten everything, finds every variant there."""
    built = dry_run(*LAYER, "--compile", str(tmp_path / "cache"))
    assert built["variants"] >= 3 and built["compiled"] == built["variants"]
    again = dry_run(*LAYER, "--compile", str(tmp_path / "cache"))
    assert again["variants"] == built["variants"] and again["compiled"] == 0
