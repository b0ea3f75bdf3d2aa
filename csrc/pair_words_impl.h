// bf16 by instructions that multiply pairs: forward pass and gradients over the Vec16 and the PairSums of one
// instruction set. `Pairs` are its sums, and hold `join` beside what sums hold (CONTRACTS.md).
#pragma once

#include "conv2d_forward_impl.h"
#include "conv2d_grad_input_impl.h"
#include "conv2d_grad_values_impl.h"
#include "kernel_table.h"
#include "madd_burst_impl.h"

namespace {

template <class Pairs>
struct PairWords {
  using Sums = Pairs;
  using X = sparsekd::Bfloat16;
  using Y = sparsekd::Bfloat16;
  using Line = sparsekd::Bfloat16;
  static constexpr int kDepth = 2;
  // Floats that were made of halves, side by side again.
  static Vec16 join(Vec16 low, Vec16 high) { return Pairs::join(low, high); }
};

template <class Pairs>
constexpr sparsekd::Bf16Kernels kPairKernels = {.depth = PairWords<Pairs>::kDepth,
                                                .conv2d = conv2d_forward<PairWords<Pairs>>,
                                                .conv2d_plan = conv2d_forward_plan<PairWords<Pairs>>,
                                                .conv2d_grad_input = conv2d_grad_input<PairWords<Pairs>>,
                                                .conv2d_grad_values = conv2d_grad_values<PairWords<Pairs>>,
                                                .burst = madd_burst<Pairs, 2>};

}  // namespace
