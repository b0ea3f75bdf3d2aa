"""What the layers of a network cost on a machine, measured: microseconds at any density, from a few that were timed.

costs = CostTable.measure(model, (x,), threads=2)        # minutes at most; x has the batch size to be served
costs.save("costs.json")
pruner = Pruner(student, scope="cost", costs=costs, example_inputs=(x,))
pruner.prune_to(latency_us=80)
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import processor, timing
from ..backends import cpu
from ..checkpoint import fingerprint, write_atomically
from ..conversion import SPARSE_TYPES, Pattern, named_layers
from ..convert import densify, sparsify
from ..freeze import Plan, freeze
from ..freeze.call import Call, Example
from ..modes import uncompiled

DENSITIES = (0.05, 0.15, 0.3, 0.6)
ROUNDS = 7  # of timing whole networks, in turns
_FORMAT, _VERSION = "sparsekd-costs", 1


@dataclass(frozen=True)
class LayerCost:
    """One layer: microseconds by the dense layer, and by ours at rising densities."""

    pattern: str
    dense_us: float
    densities: tuple[float, ...]
    sparse_us: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.densities or list(self.densities) != sorted(set(self.densities)) or self.densities[0] <= 0:
            raise ValueError(f"sparsekd.LayerCost: densities must rise from above 0, got {self.densities}")
        if len(self.densities) != len(self.sparse_us) or min(self.dense_us, *self.sparse_us) < 0:
            raise ValueError(
                f"sparsekd.LayerCost: expected a time for each of {len(self.densities)} densities, got {self.sparse_us}"
            )

    def us(self, density: float) -> float:
        """Of the faster one: ours at this density, or the dense layer."""
        points = self.points()
        for (low, fast), (high, slow) in itertools.pairwise(points):
            if density <= high:
                return fast + (slow - fast) * max(density - low, 0.0) / (high - low)
        return self.dense_us

    def points(self) -> list[tuple[float, float]]:
        """(density, us) where the time bends, from density 0 to 1, where it is that of the dense layer: it never falls,
        and never passes that. Between two densities, and beyond the last, it is a line; below the first it stays what
        it was there."""
        pairs = [(0.0, 0.0), *zip(self.densities, self.sparse_us, strict=True)]
        pairs[0] = (0.0, pairs[1][1])
        if pairs[-1][0] < 1.0:
            (d0, us0), (d1, us1) = pairs[-2:]
            beyond = us1 + max(us1 - us0, 0.0) / (d1 - d0) * (1.0 - d1)
            pairs.append((1.0, max(beyond, self.dense_us)))
        points, slowest = [pairs[0]], pairs[0][1]
        for (d0, us0), (d1, us1) in itertools.pairwise(pairs):
            us0, us1 = max(us0, slowest), max(us1, slowest)
            if us0 < self.dense_us < us1:  # where ours is as slow as dense
                points.append((d0 + (d1 - d0) * (self.dense_us - us0) / (us1 - us0), self.dense_us))
            points.append((d1, us1))
            slowest = us1
        return [(density, min(us, self.dense_us)) for density, us in points]

    def slopes(self, least: float) -> list[tuple[float, float]]:
        """The greatest convex function below the time, from density ``least`` to 1: (up to this density, us for one
        more unit of density). It says what a unit is worth where time only falls after several have gone."""
        points = [(least, self.us(least)), *((d, us) for d, us in self.points() if d > least)]
        hull: list[tuple[float, float]] = []
        for point in points:
            while len(hull) > 1 and _slope(hull[-2], point) <= _slope(hull[-2], hull[-1]):
                hull.pop()
            hull.append(point)
        return [(after[0], _slope(before, after)) for before, after in itertools.pairwise(hull)]


@dataclass(frozen=True)
class CostTable:
    """Times of every layer of one network, and where they were taken.

    machine, isa: processor and instruction set. threads, batch, inputs: of the call that was timed, ``inputs`` the
    shapes. dtype: of the arithmetic, "float32", "bf16" or "int8"; weights: of the model. network: fingerprint of the
    model when dense. rest_us: all that is no layer of ours: pooling, additions, Python. layers: as they are among the
    others, not alone.
    """

    machine: str
    isa: str
    threads: int
    batch: int
    inputs: tuple[tuple[int, ...], ...]
    dtype: str
    weights: str
    network: str
    rest_us: float
    layers: Mapping[str, LayerCost]

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        example_inputs: Example,
        *,
        pattern: Pattern = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        densities: Sequence[float] = DENSITIES,
        threads: int | None = None,
        dtype: str | None = None,
        layer_ms: float = 20.0,
    ) -> CostTable:
        """Freeze copies of the model at each density, and read their plans.

        Args:
            model: dense or sparse, on the CPU; left as it is.
            example_inputs: of one call, as ``freeze`` takes them, with the batch size to be served.
            pattern, include, exclude: as in ``sparsify``.
            densities: those to time at, below 1; the dense network is timed too.
            threads, dtype, layer_ms: as in ``freeze``.

        Raises:
            RuntimeError: without compiled kernels, or if none of the layers could be timed.
        """
        if cpu.native is None:
            raise RuntimeError(f"sparsekd.CostTable.measure: there is nothing to measure: {cpu.missing}")
        call, inputs = Call.of(model.forward, example_inputs)
        example = call.example(inputs)
        dense = densify(copy.deepcopy(model)).eval()
        options: dict[str, Any] = {"threads": threads, "dtype": dtype, "layer_ms": layer_ms}
        plans: dict[float, Plan] = {}
        calls: dict[float, Callable[[], object]] = {}
        slices = 0
        # The sparsest first: it says in which memory format our kernels are to be timed, and on how many images.
        for density in (*sorted(densities), 1.0):
            sparse = dense
            if density < 1.0:
                with warnings.catch_warnings():
                    if plans:
                        warnings.simplefilter("ignore")  # said of the first copy
                    sparse = sparsify(copy.deepcopy(dense), pattern, density, include, exclude)
                named = named_layers(uncompiled(sparse), SPARSE_TYPES)
                patterns = {name: str(layer.pattern) for name, layer in named}
            frozen = freeze(sparse, example, **options)
            calls[density] = partial(call.calls(frozen), *inputs)
            plans[density] = _with_times(frozen.plan, sparse, example, options)
            slices = slices or plans[density].images
            options["memory_format"] = plans[density].memory_format
            if slices:
                plans[density] = _of_slices(sparse, call, inputs, slices, options)
        prefix = "" if uncompiled(dense) is dense else "_orig_mod."  # of the names in the model that was given
        layers = {f"{prefix}{name}": layer for name, layer in _layers(plans, patterns).items()}
        if not layers:
            raise RuntimeError(
                "sparsekd.CostTable.measure: none of the layers could be timed; print(sparsekd.freeze(model, inputs)"
                ".plan) says why"
            )
        whole = timing.medians(calls, 0.2 * len(calls), rounds=ROUNDS)
        rest_us, layers = _in_the_network(layers, {density: 1e6 * seconds for density, seconds in whole.items()})
        plan = frozen.plan
        return cls(
            machine=processor.name(),
            isa=plan.isa or "none",
            threads=plan.threads,
            batch=inputs[0].shape[0],
            inputs=tuple(tuple(x.shape) for x in inputs),
            dtype=dtype or _dtype_of(model),
            weights=_dtype_of(model),
            network=network_of(model),
            rest_us=rest_us,
            layers=layers,
        )

    @property
    def dense_us(self) -> float:
        """What the network takes before anything is pruned."""
        return self.rest_us + sum(layer.dense_us for layer in self.layers.values())

    def predict(self, model: nn.Module) -> float:
        """Microseconds of the frozen model at the densities that its layers have now."""
        self.check(model)
        sparse = {name: layer for name, layer in named_layers(model, SPARSE_TYPES)}
        densities = {name: sparse[name].density if name in sparse else 1.0 for name in self.layers}
        return self.rest_us + sum(self.layers[name].us(density) for name, density in densities.items())

    def check(self, model: nn.Module) -> None:
        """Raise ValueError unless this is a table of this network, in this dtype and these blocks."""
        for what, ours, theirs in (
            ("network", self.network, network_of(model)),
            ("dtype", self.weights, _dtype_of(model)),
        ):
            if ours != theirs:
                raise ValueError(
                    f"sparsekd.CostTable: expected the costs of this {what} ({theirs}), got a table of another "
                    f"({ours}); measure one: CostTable.measure(model, example_inputs)"
                )
        for name, layer in named_layers(model, SPARSE_TYPES):
            if name in self.layers and self.layers[name].pattern != str(layer.pattern):
                raise ValueError(
                    f"sparsekd.CostTable: layer {name!r} has blocks of {layer.pattern}, got the costs of "
                    f"{self.layers[name].pattern}; measure with pattern={layer.pattern!r}"
                )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, for other machines and later days."""
        fields = {**asdict(self), "layers": {name: asdict(layer) for name, layer in self.layers.items()}}
        text = json.dumps({"format": _FORMAT, "version": _VERSION, **fields}, indent=1)
        write_atomically(path, (text + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, of_this_machine: bool = True) -> CostTable:
        """Read what :meth:`save` wrote.

        Args:
            of_this_machine: refuse a table of another instruction set. False prunes for the machine of the table.

        Raises:
            FileNotFoundError, and ValueError for any other file, and for a table of another instruction set.
        """
        fields = _read(Path(path))
        table = cls(
            **{
                **fields,
                "inputs": tuple(tuple(shape) for shape in fields["inputs"]),
                "layers": {
                    name: LayerCost(
                        layer["pattern"], layer["dense_us"], tuple(layer["densities"]), tuple(layer["sparse_us"])
                    )
                    for name, layer in fields["layers"].items()
                },
            }
        )
        isa = None if cpu.native is None else cpu.native.isa()
        if of_this_machine and table.isa != isa:
            raise ValueError(
                f"sparsekd.CostTable.load: {path} holds times of {table.isa} on a {table.machine}, this machine has "
                f"{isa}; measure here, or prune for that machine with of_this_machine=False"
            )
        return table

    def __str__(self) -> str:
        return (
            f"CostTable({len(self.layers)} layers, {self.dense_us:.0f} us dense of which {self.rest_us:.0f} are no "
            f"layers; batch {self.batch}, {self.threads} threads, {self.dtype}, {self.isa} on {self.machine})"
        )


def network_of(model: nn.Module) -> str:
    """A short name for the shapes of the model when dense."""
    text = json.dumps(fingerprint(model), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _layers(plans: Mapping[float, Plan], patterns: Mapping[str, str]) -> dict[str, LayerCost]:
    """The layers that every plan has times of. The plan of density 1 is that of the dense network."""
    times = {density: {row.name: (row.dense_us, row.sparse_us) for row in plan} for density, plan in plans.items()}
    layers = {}
    for name, pattern in patterns.items():
        dense = [us for us in times[1.0].get(name, ()) if us is not None]  # torch's, and of ours that skips nothing
        ours = {d: of_layer[name][1] for d, of_layer in times.items() if d < 1.0 and name in of_layer}
        timed = {density: us for density, us in ours.items() if us is not None}
        if dense and len(timed) == len(plans) - 1:
            layers[name] = LayerCost(pattern, min(dense), tuple(timed), tuple(timed.values()))
    return layers


def _of_slices(
    model: nn.Module, call: Call, inputs: tuple[Tensor, ...], images: int, options: Mapping[str, Any]
) -> Plan:
    """The plan of the batch that a thread takes through a network at a time: its layers find their input in the cache,
    where those of the whole batch would wait for the memory."""
    few = call.example([x[:images] if x.dim() else x for x in inputs])
    options = {**options, "threads": 1}
    return _with_times(freeze(model, few, **options).plan, model, few, options)


def _with_times(plan: Plan, model: nn.Module, example_inputs: Example, options: Mapping[str, Any]) -> Plan:
    """The plan, or that of all our layers where the model as it is was faster: the whole network's time stays that of
    the faster one, and its layers are timed all the same."""
    return freeze(model, example_inputs, **options, min_gain=0.0).plan if plan.eager else plan


def _in_the_network(
    layers: Mapping[str, LayerCost], whole_us: Mapping[float, float]
) -> tuple[float, dict[str, LayerCost]]:
    """What the networks that were timed take beside their layers, and the layers as they are among the others.

    A layer alone finds its weights in the cache and wakes the threads by itself; a batch is shared out. All of that is
    a factor near one (of slices: their number) and changes slowly with density. So the time of a network is fitted by a
    constant and a factor, and what the fit leaves at each density goes to the layers of that density: at equal
    densities the prediction is the time that was measured.
    """
    alone = {density: sum(layer.us(density) for layer in layers.values()) for density in whole_us}
    least = min(whole_us.values())
    rest = min(max(_intercept([(alone[d], us) for d, us in whole_us.items()]), 0.0), 0.9 * least)
    factors = {density: (us - rest) / max(alone[density], 1e-9) for density, us in whole_us.items()}
    among = {
        name: LayerCost(
            layer.pattern,
            factors[1.0] * layer.dense_us,
            layer.densities,
            tuple(factors[density] * us for density, us in zip(layer.densities, layer.sparse_us, strict=True)),
        )
        for name, layer in layers.items()
    }
    return rest, among


def _intercept(points: Sequence[tuple[float, float]]) -> float:
    """Of the line through (x, y) of least squares of relative errors."""
    weights = [1.0 / max(y, 1e-9) ** 2 for _, y in points]
    total = sum(weights)
    x0 = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    y0 = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    spread = sum(w * (x - x0) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    slope = sum(w * (x - x0) * (y - y0) for w, (x, y) in zip(weights, points, strict=True)) / max(spread, 1e-12)
    return y0 - slope * x0


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"sparsekd.CostTable.load: {path} does not exist; give the path of a saved table")
    try:
        fields = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"sparsekd.CostTable.load: {path} is no JSON ({error}); measure the table again") from error
    if not isinstance(fields, dict) or fields.pop("format", None) != _FORMAT:
        raise ValueError(f"sparsekd.CostTable.load: {path} is no table of costs; CostTable.save writes one")
    if fields.pop("version") > _VERSION:
        raise ValueError(f"sparsekd.CostTable.load: {path} was written by a later sparsekd; upgrade it")
    return fields


def _dtype_of(model: nn.Module) -> str:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    return str(dtype).removeprefix("torch.")


def _slope(before: tuple[float, float], after: tuple[float, float]) -> float:
    return (after[1] - before[1]) / max(after[0] - before[0], 1e-12)


class Timed:
    """The meter of a cost table: microseconds of the whole network."""

    unit = "latency_us"

    def __init__(self, table: CostTable, model: nn.Module, layers: Sequence[Any], floor: float) -> None:
        table.check(model)
        for units in layers:
            if units.name not in table.layers:
                raise ValueError(
                    f"sparsekd.CostTable: layer {units.name!r} has no times: freeze found no way to run it alone; "
                    f"leave it dense with exclude=[{units.name!r}]"
                )
        self.table, self._floor = table, floor
        self._others = table.predict(model) - sum(self.us(units, units.num_kept) for units in layers)
        self.dense = self._others + sum(table.layers[units.name].dense_us for units in layers)

    def us(self, units: Any, kept: float) -> float:
        return self.table.layers[units.name].us(kept / units.num_weights)

    def total(self, layers: Sequence[Any]) -> float:
        return self.after(layers, [units.num_kept for units in layers])

    def after(self, layers: Sequence[Any], kept: Sequence[float]) -> float:
        """With so many weights kept in each layer."""
        return self._others + sum(self.us(units, count) for units, count in zip(layers, kept, strict=True))

    def grain(self, layers: Sequence[Any]) -> float:
        """Microseconds that are no difference."""
        return 1e-3 * self.dense

    def gains(self, units: Any, kept: float) -> bool:
        """Whether the layer is faster with so many weights than dense."""
        return self.us(units, kept) < self.table.layers[units.name].dense_us

    def marginal(self, units: Any, entries: Any, scores: Tensor, kept: int = 0) -> Tensor:
        """``[units]``: what each unit adds if those of higher ``scores`` are there, and ``kept`` weights beside."""
        sizes = entries.unit_sizes()
        strongest_first = scores.argsort(descending=True, stable=True)
        kept_with = (kept + sizes[strongest_first].cumsum(0)).double() / units.num_weights
        slopes = self.table.layers[units.name].slopes(self._floor)
        ends = torch.tensor([end for end, _ in slopes], dtype=torch.float64)
        each = torch.tensor([slope for _, slope in slopes], dtype=torch.float64)
        segment = torch.searchsorted(ends, kept_with - 1e-9).clamp(max=len(slopes) - 1)
        costs = torch.empty(len(sizes), dtype=torch.float64)
        costs[strongest_first] = each[segment] * sizes[strongest_first] / units.num_weights
        return costs


__all__ = ["DENSITIES", "CostTable", "LayerCost", "Timed", "network_of"]
