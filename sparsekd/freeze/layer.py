"""One frozen layer: the seam between a network and the kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import BlockSparse
from .plan import Geometry

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

Run = Callable[..., Tensor]  # run(x, residual=None, reuse=False)


@dataclass(frozen=True)
class Step:
    """A layer of ours as a part of ``_C.Network``.

    add(network, operands, x_channels_last, y) appends it; operands and y number values. reads: what each operand has to
    be, a residual the last one, which may be missing. any_format: it reads maps in either memory format.
    """

    add: Callable[[Any, Sequence[int], bool, int], None]
    reads: tuple[Samples, ...]
    y: Samples
    any_format: bool = False


@dataclass(frozen=True)
class Samples:
    """What a tensor has to be: any number of samples of one shape, in a dtype and memory format."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: torch.memory_format = torch.contiguous_format

    @property
    def bytes(self) -> int:
        """Of one sample."""
        return math.prod(self.shape) * self.dtype.itemsize

    def empty(self, n: int) -> Tensor:
        return torch.empty((n, *self.shape), dtype=self.dtype, device="cpu", memory_format=self.layout)


class FrozenLayer(nn.Module):
    """``act(conv(x) + bias + residual)``, or pooling: buffers for files, ``run`` for speed, and ``step``, where it is
    of ``sparsekd._C``, for chains of layers (chain.py). Built for the CPU in packed.py, for a GPU in cuda_layer.py.

    ``run(x, residual=None, reuse=False)`` (or more operands, see between.py) is a closure over all it needs: attribute
    look-ups of nn.Module would cost more than the call itself. reuse: nobody reads the residual again, so the result
    may take its memory.
    """

    def __init__(
        self,
        geometry: Geometry,
        buffers: Mapping[str, Tensor | None],
        run: Run,
        *,
        chosen: str,
        blocks: BlockSparse | None = None,
        step: Step | None = None,
        threads: int | None = None,
    ) -> None:
        """blocks: the weight, if it is block-sparse; ``buffers`` holds it dense, or as its blocks."""
        super().__init__()
        self.geometry, self.run, self.step, self.chosen, self.threads = geometry, run, step, chosen, threads
        self.pattern = None if blocks is None else blocks.pattern
        self.bytes: tuple[float, int] | None = None  # scale and zero of its input where it multiplies bytes (int8.py)
        self.like: dict[str, Any] | None = None
        self._dense: Tensor | None = None
        self._mask = None if blocks is None else blocks.mask()
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)

    def forward(self, input: Tensor, *others: Tensor | None, reuse: bool = False) -> Tensor:
        return self.run(input, *others, reuse=reuse)

    def stand_in_for(self, module: nn.Module) -> FrozenLayer:
        """The layer for a network that keeps its own forward, which may read what it likes of its layers."""
        private = ("_", "training")
        self.like = {
            name: value
            for name, value in vars(module).items()
            if not name.startswith(private) and not isinstance(value, (Tensor, nn.Module))
        }
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            like = self.__dict__.get("like")
            if like is not None and name == "weight":
                return self.dense_weight()
            if like is not None and name in like:
                return like[name]
            raise

    def dense_weight(self) -> Tensor:
        """The weight with zeros where no block is kept."""
        held = dict(self.named_buffers())
        if "weight" in held:
            return held["weight"]
        if self._dense is None:
            assert self.pattern is not None
            values, row_ptr, col_idx = (held[name] for name in ("values", "row_ptr", "col_idx"))
            self._dense = BlockSparse(values, row_ptr, col_idx, self.geometry.weight, self.pattern).to_dense()
        return self._dense

    def tensors(self) -> dict[str, Any]:
        """What a file keeps: the kept blocks of a block-sparse layer, also where dense was chosen, else the weight."""
        state: dict[str, Any] = dict(self.named_buffers())
        if self.pattern is not None and self.chosen != "sparse":
            blocks = BlockSparse.from_dense(state.pop("weight"), self.pattern, mask=self._mask)
            state |= {"values": blocks.values, "row_ptr": blocks.row_ptr, "col_idx": blocks.col_idx}
        if self.bytes is not None:
            state["bytes"] = self.bytes
        return {"bias": None, **state}

    def extra_repr(self) -> str:
        return f"{self.geometry}, fused={self.geometry.fused or None}, {self.chosen}"
