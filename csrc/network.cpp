#include "network.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include "dispatch.h"
#include "parallel.h"
#include "ranges_impl.h"

namespace sparsekd {

namespace {

constexpr int64_t kJoinBytes = 16384;  // of a piece of work
constexpr int64_t kLine = 64;

}  // namespace

Network::Network(std::vector<NetworkValue> values, int64_t buffer_bytes)
    : values_(std::move(values)), buffer_bytes_(buffer_bytes) {}

void Network::add(NetworkLayer layer, std::vector<int64_t> operands, int64_t y) {
  steps_.push_back({std::move(layer), std::move(operands), y});
}

// The layers from `first` on that only pass on what they make.
std::vector<RowLayer> Network::row_layers(size_t first) const {
  std::vector<RowLayer> layers;
  for (size_t i = first; i < steps_.size() && steps_[i].layer.row_layer.run; ++i) {
    if (i > first) {
      const int64_t x = steps_[i - 1].y;
      int64_t reads = 0;
      for (const Step& step : steps_) reads += std::count(step.operands.begin(), step.operands.end(), x);
      if (steps_[i].operands[0] != x || reads > 1 || values_[static_cast<size_t>(x)].pointer >= 0) break;
    }
    layers.push_back(steps_[i].layer.row_layer);
  }
  return layers;
}

// By rows, a result is written while the chain's own input is still read. So it may not take the input's memory, as it may
// where layers run one after the other: it gets some behind all others, or that of an earlier chain's result.
void Network::move_result(size_t first, size_t last, std::vector<Place>& moved) {
  const RowLayer& layer = steps_[last].layer.row_layer;
  const int64_t y = steps_[last].y, bytes = round_up(layer.geometry.p * layer.y_row(), kLine);
  NetworkValue& value = values_[static_cast<size_t>(y)];
  if (value.pointer >= 0) return;
  size_t last_read = last;
  for (size_t i = last + 1; i < steps_.size(); ++i)
    if (std::count(steps_[i].operands.begin(), steps_[i].operands.end(), y) > 0) last_read = i;
  for (Place& place : moved)
    if (place.last_read < first && place.bytes >= bytes) {
      value.offset = place.offset;
      place.last_read = last_read;
      return;
    }
  value.offset = buffer_bytes_;
  buffer_bytes_ += bytes;
  moved.push_back({value.offset, bytes, last_read});
}

void Network::finish() {
  std::vector<Place> moved;
  for (size_t first = 0; first < steps_.size();) {
    Step& step = steps_[first];
    step.chain = longest_chain(row_layers(first));
    const size_t count = step.chain == nullptr ? 1 : step.chain->size();
    if (count > 1) move_result(first, first + count - 1, moved);
    first += count;
  }
}

std::vector<size_t> Network::chain_lengths() const {
  std::vector<size_t> lengths;
  for (const Step& step : steps_)
    if (step.chain != nullptr) lengths.push_back(step.chain->size());
  return lengths;
}

void Network::run_slice(const std::vector<std::uintptr_t>& pointers, int64_t first, int64_t n, int threads) const {
  char* const buffer = static_cast<char*>(scratch(kScratchNetwork, static_cast<size_t>(buffer_bytes_ * n)));
  const auto address = [&](int64_t value) -> char* {
    if (value < 0) return nullptr;
    const NetworkValue& v = values_[static_cast<size_t>(value)];
    if (v.pointer < 0) return buffer + v.offset * n;
    return reinterpret_cast<char*>(pointers[static_cast<size_t>(v.pointer)]) + v.bytes * first;
  };
  std::vector<const void*> operands;
  for (size_t i = 0; i < steps_.size();) {
    const Step& step = steps_[i];
    operands.clear();
    if (step.chain != nullptr && step.chain->feeds(n, threads)) {
      const size_t behind = i + step.chain->size();
      for (size_t j = i; j < behind; ++j) operands.push_back(address(steps_[j].operands[1]));  // residuals
      step.chain->run(n, address(step.operands[0]), operands.data(), address(steps_[behind - 1].y), threads);
      i = behind;
      continue;
    }
    for (const int64_t operand : step.operands) operands.push_back(address(operand));
    step.layer.run(n, operands.data(), address(step.y), threads);
    ++i;
  }
}

void Network::run(const std::vector<std::uintptr_t>& pointers, int64_t n, int64_t images, int threads) const {
  const NetworkLoops loops(threads);
  const int64_t slices = images < 1 || n <= images ? 1 : (n + images - 1) / images;
  struct Work {
    const Network& network;
    const std::vector<std::uintptr_t>& pointers;
    int64_t n, slices;
    void run(int64_t slice, int threads) const {
      const int64_t first = n * slice / slices, end = n * (slice + 1) / slices;
      network.run_slice(pointers, first, end - first, threads);
    }
  } work{*this, pointers, n, slices};
  const int64_t alone = threads > 1 ? slices - slices % threads : slices;  // the rest is shared by all threads
  parallel_for(
      threads, alone, [](void* context, int64_t slice, bool) { static_cast<const Work*>(context)->run(slice, 1); },
      &work);
  for (int64_t slice = alone; slice < slices; ++slice) work.run(slice, threads);
}

template <class T>
NetworkLayer conv2d_layer(const PackedConv2d<T>& layer, bool x_channels_last, bool y_channels_last) {
  const auto run = [&layer, x_channels_last, y_channels_last](int64_t n, const void* const* in, void* y, int threads) {
    layer.run(with_images(layer.shape().geometry, n), {static_cast<const T*>(in[0]), x_channels_last},
              static_cast<const T*>(in[1]), {static_cast<T*>(y), y_channels_last}, threads);
  };
  return {run, x_channels_last && y_channels_last ? row_layer(layer) : RowLayer{}};
}

template NetworkLayer conv2d_layer(const PackedConv2d<float>&, bool, bool);
template NetworkLayer conv2d_layer(const PackedConv2d<Bfloat16>&, bool, bool);

template <class T>
NetworkLayer linear_layer(const PackedLinear<T>& layer, int64_t rows) {
  return {[&layer, rows](int64_t n, const void* const* in, void* y, int threads) {
    layer.run(with_batch(layer.shape().geometry, n * rows), {static_cast<const T*>(in[0]), true},
              static_cast<const T*>(in[1]), {static_cast<T*>(y), true}, threads);
  }};
}

template NetworkLayer linear_layer(const PackedLinear<float>&, int64_t);
template NetworkLayer linear_layer(const PackedLinear<Bfloat16>&, int64_t);

NetworkLayer depthwise_layer(const PackedDepthwise& layer) {
  const auto run = [&layer](int64_t n, const void* const* in, void* y, int threads) {
    layer.run(with_images(layer.geometry(), n), static_cast<const float*>(in[0]), static_cast<const float*>(in[1]),
              static_cast<float*>(y), threads);
  };
  return {run, row_layer(layer)};
}

template <class T>
NetworkLayer pool_layer(const Conv2dShape& shape, bool mean) {
  if (shape.geometry.k != shape.geometry.c)
    throw std::invalid_argument("sparsekd._C.Pool: expected as many outputs as channels");
  const PoolKernels& table = kernels().pool;
  void (*kernel)(const Pool<T>&);
  if constexpr (std::is_same_v<T, float>)
    kernel = mean ? table.mean_f32 : table.max_f32;
  else
    kernel = mean ? table.mean_bf16 : table.max_bf16;
  return {[=](int64_t n, const void* const* in, void* y, int threads) {
    kernel({.geometry = with_images(shape.geometry, n),
            .x = static_cast<const T*>(in[0]),
            .y = static_cast<T*>(y),
            .threads = threads});
  }};
}

template NetworkLayer pool_layer<float>(const Conv2dShape&, bool);
template NetworkLayer pool_layer<Bfloat16>(const Conv2dShape&, bool);

template <class T>
NetworkLayer gate_layer(int64_t pixels, int64_t channels, bool channels_last, Activation activation) {
  const BetweenKernels& table = kernels().between;
  void (*kernel)(const Gate<T>&);
  if constexpr (std::is_same_v<T, float>)
    kernel = table.gate_f32;
  else
    kernel = table.gate_bf16;
  return {[=](int64_t n, const void* const* in, void* y, int threads) {
    kernel({.images = n,
            .pixels = pixels,
            .channels = channels,
            .channels_last = channels_last,
            .x = static_cast<const T*>(in[0]),
            .gate = static_cast<const T*>(in[1]),
            .residual = static_cast<const T*>(in[2]),
            .y = static_cast<T*>(y),
            .activation = activation,
            .threads = threads});
  }};
}

template NetworkLayer gate_layer<float>(int64_t, int64_t, bool, Activation);
template NetworkLayer gate_layer<Bfloat16>(int64_t, int64_t, bool, Activation);

template <class T>
NetworkLayer layer_norm_layer(int64_t rows, int64_t channels, const float* weight, const float* bias, float epsilon) {
  const BetweenKernels& table = kernels().between;
  void (*kernel)(const LayerNorm<T>&);
  if constexpr (std::is_same_v<T, float>)
    kernel = table.layer_norm_f32;
  else
    kernel = table.layer_norm_bf16;
  return {[=, w = std::vector<float>(weight, weight + channels), b = std::vector<float>(bias, bias + channels)](
              int64_t n, const void* const* in, void* y, int threads) {
    kernel({.rows = n * rows,
            .channels = channels,
            .x = static_cast<const T*>(in[0]),
            .weight = w.data(),
            .bias = b.data(),
            .epsilon = epsilon,
            .y = static_cast<T*>(y),
            .threads = threads});
  }};
}

template NetworkLayer layer_norm_layer<float>(int64_t, int64_t, const float*, const float*, float);
template NetworkLayer layer_norm_layer<Bfloat16>(int64_t, int64_t, const float*, const float*, float);

NetworkLayer join_layer(int64_t rows, std::vector<int64_t> widths) {
  const int64_t all = std::accumulate(widths.begin(), widths.end(), int64_t{0});
  return {[=, widths = std::move(widths)](int64_t n, const void* const* in, void* y, int threads) {
    struct Work {
      const std::vector<int64_t>& widths;
      const void* const* in;
      char* y;
      int64_t all, rows, block;
    } work{widths, in,       static_cast<char*>(y),
           all,    n * rows, std::max<int64_t>(1, kJoinBytes / std::max<int64_t>(1, all))};
    const auto body = [](void* context, int64_t item, bool) {
      const Work& w = *static_cast<const Work*>(context);
      for (int64_t row = item * w.block; row < std::min(w.rows, (item + 1) * w.block); ++row) {
        char* to = w.y + row * w.all;
        for (size_t i = 0; i < w.widths.size(); to += w.widths[i++])
          memcpy(to, static_cast<const char*>(w.in[i]) + row * w.widths[i], static_cast<size_t>(w.widths[i]));
      }
    };
    parallel_for(work.rows * all < 4 * kJoinBytes ? 1 : threads, (work.rows + work.block - 1) / work.block, body,
                 &work);
  }};
}

}  // namespace sparsekd
