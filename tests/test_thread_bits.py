"""A layer's sums are the same bits for every number of threads, however few pixels they are shared out over."""

import pytest
import torch

pytest.importorskip("sparsekd._C", reason="the compiled module is not built")
from sparsekd import _C

from .test_isa import KNOWN_ISAS, Blocks, isa_restored, unwritten  # noqa: F401

THREADS = (1, 2, 3, 5)
# Rows of blocks that are fewer than some of the threads, so that these share the pixels, and enough columns for a call
# to be worth several threads.
WIDE = ((32, 1400), (48, 900))
IMAGES = [(1, 1, pixels) for pixels in range(1, 18)] + [
    (7, 1, 1),
    (9, 1, 1),
    (2, 2, 2),
    (1, 3, 3),
    (1, 5, 3),
    (3, 2, 2),
]


def outputs(sizes, image, blocks, channels_last, dtype=torch.float32):
    """What every number of threads gives."""
    (k, c), (n, h, w) = sizes, image
    shape = _C.Conv2dShape((n, c, h, w), k, (1, 1))
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, c, h, w, generator=generator).to(dtype).contiguous(memory_format=memory_format)
    values = blocks.values.to(dtype)
    run = {torch.float32: _C.conv2d_f32, torch.bfloat16: _C.conv2d_bf16}[dtype]
    found = []
    for threads in THREADS:
        y = unwritten(n, k, h, w, channels_last=channels_last).to(dtype)
        run(shape, x.data_ptr(), channels_last, values.data_ptr(), *blocks.pointers[1:], 0, 0, y.data_ptr(),
            channels_last, 0, threads)  # fmt: skip
        found.append(y)
    want = torch.einsum("kc,nchw->nkhw", blocks.dense[:, :, 0, 0].to(dtype).double(), x.double())
    torch.testing.assert_close(found[0].double(), want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-3)
    return found


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("isa", KNOWN_ISAS)
def test_few_pixels(isa, dtype, channels_last, isa_restored):  # noqa: F811
    if isa not in _C.isas():
        pytest.skip(f"this CPU has no {isa}")
    _C.use_isa(isa)
    for k, c in WIDE:
        blocks = Blocks(k, c, 1, 1, 16, 1, 0.7, seed=k)
        for image in IMAGES:
            found = outputs((k, c), image, blocks, channels_last, dtype)
            differ = [t for t, y in zip(THREADS, found, strict=True) if not torch.equal(y, found[0])]
            assert not differ, f"{k} x {c}, image {image}: other bits with {differ} threads"


@pytest.mark.parametrize("isa", KNOWN_ISAS)
def test_small_batches_of_a_linear_layer(isa, isa_restored):  # noqa: F811
    if isa not in _C.isas():
        pytest.skip(f"this CPU has no {isa}")
    _C.use_isa(isa)
    outs, ins = WIDE[0]
    blocks = Blocks(outs, ins, 1, 1, 16, 1, 0.7, seed=5)
    packed = _C.PackedLinear(ins, outs, 16, 1, *blocks.pointers)
    for batch in range(1, 18):
        x = torch.randn(batch, ins, generator=torch.Generator().manual_seed(batch))
        found = []
        for threads in THREADS:
            y = unwritten(batch, outs)
            packed.run(x.data_ptr(), batch, 0, y.data_ptr(), threads)
            found.append(y)
        assert all(torch.equal(y, found[0]) for y in found), batch
