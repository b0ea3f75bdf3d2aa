"""What was found in a network, measured and chosen: tables for people, JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..ops.conv2d import Geometry as Walk
from ..ops.conv_transpose2d import output_size as transposed_size


@dataclass(frozen=True)
class Geometry:
    """One frozen call ``act(conv(pad(x)) + bias + residual)``; sizes as torch names them.

    kind: "conv2d", "conv_transpose2d", "linear", "norm" (a batch norm that no layer takes in), of pooling "max" or
    "mean", or what stands between layers: "gate" (``x * gate``, a number for each channel of a sample), "cat" (of
    channels), "layer_norm". input: shape in the example, batch included. weight: ``[K, C/groups, R, S]`` (transposed:
    ``[C, K/groups, R, S]``), ``[out, in]`` or ``[C]``; pooling has the shape of a depthwise one, a concatenation the
    channels of each operand. pad: an explicit ``F.pad`` of mode ``pad_mode`` before the op, or None. flat: the output
    is ``[N, C]``. whole: it pools whole images, of any size.
    """

    kind: str
    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    pad: tuple[int, ...] | None = None
    pad_mode: str = "constant"
    batch_norm: bool = False
    residual: bool = False
    activation: str = "none"
    flat: bool = False
    whole: bool = False
    epsilon: float = 0.0
    output_padding: tuple[int, ...] = (0, 0)

    def __str__(self) -> str:
        text = "x".join(map(str, self.weight[2:] if self.pool else self.weight))
        if max(self.stride) > 1:
            text += " /" + "x".join(map(str, sorted(set(self.stride))))
        if self.pool or self.between:
            return f"{self.kind} {text}"
        return text + (f" g{self.groups}" if self.groups > 1 else "")

    @property
    def fused(self) -> str:
        """What runs in the same call, as in "bn+add+relu"."""
        parts = (("bn", self.batch_norm), ("add", self.residual), (self.activation, self.activation != "none"))
        return "+".join(name for name, there in parts if there)

    @property
    def pool(self) -> bool:
        return self.kind in ("max", "mean")

    @property
    def between(self) -> bool:
        """It is no layer, but stands between some."""
        return self.kind in ("gate", "cat", "layer_norm")

    @property
    def bare(self) -> bool:
        """It has no tensors of its own."""
        return self.pool or self.kind in ("gate", "cat")

    @property
    def depthwise(self) -> bool:
        """One kernel for each channel, a batch norm's scale among them."""
        return self.kind == "norm" or (self.kind == "conv2d" and self.groups == self.input[1] == self.weight[0])

    @property
    def walk(self) -> Walk:
        """How the op walks over an image."""
        taps = self.weight[2:] or (1, 1)
        return Walk.of(taps, self.stride, self.padding, self.dilation, self.groups)

    @property
    def padded_image(self) -> tuple[int, int]:
        """(H, W) that the op sees."""
        left, right, top, bottom = self.pad or (0, 0, 0, 0)
        return self.input[2] + top + bottom, self.input[3] + left + right

    @property
    def output_image(self) -> tuple[int, int]:
        """(P, Q)."""
        if self.kind == "conv_transpose2d":
            sizes = (self.weight[2:], self.stride, self.padding, self.output_padding, self.dilation)
            return transposed_size(self.padded_image, *sizes)  # type: ignore[arg-type]
        return self.walk.output_size(self.padded_image)

    def of_image(self, size: tuple[int, int]) -> Geometry:
        """The same layer for images of another size."""
        weight = (*self.weight[:2], *size) if self.whole else self.weight
        return replace(self, input=(*self.input[:2], *size), weight=weight)

    @property
    def in_channels(self) -> int:
        if self.kind in ("cat", "conv_transpose2d"):
            return self.weight[0]
        return math.prod(self.weight[1:2]) * self.groups

    @property
    def out_channels(self) -> int:
        if self.kind == "cat":
            return sum(self.weight)
        return self.weight[1] * self.groups if self.kind == "conv_transpose2d" else self.weight[0]

    @property
    def output(self) -> tuple[int, ...]:
        """Shape of one sample of the output."""
        if self.kind == "linear":
            return (*self.input[1:-1], self.weight[0])
        if self.kind == "layer_norm":
            return self.input[1:]
        if self.kind == "cat":
            return (self.out_channels, *self.input[2:])
        return self.weight[:1] if self.flat else (self.out_channels, *self.output_image)


@dataclass(frozen=True)
class LayerPlan:
    """One layer: medians in microseconds at the example's shape (None: not measured), and what was kept.

    pattern: its block shape, None if the layer was dense. density: kept weights / dense weights.
    dense_us: by torch, sparse_us: by ``sparsekd._C``. chosen: "dense" (torch), "sparse" (``sparsekd._C`` on the kept
    blocks) or "native" (``sparsekd._C`` on a weight that was never pruned).
    """

    name: str
    geometry: Geometry
    pattern: str | None
    density: float
    dense_us: float | None
    sparse_us: float | None
    chosen: str
    why: str


@dataclass(frozen=True)
class Plan:
    """Every convolution, linear and pooling layer of a frozen network, in order; ``print(plan)`` shows a table.

    threads: those it was measured with. network_us: median of one call of the whole network for each variant measured;
    "unfrozen" is the model that was handed in. notes: what a reader has to know. device: "cpu", or the name of the GPU.
    images: how many of a larger batch a thread takes through the network at a time, 0: all threads share every layer.
    eager: the model's own forward runs with dense layers, since nothing here made it faster.
    """

    layers: tuple[LayerPlan, ...]
    memory_format: str
    threads: int
    isa: str | None
    network_us: dict[str, float]
    notes: tuple[str, ...] = ()
    device: str = "cpu"
    images: int = 0
    eager: bool = False

    def __iter__(self) -> Iterator[LayerPlan]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> LayerPlan:
        return {layer.name: layer for layer in self.layers}[name]

    def to_dict(self) -> dict[str, Any]:
        """The plan as dicts, lists, numbers and strings, ready for ``json.dumps``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Plan:
        layers = tuple(LayerPlan(**{**one, "geometry": _geometry_from(one["geometry"])}) for one in fields["layers"])
        return cls(**{**fields, "layers": layers, "notes": tuple(fields["notes"])})

    def __str__(self) -> str:
        header = ("layer", "input", "weight", "fused", "density", "dense us", "sparse us", "chosen", "why")
        rows = [header, *(_row(layer) for layer in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        timed = ", ".join(f"{name} {us:.0f} us" for name, us in self.network_us.items())
        kernels = f"sparsekd._C {self.isa}" if self.isa else "no compiled kernels"
        kernels = kernels if self.device == "cpu" else f"{self.device} in CUDA graphs"
        slices = f", slices of {self.images} images" if self.images else ""
        lines.append(f"{self.memory_format}, {self.threads} threads, {kernels}{slices}; whole network: {timed}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def _row(layer: LayerPlan) -> tuple[str, ...]:
    measured = ("-" if us is None else f"{us:.1f}" for us in (layer.dense_us, layer.sparse_us))
    shape = "x".join(map(str, layer.geometry.input))
    what = (layer.name, shape, str(layer.geometry), layer.geometry.fused or "-", f"{layer.density:.3g}")
    return (*what, *measured, layer.chosen, layer.why)


def _geometry_from(fields: Mapping[str, Any]) -> Geometry:
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
    return Geometry(**values)
