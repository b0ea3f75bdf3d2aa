// The contract between the baseline code (bindings, weight packing, dispatch) and the kernels of each instruction set:
// plain structs, raw pointers, function pointers. Nothing here may define an inline function, because this header is
// compiled with different -m flags and the linker is free to keep any one copy.
#pragma once

#include <cstddef>
#include <cstdint>

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

// A convolution [n, c, h, w] -> [n, k, p, q]. A linear layer is the 1 x 1 case with its batch as w.
struct Conv2dGeometry {
  int64_t n, c, h, w, k, p, q;
  int64_t r, s, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
};

// What follows bias and residual. `_C.ACTIVATIONS` names them to Python.
enum class Activation : int32_t { kNone, kRelu, kRelu6, kSilu };

struct Bfloat16 {
  uint16_t bits;
};

// Real values of an int8 layer: x = (x_u8 - x_zero) * x_scale, y = (y_u8 - y_zero) / y_inverse.
struct Quantized {
  const float* scale;    // [k], x_scale times the scale of the row's weights
  const int32_t* start;  // [k], what sums start from
  int x_zero;
  float y_inverse;  // when y is u8
  int y_zero;
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
  Quantized quantized;  // of uint8_t
};

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

// Elements of a feature map; sums are float whatever they are.
enum class Element : int32_t { kFloat32, kBfloat16, kFloat16 };

// One tapped layer [batch, channels, pixels], or [batch, pixels, channels] when channels_last.
struct FeatureLayer {
  const void* features;
  void* grad;  // in the format of features; not used in the forward pass
  Element element;
  bool channels_last;
  int64_t channels, pixels;
  int64_t means, energy;  // its first column in the rows of those two
};

// The means over pixels and the mean squares over channels of all layers, side by side in the rows of an image.
struct FeatureStats {
  const FeatureLayer* layer;
  int64_t count, batch;
  float* means;   // [batch, means_stride]
  float* energy;  // [batch, energy_stride]
  int64_t means_stride, energy_stride;
  int threads;
};

// grad = grad_means / pixels + 2 * features * grad_energy / channels, with the gradients laid out as FeatureStats.
struct FeatureStatsGrad {
  const FeatureLayer* layer;
  int64_t count, batch;
  const float* grad_means;
  const float* grad_energy;
  int64_t means_stride, energy_stride;
  int threads;
};

struct MapSize {
  int64_t height, width;
  int64_t energy;  // its first column
};

// sum_t mean_b sum_s attention * mean_hw (student pooled to t's size and normalised - teacher normalised)^2, and the
// gradients of that.
struct MatchMaps {
  int64_t batch, teachers, students;
  const float* attention;  // [batch, teachers, students]; null: teacher t meets student t alone, with weight 1
  const float* teacher;    // [batch, teacher_stride]
  const float* student;    // [batch, student_stride]
  const MapSize* teacher_size;
  const MapSize* student_size;
  int64_t teacher_stride, student_stride;
  float* loss;
  float* grad_attention;  // [batch, teachers, students], null with attention
  float* grad_student;    // [batch, student_stride]
  int threads;
};

// temperature^2 * sum_classes KL(softmax(teacher / temperature) || softmax(student / temperature)) / batch, and its
// gradient to the student's logits.
struct KdLoss {
  int64_t batch, classes;
  const float* student;
  const float* teacher;
  float temperature;
  float* loss;
  float* grad_student;
  int threads;
};

struct AttentionKernels {
  void (*feature_stats)(const FeatureStats&);
  void (*feature_stats_grad)(const FeatureStatsGrad&);
  void (*match_maps)(const MatchMaps&);
  void (*kd_loss)(const KdLoss&);
};

struct Bf16Kernels {
  int depth;  // channels in a word of the weights and of the packed input: 2, or 1 converted to floats
  void (*conv2d)(const Conv2dForward<Bfloat16>&);
  void (*conv2d_grad_input)(const Conv2dGradInput<Bfloat16>&);
  void (*conv2d_grad_values)(const Conv2dGradValues<Bfloat16>&);
  double (*burst)(int64_t rounds, float* sink);  // like KernelTable::fma_burst
};

struct Int8Kernels {
  int depth;  // channels in a word: 4, or 2 widened to 16 bits
  void (*conv2d_float)(const Conv2dForward<uint8_t, float>&);
  void (*conv2d_byte)(const Conv2dForward<uint8_t, uint8_t>&);
  double (*burst)(int64_t rounds, float* sink);
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

struct KernelTable {
  const char* isa;
  void (*conv2d_f32)(const Conv2dForward<float>&);
  void (*conv2d_grad_input_f32)(const Conv2dGradInput<float>&);
  void (*conv2d_grad_values_f32)(const Conv2dGradValues<float>&);
  void (*depthwise_f32)(const Depthwise&);
  PoolKernels pool;
  AttentionKernels attention;
  // Multiply-adds on registers, `rounds` times a fixed amount, seeded from and written to sink [32]; returns the number
  // of floating point operations.
  double (*fma_burst)(int64_t rounds, float* sink);
  Bf16Kernels bf16;
  Int8Kernels int8;
  // target[i] = round(x[i] * inverse) + zero, ties to even, within 0..255
  void (*quantize)(const float* x, int64_t n, float inverse, int zero, uint8_t* target);
};

extern const KernelTable kScalarKernels;
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
extern const KernelTable kNeonKernels;
extern const Int8Kernels kAvx512VnniKernels;
extern const Bf16Kernels kAvx512Bf16Kernels;  // the rest comes from kAvx512Kernels

// Memory of the calling thread, 64-byte aligned, kept and grown from call to call. Slots do not overlap.
enum ScratchSlot {
  kScratchCall,
  kScratchInput,
  kScratchOutput,
  kScratchWords,
  kScratchSum,
  kScratchNetwork,
  kScratchSlots
};
void* scratch(ScratchSlot slot, size_t bytes);

// Runs body(context, item, first) for items 0..items-1 on up to `threads` OpenMP threads; with one thread it is a plain
// loop that never enters the OpenMP run time. Every worker begins with its share of neighbouring items and then helps
// the others; `first` says that it begins.
using ParallelBody = void (*)(void* context, int64_t item, bool first);
void parallel_for(int threads, int64_t items, ParallelBody body, void* context);

}  // namespace sparsekd
