"""The machine code of the Triton kernels, compiled here for GPUs that are not: tensor cores, asynchronous copies, no
spilled registers, shared memory within the device's limit. `python -m benchmarks.gpu.aot` sweeps all configurations."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("triton")
from benchmarks.gpu import aot

from .common import tiles

ROOT = Path(__file__).parents[2]
_ALL = ("bf16", "fp16", "fp32")
CURRENT = {80: _ALL, 90: _ALL, 100: ("bf16",)}  # what the kept table must have of the kernels as they are, by device
KEPT = ROOT / "benchmarks" / "results" / "gpu_aot.json"


def compiled(*options, environment=None):
    """How many configurations came out good. In a process of its own: the kernels of this one may be interpreted."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.gpu.aot", *options, "--out", ""]
    found = subprocess.run(
        command, cwd=ROOT, env={**kept, **(environment or {})}, capture_output=True, text=True, check=False
    )
    print(found.stdout)
    assert found.returncode == 0, found.stderr
    return found.stdout.count("good")


@pytest.mark.parametrize("sm", [80, 90, 100, 942])
def test_the_widest_tile_of_each_family(sm):
    assert compiled("--quick", "--sm", str(sm)) >= 12


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("direction", tiles.DIRECTIONS)
@pytest.mark.parametrize("sm", [80, 90, 100, 942])
def test_every_configuration_that_may_be_chosen(sm, direction, dtype):
    """In parts of a minute or two each; as many as the kept sweep has."""
    part = f"{direction} {dtype} "
    kept = [row for row in json.loads(KEPT.read_text())["rows"] if row["sm"] == sm and row["config"].startswith(part)]
    assert compiled("--sm", str(sm), "--only", part) == len(kept) >= 8


def test_the_kept_sweep_is_of_the_kernels_as_they_are():
    """After a change of a kernel, of a tile or of how one is launched: python -m benchmarks.gpu.aot --sm 90

    In a process of its own, since other tests put kernels and tiles of their own in place.
    """
    check = "from tests.cuda import test_machine_code; test_machine_code.check_the_kept_sweep()"
    found = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def check_the_kept_sweep():
    record = json.loads(KEPT.read_text())
    wanted = {aot.device_name(capability): dtypes for capability, dtypes in CURRENT.items()}
    missing = [one.split() for one in aot.missing(record["rows"], list(CURRENT))]
    assert not [one for one in missing if one[2] in wanted[one[0]]]
    sources = {(sm, str(one)): aot.source_of(one) for sm in aot.LIMITS for one in aot.configurations(False, sm)}
    for row in record["rows"]:  # the others are marked as what they are
        assert row["current"] == (row.get("source") == sources[row["sm"], row["config"]]), row["config"]
    assert {row["source"] for row in record["considered"]} == {aot.source_of(one) for one in aot.considered()}


@pytest.mark.parametrize("change", ["text", "stages", "absent"])
def test_a_sweep_of_other_kernels_is_seen(change, monkeypatch):
    config = next(aot.configurations(False, 90))
    rows = [{"sm": 90, "config": str(config), "source": aot.source_of(config)}]
    monkeypatch.setattr(aot, "configurations", lambda quick, capability: iter([config]))
    assert aot.missing(rows, [90]) == []
    if change == "text":
        monkeypatch.setattr(aot, "source_text", lambda direction: "another kernel")
    if change == "stages":
        monkeypatch.setattr(tiles.Tile, "stages_at", lambda tile, depth: 2)
    assert aot.missing([] if change == "absent" else rows, [90]) == [f"sm_90 {config}"]


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


# ---- The loop as a pipeline

LOOP = """
    %acc:3 = scf.for %step = %begin to %end step %one iter_args(%a = %b) -> (tensor<128x256xf32, #mma>) {
      %arrived = ttg.async_wait %x, %w {num = 2 : i32}
      %acc_1 = ttng.warp_group_dot %x, %w, %acc {isAsync = true} : !ttg.memdesc<128x64xbf16>
      %acc_2:3 = ttng.warp_group_dot_wait %acc_1, %x, %w {pendings = 1 : i32} : tensor<128x256xf32, #mma>
      %offset = ttg.convert_layout %o : tensor<256xi32, #a> -> tensor<256xi32, #b>
    }
"""
BUFFERS = (
    "%x = ttg.local_alloc : () -> !ttg.memdesc<3x128x64xbf16>\n%w = ttg.local_alloc : () -> !ttg.memdesc<3x64x256xbf16>"
)


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("", "", None),
        ("pendings = 1", "pendings = 0", r"waits for wgmma down to \[0\] pending"),
        ("num = 2", "num = 0", r"waits for copies down to \[0\] groups, not \[2\]"),
        ("<3x64x256", "<1x64x256", r"\[3, 1\] buffers of the operands"),
        ("tensor<256xi32, #a> -> tensor<256xi32", "tensor<128x64xbf16, #a> -> tensor<128x64xbf16", "through registers"),
        (
            "      %offset",
            "      %y = ttg.local_load %x : !ttg.memdesc<128x64xbf16, #shared>\n      %offset",
            "through registers",
        ),
    ],
)
def test_what_breaks_the_pipeline_is_found(old, new, fault, monkeypatch):
    from benchmarks.gpu import pipeline

    monkeypatch.setattr(pipeline, "machine_code", lambda compiled: "HGMMA.64x256x16.F32.BF16")
    monkeypatch.setattr(pipeline, "serialized", lambda compiled: "")
    found = pipeline.faults(mock.Mock(asm={"ttgir": (BUFFERS + LOOP).replace(old, new)}), stages=3)
    assert (not found) if fault is None else re.search(fault, "; ".join(found))


def test_another_triton_compiles_the_same_pipeline():
    """CUDA builds of torch 2.11 bring Triton 3.6.0."""
    folder = os.environ.get("SPARSEKD_OTHER_TRITON", "")
    if not (Path(folder) / "triton").is_dir() or not folder:
        pytest.skip("SPARSEKD_OTHER_TRITON names no folder: pip install --no-deps --target FOLDER triton==3.6.0")
    paths = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])
    assert compiled("--quick", "--sm", "90", environment={"PYTHONPATH": paths}) >= 12
