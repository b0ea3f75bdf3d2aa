"""The Triton kernels of the distillation losses against float64, on a GPU where there is one, else interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsekd.backends.cuda import attention as backend
from sparsekd.ops.attention import (
    feature_stats_grad_reference,
    feature_stats_reference,
    kd_reference,
    match_maps_reference,
)

from .common import DEVICE, GPU
from .common import attention as kernels

ROOT = Path(__file__).parents[2]
NOTHING = 1e-6 if GPU else 0.0  # a GPU may contract a difference of products, which is then not exactly none
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
ALIGNED = [(16, 8, 8), (72, 4, 4), (8, 16, 24)]
RAGGED = [(5, 7, 7), (70, 3, 3), (33, 1, 1), (3, 13, 11)]


def features_of(shapes, dtype, layout):
    return [torch.randn(2, *s).to(DEVICE, dtype).contiguous(memory_format=LAYOUTS[layout]) for s in shapes]


def unwritten(shape, **kwargs):
    return torch.full(tuple(shape), float("nan"), **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shapes", [ALIGNED, RAGGED], ids=["aligned", "ragged"])
def test_feature_stats(shapes, layout, dtype, monkeypatch):
    monkeypatch.setattr(torch, "empty", unwritten)
    features = features_of(shapes, dtype, layout)
    exact = [f.double() for f in features]
    got = backend.feature_stats(features)
    for ours, want in zip(got, feature_stats_reference(exact), strict=True):
        torch.testing.assert_close(ours.double(), want, rtol=2e-6, atol=1e-6)
    grads = [torch.randn_like(stat) for stat in got]
    ours = backend.feature_stats_grad(features, *grads)
    exact = feature_stats_grad_reference(exact, *(g.double() for g in grads))
    peers = feature_stats_grad_reference([f.float() for f in features], *(g.to(dtype).float() for g in grads))
    for grad, want, peer in zip(ours, exact, peers, strict=True):
        assert grad.dtype == dtype and grad.is_contiguous(memory_format=LAYOUTS[layout])
        error, torchs = ((x.double() - want).abs().max() for x in (grad, peer.to(dtype)))  # gradients in that dtype
        assert error <= max(2 * torchs, 1e-6 * want.abs().max())


def test_layers_of_several_dtypes_and_formats_in_one_call():
    features = [
        *features_of([(16, 8, 8)], torch.float32, "nchw"),
        *features_of([(8, 4, 4)], torch.bfloat16, "nhwc"),
        *features_of([(16, 4, 4)], torch.float32, "nchw"),
    ]
    got, want = backend.feature_stats(features), feature_stats_reference(features)
    torch.testing.assert_close(got, want)
    grads = [torch.randn_like(stat) for stat in got]
    ours, reference = backend.feature_stats_grad(features, *grads), feature_stats_grad_reference(features, *grads)
    torch.testing.assert_close(ours, reference)
    assert [len(places) for places, _ in kernels.arrange(features, [False, True, False])] == [2, 1]


SIZES_T, SIZES_S = [(4, 4), (2, 3), (4, 4), (1, 1), (6, 5)], [(4, 4), (5, 3), (2, 2), (8, 8), (6, 5)]


@pytest.mark.parametrize("attended", [True, False])
def test_match_maps(attended, monkeypatch):
    monkeypatch.setattr(torch, "empty", unwritten)
    students = 3 if attended else 5
    attention = torch.rand(2, 5, students, device=DEVICE).softmax(2) if attended else None
    sizes = SIZES_T, SIZES_S[:students]
    teacher, student = (torch.rand(2, sum(h * w for h, w in s), device=DEVICE) for s in sizes)
    student[1, :16] = 0  # a map of zeros
    flat = [[side for size in s for side in size] for s in sizes]
    got = backend.match_maps(attention, teacher, student, *flat)
    double = [None if x is None else x.double() for x in (attention, teacher, student)]
    for ours, want in zip(got, match_maps_reference(*double, *flat), strict=True):
        torch.testing.assert_close(ours.double(), want, rtol=1e-5, atol=1e-7)


def test_equal_maps_are_at_no_distance():
    maps = torch.rand(2, 49, device=DEVICE)
    loss, _, grad = backend.match_maps(None, maps, maps.clone(), [7, 7], [7, 7])
    assert loss <= NOTHING and grad.abs().max() <= NOTHING


@pytest.mark.parametrize("classes", [1, 10, 100])
def test_kd(classes):
    student, teacher = 5 * torch.randn(2, 3, classes, device=DEVICE)
    got, want = backend.kd(student, teacher, 4.0), kd_reference(student.double(), teacher.double(), 4.0)
    for ours, reference in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=1e-6)
    loss, grad = backend.kd(student, student, 1.0)
    assert loss.abs() <= NOTHING and grad.abs().max() <= NOTHING


def test_machine_code():
    """Compiled for GPUs that need not be there: no spills, maps read 16 bytes at a time. In a process of its own, since
    the kernels of this one may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.gpu.aot_losses", "--quick"]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("good") >= 4 * 13


@pytest.mark.skipif(not GPU, reason="no GPU")
def test_no_synchronisation():
    features = features_of(ALIGNED, torch.float16, "nhwc")
    flat = [4, 4, 2, 2]
    maps = torch.rand(2, 20, device=DEVICE)

    def step():
        backend.feature_stats(features)
        backend.match_maps(None, maps, maps, flat, flat)
        backend.kd(maps, maps, 4.0)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
