// x as [image][row][column][channel]: where it lies or, where outputs read padding, as a copy with the padding around
// it. Register tiles whose pixels have a base pointer each need no other layout: no transposes, and the stride is only
// another step.
#pragma once

#include "bands_impl.h"

namespace {

// Words from one image, row and column of outputs to the next, in what a band reads.
struct Steps {
  int64_t image, row, col;
};

inline int64_t rows_read(const Conv2dGeometry& g, int64_t rows) {
  return (rows - 1) * g.stride_h + (g.r - 1) * g.dilation_h + 1;
}
inline int64_t cols_read(const Conv2dGeometry& g) { return (g.q - 1) * g.stride_w + (g.s - 1) * g.dilation_w + 1; }

inline bool is_padded(const Conv2dGeometry& g) { return g.pad_h > 0 || g.pad_w > 0; }

// The rows that `rows` rows of outputs read, of one image: what a copy of them takes.
inline int64_t copied_words(const Conv2dGeometry& g, int64_t rows) { return rows_read(g, rows) * cols_read(g) * g.c; }

// Columns from one row to the next.
inline int64_t pixel_pitch(const Conv2dGeometry& g) { return is_padded(g) ? cols_read(g) : g.w; }

inline Steps pixel_steps(const Conv2dGeometry& g, int64_t band_rows) {
  const int64_t row = pixel_pitch(g) * g.c;
  return {is_padded(g) ? copied_words(g, band_rows) : g.h * row, g.stride_h * row, g.stride_w * g.c};
}

inline const int32_t* fill_pixel_offsets(const Conv2dGeometry& g, const Strips& strips, int32_t* memory) {
  if (g.r * g.s == 1 && g.groups == 1) return strips.columns;  // a column of a single tap is a channel
  const int64_t row = pixel_pitch(g) * g.c;
  return fill_offsets(g, strips, 1, memory,
                      [&](int64_t r, int64_t s) { return r * g.dilation_h * row + s * g.dilation_w * g.c; });
}

// The largest bands whose copies are at most `words`, but at least `pieces` of them where the shape allows.
inline BandSize choose_pixel_bands(const Conv2dGeometry& g, int64_t pieces, int64_t words) {
  const int64_t images = max64(1, min64(words / max64(1, copied_words(g, g.p)), g.n / pieces));
  int64_t rows = g.p;
  const int64_t row = cols_read(g) * g.c * g.stride_h;
  if (copied_words(g, g.p) > words) rows = max64(1, min64(g.p, (words - copied_words(g, 1)) / max64(1, row) + 1));
  rows = min64(rows, ceil_div(g.p, min64(g.p, ceil_div(pieces, g.n))));
  return make_band_size(g, rows < g.p ? 1 : images, rows, g.q);
}

// Copies what the outputs of `band` read, zeros for padding.
template <class T>
inline void copy_pixels(const T* x, const Conv2dGeometry& g, const Band& band, int64_t image_words, float* copy) {
  const int64_t row = cols_read(g) * g.c, rows = rows_read(g, band.rows);
  const int64_t left = min64(row, g.pad_w * g.c), middle = min64(row - left, g.w * g.c), right = row - left - middle;
  for (int64_t i = 0; i < band.images; ++i) {
    const T* image = x + (band.image + i) * g.h * g.w * g.c;
    float* target = copy + i * image_words;
    for (int64_t j = 0, y = band.y * g.stride_h - g.pad_h; j < rows; ++j, ++y, target += row) {
      if (y < 0 || y >= g.h) {
        zero_floats(target, row);
        continue;
      }
      zero_floats(target, left);
      copy_floats(target + left, image + y * g.w * g.c, 1, middle);
      zero_floats(target + left + middle, right);
    }
  }
}

}  // namespace
