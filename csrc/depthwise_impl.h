// Depthwise convolution, channels_last: 16 channels are the lanes. A batch norm with its activation is the 1 x 1 case.
#pragma once

#include "activation_impl.h"
#include "layout_impl.h"

namespace {

using sparsekd::Depthwise;

constexpr int kDepthwisePixels = Vec16::kTilePixels < 8 ? 4 : 8;  // output pixels that share a load of the weights

struct Taps {
  Range rows, cols;  // those that meet the input
};

// `B` neighbouring output pixels, 16 channels from `c` on (`lanes` of them exist). x: offset of the input below tap
// (0, 0) of the first pixel, which padding may put outside the tensor.
template <int B, bool kWhole>
inline void depthwise_tile(const Depthwise& d, const Conv2dGeometry& g, int64_t x, Taps taps, int64_t at, int64_t c,
                           int lanes) {
  const auto load = [&](const float* p) { return kWhole ? Vec16::load(p) : Vec16::load_first(p, lanes); };
  const int64_t step = g.stride_w * g.c, col = g.dilation_w * g.c, row = g.dilation_h * g.w * g.c;
  Vec16 acc[B];
  const Vec16 bias = load(d.bias + c);
#pragma GCC unroll 8
  for (int b = 0; b < B; ++b) acc[b] = bias;
  for (int64_t r = taps.rows.begin; r < taps.rows.end; ++r) {
    const float* weights = d.weights + (r * g.s + taps.cols.begin) * g.c + c;
    const float* p = d.x + x + r * row + taps.cols.begin * col + c;
    for (int64_t s = taps.cols.begin; s < taps.cols.end; ++s, weights += g.c, p += col) {
      const Vec16 weight = load(weights);
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) acc[b] = Vec16::fma(weight, load(p + b * step), acc[b]);
    }
  }
  if (d.residual != nullptr)
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) acc[b] = Vec16::add(acc[b], load(d.residual + at + b * g.c + c));
  const auto finish = [&](int b, Vec16 v) {
    float* const y = d.y + at + b * g.c + c;
    kWhole ? v.store(y) : v.store_first(y, lanes);
  };
  if (is_bounded(d.activation)) {
    const Bounds bounds = bounds_of(d.activation);
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) finish(b, bounds.clamp(acc[b]));
    return;
  }
  float all[B * 16];
#pragma GCC unroll 8
  for (int b = 0; b < B; ++b) acc[b].store(all + 16 * b);
  activate_floats(all, B, d.activation);
#pragma GCC unroll 8
  for (int b = 0; b < B; ++b) finish(b, Vec16::load(all + 16 * b));
}

template <int B>
inline void depthwise_channels(const Depthwise& d, const Conv2dGeometry& g, int64_t x, Taps taps, int64_t at,
                               Range channels) {
  int64_t c = channels.begin;
  for (; c + 16 <= channels.end; c += 16) depthwise_tile<B, true>(d, g, x, taps, at, c, 16);
  if (c < channels.end) depthwise_tile<B, false>(d, g, x, taps, at, c, static_cast<int>(channels.end - c));
}

// Taps i with 0 <= start + i * dilation < size.
inline Range taps_inside(int64_t start, int64_t dilation, int64_t taps, int64_t size) {
  const int64_t begin = start < 0 ? ceil_div(-start, dilation) : 0;
  const int64_t end = start < size ? ceil_div(size - start, dilation) : 0;
  return {min64(begin, taps), max64(min64(begin, taps), min64(end, taps))};
}

inline void depthwise_row(const Depthwise& d, const Conv2dGeometry& g, int64_t image, int64_t p, Range columns,
                          Range channels) {
  const int64_t y = p * g.stride_h - g.pad_h;
  const Range rows = taps_inside(y, g.dilation_h, g.r, g.h);
  // Outputs before `inner` see the whole kernel, if x >= 0.
  const int64_t room = g.w - 1 + g.pad_w - (g.s - 1) * g.dilation_w;
  const int64_t inner = room < 0 ? 0 : min64(columns.end, room / g.stride_w + 1);
  for (int64_t q = columns.begin; q < columns.end;) {
    const int64_t x = q * g.stride_w - g.pad_w;
    const int64_t input = ((image * g.h + y) * g.w + x) * g.c, at = ((image * g.p + p) * g.q + q) * g.c;
    const Taps taps{rows, taps_inside(x, g.dilation_w, g.s, g.w)};
    if (x >= 0 && inner - q >= kDepthwisePixels) {
      depthwise_channels<kDepthwisePixels>(d, g, input, taps, at, channels);
      q += kDepthwisePixels;
    } else if (x >= 0 && inner - q >= 4) {
      depthwise_channels<4>(d, g, input, taps, at, channels);
      q += 4;
    } else {
      depthwise_channels<1>(d, g, input, taps, at, channels);
      ++q;
    }
  }
}

// Work is cut by rows, and by channels as well where neighbouring rows share input, so that the rows of a kernel stay
// near. 64 to 1000 channels at once measured alike, 16 a fifth slower.
void depthwise(const Depthwise& d) {
  const Conv2dGeometry g = flatten_pointwise(d.geometry, true);
  if (g.n * g.p * g.q * g.c == 0) return;
  const bool pointwise = is_pointwise(g);
  const int64_t chunks = pointwise ? 1 : ceil_div(g.c, 128), width = round_up(ceil_div(g.c, chunks), 16);
  const int64_t pieces = d.threads == 1 ? 1 : 2 * d.threads;
  const int64_t wanted = ceil_div(pieces, g.n * chunks);
  const int64_t row_bands = min64(g.p, wanted), col_bands = min64(ceil_div(g.q, 64), ceil_div(wanted, row_bands));
  parallel(d.threads, g.n * chunks * row_bands * col_bands, [&](int64_t item) {
    const int64_t chunk = item % chunks, place = item / chunks, image = place / (row_bands * col_bands);
    const Range rows = share(g.p, row_bands, place / col_bands % row_bands);
    const Range columns = share(g.q, col_bands, place % col_bands);
    const Range channels{chunk * width, min64(g.c, (chunk + 1) * width)};
    for (int64_t p = rows.begin; p < rows.end; ++p) depthwise_row(d, g, image, p, columns, channels);
  });
}

}  // namespace
