"""Which kernel runs a layer in a direction: the fastest that was measured, else the one the cost model prefers.

    with measuring():                  # the pre-warm call: time every candidate of every layer that runs
        model(x).sum().backward()

Measured choices go to one JSON file, keyed by device, versions, shape and density, so a machine measures once. Dense
is left only for what is at least 2 % faster than it: sparsity never costs speed. Nothing is measured outside
``measuring``, so ranks of a distributed run cannot wait for each other's timings.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ._index import Weight
from ._tiles import Tile

GAIN = 0.98  # a choice must take at most this share of the dense time
ROUNDS = 15


class Choice(NamedTuple):
    """``kernel`` is "triton" (with a tile), "dense", or "compact": dense without the channels no block touches."""

    kernel: str
    tile: Tile | None = None

    def __str__(self) -> str:
        return self.kernel if self.tile is None else f"{self.kernel} {self.tile}"


DENSE, COMPACT = Choice("dense"), Choice("compact")


class Problem(NamedTuple):
    """What a choice depends on. ``density`` is rounded to 5 %, so that it outlives small changes of the mask."""

    direction: str  # forward, grad_input, grad_values
    dtype: str
    family: str
    images: int
    image: tuple[int, int]
    weight: Weight
    density: float

    def key(self) -> str:
        w = self.weight
        pairs = "x".join(map(str, self.image)), *("x".join(map(str, pair)) for pair in w[4:8])
        sizes = (self.images, w.rows, w.cols, f"{w.bh}x{w.bw}", w.groups, *pairs, f"{self.density:.2f}")
        return " ".join(map(str, (self.direction, self.dtype, self.family, *sizes)))


@dataclass
class Measured:
    """A choice, its microseconds, those of the dense path, and those of every candidate by its name."""

    choice: Choice
    microseconds: float
    dense_microseconds: float
    candidates: dict[str, float]


class Plan:
    """The choices of one device. Reads its file once; ``save`` merges with what others wrote meanwhile."""

    def __init__(self, device: str, path: Path | None = None) -> None:
        self.device = device
        self.path = path or default_path()
        self.measured: dict[str, Measured] = _read(self.path).get(device, {})
        self.guessed: dict[str, Choice] = {}

    def choose(self, problem: Problem, guess: Callable[[], Choice]) -> Choice:
        key = problem.key()
        if key in self.measured:
            return self.measured[key].choice
        if key not in self.guessed:
            self.guessed[key] = guess()
        return self.guessed[key]

    def measure(self, problem: Problem, choices: Sequence[Choice], run: Callable[[Choice], Tensor]) -> Choice:
        """Time every choice (the first is dense) in turns, keep the fastest that beats dense, remember it."""
        key = problem.key()
        if key not in self.measured:
            times = dict(zip(choices, gpu_medians([partial(run, choice) for choice in choices]), strict=True))
            dense = times[choices[0]]
            fastest = min(times, key=times.__getitem__)
            if times[fastest] > GAIN * dense:
                fastest = choices[0]
            named = {str(choice): round(time, 2) for choice, time in times.items()}
            self.measured[key] = Measured(fastest, round(times[fastest], 2), round(dense, 2), named)
        if _measuring is not None:
            _measuring.append(self.measured[key])
        return self.measured[key].choice

    def save(self) -> None:
        """Write the file whole, through a temporary one: a reader never sees half of it."""
        everything = _read(self.path)
        everything.setdefault(self.device, {}).update(self.measured)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({device: _to_json(found) for device, found in everything.items()}, indent=1)
        with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as file:
            file.write(text)
        os.replace(file.name, self.path)


def default_path() -> Path:
    """``$SPARSEKD_PLAN``, else ``sparsekd/plan.json`` in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("SPARSEKD_PLAN") or cache / "sparsekd" / "plan.json")


def device_key(device: torch.device) -> str:
    """Device and versions: a choice measured with other ones says little."""
    import triton

    return f"{torch.cuda.get_device_name(device)}; torch {torch.__version__}; triton {triton.__version__}"


def gpu_medians(functions: Sequence[Callable[[], object]]) -> list[float]:
    """Median microseconds of each function on the current CUDA stream, called in turns."""
    for fn in functions:
        for _ in range(3):
            fn()
    events = [
        [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in functions]
        for _ in range(ROUNDS)
    ]
    for turn in events:
        for (begin, end), fn in zip(turn, functions, strict=True):
            begin.record()
            fn()
            end.record()
    torch.cuda.synchronize()
    times = [[begin.elapsed_time(end) * 1e3 for begin, end in turn] for turn in events]
    return [sorted(column)[ROUNDS // 2] for column in zip(*times, strict=True)]


_measuring: list[Measured] | None = None


def is_measuring() -> bool:
    return _measuring is not None


@contextmanager
def measuring() -> Iterator[list[Measured]]:
    """Inside, a layer that has no measured choice is timed with every candidate before it runs.

    Yields what is found out, one entry for each op that runs.
    """
    global _measuring
    before, _measuring = _measuring, []
    try:
        yield _measuring
    finally:
        _measuring = before


def _read(path: Path) -> dict[str, dict[str, Measured]]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        return {device: {key: _from_json(row) for key, row in rows.items()} for device, rows in found.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RuntimeError(f"sparsekd: {path} is no plan file ({error}); delete it, and it is measured anew") from error


def _to_json(measured: dict[str, Measured]) -> dict[str, dict]:
    return {
        key: {
            "kernel": row.choice.kernel,
            "tile": None if row.choice.tile is None else row.choice.tile._asdict(),
            "microseconds": row.microseconds,
            "dense_microseconds": row.dense_microseconds,
            "candidates": row.candidates,
        }
        for key, row in sorted(measured.items())
    }


def _from_json(row: dict) -> Measured:
    tile = None if row["tile"] is None else Tile(**row["tile"])
    return Measured(Choice(row["kernel"], tile), row["microseconds"], row["dense_microseconds"], row["candidates"])
