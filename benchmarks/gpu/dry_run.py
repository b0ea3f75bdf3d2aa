"""Every launch of the acceptance layers through the real dispatch, for a GPU that is not there.

    python -m benchmarks.gpu.dry_run                    # counts variants and launches, times the host; compiles nothing
    python -m benchmarks.gpu.dry_run --compile DIR      # compiles the variants into DIR, a cache to bring along

Activations are meta tensors, the driver says that it is an sm_90, and a launch does nothing. What is counted is what a
GPU would be asked to compile; what is timed is what Python does before a launch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu import common
from benchmarks.gpu.layers import sparse_call
from benchmarks.lib.shapes import GPU, Conv
from sparsekd import BlockSparse, timing
from sparsekd.backends import cuda

CAPABILITY = 90
ACCEPTANCE = (
    *("resnet50-3x3-128", "resnet50-3x3-256", "resnet50-3x3-512", "resnet50-1x1-1024-256"),
    *("wrn-28-10-320", "wrn-28-10-640", "vgg16-512"),
)


class StubKernel:
    """What the compiler would return; a launch of it does nothing."""

    function = 0
    packed_metadata = ()

    def __init__(self) -> None:
        self.run: Callable[..., None] = lambda *arguments: None

    def launch_metadata(self, *_: Any) -> None:
        return None


class FakeUtils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 0, 0, 0, 0, 1024


class FakeDriver:
    """As much of Triton's CUDA driver as compiling and launching ask for."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", CAPABILITY, 32)
        self.utils = FakeUtils()
        self.launcher_cls = lambda source, metadata: lambda *arguments: None

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


class Variants:
    """What the compiler was asked for."""

    def __init__(self, compile_them: bool) -> None:
        import triton

        self.asked: list[str] = []
        self._compile = triton.compiler.compile if compile_them else None

    def __call__(self, source: Any, target: Any = None, options: Any = None, **more: Any) -> Any:
        constants = {"x".join(map(str, place)): value for place, value in source.constants.items()}
        self.asked.append(f"{source.fn.__name__} {source.signature} {constants} {options['num_warps']}")
        if self._compile is None:
            return StubKernel()
        return self._compile(source, target=target, options=options, **more)


def install(compile_them: bool = False) -> Variants:
    """Put the fake driver and the counting compiler in Triton's place; the kernels must not be interpreted."""
    import triton

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("dry_run: TRITON_INTERPRET=1 interprets the kernels; unset it")
    variants = Variants(compile_them)
    triton.compiler.compile = variants
    triton.runtime.driver.set_active(FakeDriver())
    return variants


def calls(
    layers: Iterable[Conv], batch: int, densities: Sequence[float], kinds: Sequence[str]
) -> Iterator[Callable[[], object]]:
    """Every op of the layers: three directions, densities and masks."""
    meta = torch.device("meta")
    for layer in layers:
        for density in densities:
            for kind in kinds:
                pattern = common.pattern_for(layer, torch.device("cuda"))
                mask = common.mask_of(layer, pattern, density, kind)
                blocks = BlockSparse.from_dense(torch.zeros(layer.weight), pattern, mask=mask)
                blocks = replace(blocks, values=blocks.values.to(meta, torch.bfloat16))
                shapes = (batch, *layer.input), (batch, layer.out_channels, layer.out_size, layer.out_size)
                x, grad = (_maps(shape) for shape in shapes)
                for direction in common.DIRECTIONS:
                    yield sparse_call(layer, direction, x, blocks, grad, cuda)


def _maps(shape: Sequence[int]) -> torch.Tensor:
    empty = torch.empty(tuple(shape), dtype=torch.bfloat16, device="meta")
    return empty.contiguous(memory_format=torch.channels_last)


def run(
    layers: Iterable[Conv], batch: int, densities: Sequence[float], kinds: Sequence[str], variants: Variants
) -> dict[str, Any]:
    """Each op measured as the planner would, then run again twice: variants, what the last run compiles, its time."""
    from sparsekd.backends.cuda import plan

    def launched(choices: Mapping[Any, Callable[[], object]], *_: Any, **__: Any) -> dict[Any, float]:
        for choice, call in choices.items():
            if choice.tile is not None:
                call()
        return {choice: 1.0 / (1 + place) for place, choice in enumerate(choices)}

    nothing_wrong: dict[str, str] = {}
    made = list(calls(layers, batch, densities, kinds))
    medians = mock.patch.object(plan, "medians", launched)
    wrong = mock.patch.object(plan, "wrong", lambda *_: nothing_wrong)
    with medians, wrong, plan.measuring():
        for call in made:
            call()
    asked = len(variants.asked)
    for call in made:
        call()
    microseconds = []
    for call in made:
        taken = timing.samples({"launch": call}, 0.0, rounds=20, clock=time.thread_time)["launch"]
        microseconds.append(1e6 * min(taken))
    return {
        "ops": len(made),
        "variants": asked,
        "compiled_in_the_steady_state": len(variants.asked) - asked,
        "launch_us": round(statistics.median(microseconds), 1),
        "names": sorted(set(variants.asked)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", metavar="DIR", help="compile the variants into this cache")
    parser.add_argument("--layers", nargs="*", default=list(ACCEPTANCE), choices=list(GPU))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--names", action="store_true", help="print each variant")
    options = parser.parse_args()
    if options.compile:
        os.environ["TRITON_CACHE_DIR"] = options.compile
    variants = install(compile_them=options.compile is not None)
    found = run([GPU[name] for name in options.layers], options.batch, (0.5, 0.3, 0.1), ("wide", "free"), variants)
    names = found.pop("names")
    print("\n".join(names) if options.names else "", file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
