#include "conv2d.h"

#include <algorithm>
#include <type_traits>

#include "dispatch.h"

namespace sparsekd {

namespace {

BlockWeight block_weight(const Conv2dShape& shape, const Blocks& blocks, int depth = 1) {
  const Conv2dGeometry& g = shape.geometry;
  return {blocks.row_ptr, blocks.col_idx, blocks.nnzb, shape.bh, shape.bw, g.k,
          g.c / g.groups, g.r * g.s,      g.groups,    depth};
}

// Threads a call is worth: waking them takes as long as some thousand multiply-adds of 16 rows, and with few pixels
// reading a column's weights takes as long as four.
int useful_threads(int threads, const Conv2dGeometry& g, const Strips& strips) {
  constexpr int64_t kFewPixels = 4, kWorth = 8192;
  const int64_t pixels = std::max(kFewPixels, g.n * g.p * g.q);
  return strips.num_weights / kStripRows * pixels < kWorth ? 1 : threads;
}

template <class T>
Conv2dKernel<T> forward_kernel() {
  if constexpr (std::is_same_v<T, float>)
    return {kernels().conv2d_f32, 1};
  else
    return {kernels().bf16.conv2d, kernels().bf16.depth};
}

// Strip weights of T in words: as floats, or as they are, `depth` to a word.
template <class T>
void pack_words(StripSet& strips, const BlockWeight& weight, const T* values, float* words) {
  if (weight.depth == 1)
    strips.pack(weight, values, words);
  else
    strips.pack(weight, values, reinterpret_cast<T*>(words));
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

template <class T>
const float* strip_weights(StripSet& strips, const BlockWeight& weight, const T* values) {
  if (strips.in_place() && sizeof(T) * weight.depth == sizeof(float)) return reinterpret_cast<const float*>(values);
  float* packed = packed_weights(strips);
  pack_words(strips, weight, values, packed);
  return packed;
}

// The same in their own type, so that two rows of a column make a word.
const float* row_pairs(StripSet& strips, const BlockWeight& weight, const Bfloat16* values) {
  if (strips.in_place()) return reinterpret_cast<const float*>(values);
  float* packed = packed_weights(strips);
  strips.pack(weight, values, reinterpret_cast<Bfloat16*>(packed));
  return packed;
}

}  // namespace

template <class T>
void conv2d(const Conv2dShape& shape, Tensor4d<const T> x, const T* values, const Blocks& blocks,
            const Epilogue<T>& epilogue, Tensor4d<T> y, int threads) {
  const Conv2dKernel<T> kernel = forward_kernel<T>();
  const BlockWeight weight = block_weight(shape, blocks, kernel.depth);
  StripSet& strips = call_strips(weight);
  const float* weights = strip_weights(strips, weight, values);
  kernel.run({shape.geometry,
              strips.strips(),
              weights,
              x.data,
              x.channels_last,
              epilogue.bias,
              epilogue.residual,
              y.data,
              y.channels_last,
              epilogue.activation,
              useful_threads(threads, shape.geometry, strips.strips()),
              {}});
}

template void conv2d(const Conv2dShape&, Tensor4d<const float>, const float*, const Blocks&, const Epilogue<float>&,
                     Tensor4d<float>, int);
template void conv2d(const Conv2dShape&, Tensor4d<const Bfloat16>, const Bfloat16*, const Blocks&,
                     const Epilogue<Bfloat16>&, Tensor4d<Bfloat16>, int);

template <class T>
void conv2d_grad_input(const Conv2dShape& shape, Tensor4d<const T> dy, const T* values, const Blocks& blocks,
                       Tensor4d<T> dx, int threads) {
  const KernelTable& table = kernels();
  const BlockWeight weight = block_weight(shape, blocks);
  StripSet& strips = call_strips(weight);
  const auto run = [&](const auto& kernel, const float* weights) {
    kernel({shape.geometry, strips.strips(), weights, dy.data, dy.channels_last, dx.data, dx.channels_last,
            useful_threads(threads, shape.geometry, strips.strips())});
  };
  if constexpr (std::is_same_v<T, float>)
    run(table.conv2d_grad_input_f32, strip_weights(strips, weight, values));
  else
    run(table.bf16.conv2d_grad_input,
        table.bf16.depth == 2 ? row_pairs(strips, weight, values) : strip_weights(strips, weight, values));
}

template void conv2d_grad_input(const Conv2dShape&, Tensor4d<const float>, const float*, const Blocks&, Tensor4d<float>,
                                int);
template void conv2d_grad_input(const Conv2dShape&, Tensor4d<const Bfloat16>, const Bfloat16*, const Blocks&,
                                Tensor4d<Bfloat16>, int);

template <class T>
void conv2d_grad_values(const Conv2dShape& shape, Tensor4d<const T> x, Tensor4d<const T> dy, const Blocks& blocks,
                        T* dvalues, int threads) {
  const BlockWeight weight = block_weight(shape, blocks);
  StripSet& strips = call_strips(weight);
  const auto run = [&](const auto& kernel, float* dweights) {
    kernel({shape.geometry, strips.strips(), x.data, x.channels_last, dy.data, dy.channels_last, dweights,
            useful_threads(threads, shape.geometry, strips.strips())});
  };
  if constexpr (std::is_same_v<T, float>)
    if (strips.in_place()) return run(kernels().conv2d_grad_values_f32, dvalues);
  float* sums = packed_weights(strips);
  if constexpr (std::is_same_v<T, float>)
    run(kernels().conv2d_grad_values_f32, sums);
  else
    run(kernels().bf16.conv2d_grad_values, sums);
  strips.unpack(weight, sums, dvalues);
}

template void conv2d_grad_values(const Conv2dShape&, Tensor4d<const float>, Tensor4d<const float>, const Blocks&,
                                 float*, int);
template void conv2d_grad_values(const Conv2dShape&, Tensor4d<const Bfloat16>, Tensor4d<const Bfloat16>, const Blocks&,
                                 Bfloat16*, int);

Conv2dShape linear_shape(int64_t batch, int64_t in_features, int64_t out_features, int64_t bh, int64_t bw) {
  return {{1, in_features, 1, batch, out_features, 1, batch, 1, 1, 1, 1, 0, 0, 1, 1, 1}, bh, bw};
}

template <class T>
PackedConv2d<T>::PackedConv2d(const Conv2dShape& shape, const T* values, const Blocks& blocks, const float* bias,
                              Activation activation)
    : shape_(shape), activation_(activation), kernel_(forward_kernel<T>()) {
  const Conv2dGeometry& g = shape.geometry;
  row_ptr_.assign(blocks.row_ptr, blocks.row_ptr + (g.k + shape.bh - 1) / shape.bh + 1);
  col_idx_.assign(blocks.col_idx, blocks.col_idx + blocks.nnzb);
  if (bias != nullptr) bias_.assign(bias, bias + g.k);
  const BlockWeight weight = block_weight(shape, {row_ptr_.data(), col_idx_.data(), blocks.nnzb}, kernel_.depth);
  strips_.build(weight);
  weights_.resize(static_cast<size_t>(strips_.strips().num_weights));
  pack_words(strips_, weight, values, weights_.data());
}

template <class T>
void PackedConv2d<T>::run(const Conv2dGeometry& geometry, Tensor4d<const T> x, const T* residual, Tensor4d<T> y,
                          int threads) const {
  kernel_.run({geometry,
               strips_.strips(),
               weights_.data(),
               x.data,
               x.channels_last,
               bias_.empty() ? nullptr : bias_.data(),
               residual,
               y.data,
               y.channels_last,
               activation_,
               useful_threads(threads, geometry, strips_.strips()),
               {}});
}

template class PackedConv2d<float>;
template class PackedConv2d<Bfloat16>;

PackedConv2dInt8::PackedConv2dInt8(const Conv2dShape& shape, const int8_t* values, const float* scale,
                                   const Blocks& blocks, const float* bias, Activation activation, ByteScale x,
                                   const ByteScale* y)
    : shape_(shape),
      activation_(activation),
      bytes_out_(y != nullptr),
      x_(x),
      y_(y != nullptr ? *y : ByteScale{1.0f, 0}),
      kernels_(kernels().int8) {
  const Conv2dGeometry& g = shape.geometry;
  row_ptr_.assign(blocks.row_ptr, blocks.row_ptr + (g.k + shape.bh - 1) / shape.bh + 1);
  col_idx_.assign(blocks.col_idx, blocks.col_idx + blocks.nnzb);
  if (bias != nullptr) bias_.assign(bias, bias + g.k);
  for (int64_t k = 0; k < g.k; ++k) scale_.push_back(scale[k] * x.scale);
  const BlockWeight weight = block_weight(shape, {row_ptr_.data(), col_idx_.data(), blocks.nnzb}, kernels_.depth);
  strips_.build(weight);
  weights_.resize(static_cast<size_t>(strips_.strips().num_weights));
  start_.assign(static_cast<size_t>(g.k), 0);
  if (kernels_.depth == 2) {
    strips_.pack(weight, values, reinterpret_cast<int16_t*>(weights_.data()));
    return;
  }
  // The kernel multiplies x_u8 rather than x_u8 - zero, padding included.
  int8_t* words = reinterpret_cast<int8_t*>(weights_.data());
  strips_.pack(weight, values, words);
  const Strips& strips = strips_.strips();
  for (int32_t s = 0; s < strips.count; ++s) {
    const Strip& strip = strips.strip[s];
    for (int32_t lane = 0; lane < strip.lanes; ++lane) {
      int32_t& start = start_[static_cast<size_t>(strip.rows ? strip.rows[lane] : strip.row + lane)];
      for (int32_t j = 0; j < strip.count; ++j)
        for (int i = 0; i < 4; ++i) start -= x.zero * words[(strip.weights + j * strips.weight_stride + lane) * 4 + i];
    }
  }
}

template <class Y>
void PackedConv2dInt8::run_as(void (*kernel)(const Conv2dForward<uint8_t, Y>&), const Conv2dGeometry& geometry,
                              Tensor4d<const uint8_t> x, const Y* residual, Tensor4d<void> y, int threads) const {
  kernel({geometry,
          strips_.strips(),
          weights_.data(),
          x.data,
          x.channels_last,
          bias_.empty() ? nullptr : bias_.data(),
          residual,
          static_cast<Y*>(y.data),
          y.channels_last,
          activation_,
          useful_threads(threads, geometry, strips_.strips()),
          {scale_.data(), start_.data(), x_.zero, 1.0f / y_.scale, y_.zero}});
}

void PackedConv2dInt8::run(const Conv2dGeometry& geometry, Tensor4d<const uint8_t> x, const float* residual,
                           Tensor4d<void> y, int threads) const {
  if (bytes_out_)
    run_as<uint8_t>(kernels_.conv2d_byte, geometry, x, nullptr, y, threads);
  else
    run_as<float>(kernels_.conv2d_float, geometry, x, residual, y, threads);
}

PackedDepthwise::PackedDepthwise(const Conv2dShape& shape, const float* weights, const float* bias,
                                 Activation activation)
    : geometry_(shape.geometry), activation_(activation) {
  const int64_t c = geometry_.c, taps = geometry_.r * geometry_.s;
  weights_.resize(static_cast<size_t>(taps * c));
  for (int64_t i = 0; i < taps * c; ++i) weights_[static_cast<size_t>(i % taps * c + i / taps)] = weights[i];
  bias_.resize(static_cast<size_t>(c));
  if (bias != nullptr) bias_.assign(bias, bias + c);
}

void PackedDepthwise::run(int64_t n, const float* x, const float* residual, float* y, int threads) const {
  Conv2dGeometry geometry = geometry_;
  geometry.n = n;
  kernels().depthwise_f32({geometry, weights_.data(), x, bias_.data(), residual, y, activation_, threads});
}

}  // namespace sparsekd
