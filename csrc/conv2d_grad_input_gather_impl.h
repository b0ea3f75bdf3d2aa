// The gradient of the input, gathered: every input channel walks the blocks that read it, with output rows as lanes,
// and adds the lanes up once at the end. It wastes nothing on small maps and touches dx once, but needs the weight's
// columns sorted by channel, and enough blocks for each channel to pay for the sums of lanes.
#pragma once

#include "conv2d_forward_impl.h"

namespace {

using sparsekd::Conv2dGradInput;

constexpr int64_t kEntriesAhead = 8;  // whose weights are prefetched; as many more lie behind the last entry

// One block as an input channel sees it.
struct GatherEntry {
  int32_t weight;  // its 16 weights, in vectors
  int32_t dy;      // packed dy of its strip, one tap back, in floats
};

struct GatherTile {
  const float* dy[kTileRowsMax];  // packed dy where the first position of every row stands, without a tap
  const GatherEntry* entries;
  int64_t count;
  const float* weights;
  float* sums;  // [A * B], in whole vectors
  bool accumulate;
};

template <int A, int B>
void gather_tile(const GatherTile& t) {
  constexpr int kVectors = (A * B + 15) / 16;
  Vec16 acc[kVectors * 16];
  const float* dy[A];
#pragma GCC unroll 32
  for (int i = 0; i < kVectors * 16; ++i) acc[i] = Vec16::zero();
#pragma GCC unroll 8
  for (int a = 0; a < A; ++a) dy[a] = t.dy[a];
  const float* const weights = t.weights;
  const GatherEntry* const end = t.entries + t.count;
  GatherEntry next = *t.entries;  // a block ahead: multiply-adds need not wait for their own addresses
  for (const GatherEntry* entry = t.entries; entry != end;) {
    const Vec16 weight = Vec16::load(weights + int64_t{next.weight} * kStripRows);
    const int64_t o = next.dy;
    __builtin_prefetch(weights + int64_t{entry[kEntriesAhead].weight} * kStripRows);
    next = *++entry;
#pragma GCC unroll 8
    for (int a = 0; a < A; ++a)
#pragma GCC unroll 32
      for (int b = 0; b < B; ++b)
        acc[a * B + b] = Vec16::fma(weight, Vec16::load(dy[a] + o + b * kStripRows), acc[a * B + b]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < kVectors; ++i) {
    Vec16 rows[16];
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) rows[j] = acc[i * 16 + j];
    const Vec16 sum = Vec16::sum_rows(rows);
    (t.accumulate ? Vec16::add(sum, Vec16::load(t.sums + i * 16)) : sum).store(t.sums + i * 16);
  }
}

using GatherTileFn = void (*)(const GatherTile&);

template <int A, int B>
GatherTileFn find_gather_cols(int64_t b) {
  if (b == B) return gather_tile<A, B>;
  if constexpr (B > 1) return find_gather_cols<A, B - 1>(b);
  return nullptr;
}

// The kernel of an a x b tile; a * b <= Vec16::kTilePixels.
template <int A = 1>
GatherTileFn find_gather_tile(int64_t a, int64_t b) {
  if (a == A) return find_gather_cols<A, Vec16::kTilePixels / A>(b);
  if constexpr (A < kTileRowsMax && A < Vec16::kTilePixels) return find_gather_tile<A + 1>(a, b);
  return nullptr;
}

// Positions are those of the phases in layout_impl.h: input (y + pad) / stride. Position y reads the outputs y - reach
// to y. dy lies [strip][image][row][column][16] with `reach` zeros before and after every row and image, shared.
template <class T>
struct GatherCall {
  Conv2dGradInput<T> args;
  Conv2dGeometry g;
  Axis h, w;
  int64_t images, rows, cols;  // of a band, in positions
  int64_t pitch, image_rows;   // packed dy: columns of a row, rows of an image
  int64_t plane;               // floats of one strip
  int64_t chunk, chunks;       // strips whose dy under one tile stays in the L1 cache, and how many times that
  const int32_t* first;        // [chunks][first_stride]: where the entries of plane channel * phases + phase begin
  const GatherEntry* entries;

  int64_t phases() const { return h.phases * w.phases; }
  int64_t planes() const { return g.c * phases(); }
  int64_t first_stride() const { return planes() + 2; }
  int64_t at(int64_t image, int64_t y, int64_t x) const {
    return ((image * image_rows + y + h.reach) * pitch + x + w.reach) * kStripRows;
  }
};

// table [taps * channels of a group][2]: plane and offset of a column.
template <class T>
inline void fill_table(const GatherCall<T>& call, int32_t* table) {
  for (int64_t r = 0; r < call.h.taps; ++r)
    for (int64_t s = 0; s < call.w.taps; ++s)
      for (int64_t c = 0; c < call.g.c / call.g.groups; ++c) {
        *table++ = static_cast<int32_t>(c * call.phases() + call.h.phase_of(r) * call.w.phases + call.w.phase_of(s));
        *table++ = static_cast<int32_t>(-(call.h.shift_of(r) * call.pitch + call.w.shift_of(s)) * kStripRows);
      }
}

// Sorts the blocks of one chunk of strips by plane; `base` blocks lie before them. It is a counting sort whose counts,
// positions and result share one array, each one place further to the left than the one before, so that dealing out
// turns positions into the result. With three planes, base 0 and blocks of the planes 0, 2, 0, 1:
//
//                          first[0] [1] [2] [3] [4]
//     counted                    0   0   2   1   1    count[plane] = first[plane + 2]
//     added up                   0   0   2   3   4    next[plane] = first[plane + 1], where its next entry goes
//     dealt out                  0   2   3   4   4    next[plane] has moved to where the next plane begins, so that the
//                                                     entries of a plane lie from first[plane] to first[plane + 1]
template <class T>
inline void sort_chunk(const GatherCall<T>& call, int64_t chunk, int32_t base, const int32_t* table, int32_t* first,
                       GatherEntry* entries) {
  const Strips& strips = call.args.strips;
  const int64_t group_planes = call.g.c / call.g.groups * call.phases(), size = call.first_stride();
  const int64_t end = min64(strips.count, (chunk + 1) * call.chunk);
  const auto each = [&](const auto& body) {
    for (int64_t s = chunk * call.chunk; s < end; ++s) {
      const Strip& strip = strips.strip[s];
      const int64_t plane = strip.group * group_planes;
      const int32_t* column = strips.columns + strip.first;
      if (strip.lanes == 0) continue;
      for (int32_t j = 0; j < strip.count; ++j) body(s, j, plane + table[2 * column[j]], table[2 * column[j] + 1]);
    }
  };
  int32_t *const next = first + 1, *const count = first + 2;
  for (int64_t i = 0; i < size; ++i) first[i] = i < 2 ? base : 0;
  each([&](int64_t, int32_t, int64_t plane, int32_t) { ++count[plane]; });
  for (int64_t i = 2; i < size; ++i) first[i] += first[i - 1];
  each([&](int64_t s, int32_t j, int64_t plane, int32_t offset) {
    const int64_t weight = strips.strip[s].weights + j * strips.weight_stride;
    entries[next[plane]++] = {.weight = static_cast<int32_t>(weight / kStripRows),
                              .dy = static_cast<int32_t>(s * call.plane) + offset};
  });
}

template <class T>
inline void pack_gather(const GatherCall<T>& call, const Band& band, float* packed) {
  const Conv2dGeometry& g = call.g;
  // Outputs that the positions of the band read; the rest of the packed rows is zero.
  Band read = band;
  read.y = max64(0, band.y - call.h.reach);
  read.rows = min64(g.p, band.y + band.rows) - read.y;
  read.x = max64(0, band.x - call.w.reach);
  read.cols = min64(g.q, band.x + band.cols) - read.x;
  const bool padded = call.h.reach > 0 || call.w.reach > 0 || read.rows < band.rows || read.cols < band.cols;
  for (int32_t s = 0; s < call.args.strips.count; ++s) {
    const Strip& strip = call.args.strips.strip[s];
    if (strip.count == 0 || strip.lanes == 0) continue;
    float* plane = packed + s * call.plane;
    if (padded) zero_floats(plane, call.plane);
    if (read.rows <= 0 || read.cols <= 0) continue;
    pack_strip_pixels(call.args.dy, call.args.dy_channels_last, g, read, strip,
                      plane + call.at(0, read.y - band.y, read.x - band.x), call.pitch * kStripRows,
                      call.image_rows * call.pitch * kStripRows);
  }
}

// Where a tile's rows begin in the packed dy and in dx.
struct GatherRows {
  int64_t count, cols;
  int64_t image[kTileRowsMax], y[kTileRowsMax], x;  // of dx
};

// `sums` [channels][stride] of one tile to dx.
template <class T>
inline void store_gathered(const GatherCall<T>& call, const GatherRows& rows, int64_t channel, int64_t channels,
                           const float* sums, int64_t stride) {
  const Conv2dGeometry& g = call.g;
  for (int64_t a = 0; a < rows.count; ++a) {
    const float* source = sums + a * rows.cols;
    if (call.args.dx_channels_last) {
      T* target = call.args.dx + ((rows.image[a] * g.h + rows.y[a]) * g.w + rows.x) * g.c + channel;
      transpose_floats(source, stride, channels, rows.cols, target, g.stride_w * g.c);
      continue;
    }
    for (int64_t c = 0; c < channels; ++c, source += stride) {
      T* target = call.args.dx + ((rows.image[a] * g.c + channel + c) * g.h + rows.y[a]) * g.w + rows.x;
      scatter_floats(target, g.stride_w, source, rows.cols);
    }
  }
}

// One phase of a band for the channels of a range.
template <class T>
inline void gather_phase(const GatherCall<T>& call, const Band& band, const float* packed, int64_t a, int64_t b,
                         Range channels) {
  constexpr int64_t kSums = (Vec16::kTilePixels + 15) / 16 * 16, kChannels = 16;
  alignas(64) float sums[kChannels * kSums];
  const Range ys = call.h.valid(a, band.y, band.rows - call.h.reach);  // valid() adds the reach
  const Range xs = call.w.valid(b, band.x, band.cols - call.w.reach);
  const int64_t height = ys.end - ys.begin, width = xs.end - xs.begin;
  if (height <= 0 || width <= 0) return;
  const TileShape shape = choose_tile(width);
  const Cuts row_cuts{band.images * height, ceil_div(band.images * height, shape.rows)};
  const Cuts col_cuts{width, ceil_div(width, shape.cols)};
  const int64_t phase = a * call.w.phases + b;
  for (int64_t c = channels.begin; c < channels.end; c += kChannels) {
    const int64_t count = min64(kChannels, channels.end - c);
    for (int64_t i = 0; i < row_cuts.count; ++i)
      for (int64_t j = 0; j < col_cuts.count; ++j) {
        GatherTile tile;
        GatherRows rows;
        rows.count = row_cuts.size(i);
        rows.cols = col_cuts.size(j);
        const int64_t x = xs.begin + col_cuts.begin(j);
        rows.x = (band.x + x) * call.g.stride_w + call.w.residue[b] - call.g.pad_w;
        for (int64_t k = 0; k < rows.count; ++k) {
          const int64_t row = row_cuts.begin(i) + k, image = row / height, y = ys.begin + row % height;
          rows.image[k] = band.image + image;
          rows.y[k] = (band.y + y) * call.g.stride_h + call.h.residue[a] - call.g.pad_h;
          tile.dy[k] = packed + call.at(image, y, x);
        }
        tile.weights = call.args.weights;
        const GatherTileFn kernel = find_gather_tile(rows.count, rows.cols);
        for (int64_t chunk = 0; chunk < call.chunks; ++chunk)
          for (int64_t lane = 0; lane < count; ++lane) {
            const int32_t* first = call.first + chunk * call.first_stride() + (c + lane) * call.phases() + phase;
            tile.entries = call.entries + first[0];
            tile.count = first[1] - first[0];
            tile.sums = sums + lane * kSums;
            tile.accumulate = chunk > 0;
            kernel(tile);
          }
        store_gathered(call, rows, c, count, sums, kSums);
      }
  }
}

// Whether every input is a position of some phase, that is, is written by gather_phase.
inline bool covers(const Axis& axis) {
  int64_t found = 0;
  for (int64_t phase = 0; phase < axis.phases; ++phase) {
    const Range range = axis.valid(phase, 0, axis.out);
    found += range.end - range.begin;
  }
  return found == axis.in;
}

inline int64_t count_blocks(const Strips& strips) {
  int64_t blocks = 0;
  for (int32_t s = 0; s < strips.count; ++s) blocks += strips.strip[s].count;
  return blocks;
}

// Strips that one list of blocks covers: as many as have their dy under a tile near the L1 cache, but enough to have
// some blocks between two sums of lanes.
template <class T>
inline int64_t choose_chunk(const GatherCall<T>& call, int64_t blocks) {
  constexpr int64_t kTileFloats = 12 * 1024, kBlocks = 8;
  const int64_t strips = call.args.strips.count;
  const TileShape tile = choose_tile(call.g.q);
  const int64_t fit = kTileFloats / ((tile.rows + call.h.reach) * (tile.cols + call.w.reach) * kStripRows);
  const int64_t useful = ceil_div(kBlocks * call.g.c * call.phases() * strips, max64(1, blocks));
  return ceil_div(strips, ceil_div(strips, max64(1, max64(fit, useful))));
}

template <class T>
void conv2d_grad_input_gather(const Conv2dGradInput<T>& args) {
  GatherCall<T> call{};
  call.args = args;
  call.g = flatten_pointwise(args.geometry, args.dy_channels_last && args.dx_channels_last);
  const Conv2dGeometry& g = call.g;
  const int64_t blocks = count_blocks(args.strips);
  int32_t* axes = scratch_of<int32_t>(sparsekd::kScratchAxes, layout_memory(g));
  call.h = make_axis(g.stride_h, g.dilation_h, g.pad_h, g.r, g.h, g.p, axes);
  call.w = make_axis(g.stride_w, g.dilation_w, g.pad_w, g.s, g.w, g.q, axes + 2 * g.stride_h);
  call.chunk = choose_chunk(call, blocks);
  call.chunks = ceil_div(args.strips.count, call.chunk);
  int32_t *table, *first;
  GatherEntry* entries;
  Arena::carve(sparsekd::kScratchCall, [&](Arena& arena) {
    table = arena.take<int32_t>(2 * g.r * g.s * (g.c / g.groups));
    first = arena.take<int32_t>(call.chunks * call.first_stride());
    entries = arena.take<GatherEntry>(blocks + kEntriesAhead);
  });
  for (int64_t i = 0; i < kEntriesAhead; ++i) entries[blocks + i] = {0, 0};
  call.first = first;
  call.entries = entries;

  // Bands: packed dy stays in the L2 cache. Images first, then rows; only 1 x 1 layers are as wide as they like.
  const int64_t height = g.p + call.h.reach, width = g.q + call.w.reach, lanes = args.strips.count * kStripRows;
  const int64_t budget = max64(1, kPackedFloats / max64(1, lanes));  // pixels
  call.images = min64(g.n, max64(1, budget / (height * width)));
  call.images = max64(1, min64(call.images, g.n / (2 * args.threads)));
  call.rows = height;
  call.cols = width;
  if (height * width > budget) {
    const int64_t fit = max64(4, budget / width - call.h.reach);
    call.rows = ceil_div(height, ceil_div(height, fit));
  }
  if (call.h.reach == 0 && call.w.reach == 0 && g.p == 1)
    call.cols = min64(width, round_up(max64(1, min64(budget, ceil_div(width, 2 * args.threads))), Vec16::kTilePixels));
  if (g.n < args.threads && call.cols == width) {
    const int64_t pieces = ceil_div(args.threads, g.n);
    if (height >= 16 * pieces) call.rows = min64(call.rows, ceil_div(height, pieces));
  }
  call.pitch = call.cols + call.w.reach;
  call.image_rows = call.rows == height ? height : call.rows + call.h.reach;
  call.plane = ((call.images * call.image_rows + call.h.reach) * call.pitch + call.w.reach) * kStripRows;
  fill_table(call, table);
  constexpr int64_t kManyBlocks = 8192;  // worth a parallel loop
  parallel(blocks < kManyBlocks ? 1 : args.threads, call.chunks, [&](int64_t chunk) {
    int64_t base = 0;
    for (int64_t s = 0; s < chunk * call.chunk; ++s) base += args.strips.strip[s].count;
    sort_chunk(call, chunk, static_cast<int32_t>(base), table, first + chunk * call.first_stride(), entries);
  });

  if (!covers(call.h) || !covers(call.w))
    parallel(args.threads, g.n, [&](int64_t n) { zero_floats(args.dx + n * g.c * g.h * g.w, g.c * g.h * g.w); });

  const int64_t row_bands = ceil_div(height, call.rows), col_bands = ceil_div(width, call.cols);
  const int64_t bands = ceil_div(g.n, call.images) * row_bands * col_bands;
  const int64_t chunks = min64(ceil_div(g.c, 16), ceil_div(args.threads, bands));
  parallel(args.threads, bands * chunks, [&](int64_t item) {
    const int64_t index = item / chunks, image = index / (row_bands * col_bands) * call.images;
    const int64_t y = index / col_bands % row_bands * call.rows, x = index % col_bands * call.cols;
    const Band band{image, min64(call.images, g.n - image), y, min64(call.rows, height - y),
                    x,     min64(call.cols, width - x)};
    const Range groups = share(ceil_div(g.c, 16), chunks, item % chunks);
    const Range channels{groups.begin * 16, min64(g.c, groups.end * 16)};
    float* packed = scratch_of<float>(sparsekd::kScratchInput, call.plane * args.strips.count);
    pack_gather(call, band, packed);
    for (int64_t a = 0; a < call.h.phases; ++a)
      for (int64_t b = 0; b < call.w.phases; ++b) gather_phase(call, band, packed, a, b, channels);
  });
}

}  // namespace
