#include "conv2d.h"

#include "dispatch.h"

namespace sparsekd {

namespace {

BlockWeight block_weight(const Conv2dShape& shape, const Blocks& blocks) {
  const Conv2dGeometry& g = shape.geometry;
  return {blocks.row_ptr, blocks.col_idx, blocks.nnzb, shape.bh, shape.bw, g.k, g.c / g.groups, g.r * g.s, g.groups};
}

// The strips of the call in progress. One per thread, so that repeated calls allocate nothing.
StripSet& call_strips(const BlockWeight& weight) {
  thread_local StripSet strips;
  strips.build(weight);
  return strips;
}

float* packed_weights(const StripSet& strips) {
  thread_local std::vector<float> weights;
  weights.resize(static_cast<size_t>(strips.strips().num_weights));
  return weights.data();
}

const float* strip_weights(StripSet& strips, const BlockWeight& weight, const float* values) {
  if (strips.in_place()) return values;
  float* packed = packed_weights(strips);
  strips.pack(weight, values, packed);
  return packed;
}

}  // namespace

void conv2d(const Conv2dShape& shape, Tensor4d x, const float* values, const Blocks& blocks, const Epilogue& epilogue,
            MutableTensor4d y, int threads) {
  const BlockWeight weight = block_weight(shape, blocks);
  StripSet& strips = call_strips(weight);
  const float* weights = strip_weights(strips, weight, values);
  kernels().conv2d_f32({shape.geometry, strips.strips(), weights, x.data, x.channels_last, epilogue.bias,
                        epilogue.residual, y.data, y.channels_last, epilogue.activation, threads});
}

void conv2d_grad_input(const Conv2dShape& shape, Tensor4d dy, const float* values, const Blocks& blocks,
                       MutableTensor4d dx, int threads) {
  const BlockWeight weight = block_weight(shape, blocks);
  StripSet& strips = call_strips(weight);
  const float* weights = strip_weights(strips, weight, values);
  kernels().conv2d_grad_input_f32(
      {shape.geometry, strips.strips(), weights, dy.data, dy.channels_last, dx.data, dx.channels_last, threads});
}

void conv2d_grad_values(const Conv2dShape& shape, Tensor4d x, Tensor4d dy, const Blocks& blocks, float* dvalues,
                        int threads) {
  const BlockWeight weight = block_weight(shape, blocks);
  StripSet& strips = call_strips(weight);
  float* dweights = strips.in_place() ? dvalues : packed_weights(strips);
  kernels().conv2d_grad_values_f32(
      {shape.geometry, strips.strips(), x.data, x.channels_last, dy.data, dy.channels_last, dweights, threads});
  if (!strips.in_place()) strips.unpack(weight, dweights, dvalues);
}

Conv2dShape linear_shape(int64_t batch, int64_t in_features, int64_t out_features, int64_t bh, int64_t bw) {
  return {{1, in_features, 1, batch, out_features, 1, batch, 1, 1, 1, 1, 0, 0, 1, 1, 1}, bh, bw};
}

PackedConv2d::PackedConv2d(const Conv2dShape& shape, const float* values, const Blocks& blocks, const float* bias,
                           Activation activation)
    : shape_(shape), activation_(activation) {
  const Conv2dGeometry& g = shape.geometry;
  row_ptr_.assign(blocks.row_ptr, blocks.row_ptr + (g.k + shape.bh - 1) / shape.bh + 1);
  col_idx_.assign(blocks.col_idx, blocks.col_idx + blocks.nnzb);
  if (bias != nullptr) bias_.assign(bias, bias + g.k);
  const BlockWeight weight = block_weight(shape, {row_ptr_.data(), col_idx_.data(), blocks.nnzb});
  strips_.build(weight);
  weights_.resize(static_cast<size_t>(strips_.strips().num_weights));
  if (strips_.in_place())
    weights_.assign(values, values + weights_.size());
  else
    strips_.pack(weight, values, weights_.data());
}

void PackedConv2d::run(const Conv2dGeometry& geometry, Tensor4d x, const float* residual, MutableTensor4d y,
                       int threads) const {
  kernels().conv2d_f32({geometry, strips_.strips(), weights_.data(), x.data, x.channels_last,
                        bias_.empty() ? nullptr : bias_.data(), residual, y.data, y.channels_last, activation_,
                        threads});
}

}  // namespace sparsekd
