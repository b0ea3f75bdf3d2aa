"""Every launch of the acceptance layers through the real dispatch, for a GPU that is not there.

    python -m benchmarks.gpu.dry_run                    # counts variants and launches, times the host; compiles nothing
    python -m benchmarks.gpu.dry_run --steps all        # and what else the steps of `gpu.run` launch (asked.py)
    python -m benchmarks.gpu.dry_run --ask FILE         # writes the variants as a list, which `gpu/cache.py` compiles
    python -m benchmarks.gpu.dry_run --compile DIR      # compiles the variants into DIR, a cache to bring along

Activations are meta tensors, the driver says that it is an sm_90, and a launch does nothing. What is counted is what a
GPU would be asked to compile; what is timed is what Python does before a launch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from unittest import mock

import torch

from benchmarks.gpu import asked, cache, common
from benchmarks.gpu.layers import ACCEPTANCE
from benchmarks.lib.shapes import GPU, Conv
from sparsekd import BlockPattern, timing

CAPABILITY = 90
T = TypeVar("T")


class StubKernel:
    """What the compiler would return; a launch of it does nothing, but that it may be recorded."""

    launches: list[tuple[Any, ...]] | None = None

    function = 0
    packed_metadata = ()

    def __init__(self) -> None:
        self.run = self._run

    @staticmethod
    def _run(*arguments: Any) -> None:
        if StubKernel.launches is not None:
            StubKernel.launches.append(arguments)

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
    """What the compiler was asked for, and how much of it was not in the cache yet."""

    def __init__(self, compile_them: bool) -> None:
        import triton

        self.asked: list[str] = []
        self.variants: dict[str, dict[str, Any]] = {}  # by what they are called in the cache
        self.compiled = 0
        self._compile = triton.compiler.compile if compile_them else None

    def __call__(self, source: Any, target: Any = None, options: Any = None, **more: Any) -> Any:
        constants = {"x".join(map(str, place)): value for place, value in source.constants.items()}
        self.asked.append(f"{source.fn.__name__} {source.signature} {constants} {options['num_warps']}")
        self.variants[cache.key_of(source, target, options)] = cache.to_json(source, options)
        if self._compile is None:
            return StubKernel()
        began = time.time()
        kernel = self._compile(source, target=target, options=options, **more)
        self.compiled += any(os.stat(path).st_mtime >= began - 1e-2 for path in kernel.metadata_group.values())
        return kernel


def install(compile_them: bool = False) -> Variants:
    """Put the fake driver and the counting compiler in Triton's place; the kernels must not be interpreted."""
    import triton

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("dry_run: TRITON_INTERPRET=1 interprets the kernels; unset it")
    variants = Variants(compile_them)
    triton.compiler.compile = variants
    triton.runtime.driver.set_active(FakeDriver())
    return variants


class Case(NamedTuple):
    layer: Conv
    density: float
    mask: str
    preset: bool = False  # blocks as users get them, else 64x64 where the channels allow it


def cases(layers: Iterable[Conv], densities: Sequence[float], masks: Sequence[str]) -> list[Case]:
    """Each layer at each density and mask; one wide mask and one free one with the preset's blocks, too."""
    layers = list(layers)
    found = [Case(*case) for case in itertools.product(layers, densities, masks)]
    return found + [Case(layer, 0.3, mask, preset=True) for layer in layers for mask in masks]


def calls(some: Iterable[Case], batch: int) -> Iterator[Callable[[], object]]:
    """The three directions of each case."""
    for layer, density, kind, preset in some:
        pattern = BlockPattern.for_device("cuda") if preset else common.pattern_for(layer, torch.device("cuda"))
        yield from asked.directions(layer, batch, asked.blocks_of(layer, pattern, density, kind))


@contextmanager
def planned(fewest: bool) -> Iterator[None]:
    """Inside, the planner launches each candidate once and believes that they are right, the later ones slower.

    fewest: the model's favourite alone, not every candidate.
    """
    from sparsekd.backends.cuda import choose, plan

    def launched(choices: Mapping[Any, Callable[[], object]], *_: Any, **__: Any) -> dict[Any, float]:
        for choice, call in choices.items():
            if choice.tile is not None:
                call()
        return {choice: 1.0 / (1 + place) for place, choice in enumerate(choices)}

    nothing_wrong: dict[str, str] = {}
    medians = mock.patch.object(plan, "medians", launched)
    wrong = mock.patch.object(plan, "wrong", lambda *_: nothing_wrong)
    timed = mock.patch.object(choose, "MOST_TIMED", 1 if fewest else choose.MOST_TIMED)
    with medians, wrong, timed, plan.measuring():
        yield


def run(some: Sequence[Case], batch: int, fewest: bool, variants: Variants) -> dict[str, Any]:
    """Each op measured as the planner would, then run again: variants, what the last run compiles, its time."""
    made = list(calls(some, batch))
    with planned(fewest):
        for call in made:
            call()
    count = len(variants.asked)
    for call in made:
        call()
    return {
        "ops": len(made),
        "variants": count,
        "compiled": variants.compiled,
        "compiled_in_the_steady_state": len(variants.asked) - count,
        "launched_otherwise": launched_otherwise(made),
        "launch_us": host_us(made),
        "triton_launch_us": _by_triton(host_us, made),
        "launch_calls": host_calls(made),
        "triton_launch_calls": _by_triton(host_calls, made),
    }


def run_steps(steps: Sequence[str], variants: Variants) -> dict[str, int]:
    """Variants that each of these steps asks for anew, in turn."""
    found = {}
    for step in steps:
        before = len(variants.variants)
        with planned(fewest=False), asked.on_meta():
            for call in asked.STEPS[step]():
                call()
        found[step] = len(variants.variants) - before
    return found


def launched_otherwise(made: Sequence[Callable[[], object]]) -> int:
    """Calls whose ready launches get other arguments than Triton's own of the same call would."""

    def launches(call: Callable[[], object]) -> list[list[Any]]:
        with mock.patch.object(StubKernel, "launches", []):
            call()
            # But for what is for profilers alone: metadata, and the hooks before and after.
            return [[_told(one) for one in (*got[:6], *got[9:])] for got in StubKernel.launches or ()]

    by_triton = [_by_triton(launches, call) for call in made]
    return sum(not ours or ours != theirs for ours, theirs in zip(map(launches, made), by_triton, strict=True))


def _told(argument: Any) -> Any:
    """What tells an argument from others: of a tensor, which may be made anew, its place in memory and its form."""
    if isinstance(argument, torch.Tensor):
        return argument.shape, argument.stride(), argument.dtype, argument.device, argument.data_ptr()
    return argument


def host_us(made: Sequence[Callable[[], object]]) -> float:
    """Microseconds of the host for a call: the median of the calls, each at its quietest."""
    quietest = []
    for call in made:
        taken = timing.samples({"launch": call}, 0.0, rounds=10, clock=time.thread_time)["launch"]
        quietest.append(1e6 * min(taken))
    return round(statistics.median(quietest), 1)


def host_calls(made: Sequence[Callable[[], object]]) -> dict[str, int]:
    """Functions that the interpreter calls, of Python and of C, in one call of each direction: the most of all cases.

    What the time of a launch is made of, and the same on a machine that does other things beside.
    """
    counted: list[int] = []

    def count(frame: Any, event: str, argument: Any) -> None:
        counted[-1] += event in ("call", "c_call")

    for call in made:
        counted.append(0)
        sys.setprofile(count)
        try:
            call()
        finally:
            sys.setprofile(None)
    each = len(common.DIRECTIONS)
    return {direction: max(counted[place::each]) for place, direction in enumerate(common.DIRECTIONS)}


def _by_triton(measure: Callable[[Any], T], made: Any) -> T:
    """The same with each launch by Triton itself: what `kernels/launch.py` is there for."""
    from sparsekd.kernels import launch

    with mock.patch.object(launch, "is_watched", lambda: True):
        return measure(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", metavar="DIR", help="compile the variants into this cache")
    parser.add_argument("--ask", metavar="FILE", type=Path, help="write the variants for `gpu/cache.py`")
    parser.add_argument("--layers", nargs="*", default=list(ACCEPTANCE), choices=list(GPU))
    parser.add_argument("--density", type=float, nargs="*", default=[0.5, 0.3, 0.1])
    parser.add_argument("--mask", nargs="*", default=["wide", "free"], choices=common.MASKS)
    parser.add_argument("--steps", nargs="*", default=[], choices=[*asked.STEPS, "all"], help="of gpu.run")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--fewest", action="store_true", help="the favourite of the cost model, not every candidate")
    parser.add_argument("--names", action="store_true", help="print each variant")
    options = parser.parse_args()
    if options.compile:
        os.environ["TRITON_CACHE_DIR"] = options.compile
    os.environ["SPARSEKD_PLAN"] = os.devnull + ".json"  # nothing is known, and nothing is kept
    variants = install(compile_them=options.compile is not None)
    some = cases([GPU[name] for name in options.layers], options.density, options.mask)
    found = run(some, options.batch, options.fewest, variants)
    if options.steps:
        found["steps"] = run_steps(list(asked.STEPS) if "all" in options.steps else options.steps, variants)
    if options.ask:
        wanted = {
            "capability": CAPABILITY,
            "keys": list(variants.variants),
            "variants": list(variants.variants.values()),
        }
        options.ask.write_text(json.dumps(wanted, indent=1) + "\n")
    if options.names:
        print("\n".join(sorted(set(variants.asked))), file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
