// Copies between types, strides and orders, 16 elements at a time.
#pragma once

#include "half_impl.h"
#include "ranges_impl.h"

namespace {

template <class E>
inline void fill_floats(E* p, int64_t n, Vec16 value) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store16(p + i, value);
  if (i < n) store16_first(p + i, value, static_cast<int>(n - i));
}

inline void zero_floats(float* p, int64_t n) { fill_floats(p, n, Vec16::zero()); }
inline void zero_floats(Bfloat16* p, int64_t n) { memset(p, 0, sizeof *p * static_cast<size_t>(n)); }

// Copies n elements that lie `stride` apart, to floats or from floats.
template <class To, class From>
inline void copy_floats(To* p, const From* source, int64_t stride, int64_t n) {
  if (stride == 1) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) store16(p + i, load16(source + i));
    if (i < n) store16_first(p + i, load16_first(source + i, static_cast<int>(n - i)), static_cast<int>(n - i));
    return;
  }
  for (int64_t i = 0; i < n; i += 16) {
    const int have = static_cast<int>(min64(16, n - i));
    store16_first(p + i, load16_strided(source + i * stride, stride, have), have);
  }
}

// The reverse: n neighbouring floats to elements that lie `stride` apart.
template <class T>
inline void scatter_floats(T* p, int64_t stride, const float* source, int64_t n) {
  if (stride == 1) return copy_floats(p, source, 1, n);
  for (int64_t i = 0; i < n; i += 16) {
    T lane[16];
    const int have = static_cast<int>(min64(16, n - i));
    store16_first(lane, Vec16::load_first(source + i, have), have);
    for (int j = 0; j < have; ++j) p[(i + j) * stride] = lane[j];
  }
}

// One row of words from the planes of `channels` <= kDepth channels, `channel_stride` apart; n pixels, `stride` apart.
template <int kDepth, class E, class T>
inline void copy_words(E* p, const T* source, int64_t channel_stride, int64_t channels, int64_t stride, int64_t n,
                       int zero) {
  if constexpr (kDepth == 1) {
    copy_floats(p, source, stride, n);
  } else {
    for (int64_t i = 0; i < n; i += 16) {
      const int have = static_cast<int>(min64(16, n - i));
      const T* at = source + i * stride;
      load16_words<kDepth>(at, channel_stride, static_cast<int>(channels), stride, have, zero).store_first(p + i, have);
    }
  }
}

// Whether an output of `rows` x `floats` should not displace what the caches hold: one that they cannot keep until it
// is read, in whole cache lines. 16 MiB is half the last-level cache of eight Zen cores.
inline bool stream_output(const void* p, int64_t rows, int64_t floats) {
  constexpr int64_t kManyFloats = 4 << 20;
  return rows * floats >= kManyFloats && floats % 16 == 0 && reinterpret_cast<uintptr_t>(p) % 64 == 0;
}

// Reads `rows` <= 16 vectors of `cols` <= 16 floats and writes `cols` vectors of `rows` floats.
template <class From, class To>
inline void transpose_tile(const From* source, int64_t source_stride, int rows, int cols, To* target,
                           int64_t target_stride, bool stream = false) {
  if constexpr (sizeof(To) == sizeof(float)) {
    if (rows <= 8) {
      Vec16 v[8];
      for (int i = 0; i < 8; ++i) v[i] = i < rows ? load16_first(source + i * source_stride, cols) : Vec16::zero();
      return Vec16::store_transposed8(v, target, target_stride, cols, rows);
    }
  }
  Vec16 v[16];
  if (rows == 16 && cols == 16) {
    for (int i = 0; i < 16; ++i) v[i] = load16(source + i * source_stride);
    Vec16::transpose(v);
    for (int i = 0; i < 16; ++i)
      stream ? stream16(target + i * target_stride, v[i]) : store16(target + i * target_stride, v[i]);
    return;
  }
  for (int i = 0; i < 16; ++i) v[i] = i < rows ? load16_first(source + i * source_stride, cols) : Vec16::zero();
  Vec16::transpose(v);
  for (int i = 0; i < 16; ++i)
    if (i < cols) store16_first(target + i * target_stride, v[i], rows);
}

// Halves as they are: `rows` <= 32, two of them to a word on the way.
inline void transpose_tile(const Bfloat16* source, int64_t source_stride, int rows, int cols, Bfloat16* target,
                           int64_t target_stride) {
  Vec16 v[16];
  for (int i = 0; i < 16; ++i, source += 2 * source_stride)
    v[i] = 2 * i < rows ? load16_words<2>(source, source_stride, rows - 2 * i > 1 ? 2 : 1, 1, cols, 0) : Vec16::zero();
  Vec16::transpose(v);
  for (int i = 0; i < cols; ++i) store16_words(target + i * target_stride, v[i], rows);
}

// The same for any numbers of rows and columns.
template <class From, class To>
inline void transpose_floats(const From* source, int64_t source_stride, int64_t rows, int64_t cols, To* target,
                             int64_t target_stride, bool stream = false) {
  for (int64_t j = 0; j < cols; j += 16)
    for (int64_t i = 0; i < rows; i += 16)
      transpose_tile(source + i * source_stride + j, source_stride, static_cast<int>(min64(16, rows - i)),
                     static_cast<int>(min64(16, cols - j)), target + j * target_stride + i, target_stride, stream);
}

}  // namespace
