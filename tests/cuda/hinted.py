"""A kernel whose hints, places and products are true or false as its caller likes."""

import triton
import triton.language as tl


@triton.jit
def copy(x_ptr, y_ptr, shift, size, HINT: tl.constexpr):
    place = tl.arange(0, 32) + shift
    mask = place < size
    if HINT == "multiple":
        place = tl.multiple_of(place, [16])
    if HINT == "contiguous":
        place = tl.max_contiguous(tl.multiple_of(place, [16]), [16])
    if HINT == "gaps":
        place = tl.max_contiguous(place * 2, [16])
    if HINT == "constant":
        mask = tl.max_constancy(mask, [16])
    if HINT == "product":
        place = place * 100000 * 100000
        mask = place < -1
    tl.store(y_ptr + place, tl.load(x_ptr + place, mask=mask, other=0.0), mask=mask)
