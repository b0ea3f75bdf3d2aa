#include "network.h"

#include <type_traits>
#include <utility>

#include "dispatch.h"

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
NetworkLayer pool_layer(const Conv2dShape& shape, bool mean) {
  const PoolKernels& table = kernels().pool;
  void (*kernel)(const Pool<T>&);
  if constexpr (std::is_same_v<T, float>)
    kernel = mean ? table.mean_f32 : table.max_f32;
  else
    kernel = mean ? table.mean_bf16 : table.max_bf16;
  return [=](int64_t n, const void* x, const void*, void* y, int threads) {
    Conv2dGeometry geometry = shape.geometry;
    geometry.n = n;
    kernel({geometry, static_cast<const T*>(x), static_cast<T*>(y), threads});
  };
}

template NetworkLayer pool_layer<float>(const Conv2dShape&, bool);
template NetworkLayer pool_layer<Bfloat16>(const Conv2dShape&, bool);

}  // namespace sparsekd
