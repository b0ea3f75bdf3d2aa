"""The scripts in examples/ run, with as little training as shows every step."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(tmp_path, script, *arguments):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # other tests run beside it
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_pretrained_network_is_pruned_and_its_weights_are_kept(tmp_path):
    run(tmp_path, "prune_pretrained.py", "--weights", "dense.pt", "--epochs", "1")
    written = (tmp_path / "dense.pt").read_bytes()
    printed = run(tmp_path, "prune_pretrained.py", "--weights", "dense.pt", "--epochs", "0")
    assert "70% of the multiply-adds are gone" in printed and "frozen, one image" in printed
    assert (tmp_path / "dense.pt").read_bytes() == written


def test_a_student_is_distilled_and_pruned(tmp_path):
    printed = run(tmp_path, "distill_and_prune.py", "--epochs", "4")
    assert printed.count("unit='macs'") == 2 and "student: accuracy" in printed


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed")
def test_a_method_is_a_callback_of_lightning(tmp_path):
    assert "accuracy" in run(tmp_path, "lightning_callback.py", "--epochs", "4")


def test_an_example_is_short():
    for script in EXAMPLES.glob("*.py"):
        assert len(script.read_text().splitlines()) <= 80, script.name
