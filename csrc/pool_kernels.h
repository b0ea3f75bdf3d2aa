// What the kernels of pooling are given. Plain data only; kernel_table.h says why.
#pragma once

#include "conv2d_kernels.h"

namespace sparsekd {

// Maxima, or means over r * s pixels, of every channel, all tensors channels_last; geometry.k == c.
template <class T>
struct Pool {
  Conv2dGeometry geometry;
  const T* x;
  T* y;
  int threads;
};

struct PoolKernels {
  void (*max_f32)(const Pool<float>&);
  void (*mean_f32)(const Pool<float>&);
  void (*max_bf16)(const Pool<Bfloat16>&);
  void (*mean_bf16)(const Pool<Bfloat16>&);
};

}  // namespace sparsekd
