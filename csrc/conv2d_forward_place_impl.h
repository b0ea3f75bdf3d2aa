// Where the forward pass's register tiles (conv2d_forward_tile_impl.h) lie in a band, and what becomes of their sums.
#pragma once

#include <type_traits>

#include "cache.h"
#include "conv2d_forward_tile_impl.h"
#include "pixels_impl.h"

namespace {

using sparsekd::Conv2dForward;

// Where the kernels read x.
enum class Source {
  kPacked,    // from the packed layout
  kChannels,  // where it lies, [image][channel][pixel]: 1 x 1, stride 1
  kPixels,    // where it lies or from a copy with its padding, [image][row][column][channel]; tiles of single pixels
};

// What a call works out before it runs. It depends on sizes and weights, not on where x and y lie.
struct ForwardPlan {
  Conv2dGeometry g;  // c counts words
  Source source;
  Layout layout;           // of the packed input
  Steps steps;             // of what is read
  const int32_t* offsets;  // [num_columns]
  const float* start;      // [strips][16]
  const float* scale;      // the same, when sums are integers
  const float* bias;
  BandSize size;
  int64_t chunks;  // of the strips of every band
};

template <IsWords Words>
struct ForwardCall : ForwardPlan {
  Conv2dForward<typename Words::X, typename Words::Y> args;
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

// The outputs of a register tile: `cols` neighbours in each of `rows` places.
struct TilePixels {
  int64_t rows, cols;
  const float* input[kTileRowsMax];  // of the first in every place
  int64_t pixel[kTileRowsMax];       // which it is, counted over all images
};

// Walks over the outputs of a band, row by row.
class PixelWalk {
 public:
  PixelWalk(const Conv2dGeometry& g, const Steps& steps, const Band& band, const float* input)
      : steps_(steps),
        band_(band),
        row_(input),
        image_(input),
        at_(input),
        pixel_((band.image * g.p + band.y) * g.q + band.x),
        row_gap_(g.q - band.cols),
        image_gap_((g.p - band.rows) * g.q) {}

  // The next output becomes place `a` of a tile.
  void place(TilePixels& tile, int64_t a) const {
    tile.input[a] = at_;
    tile.pixel[a] = pixel_;
  }
  int64_t left_in_row() const { return band_.cols - x_; }
  // Goes on by `count` outputs of this row.
  void next(int64_t count) {
    pixel_ += count;
    at_ += count * steps_.col;
    if ((x_ += count) < band_.cols) return;
    x_ = 0;
    pixel_ += row_gap_;
    at_ = row_ += steps_.row;
    if (++y_ < band_.rows) return;
    y_ = 0;
    pixel_ += image_gap_;
    at_ = row_ = image_ += steps_.image;
  }

 private:
  const Steps steps_;
  const Band band_;
  const float *row_, *image_, *at_;
  int64_t x_ = 0, y_ = 0, pixel_;
  const int64_t row_gap_, image_gap_;
};

// Writes a finished tile from its buffer.
template <IsWords Words>
inline void store_tile(const ForwardCall<Words>& call, const Strip& strip, const TilePixels& place,
                       const float* buffer) {
  const int64_t area = call.g.p * call.g.q;
  for (int64_t a = 0; a < place.rows;) {
    // Places that follow each other in memory are stored as one run.
    const int64_t image = place.pixel[a] / area, end = call.args.y_channels_last ? INT64_MAX : (image + 1) * area;
    int64_t run = 1;
    while (a + run < place.rows && place.pixel[a + run] == place.pixel[a] + run * place.cols &&
           place.pixel[a + run] < end)
      ++run;
    const float* const source = buffer + a * place.cols * kStripRows;
    if (call.args.y_channels_last)
      store_pixels(call, strip, source, place.pixel[a], run * place.cols);
    else
      store_rows(call, strip, source, image, place.pixel[a] - image * area, run * place.cols);
    a += run;
  }
}

// All strips of [strips.begin, strips.end) on one register tile.
template <IsWords Words>
[[gnu::noinline]] void forward_strips(const ForwardCall<Words>& call, const TilePixels& place, Range strips,
                                      ForwardTileFn<typename Words::Sums> kernel) {
  const Conv2dGeometry& g = call.g;
  alignas(64) float buffer[Vec16::kTilePixels * kStripRows];
  ForwardTile<typename Words::Sums> tile;
  for (int64_t a = 0; a < place.rows; ++a) tile.input[a] = place.input[a];
  tile.weight_stride = call.args.strips.weight_stride;
  tile.output_stride = g.k;
  tile.input_stride = call.steps.col;
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
      for (int64_t a = 0; direct && a < place.rows; ++a) {
        const int64_t at = place.pixel[a] * g.k + strip.row;
        tile.output[a] = call.args.y + at;
        tile.residual[a] = call.args.residual ? call.args.residual + at : nullptr;
      }
    kernel(tile);
    if (!direct) store_tile(call, strip, place, buffer);
  }
}

// Whether every pixel of a tile can have a base pointer: then tiles may run on into the next row, and be as wide in
// channels_last memory as in packed.
constexpr bool kPixelPointers = Vec16::kTilePixels <= kTileRowsMax;

// Tiles of neighbouring pixels, counted row by row.
template <IsWords Words>
inline void forward_pixels(const ForwardCall<Words>& call, const Band& band, const float* input, Range strips) {
  using Sums = typename Words::Sums;
  const Conv2dGeometry& g = call.g;
  const int64_t total = band.images * band.rows * band.cols;
  const Cuts cuts{total, ceil_div(total, choose_tile(1).rows)};
  PixelWalk walk(g, call.steps, band, input);
  TilePixels tile;
  for (int64_t i = 0; i < cuts.count; ++i) {
    const int64_t count = cuts.size(i);
    ForwardTileFn<Sums> kernel = nullptr;
    if (call.steps.col == 1 && count <= walk.left_in_row()) {
      tile.rows = 1;
      tile.cols = count;
      walk.place(tile, 0);
      walk.next(count);
    } else {
      tile.rows = count;
      tile.cols = 1;
      for (int64_t a = 0; a < count; ++a) {
        walk.place(tile, a);
        walk.next(1);
      }
      if (g.r * g.s == 1) kernel = find_few_tile<Sums>(g.n * g.p * g.q, count);
    }
    if (kernel == nullptr) kernel = find_forward_tile<Sums>(tile.rows, tile.cols, i == 0);
    forward_strips(call, tile, strips, kernel);
  }
}

inline int64_t l1_tile_floats() { return sparsekd::tile_floats(sparsekd::l1_data_cache().bytes); }

// Elsewhere a wide tile of single pixels is a line, which ends with its row. What it reads should stay in L1 for the next
// strip, but with too few pixels the multiply-adds would wait for weights.
inline int64_t line_pixels(int64_t channels) {
  return max64(kTileRowsMax, min64(Vec16::kTilePixels, l1_tile_floats() / max64(1, channels)));
}
inline bool reads_lines(const Conv2dGeometry& g) { return !kPixelPointers && g.n * g.p * g.q > kTileRowsMax; }

template <IsWords Words>
inline void forward_lines(const ForwardCall<Words>& call, const Band& band, const float* input, Range strips) {
  const Cuts cuts{band.cols, ceil_div(band.cols, line_pixels(call.g.c))};
  PixelWalk walk(call.g, call.steps, band, input);
  TilePixels tile;
  tile.rows = 1;
  for (int64_t row = 0; row < band.images * band.rows; ++row)
    for (int64_t i = 0; i < cuts.count; ++i) {
      tile.cols = cuts.size(i);
      walk.place(tile, 0);
      walk.next(tile.cols);
      forward_strips(call, tile, strips, find_line_tile<typename Words::Sums>(tile.cols, row + i == 0));
    }
}

template <IsWords Words>
inline void forward_tiles(const ForwardCall<Words>& call, const Band& band, const float* input, Range strips) {
  if (call.source == Source::kPixels && reads_lines(call.g)) return forward_lines(call, band, input, strips);
  const bool ragged = band.cols >= Vec16::kTilePixels && band.cols % Vec16::kTilePixels != 0;
  if (call.source == Source::kPixels || (kPixelPointers && ragged)) return forward_pixels(call, band, input, strips);
  const TileShape shape = choose_tile(band.cols);
  const Cuts rows{band.images * band.rows, ceil_div(band.images * band.rows, shape.rows)};
  const Cuts cols{band.cols, ceil_div(band.cols, shape.cols)};
  TilePixels tile;
  for (int64_t i = 0; i < rows.count; ++i)
    for (int64_t j = 0; j < cols.count; ++j) {
      tile.rows = rows.size(i);
      tile.cols = cols.size(j);
      for (int64_t a = 0; a < tile.rows; ++a) {
        const int64_t row = rows.begin(i) + a, image = row / band.rows, y = row % band.rows, x = cols.begin(j);
        tile.input[a] = input + image * call.steps.image + y * call.steps.row + x;
        tile.pixel[a] = ((band.image + image) * call.g.p + band.y + y) * call.g.q + band.x + x;
      }
      forward_strips(call, tile, strips, find_forward_tile<typename Words::Sums>(tile.rows, tile.cols, i + j == 0));
    }
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

}  // namespace
