// The gradient of the input: every kept column of a strip adds its 16 weights times dy to the packed gradient, 16
// pixels to a vector.
#pragma once

#include "conv2d_grad_input_gather_impl.h"
#include "conv2d_grad_input_scatter_impl.h"

namespace {

using sparsekd::Conv2dGradInput;

// E columns x V vectors of 16 flat pixels: dx[offset[e] + pixel] += sum over words of rows of weight[e][row] *
// dy[row][pixel].
struct InputTile {
  float* dx;
  const int32_t* offsets;
  const float* weights;
  int64_t weight_stride;
  const float* dy;  // [rows][dy_stride]
  int64_t dy_stride;
  int64_t rows;
};

template <IsSums Sums, int E, int V>
inline void input_tile(const InputTile& t, int64_t entry) {
  Vec16 acc[E * V];
#pragma GCC unroll 32
  for (int i = 0; i < E * V; ++i) acc[i] = Vec16::zero();
  // What the stores at the end might alias is read before them, and once.
  const int64_t weight_stride = t.weight_stride, dy_stride = t.dy_stride;
  const float* w = t.weights + entry * weight_stride;
  const float* dy = t.dy;
  float* dx[E];
#pragma GCC unroll 8
  for (int e = 0; e < E; ++e) dx[e] = t.dx + t.offsets[entry + e];
  const auto add_row = [&] {
    Vec16 weight[E];
#pragma GCC unroll 8
    for (int e = 0; e < E; ++e) weight[e] = Vec16::broadcast(w + e * weight_stride);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const Vec16 pixels = Vec16::load(dy + v * 16);
#pragma GCC unroll 8
      for (int e = 0; e < E; ++e) acc[e * V + v] = Sums::madd(weight[e], pixels, acc[e * V + v]);
    }
    dy += dy_stride;
    ++w;
  };
  if (t.rows == kStripRows) {
#pragma GCC unroll 16
    for (int row = 0; row < kStripRows; ++row) add_row();
  } else {
    for (int64_t row = 0; row < t.rows; ++row) add_row();
  }
#pragma GCC unroll 8
  for (int e = 0; e < E; ++e)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) Vec16::add(Vec16::load(dx[e] + v * 16), acc[e * V + v]).store(dx[e] + v * 16);
}

// All columns of a strip, in groups of E, then E / 2, ... Not inlined: among others GCC 12 keeps its addresses in memory.
template <IsSums Sums, int V, int E = Vec16::kInputEntries>
[[gnu::noinline]] void input_columns(const InputTile& t, int64_t count, int64_t entry = 0) {
  for (; entry + E <= count; entry += E) input_tile<Sums, E, V>(t, entry);
  if constexpr (E > 1)
    if (entry < count) input_columns<Sums, V, E / 2>(t, count, entry);
}

template <IsSums Sums, int V = Vec16::kInputVectors>
inline void run_input_columns(int64_t vectors, const InputTile& t, int64_t count) {
  if (vectors == V) return input_columns<Sums, V>(t, count);
  if constexpr (V > 1) run_input_columns<Sums, V - 1>(vectors, t, count);
}

template <IsGradientWords Words>
struct GradInputCall {
  Conv2dGradInput<typename Words::X> args;
  Conv2dGeometry g;
  Layout layout;
  const int32_t* offsets;
};

// dy of one strip as [row][flat pixel], kDepth rows to a word: pixels as far apart as in the packed input, zeros where
// there is no output.
template <IsGradientWords Words>
inline void pack_strip_flat(const GradInputCall<Words>& call, const Band& band, const Strip& strip, float* flat,
                            int64_t flat_stride) {
  constexpr int kDepth = Words::kDepth;
  const Conv2dGeometry& g = call.g;
  const Layout& l = call.layout;
  const bool last = call.args.dy_channels_last, beside = l.lanes > 1;
  const int64_t area = g.p * g.q, words = ceil_div(strip.lanes, kDepth), row_stride = last ? 1 : area;
  const int64_t pixel_stride = last ? g.k : 1, image_stride = area * g.k;
  const bool whole_words = g.k % kDepth == 0 && strip.lanes % kDepth == 0;  // as they lie in a pixel
  const bool dense = l.pitch == band.cols * l.lanes && l.image_rows == band.rows &&
                     band.images * l.row(1, 0) == flat_stride && g.n % l.lanes == 0;
  if (!dense) zero_floats(flat, words * flat_stride);
  // `count` pixels, `stride` apart, one after the other in every row of words.
  const auto pack = [&](const typename Words::X* dy, int64_t stride, int64_t count, float* target) {
    if (last && strip.rows == nullptr && whole_words) {
      const auto* next = dy + strip.row + kStripRows;
      for (int64_t x = 0; x < count; ++x) __builtin_prefetch(next + x * stride, 0, 2);
      using Word = std::conditional_t<kDepth == 1, typename Words::X, float>;
      return transpose_floats(reinterpret_cast<const Word*>(dy + strip.row), stride / kDepth, count, words, target,
                              flat_stride);
    }
    for (int lane = 0; lane < strip.lanes; lane += kDepth, target += flat_stride) {
      const int rows = static_cast<int>(min64(kDepth, strip.lanes - lane));
      const int64_t row = row_of(strip, lane), next = rows > 1 ? row_of(strip, lane + 1) - row : 0;
      copy_words<kDepth>(target, dy + row * row_stride, next * row_stride, rows, stride, count, 0);
    }
  };
  for (int64_t image = 0; image < band.images; ++image)
    for (int64_t y = 0; y < band.rows; ++y) {
      const int64_t n = (band.image + image) * l.lanes, images = min64(l.lanes, g.n - n);
      const auto* dy = call.args.dy + n * image_stride + ((band.y + y) * g.q + band.x) * pixel_stride;
      float* target = flat + l.row(image, y);
      if (!beside) pack(dy, pixel_stride, band.cols, target);
      for (int64_t x = 0; x < band.cols && beside; ++x)
        pack(dy + x * pixel_stride, image_stride, images, target + x * l.lanes);
    }
}

// Pixels of a flat line: rows and images with the gaps between them, but none behind the last.
inline int64_t flat_pixels(const Layout& l, int64_t images, int64_t rows, int64_t cols) {
  return round_up(((images - 1) * l.image_rows + rows - 1) * l.pitch + cols * l.lanes, 16);
}

// Adds what the outputs of `band` contribute to the packed gradient.
template <IsGradientWords Words>
inline void grad_input_band(const GradInputCall<Words>& call, const Band& band, float* dx) {
  constexpr int kDepth = Words::kDepth;
  const Layout& l = call.layout;
  const int64_t flat = flat_pixels(l, band.images, band.rows, band.cols);
  float* dy = scratch_of<float>(sparsekd::kScratchOutput, kStripRows / kDepth * flat);
  const Cuts tiles{flat / 16, ceil_div(flat / 16, Vec16::kInputVectors)};
  for (int32_t s = 0; s < call.args.strips.count; ++s) {
    const Strip& strip = call.args.strips.strip[s];
    if (strip.count == 0 || strip.lanes == 0) continue;
    pack_strip_flat(call, band, strip, dy, flat);
    for (int64_t i = 0; i < tiles.count; ++i) {
      const int64_t at = tiles.begin(i) * 16;
      const InputTile tile{.dx = dx + at,
                           .offsets = call.offsets + strip.first,
                           .weights = call.args.weights + strip.weights / kDepth,
                           .weight_stride = call.args.strips.weight_stride / kDepth,
                           .dy = dy + at,
                           .dy_stride = flat,
                           .rows = ceil_div(strip.lanes, kDepth)};
      run_input_columns<typename Words::Sums>(tiles.size(i), tile, strip.count);
    }
  }
}

// Whole images, or the rows of one image whose packed positions lie in `owned`. Bands follow each other; the rows that
// two of them touch are carried over.
template <IsGradientWords Words>
inline void grad_input_rows(const GradInputCall<Words>& call, Band range, Range owned, int64_t band_rows, float* dx) {
  const Layout& l = call.layout;
  const int64_t reach = l.h.reach, planes = call.g.c * l.h.phases * l.w.phases;
  const int64_t y_begin = max64(0, owned.begin - reach), y_end = min64(call.g.p, owned.end);
  band_rows = ceil_div(y_end - y_begin, ceil_div(y_end - y_begin, band_rows));  // no short last one
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
constexpr int64_t kBeside = 16;             // images side by side: a vector
constexpr int64_t kRowsBeside = 4;          // of a band, or what two bands share is too much
constexpr int64_t kLanesPerIdle = 9;

// Whether images lie side by side: then every column of the weight finds dx in whole vectors of the cache, and only
// whole columns of a line are gaps. Pixels of 1 x 1 convolutions already lie so. It takes 0.8 to 0.87 of the time when
// every lane has an image, and lanes without one cost as much as others: with more than one idle lane in nine (29 of 32
// images still pass, 14 of 16 do not) little of that would be left.
inline bool beside_pays(bool channels_last, const Conv2dGeometry& g) {
  const int64_t lanes = round_up(g.n, kBeside), idle = lanes - g.n;
  return channels_last && g.r * g.s > 1 && kLanesPerIdle * idle <= lanes;
}

// Whether gathering costs less: flat lines spend multiply-adds on padding, and on the rows that two threads share;
// gathering spends them on sums of lanes. The constants fit the 3 x 3 layers of `benchmarks/conv2d.py` at 0.5 and 0.1.
template <IsGradientWords Words>
inline bool better_gathered(const GradInputCall<Words>& call, const BandSize& size, int64_t segments) {
  const Conv2dGeometry& g = call.g;
  if (g.r * g.s == 1 || g.n * g.p * g.q == 0) return false;
  const Layout& l = call.layout;
  const int64_t rows = segments == 1 ? g.p : ceil_div(g.p + l.h.reach, segments);
  const int64_t flat = flat_pixels(l, size.images, rows, g.q) * size.image_bands * segments;
  const double lanes = static_cast<double>(flat) / static_cast<double>(g.n * g.p * g.q);
  const double blocks =
      static_cast<double>(count_blocks(call.args.strips)) / static_cast<double>(g.c * l.h.phases * l.w.phases);
  return blocks > 0 && lanes > 1.1 + 3 / blocks;
}

template <IsGradientWords Words>
void conv2d_grad_input(const Conv2dGradInput<typename Words::X>& args) {
  GradInputCall<Words> call{};
  call.args = args;
  call.g = flatten_pointwise(args.geometry, args.dy_channels_last && args.dx_channels_last);
  const Conv2dGeometry& g = call.g;
  if (g.n * g.h * g.w * g.c == 0) return;
  constexpr bool kOtherForms = Words::kDepth == 1;  // which have rows as lanes, so no two of them in a word
  if constexpr (kOtherForms)
    if (is_pointwise(g) && g.n * g.p * g.q <= kScatteredPixels) return conv2d_grad_input_scatter(args);
  int32_t *offsets, *whole_axes, *axes;
  Arena::carve(sparsekd::kScratchCall, [&](Arena& arena) {
    offsets = arena.take<int32_t>(offsets_memory(g, args.strips));
    whole_axes = arena.take<int32_t>(layout_memory(g));
    axes = arena.take<int32_t>(layout_memory(g));
  });

  const Layout whole = make_layout(g, 1, g.p, g.q, whole_axes);
  const int64_t pieces = args.threads == 1 ? 1 : 2 * args.threads;
  Conv2dGeometry groups = g;  // of images, which bands count
  BandSize size = choose_bands(g, whole, pieces, 1, 16, kPackedFloats);
  int64_t lanes = 1;
  if (beside_pays(args.dy_channels_last && args.dx_channels_last, g)) {
    groups.n = ceil_div(g.n, kBeside);
    const BandSize beside = choose_bands(groups, whole, pieces, 1, 16, kPackedFloats / kBeside);
    if (beside.rows >= min64(g.p, kRowsBeside) && beside.cols == g.q) {
      size = beside;
      lanes = kBeside;
    }
  }
  if (lanes == 1) groups.n = g.n;
  if (!is_pointwise(g)) size = make_band_size(groups, size.images, size.rows, g.q);  // bands share columns, not rows
  call.layout = make_layout(g, size.images, size.rows, size.cols, axes, lanes);
  // An image is cut by rows only when there are too few images: the cut costs the rows that both parts need.
  const int64_t segments = size.image_bands * size.col_bands >= args.threads
                               ? 1
                               : min64(size.row_bands, ceil_div(args.threads, size.image_bands * size.col_bands));
  if constexpr (kOtherForms)
    if (lanes == 1 && better_gathered(call, size, segments)) return conv2d_grad_input_gather(args);
  call.offsets = fill_offsets(call.layout, g, args.strips, offsets);
  parallel(args.threads, size.image_bands * size.col_bands * segments, [&](int64_t item) {
    const int64_t segment = item % segments, rest = item / segments;
    const Band range =
        size.band(groups, rest / size.col_bands * size.row_bands * size.col_bands + rest % size.col_bands);
    Range owned = share(g.p + (segments > 1 ? call.layout.h.reach : 0), segments, segment);
    if (segment + 1 == segments) owned.end = kEnd;
    float* dx = scratch_of<float>(sparsekd::kScratchInput, call.layout.size());
    grad_input_rows(call, range, owned, size.rows, dx);
  });
}

}  // namespace
