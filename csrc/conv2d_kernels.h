// What the kernels of convolutions and linear layers are given. Plain data only; kernel_table.h says why.
#pragma once

#include <cstddef>

#include "elements.h"

namespace sparsekd {

// Output rows handled at once: one AVX-512 register, two AVX2 registers, four 128-bit registers.
constexpr int kStripRows = 16;

// Up to 16 output rows that share one list of input columns. A column is one (tap, channel) pair of the weight,
// numbered (r * S + s) * Cg + channel with the channel counted inside the group. Types narrower than a float come in
// words of 32 bits, kDepth neighbouring channels each; columns, channels, weights and offsets then all count words.
struct Strip {
  int64_t weights;      // offset in floats of [count][16] weights, `Strips::weight_stride` apart
  int32_t first;        // first column in Strips::columns
  int32_t count;        // number of columns
  int32_t lanes;        // rows really there, 0..16; the weights of the others are zero
  int32_t group;        // convolution group of these rows
  int32_t row;          // output row of lane 0
  const int32_t* rows;  // output row of every lane, or null when they are row, row + 1, ...
};

struct Strips {
  const Strip* strip;
  int32_t count;
  int64_t weight_stride;   // floats from one column's 16 weights to the next column's
  int64_t num_weights;     // floats that weight offsets index into
  const int32_t* columns;  // [num_columns]
  int64_t num_columns;
};

// A convolution [n, c, h, w] -> [n, k, p, q]; as it stands here, a product of two numbers. A linear layer is the 1 x 1
// case with its batch as w.
struct Conv2dGeometry {
  int64_t n = 1, c = 1, h = 1, w = 1, k = 1, p = 1, q = 1;
  int64_t r = 1, s = 1, stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0, dilation_h = 1, dilation_w = 1, groups = 1;
};

// What follows bias and residual. `_C.ACTIVATIONS` names them to Python. kGelu is exact, kGeluTanh its approximation.
enum class Activation : int32_t { kNone, kRelu, kRelu6, kSilu, kHardswish, kHardsigmoid, kSigmoid, kGelu, kGeluTanh };

// Real values of an int8 layer: x = (x_u8 - x_zero) * x_scale, y = (y_u8 - y_zero) / y_inverse.
struct Quantized {
  const float* scale = nullptr;    // [k], x_scale times the scale of the row's weights
  const int32_t* start = nullptr;  // [k], what sums start from
  int x_zero = 0;
  float y_inverse = 0;  // when y is u8
  int y_zero = 0;
};

// X float or Bfloat16 with Y alike, or uint8_t with Y float or uint8_t.
template <class X, class Y = X>
struct Conv2dForward {
  Conv2dGeometry geometry;
  Strips strips;
  const float* weights;  // words: floats, or Bf16Kernels::depth values of X
  const X* x;
  bool x_channels_last;
  const float* bias;  // [k] or null
  const Y* residual;  // same format as y, or null; null when y is u8
  Y* y;
  bool y_channels_last;
  Activation activation;
  int threads;
  Quantized quantized = {};    // of uint8_t
  const void* plan = nullptr;  // by PlanFn, for the same layer, geometry, memory formats and number of threads; or null
};

// What a call of the forward pass works out from all but the tensors' addresses: writes it to `memory`, which begins a
// cache line, if that is not null, and returns its bytes.
template <class X, class Y = X>
using PlanFn = size_t (*)(const Conv2dForward<X, Y>&, void* memory);

// T: float or Bfloat16.
template <class T>
struct Conv2dGradInput {
  Conv2dGeometry geometry;
  Strips strips;  // of floats, or of T where Bf16Kernels::depth is 2
  const float* weights;
  const T* dy;
  bool dy_channels_last;
  T* dx;
  bool dx_channels_last;
  int threads;
};

template <class T>
struct Conv2dGradValues {
  Conv2dGeometry geometry;
  Strips strips;
  const T* x;
  bool x_channels_last;
  const T* dy;
  bool dy_channels_last;
  float* dweights;  // [num_weights], every strip's [count][16] is overwritten
  int threads;
};

// A convolution of every channel with its own kernel, all tensors channels_last; geometry.k == c == groups.
struct Depthwise {
  Conv2dGeometry geometry;
  const float* weights;  // [r][s][c]
  const float* x;
  const float* bias;      // [c]
  const float* residual;  // or null
  float* y;
  Activation activation;
  int threads;
};

struct Bf16Kernels {
  int depth;  // channels in a word of the weights and of the packed input: 2, or 1 converted to floats
  void (*conv2d)(const Conv2dForward<Bfloat16>&);
  PlanFn<Bfloat16> conv2d_plan;
  void (*conv2d_grad_input)(const Conv2dGradInput<Bfloat16>&);
  void (*conv2d_grad_values)(const Conv2dGradValues<Bfloat16>&);
  double (*burst)(int64_t rounds, float* sink);  // like KernelTable::fma_burst
};

struct Int8Kernels {
  int depth;  // channels in a word: 4, or 2 widened to 16 bits
  int zero;   // with 4: the products are those of x - zero
  void (*conv2d_float)(const Conv2dForward<uint8_t, float>&);
  void (*conv2d_byte)(const Conv2dForward<uint8_t, uint8_t>&);
  double (*burst)(int64_t rounds, float* sink);
};

}  // namespace sparsekd
