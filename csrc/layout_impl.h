// How an input image lies in scratch memory while a convolution runs, and the copies into and out of that layout.
//
// 1. Stride and dilation are taken out of the inner loops by splitting each axis into phases: the input coordinate that
//    output o reads through tap t is (o * stride + t * dilation) - pad = (o + shift) * stride + residue - pad, with
//    shift and residue the quotient and remainder of t * dilation by stride. Every residue in use is one phase, and
//    inside a phase the outputs of a row read consecutive floats whatever the stride.
// 2. Order: [channel][row phase][column phase][image][row][column]. The pitches are the same for all bands of a call,
//    so a (tap, channel) column of the weight is one constant offset (`fill_offsets`).
// 3. An element is one 32-bit word: a float, or kDepth narrower channels of one pixel side by side (a pair of
//    Bfloat16), the last word of a group filled up with zeros. Sizes and offsets below count words, and so does
//    Conv2dGeometry::c.
// 4. Padding is stored as zeros (of bytes: the zero point) and shared between neighbours: a row's right padding is the
//    next row's left padding, an image's lower padding the next image's upper one.
#pragma once

#include "conv2d_kernels.h"
#include "copy_impl.h"
#include "parallel_impl.h"
#include "scratch_impl.h"

namespace {

using sparsekd::Conv2dGeometry;
using sparsekd::Strip;
using sparsekd::Strips;

struct Axis {
  int64_t stride, dilation, pad, taps, in, out;
  int64_t reach;     // largest shift
  int64_t phases;    // residues in use
  int32_t* slot;     // [stride] phase of a residue, -1 when no tap has it
  int32_t* residue;  // [phases]

  int64_t shift_of(int64_t tap) const { return tap * dilation / stride; }
  int64_t phase_of(int64_t tap) const { return slot[tap * dilation % stride]; }

  // Positions of `phase`, counted from `start`, that hold input rather than padding, out of the length + reach
  // positions which `length` outputs from `start` on can read.
  Range valid(int64_t phase, int64_t start, int64_t length) const {
    const int64_t offset = pad - residue[phase];
    const int64_t begin = max64(0, (offset > 0 ? ceil_div(offset, stride) : 0) - start);
    const int64_t last = in + offset;
    const int64_t end = min64(length + reach, (last > 0 ? ceil_div(last, stride) : 0) - start);
    return begin < end ? Range{begin, end} : Range{length + reach, length + reach};
  }

  // Distance between rows (or images) that lets them share their padding.
  int64_t shared_pitch() const {
    int64_t pitch = out;
    for (int64_t phase = 0; phase < phases; ++phase) {
      const Range range = valid(phase, 0, out);
      if (range.begin == range.end) continue;
      pitch = max64(pitch, max64(range.end, out + reach - range.begin));
    }
    return pitch;
  }
};

inline Axis make_axis(int64_t stride, int64_t dilation, int64_t pad, int64_t taps, int64_t in, int64_t out,
                      int32_t* memory) {
  Axis axis{stride, dilation, pad, taps, in, out, (taps - 1) * dilation / stride, 0, memory, memory + stride};
  for (int64_t i = 0; i < stride; ++i) axis.slot[i] = -1;
  for (int64_t tap = 0; tap < taps; ++tap) {
    int32_t& slot = axis.slot[tap * dilation % stride];
    if (slot >= 0) continue;
    slot = static_cast<int32_t>(axis.phases);
    axis.residue[axis.phases++] = static_cast<int32_t>(tap * dilation % stride);
  }
  return axis;
}

// Part of a batch that is packed and worked on at once. Several images only when they are whole.
struct Band {
  int64_t image, images, y, rows, x, cols;
};

struct Layout {
  Axis h, w;
  int64_t channels;
  int64_t pitch;       // floats from one row to the next
  int64_t image_rows;  // rows from one image to the next
  int64_t plane;       // floats of one phase of one channel
  int64_t channel;     // floats of one channel
  int64_t lanes;       // neighbouring images that lie side by side in every column; "images" then counts groups of them

  int64_t size() const { return channels * channel; }
  int64_t row(int64_t image, int64_t y) const { return (image * image_rows + y) * pitch; }
};

// A layout for bands of up to images x rows x cols outputs.
inline Layout make_layout(const Conv2dGeometry& g, int64_t images, int64_t rows, int64_t cols, int32_t* memory,
                          int64_t lanes = 1) {
  Layout l{};
  l.h = make_axis(g.stride_h, g.dilation_h, g.pad_h, g.r, g.h, g.p, memory);
  l.w = make_axis(g.stride_w, g.dilation_w, g.pad_w, g.s, g.w, g.q, memory + 2 * g.stride_h);
  l.channels = g.c;
  l.lanes = lanes;
  l.pitch = (cols == g.q ? l.w.shared_pitch() : cols + l.w.reach) * lanes;
  l.image_rows = rows == g.p ? l.h.shared_pitch() : rows;
  // 16 more floats: vectors of output pixels may run past the last one.
  l.plane = round_up((images * l.image_rows + l.h.reach) * l.pitch + l.w.reach * lanes + 16, 16);
  // An odd number of cache lines, so that the channels of one pixel spread over all cache sets.
  l.channel = (l.h.phases * l.w.phases * l.plane / 16 | 1) * 16;
  return l;
}

inline int64_t layout_memory(const Conv2dGeometry& g) { return 2 * (g.stride_h + g.stride_w); }

// Where every column of `strips` starts in the packed input: in `memory`, offsets_memory() integers.
inline int64_t offsets_memory(const Conv2dGeometry& g, const Strips& strips) {
  return strips.num_columns + g.r * g.s * (g.c / g.groups);
}

// tap(r, s): where a tap's first channel lies, `channel` words before the next one.
template <class Tap>
inline const int32_t* fill_offsets(const Conv2dGeometry& g, const Strips& strips, int64_t channel, int32_t* memory,
                                   const Tap& tap) {
  int32_t* const offsets = memory;
  int32_t* const table = offsets + strips.num_columns;
  const int64_t group_channels = g.c / g.groups;
  int32_t* entry = table;
  for (int64_t r = 0; r < g.r; ++r)
    for (int64_t s = 0; s < g.s; ++s) {
      const int64_t first = tap(r, s);
      for (int64_t c = 0; c < group_channels; ++c) *entry++ = static_cast<int32_t>(first + c * channel);
    }
  for (int32_t i = 0; i < strips.count; ++i) {
    const Strip& strip = strips.strip[i];
    // Strips of one tall block share their columns.
    if (i > 0 && strip.first == strips.strip[i - 1].first && strip.count == strips.strip[i - 1].count) continue;
    const int32_t base = static_cast<int32_t>(strip.group * group_channels * channel);
    const int32_t* column = strips.columns + strip.first;
    for (int32_t j = 0; j < strip.count; ++j) offsets[strip.first + j] = table[column[j]] + base;
  }
  return offsets;
}

inline const int32_t* fill_offsets(const Layout& l, const Conv2dGeometry& g, const Strips& strips, int32_t* memory) {
  if (l.channel == 1 && g.groups == 1) return strips.columns;  // a column of a single tap is a channel
  return fill_offsets(g, strips, l.channel, memory, [&](int64_t r, int64_t s) {
    return (l.h.phase_of(r) * l.w.phases + l.w.phase_of(s)) * l.plane + l.h.shift_of(r) * l.pitch +
           l.w.shift_of(s) * l.lanes;
  });
}

// Where a band's input lies: positions of one column phase that hold input, and the input column of the first.
struct Columns {
  Range valid;
  int64_t first;

  int64_t count() const { return valid.end - valid.begin; }
};

inline Columns input_columns(const Layout& l, const Band& band, int64_t phase) {
  const Range valid = l.w.valid(phase, band.x, band.cols);
  return {valid, (band.x + valid.begin) * l.w.stride + l.w.residue[phase] - l.w.pad};
}

// The packed rows of one image in one row phase: `count` of them, of which `valid` hold input, from row `y` on,
// `y_step` apart; the others are padding.
struct Rows {
  Range valid;
  int64_t count, y, y_step;
};

inline Rows input_rows(const Layout& l, const Band& band, int64_t image, int64_t phase) {
  const Range valid = l.h.valid(phase, band.y, band.rows);
  const int64_t count = l.image_rows + (image + 1 == band.images ? l.h.reach : 0);
  return {{min64(valid.begin, count), min64(valid.end, count)},
          count,
          (band.y + valid.begin) * l.h.stride + l.h.residue[phase] - l.h.pad,
          l.h.stride};
}

// What a call reads its input from: kDepth channels make one word.
template <class T, int kDepth = 1>
struct Input {
  const T* x;
  bool channels_last;
  int64_t channels, group_channels;  // elements, not words
  int zero = 0;                      // what stands for 0 in bytes

  // What padding is filled with: zeros, also where words hold distances from `zero`.
  Vec16 padding() const {
    const uint32_t word = kDepth == 4 ? 0x01010101u * static_cast<uint32_t>(zero) : 0;
    float bits;
    memcpy(&bits, &word, sizeof bits);
    return Vec16::broadcast(&bits);
  }
  // Whether channels_last memory is words as it is.
  bool in_place() const { return sizeof(T) * kDepth == sizeof(float) && full_words(); }
  bool full_words() const { return kDepth == 1 || group_channels % kDepth == 0; }
  int64_t group_words() const { return ceil_div(group_channels, kDepth); }
  // The first channel of a word.
  int64_t channel(int64_t word) const { return word / group_words() * group_channels + word % group_words() * kDepth; }
  // How many channels a word holds.
  int64_t held(int64_t word) const { return min64(kDepth, group_channels - word % group_words() * kDepth); }
};

template <class T, int kDepth, class E>
inline void pack_plane(const Input<T, kDepth>& in, const T* x, int64_t word, const Conv2dGeometry& g, const Layout& l,
                       const Rows& rows, const Columns& columns, E* plane) {
  const int64_t count = columns.count(), area = g.h * g.w;
  const Vec16 padding = in.padding();
  for (int64_t i = 0; i < rows.valid.begin; ++i) fill_floats(plane + i * l.pitch, count, padding);
  const T* source = x + in.channel(word) * area + rows.y * g.w + columns.first;
  for (int64_t i = rows.valid.begin; i < rows.valid.end; ++i, source += rows.y_step * g.w)
    copy_words<kDepth>(plane + i * l.pitch, source, area, in.held(word), l.w.stride, count, in.zero);
  for (int64_t i = rows.valid.end; i < rows.count; ++i) fill_floats(plane + i * l.pitch, count, padding);
}

// Pixels whose words are not all full, `stride` apart, to [pixel][word].
template <class T, int kDepth>
inline void fill_words(const Input<T, kDepth>& in, const T* source, int64_t stride, int64_t count, float* words) {
  const int64_t total = in.channels / in.group_channels * in.group_words();
  for (int64_t i = 0; i < count; ++i, source += stride)
    for (int64_t word = 0; word < total; ++word, ++words) {
      const T* at = source + in.channel(word);
      load16_words<kDepth>(at, 1, static_cast<int>(in.held(word)), 1, 1, in.zero).store_first(words, 1);
    }
}

// `count` pixels, `stride` elements apart, to one row of words of every channel plane.
template <class T, int kDepth, class E>
inline void pack_row(const Input<T, kDepth>& in, const T* source, int64_t stride, int64_t count, const Layout& l,
                     E* target) {
  constexpr int64_t kRows = 16 * sizeof(float) / sizeof(E);  // of a tile
  // Whole pixels, so that memory is read in order.
  const auto transpose = [&](const auto* pixels, int64_t pixel) {
    for (int64_t i = 0; i < count; i += kRows)
      for (int64_t c = 0; c < l.channels; c += 16) {
        const auto* tile = pixels + i * pixel + c;
        const int rows = static_cast<int>(min64(kRows, count - i));
        if (l.w.stride == 1)
          for (int row = 0; row < rows; ++row) __builtin_prefetch(tile + (kRows + row) * pixel);
        transpose_tile(tile, pixel, rows, static_cast<int>(min64(16, l.channels - c)), target + i + c * l.channel,
                       l.channel);
      }
  };
  if constexpr (kDepth == 1) {
    transpose(source, stride);
  } else if (in.in_place()) {
    transpose(reinterpret_cast<const float*>(source), stride / kDepth);
  } else {
    float* words = scratch_of<float>(sparsekd::kScratchWords, count * l.channels);
    fill_words(in, source, stride, count, words);
    transpose(words, l.channels);
  }
}

template <class T, int kDepth, class E>
inline void pack_pixels(const Input<T, kDepth>& in, const T* x, const Conv2dGeometry& g, const Layout& l,
                        const Rows& rows, const Columns& columns, E* planes) {
  const int64_t count = columns.count();
  const Vec16 padding = in.padding();
  for (int64_t i = 0; i < rows.count; ++i) {
    E* target = planes + i * l.pitch;
    if (i < rows.valid.begin || i >= rows.valid.end) {
      for (int64_t c = 0; c < g.c; ++c) fill_floats(target + c * l.channel, count, padding);
      continue;
    }
    const int64_t y = rows.y + (i - rows.valid.begin) * rows.y_step;
    pack_row(in, x + (y * g.w + columns.first) * in.channels, l.w.stride * in.channels, count, l, target);
  }
}

// Packs the input that the outputs of `band` read. `fresh` says that the memory may hold anything; else it was packed
// for an earlier band of this call, and columns that are padding in both stay zero. E: float, which may hold a word, or
// T, one of two neighbours that a word is read as; then a line's last one has a neighbour behind it, which must be a
// number.
template <class T, int kDepth, class E>
inline void pack_input(const Input<T, kDepth>& in, const Conv2dGeometry& g, const Layout& l, const Band& band,
                       bool fresh, E* packed) {
  const bool padded = l.w.reach > 0 || l.w.pad > 0 || l.h.reach > 0 || l.h.pad > 0 || sizeof(E) < sizeof(float);
  const bool moved = band.cols < g.q && padded;
  if ((fresh && padded) || moved) fill_floats(packed, l.size(), in.padding());
  for (int64_t image = 0; image < band.images; ++image) {
    const T* source = in.x + (band.image + image) * in.channels * g.h * g.w;
    for (int64_t a = 0; a < l.h.phases; ++a)
      for (int64_t b = 0; b < l.w.phases; ++b) {
        const Rows rows = input_rows(l, band, image, a);
        const Columns columns = input_columns(l, band, b);
        if (columns.count() == 0) continue;
        E* plane = packed + (a * l.w.phases + b) * l.plane + l.row(image, 0) + columns.valid.begin;
        if (in.channels_last) {
          pack_pixels(in, source, g, l, rows, columns, plane);
          continue;
        }
        for (int64_t c = 0; c < g.c; ++c) pack_plane(in, source, c, g, l, rows, columns, plane + c * l.channel);
      }
  }
}

// The reverse of pack_input for gradients: writes every input row whose position in its phase, (y + pad) / stride, lies
// in `rows`. Input that no output reads becomes zero. Images side by side must be channels_last.
template <class T>
inline void unpack_input(const float* packed, const Conv2dGeometry& g, const Layout& l, const Band& band, Range rows,
                         bool channels_last, T* x) {
  int64_t covered = 0;
  for (int64_t b = 0; b < l.w.phases; ++b) covered += input_columns(l, band, b).count();
  const bool stream = sizeof(T) == sizeof(float) && channels_last && stream_output(x, g.n * g.h * g.w, g.c);
  const bool whole = band.cols == g.q;  // a band of some columns is a 1 x 1 convolution and owns just those
  const int64_t width = whole ? g.w : band.cols;
  const int64_t x0 = whole ? 0 : band.x;
  const int64_t y_begin = max64(0, rows.begin * g.stride_h - g.pad_h);
  const int64_t y_end = min64(g.h, rows.end * g.stride_h - g.pad_h);
  for (int64_t image = 0; image < band.images; ++image)
    for (int64_t y = y_begin; y < y_end; ++y) {
      const int64_t a = l.h.slot[(y + g.pad_h) % g.stride_h];
      const int64_t row = (y + g.pad_h) / g.stride_h - band.y;
      const bool empty = a < 0 || row >= band.rows + l.h.reach;
      const int64_t n = (band.image + image) * l.lanes, images = min64(l.lanes, g.n - n);
      for (int64_t i = n; i < n + images && (empty || covered < width); ++i) {
        if (channels_last)
          zero_floats(x + ((i * g.h + y) * g.w + x0) * g.c, width * g.c);
        else
          for (int64_t c = 0; c < g.c; ++c) zero_floats(x + ((i * g.c + c) * g.h + y) * g.w + x0, width);
      }
      if (empty) continue;
      for (int64_t b = 0; b < l.w.phases; ++b) {
        const Columns columns = input_columns(l, band, b);
        const float* source =
            packed + (a * l.w.phases + b) * l.plane + l.row(image, row) + columns.valid.begin * l.lanes;
        if (channels_last) {
          T* target = x + ((n * g.h + y) * g.w + columns.first) * g.c;
          if (l.lanes == 1) transpose_floats(source, l.channel, g.c, columns.count(), target, l.w.stride * g.c, stream);
          for (int64_t i = 0; i < columns.count() && l.lanes > 1; ++i)
            transpose_floats(source + i * l.lanes, l.channel, g.c, images, target + i * l.w.stride * g.c,
                             g.h * g.w * g.c, stream);
          continue;
        }
        for (int64_t c = 0; c < g.c; ++c) {
          T* target = x + ((n * g.c + c) * g.h + y) * g.w + columns.first;
          scatter_floats(target, l.w.stride, source + c * l.channel, columns.count());
        }
      }
    }
  if (stream) Vec16::fence();
}

inline bool is_pointwise(const Conv2dGeometry& g) {
  return g.r == 1 && g.s == 1 && g.stride_h == 1 && g.stride_w == 1 && g.pad_h == 0 && g.pad_w == 0;
}

// A 1 x 1 convolution has no neighbours: rows join into one, and images too when all tensors are channels_last.
inline Conv2dGeometry flatten_pointwise(Conv2dGeometry g, bool join_images) {
  if (!is_pointwise(g)) return g;
  g.dilation_h = g.dilation_w = 1;
  g.w = g.q = g.h * g.w * (join_images ? g.n : 1);
  g.h = g.p = 1;
  if (join_images) g.n = 1;
  return g;
}

}  // namespace
