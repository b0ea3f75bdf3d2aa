"""The checks of interpreted kernels find what they are for; every test in this folder runs under them."""

import os
from unittest import mock

import pytest
import torch

from sparsekd import BlockPattern
from sparsekd.backends.cuda import masks

from ..cases import Conv
from .checked import checks
from .common import GPU, conv2d_kernels, last, operands, tiles, weight_of

pytestmark = pytest.mark.skipif(GPU, reason="kernels are compiled here")
with mock.patch.dict(os.environ, {} if GPU else {"TRITON_INTERPRET": "1"}):
    from .hinted import copy


@pytest.fixture(autouse=True)
def checked():
    """The tests here begin the checks themselves."""


@pytest.mark.parametrize(
    ("hint", "shift", "size", "wrong"),
    [
        ("none", 0, 48, None),
        ("contiguous", 16, 48, None),
        ("constant", 0, 16, None),
        ("contiguous", 8, 48, "begins elsewhere"),
        ("gaps", 0, 16, "not neighbours"),
        ("multiple", 0, 48, "multiple_of"),
        ("constant", 0, 17, "max_constancy"),
        ("none", 32, 64, "outside of every tensor"),
        ("none", -1, 48, "outside of every tensor"),
        ("product", 0, 48, "leaves 32 bits"),
    ],
)
def test_false_hints_strays_and_wraps_are_found(hint, shift, size, wrong):
    x, y = torch.randn(48), torch.zeros(48)

    def run():
        with checks():
            copy[(1,)](x, y, shift, size, HINT=hint)

    if wrong is None:
        run()
        assert y.any()
    else:
        with pytest.raises(Exception, match=wrong):
            run()


def test_every_kernel_is_watched():
    """The kernels do have hints, and the checks do see them."""
    case = Conv("seen", n=1, c=16, k=16, image=(3, 3), pattern=BlockPattern(16, 16), density=0.5)
    x, values, blocks = operands(case, torch.float32)
    weight = weight_of(case, values)
    tile = tiles.GATHER_IEEE[-1]
    table = masks.Mask(blocks.row_ptr, blocks.col_idx, weight).table("forward", tile)
    with checks() as watch:
        out = last(torch.empty(1, 16, 3, 3))
        conv2d_kernels.forward(x, values, table, weight, tile, out)(x, values, out)
    assert watch.hints and watch.accesses
