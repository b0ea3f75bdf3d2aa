"""Several ways to do one piece of work, timed against each other: what the throughput and power suites run.

A `Case` is one piece of work on one device, a `Contest` the same once built, its outputs compared. All contestants of
a case are measured together in alternating windows (`sparsekd.energy.compare`), and each then reports its own samples
to pytest-benchmark. So a ratio never compares two moments of a busy machine, and `-k ours` still measures the baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsekd import energy


@dataclass(frozen=True)
class Setup:
    """What the command line asked for; see `conftest.py`."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    quick: bool = False
    densities: tuple[float, ...] = (0.5, 0.3, 0.1)
    batches: tuple[int, ...] = (1, 64, 512)
    layers: tuple[str, ...] = ()
    layer_batches: tuple[int, ...] = ()  # of --model, too
    model: str | None = None
    input_shapes: tuple[tuple[int, ...], ...] = ()  # of --model, without the batch
    exclude: tuple[str, ...] = ()
    compile: bool = False


@dataclass
class Contest:
    """Calls by contestant, the first of the case's names being the baseline.

    absent  why a contestant cannot run here. info  what else to keep about one, into `extra_info` (json-able).
    """

    calls: Mapping[str, Callable[[], Any]]
    absent: dict[str, str] = field(default_factory=dict)
    info: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """`build` makes the contest and raises RuntimeError where the contestants do not compute the same."""

    id: str
    names: tuple[str, ...]
    build: Callable[[], Contest]


@dataclass(frozen=True)
class Pace:
    """How long to measure: seconds of a window, of warm-up, and how many windows of each contestant."""

    seconds: float
    warmup: float
    rounds: int


def agree(what: str, got: Tensor, expected: Tensor, limit: float | None = None) -> None:
    """Raise RuntimeError unless two results are equal up to the rounding of their device and dtype, or up to `limit`
    of the largest entry."""
    scale = expected.abs().max().item() or 1.0
    difference = (got - expected).abs().max().item() / scale
    # Convolutions on CUDA round their inputs to TF32 (10 bits) by default; sums in float32 keep 1e-4 on the CPU.
    coarse = expected.is_cuda or expected.dtype in (torch.float16, torch.bfloat16)
    limit = limit or (1e-2 if coarse else 1e-4)
    if not (got.shape == expected.shape and difference <= limit):  # NaN is unequal
        raise RuntimeError(
            f"benchmarks: {what} differs from its peer by {difference:.2g} of the maximum (limit {limit:g}): "
            "nothing is timed that does not compute the same"
        )


def measure(contest: Contest, names: Sequence[str], pace: Pace, meter: energy.EnergyMeter) -> energy.Comparison:
    """Windows of all contestants in turns."""
    calls = {name: contest.calls[name] for name in names if name in contest.calls}
    return energy.compare(calls, seconds=pace.seconds, warmup=pace.warmup, rounds=pace.rounds, meter=meter)


def seconds_info(found: energy.Comparison, name: str) -> dict[str, Any]:
    """`extra_info` of both suites. speedup is baseline seconds / own seconds, median over rounds with its interval."""
    measured = found.measurements[name]
    alone = len(found.measurements) == 1
    info: dict[str, Any] = {"baseline": None if alone else found.baseline, "warning": measured.warning}
    if name != found.baseline:
        ratio = found.seconds_ratio[name]
        info |= {"speedup": 1 / ratio.value, "speedup_low": 1 / ratio.high, "speedup_high": 1 / ratio.low}
        info["confidence"] = ratio.confidence
    return info


def energy_info(found: energy.Comparison, name: str) -> dict[str, Any]:
    """What the power suite adds: joules of a call, watts, the counter; joules_ratio is own / baseline."""
    measured = found.measurements[name]
    info: dict[str, Any] = {
        "joules": measured.joules_per_call,
        "watts": measured.watts,
        "source": measured.source,
        "ticks": measured.ticks,
        "idle_subtracted": measured.idle_subtracted,
        "round_joules": measured.round_joules,
    }
    ratio = found.joules_ratio.get(name)
    if ratio is not None:
        info |= {"joules_ratio": ratio.value, "joules_ratio_low": ratio.low, "joules_ratio_high": ratio.high}
    return info


class Replay:
    """A timer for `benchmark.pedantic` that gives samples which were measured in turns with the other contestants'."""

    __name__ = "interleaved_windows"
    __module__ = "benchmarks"

    def __init__(self) -> None:
        self._times: Iterator[float] = iter(())

    def load(self, samples: Sequence[float]) -> None:
        """Every pair of calls from now on is one sample apart."""
        self._times = iter([time for sample in samples for time in (0.0, sample)])

    def __call__(self) -> float:
        return next(self._times)


replay = Replay()


def report(benchmark: Any, samples: Sequence[float]) -> None:
    """Hand seconds per call, one sample for each window, to pytest-benchmark."""
    replay.load(samples)
    benchmark.pedantic(_nothing, rounds=max(len(samples), 1))


def _nothing() -> None:
    pass


def contest_of_gradients(
    setup: Setup, results: dict[str, Callable[[], Tensor]], wanted: Sequence[Tensor], gradient: Tensor | None = None
) -> Contest:
    """A result and its gradients, compared with those of the first; `gradient` is that of a result of many numbers."""
    if setup.compile:
        results["compiled"] = torch.compile(results["ours"])
    calls = {name: partial(_gradients, result, wanted, gradient) for name, result in results.items()}
    first, *others = calls
    expected = calls[first]()
    for name in others:
        agree(f"result of {name}", results[name]().detach(), results[first]().detach())
        # Together: the gradient of a bias before a batch norm is rounding and nothing else.
        agree(f"gradient of {name}", _flat(calls[name]()), _flat(expected))
    return Contest(calls)


def _gradients(result: Callable[[], Tensor], wanted: Sequence[Tensor], gradient: Tensor | None) -> tuple[Tensor, ...]:
    return torch.autograd.grad(result(), wanted, gradient)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
