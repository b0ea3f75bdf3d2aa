// Convolution and linear layers as the bindings see them: blocks in, kernel calls out.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "kernel_table.h"
#include "strips.h"

namespace sparsekd {

// In the order of Activation.
inline constexpr const char* kActivationNames[] = {"none",        "relu",    "relu6", "silu",     "hardswish",
                                                   "hardsigmoid", "sigmoid", "gelu",  "gelu_tanh"};

struct Conv2dShape {
  Conv2dGeometry geometry;
  int64_t bh, bw;
};

// A shape whose p and q follow from the other sizes of `geometry`. Throws std::invalid_argument, which Python sees as
// ValueError, where the kernel does not fit the input or channels do not divide into groups and blocks.
Conv2dShape conv2d_shape(Conv2dGeometry geometry, int64_t bh, int64_t bw);

inline Conv2dGeometry with_images(Conv2dGeometry geometry, int64_t n) {
  geometry.n = n;
  return geometry;
}

template <class T>
struct Conv2dKernel {
  void (*run)(const Conv2dForward<T>&);
  PlanFn<T> plan;
  int depth;
};

// The blocks of one layer: values is const for forward and gradient of the input, written for the gradient of the
// values.
struct Blocks {
  const int32_t* row_ptr;
  const int32_t* col_idx;
  int64_t nnzb;
};

template <class T>
struct Tensor4d {
  T* data;
  bool channels_last;
};

template <class T>
struct Epilogue {
  const float* bias;
  const T* residual;
  Activation activation;
};

// T: float or Bfloat16, whose sums are floats.
template <class T>
void conv2d(const Conv2dShape& shape, Tensor4d<const T> x, const T* values, const Blocks& blocks,
            const Epilogue<T>& epilogue, Tensor4d<T> y, int threads);
template <class T>
void conv2d_grad_input(const Conv2dShape& shape, Tensor4d<const T> dy, const T* values, const Blocks& blocks,
                       Tensor4d<T> dx, int threads);
template <class T>
void conv2d_grad_values(const Conv2dShape& shape, Tensor4d<const T> x, Tensor4d<const T> dy, const Blocks& blocks,
                        T* dvalues, int threads);

// What a layer's kernel has worked out (`Conv2dForward::plan`) for the sizes that it is called with: for eight of them, of
// which the one that was used least recently makes room for sizes that come twice in a row. Sizes that come once among
// many are planned by the call itself, and so is a call that finds another thread in here: nobody waits.
template <class T>
class KeptPlans {
 public:
  // The plan for this call, which lives as long as what is returned does, or null.
  std::shared_ptr<const void> find(const Conv2dForward<T>& call, PlanFn<T> make);
  int64_t made() const { return made_.load(std::memory_order_relaxed); }

 private:
  struct Sizes {
    Conv2dGeometry geometry{};
    bool x_channels_last = false, y_channels_last = false;
    int threads = 0;

    bool operator==(const Sizes& other) const;
  };
  struct Kept {
    Sizes sizes;
    int64_t used = 0;
    std::shared_ptr<const void> plan;
  };

  Kept* place(const Sizes& sizes);

  std::mutex mutex_;
  std::array<Kept, 8> kept_;
  Sizes missed_;
  int64_t calls_ = 0;
  std::atomic<int64_t> made_{0};
};

// A layer with its own copy of the weights as strips, for inference. run() may be called from several threads at once.
// T: float or Bfloat16. A layer of the latter stays with the instruction set in use when it was packed.
template <class T>
class PackedConv2d {
 public:
  PackedConv2d(const Conv2dShape& shape, const T* values, const Blocks& blocks, const float* bias,
               Activation activation);
  PackedConv2d(const PackedConv2d&) = delete;
  PackedConv2d& operator=(const PackedConv2d&) = delete;

  const Conv2dShape& shape() const { return shape_; }
  int64_t weight_bytes() const { return static_cast<int64_t>(weights_.size() * sizeof(float)); }
  int64_t plans_made() const { return plans_.made(); }  // so far, to be kept
  void run(const Conv2dGeometry& geometry, Tensor4d<const T> x, const T* residual, Tensor4d<T> y, int threads) const;

 private:
  Conv2dShape shape_;
  Activation activation_;
  std::vector<int32_t> row_ptr_, col_idx_;
  std::vector<float> bias_;
  std::vector<float> weights_;
  StripSet strips_;
  Conv2dKernel<T> kernel_;
  mutable KeptPlans<T> plans_;
};

// How the bytes of an int8 layer stand for real numbers: (u8 - zero) * scale.
struct ByteScale {
  float scale;
  int zero;
};

// A layer whose weights are int8 values [nnzb, bh, bw], row k times scale[k], and whose input is u8. The output is
// float, or u8 when `y` is given. It stays with the instruction set in use when it was packed; sums are exact integers.
class PackedConv2dInt8 {
 public:
  PackedConv2dInt8(const Conv2dShape& shape, const int8_t* values, const float* scale, const Blocks& blocks,
                   const float* bias, Activation activation, ByteScale x, const ByteScale* y);
  PackedConv2dInt8(const PackedConv2dInt8&) = delete;
  PackedConv2dInt8& operator=(const PackedConv2dInt8&) = delete;

  const Conv2dShape& shape() const { return shape_; }
  bool bytes_out() const { return bytes_out_; }
  // y: float, or u8 and no residual.
  void run(const Conv2dGeometry& geometry, Tensor4d<const uint8_t> x, const float* residual, Tensor4d<void> y,
           int threads) const;

 private:
  template <class Y>
  void run_as(void (*kernel)(const Conv2dForward<uint8_t, Y>&), const Conv2dGeometry& geometry,
              Tensor4d<const uint8_t> x, const Y* residual, Tensor4d<void> y, int threads) const;

  Conv2dShape shape_;
  Activation activation_;
  bool bytes_out_;
  ByteScale x_, y_;
  std::vector<int32_t> row_ptr_, col_idx_, start_;
  std::vector<float> bias_, scale_, weights_;
  StripSet strips_;
  Int8Kernels kernels_;
};

// A depthwise layer with its own copy of the weights, for inference; tensors are channels_last.
class PackedDepthwise {
 public:
  // weights [c][r][s], as torch keeps them. Throws std::invalid_argument where groups or outputs are not the channels.
  PackedDepthwise(const Conv2dShape& shape, const float* weights, const float* bias, Activation activation);

  const Conv2dGeometry& geometry() const { return geometry_; }
  void run(const Conv2dGeometry& geometry, const float* x, const float* residual, float* y, int threads) const;

 private:
  Conv2dGeometry geometry_;
  Activation activation_;
  std::vector<float> weights_, bias_;
};

}  // namespace sparsekd
