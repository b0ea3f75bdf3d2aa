// How the work of a call is cut into bands that fit the cache and feed every thread.
#pragma once

#include "layout_impl.h"

namespace {

using sparsekd::kStripRows;

constexpr int64_t kPackedFloats = 80 * 1024;  // 320 KiB of packed input per thread: a third of a 1 MiB L2

// Equal cuts of a length: `count` pieces that differ by at most one.
struct Cuts {
  int64_t total, count;
  int64_t begin(int64_t i) const { return total * i / count; }
  int64_t size(int64_t i) const { return begin(i + 1) - begin(i); }
};

struct BandSize {
  int64_t images, rows, cols;
  int64_t row_bands, col_bands, image_bands;
  bool even_rows = false;  // bands of rows differ by at most one row, where else the last one is short

  int64_t count() const { return image_bands * row_bands * col_bands; }
  Band band(const Conv2dGeometry& g, int64_t index) const {
    const int64_t image = index / (row_bands * col_bands) * images;
    const int64_t row_band = index / col_bands % row_bands;
    const Cuts even{g.p, row_bands};
    const int64_t y = even_rows ? even.begin(row_band) : row_band * rows;
    const int64_t x = index % col_bands * cols;
    return {image, min64(images, g.n - image), y, even_rows ? even.size(row_band) : min64(rows, g.p - y),
            x,     min64(cols, g.q - x)};
  }
};

inline BandSize make_band_size(const Conv2dGeometry& g, int64_t images, int64_t rows, int64_t cols) {
  return {images, rows, cols, ceil_div(g.p, rows), ceil_div(g.q, cols), ceil_div(g.n, images)};
}

// Output row of one lane of a strip.
inline int32_t row_of(const Strip& strip, int lane) { return strip.rows ? strip.rows[lane] : strip.row + lane; }

// The largest bands whose packed input is at most `floats`, but at least `pieces` of them where the shape allows.
// Columns are cut in multiples of `col_step`, rows in multiples of `row_step`.
inline BandSize choose_bands(const Conv2dGeometry& g, const Layout& whole, int64_t pieces, int64_t row_step,
                             int64_t col_step, int64_t floats) {
  const int64_t planes = g.c * whole.h.phases * whole.w.phases;
  const int64_t budget = max64(1, floats / max64(1, planes));  // floats per plane
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

// Strips [0, count) in `chunks` parts of about equal numbers of columns: each belongs where its middle lies.
inline Range strip_chunk(const Strips& strips, int64_t chunks, int64_t chunk) {
  if (chunks == 1) return {0, strips.count};
  int64_t total = 0;
  for (int32_t i = 0; i < strips.count; ++i) total += strips.strip[i].count + 1;
  const Range wanted = share(2 * total, chunks, chunk);
  Range range{strips.count, strips.count};
  int64_t sum = 0;
  for (int32_t i = 0; i < strips.count; ++i) {
    const int64_t size = strips.strip[i].count + 1, middle = 2 * sum + size;
    if (middle >= wanted.begin && i < range.begin) range.begin = i;
    if (middle >= wanted.end) {
      range.end = i;
      break;
    }
    sum += size;
  }
  return range;
}

// dy of one strip as [image][row][pixel][16], rows and images `row_stride` and `image_stride` floats apart; lanes that
// are not there are zero.
template <class T>
inline void pack_strip_pixels(const T* dy, bool channels_last, const Conv2dGeometry& g, const Band& band,
                              const Strip& strip, float* packed, int64_t row_stride, int64_t image_stride) {
  const int64_t area = g.p * g.q;
  for (int64_t image = 0; image < band.images; ++image)
    for (int64_t y = 0; y < band.rows; ++y) {
      float* target = packed + image * image_stride + y * row_stride;
      const int64_t n = band.image + image;
      const int64_t pixel = (band.y + y) * g.q + band.x;
      if (strip.rows == nullptr && channels_last) {
        const T* source = dy + (n * area + pixel) * g.k + strip.row;
        for (int64_t x = 0; x < band.cols; ++x) {
          load16_first(source + x * g.k, strip.lanes).store(target + x * kStripRows);
          __builtin_prefetch(source + x * g.k + kStripRows, 0, 2);  // the next strip's
        }
      } else if (strip.rows == nullptr) {
        if (strip.lanes < kStripRows) zero_floats(target, band.cols * kStripRows);
        transpose_floats(dy + (n * g.k + strip.row) * area + pixel, area, strip.lanes, band.cols, target, kStripRows);
      } else {
        const int64_t lane_stride = channels_last ? 1 : area, pixel_stride = channels_last ? g.k : 1;
        const T* source = dy + (channels_last ? (n * area + pixel) * g.k : n * g.k * area + pixel);
        for (int64_t x = 0; x < band.cols; ++x) {
          T lanes[kStripRows] = {};
          for (int lane = 0; lane < strip.lanes; ++lane)
            lanes[lane] = source[strip.rows[lane] * lane_stride + x * pixel_stride];
          load16(lanes).store(target + x * kStripRows);
        }
      }
    }
}

}  // namespace
