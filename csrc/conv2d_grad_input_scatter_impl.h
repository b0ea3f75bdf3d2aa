// The gradient of the input of a few pixels (a linear layer at a small batch): weights stream past once, 16 columns of
// a strip become one vector of 16 sums over rows, and those are added where the columns lie. Nothing is packed or
// sorted.
#pragma once

#include "bands_impl.h"

namespace {

using sparsekd::Conv2dGradInput;

constexpr int64_t kScatteredPixels = 4;  // a vector of sums costs about three multiply-adds per pixel, a flat line 16

// dx[pixel][column] += sum over rows of weight[column][row] * dy[pixel][row].
inline void scatter_strip(const Strips& strips, const Strip& strip, const float* weights, const float* dy,
                          int64_t pixels, float* dx, int64_t dx_stride) {
  const int32_t* columns = strips.columns + strip.first;
  const float* w = weights + strip.weights;
  for (int64_t i = 0; i < strip.count; i += 16, w += 16 * strips.weight_stride) {
    const int64_t count = min64(16, strip.count - i);
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      const Vec16 rows = Vec16::load(dy + pixel * kStripRows);
      Vec16 products[16];
      if (count == 16) {
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) products[j] = Vec16::mul(rows, Vec16::load(w + j * strips.weight_stride));
      } else {
        for (int j = 0; j < 16; ++j)
          products[j] = j < count ? Vec16::mul(rows, Vec16::load(w + j * strips.weight_stride)) : Vec16::zero();
      }
      float sums[16];
      Vec16::sum_rows(products).store(sums);
      float* target = dx + pixel * dx_stride;
      for (int64_t j = 0; j < count; ++j) target[columns[i + j]] += sums[j];
    }
  }
}

// Parts of the strips have sums of their own, added in order; how many there are depends on the layer alone, so the
// result does not depend on the number of threads.
template <class T>
void conv2d_grad_input_scatter(const Conv2dGradInput<T>& args) {
  constexpr int64_t kParts = 8, kStripsOfPart = 8;
  const Conv2dGeometry& g = args.geometry;
  const int64_t area = g.p * g.q, pixels = g.n * area, size = pixels * g.c;
  const int64_t parts = max64(1, min64(kParts, args.strips.count / kStripsOfPart));
  float* sums = scratch_of<float>(sparsekd::kScratchSum, parts * size);
  parallel(args.threads, parts, [&](int64_t part) {
    float* dx = sums + part * size;
    float* dy = scratch_of<float>(sparsekd::kScratchOutput, pixels * kStripRows);
    zero_floats(dx, size);
    const Range range = strip_chunk(args.strips, parts, part);
    for (int64_t s = range.begin; s < range.end; ++s) {
      const Strip& strip = args.strips.strip[s];
      if (strip.count == 0 || strip.lanes == 0) continue;
      pack_strip_pixels(args.dy, args.dy_channels_last, g, {0, g.n, 0, g.p, 0, g.q}, strip, dy, g.q * kStripRows,
                        area * kStripRows);
      scatter_strip(args.strips, strip, args.weights, dy, pixels, dx + strip.group * (g.c / g.groups), g.c);
    }
  });
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < size; ++i) sums[i] += sums[part * size + i];
  if (args.dx_channels_last) return copy_floats(args.dx, sums, 1, size);
  for (int64_t image = 0; image < g.n; ++image)
    transpose_floats(sums + image * area * g.c, g.c, area, g.c, args.dx + image * area * g.c, area);
}

}  // namespace
