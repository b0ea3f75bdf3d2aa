"""What the steps of `gpu.run` launch besides single layers, on meta tensors: for `gpu.dry_run --steps`.

Whole networks are looked at as `freeze` and `prewarm` do, layer by layer; the losses run forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from benchmarks import attention
from benchmarks.gpu import common
from benchmarks.gpu.layers import geometry_of, sparse_call
from benchmarks.gpu.network import NETWORKS, is_pruned
from benchmarks.lib.shapes import GPU, Conv
from sparsekd import BlockPattern, BlockSparse
from sparsekd.backends import cuda
from sparsekd.freeze import cuda_layer, measure, sites
from sparsekd.kernels import tiles
from sparsekd.kernels.index import Weight
from sparsekd.ops.embedding import Table

Call = Callable[[], object]
META, GPU_DEVICE = torch.device("meta"), torch.device("cuda")
DENSITIES = (0.5, 0.3, 0.1)


def maps(*shape: int) -> Tensor:
    """Activations without contents."""
    empty = torch.empty(shape, dtype=torch.bfloat16, device=META)
    return empty.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else empty


def blocks_of(layer: Conv, pattern: BlockPattern, density: float, kind: str) -> BlockSparse:
    """A weight whose mask is there, and whose values are not."""
    mask = common.mask_of(layer, pattern, density, kind)
    return _without_values(BlockSparse.from_dense(torch.zeros(layer.weight), pattern, mask=mask))


def directions(layer: Conv, batch: int, blocks: BlockSparse, some: Sequence[str] = common.DIRECTIONS) -> Iterator[Call]:
    x, grad = maps(batch, *layer.input), maps(batch, layer.out_channels, layer.out_size, layer.out_size)
    for direction in some:
        yield sparse_call(layer, direction, x, blocks, grad, cuda)


def _without_values(blocks: BlockSparse) -> BlockSparse:
    return replace(blocks, values=blocks.values.to(META, torch.bfloat16))


# ---- Networks


def frozen(name: str, batch: int, densities: Sequence[float] = DENSITIES) -> Iterator[Call]:
    """Each layer that `freeze` would try our kernel on, dense ones of one pixel too; pruned ones unfrozen before."""
    for site, module in _layers(name, batch):
        geometry = measure.geometry_of(site, module)
        residual = maps(batch, *geometry.output) if geometry.residual else None
        for blocks in _ways(geometry, module, densities):
            bias = torch.empty(blocks.shape[0], dtype=torch.bfloat16, device=META)
            run, x = cuda_layer.by_our_kernel(geometry, blocks, bias), maps(*geometry.input)
            yield lambda run=run, x=x, residual=residual: run(x, residual)  # type: ignore[misc]
    yield from pruned(name, batch, densities, ("forward",))


def _ways(geometry: Any, module: nn.Module, densities: Sequence[float]) -> Iterator[BlockSparse]:
    if is_pruned(module):
        yield from _pruned_weights(_conv(module, geometry.input), densities)
        return
    blocks, _ = cuda_layer.blocks_for_kernels(geometry, torch.zeros(geometry.weight, dtype=torch.bfloat16))
    if blocks is not None:
        yield _without_values(blocks)


def pruned(name: str, batch: int, densities: Sequence[float], some: Sequence[str]) -> Iterator[Call]:
    """The pruned layers of a network as they train, or run before they are frozen."""
    for site, module in _layers(name, batch):
        if is_pruned(module):
            layer = _conv(module, site.input)
            for blocks in _pruned_weights(layer, densities):
                yield from directions(layer, batch, blocks, some)


def _pruned_weights(layer: Conv, densities: Sequence[float]) -> Iterator[BlockSparse]:
    pattern = common.pattern_for(layer, GPU_DEVICE)
    return (blocks_of(layer, pattern, density, "wide") for density in densities)


def _conv(module: Any, shape: Sequence[int]) -> Conv:
    return Conv("", shape[1], shape[2], module.out_channels, module.kernel_size[0], module.stride[0])


def _layers(name: str, batch: int) -> Iterator[tuple[sites.Site, nn.Module]]:
    image, build = NETWORKS[name]
    traced = fx.symbolic_trace(build().eval()).to(META, torch.bfloat16)
    for site in sites.find_sites(traced, (maps(batch, 3, image, image),), pools=False):
        yield site, traced.get_submodule(site.target)


# ---- Trips and losses


def every_tile(name: str = "resnet50-3x3-256", batch: int = 256) -> Iterator[Call]:
    """As `gpu.trips` has it: how many trips there are is nothing the compiler is told."""
    from sparsekd.backends.cuda import masks
    from sparsekd.kernels import conv2d as kernel

    layer = GPU[name]
    blocks = blocks_of(layer, common.pattern_for(layer, GPU_DEVICE), 0.3, "wide")
    weight = Weight(layer.out_channels, layer.channels, *blocks.values.shape[1:], *geometry_of(layer))
    x, out = maps(batch, *layer.input), maps(batch, layer.out_channels, layer.out_size, layer.out_size)
    mask = masks.Mask(blocks.row_ptr, blocks.col_idx, weight)
    for tile in tiles.GATHER_HALF:
        launch = kernel.forward(x, blocks.values, mask.table("forward", tile), weight, tile, out)
        yield lambda launch=launch: launch(x, blocks.values, out)  # type: ignore[misc]


def losses(pair: str = "resnet", batch: int = 256) -> Iterator[Call]:
    """The losses of `benchmarks.attention` and their gradients; run them inside `on_meta`."""
    (sizes,) = (replace(one, batch=batch) for one in attention.PAIRS if one.name == pair)
    for last in (False, True):
        case = attention.Losses(sizes, last, torch.bfloat16, META.type)
        for loss in (case.maps, case.at):  # SAD launches what its maps do
            yield attention.gradients(loss, case.student)
    logits = torch.empty(64, 100, device=META)
    yield lambda: cuda.attention.kd(logits, logits, 4.0)


def embeddings(rows: int = 1 << 20, count: int = 1 << 17) -> Iterator[Call]:
    """As `gpu.embedding` has it: sizes are nothing the compiler is told, but for the dimensions."""
    ours = cuda.embedding
    ids, offsets = (torch.empty(size, dtype=torch.int64, device=META) for size in (count, count // 32 + 1))
    for dim in (64, 128):
        for dtype in (torch.float32, torch.bfloat16):
            table = _table(rows, dim, dtype)
            values, index = table.values, (table.kept, table.base, table.counts)
            grad = torch.empty(count, dim, dtype=dtype, device=META)
            yield partial(ours.embedding, *table, ids, dim, -1)
            yield partial(ours.embedding_bag, *table, ids, offsets, None, dim, -1)
            yield partial(ours.embedding_grad, grad, *index, ids, None, None, values.shape[0], -1)
            for queries in (1, 256):
                query = torch.empty(queries, dim, dtype=dtype, device=META)
                yield partial(ours.embedding_top_k, query, *table, 20, None, None)


def _table(rows: int, dim: int, dtype: torch.dtype) -> Table:
    parts = (rows * dim // 10,), (rows, -(-dim // 64)), (rows // 64,), (rows,)
    kinds = dtype, torch.int64, torch.int64, torch.uint8
    return Table(*(torch.empty(shape, dtype=kind, device=META) for shape, kind in zip(parts, kinds, strict=True)))


@contextmanager
def on_meta() -> Iterator[None]:
    """Inside, the distillation ops run on meta tensors as they do on a GPU."""
    library = torch.library.Library("sparsekd", "IMPL")
    for op in cuda.attention.OPS:
        library.impl(op, getattr(cuda.attention, op), "Meta", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


STEPS: dict[str, Callable[[], Iterator[Call]]] = {
    "trips": every_tile,
    "network": lambda: frozen("resnet50", 256),
    "training": lambda: pruned("wrn-28-10", 128, (0.3,), common.DIRECTIONS),
    "wrn frozen": lambda: frozen("wrn-28-10", 128),
    "losses": losses,
    "embedding": embeddings,
}
