"""A network as distillation calls it: its output, its tapped features, and what is kept of both from a teacher."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .features import FeatureStats, channels_first
from .modes import evaluation_mode
from .nn import BlockSparseLayer, SparseLinear
from .outputs import Pick, check_tensor, pick
from .taps import FeatureTap

__all__ = ["TappedNetwork", "TeacherSource", "TeacherTargets", "check_inputs", "has_channels_last"]

_CHANNELS_LAST = (
    nn.Linear,
    SparseLinear,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.Embedding,
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd,
    BlockSparseLayer,  # those that are not linear
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class TeacherSource(NamedTuple):
    """Whose targets they are, as far as it can be told without running the teacher.

    shapes, dtypes, weights  of all its parameters and buffers: SHA-256 of their shapes, of their types, and of the sums
                             of their bits, which are the same on every device; "" where some have no data.
    picked                   `output` of who ran it.
    channels_last            of every tap.
    """

    shapes: str
    dtypes: str
    weights: str
    picked: Pick
    channels_last: tuple[bool, ...]

    def otherwise(self, other: TeacherSource) -> str:
        """What tells the other teacher from this one, in words; "" where nothing does."""
        if self.shapes != other.shapes:
            return "its weights have other shapes"
        # Of weights that were cast, or are gone since nobody runs them any more, it cannot be told.
        if self.dtypes == other.dtypes and self.weights and other.weights and self.weights != other.weights:
            return "its weights are others"
        plain = (str, int)  # of functions it cannot be told, and a network that returns one tensor needs no name for it
        if isinstance(self.picked, plain) and isinstance(other.picked, plain) and self.picked != other.picked:
            return f"output={other.picked!r} of it was kept, not output={self.picked!r}"
        return ""


class TeacherTargets(NamedTuple):
    """What a student is to match of a teacher in one batch, known before the step: see `TeacherCache`.

    output  [B, ...], what the goal takes of the teacher's output.
    stats   of its tapped features, in the order of `taps`.
    taps    their names.
    source  whose they are; None where nobody says.
    """

    output: Tensor
    stats: FeatureStats
    taps: tuple[str, ...]
    source: TeacherSource | None = None

    def to(self, device: torch.device | str) -> TeacherTargets:
        """The same on another device."""
        means, energy = (part.to(device, non_blocking=True) for part in self.stats[:2])
        output, stats = self.output.to(device, non_blocking=True), FeatureStats(means, energy, self.stats.shapes)
        return self._replace(output=output, stats=stats)


class TappedNetwork:
    """A network, the part of its output that a goal takes, and its tapped features with their channels second.

    caller         whom error messages name.
    output         as in `Distiller`.
    takes_tensor   whether what `output` names must be a tensor.
    """

    def __init__(self, caller: str, network: nn.Module, *, output: Pick = None, takes_tensor: bool = True) -> None:
        self.caller, self.network, self.output, self.takes_tensor = caller, network, output, takes_tensor
        self.tap: FeatureTap | None = None
        self._channels_last: list[bool] = []

    @property
    def taps(self) -> tuple[str, ...]:
        return () if self.tap is None else self.tap.names

    def attach(self, names: Sequence[str], inputs: Sequence[Any], channels_last: bool | None) -> list[Tensor]:
        """Tap these modules; returns their features of `inputs`. The network runs once and keeps no trace of it.

        channels_last: as in `Distiller`.
        """
        self.tap = FeatureTap(self.network, names)
        with evaluation_mode(self.network), torch.no_grad():
            features = self.tap(*inputs)[1]
        named = zip(self.tap.names, features, strict=True)
        self._channels_last = [self._channels_are_last(name, feature, channels_last) for name, feature in named]
        return self._turned(features)

    def run(self, inputs: Sequence[Any], *, tapped: bool = True) -> tuple[Any, list[Tensor]]:
        """Output and features; no features where nothing is tapped, or not now."""
        if self.tap is None or not tapped:
            return self.picked(self.network(*inputs)), []
        output, features = self.tap(*inputs)
        return self.picked(output), self._turned(features)

    def source(self) -> TeacherSource:
        """What this network says and sees now is of this teacher."""
        tensors = [tensor.detach() for tensor in self.network.state_dict().values() if isinstance(tensor, Tensor)]
        shapes, dtypes = [tuple(tensor.shape) for tensor in tensors], [str(tensor.dtype) for tensor in tensors]
        known = all(tensor.layout == torch.strided and not tensor.is_meta for tensor in tensors)
        weights = _digest([_sum_of_bits(tensor) for tensor in tensors]) if known else ""
        return TeacherSource(_digest(shapes), _digest(dtypes), weights, self.output, tuple(self._channels_last))

    def picked(self, output: Any) -> Any:
        """The part of the network's output that the goal takes."""
        part = pick(self.caller, output, self.output)
        return check_tensor(self.caller, part) if self.takes_tensor else part

    def _turned(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [channels_first(f, last) for f, last in zip(features, self._channels_last, strict=True)]

    def _channels_are_last(self, name: str, feature: Tensor, given: bool | None) -> bool:
        if given is not None or feature.dim() != 3:
            return bool(given)
        last = has_channels_last(self.network, name)
        if last is None:
            raise ValueError(
                f"sparsekd.{self.caller}: {name!r} returns {tuple(feature.shape)}, and its type does not say which "
                "dimension holds the channels; give channels_last=True for [B, T, C], False for [B, C, T]"
            )
        return last


def check_inputs(function: str, inputs: Any) -> None:
    if not isinstance(inputs, (tuple, list)):
        raise TypeError(f"sparsekd.{function}: inputs must be a tuple, got {type(inputs).__name__}; pass (x,)")


def _sum_of_bits(tensor: Tensor) -> int:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.dtype.is_floating_point:
        tensor = tensor.contiguous().view(_INTEGERS[tensor.element_size()])
    return int(tensor.sum(dtype=torch.int64))


def _digest(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()


def has_channels_last(model: nn.Module, name: str) -> bool | None:
    """Whether the module of this name returns tokens [B, T, C] rather than [B, C, T]; None if that cannot be told.

    Told from its type, else from the layers inside it, else from what stands before it in an ``nn.Sequential``.
    """
    module = model.get_submodule(name)
    kinds = {_of_type(child) for child in module.modules()} - {None}
    if len(kinds) == 1:
        return kinds.pop()
    if kinds:
        return _of_type(module)
    parent, _, last = name.rpartition(".")
    before = model.get_submodule(parent)
    if name and isinstance(before, nn.Sequential):
        siblings = [child for child, _ in before.named_children()]
        for sibling in reversed(siblings[: siblings.index(last)]):
            kind = has_channels_last(model, f"{parent}.{sibling}".lstrip("."))
            if kind is not None:
                return kind
    return None


def _of_type(module: nn.Module) -> bool | None:
    if isinstance(module, _CHANNELS_LAST):
        return True
    return False if isinstance(module, _CHANNELS_FIRST) else None
