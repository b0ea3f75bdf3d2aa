// The gradient of the kept values: every kept column of a strip is a sum over pixels of 16 rows of dy times one input.
#pragma once

#include "bands_impl.h"
#include "words_impl.h"

namespace {

using sparsekd::Conv2dGradValues;

// dweights[e][lane] = or += sum over pixels of dy[pixel][lane] * x[offset[e] + pixel], for E columns and rows of
// `steps` x B words of kDepth pixels.
template <IsGradientWords Words>
struct ValueTile {
  const typename Words::Line* x;  // packed input of the first pixel
  int64_t images, image_stride, rows, row_stride;
  const float* dy;        // [image][row][word][16], dense
  int64_t dy_row_stride;  // words
  int64_t steps;          // B words each
  const int32_t* offsets;
  float* dweights;
  int64_t weight_stride;
  bool accumulate;
};

// A number that the compiler does not know to be the one of the step before: GCC would keep all of them in registers, of
// which there are too few, and load their sums with `x` from the stack.
inline int64_t loaded_again(int64_t offset) {
#ifdef __GNUC__
  asm volatile("" : "+r"(offset));
#endif
  return offset;
}

template <IsGradientWords Words, int E, int B>
void value_tile(const ValueTile<Words>& t) {
  using Line = typename Words::Line;
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
  const int32_t* const offsets = t.offsets;
  const float* dy_row = t.dy;
  for (int64_t image = 0; image < t.images; ++image)
    for (int64_t row = 0; row < t.rows; ++row, dy_row += t.dy_row_stride) {
      const Line* x = t.x + image * t.image_stride + row * t.row_stride;
      const float* dy = dy_row;
      for (int64_t step = 0; step < t.steps; ++step, x += B * Words::kDepth, dy += B * kStripRows) {
        Vec16 pixel[B];
#pragma GCC unroll 16
        for (int b = 0; b < B; ++b) pixel[b] = Vec16::load(dy + b * kStripRows);
#pragma GCC unroll 16
        for (int e = 0; e < E; e += kGroup) {
          int64_t at[kGroup];
#pragma GCC unroll 4
          for (int i = 0; i < kGroup; ++i) at[i] = loaded_again(offsets[e + i]);
#pragma GCC unroll 16
          for (int b = 0; b < B; ++b)
#pragma GCC unroll 4
            for (int i = 0; i < kGroup; ++i)
              acc[e + i][b % kChains] = Words::Sums::madd(
                  pixel[b], reinterpret_cast<const float*>(x + at[i] + b * Words::kDepth), acc[e + i][b % kChains]);
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

template <int E, IsGradientWords Words, int B = Vec16::kValuePixels>
inline void run_value_tile(int64_t words, const ValueTile<Words>& t) {
  if (words == B) return value_tile<Words, E, B>(t);
  if constexpr (B > 1) run_value_tile<E, Words, B - 1>(words, t);
}

// All columns of a strip, in groups of E, then E / 2, ...
template <IsGradientWords Words, int E = Vec16::kValueEntries>
inline void value_columns(ValueTile<Words> t, int64_t count, int64_t words) {
  int64_t entry = 0;
  for (; entry + E <= count; entry += E) {
    run_value_tile<E>(words, t);
    t.offsets += E;
    t.dweights += E * t.weight_stride;
  }
  if constexpr (E > 1)
    if (entry < count) value_columns<Words, E / 2>(t, count - entry, words);
}

// Words a step: the largest divisor of the row if one comes close to the most that fit, else equal steps and a shorter
// one, which costs a second pass.
inline int64_t choose_step(int64_t cols) {
  constexpr int64_t kMost = Vec16::kValuePixels;
  for (int64_t step = kMost; 2 * step > kMost; --step)
    if (cols % step == 0) return step;
  return ceil_div(cols, ceil_div(cols, kMost));
}

constexpr int64_t kPixelsInPlace = 8;  // that are not worth packing

template <IsGradientWords Words>
struct GradValuesCall {
  Conv2dGradValues<typename Words::X> args;
  Conv2dGeometry g;
  Layout layout;
  const int32_t* offsets;
  bool pixels;  // x is read where it lies, [pixel][channel]
};

// dy of one strip as [image][row][word][16], kDepth neighbouring pixels to a word.
template <IsGradientWords Words>
inline void pack_strip_words(const GradValuesCall<Words>& call, const Band& band, const Strip& strip, float* packed) {
  const auto pack = [&](const Band& part, float* target) {
    pack_strip_pixels(call.args.dy, call.args.dy_channels_last, call.g, part, strip, target, part.cols * kStripRows,
                      part.rows * part.cols * kStripRows);
  };
  if constexpr (Words::kDepth == 1) {
    pack(band, packed);
  } else {
    const int64_t words = ceil_div(band.cols, Words::kDepth);
    Band row{0, 1, 0, 1, band.x, band.cols};
    for (int64_t i = 0; i < band.images * band.rows; ++i, packed += words * kStripRows) {
      row.image = band.image + i / band.rows;
      row.y = band.y + i % band.rows;
      float* pixels = scratch_of<float>(sparsekd::kScratchWords, words * Words::kDepth * kStripRows);
      pack(row, pixels);
      zero_floats(pixels + band.cols * kStripRows, (words * Words::kDepth - band.cols) * kStripRows);
      for (int64_t word = 0; word < words; ++word, pixels += 2 * kStripRows)
        Words::join(Vec16::load(pixels), Vec16::load(pixels + kStripRows)).store(packed + word * kStripRows);
    }
  }
}

template <IsGradientWords Words>
inline void grad_values_band(const GradValuesCall<Words>& call, const Band& band, Range strips, float* dweights,
                             bool accumulate) {
  using T = typename Words::X;
  using Line = typename Words::Line;
  const Layout& l = call.layout;
  const Conv2dGeometry& g = call.g;
  const int64_t cols = ceil_div(band.cols, Words::kDepth);
  float* dy = scratch_of<float>(sparsekd::kScratchOutput, kStripRows * band.images * band.rows * cols);
  const Line* x;
  if (call.pixels) {
    x = reinterpret_cast<const Line*>(call.args.x) + band.x * g.c;
  } else {
    Line* packed = scratch_of<Line>(sparsekd::kScratchInput, l.size());
    const Input<T> input{.x = call.args.x,
                         .channels_last = call.args.x_channels_last,
                         .channels = g.c,
                         .group_channels = g.c / g.groups};
    pack_input(input, g, l, band, !accumulate, packed);
    x = packed;
  }
  const int64_t step = choose_step(cols), rest = cols % step;
  for (int64_t s = strips.begin; s < strips.end; ++s) {
    const Strip& strip = call.args.strips.strip[s];
    if (strip.count == 0) continue;
    pack_strip_words(call, band, strip, dy);
    ValueTile<Words> tile{.x = x,
                          .images = band.images,
                          .image_stride = l.image_rows * l.pitch,
                          .rows = band.rows,
                          .row_stride = l.pitch,
                          .dy = dy,
                          .dy_row_stride = cols * kStripRows,
                          .steps = cols / step,
                          .offsets = call.offsets + strip.first,
                          .dweights = dweights + strip.weights,
                          .weight_stride = call.args.strips.weight_stride,
                          .accumulate = accumulate};
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
    tile.x += (cols - rest) * Words::kDepth;
    tile.dy += (cols - rest) * kStripRows;
    tile.steps = 1;
    tile.accumulate = true;
    value_columns(tile, strip.count, rest);
  }
}

// By bands: fixed ranges of them have sums of their own, added in order, so the result does not depend on threads.
template <IsGradientWords Words>
inline void grad_values_by_bands(const GradValuesCall<Words>& call, const BandSize& size, int64_t parts) {
  const auto& args = call.args;
  const int64_t num_weights = args.strips.num_weights;
  float* sums = args.dweights;
  if (parts > 1) sums = scratch_of<float>(sparsekd::kScratchSum, (parts - 1) * num_weights);
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
template <IsGradientWords Words>
inline void grad_values_by_strips(const GradValuesCall<Words>& call, const BandSize& size) {
  const auto& args = call.args;
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

template <IsGradientWords Words>
void conv2d_grad_values(const Conv2dGradValues<typename Words::X>& args) {
  GradValuesCall<Words> call{};
  call.args = args;
  call.g = flatten_pointwise(args.geometry, args.x_channels_last && args.dy_channels_last);
  const Conv2dGeometry& g = call.g;
  const int64_t num_weights = args.strips.num_weights;
  if (num_weights == 0) return;
  int32_t *offsets, *whole_axes, *axes;
  Arena::carve(sparsekd::kScratchCall, [&](Arena& arena) {
    offsets = arena.take<int32_t>(offsets_memory(g, args.strips));
    whole_axes = arena.take<int32_t>(layout_memory(g));
    axes = arena.take<int32_t>(layout_memory(g));
  });
  if (g.n * g.p * g.q == 0) return zero_floats(args.dweights, num_weights);

  constexpr bool kFloats = std::is_same<typename Words::X, float>::value;
  call.pixels = kFloats && is_pointwise(g) && args.x_channels_last && g.n == 1 && g.h == 1 && g.w <= kPixelsInPlace;
  const bool by_strips = share_strips(args.strips, g);
  const Layout whole = make_layout(g, 1, g.p, g.q, whole_axes);
  const int64_t pieces = by_strips || call.pixels ? 1 : max64(4, min64(16, g.n));
  // Sums that leave the L2 cache should do so seldom, so the more of them there are the larger the bands.
  const int64_t floats = max64(kPackedFloats, min64(num_weights, 4 * kPackedFloats));
  const BandSize size = choose_bands(g, whole, pieces, 1, Words::kDepth * Vec16::kValuePixels, floats);
  call.layout = make_layout(g, size.images, size.rows, size.cols, axes);
  if (call.pixels) call.layout.channel = 1;
  call.offsets = fill_offsets(call.layout, g, args.strips, offsets);
  by_strips ? grad_values_by_strips(call, size) : grad_values_by_bands(call, size, min64(pieces, size.count()));
}

}  // namespace
