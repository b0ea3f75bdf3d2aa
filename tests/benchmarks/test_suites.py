"""The throughput and power suites, run as a user runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gate

ROOT = Path(__file__).parents[2]


def own_environment():
    """For a pytest inside a test: one thread, and not taken for a part of pytest-xdist, which turns timing off."""
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return outer | {"OMP_NUM_THREADS": "1"}


def run_suite(*args, code="import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"):
    command = [sys.executable, "-c", code, "-q", "-p", "no:cacheprovider", *args]
    done = subprocess.run(command, cwd=ROOT, env=own_environment(), capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def test_throughput_quick(tmp_path):
    path = tmp_path / "run.json"
    status, out = run_suite("benchmarks/throughput", "--quick", "--threads", "1", f"--benchmark-json={path}")
    assert status == 0, out
    assert "skipped" not in out
    data = json.loads(path.read_text())
    assert "node" not in data["machine_info"] and data["machine_info"]["sparsekd"]["threads"] == 1
    found = {bench["fullname"]: bench for bench in data["benchmarks"]}
    name = "benchmarks/throughput/test_students.py::test_students[rating-cnn-n64-d0.3-cpu-ours_frozen]"
    assert found[name]["extra_info"]["speedup"] > 0 and found[name]["params"] == {
        "contestant": "students:rating-cnn-n64-d0.3-cpu-ours_frozen"
    }
    assert found[name]["stats"]["rounds"] == 6
    # A run compared with itself is fine, by the gate's rule too.
    assert set(gate.read_run(path)) < set(found)
    assert gate.main([str(path), "--run", str(path), "--tolerance", "0.9"]) in (0, 2)


def test_power_names_the_counter_or_skips_with_the_reason(tmp_path):
    status, out = run_suite("benchmarks/power", "--quick", "-k", "feature-stats", "--threads", "1")
    assert status == 0, out
    assert "no energy counter: rapl: " in out or " J  " in out


# A powercap tree that a thread moves at 20 W, in real time: what a laptop looks like to the meter.
FAKE_COUNTER = """
import functools, os, sys, threading, time
from pathlib import Path
from types import SimpleNamespace
import pytest
from sparsekd.energy import Machine, meter

root = Path(sys.argv.pop(1))
zone = root / "intel-rapl:0"
zone.mkdir(parents=True)
(zone / "name").write_text("package-0")
(zone / "max_energy_range_uj").write_text("262143328850")
(zone / "energy_uj").write_text("0")

def run():
    while True:
        (zone / "new").write_text(str(int(20e6 * time.perf_counter())))
        os.replace(zone / "new", zone / "energy_uj")
        time.sleep(5e-4)

threading.Thread(target=run, daemon=True).start()
meter.Machine = functools.partial(Machine, powercap=root)
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_power_reports_joules_watts_and_source(tmp_path):
    path = tmp_path / "run.json"
    args = ["benchmarks/power", "--quick", "-k", "feature-stats", "--threads", "1", f"--benchmark-json={path}"]
    command = [sys.executable, "-c", FAKE_COUNTER, str(tmp_path / "powercap"), "-q", "-p", "no:cacheprovider", *args]
    done = subprocess.run(command, cwd=ROOT, env=own_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for bench in json.loads(path.read_text())["benchmarks"]:
        info = bench["extra_info"]
        assert info["source"] == "rapl"
        assert info["watts"] == pytest.approx(20, rel=0.2)
        # The medians over windows of joules and of seconds may come from two windows on a busy machine.
        assert 0.7 * bench["stats"]["min"] < info["joules"] / 20 < 1.3 * bench["stats"]["max"]
    assert " W rapl" in done.stdout and "baseline" in done.stdout


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--device", "cuda:7", "--benchmark-disable"], "no CUDA device"),
        (["--model", "a.b:c"], "--model and --input-shape go together"),
        (["--device", "toaster"], "--device cpu or cuda"),
    ],
)
def test_what_cannot_run_says_why(args, said):
    if "cuda:7" in args and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    status, out = run_suite("benchmarks/throughput", "--quick", "-k", "feature-stats", *args)
    assert said in out
    assert status == (0 if "cuda:7" in args else 2)


@pytest.mark.parametrize("seconds", ["0", "-1", "nan"])
def test_windows_without_length_are_refused(seconds):
    status, out = run_suite("benchmarks/throughput", f"--seconds={seconds}", "--collect-only")
    assert status == 4 and f"expected a number above 0, got {seconds}" in out


def test_an_own_model_is_one_option():
    args = ["--model", "benchmarks.lib.models:Bottleneck", "--input-shape", "3,8,8", "--batch", "2"]
    status, out = run_suite("benchmarks/throughput", "--quick", "--benchmark-disable", "-k", "students", *args)
    assert status != 0 and "must be callable without arguments: missing a required argument" in out
    args[1] = "benchmarks.lib.models:wrn_16_2"
    status, out = run_suite("benchmarks/throughput", "--quick", "--benchmark-disable", "-k", "students", *args)
    assert status == 0 and "7 passed" in out, out
