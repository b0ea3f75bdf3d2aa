"""Every benchmark script starts: one that cannot is dead, and nobody would see it before the day it is needed.

Those with tests of their own (conv2d, attention, networks, gate, paper_tables, zeus_check, gpu.table, gpu.aot) run for
real there; the others run here, as small as they go.
"""

import dataclasses
import importlib
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.lib.shapes import GPU, REHEARSAL
from sparsekd.runs.tasks import TASKS

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "benchmarks").rglob("*.py")
    if '__name__ == "__main__"' in path.read_text()
)
NEED_A_GPU = [("benchmarks.gpu.layers", []), ("benchmarks.gpu.network", ["infer"]), ("benchmarks.gpu.embedding", [])]


def run_script(monkeypatch, name, *args):
    """As `python -m` does, but in this process, where torch is imported already; its exit status, or what it said."""
    monkeypatch.setattr(sys, "argv", [name, *args])
    monkeypatch.delitem(sys.modules, name, raising=False)  # or runpy would warn that it is imported twice
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    return ended.value.code


def test_the_scripts_are_found():
    assert {"benchmarks.conv2d", "benchmarks.gpu.patterns", "benchmarks.power.zeus_check"} < set(SCRIPTS)
    assert len(SCRIPTS) >= 13


def test_the_readme_says_what_each_script_measures():
    text = (ROOT / "benchmarks" / "README.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
    missing = [one for one in SCRIPTS if not any(f".{one.rpartition('.')[2]}" in row for row in rows)]
    assert not missing


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_starts_and_explains_its_options(name, monkeypatch, capsys):
    if name.startswith("benchmarks.gpu.aot"):
        pytest.importorskip("triton")
    assert run_script(monkeypatch, name, "--help") == 0
    assert capsys.readouterr().out.startswith("usage: ")


@pytest.mark.parametrize(("name", "args"), NEED_A_GPU)
def test_without_a_gpu_a_script_says_what_is_missing(name, args, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = run_script(monkeypatch, name, *args)
    assert "no CUDA device here; --rehearse" in said  # a text as the code of SystemExit is status 1


def test_the_layers_rehearse_without_a_gpu(tmp_path):
    """In a process of its own: the rehearsal puts the interpreted kernels in the place of the CPU's."""
    pytest.importorskip("triton")
    options = ["--rehearse", "--direction", "forward", "--mask", "wide", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.gpu.layers", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "layers-1-float16.json").read_text())["rows"]
    assert [row["layer"] for row in rows] == list(REHEARSAL)
    assert all(row["fastest"].startswith("triton") and row["fastest_us"] > 0 for row in rows)


def test_threads_are_compared_with_one(tmp_path, monkeypatch, capsys):
    scaling, shapes = (importlib.import_module(f"benchmarks.{name}") for name in ("scaling", "lib.shapes"))
    monkeypatch.setattr(scaling, "CONVS", [shapes.Conv("cifar", 16, 6, 64, 3), shapes.Conv("cifar", 16, 6, 16, 3)])
    monkeypatch.setattr(scaling, "LINEARS", [])
    path, threads = tmp_path / "rows.json", torch.get_num_threads()
    options = ["--threads", "2", "--density", "0.5", "--batch", "2", "--seconds", "0.001", "--json", str(path)]
    scaling.main([*options, "--least", "0"])
    assert torch.get_num_threads() == threads
    (row,) = json.loads(path.read_text())["rows"]
    assert row["out_channels"] == 64 and row["one_us"] > 0 and row["us"] > 0
    assert "1 layers: median" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        scaling.main([*options, "--least", "1e9"])


def test_calls_of_small_layers_are_timed_beside_dense_ones(tmp_path):
    calls = importlib.import_module("benchmarks.calls")
    calls.main(["--seconds", "0.001", "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert len(rows) == len(calls.layers())
    kinds = [f"{kind}_{whose}_us" for kind in ("inference", "training") for whose in ("dense", "ours")]
    assert all(row[kind] > 0 for row in rows for kind in kinds)


@pytest.mark.parametrize("layer", ["resnet50-3x3-256", "vgg16-512-14"])
@pytest.mark.parametrize("direction", ["forward", "grad_input", "grad_values"])
def test_the_kept_predictions_are_those_of_the_cost_model(layer, direction):
    model = importlib.import_module("benchmarks.gpu.model")
    rows = json.loads((ROOT / "benchmarks" / "results" / "gpu_model.json").read_text())["rows"]
    case = {"layer": layer, "batch": 32, "density": 0.3, "mask": "square", "direction": direction}
    (kept,) = [row for row in rows if case.items() <= row.items()]
    assert {"layer": layer} | model.predict(GPU[layer], 32, 0.3, "square", direction) == kept


def test_patterns_trains_two_layouts_under_one_teacher(tmp_path, monkeypatch, capsys):
    patterns, entry = importlib.import_module("benchmarks.gpu.patterns"), TASKS["movietweetings"]

    def few(config):
        """64 rows of each part: every step is there, and soon done."""
        task = entry.load(config)
        parts = {name: getattr(task, name).take(slice(64)) for name in ("train", "val", "test")}
        return dataclasses.replace(task, **parts)

    monkeypatch.setitem(TASKS, "movietweetings", dataclasses.replace(entry, load=few))
    out = tmp_path / "patterns.json"
    layouts = ["16x1 (CPU)", "64x32, rows shared"]
    args = ["--quick", "--density", "0.45", "--layout", *layouts, "--work", str(tmp_path / "work"), "--out", str(out)]
    threads = torch.get_num_threads()
    patterns.main(args)
    torch.set_num_threads(threads)
    rows = json.loads(out.read_text())["rows"]
    assert [(row["layout"], row["pattern"]) for row in rows] == [(layouts[0], "16x1"), (layouts[1], "64x32")]
    assert all(0.35 < row["kept"] < 0.55 and row["test_mse"] > 0 for row in rows)
    assert sorted(path.name for path in (tmp_path / "work" / "seed0").iterdir()) == sorted(
        ["teacher", *(f"{layout} 0.45" for layout in layouts)]
    )
