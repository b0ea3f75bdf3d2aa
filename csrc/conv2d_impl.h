// Block-sparse convolution, fp32, over Vec16: forward, gradient of the input, gradient of the kept values.
// Written once and compiled per instruction set; README.md beside this file explains the loops and shows figures.
#pragma once

#include "kernel_table.h"
#include "layout_impl.h"

namespace {

using sparsekd::Conv2dForward;
using sparsekd::Conv2dGradInput;
using sparsekd::Conv2dGradValues;
using sparsekd::kStripRows;

constexpr int64_t kPackedFloats = 80 * 1024;  // 320 KiB of packed input per thread: a third of a 1 MiB L2
constexpr int kTileRowsMax = 8;               // base pointers that still fit in general registers

// ---- work division ---------------------------------------------------------------------------------------------

struct BandSize {
  int64_t images, rows, cols;
  int64_t row_bands, col_bands, image_bands;

  int64_t count() const { return image_bands * row_bands * col_bands; }
  Band band(const Conv2dGeometry& g, int64_t index) const {
    const int64_t image = index / (row_bands * col_bands) * images;
    const int64_t y = index / col_bands % row_bands * rows;
    const int64_t x = index % col_bands * cols;
    return {image, min64(images, g.n - image), y, min64(rows, g.p - y), x, min64(cols, g.q - x)};
  }
};

inline BandSize make_band_size(const Conv2dGeometry& g, int64_t images, int64_t rows, int64_t cols) {
  return {images, rows, cols, ceil_div(g.p, rows), ceil_div(g.q, cols), ceil_div(g.n, images)};
}

// The largest bands whose packed input stays in the L2 cache, but at least `pieces` of them where the shape allows.
// Columns are cut in multiples of `col_step`, rows in multiples of `row_step`.
inline BandSize choose_bands(const Conv2dGeometry& g, const Layout& whole, int64_t pieces, int64_t row_step,
                             int64_t col_step) {
  const int64_t planes = g.c * whole.h.phases * whole.w.phases;
  const int64_t budget = max64(1, kPackedFloats / max64(1, planes));  // floats per plane
  int64_t cols = g.q, rows = g.p, images = g.n;
  const int64_t row_floats = (1 + whole.h.reach) * (cols + whole.w.reach);
  if (row_floats > budget || (g.p == 1 && g.n < pieces)) {
    const int64_t fit = budget / (1 + whole.h.reach) - whole.w.reach;
    const int64_t wanted = ceil_div(g.q, max64(1, g.p == 1 ? ceil_div(pieces, g.n) : 1));
    cols = min64(cols, round_up(max64(1, min64(fit, wanted) / col_step * col_step), col_step));
  }
  const int64_t width = cols + whole.w.reach;
  const int64_t fit_rows = max64(1, budget / width - whole.h.reach);
  if (fit_rows < rows || cols < g.q) {
    images = 1;
    rows = min64(rows, fit_rows);
  } else {
    images = max64(1, min64(images, budget / (whole.image_rows * width)));
  }
  if (images * pieces > g.n) images = max64(1, g.n / pieces);
  const int64_t cuts = ceil_div(pieces, g.n * ceil_div(g.q, cols));  // pieces one column band of an image must give
  if (images == 1 && cuts > 1) rows = min64(rows, ceil_div(g.p, cuts));
  // Rows in whole register tiles, and equal bands rather than a short last one.
  if (rows < g.p) {
    rows = ceil_div(g.p, ceil_div(g.p, rows));
    if (rows > row_step) rows = rows / row_step * row_step;
  }
  return make_band_size(g, images, rows, cols);
}

// ---- forward ---------------------------------------------------------------------------------------------------

// One register tile: a strip of 16 output rows x (A image rows x B pixels).
struct ForwardTile {
  const float* input[kTileRowsMax];     // packed input of the first pixel of every image row
  float* output[kTileRowsMax];          // its output, when written directly
  const float* residual[kTileRowsMax];  // or null
  const int32_t* offsets;               // [count]
  const float* weights;                 // [count][16], weight_stride apart
  int64_t weight_stride;
  int64_t count;
  const float* bias;      // [16]
  int64_t output_stride;  // floats from one pixel to the next
  float* buffer;          // [A * B][16], written when not null, instead of the output
  bool relu;
};

// Hands finished accumulators over: to the buffer, or with residual and activation to the output.
template <int A, int B>
inline void finish_tile(const ForwardTile& t, const Vec16 (&acc)[A * B]) {
  if (t.buffer != nullptr) {
#pragma GCC unroll 32
    for (int i = 0; i < A * B; ++i) acc[i].store(t.buffer + i * kStripRows);
    return;
  }
#pragma GCC unroll 8
  for (int a = 0; a < A; ++a)
#pragma GCC unroll 32
    for (int b = 0; b < B; ++b) {
      Vec16 v = acc[a * B + b];
      if (t.residual[a] != nullptr) v = Vec16::add(v, Vec16::load(t.residual[a] + b * t.output_stride));
      if (t.relu) v = Vec16::relu(v);
      v.store(t.output[a] + b * t.output_stride);
    }
}

template <int A, int B>
void forward_tile(const ForwardTile& t) {
  Vec16 acc[A * B];
  const float* input[A];
  const Vec16 bias = Vec16::load(t.bias);
#pragma GCC unroll 32
  for (int i = 0; i < A * B; ++i) acc[i] = bias;
#pragma GCC unroll 8
  for (int a = 0; a < A; ++a) input[a] = t.input[a];
  const float* w = t.weights;
  const int64_t weight_stride = t.weight_stride;
  const int32_t* const end = t.offsets + t.count;
  for (const int32_t* offset = t.offsets; offset != end; ++offset, w += weight_stride) {
    const Vec16 weight = Vec16::load(w);
    const int64_t o = *offset;
#pragma GCC unroll 8
    for (int a = 0; a < A; ++a)
#pragma GCC unroll 32
      for (int b = 0; b < B; ++b)
        acc[a * B + b] = Vec16::fma(weight, Vec16::broadcast(input[a] + o + b), acc[a * B + b]);
  }
  finish_tile<A, B>(t, acc);
}

// Few pixels: U columns at once keep the multiply-adds independent, and U weight loads in flight.
template <int A, int U>
void forward_few(const ForwardTile& t) {
  Vec16 acc[U][A];
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u)
#pragma GCC unroll 4
    for (int a = 0; a < A; ++a) acc[u][a] = u == 0 ? Vec16::load(t.bias) : Vec16::zero();
  const float* w = t.weights;
  int64_t i = 0;
  for (; i + U <= t.count; i += U)
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u, w += t.weight_stride) {
      const Vec16 weight = Vec16::load(w);
#pragma GCC unroll 4
      for (int a = 0; a < A; ++a)
        acc[u][a] = Vec16::fma(weight, Vec16::broadcast(t.input[a] + t.offsets[i + u]), acc[u][a]);
    }
  for (; i < t.count; ++i, w += t.weight_stride)
#pragma GCC unroll 4
    for (int a = 0; a < A; ++a)
      acc[0][a] = Vec16::fma(Vec16::load(w), Vec16::broadcast(t.input[a] + t.offsets[i]), acc[0][a]);
#pragma GCC unroll 8
  for (int u = 1; u < U; ++u)
#pragma GCC unroll 4
    for (int a = 0; a < A; ++a) acc[0][a] = Vec16::add(acc[0][a], acc[u][a]);
  finish_tile<A, 1>(t, acc[0]);
}

using ForwardTileFn = void (*)(const ForwardTile&);

template <int A, int B>
ForwardTileFn find_cols(int64_t b) {
  if (b == B) return forward_tile<A, B>;
  if constexpr (B > 1) return find_cols<A, B - 1>(b);
  return nullptr;
}

// The kernel of an a x b tile; a * b <= Vec16::kTilePixels.
template <int A = 1>
ForwardTileFn find_forward_tile(int64_t a, int64_t b) {
  if (a == A) return find_cols<A, Vec16::kTilePixels / A>(b);
  if constexpr (A < kTileRowsMax && A < Vec16::kTilePixels) return find_forward_tile<A + 1>(a, b);
  return nullptr;
}

// Equal cuts of a length: `count` pieces that differ by at most one.
struct Cuts {
  int64_t total, count;
  int64_t begin(int64_t i) const { return total * i / count; }
  int64_t size(int64_t i) const { return begin(i + 1) - begin(i); }
};

struct TileShape {
  int64_t rows, cols;
};

// Fills the accumulators as well as the width allows: 56 = 28 + 28, 14 = two rows at once.
inline TileShape choose_tile(int64_t cols) {
  const int64_t b = ceil_div(cols, ceil_div(cols, Vec16::kTilePixels));
  return {min64(kTileRowsMax, Vec16::kTilePixels / b), b};
}

template <int A = 1>
ForwardTileFn find_few_tile(int64_t a) {
  constexpr int kChains = Vec16::kTilePixels < 8 ? Vec16::kTilePixels : 8;
  if (a == A) return forward_few<A, (A < kChains ? kChains / A : 1)>;
  if constexpr (A < 4 && A < kChains) return find_few_tile<A + 1>(a);
  return nullptr;
}

// Where the kernels read x.
enum class Source {
  kPacked,    // from the packed layout
  kChannels,  // where it lies, [image][channel][pixel]: 1 x 1, stride 1
  kPixels,    // where it lies, [image][pixel][channel]: 1 x 1, any stride; tiles of single pixels
};

struct ForwardCall {
  Conv2dForward args;
  Conv2dGeometry g;
  Layout layout;
  Source source;
  const int32_t* offsets;  // [num_columns]
  const float* bias;       // [strips][16]
};

inline int32_t row_of(const Strip& strip, int lane) { return strip.rows ? strip.rows[lane] : strip.row + lane; }

// Writes finished pixels from [pixel][16] for outputs that lie [pixel][row], where a strip is ragged or scattered.
inline void store_pixels(const ForwardCall& call, const Strip& strip, const float* buffer, int64_t pixel,
                         int64_t count) {
  const int64_t k = call.g.k;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t base = (pixel + i) * k;
    if (strip.rows == nullptr) {
      Vec16 v = Vec16::load(buffer + i * kStripRows);
      const int64_t at = base + strip.row;
      if (call.args.residual) v = Vec16::add(v, Vec16::load_first(call.args.residual + at, strip.lanes));
      if (call.args.relu) v = Vec16::relu(v);
      v.store_first(call.args.y + at, strip.lanes);
      continue;
    }
    for (int lane = 0; lane < strip.lanes; ++lane) {
      const int64_t at = base + strip.rows[lane];
      float v = buffer[i * kStripRows + lane];
      if (call.args.residual) v += call.args.residual[at];
      call.args.y[at] = call.args.relu && v < 0.0f ? 0.0f : v;
    }
  }
}

// The same for outputs that lie [row][pixel]: `count` neighbouring pixels of one image.
inline void store_rows(const ForwardCall& call, const Strip& strip, const float* buffer, int64_t image, int64_t pixel,
                       int64_t count) {
  const int64_t area = call.g.p * call.g.q;
  for (int64_t i = 0; i < count; i += 16) {
    const int n = static_cast<int>(min64(16, count - i));
    Vec16 v[16];
    for (int j = 0; j < 16; ++j) v[j] = j < n ? Vec16::load(buffer + (i + j) * kStripRows) : Vec16::zero();
    Vec16::transpose(v);
    for (int lane = 0; lane < strip.lanes; ++lane) {
      const int64_t at = (image * call.g.k + row_of(strip, lane)) * area + pixel + i;
      Vec16 out = v[lane];
      if (call.args.residual) out = Vec16::add(out, Vec16::load_first(call.args.residual + at, n));
      if (call.args.relu) out = Vec16::relu(out);
      out.store_first(call.args.y + at, n);
    }
  }
}

// All strips of [strips.begin, strips.end) on one register tile: `rows` image rows from `first_row` of the band,
// `cols` pixels from `col`.
inline void forward_strips(const ForwardCall& call, const Band& band, const float* input, int64_t first_row,
                           int64_t rows, int64_t col, int64_t cols, Range strips, ForwardTileFn kernel) {
  const Conv2dGeometry& g = call.g;
  alignas(64) float buffer[Vec16::kTilePixels * kStripRows];
  ForwardTile tile;
  int64_t image[kTileRowsMax], pixel[kTileRowsMax];
  const bool pixels = call.source == Source::kPixels;  // then a "row" of the tile is one pixel
  const int64_t per_row = pixels ? band.cols : 1;
  int64_t x = first_row % per_row, y = first_row / per_row % band.rows, i = first_row / per_row / band.rows;
  for (int64_t a = 0; a < rows; ++a) {
    const int64_t left = band.x + (pixels ? x : col);
    image[a] = band.image + i;
    pixel[a] = (band.y + y) * g.q + left;
    if (pixels)
      tile.input[a] = input + ((image[a] * g.h + (band.y + y) * g.stride_h) * g.w + left * g.stride_w) * g.c;
    else if (call.source == Source::kChannels)
      tile.input[a] = input + image[a] * g.c * g.w + pixel[a];
    else
      tile.input[a] = input + call.layout.row(i, y) + col;
    if (++x < per_row) continue;
    x = 0;
    if (++y < band.rows) continue;
    y = 0;
    ++i;
  }
  tile.weight_stride = call.args.strips.weight_stride;
  tile.output_stride = g.k;
  tile.relu = call.args.relu;
  for (int64_t s = strips.begin; s < strips.end; ++s) {
    const Strip& strip = call.args.strips.strip[s];
    if (strip.lanes == 0) continue;
    tile.offsets = call.offsets + strip.first;
    tile.weights = call.args.weights + strip.weights;
    tile.count = strip.count;
    tile.bias = call.bias + s * kStripRows;
    const bool direct = call.args.y_channels_last && strip.rows == nullptr && strip.lanes == kStripRows;
    tile.buffer = direct ? nullptr : buffer;
    if (direct)
      for (int64_t a = 0; a < rows; ++a) {
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

inline void forward_band(const ForwardCall& call, const Band& band, const float* input, Range strips) {
  const bool pixels = call.source == Source::kPixels;
  const TileShape shape = pixels ? choose_tile(1) : choose_tile(band.cols);
  const int64_t num_rows = band.images * band.rows * (pixels ? band.cols : 1), num_cols = pixels ? 1 : band.cols;
  const Cuts rows{num_rows, ceil_div(num_rows, shape.rows)};
  const Cuts cols{num_cols, ceil_div(num_cols, shape.cols)};
  for (int64_t i = 0; i < rows.count; ++i)
    for (int64_t j = 0; j < cols.count; ++j) {
      ForwardTileFn kernel = pixels ? find_few_tile(rows.size(i)) : nullptr;
      if (kernel == nullptr) kernel = find_forward_tile(rows.size(i), cols.size(j));
      forward_strips(call, band, input, rows.begin(i), rows.size(i), cols.begin(j), cols.size(j), strips, kernel);
    }
}

// Packing costs about as much as using every channel once, so it pays unless few strips share it; tiles of single
// pixels in turn need long columns lists to hide their set-up. Measured on 1 x 1 layers, see README.md.
inline Source choose_source(const Conv2dForward& args, const Conv2dGeometry& g) {
  if (is_pointwise(g) && !args.x_channels_last) return Source::kChannels;
  const bool single_tap = g.r == 1 && g.s == 1 && g.pad_h == 0 && g.pad_w == 0;
  if (!single_tap || !args.x_channels_last) return Source::kPacked;
  constexpr int64_t kUses = 2, kManyChannels = 128, kFewPixels = 16;
  int64_t columns = 0;
  for (int32_t i = 0; i < args.strips.count; ++i) columns += args.strips.strip[i].count;
  const bool rarely_used = columns < kUses * g.c && g.c >= kManyChannels;
  return rarely_used || g.n * g.p * g.q < kFewPixels ? Source::kPixels : Source::kPacked;
}

// Strips [0, count) in `chunks` parts of about equal numbers of columns.
inline Range strip_chunk(const Strips& strips, int64_t chunks, int64_t chunk) {
  if (chunks == 1) return {0, strips.count};
  int64_t total = 0;
  for (int32_t i = 0; i < strips.count; ++i) total += strips.strip[i].count + 1;
  const Range wanted = share(total, chunks, chunk);
  Range range{strips.count, strips.count};
  int64_t sum = 0;
  for (int32_t i = 0; i < strips.count; ++i) {
    if (sum >= wanted.begin && i < range.begin) range.begin = i;
    if (sum >= wanted.end) {
      range.end = i;
      break;
    }
    sum += strips.strip[i].count + 1;
  }
  return range;
}

inline void gather_bias(const Conv2dForward& args, float* bias) {
  for (int32_t i = 0; i < args.strips.count; ++i)
    for (int lane = 0; lane < kStripRows; ++lane) {
      const Strip& strip = args.strips.strip[i];
      bias[i * kStripRows + lane] = args.bias && lane < strip.lanes ? args.bias[row_of(strip, lane)] : 0.0f;
    }
}

void conv2d_forward(const Conv2dForward& args) {
  ForwardCall call{args,    flatten_pointwise(args.geometry, args.x_channels_last && args.y_channels_last),
                   {},      Source::kPacked,
                   nullptr, nullptr};
  const Conv2dGeometry& g = call.g;
  if (g.n * g.p * g.q * g.k == 0) return;
  call.source = choose_source(args, g);
  const int64_t taps = g.r * g.s, group_channels = g.c / g.groups;
  const int64_t bytes =
      4 * (args.strips.count * kStripRows + args.strips.num_columns + taps * group_channels + 2 * layout_memory(g));
  float* bias = static_cast<float*>(scratch(sparsekd::kScratchCall, static_cast<size_t>(bytes)));
  int32_t* offsets = reinterpret_cast<int32_t*>(bias + args.strips.count * kStripRows);
  int32_t* table = offsets + args.strips.num_columns;
  int32_t* axes = table + taps * group_channels;
  gather_bias(args, bias);
  call.bias = bias;
  call.offsets = offsets;

  const Layout whole = make_layout(g, 1, g.p, g.q, axes);
  const TileShape tile = call.source == Source::kPixels ? TileShape{1, choose_tile(1).rows} : choose_tile(g.q);
  const int64_t pieces = args.threads == 1 ? 1 : 2 * args.threads;
  const BandSize size = choose_bands(g, whole, pieces, tile.rows, tile.cols);
  call.layout = make_layout(g, size.images, size.rows, size.cols, axes + layout_memory(g));
  if (call.source == Source::kChannels) call.layout.channel = g.w;
  if (call.source == Source::kPixels) call.layout.channel = 1;
  fill_offsets(call.layout, g.groups, args.strips, table, offsets);

  const int64_t chunks = min64(args.strips.count, ceil_div(args.threads, size.count()));
  parallel_workers(args.threads, size.count() * chunks, [&](int64_t item, bool first) {
    const Band band = size.band(g, item / chunks);
    const float* input = args.x;
    if (call.source == Source::kPacked) {
      float* packed = static_cast<float*>(
          scratch(sparsekd::kScratchInput, sizeof(float) * static_cast<size_t>(call.layout.size())));
      pack_input(args.x, args.x_channels_last, g, call.layout, band, first, packed);
      input = packed;
    }
    forward_band(call, band, input, strip_chunk(args.strips, chunks, item % chunks));
  });
}

// ---- gradient of the input -------------------------------------------------------------------------------------

// E columns x V vectors of 16 flat pixels: dx[offset[e] + pixel] += sum over lanes of weight[e][lane] *
// dy[lane][pixel].
struct InputTile {
  float* dx;
  const int32_t* offsets;
  const float* weights;
  int64_t weight_stride;
  const float* dy;  // [lanes][dy_stride]
  int64_t dy_stride;
  int64_t lanes;
};

template <int E, int V>
inline void input_tile(const InputTile& t, int64_t entry) {
  Vec16 acc[E * V];
#pragma GCC unroll 32
  for (int i = 0; i < E * V; ++i) acc[i] = Vec16::zero();
  const float* w = t.weights + entry * t.weight_stride;
  const float* dy = t.dy;
  for (int64_t lane = 0; lane < t.lanes; ++lane, dy += t.dy_stride, ++w) {
    Vec16 weight[E];
#pragma GCC unroll 8
    for (int e = 0; e < E; ++e) weight[e] = Vec16::broadcast(w + e * t.weight_stride);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const Vec16 pixels = Vec16::load(dy + v * 16);
#pragma GCC unroll 8
      for (int e = 0; e < E; ++e) acc[e * V + v] = Vec16::fma(weight[e], pixels, acc[e * V + v]);
    }
  }
#pragma GCC unroll 8
  for (int e = 0; e < E; ++e) {
    float* target = t.dx + t.offsets[entry + e];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) Vec16::add(Vec16::load(target + v * 16), acc[e * V + v]).store(target + v * 16);
  }
}

template <int V>
void input_columns(const InputTile& t, int64_t count) {
  int64_t entry = 0;
  for (; entry + Vec16::kInputEntries <= count; entry += Vec16::kInputEntries)
    input_tile<Vec16::kInputEntries, V>(t, entry);
  for (; entry < count; ++entry) input_tile<1, V>(t, entry);
}

template <int V = Vec16::kInputVectors>
inline void run_input_columns(int64_t vectors, const InputTile& t, int64_t count) {
  if (vectors == V) return input_columns<V>(t, count);
  if constexpr (V > 1) run_input_columns<V - 1>(vectors, t, count);
}

// dy of one strip as [lane][flat pixel]: rows as far apart as in the packed input, zeros where there is no output.
inline void pack_strip_flat(const Conv2dGradInput& args, const Conv2dGeometry& g, const Layout& l, const Band& band,
                            const Strip& strip, float* flat, int64_t flat_stride) {
  const int64_t area = g.p * g.q;
  const bool dense = l.pitch == band.cols && l.image_rows == band.rows && band.images * l.row(1, 0) == flat_stride;
  if (!dense) zero_floats(flat, strip.lanes * flat_stride);
  for (int64_t image = 0; image < band.images; ++image)
    for (int64_t y = 0; y < band.rows; ++y) {
      const int64_t n = band.image + image;
      const int64_t pixel = (band.y + y) * g.q + band.x;
      float* target = flat + l.row(image, y);
      if (args.dy_channels_last && strip.rows == nullptr) {
        transpose_floats(args.dy + (n * area + pixel) * g.k + strip.row, g.k, band.cols, strip.lanes, target,
                         flat_stride);
        continue;
      }
      for (int lane = 0; lane < strip.lanes; ++lane) {
        const int64_t row = row_of(strip, lane);
        if (args.dy_channels_last)
          copy_floats(target + lane * flat_stride, args.dy + (n * area + pixel) * g.k + row, g.k, band.cols);
        else
          copy_floats(target + lane * flat_stride, args.dy + (n * g.k + row) * area + pixel, 1, band.cols);
      }
    }
}

struct GradInputCall {
  Conv2dGradInput args;
  Conv2dGeometry g;
  Layout layout;
  const int32_t* offsets;
};

// Adds what the outputs of `band` contribute to the packed gradient.
inline void grad_input_band(const GradInputCall& call, const Band& band, float* dx) {
  const Layout& l = call.layout;
  const int64_t flat = round_up(band.images * l.image_rows * l.pitch, 16);
  float* dy =
      static_cast<float*>(scratch(sparsekd::kScratchOutput, sizeof(float) * kStripRows * static_cast<size_t>(flat)));
  const Cuts tiles{flat / 16, ceil_div(flat / 16, Vec16::kInputVectors)};
  for (int32_t s = 0; s < call.args.strips.count; ++s) {
    const Strip& strip = call.args.strips.strip[s];
    if (strip.count == 0 || strip.lanes == 0) continue;
    pack_strip_flat(call.args, call.g, l, band, strip, dy, flat);
    for (int64_t i = 0; i < tiles.count; ++i) {
      const int64_t at = tiles.begin(i) * 16;
      const InputTile tile{dx + at,
                           call.offsets + strip.first,
                           call.args.weights + strip.weights,
                           call.args.strips.weight_stride,
                           dy + at,
                           flat,
                           strip.lanes};
      run_input_columns(tiles.size(i), tile, strip.count);
    }
  }
}

// Whole images, or the rows of one image whose packed positions lie in `owned`. Bands follow each other; the rows that
// two of them touch are carried over.
inline void grad_input_rows(const GradInputCall& call, Band range, Range owned, int64_t band_rows, float* dx) {
  const Layout& l = call.layout;
  const int64_t reach = l.h.reach, planes = call.g.c * l.h.phases * l.w.phases;
  const int64_t y_begin = max64(0, owned.begin - reach), y_end = min64(call.g.p, owned.end);
  zero_floats(dx, l.size());
  for (int64_t y = y_begin; y < y_end; y += band_rows) {
    Band band = range;
    band.y = y;
    band.rows = min64(band_rows, y_end - y);
    grad_input_band(call, band, dx);
    const bool last = y + band.rows >= y_end;
    const Range done{max64(owned.begin, y), last ? owned.end : y + band.rows};
    if (done.begin < done.end) unpack_input(dx, call.g, l, band, done, call.args.dx_channels_last, call.args.dx);
    if (last) break;
    for (int64_t plane = 0; plane < planes; ++plane) {
      const int64_t phases = l.h.phases * l.w.phases;
      float* base = dx + plane / phases * l.channel + plane % phases * l.plane;
      const int64_t kept = l.plane - band.rows * l.pitch;
      for (int64_t i = 0; i < kept; ++i) base[i] = base[i + band.rows * l.pitch];
      zero_floats(base + kept, l.plane - kept);
    }
  }
}

constexpr int64_t kEnd = int64_t{1} << 40;  // beyond any row

void conv2d_grad_input(const Conv2dGradInput& args) {
  GradInputCall call{
      args, flatten_pointwise(args.geometry, args.dy_channels_last && args.dx_channels_last), {}, nullptr};
  const Conv2dGeometry& g = call.g;
  if (g.n * g.h * g.w * g.c == 0) return;
  const int64_t taps = g.r * g.s, group_channels = g.c / g.groups;
  const int64_t bytes = 4 * (args.strips.num_columns + taps * group_channels + 2 * layout_memory(g));
  int32_t* offsets = static_cast<int32_t*>(scratch(sparsekd::kScratchCall, static_cast<size_t>(bytes)));
  int32_t* table = offsets + args.strips.num_columns;
  int32_t* axes = table + taps * group_channels;
  call.offsets = offsets;

  const Layout whole = make_layout(g, 1, g.p, g.q, axes);
  BandSize size = choose_bands(g, whole, args.threads == 1 ? 1 : 2 * args.threads, 1, 16);
  if (!is_pointwise(g)) size = make_band_size(g, size.images, size.rows, g.q);  // bands share columns, not rows
  call.layout = make_layout(g, size.images, size.rows, size.cols, axes + layout_memory(g));
  fill_offsets(call.layout, g.groups, args.strips, table, offsets);

  // An image is cut by rows only when there are too few images: the cut costs the rows that both parts need.
  const int64_t segments = size.image_bands * size.col_bands >= args.threads
                               ? 1
                               : min64(size.row_bands, ceil_div(args.threads, size.image_bands * size.col_bands));
  parallel(args.threads, size.image_bands * size.col_bands * segments, [&](int64_t item) {
    const int64_t segment = item % segments, rest = item / segments;
    const Band range = size.band(g, rest / size.col_bands * size.row_bands * size.col_bands + rest % size.col_bands);
    Range owned = share(g.p, segments, segment);
    if (segment + 1 == segments) owned.end = kEnd;
    float* dx =
        static_cast<float*>(scratch(sparsekd::kScratchInput, sizeof(float) * static_cast<size_t>(call.layout.size())));
    grad_input_rows(call, range, owned, size.rows, dx);
  });
}

// ---- gradient of the values ------------------------------------------------------------------------------------

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
  // Columns advance together in small groups: each accumulator is a chain of dependent multiply-adds.
  constexpr int kGroup = E < 4 ? E : 4;
  Vec16 acc[E];
#pragma GCC unroll 16
  for (int e = 0; e < E; ++e) acc[e] = t.accumulate ? Vec16::load(t.dweights + e * t.weight_stride) : Vec16::zero();
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
            for (int i = 0; i < kGroup; ++i) acc[e + i] = Vec16::fma(pixel[b], Vec16::broadcast(at[i] + b), acc[e + i]);
        }
      }
    }
#pragma GCC unroll 16
  for (int e = 0; e < E; ++e) acc[e].store(t.dweights + e * t.weight_stride);
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

// dy of one strip as [image][row][pixel][16]; lanes that are not there are zero.
inline void pack_strip_pixels(const Conv2dGradValues& args, const Conv2dGeometry& g, const Band& band,
                              const Strip& strip, float* packed) {
  const int64_t area = g.p * g.q;
  for (int64_t image = 0; image < band.images; ++image)
    for (int64_t y = 0; y < band.rows; ++y, packed += band.cols * kStripRows) {
      const int64_t n = band.image + image;
      const int64_t pixel = (band.y + y) * g.q + band.x;
      if (strip.rows == nullptr && args.dy_channels_last) {
        const float* source = args.dy + (n * area + pixel) * g.k + strip.row;
        for (int64_t x = 0; x < band.cols; ++x)
          Vec16::load_first(source + x * g.k, strip.lanes).store(packed + x * kStripRows);
      } else if (strip.rows == nullptr) {
        if (strip.lanes < kStripRows) zero_floats(packed, band.cols * kStripRows);
        transpose_floats(args.dy + (n * g.k + strip.row) * area + pixel, area, strip.lanes, band.cols, packed,
                         kStripRows);
      } else {
        const int64_t row_stride = args.dy_channels_last ? 1 : area, pixel_stride = args.dy_channels_last ? g.k : 1;
        const float* source = args.dy + (args.dy_channels_last ? (n * area + pixel) * g.k : n * g.k * area + pixel);
        for (int64_t x = 0; x < band.cols; ++x)
          for (int lane = 0; lane < kStripRows; ++lane)
            packed[x * kStripRows + lane] =
                lane < strip.lanes ? source[strip.rows[lane] * row_stride + x * pixel_stride] : 0.0f;
      }
    }
}

struct GradValuesCall {
  Conv2dGradValues args;
  Conv2dGeometry g;
  Layout layout;
  const int32_t* offsets;
};

inline void grad_values_band(const GradValuesCall& call, const Band& band, float* dweights, bool accumulate) {
  const Layout& l = call.layout;
  const Conv2dGeometry& g = call.g;
  float* x = static_cast<float*>(scratch(sparsekd::kScratchInput, sizeof(float) * static_cast<size_t>(l.size())));
  float* dy = static_cast<float*>(scratch(
      sparsekd::kScratchOutput, sizeof(float) * kStripRows * static_cast<size_t>(band.images * band.rows * band.cols)));
  pack_input(call.args.x, call.args.x_channels_last, g, l, band, !accumulate, x);
  const int64_t step = choose_step(band.cols), rest = band.cols % step;
  for (int32_t s = 0; s < call.args.strips.count; ++s) {
    const Strip& strip = call.args.strips.strip[s];
    if (strip.count == 0) continue;
    pack_strip_pixels(call.args, g, band, strip, dy);
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
    value_columns(tile, strip.count, step);
    if (rest == 0) continue;
    tile.x += band.cols - rest;
    tile.dy += (band.cols - rest) * kStripRows;
    tile.steps = 1;
    tile.accumulate = true;
    value_columns(tile, strip.count, rest);
  }
}

// Bands are dealt out in fixed ranges and the ranges' sums added in order, so the result depends on the number of
// threads only, never on their timing.
void conv2d_grad_values(const Conv2dGradValues& args) {
  GradValuesCall call{
      args, flatten_pointwise(args.geometry, args.x_channels_last && args.dy_channels_last), {}, nullptr};
  const Conv2dGeometry& g = call.g;
  const int64_t num_weights = args.strips.num_weights;
  if (num_weights == 0) return;
  const int64_t taps = g.r * g.s, group_channels = g.c / g.groups;
  const int64_t bytes = 4 * (args.strips.num_columns + taps * group_channels + 2 * layout_memory(g));
  int32_t* offsets = static_cast<int32_t*>(scratch(sparsekd::kScratchCall, static_cast<size_t>(bytes)));
  int32_t* table = offsets + args.strips.num_columns;
  int32_t* axes = table + taps * group_channels;
  call.offsets = offsets;
  if (g.n * g.p * g.q == 0) return zero_floats(args.dweights, num_weights);

  const Layout whole = make_layout(g, 1, g.p, g.q, axes);
  const BandSize size = choose_bands(g, whole, args.threads, 1, Vec16::kValuePixels);
  call.layout = make_layout(g, size.images, size.rows, size.cols, axes + layout_memory(g));
  fill_offsets(call.layout, g.groups, args.strips, table, offsets);

  const int64_t parts = min64(args.threads, size.count());
  float* sums = args.dweights;
  if (parts > 1)
    sums = static_cast<float*>(
        scratch(sparsekd::kScratchSum, sizeof(float) * static_cast<size_t>((parts - 1) * num_weights)));
  const auto part_sum = [&](int64_t part) { return part == 0 ? args.dweights : sums + (part - 1) * num_weights; };
  parallel(args.threads, parts, [&](int64_t part) {
    const Range bands = share(size.count(), parts, part);
    for (int64_t i = bands.begin; i < bands.end; ++i)
      grad_values_band(call, size.band(g, i), part_sum(part), i > bands.begin);
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

// ---- peak ------------------------------------------------------------------------------------------------------

// Independent fused multiply-adds on registers only: what the figures of the kernels are compared with.
double fma_burst(int64_t rounds, float* sink) {
  constexpr int kChains = Vec16::kTilePixels < 12 ? Vec16::kTilePixels : 12;
  Vec16 acc[kChains];
  const Vec16 a = Vec16::load(sink), b = Vec16::load(sink + 16);
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) acc[i] = b;
  for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) acc[i] = Vec16::fma(a, acc[i], b);
  Vec16 sum = b;
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) sum = Vec16::add(sum, acc[i]);
  sum.store(sink);
  return 2.0 * 16.0 * kChains * static_cast<double>(rounds);
}

}  // namespace
