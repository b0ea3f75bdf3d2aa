"""int8 for inference on the CPU: u8 activations with one scale and zero point, s8 weights with a scale per output.

    calibrate = quantize.Observer()
    for x in batches:
        calibrate(x)  # what the layer gets to see
    run = quantize.quantize_layer(weight, bias, calibrate.scale(), image=(56, 56), padding=(1, 1), activation="relu")
    y = run(x)  # float32 in and out, or u8 between layers

A weight is off by at most half a step of its row, ``max |row| / 254``; an activation in the calibrated range by half
of ``(high - low) / 255``, outside by its distance from the range too. Sums are exact (32-bit integers).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends import cpu
from ..blocks import BlockSparse

Pair = tuple[int, int]


@dataclass(frozen=True)
class ByteScale:
    """``real = (byte - zero) * scale``, byte in 0..255."""

    scale: float
    zero: int

    @classmethod
    def of_range(cls, low: float, high: float) -> ByteScale:
        """Covers low..high. 0, which padding is made of, is always inside and exact."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / 255 or 1.0
        return cls(scale, round(-low / scale))

    def quantize(self, x: Tensor) -> Tensor:
        """u8 in the memory format of a float32 ``x``, rounded to nearest even and clamped; NaN becomes byte 0."""
        if x.dtype != torch.float32 or not x.is_cpu:
            raise TypeError(f"sparsekd.quantize: expected float32 on the CPU, got {x.dtype} on {x.device}")
        if not x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous()
        y = torch.empty_like(x, dtype=torch.uint8)
        cpu.native.quantize_u8(x.data_ptr(), x.numel(), self.scale, self.zero, y.data_ptr(), torch.get_num_threads())
        return y

    def dequantize(self, x: Tensor) -> Tensor:
        return (x.float() - self.zero) * self.scale


class Observer:
    """The range of the activations it is called with: of all, or without the ``100 - percentile`` % at either end."""

    def __init__(self, percentile: float = 100.0) -> None:
        if not 50 < percentile <= 100:
            raise ValueError(f"sparsekd.quantize: percentile must be over 50 and at most 100, got {percentile}")
        self.percentile = percentile
        self.low, self.high = 0.0, 0.0

    def __call__(self, x: Tensor) -> None:
        if not x.numel():
            return
        if self.percentile == 100:
            low, high = x.aminmax()
        else:
            flat = x.detach().flatten().float()
            flat = flat[:: flat.numel() // 1_000_000 + 1]  # torch.quantile takes 16 million elements at most
            share = self.percentile / 100
            low, high = flat.quantile(flat.new_tensor([1 - share, share]))
        self.low, self.high = min(self.low, low.item()), max(self.high, high.item())

    def scale(self) -> ByteScale:
        return ByteScale.of_range(self.low, self.high)


def quantize_weight(weight: BlockSparse) -> tuple[Tensor, Tensor]:
    """(int8 values ``[nnzb, bh, bw]``, float32 scale ``[rows]``) with ``values * scale[row]`` close to the weight."""
    blocks = weight.row_ptr.diff()
    row = torch.arange(blocks.numel(), device=blocks.device).repeat_interleave(blocks)
    largest = weight.values.new_zeros(blocks.numel(), weight.values.shape[1])
    rows_largest = weight.values.abs().amax(2)
    largest.scatter_reduce_(0, row[:, None].expand_as(rows_largest), rows_largest, "amax")
    scale = (largest / 127).float()
    scale[scale == 0] = 1.0
    values = (weight.values / scale[row][:, :, None]).round().clamp(-127, 127).to(torch.int8)
    return values, scale.flatten()[: weight.shape[0]].contiguous()


MOST_TERMS = (2**31 - 1) // (255 * 127)


def longest_row(weight: BlockSparse) -> int:
    """Kept weights of the fullest row: how many products an output sums."""
    return int(weight.row_ptr.diff().max()) * weight.pattern.bw


def quantize_layer(
    weight: BlockSparse,
    bias: Tensor | None,
    x: ByteScale,
    *,
    y: ByteScale | None = None,
    activation: str = "none",
    image: Pair | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    threads: int | None = None,
) -> Callable[..., Tensor]:
    """An int8 layer ``activation(layer(x) + bias + residual)`` as a function ``run(x, residual=None)``.

    Args:
        weight: ``[K, C / groups, R, S]`` of a convolution or ``[out, in]`` of a linear layer; 16x4 blocks are fastest.
        bias: float32 ``[K]`` or None.
        x: of the input; from an `Observer`. run takes u8, or float32 which it quantises first.
        y: of the output, which is then u8 and takes no residual; None for float32.
        activation: a key of ``_C.ACTIVATIONS``.
        image: (H, W) of a convolution's input; run takes any batch size.
        threads: None follows ``torch.set_num_threads``.

    Raises RuntimeError without the compiled module, ValueError for what the kernels do not know.
    """
    if cpu.native is None:
        raise RuntimeError(f"sparsekd.quantize: int8 needs the compiled kernels; {cpu.missing}")
    if activation not in cpu.native.ACTIVATIONS:
        known = ", ".join(cpu.native.ACTIVATIONS)
        raise ValueError(f"sparsekd.quantize: activation must be one of {known}, got {activation!r}")
    if longest_row(weight) > MOST_TERMS:
        raise ValueError(
            f"sparsekd.quantize: an output sums {longest_row(weight)} products of bytes, which may leave 32 "
            f"bits from {MOST_TERMS + 1} on; keep the layer in float32"
        )
    values, scale = quantize_weight(weight)
    bias = None if bias is None else bias.float().contiguous()
    index = weight.row_ptr.contiguous(), weight.col_idx.contiguous()
    arguments = (
        values.data_ptr(), scale.data_ptr(), index[0].data_ptr(), index[1].data_ptr(), values.shape[0],
        0 if bias is None else bias.data_ptr(), cpu.native.ACTIVATIONS[activation], x.scale, x.zero,
        y.scale if y else 0.0, y.zero if y else 0,
    )  # fmt: skip
    out = torch.uint8 if y else torch.float32
    if len(weight.shape) == 2:
        layer = cpu.native.PackedLinearInt8(*reversed(weight.shape), *values.shape[1:], *arguments)
        return _linear(layer, weight.shape, x, out, threads)
    if image is None:
        raise ValueError("sparsekd.quantize: a convolution needs image=(height, width) of its input")
    k, channels, r, s = weight.shape
    sample = (channels * groups, *image)
    shape = cpu.native.Conv2dShape((1, *sample), k, (r, s), stride, padding, dilation, groups, values.shape[1:])
    return _conv2d(cpu.native.PackedConv2dInt8(shape, *arguments), shape, sample, k, x, out, threads)


def _linear(
    layer: Any, features: tuple[int, ...], scale: ByteScale, out: torch.dtype, threads: int | None
) -> Callable[..., Tensor]:
    packed = layer.run

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        if x.shape[-1] != features[1]:
            raise ValueError(f"sparsekd.quantize: expected [..., {features[1]}], got {tuple(x.shape)}")
        x = _bytes(x, scale, torch.contiguous_format)
        y = torch.empty(*x.shape[:-1], features[0], dtype=out, device="cpu")
        add = _residual(residual, y, torch.contiguous_format)
        rows = y.numel() // features[0] if features[0] else 0
        packed(
            x.data_ptr(), rows, 0 if add is None else add.data_ptr(), y.data_ptr(), threads or torch.get_num_threads()
        )
        return y

    return run


def _conv2d(
    layer: Any, shape: Any, image: tuple[int, int, int], k: int, scale: ByteScale, out: torch.dtype, threads: int | None
) -> Callable[..., Tensor]:
    packed, size = layer.run, (shape.p, shape.q)

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        if x.shape[1:] != image:
            raise ValueError(f"sparsekd.quantize: expected [N, {', '.join(map(str, image))}], got {tuple(x.shape)}")
        last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        x = _bytes(x, scale, layout)
        y = torch.empty((x.shape[0], k, *size), dtype=out, device="cpu", memory_format=layout)
        add = _residual(residual, y, layout)
        packed(
            x.data_ptr(), last, 0 if add is None else add.data_ptr(), y.data_ptr(), last,
            threads or torch.get_num_threads(), x.shape[0],
        )  # fmt: skip
        return y

    return run


def _bytes(x: Tensor, scale: ByteScale, layout: torch.memory_format) -> Tensor:
    x = x.contiguous(memory_format=layout)
    return x if x.dtype == torch.uint8 else scale.quantize(x)


def _residual(residual: Tensor | None, y: Tensor, layout: torch.memory_format) -> Tensor | None:
    if residual is None:
        return None
    if residual.dtype == torch.float32 and residual.dim() <= y.dim() and residual.shape != y.shape:
        sides = zip(residual.shape[::-1], y.shape[::-1], strict=False)
        if all(mine in (1, side) for mine, side in sides):
            residual = residual.expand(y.shape)
    if residual.dtype != torch.float32 or residual.shape != y.shape:
        raise ValueError(
            f"sparsekd.quantize: expected a float32 residual of shape {tuple(y.shape)}, got {residual.dtype} "
            f"{tuple(residual.shape)}"
        )
    return residual.contiguous(memory_format=layout)
