// Max pooling and means, channels_last: channels are the lanes.
#pragma once

#include "depthwise_impl.h"
#include "half_impl.h"
#include "pool_kernels.h"

namespace {

using sparsekd::Pool;

constexpr int kPoolVectors = 4;         // of channels at once: as many cache lines that lie together
constexpr int64_t kPoolChannels = 128;  // of one piece of work

// One output pixel of up to 16 * V channels (`lanes` of them exist). x: the first tap that meets the input.
template <class T, bool kMean, int V>
inline void pool_tile(const Conv2dGeometry& g, const T* x, int64_t rows, int64_t cols, float scale, T* y, int lanes) {
  const float start = kMean ? 0.0f : -__builtin_inff();
  Vec16 acc[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) acc[v] = Vec16::broadcast(&start);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t s = 0; s < cols; ++s) {
      const T* p = x + (r * g.dilation_h * g.w + s * g.dilation_w) * g.c;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const Vec16 value = lanes == 16 * V ? load16(p + 16 * v) : load16_first(p, lanes);
        acc[v] = kMean ? Vec16::add(acc[v], value) : Vec16::max_nan(acc[v], value);
      }
    }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const Vec16 value = kMean ? Vec16::mul(acc[v], Vec16::broadcast(&scale)) : acc[v];
    if (lanes == 16 * V)
      store16(y + 16 * v, value);
    else
      store16_first(y, value, lanes);
  }
}

template <class T, bool kMean>
inline void pool_pixel(const Pool<T>& d, const Conv2dGeometry& g, int64_t image, int64_t p, int64_t q, Range channels) {
  const int64_t top = p * g.stride_h - g.pad_h, left = q * g.stride_w - g.pad_w;
  const Range rows = taps_inside(top, g.dilation_h, g.r, g.h), cols = taps_inside(left, g.dilation_w, g.s, g.w);
  const T* x = d.x + ((image * g.h + top + rows.begin * g.dilation_h) * g.w + left + cols.begin * g.dilation_w) * g.c;
  T* y = d.y + ((image * g.p + p) * g.q + q) * g.c;
  const int64_t height = rows.end - rows.begin, width = cols.end - cols.begin;
  const float scale = 1.0f / static_cast<float>(g.r * g.s);
  int64_t c = channels.begin;
  for (; c + 16 * kPoolVectors <= channels.end; c += 16 * kPoolVectors)
    pool_tile<T, kMean, kPoolVectors>(g, x + c, height, width, scale, y + c, 16 * kPoolVectors);
  for (; c < channels.end; c += 16)
    pool_tile<T, kMean, 1>(g, x + c, height, width, scale, y + c, static_cast<int>(min64(16, channels.end - c)));
}

// A mean counts padding as zeros. NaN in a window is NaN of it, as in torch.
template <class T, bool kMean>
void pool(const Pool<T>& d) {
  const Conv2dGeometry& g = d.geometry;
  const int64_t chunks = ceil_div(g.c, kPoolChannels);
  parallel(d.threads, g.n * g.p * chunks, [&](int64_t item) {
    const int64_t chunk = item % chunks, p = item / chunks % g.p, image = item / (chunks * g.p);
    const Range channels{chunk * kPoolChannels, min64(g.c, (chunk + 1) * kPoolChannels)};
    for (int64_t q = 0; q < g.q; ++q) pool_pixel<T, kMean>(d, g, image, p, q, channels);
  });
}

}  // namespace
