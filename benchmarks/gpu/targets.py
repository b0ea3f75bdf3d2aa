"""What is aimed at on an H100 or H200 in bfloat16, against cuDNN: speed-ups of layers, and where they hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from benchmarks.gpu.layers import ACCEPTANCE
from benchmarks.lib.shapes import GPU

BATCH = 256


class Target(NamedTuple):
    """A geometric mean over the layers of `meant`."""

    direction: str
    mask: str  # of common.MASKS
    density: float
    speedup: float


_LAYERS = {
    ("forward", "wide"): (1.6, 2.6, 6.0),
    ("forward", "free"): (1.1, 1.7, 3.5),
    ("grad_input", "wide"): (1.4, 2.2, 4.5),
    ("grad_values", "wide"): (1.4, 2.2, 4.5),
}
TARGETS = [
    Target(*case, density, speedup)
    for case, speedups in _LAYERS.items()
    for density, speedup in zip((0.5, 0.3, 0.1), speedups, strict=True)
]


def meant(name: str) -> bool:
    """Whether the targets are for a layer: a 3x3 of at least 256 channels on both sides, of those measured first."""
    layer = GPU.get(name)
    return name in ACCEPTANCE and layer is not None and layer.kernel == 3 and min(layer.weight[:2]) >= 256


def of(target: Target, rows: Iterable[Mapping[str, Any]], speedup: str) -> tuple[float, int]:
    """(geometric mean of the column ``speedup``, number of layers) of the rows that a target is held against."""
    some = [
        row[speedup]
        for row in rows
        if (row["direction"], row["mask"], row["density"], row["batch"]) == (*target[:3], BATCH) and meant(row["layer"])
    ]
    return (geometric(some) if some else math.nan), len(some)


def geometric(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))
