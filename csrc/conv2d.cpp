#include "conv2d.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "dispatch.h"

namespace sparsekd {

namespace {

BlockWeight block_weight(const Conv2dShape& shape, const Blocks& blocks, int depth = 1) {
  const Conv2dGeometry& g = shape.geometry;
  return {.row_ptr = blocks.row_ptr,
          .col_idx = blocks.col_idx,
          .nnzb = blocks.nnzb,
          .bh = shape.bh,
          .bw = shape.bw,
          .rows = g.k,
          .columns = g.c / g.groups,
          .taps = g.r * g.s,
          .groups = g.groups,
          .depth = depth};
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
    return {kernels().conv2d_f32, kernels().conv2d_plan_f32, 1};
  else
    return {kernels().bf16.conv2d, kernels().bf16.conv2d_plan, kernels().bf16.depth};
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

int64_t output_size(const char* axis, int64_t in, int64_t taps, int64_t stride, int64_t pad, int64_t dilation) {
  const int64_t span = dilation * (taps - 1) + 1;
  if (taps < 1 || stride < 1 || pad < 0 || dilation < 1 || in + 2 * pad < span)
    throw std::invalid_argument(std::string("sparsekd._C.Conv2dShape: the kernel does not fit the ") + axis +
                                ": expected input + 2 * padding >= dilation * (kernel - 1) + 1, got input " +
                                std::to_string(in) + ", padding " + std::to_string(pad) + ", kernel " +
                                std::to_string(taps) + ", dilation " + std::to_string(dilation) + ", stride " +
                                std::to_string(stride));
  return (in + 2 * pad - span) / stride + 1;
}

}  // namespace

Conv2dShape conv2d_shape(Conv2dGeometry g, int64_t bh, int64_t bw) {
  if (g.groups < 1 || g.c % g.groups || g.k % g.groups || bh < 1 || bw < 1 || (g.groups > 1 && (g.k / g.groups) % bh))
    throw std::invalid_argument(
        "sparsekd._C.Conv2dShape: channels must divide into the groups and a group's output channels into blocks, got "
        "input channels " +
        std::to_string(g.c) + ", output channels " + std::to_string(g.k) + ", groups " + std::to_string(g.groups) +
        ", block " + std::to_string(bh) + "x" + std::to_string(bw));
  g.p = output_size("height", g.h, g.r, g.stride_h, g.pad_h, g.dilation_h);
  g.q = output_size("width", g.w, g.s, g.stride_w, g.pad_w, g.dilation_w);
  return {.geometry = g, .bh = bh, .bw = bw};
}

template <class T>
void conv2d(const Conv2dShape& shape, Tensor4d<const T> x, const T* values, const Blocks& blocks,
            const Epilogue<T>& epilogue, Tensor4d<T> y, int threads) {
  const Conv2dKernel<T> kernel = forward_kernel<T>();
  const BlockWeight weight = block_weight(shape, blocks, kernel.depth);
  StripSet& strips = call_strips(weight);
  const float* weights = strip_weights(strips, weight, values);
  kernel.run({.geometry = shape.geometry,
              .strips = strips.strips(),
              .weights = weights,
              .x = x.data,
              .x_channels_last = x.channels_last,
              .bias = epilogue.bias,
              .residual = epilogue.residual,
              .y = y.data,
              .y_channels_last = y.channels_last,
              .activation = epilogue.activation,
              .threads = useful_threads(threads, shape.geometry, strips.strips())});
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
    kernel({.geometry = shape.geometry,
            .strips = strips.strips(),
            .weights = weights,
            .dy = dy.data,
            .dy_channels_last = dy.channels_last,
            .dx = dx.data,
            .dx_channels_last = dx.channels_last,
            .threads = useful_threads(threads, shape.geometry, strips.strips())});
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
    kernel({.geometry = shape.geometry,
            .strips = strips.strips(),
            .x = x.data,
            .x_channels_last = x.channels_last,
            .dy = dy.data,
            .dy_channels_last = dy.channels_last,
            .dweights = dweights,
            .threads = useful_threads(threads, shape.geometry, strips.strips())});
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

namespace {

// Memory that begins a cache line, with the plan in it.
template <class T>
std::shared_ptr<const void> make_plan(const Conv2dForward<T>& call, PlanFn<T> make) {
  constexpr std::align_val_t kLine{64};
  std::shared_ptr<void> memory(::operator new(make(call, nullptr), kLine),
                               [](void* p) { ::operator delete(p, kLine); });
  make(call, memory.get());
  return memory;
}

}  // namespace

template <class T>
bool KeptPlans<T>::Sizes::operator==(const Sizes& other) const {
  static_assert(std::has_unique_object_representations_v<Conv2dGeometry>);
  return std::memcmp(&geometry, &other.geometry, sizeof geometry) == 0 && x_channels_last == other.x_channels_last &&
         y_channels_last == other.y_channels_last && threads == other.threads;
}

// Where the plan for these sizes is, or may be put; null where they should not be kept.
template <class T>
typename KeptPlans<T>::Kept* KeptPlans<T>::place(const Sizes& sizes) {
  Kept* oldest = &kept_[0];
  for (Kept& kept : kept_) {
    if (kept.plan != nullptr && kept.sizes == sizes) return &kept;
    if (kept.used < oldest->used) oldest = &kept;
  }
  const bool again = missed_ == sizes;
  missed_ = sizes;
  return oldest->plan == nullptr || again ? oldest : nullptr;
}

template <class T>
std::shared_ptr<const void> KeptPlans<T>::find(const Conv2dForward<T>& call, PlanFn<T> make) {
  const std::unique_lock<std::mutex> mine(mutex_, std::try_to_lock);
  if (!mine) return nullptr;
  const Sizes sizes{call.geometry, call.x_channels_last, call.y_channels_last, call.threads};
  Kept* const kept = place(sizes);
  if (kept == nullptr) return nullptr;
  if (kept->plan == nullptr || kept->sizes != sizes) {
    kept->plan = make_plan(call, make);
    kept->sizes = sizes;
    made_.fetch_add(1, std::memory_order_relaxed);
  }
  kept->used = ++calls_;
  return kept->plan;
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
  Conv2dForward<T> call{.geometry = geometry,
                        .strips = strips_.strips(),
                        .weights = weights_.data(),
                        .x = x.data,
                        .x_channels_last = x.channels_last,
                        .bias = bias_.empty() ? nullptr : bias_.data(),
                        .residual = residual,
                        .y = y.data,
                        .y_channels_last = y.channels_last,
                        .activation = activation_,
                        .threads = useful_threads(threads, geometry, strips_.strips())};
  const std::shared_ptr<const void> plan = plans_.find(call, kernel_.plan);
  call.plan = plan.get();
  kernel_.run(call);
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
  // The kernel multiplies x_u8 less a zero of its own rather than that of x, padding included.
  int8_t* words = reinterpret_cast<int8_t*>(weights_.data());
  strips_.pack(weight, values, words);
  const Strips& strips = strips_.strips();
  for (int32_t s = 0; s < strips.count; ++s) {
    const Strip& strip = strips.strip[s];
    for (int32_t lane = 0; lane < strip.lanes; ++lane) {
      int32_t& start = start_[static_cast<size_t>(strip.rows ? strip.rows[lane] : strip.row + lane)];
      for (int32_t j = 0; j < strip.count; ++j)
        for (int i = 0; i < 4; ++i)
          start -= (x.zero - kernels_.zero) * words[(strip.weights + j * strips.weight_stride + lane) * 4 + i];
    }
  }
}

template <class Y>
void PackedConv2dInt8::run_as(void (*kernel)(const Conv2dForward<uint8_t, Y>&), const Conv2dGeometry& geometry,
                              Tensor4d<const uint8_t> x, const Y* residual, Tensor4d<void> y, int threads) const {
  kernel({.geometry = geometry,
          .strips = strips_.strips(),
          .weights = weights_.data(),
          .x = x.data,
          .x_channels_last = x.channels_last,
          .bias = bias_.empty() ? nullptr : bias_.data(),
          .residual = residual,
          .y = static_cast<Y*>(y.data),
          .y_channels_last = y.channels_last,
          .activation = activation_,
          .threads = useful_threads(threads, geometry, strips_.strips()),
          .quantized = {.scale = scale_.data(),
                        .start = start_.data(),
                        .x_zero = x_.zero,
                        .y_inverse = 1.0f / y_.scale,
                        .y_zero = y_.zero}});
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
  if (geometry_.k != geometry_.c || geometry_.groups != geometry_.c)
    throw std::invalid_argument("sparsekd._C.PackedDepthwise: expected as many groups and outputs as channels");
  const int64_t c = geometry_.c, taps = geometry_.r * geometry_.s;
  weights_.resize(static_cast<size_t>(taps * c));
  for (int64_t i = 0; i < taps * c; ++i) weights_[static_cast<size_t>(i % taps * c + i / taps)] = weights[i];
  bias_.resize(static_cast<size_t>(c));
  if (bias != nullptr) bias_.assign(bias, bias + c);
}

void PackedDepthwise::run(const Conv2dGeometry& geometry, const float* x, const float* residual, float* y,
                          int threads) const {
  kernels().depthwise_f32({.geometry = geometry,
                           .weights = weights_.data(),
                           .x = x,
                           .bias = bias_.data(),
                           .residual = residual,
                           .y = y,
                           .activation = activation_,
                           .threads = threads});
}

}  // namespace sparsekd
