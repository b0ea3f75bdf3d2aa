"""Every configuration that the sweep of machine code compiles, interpreted as the dispatcher launches it: its hints,
bounds and 32-bit products (checked.py), its result, and that its constants are those that were compiled."""

import itertools

import pytest
import torch

from sparsekd import BlockPattern
from sparsekd.backends.cuda import masks

from ..cases import Conv
from .common import DEVICE, block_products, conv2d_kernels, gather_gemm, last, operands, tiles, torchs, weight_of

aot = pytest.importorskip("benchmarks.gpu.aot")
BY_TILE = {
    " ".join(key): list(some)
    for key, some in itertools.groupby(
        aot.configurations(False, 90), key=lambda one: (one.direction, one.family, str(one.tile))
    )
}

RELATIVE = {"half": 4e-3, "tf32": 2e-3, "ieee": 1e-5}


def layer_of(config):
    """A layer that gets this tile: a channel tile and a block more, two blocks and, if ragged, half of one behind."""
    (bh, bw), tile = config.block, config.tile
    kernel = (1, 1) if config.pointwise else (3, 3)
    short = 0 if config.whole else 8
    if config.direction == "grad_input":
        k, c = 2 * bh - short, tile.bn + bw
    else:
        k, c = tile.bn + bh, 2 * bw - short
    if config.direction == "grad_values":
        c = max(c, tile.bk // (1 if config.pointwise else 9) // bw * bw + 2 * bw - short)
    padding = (0, 0) if config.pointwise else (1, 1)
    kept = 3 / max(2 * kernel[0] * kernel[1], 3)  # about three blocks a row
    pattern = BlockPattern(bh, bw)
    return Conv("layer", n=1, c=c, k=k, image=(3, 5), kernel=kernel, padding=padding, pattern=pattern, density=kept)


@pytest.fixture
def launched(monkeypatch):
    """The constants and options of each launch of a kernel that multiplies."""
    seen = []
    for module in (gather_gemm, block_products):
        launch = module.Launch

        def make(kernel, grid, sizes, constants, launch=launch, **options):
            if "BM" in constants:
                seen.append((constants, options))
            return launch(kernel, grid, sizes, constants, **options)

        monkeypatch.setattr(module, "Launch", make)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_TILE)
def test_every_configuration(name, launched):
    for config in BY_TILE[name]:
        check(config, launched)


def check(config, launched):
    dtype = torch.float32 if config.dtype == "fp32" else torch.float16
    case, tile = layer_of(config), config.tile._replace(splits=2 if config.parts else 1)
    x, values, blocks = operands(case, dtype)
    weight = weight_of(case, values)
    assert config.tile in tiles.candidates(config.direction, config.family, weight, 90), config
    want = torchs(case, x, blocks, None, None, torch.float32)
    grad, exact = last(want[3].to(dtype)), dict(zip(tiles.DIRECTIONS, want, strict=False))[config.direction]
    got = torch.empty(exact.shape, device=DEVICE, dtype=dtype)
    got = got if config.direction == "grad_values" else last(got)
    table = masks.Mask(blocks.row_ptr, blocks.col_idx, weight).table(config.direction, tile)
    left, right = {"forward": (x, values), "grad_input": (grad, values), "grad_values": (grad, x)}[config.direction]
    more = {"activation": "silu"} if config.fused else {}
    launch = getattr(conv2d_kernels, config.direction)
    launch = launch(left, right, table, weight, tile, got, precision=aot.constants(config)["PRECISION"], **more)
    added = ()
    if config.direction == "forward":
        bias = torch.randn(case.k, device=DEVICE).to(dtype)
        residual = last(torch.randn_like(got)) if config.fused else None
        added, exact = (bias, residual), exact + bias.float()[:, None, None]
        exact = torch.nn.functional.silu(exact + residual) if config.fused else exact
    launch(left, right, got, *added)
    error, largest = (got.float() - exact.float()).abs().max(), exact.float().abs().max()
    assert error <= RELATIVE[config.family] * largest, f"{config}: {error:.3g} of {largest:.3g}"
    ((constants, options),) = launched
    launched.clear()
    compiled = {key: value for key, value in aot.constants(config).items() if not key.endswith("_ptr")}
    assert (constants, options) == (compiled, aot.options(config)), config
