// Vec16 on AVX2 with FMA: two registers.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

alignas(64) constexpr int32_t kLaneMask[32] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                               0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0};

// Of every byte of kept bits where its eight lanes find their floats among as many floats as bits are set, and zeros
// behind them: the rank of a set bit; the last place, which is then a zero, for one that is not set.
struct ExpandTable {
  uint8_t place[256][8];
  constexpr ExpandTable() : place{} {
    for (int kept = 0; kept < 256; ++kept)
      for (int i = 0, rank = 0; i < 8; ++i) place[kept][i] = static_cast<uint8_t>(kept >> i & 1 ? rank++ : 7);
  }
};
alignas(64) constexpr ExpandTable kExpand;

// Of eight lanes and a byte of kept ones: the lane that comes to each place.
struct CompressTable {
  uint8_t lane[256][8];
  constexpr CompressTable() : lane{} {
    for (int kept = 0; kept < 256; ++kept)
      for (int i = 0, rank = 0; i < 8; ++i)
        if (kept >> i & 1) lane[kept][rank++] = static_cast<uint8_t>(i);
  }
};
alignas(64) constexpr CompressTable kCompress;

// 64 bytes of 0xff, then as many of zero: from 64 - n on they choose the first n of 64 bytes.
struct BytesBefore {
  uint8_t byte[128];
  constexpr BytesBefore() : byte{} {
    for (int i = 0; i < 64; ++i) byte[i] = 0xff;
  }
};
alignas(64) constexpr BytesBefore kBytesBefore;

struct Vec16 {
  __m256 v[2];

  static constexpr const char* kIsa = "avx2";
  static constexpr int kTilePixels = 6;  // twelve of the sixteen registers accumulate
  static constexpr int kInputEntries = 2;
  static constexpr int kInputVectors = 3;
  static constexpr int kValueEntries = 4;
  static constexpr int kValuePixels = 2;

  static __m256i first(int n, int half) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kLaneMask + 16 - n + 8 * half));
  }

  static Vec16 zero() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
  static Vec16 broadcast(const float* p) {
    const __m256 x = _mm256_broadcast_ss(p);
    return {{x, x}};
  }
  static Vec16 load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
  // Loads n <= 16 floats, the other lanes are zero; touches no memory beyond them.
  static Vec16 load_first(const float* p, int n) {
    if (n == 16) return load(p);
    return {{_mm256_maskload_ps(p, first(n, 0)), _mm256_maskload_ps(p + 8, first(n, 1))}};
  }
  static Vec16 load_strided(const float* p, int64_t stride, int n) {
    alignas(64) float lane[16] = {};
    for (int i = 0; i < n; ++i) lane[i] = p[i * stride];
    return load(lane);
  }
  // Lane i: the next float from p on where bit i of `kept` is set, else 0; touches as many floats as bits are set.
  static Vec16 expand_load(const float* p, uint32_t kept) {
    const uint32_t low = kept & 0xffu, high = kept >> 8;
    return {{expand8(p, low), expand8(p + __builtin_popcount(low), high)}};
  }
  // The lanes whose bit of `kept` is set, side by side; the lanes behind them hold anything.
  static Vec16 compress(Vec16 a, uint32_t kept) {
    const uint32_t low = kept & 0xffu, high = kept >> 8;
    float packed[16] = {};
    _mm256_storeu_ps(packed, compress8(a.v[0], low));
    _mm256_storeu_ps(packed + __builtin_popcount(low), compress8(a.v[1], high));
    return load(packed);
  }
  // Of 64 bytes the sum of the first n < 64.
  static int64_t sum_first_bytes(const uint8_t* p, int n) {
    const auto half = [](const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); };
    const uint8_t* wanted = kBytesBefore.byte + 64 - n;
    const __m256i low = _mm256_and_si256(half(p), half(wanted));
    const __m256i high = _mm256_and_si256(half(p + 32), half(wanted + 32));
    const __m256i zero = _mm256_setzero_si256();
    const __m256i four = _mm256_add_epi64(_mm256_sad_epu8(low, zero), _mm256_sad_epu8(high, zero));
    const __m128i two = _mm_add_epi64(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
    return _mm_cvtsi128_si64(_mm_add_epi64(two, _mm_unpackhi_epi64(two, two)));
  }
  void store(float* p) const {
    _mm256_storeu_ps(p, v[0]);
    _mm256_storeu_ps(p + 8, v[1]);
  }
  // Past the caches, to a multiple of 64 bytes; `fence` must follow before others may read.
  void stream(float* p) const {
    _mm256_stream_ps(p, v[0]);
    _mm256_stream_ps(p + 8, v[1]);
  }
  static void fence() { _mm_sfence(); }
  void store_first(float* p, int n) const {
    if (n == 16) return store(p);
    _mm256_maskstore_ps(p, first(n, 0), v[0]);
    _mm256_maskstore_ps(p + 8, first(n, 1), v[1]);
  }

  static Vec16 fma(Vec16 a, Vec16 b, Vec16 c) {
    return {{_mm256_fmadd_ps(a.v[0], b.v[0], c.v[0]), _mm256_fmadd_ps(a.v[1], b.v[1], c.v[1])}};
  }
  static Vec16 add(Vec16 a, Vec16 b) { return {{_mm256_add_ps(a.v[0], b.v[0]), _mm256_add_ps(a.v[1], b.v[1])}}; }
  static Vec16 sub(Vec16 a, Vec16 b) { return {{_mm256_sub_ps(a.v[0], b.v[0]), _mm256_sub_ps(a.v[1], b.v[1])}}; }
  static Vec16 mul(Vec16 a, Vec16 b) { return {{_mm256_mul_ps(a.v[0], b.v[0]), _mm256_mul_ps(a.v[1], b.v[1])}}; }
  static Vec16 div(Vec16 a, Vec16 b) { return {{_mm256_div_ps(a.v[0], b.v[0]), _mm256_div_ps(a.v[1], b.v[1])}}; }
  // Of a number and NaN, the second operand.
  static Vec16 max(Vec16 a, Vec16 b) { return {{_mm256_max_ps(a.v[0], b.v[0]), _mm256_max_ps(a.v[1], b.v[1])}}; }
  // NaN where either is.
  static Vec16 max_nan(Vec16 a, Vec16 b) {
    for (int i = 0; i < 2; ++i)
      b.v[i] = _mm256_blendv_ps(_mm256_max_ps(a.v[i], b.v[i]), a.v[i], _mm256_cmp_ps(a.v[i], a.v[i], _CMP_UNORD_Q));
    return b;
  }
  static Vec16 min(Vec16 a, Vec16 b) { return {{_mm256_min_ps(a.v[0], b.v[0]), _mm256_min_ps(a.v[1], b.v[1])}}; }
  // b where a is positive or NaN, else 0.
  static Vec16 where_positive(Vec16 a, Vec16 b) {
    for (int i = 0; i < 2; ++i) b.v[i] = _mm256_and_ps(b.v[i], _mm256_cmp_ps(a.v[i], _mm256_setzero_ps(), _CMP_NLE_UQ));
    return b;
  }
  // 2^n of whole numbers -127 <= n <= 128, the first of which is rounded to 0 and the last is infinity.
  static Vec16 pow2(Vec16 n) {
    for (__m256& half : n.v) {
      const __m256i bits = _mm256_add_epi32(_mm256_cvtps_epi32(half), _mm256_set1_epi32(127));
      half = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23));
    }
    return n;
  }

  // In place: lane j of row i becomes lane i of row j. Four 8 x 8 transposes, the off-diagonal ones swapped.
  static void transpose(Vec16 (&r)[16]) {
    __m256 q[2][2][8];
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j) {
        for (int k = 0; k < 8; ++k) q[i][j][k] = r[8 * i + k].v[j];
        transpose8(q[i][j]);
      }
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j)
        for (int k = 0; k < 8; ++k) r[8 * j + k].v[i] = q[i][j][k];
  }

  // Lane i: the sum of the lanes of r[i].
  static Vec16 sum_rows(const Vec16 (&r)[16]) {
    const auto fold = [&](int i) { return _mm256_add_ps(r[i].v[0], r[i].v[1]); };
    const auto fold4 = [&](int i) {
      return _mm256_hadd_ps(_mm256_hadd_ps(fold(i), fold(i + 1)), _mm256_hadd_ps(fold(i + 2), fold(i + 3)));
    };
    Vec16 sum;
    for (int half = 0; half < 2; ++half) {
      const __m256 a = fold4(8 * half), b = fold4(8 * half + 4);
      sum.v[half] = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    }
    return sum;
  }

  // Writes lane j of r[0..7] as `rows` <= 8 floats to target + j * stride, for the first `cols` lanes.
  static void store_transposed8(const Vec16 (&r)[8], float* target, int64_t stride, int cols, int rows) {
    const __m256i mask = first(rows, 0);
    for (int half = 0; half < 2; ++half) {
      __m256 q[8];
      for (int k = 0; k < 8; ++k) q[k] = r[k].v[half];
      transpose8(q);
      for (int k = 0; k < 8; ++k)
        if (8 * half + k < cols) {
          float* at = target + (8 * half + k) * stride;
          rows == 8 ? _mm256_storeu_ps(at, q[k]) : _mm256_maskstore_ps(at, mask, q[k]);
        }
    }
  }

 private:
  static __m256 expand8(const float* p, uint32_t kept) {
    const __m256 packed = _mm256_maskload_ps(p, first(__builtin_popcount(kept), 0));
    const __m128i places = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpand.place[kept]));
    return _mm256_permutevar8x32_ps(packed, _mm256_cvtepu8_epi32(places));
  }
  static __m256 compress8(__m256 a, uint32_t kept) {
    const __m128i lanes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kCompress.lane[kept]));
    return _mm256_permutevar8x32_ps(a, _mm256_cvtepu8_epi32(lanes));
  }
  static void transpose8(__m256 (&r)[8]) {
    __m256 t[8], u[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int j = 0; j < 4; ++j) {
      r[j] = _mm256_permute2f128_ps(u[j], u[4 + j], 0x20);
      r[4 + j] = _mm256_permute2f128_ps(u[j], u[4 + j], 0x31);
    }
  }
};

}  // namespace
