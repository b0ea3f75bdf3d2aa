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
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekd.kernels.index import Weight
from sparsekd.kernels.tiles import Tile

from ...timing import medians
from .device import cudnn_searches
from .recent import Recent

GAIN = 0.98  # a choice must take at most this share of the dense time
GUESSES_KEPT = 4096  # of problems: sequences may come in thousands of lengths
SECONDS = 0.03  # of measuring one candidate
# How far a candidate may be from dense, relative to the largest output: both round, and add in their own order.
TOLERANCES = {"half": 2e-2, "tf32": 1e-2, "ieee": 1e-4}


class Choice(NamedTuple):
    """``kernel`` is "triton" (with a tile), "dense", or "compact": dense without the channels no block touches."""

    kernel: str
    tile: Tile | None = None

    def __str__(self) -> str:
        return self.kernel if self.tile is None else f"{self.kernel} {self.tile}"


DENSE, COMPACT = Choice("dense"), Choice("compact")


class Problem(NamedTuple):
    """What a choice depends on. ``density`` and ``fill`` are rounded, so that it outlives small changes of the mask.

    fill: the share of a wide tile's multiplications that are not by zero. Masks of one density differ in it: 1.0 where
    the rows of a tile keep the same blocks, little more than the density where each row keeps its own.
    """

    direction: str  # forward, grad_input, grad_values
    dtype: str
    family: str
    images: int
    image: tuple[int, int]
    weight: Weight
    density: float
    fill: float = 1.0

    def key(self) -> str:
        w = self.weight
        pairs = "x".join(map(str, self.image)), *("x".join(map(str, pair)) for pair in w[4:8])
        sizes = (
            self.images,
            w.rows,
            w.cols,
            f"{w.bh}x{w.bw}",
            w.groups,
            *pairs,
            f"{self.density:.2f}",
            f"{self.fill:.1f}",
        )
        return " ".join(map(str, (self.direction, self.dtype, self.family, *sizes)))


@dataclass
class Measured:
    """A choice, its microseconds, those of the dense path, and those of every candidate by its name.

    dropped: candidates that failed, or computed something else than dense, and why.
    """

    choice: Choice
    microseconds: float
    dense_microseconds: float
    candidates: dict[str, float]
    dropped: dict[str, str] = field(default_factory=dict)


class Plan:
    """The choices of one device. Reads its file once; ``save`` merges with what others wrote meanwhile."""

    def __init__(self, device: str, path: Path | None = None) -> None:
        self.device = device
        self.path = path or default_path()
        self.measured: dict[str, Measured] = _read(self.path).get(device, {})
        self.guessed = Recent(GUESSES_KEPT)

    def choose(self, problem: Problem, guess: Callable[[], Choice]) -> Choice:
        key = problem.key()
        if key in self.measured:
            return self.measured[key].choice
        if key not in self.guessed:
            self.guessed[key] = guess()
        return self.guessed[key]

    def measure(
        self, problem: Problem, choices: Sequence[Choice], run: Callable[[Choice], Tensor], device: torch.device
    ) -> Choice:
        """Time every choice (the first is dense) in turns, keep the fastest that beats dense, remember it.

        A candidate that fails, or whose result is not dense's, is dropped by name, with a warning.
        """
        key = problem.key()
        if key not in self.measured:
            dense, *others = choices
            dropped = wrong(dense, others, run, TOLERANCES[problem.family])
            for name, why in dropped.items():
                warnings.warn(f"sparsekd: {name} is left out of {key}: {why}", stacklevel=2)
            sound = [dense, *(choice for choice in others if str(choice) not in dropped)]
            calls = {choice: partial(run, choice) for choice in sound}
            taken = medians(calls, SECONDS * len(calls), device=device)
            times = {choice: round(1e6 * seconds, 2) for choice, seconds in taken.items()}
            fastest = min(times, key=times.__getitem__)
            if times[fastest] > GAIN * times[dense]:
                fastest = dense
            named = {str(choice): time for choice, time in times.items()}
            self.measured[key] = Measured(fastest, times[fastest], times[dense], named, dropped)
        if _measuring is not None:
            _measuring.append(self.measured[key])
        return self.measured[key].choice

    def save(self) -> None:
        """Write the file whole, through a temporary one: a reader never sees half of it."""
        everything = _rows(self.path)  # as they are: another version's too
        everything.setdefault(self.device, {}).update(_to_json(self.measured))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(everything, indent=1)
        with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as file:
            file.write(text)
        os.replace(file.name, self.path)


def wrong(dense: Choice, others: Sequence[Choice], run: Callable[[Choice], Tensor], tolerance: float) -> dict[str, str]:
    """Name -> reason of the candidates that cannot be used. What dense raises passes through."""
    want = run(dense).clone()  # an op may write all its results to one place
    found = {}
    for choice in others:
        try:
            why = difference(run(choice), want, tolerance)
        except Exception as error:  # whatever a compiler or a launch raises: the others may still run
            why = f"{type(error).__name__}: {error}".splitlines()[0]
        if why:
            found[str(choice)] = why
    return found


def tolerance_of(dtype: torch.dtype) -> float:
    """As TOLERANCES, for results of libraries that choose how they multiply float32."""
    half = dtype in (torch.float16, torch.bfloat16)
    return TOLERANCES["half"] if half else TOLERANCES["tf32"] if dtype == torch.float32 else 1e-6


def difference(got: Tensor, want: Tensor, tolerance: float) -> str:
    """What is wrong with a result, or ""."""
    if not want.numel():
        return ""
    got, want = got.float(), want.float()
    same = (got == want) | (got.isnan() & want.isnan())
    largest = want.nan_to_num(0.0, 0.0, 0.0).abs().max()
    error = torch.where(same, 0.0, (got - want).abs()).max() / largest.clamp_min(torch.finfo(torch.float32).tiny)
    share = error.item()
    return "" if share <= tolerance else f"it differs from dense by {share:.2g} of the largest value"


def default_path() -> Path:
    """``$SPARSEKD_PLAN``, else ``sparsekd/plan.json`` in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("SPARSEKD_PLAN") or cache / "sparsekd" / "plan.json")


def device_key(device: torch.device) -> str:
    """Device and versions: a choice measured with other ones says little."""
    import triton

    return f"{torch.cuda.get_device_name(device)}; torch {torch.__version__}; triton {triton.__version__}"


_measuring: list[Measured] | None = None


def is_measuring() -> bool:
    return _measuring is not None


@contextmanager
def measuring() -> Iterator[list[Measured]]:
    """Inside, a layer that has no measured choice is timed with every candidate before it runs.

    cuDNN's own search is on meanwhile, for every path: what we compare with is the best that it has. Yields what is
    found out, one entry for each op that runs.
    """
    global _measuring
    before, _measuring = _measuring, []
    try:
        with cudnn_searches():
            yield _measuring
    finally:
        _measuring = before


def _rows(path: Path) -> dict[str, dict[str, dict]]:
    """Device -> problem -> row of the file, read as far as JSON goes."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        return {device: dict(rows.items()) for device, rows in found.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise _no_plan(path, error) from error


def _read(path: Path) -> dict[str, dict[str, Measured]]:
    """Device -> problem -> what was measured, but for tiles that another version of sparsekd describes otherwise."""
    stored = _rows(path)
    try:
        found = {
            device: {key: _from_json(row) for key, row in rows.items() if _is_of_this_version(row)}
            for device, rows in stored.items()
        }
    except (TypeError, KeyError) as error:
        raise _no_plan(path, error) from error
    if ignored := sum(map(len, stored.values())) - sum(map(len, found.values())):
        warnings.warn(
            f"sparsekd: {path} holds {ignored} choices of another version of sparsekd, which are ignored; "
            "backends.cuda.prewarm measures these layers anew",
            stacklevel=3,
        )
    return found


def _is_of_this_version(row: dict) -> bool:
    return row["tile"] is None or set(row["tile"]) == set(Tile._fields)


def _no_plan(path: Path, error: Exception) -> RuntimeError:
    return RuntimeError(f"sparsekd: {path} is no plan file ({error}); delete it, and it is measured anew")


def _to_json(measured: dict[str, Measured]) -> dict[str, dict]:
    return {
        key: {
            "kernel": row.choice.kernel,
            "tile": None if row.choice.tile is None else row.choice.tile._asdict(),
            "microseconds": row.microseconds,
            "dense_microseconds": row.dense_microseconds,
            "candidates": row.candidates,
            "dropped": row.dropped,
        }
        for key, row in sorted(measured.items())
    }


def _from_json(row: dict) -> Measured:
    tile = None if row["tile"] is None else Tile(**row["tile"])
    times = row["microseconds"], row["dense_microseconds"], row["candidates"]
    return Measured(Choice(row["kernel"], tile), *times, row.get("dropped", {}))
