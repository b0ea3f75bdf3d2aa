// What the kernels of operations between layers are given. Plain data only; kernel_table.h says why.
#pragma once

#include "conv2d_kernels.h"

namespace sparsekd {

// y = activation(x * gate + residual), the gate one number for each channel of an image. channels_last: x, residual and
// y are [images][pixels][channels], else [images][channels][pixels]; gate is [images][channels].
template <class T>
struct Gate {
  int64_t images, pixels, channels;
  bool channels_last;
  const T* x;
  const T* gate;
  const T* residual;  // or null
  T* y;
  Activation activation;
  int threads;
};

// Every row [channels] to mean 0 and variance 1, then times weight plus bias; sums are float.
template <class T>
struct LayerNorm {
  int64_t rows, channels;
  const T* x;
  const float* weight;  // [channels]
  const float* bias;    // [channels]
  float epsilon;
  T* y;
  int threads;
};

struct BetweenKernels {
  void (*gate_f32)(const Gate<float>&);
  void (*gate_bf16)(const Gate<Bfloat16>&);
  void (*layer_norm_f32)(const LayerNorm<float>&);
  void (*layer_norm_bf16)(const LayerNorm<Bfloat16>&);
};

}  // namespace sparsekd
