// The gradient of the kept values: every kept column of a strip is a sum over pixels of 16 rows of dy times one input.
#pragma once

#include "bands_impl.h"

namespace {

using sparsekd::Conv2dGradValues;

// dweights[e][lane] = or += sum over pixels of dy[pixel][lane] * x[offset[e] + pixel], for E columns and rows of
// `steps` x B pixels.
struct ValueTile {
  const float* x;  // packed input of the first pixel
  int64_t images, image_stride, rows, row_stride;
  const float* dy;        // [image][row][pixel][16], dense
  int64_t dy_row_stride;  // floats
  int64_t steps;          // B pixels each
  const int32_t* offsets;
  float* dweights;
  int64_t weight_stride;
  bool accumulate;
};

template <int E, int B>
void value_tile(const ValueTile& t) {
  // An accumulator is a chain of dependent multiply-adds. Columns advance together in small groups, and few columns get
  // several chains each.
  constexpr int kGroup = E < 4 ? E : 4;
  constexpr int kInFlight = Vec16::kValueEntries < 8 ? Vec16::kValueEntries : 8;
  constexpr int kChains = E >= kInFlight ? 1 : (kInFlight / E < B ? kInFlight / E : B);
  Vec16 acc[E][kChains];
#pragma GCC unroll 16
  for (int e = 0; e < E; ++e) {
    acc[e][0] = t.accumulate ? Vec16::load(t.dweights + e * t.weight_stride) : Vec16::zero();
#pragma GCC unroll 8
    for (int c = 1; c < kChains; ++c) acc[e][c] = Vec16::zero();
  }
  const float* dy_row = t.dy;
  for (int64_t image = 0; image < t.images; ++image)
    for (int64_t row = 0; row < t.rows; ++row, dy_row += t.dy_row_stride) {
      const float* x = t.x + image * t.image_stride + row * t.row_stride;
      const float* dy = dy_row;
      for (int64_t step = 0; step < t.steps; ++step, x += B, dy += B * kStripRows) {
        Vec16 pixel[B];
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) pixel[b] = Vec16::load(dy + b * kStripRows);
#pragma GCC unroll 16
        for (int e = 0; e < E; e += kGroup) {
          const float* at[kGroup];
#pragma GCC unroll 4
          for (int i = 0; i < kGroup; ++i) at[i] = x + t.offsets[e + i];
#pragma GCC unroll 8
          for (int b = 0; b < B; ++b)
#pragma GCC unroll 4
            for (int i = 0; i < kGroup; ++i)
              acc[e + i][b % kChains] = Vec16::fma(pixel[b], Vec16::broadcast(at[i] + b), acc[e + i][b % kChains]);
        }
      }
    }
#pragma GCC unroll 16
  for (int e = 0; e < E; ++e) {
#pragma GCC unroll 8
    for (int c = 1; c < kChains; ++c) acc[e][0] = Vec16::add(acc[e][0], acc[e][c]);
    acc[e][0].store(t.dweights + e * t.weight_stride);
  }
}

template <int E, int B = Vec16::kValuePixels>
inline void run_value_tile(int64_t pixels, const ValueTile& t) {
  if (pixels == B) return value_tile<E, B>(t);
  if constexpr (B > 1) run_value_tile<E, B - 1>(pixels, t);
}

// All columns of a strip, in groups of E, then E / 2, ...
template <int E = Vec16::kValueEntries>
inline void value_columns(ValueTile t, int64_t count, int64_t pixels) {
  int64_t entry = 0;
  for (; entry + E <= count; entry += E) {
    run_value_tile<E>(pixels, t);
    t.offsets += E;
    t.dweights += E * t.weight_stride;
  }
  if constexpr (E > 1)
    if (entry < count) value_columns<E / 2>(t, count - entry, pixels);
}

// Pixels a step: the largest divisor of the row if one comes close to the most that fit, else equal steps and a shorter
// one, which costs a second pass.
inline int64_t choose_step(int64_t cols) {
  constexpr int64_t kMost = Vec16::kValuePixels;
  for (int64_t step = kMost; 2 * step > kMost; --step)
    if (cols % step == 0) return step;
  return ceil_div(cols, ceil_div(cols, kMost));
}

constexpr int64_t kPixelsInPlace = 8;  // that are not worth packing

struct GradValuesCall {
  Conv2dGradValues args;
  Conv2dGeometry g;
  Layout layout;
  const int32_t* offsets;
  bool pixels;  // x is read where it lies, [pixel][channel]
};

inline void grad_values_band(const GradValuesCall& call, const Band& band, Range strips, float* dweights,
                             bool accumulate) {
  const Layout& l = call.layout;
  const Conv2dGeometry& g = call.g;
  float* dy = static_cast<float*>(scratch(
      sparsekd::kScratchOutput, sizeof(float) * kStripRows * static_cast<size_t>(band.images * band.rows * band.cols)));
  const float* x = call.args.x + band.x * g.c;
  if (!call.pixels) {
    float* packed =
        static_cast<float*>(scratch(sparsekd::kScratchInput, sizeof(float) * static_cast<size_t>(l.size())));
    const Input<float> input{call.args.x, call.args.x_channels_last, g.c, g.c / g.groups};
    pack_input(input, g, l, band, !accumulate, packed);
    x = packed;
  }
  const int64_t step = choose_step(band.cols), rest = band.cols % step;
  for (int64_t s = strips.begin; s < strips.end; ++s) {
    const Strip& strip = call.args.strips.strip[s];
    if (strip.count == 0) continue;
    pack_strip_pixels(call.args.dy, call.args.dy_channels_last, g, band, strip, dy, band.cols * kStripRows,
                      band.rows * band.cols * kStripRows);
    ValueTile tile{x,
                   band.images,
                   l.image_rows * l.pitch,
                   band.rows,
                   l.pitch,
                   dy,
                   band.cols * kStripRows,
                   band.cols / step,
                   call.offsets + strip.first,
                   dweights + strip.weights,
                   call.args.strips.weight_stride,
                   accumulate};
    if (call.pixels) {
      tile.rows = band.cols;
      tile.row_stride = g.c;
      tile.dy_row_stride = kStripRows;
      tile.steps = 1;
      value_columns(tile, strip.count, 1);
      continue;
    }
    value_columns(tile, strip.count, step);
    if (rest == 0) continue;
    tile.x += band.cols - rest;
    tile.dy += (band.cols - rest) * kStripRows;
    tile.steps = 1;
    tile.accumulate = true;
    value_columns(tile, strip.count, rest);
  }
}

// By bands: fixed ranges of them have sums of their own, added in order, so the result does not depend on threads.
inline void grad_values_by_bands(const GradValuesCall& call, const BandSize& size, int64_t parts) {
  const Conv2dGradValues& args = call.args;
  const int64_t num_weights = args.strips.num_weights;
  float* sums = args.dweights;
  if (parts > 1)
    sums = static_cast<float*>(
        scratch(sparsekd::kScratchSum, sizeof(float) * static_cast<size_t>((parts - 1) * num_weights)));
  const auto part_sum = [&](int64_t part) { return part == 0 ? args.dweights : sums + (part - 1) * num_weights; };
  parallel(args.threads, parts, [&](int64_t part) {
    const Range bands = share(size.count(), parts, part);
    for (int64_t i = bands.begin; i < bands.end; ++i)
      grad_values_band(call, size.band(call.g, i), {0, args.strips.count}, part_sum(part), i > bands.begin);
  });
  if (parts == 1) return;
  parallel(args.threads, args.threads, [&](int64_t chunk) {
    const Range range = share(num_weights, args.threads, chunk);
    for (int64_t part = 1; part < parts; ++part) {
      const float* sum = part_sum(part);
      for (int64_t i = range.begin; i < range.end; ++i) args.dweights[i] += sum[i];
    }
  });
}

// By strips: every thread packs all of x for its own.
inline void grad_values_by_strips(const GradValuesCall& call, const BandSize& size) {
  const Conv2dGradValues& args = call.args;
  const int64_t chunks = min64(args.threads, args.strips.count);
  parallel(args.threads, chunks, [&](int64_t chunk) {
    const Range strips = strip_chunk(args.strips, chunks, chunk);
    for (int64_t i = 0; i < size.count() && strips.begin < strips.end; ++i)
      grad_values_band(call, size.band(call.g, i), strips, args.dweights, i > 0);
  });
}

// Packing x again has to cost less than adding sums.
inline bool share_strips(const Strips& strips, const Conv2dGeometry& g) {
  constexpr int64_t kStrips = 4, kPacking = 4;
  return strips.count >= kStrips && kPacking * strips.num_weights > g.n * g.c * g.h * g.w;
}

void conv2d_grad_values(const Conv2dGradValues& args) {
  GradValuesCall call{
      args, flatten_pointwise(args.geometry, args.x_channels_last && args.dy_channels_last), {}, nullptr, false};
  const Conv2dGeometry& g = call.g;
  const int64_t num_weights = args.strips.num_weights;
  if (num_weights == 0) return;
  const int64_t bytes = 4 * (offsets_memory(g, args.strips) + 2 * layout_memory(g));
  int32_t* offsets = static_cast<int32_t*>(scratch(sparsekd::kScratchCall, static_cast<size_t>(bytes)));
  int32_t* axes = offsets + offsets_memory(g, args.strips);
  if (g.n * g.p * g.q == 0) return zero_floats(args.dweights, num_weights);

  call.pixels = is_pointwise(g) && args.x_channels_last && g.n == 1 && g.h == 1 && g.w <= kPixelsInPlace;
  const bool by_strips = share_strips(args.strips, g);
  const Layout whole = make_layout(g, 1, g.p, g.q, axes);
  const int64_t pieces = by_strips || call.pixels ? 1 : max64(4, min64(16, g.n));
  // Sums that leave the L2 cache should do so seldom, so the more of them there are the larger the bands.
  const int64_t floats = max64(kPackedFloats, min64(num_weights, 4 * kPackedFloats));
  const BandSize size = choose_bands(g, whole, pieces, 1, Vec16::kValuePixels, floats);
  call.layout = make_layout(g, size.images, size.rows, size.cols, axes + layout_memory(g));
  if (call.pixels) call.layout.channel = 1;
  call.offsets = fill_offsets(call.layout, g.groups, args.strips, offsets);
  by_strips ? grad_values_by_strips(call, size) : grad_values_by_bands(call, size, min64(pieces, size.count()));
}

}  // namespace
