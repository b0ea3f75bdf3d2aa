#include "network.h"

#include <stdexcept>
#include <type_traits>
#include <utility>

#include "dispatch.h"
#include "parallel.h"

namespace sparsekd {

Network::Network(std::vector<NetworkValue> values, int64_t buffer_bytes)
    : values_(std::move(values)), buffer_bytes_(buffer_bytes) {}

void Network::add(NetworkLayer layer, int64_t x, int64_t residual, int64_t y) {
  steps_.push_back({std::move(layer), x, residual, y});
}

void Network::run_slice(const std::vector<std::uintptr_t>& pointers, int64_t first, int64_t n, int threads) const {
  char* const buffer = static_cast<char*>(scratch(kScratchNetwork, static_cast<size_t>(buffer_bytes_ * n)));
  const auto address = [&](int64_t value) -> char* {
    if (value < 0) return nullptr;
    const NetworkValue& v = values_[static_cast<size_t>(value)];
    if (v.pointer < 0) return buffer + v.offset * n;
    return reinterpret_cast<char*>(pointers[static_cast<size_t>(v.pointer)]) + v.bytes * first;
  };
  for (const Step& step : steps_) step.layer(n, address(step.x), address(step.residual), address(step.y), threads);
}

void Network::run(const std::vector<std::uintptr_t>& pointers, int64_t n, int64_t images, int threads) const {
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
  return
      [&layer, x_channels_last, y_channels_last](int64_t n, const void* x, const void* residual, void* y, int threads) {
        Conv2dGeometry geometry = layer.shape().geometry;
        geometry.n = n;
        layer.run(geometry, {static_cast<const T*>(x), x_channels_last}, static_cast<const T*>(residual),
                  {static_cast<T*>(y), y_channels_last}, threads);
      };
}

template NetworkLayer conv2d_layer(const PackedConv2d<float>&, bool, bool);
template NetworkLayer conv2d_layer(const PackedConv2d<Bfloat16>&, bool, bool);

template <class T>
NetworkLayer linear_layer(const PackedLinear<T>& layer, int64_t rows) {
  return [&layer, rows](int64_t n, const void* x, const void* residual, void* y, int threads) {
    layer.run(with_batch(layer.shape().geometry, n * rows), {static_cast<const T*>(x), true},
              static_cast<const T*>(residual), {static_cast<T*>(y), true}, threads);
  };
}

template NetworkLayer linear_layer(const PackedLinear<float>&, int64_t);
template NetworkLayer linear_layer(const PackedLinear<Bfloat16>&, int64_t);

NetworkLayer depthwise_layer(const PackedDepthwise& layer) {
  return [&layer](int64_t n, const void* x, const void* residual, void* y, int threads) {
    layer.run(n, static_cast<const float*>(x), static_cast<const float*>(residual), static_cast<float*>(y), threads);
  };
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
  return [=](int64_t n, const void* x, const void*, void* y, int threads) {
    Conv2dGeometry geometry = shape.geometry;
    geometry.n = n;
    kernel({.geometry = geometry, .x = static_cast<const T*>(x), .y = static_cast<T*>(y), .threads = threads});
  };
}

template NetworkLayer pool_layer<float>(const Conv2dShape&, bool);
template NetworkLayer pool_layer<Bfloat16>(const Conv2dShape&, bool);

}  // namespace sparsekd
