// Convolution and linear layers as the bindings see them: blocks in, kernel calls out.
#pragma once

#include <memory>
#include <vector>

#include "strips.h"

namespace sparsekd {

struct Conv2dShape {
  Conv2dGeometry geometry;
  int64_t bh, bw;
};

// The blocks of one layer: values is const for forward and gradient of the input, written for the gradient of the
// values.
struct Blocks {
  const int32_t* row_ptr;
  const int32_t* col_idx;
  int64_t nnzb;
};

struct Tensor4d {
  const float* data;
  bool channels_last;
};

struct MutableTensor4d {
  float* data;
  bool channels_last;
};

struct Epilogue {
  const float* bias;
  const float* residual;
  Activation activation;
};

void conv2d(const Conv2dShape& shape, Tensor4d x, const float* values, const Blocks& blocks, const Epilogue& epilogue,
            MutableTensor4d y, int threads);
void conv2d_grad_input(const Conv2dShape& shape, Tensor4d dy, const float* values, const Blocks& blocks,
                       MutableTensor4d dx, int threads);
void conv2d_grad_values(const Conv2dShape& shape, Tensor4d x, Tensor4d dy, const Blocks& blocks, float* dvalues,
                        int threads);

// A linear layer is a 1 x 1 convolution over one image whose width is the batch.
Conv2dShape linear_shape(int64_t batch, int64_t in_features, int64_t out_features, int64_t bh, int64_t bw);

// A layer with its own copy of the weights as strips, for inference. run() may be called from several threads at once.
class PackedConv2d {
 public:
  PackedConv2d(const Conv2dShape& shape, const float* values, const Blocks& blocks, const float* bias,
               Activation activation);
  PackedConv2d(const PackedConv2d&) = delete;
  PackedConv2d& operator=(const PackedConv2d&) = delete;

  const Conv2dShape& shape() const { return shape_; }
  void run(const Conv2dGeometry& geometry, Tensor4d x, const float* residual, MutableTensor4d y, int threads) const;

 private:
  Conv2dShape shape_;
  Activation activation_;
  std::vector<int32_t> row_ptr_, col_idx_;
  std::vector<float> bias_;
  std::vector<float> weights_;
  StripSet strips_;
};

}  // namespace sparsekd
