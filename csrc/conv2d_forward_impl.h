// y = activation(conv(x, w) + bias + residual): what register tiles read, how a call is shared out, and the call.
#pragma once

#include "conv2d_forward_place_impl.h"

namespace {

template <IsWords Words>
using ForwardInput = Input<typename Words::X, Words::kDepth>;

// Whether tiles that have a pointer for every pixel read no more than stays in L1.
inline bool pixels_fit(const Conv2dGeometry& g) {
  constexpr int64_t kPixels = Vec16::kTilePixels;
  const int64_t span = (kPixels - 1) * g.stride_w + (g.s - 1) * g.dilation_w + 1;
  const int64_t words = min64(span, kPixels * g.s) * g.r * g.c;  // if the tile lies in one row
  return words <= l1_tile_floats();
}

// Packing costs about as much as using every channel once. So it pays where strips share it, unless tiles of single pixels
// are as wide as others; these in turn need long lists of columns to hide their set-up. Measured, see README.md.
template <IsWords Words>
inline Source choose_source(const Conv2dForward<typename Words::X, typename Words::Y>& args, const Conv2dGeometry& g,
                            const ForwardInput<Words>& in) {
  // Offsets of channels are 32-bit integers: a larger image is packed, band by band.
  const bool near = g.c * g.h * g.w <= INT32_MAX;
  if (in.in_place() && Words::kDepth == 1 && is_pointwise(g) && !args.x_channels_last && near) return Source::kChannels;
  if (!args.x_channels_last || (is_padded(g) ? Words::kDepth > 1 : !in.in_place())) return Source::kPacked;
  const bool single_tap = g.r == 1 && g.s == 1 && !is_padded(g);
  constexpr int64_t kFewPixels = 16, kManyChannels = 128;
  int64_t columns = 0;
  for (int32_t i = 0; i < args.strips.count; ++i) columns += args.strips.strip[i].count;
  if (single_tap && (g.n * g.p * g.q < kFewPixels || (columns < 2 * g.c && g.c >= kManyChannels)))
    return Source::kPixels;
  if (kPixelPointers) {
    const bool pays = single_tap || (near && g.stride_h <= g.r && g.stride_w <= g.s);
    return pays && pixels_fit(g) ? Source::kPixels : Source::kPacked;
  }
  const bool wide = 2 * line_pixels(g.c) >= Vec16::kTilePixels;
  const bool narrow = line_pixels(g.c) * g.c <= l1_tile_floats() && columns <= 8 * g.c;
  return single_tap && (wide || narrow) ? Source::kPixels : Source::kPacked;
}

// What the outputs of a band read: where it lies, or in scratch memory.
template <IsWords Words>
inline const float* band_input(const ForwardCall<Words>& call, const ForwardInput<Words>& x, const Band& band,
                               bool first) {
  const Conv2dGeometry& g = call.g;
  const float* const words = reinterpret_cast<const float*>(call.args.x);
  if (call.source == Source::kChannels) return words + band.image * g.c * g.w + band.x;
  if (call.source == Source::kPacked) {
    float* packed = scratch_of<float>(sparsekd::kScratchInput, call.layout.size());
    pack_input(x, g, call.layout, band, first, packed);
    return packed;
  }
  if (!is_padded(g)) return words + ((band.image * g.h + band.y * g.stride_h) * g.w + band.x * g.stride_w) * g.c;
  if constexpr (Words::kDepth == 1) {
    float* copy = scratch_of<float>(sparsekd::kScratchInput, band.images * call.steps.image);
    copy_pixels(call.args.x, g, band, call.steps.image, copy);
    return copy;
  }
  return nullptr;  // words of several channels are never copied
}

// Whether it takes less time that every thread reads all of a small input, for some of the strips, than that each takes
// some rows for all of them. In products of a column and a pixel. `words`: of the input, if it is packed or copied.
inline bool strips_pay(const Strips& strips, const Conv2dGeometry& g, int64_t threads, int64_t words) {
  constexpr double kCopied = 0.5;                    // of a word
  constexpr int64_t kCached = 64 * 1024, kRead = 4;  // weights that stay in L2; of a column that does not
  if (strips.count < threads) return false;
  int64_t columns = 0, most = 0;
  for (int32_t i = 0; i < strips.count; ++i) columns += strips.strip[i].count;
  for (int64_t chunk = 0; chunk < threads; ++chunk) {
    const Range range = strip_chunk(strips, threads, chunk);
    int64_t its = 0;
    for (int64_t i = range.begin; i < range.end; ++i) its += strips.strip[i].count;
    most = max64(most, its);
  }
  const int64_t rows = ceil_div(g.n * g.p, threads), cols = g.p == 1 ? ceil_div(g.q, threads) : g.q;
  const double read =
      static_cast<double>(rows * g.stride_h + (g.r - 1) * g.dilation_h) / static_cast<double>(g.n * g.h);
  const int64_t passes = columns * kStripRows > kCached ? kRead : 0;
  const double by_bands = static_cast<double>((g.p == 1 ? g.n * cols : rows * cols) * columns + passes * columns) +
                          kCopied * static_cast<double>(words) * (g.p == 1 ? 1.0 / static_cast<double>(threads) : read);
  const double by_strips =
      static_cast<double>((g.n * g.p * g.q + passes) * most) + kCopied * static_cast<double>(words);
  return by_strips < by_bands;
}

// Words of every strip's rows; zeros of rows that are not there, and of null.
inline void gather_rows(const Strips& strips, const void* rows, float* words) {
  zero_floats(words, strips.count * kStripRows);
  if (rows == nullptr) return;
  for (int32_t i = 0; i < strips.count; ++i)
    for (int lane = 0; lane < strips.strip[i].lanes; ++lane)
      memcpy(words + i * kStripRows + lane, static_cast<const float*>(rows) + row_of(strips.strip[i], lane),
             sizeof(float));
}

// The memory of a plan.
template <IsWords Words>
struct ForwardPlanMemory {
  ForwardPlan* plan;
  float *bias, *start, *scale;
  int32_t *offsets, *whole_axes, *axes;

  ForwardPlanMemory(Arena& arena, const Conv2dGeometry& g, const Strips& strips) {
    constexpr bool kInteger = Words::Sums::kInteger;
    const int64_t rows = strips.count * kStripRows;
    plan = arena.take<ForwardPlan>(1);
    bias = arena.take<float>(rows);
    start = kInteger ? arena.take<float>(rows) : bias;
    scale = kInteger ? arena.take<float>(rows) : bias;  // floats need none
    offsets = arena.take<int32_t>(offsets_memory(g, strips));
    whole_axes = arena.take<int32_t>(layout_memory(g));
    axes = arena.take<int32_t>(layout_memory(g));
  }
};

template <IsWords Words>
inline ForwardInput<Words> forward_input(const Conv2dForward<typename Words::X, typename Words::Y>& args) {
  const Conv2dGeometry& g = args.geometry;
  return {.x = args.x,
          .channels_last = args.x_channels_last,
          .channels = g.c,
          .group_channels = g.c / g.groups,
          .zero = args.quantized.x_zero};
}

// The bytes of a plan, and the plan if there is memory for it.
template <IsWords Words>
size_t conv2d_forward_plan(const Conv2dForward<typename Words::X, typename Words::Y>& args, void* memory) {
  Conv2dGeometry g = flatten_pointwise(args.geometry, args.x_channels_last && args.y_channels_last);
  const ForwardInput<Words> x = forward_input<Words>(args);
  g.c = g.groups * x.group_words();
  Arena arena(memory);
  const ForwardPlanMemory<Words> parts(arena, g, args.strips);
  if (memory == nullptr || g.n * g.p * g.q * g.k == 0) return arena.taken();
  gather_rows(args.strips, args.bias, parts.bias);
  if (Words::Sums::kInteger) {
    gather_rows(args.strips, args.quantized.start, parts.start);
    gather_rows(args.strips, args.quantized.scale, parts.scale);
  }
  ForwardPlan& plan = *parts.plan;
  plan = {.g = g,
          .source = choose_source<Words>(args, g, x),
          .layout = {},
          .steps = {},
          .offsets = nullptr,
          .start = parts.start,
          .scale = parts.scale,
          .bias = parts.bias,
          .size = {},
          .chunks = 1};

  const Layout whole = make_layout(g, 1, g.p, g.q, parts.whole_axes);
  const bool pixels = plan.source == Source::kPixels, copied = pixels && is_padded(g);
  const bool lines = pixels && reads_lines(g);
  const TileShape tile = pixels ? TileShape{1, choose_tile(1).rows} : choose_tile(g.q);
  const auto cut = [&](int64_t pieces) {
    if (copied) return choose_pixel_bands(g, pieces, kPackedFloats);
    if (!lines) return choose_bands(g, whole, pieces, tile.rows, tile.cols, kPackedFloats);
    // Lines may be of any length, so bands are cut evenly; but each is to be worth a line.
    if (g.n * g.p * g.q < pieces * Vec16::kTilePixels) pieces = min64(pieces, args.threads);
    return choose_bands(g, whole, pieces, 1, 1, max64(kPackedFloats, Vec16::kTilePixels * g.c));
  };
  plan.size = cut(1);
  if (args.threads > 1) {
    const int64_t words = plan.source == Source::kPacked || copied ? g.n * g.c * g.h * g.w : 0;
    if (plan.size.count() == 1 && strips_pay(args.strips, g, args.threads, words)) {
      plan.chunks = args.threads;
    } else {
      plan.size = cut(2 * args.threads);
      plan.chunks = min64(args.strips.count, ceil_div(args.threads, plan.size.count()));
    }
  }
  plan.size.even_rows = tile.rows == 1;

  plan.layout = make_layout(g, plan.size.images, plan.size.rows, plan.size.cols, parts.axes);
  if (pixels) {
    plan.steps = pixel_steps(g, plan.size.rows);
    plan.offsets = fill_pixel_offsets(g, args.strips, parts.offsets);
  } else {
    if (plan.source == Source::kChannels) plan.layout.channel = g.w;
    const bool packed = plan.source == Source::kPacked;
    plan.steps = {packed ? plan.layout.row(1, 0) : g.c * g.w, packed ? plan.layout.pitch : g.w, 1};
    plan.offsets = fill_offsets(plan.layout, g, args.strips, parts.offsets);
  }
  return arena.taken();
}

template <IsWords Words>
void conv2d_forward(const Conv2dForward<typename Words::X, typename Words::Y>& args) {
  const Conv2dGeometry& g = args.geometry;
  if (g.n * g.p * g.q * g.k == 0) return;
  const void* plan = args.plan;
  if (plan == nullptr) {
    void* const memory = sparsekd::scratch(sparsekd::kScratchCall, conv2d_forward_plan<Words>(args, nullptr));
    conv2d_forward_plan<Words>(args, memory);
    plan = memory;
  }
  ForwardCall<Words> call{*static_cast<const ForwardPlan*>(plan), args, false};
  if constexpr (std::is_same<typename Words::Y, float>::value)
    call.stream = args.y_channels_last && stream_output(args.y, g.n * g.p * g.q, g.k);
  const ForwardInput<Words> x = forward_input<Words>(args);
  parallel_workers(args.threads, call.size.count() * call.chunks, [&](int64_t item, bool first) {
    const Band band = call.size.band(call.g, item / call.chunks);
    const Range strips = strip_chunk(args.strips, call.chunks, item % call.chunks);
    forward_band(call, band, band_input(call, x, band, first), strips);
    if (call.stream) Vec16::fence();
  });
}

}  // namespace
