"""What the GPU benchmarks share: the masks, the state of the device, and a rehearsal without one."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.shapes import Conv
from sparsekd import BlockPattern, BlockSparse, timing

DENSITIES = (1.0, 0.5, 0.3, 0.1)
BATCHES = (1, 32, 256)
DIRECTIONS = ("forward", "grad_input", "grad_values")


def pattern_for(layer: Conv, device: torch.device) -> BlockPattern:
    """64x64 blocks, or the largest power of two from 16 up that divides the channels; 16x16 in a rehearsal."""
    if device.type == "cpu":
        return BlockPattern(16, 16)
    sides = (min(64, channels & -channels) for channels in (layer.out_channels, layer.channels))
    return BlockPattern(*(max(side, 16) for side in sides))


MASKS = ("wide", "square", "shared", "free")


def mask_of(layer: Conv, pattern: BlockPattern, density: float, kind: str) -> torch.Tensor:
    """A seeded block mask in which every row block keeps the same number of blocks.

    "free": each block for itself; "shared": the same for every 128 outputs (`Grouping(rows=128)`: what the forward pass
    likes); "square": and for every 128 inputs (what both gradients like, too); "wide": square with 256, so that the
    widest tile, of 128 pixels x 256 channels, multiplies no zeros.
    """
    group = 256 if kind == "wide" else 128
    grid = pattern.grid(layer.weight)
    tall = 1 if kind == "free" else max(group // pattern.bh, 1)
    broad = max(group // pattern.bw, 1) if kind in ("square", "wide") else 1
    rows, columns = -(-grid[0] // tall), -(-grid[1] // broad)
    generator = torch.Generator().manual_seed(0)
    ranks = torch.rand(rows, columns * grid[2] * grid[3], generator=generator).argsort(1).argsort(1)
    kept = (ranks < max(1, round(density * ranks.shape[1]))).view(rows, columns, *grid[2:])
    return kept.repeat_interleave(tall, 0).repeat_interleave(broad, 1)[: grid[0], : grid[1]].clone()


def on_device(blocks: BlockSparse, device: torch.device, dtype: torch.dtype) -> BlockSparse:
    index = {name: getattr(blocks, name).to(device) for name in ("row_ptr", "col_idx")}
    return replace(blocks, values=blocks.values.to(device, dtype), **index)


def operands(
    layer: Conv,
    batch: int,
    density: float,
    kind: str,
    device: torch.device,
    dtype: torch.dtype,
    pattern: BlockPattern | None = None,
) -> tuple:
    """(x, dense weight, blocks, grad) on the device, channels_last; activations as after a ReLU."""
    pattern = pattern or pattern_for(layer, device)
    generator = torch.Generator().manual_seed(1)
    dense = torch.randn(layer.weight, generator=generator) * 0.02
    blocks = BlockSparse.from_dense(dense, pattern, mask=mask_of(layer, pattern, density, kind))
    blocks = on_device(blocks, device, dtype)
    shapes = (batch, *layer.input), (batch, layer.out_channels, layer.out_size, layer.out_size)
    x, grad = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    last = {"memory_format": torch.channels_last}
    return x.relu().contiguous(**last), dense.to(device, dtype).contiguous(**last), blocks, grad.contiguous(**last)


def start(rehearse: bool) -> torch.device:
    """The device to run on. A rehearsal is interpreted on the CPU; without it a missing GPU is an error."""
    if rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
        torch.set_num_threads(1)
        _rehearse_on_cpu()
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit("gpu benchmarks: no CUDA device here; --rehearse runs the same steps interpreted on the CPU")
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda")


def _rehearse_on_cpu() -> None:
    """Make the CUDA backend what the ops run on CPU tensors, and the wall clock its clock, set so that dense loses."""
    from sparsekd.backends import cuda
    from sparsekd.backends.cuda import plan

    global _override
    _override = torch.library.Library("sparsekd", "IMPL")
    warnings.filterwarnings("ignore", message="Warning only once for all operators")
    for op in ("linear", "conv2d"):
        for name in (op, f"{op}_grad_input", f"{op}_grad_values"):
            _override.impl(name, getattr(cuda, name), "CPU", allow_override=True)
    plan.medians = _rehearsed_medians  # type: ignore[assignment]
    on_gpu: Any = importlib.import_module("sparsekd.freeze.cuda")
    freezing: Any = importlib.import_module("sparsekd.freeze.freeze")
    freezing.is_on_gpu = lambda inputs: True
    on_gpu.capture = lambda run, inputs: run
    layer: Any = importlib.import_module("sparsekd.freeze.cuda_layer")
    on_gpu.medians = layer.medians = _rehearsed_medians


_override: Any = None  # lives as long as the process, as the ops do


def _rehearsed_medians(calls: Mapping[Any, Callable[[], object]], *_: Any, **__: Any) -> dict[Any, float]:
    times = {name: timing.timed(call, 1) for name, call in calls.items()}
    return {**times, next(iter(times)): 10.0}  # the first is dense: so the kernels are chosen, and run


def medians(functions: Sequence[Callable[[], object]]) -> list[float]:
    """Median microseconds of each, in turns: queued on the GPU, or once by the wall clock in a rehearsal."""
    calls = dict(enumerate(functions))
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    found = _rehearsed_medians(calls) if _override else timing.medians(calls, 0.1 * len(calls), device=device)
    return [1e6 * seconds for seconds in found.values()]


def until(seconds: float) -> Callable[[], bool]:
    """A function that says whether the time is not yet up."""
    began = time.monotonic()
    return lambda: time.monotonic() - began < seconds


def facts(device: torch.device) -> dict[str, Any]:
    """Versions, and the state of the device now: driver, clocks, temperature, power limit, reasons of throttling."""
    import triton

    found: dict[str, Any] = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "rehearsal": device.type == "cpu",
    }
    if device.type == "cpu":
        return found
    found |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    found |= {"cudnn": torch.backends.cudnn.version(), "cudnn_benchmark": torch.backends.cudnn.benchmark}
    found |= {"tf32_conv": torch.backends.cudnn.allow_tf32}
    names = (
        "driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw,power.limit,"
        "clocks_throttle_reasons.active"
    )
    command = ["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader", "-i", str(torch.cuda.current_device())]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return found | {"nvidia_smi": f"not readable: {error}"}
    return found | dict(zip(names.split(","), out.strip().split(", "), strict=True))


def write(
    path: str, name: str, before: dict[str, Any], device: torch.device, rows: list[dict[str, Any]], **more: Any
) -> None:
    """Keep the rows of a stage with the state of the device before and after it."""
    target = Path(path)
    target.mkdir(parents=True, exist_ok=True)
    record = {"stage": name, "before": before, "after": facts(device), **more, "rows": rows}
    (target / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{name}: {len(rows)} rows in {target / f'{name}.json'}", file=sys.stderr)
