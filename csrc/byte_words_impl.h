// The int8 forward pass by instructions that multiply four bytes: over the Vec16 and the ByteSums of one instruction set.
#pragma once

#include "conv2d_forward_impl.h"
#include "kernel_table.h"
#include "madd_burst_impl.h"

namespace {

template <class Bytes, class Y_>
struct ByteWords {
  using Sums = Bytes;
  using X = uint8_t;
  using Y = Y_;
  static constexpr int kDepth = 4;
};

// kZero is the input byte that counts as zero in the products.
template <class Bytes>
constexpr sparsekd::Int8Kernels kByteKernels = {.depth = ByteWords<Bytes, float>::kDepth,
                                                .zero = Bytes::kZero,
                                                .conv2d_float = conv2d_forward<ByteWords<Bytes, float>>,
                                                .conv2d_byte = conv2d_forward<ByteWords<Bytes, uint8_t>>,
                                                .burst = madd_burst<Bytes, 4>};

}  // namespace
