// y = activation(conv(x, w) + bias + residual): where register tiles (conv2d_forward_tile_impl.h) lie, what they read and
// what becomes of their sums.
#pragma once

#include <type_traits>

#include "conv2d_forward_tile_impl.h"

namespace {

using sparsekd::Conv2dForward;

// Where the kernels read x.
enum class Source {
  kPacked,    // from the packed layout
  kChannels,  // where it lies, [image][channel][pixel]: 1 x 1, stride 1
  kPixels,    // where it lies, [image][pixel][channel]: 1 x 1, any stride; tiles of single pixels
};

template <IsWords Words>
struct ForwardCall {
  Conv2dForward<typename Words::X, typename Words::Y> args;
  Conv2dGeometry g;  // c counts words
  Layout layout;
  Source source;
  const int32_t* offsets;  // [num_columns]
  const float* start;      // [strips][16]
  const float* scale;      // the same, when sums are integers
  const float* bias;
  bool stream;  // y is written past the caches
};

// n <= 16 finished sums, to which `residual` elements are added if there are any: activation, type of y.
template <IsWords Words>
inline void put(const ForwardCall<Words>& call, typename Words::Y* y, Vec16 v, const typename Words::Y* residual,
                int n) {
  if constexpr (sizeof *y == 1) {
    const float zero = static_cast<float>(call.args.quantized.y_zero);
    v = activate(v, call.args.activation);
    store_bytes(y, Vec16::fma(v, Vec16::broadcast(&call.args.quantized.y_inverse), Vec16::broadcast(&zero)), n);
  } else {
    if (residual) v = Vec16::add(v, load16_first(residual, n));
    store16_first(y, activate(v, call.args.activation), n);
  }
}

// Writes finished pixels from [pixel][16] for outputs that lie [pixel][row], where a strip is ragged or scattered.
template <IsWords Words>
inline void store_pixels(const ForwardCall<Words>& call, const Strip& strip, const float* buffer, int64_t pixel,
                         int64_t count) {
  using Y = typename Words::Y;
  const Y* residual = call.args.residual;
  for (int64_t i = 0; i < count; ++i, buffer += kStripRows) {
    const int64_t base = (pixel + i) * call.g.k;
    if (strip.rows == nullptr) {
      const int64_t at = base + strip.row;
      put(call, call.args.y + at, Vec16::load(buffer), residual ? residual + at : nullptr, strip.lanes);
      continue;
    }
    Y lanes[kStripRows] = {};
    if (residual)
      for (int lane = 0; lane < strip.lanes; ++lane) lanes[lane] = residual[base + strip.rows[lane]];
    put(call, lanes, Vec16::load(buffer), residual ? lanes : nullptr, kStripRows);
    for (int lane = 0; lane < strip.lanes; ++lane) call.args.y[base + strip.rows[lane]] = lanes[lane];
  }
}

// The same for outputs that lie [row][pixel]: `count` neighbouring pixels of one image.
template <IsWords Words>
inline void store_rows(const ForwardCall<Words>& call, const Strip& strip, const float* buffer, int64_t image,
                       int64_t pixel, int64_t count) {
  const int64_t area = call.g.p * call.g.q;
  count = min64(count, Vec16::kTilePixels);  // which it is, and the compiler may know
  for (int64_t i = 0; i < count; i += 16) {
    const int n = static_cast<int>(min64(16, count - i));
    Vec16 v[16];
    for (int j = 0; j < 16; ++j) v[j] = j < n ? Vec16::load(buffer + (i + j) * kStripRows) : Vec16::zero();
    Vec16::transpose(v);
    for (int lane = 0; lane < strip.lanes; ++lane) {
      const int64_t at = (image * call.g.k + row_of(strip, lane)) * area + pixel + i;
      put(call, call.args.y + at, v[lane], call.args.residual ? call.args.residual + at : nullptr, n);
    }
  }
}

// Where a register tile lies in its band: `cols` pixels from `col` in each of `rows` image rows from `first`, or, where it
// is `single`, `rows` pixels from `first`, counted row by row.
struct TilePlace {
  bool single;
  int64_t first, rows, col, cols;
};

// All strips of [strips.begin, strips.end) on one register tile.
template <IsWords Words>
[[gnu::noinline]] void forward_strips(const ForwardCall<Words>& call, const Band& band, const float* input,
                                      const TilePlace& place, Range strips,
                                      ForwardTileFn<typename Words::Sums> kernel) {
  const auto [single, first, rows, col, cols] = place;
  const Conv2dGeometry& g = call.g;
  alignas(64) float buffer[Vec16::kTilePixels * kStripRows];
  ForwardTile<typename Words::Sums> tile;
  int64_t image[kTileRowsMax], pixel[kTileRowsMax];
  const int64_t per_row = single ? band.cols : 1;
  int64_t x = first % per_row, y = first / per_row % band.rows, i = first / per_row / band.rows;
  for (int64_t a = 0; a < rows; ++a) {
    const int64_t begin = single ? x : col, left = band.x + begin;
    image[a] = band.image + i;
    pixel[a] = (band.y + y) * g.q + left;
    if (call.source == Source::kPixels)
      tile.input[a] = input + ((image[a] * g.h + (band.y + y) * g.stride_h) * g.w + left * g.stride_w) * g.c;
    else if (call.source == Source::kChannels)
      tile.input[a] = input + image[a] * g.c * g.w + pixel[a];
    else
      tile.input[a] = input + call.layout.row(i, y) + begin;
    if (++x < per_row) continue;
    x = 0;
    if (++y < band.rows) continue;
    y = 0;
    ++i;
  }
  tile.weight_stride = call.args.strips.weight_stride;
  tile.output_stride = g.k;
  tile.bounds = bounds_of(call.args.activation);
  tile.bounded = call.args.activation != sparsekd::Activation::kNone;
  for (int64_t s = strips.begin; s < strips.end; ++s) {
    const Strip& strip = call.args.strips.strip[s];
    if (strip.lanes == 0) continue;
    tile.offsets = call.offsets + strip.first;
    tile.weights = call.args.weights + strip.weights;
    tile.count = strip.count;
    tile.start = call.start + s * kStripRows;
    tile.scale = call.scale + s * kStripRows;
    tile.bias = call.bias + s * kStripRows;
    // SiLU and the like go through the buffer: 28 inlined exponentials in each of the tiles would be mostly code.
    constexpr bool stored = std::is_same<typename Words::Y, typename Words::Sums::Stored>::value;
    const bool direct = stored && call.args.y_channels_last && strip.rows == nullptr && strip.lanes == kStripRows &&
                        is_bounded(call.args.activation);
    tile.buffer = direct ? nullptr : buffer;
    tile.stream = call.stream && strip.row % kStripRows == 0;
    if constexpr (stored)
      for (int64_t a = 0; direct && a < rows; ++a) {
        const int64_t at = (image[a] * g.p * g.q + pixel[a]) * g.k + strip.row;
        tile.output[a] = call.args.y + at;
        tile.residual[a] = call.args.residual ? call.args.residual + at : nullptr;
      }
    kernel(tile);
    if (direct) continue;
    for (int64_t a = 0; a < rows;) {
      // Rows that follow each other in memory are stored as one run.
      int64_t run = 1;
      while (a + run < rows && image[a + run] == image[a] && pixel[a + run] == pixel[a] + run * cols) ++run;
      if (call.args.y_channels_last)
        store_pixels(call, strip, buffer + a * cols * kStripRows, image[a] * g.p * g.q + pixel[a], run * cols);
      else
        store_rows(call, strip, buffer + a * cols * kStripRows, image[a], pixel[a], run * cols);
      a += run;
    }
  }
}

constexpr int64_t kFewPixels = 16;  // of a call

// Whether every pixel of a tile can have a base pointer: then tiles may run on into the next row, and be as wide in
// channels_last memory as in packed.
constexpr bool kPixelPointers = Vec16::kTilePixels <= kTileRowsMax;

// Tiles of neighbouring pixels, counted row by row.
template <IsWords Words>
inline void forward_pixels(const ForwardCall<Words>& call, const Band& band, const float* input, Range strips) {
  using Sums = typename Words::Sums;
  const int64_t total = band.images * band.rows * band.cols;
  const Cuts cuts{total, ceil_div(total, choose_tile(1).rows)};
  for (int64_t i = 0; i < cuts.count; ++i) {
    const int64_t first = cuts.begin(i), count = cuts.size(i), col = first % band.cols;
    if (call.source != Source::kPixels && col + count <= band.cols) {
      const TilePlace place{false, first / band.cols, 1, col, count};
      forward_strips(call, band, input, place, strips, find_forward_tile<Sums>(1, count));
    } else {
      // Its order of sums is another one, so it must not depend on how the call was cut.
      const bool few = !kPixelPointers || call.g.n * call.g.p * call.g.q < kFewPixels;
      ForwardTileFn<Sums> kernel = few ? find_few_tile<Sums>(count) : nullptr;
      if (kernel == nullptr) kernel = find_forward_tile<Sums>(count, 1);
      forward_strips(call, band, input, {true, first, count, 0, 1}, strips, kernel);
    }
  }
}

template <IsWords Words>
inline void forward_tiles(const ForwardCall<Words>& call, const Band& band, const float* input, Range strips) {
  const bool ragged = band.cols >= Vec16::kTilePixels && band.cols % Vec16::kTilePixels != 0;
  if (call.source == Source::kPixels || (kPixelPointers && ragged)) return forward_pixels(call, band, input, strips);
  const TileShape shape = choose_tile(band.cols);
  const Cuts rows{band.images * band.rows, ceil_div(band.images * band.rows, shape.rows)};
  const Cuts cols{band.cols, ceil_div(band.cols, shape.cols)};
  for (int64_t i = 0; i < rows.count; ++i)
    for (int64_t j = 0; j < cols.count; ++j)
      forward_strips(call, band, input, {false, rows.begin(i), rows.size(i), cols.begin(j), cols.size(j)}, strips,
                     find_forward_tile<typename Words::Sums>(rows.size(i), cols.size(j)));
}

// So many strips at a time that their weights stay in L2 while the tiles pass.
template <IsWords Words>
inline void forward_band(const ForwardCall<Words>& call, const Band& band, const float* input, Range strips) {
  constexpr int64_t kWeightFloats = 64 * 1024;
  const Strip* const strip = call.args.strips.strip;
  for (int64_t begin = strips.begin, end; begin < strips.end; begin = end) {
    int64_t floats = strip[begin].count * kStripRows;
    for (end = begin + 1; end < strips.end && (floats += strip[end].count * kStripRows) <= kWeightFloats;) ++end;
    forward_tiles(call, band, input, {begin, end});
  }
}

template <IsWords Words>
using ForwardInput = Input<typename Words::X, Words::kDepth>;

// Packing costs about as much as using every channel once, so it pays unless few strips share it; tiles of single
// pixels in turn need long columns lists to hide their set-up. Measured on 1 x 1 layers, see README.md.
template <IsWords Words>
inline Source choose_source(const Conv2dForward<typename Words::X, typename Words::Y>& args, const Conv2dGeometry& g,
                            const ForwardInput<Words>& in) {
  if (!in.in_place()) return Source::kPacked;
  // Offsets of channels are 32-bit integers: a larger image is packed, band by band.
  const bool near = g.c * g.h * g.w <= INT32_MAX;
  if (Words::kDepth == 1 && is_pointwise(g) && !args.x_channels_last && near) return Source::kChannels;
  const bool single_tap = g.r == 1 && g.s == 1 && g.pad_h == 0 && g.pad_w == 0;
  if (!single_tap || !args.x_channels_last) return Source::kPacked;
  constexpr int64_t kUses = 2, kManyChannels = 128;
  constexpr int64_t kTileFloats = 6 * 1024;  // 24 KB beside weights that stream through the 32 KB of most CPUs
  int64_t columns = 0;
  for (int32_t i = 0; i < args.strips.count; ++i) columns += args.strips.strip[i].count;
  const bool rarely_used = columns < kUses * g.c && g.c >= kManyChannels;
  // Tiles of single pixels as wide as others need no packing at all, while their channels stay in L1.
  if (kPixelPointers && Vec16::kTilePixels * g.c <= kTileFloats) return Source::kPixels;
  return rarely_used || g.n * g.p * g.q < kFewPixels ? Source::kPixels : Source::kPacked;
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

template <IsWords Words>
void conv2d_forward(const Conv2dForward<typename Words::X, typename Words::Y>& args) {
  ForwardCall<Words> call{};
  call.args = args;
  call.g = flatten_pointwise(args.geometry, args.x_channels_last && args.y_channels_last);
  Conv2dGeometry& g = call.g;
  if (g.n * g.p * g.q * g.k == 0) return;
  const ForwardInput<Words> x{.x = args.x,
                              .channels_last = args.x_channels_last,
                              .channels = g.c,
                              .group_channels = g.c / g.groups,
                              .zero = args.quantized.x_zero};
  g.c = g.groups * x.group_words();
  call.source = choose_source<Words>(args, g, x);
  constexpr bool kInteger = Words::Sums::kInteger;
  const int64_t rows = args.strips.count * kStripRows;
  float *bias, *start, *scale;
  int32_t *offsets, *whole_axes, *axes;
  Arena::carve(sparsekd::kScratchCall, [&](Arena& arena) {
    bias = arena.take<float>(rows);
    start = kInteger ? arena.take<float>(rows) : bias;
    scale = kInteger ? arena.take<float>(rows) : bias;  // floats need none
    offsets = arena.take<int32_t>(offsets_memory(g, args.strips));
    whole_axes = arena.take<int32_t>(layout_memory(g));
    axes = arena.take<int32_t>(layout_memory(g));
  });
  gather_rows(args.strips, args.bias, bias);
  if (kInteger) {
    gather_rows(args.strips, args.quantized.start, start);
    gather_rows(args.strips, args.quantized.scale, scale);
  }
  call.bias = bias;
  call.start = start;
  call.scale = scale;

  const Layout whole = make_layout(g, 1, g.p, g.q, whole_axes);
  const TileShape tile = call.source == Source::kPixels ? TileShape{1, choose_tile(1).rows} : choose_tile(g.q);
  const int64_t pieces = args.threads == 1 ? 1 : 2 * args.threads;
  const BandSize size = choose_bands(g, whole, pieces, tile.rows, tile.cols, kPackedFloats);
  call.layout = make_layout(g, size.images, size.rows, size.cols, axes);
  if (call.source == Source::kChannels) call.layout.channel = g.w;
  if (call.source == Source::kPixels) call.layout.channel = 1;
  call.offsets = fill_offsets(call.layout, g.groups, args.strips, offsets);

  if constexpr (std::is_same<typename Words::Y, float>::value)
    call.stream = args.y_channels_last && stream_output(args.y, g.n * g.p * g.q, g.k);
  const int64_t chunks = min64(args.strips.count, ceil_div(args.threads, size.count()));
  parallel_workers(args.threads, size.count() * chunks, [&](int64_t item, bool first) {
    const Band band = size.band(g, item / chunks);
    const float* input = reinterpret_cast<const float*>(args.x);
    if (call.source == Source::kPacked) {
      float* packed = scratch_of<float>(sparsekd::kScratchInput, call.layout.size());
      pack_input(x, g, call.layout, band, first, packed);
      input = packed;
    }
    forward_band(call, band, input, strip_chunk(args.strips, chunks, item % chunks));
    if (call.stream) Vec16::fence();
  });
}

}  // namespace
