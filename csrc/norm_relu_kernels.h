// What the kernels of batch norm with a residual and ReLU are given. Plain data only; kernel_table.h says why.
#pragma once

#include <cstdint>

namespace sparsekd {

// Maps in channels_last, [rows][channels]: a row is a pixel of an image. Mean and variance of a channel are those of
// its rows, the variance divided by their number.
struct NormReluSizes {
  int64_t rows, channels;
  int threads;
};

// y = max(0, (x - mean) / sqrt(variance + epsilon) * weight + bias + residual)
struct NormRelu {
  NormReluSizes sizes;
  const float* x;
  const float* residual;  // or null
  const float* weight;    // [channels], as all that follows but y
  const float* bias;
  float epsilon;
  float* y;
  float* mean;
  float* variance;
};

// The gradients of that to x, residual, weight and bias; mean and variance are functions of x.
struct NormReluGrad {
  NormReluSizes sizes;
  const float* dy;
  const float* x;
  const float* y;  // null without residual: then x says where y is positive
  const float* weight;
  const float* bias;
  const float* mean;
  const float* variance;
  float epsilon;
  float* dx;
  float* dresidual;  // null without residual
  float* dweight;
  float* dbias;
};

struct NormReluKernels {
  void (*forward)(const NormRelu&);
  void (*grad)(const NormReluGrad&);
};

}  // namespace sparsekd
