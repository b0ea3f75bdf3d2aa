// Vec16 on AVX-512: one register.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct Vec16 {
  __m512 v;

  static constexpr const char* kIsa = "avx512";
  static constexpr int kTilePixels = 28;   // forward: accumulators; one weight register and two spare remain
  static constexpr int kInputEntries = 4;  // gradient of the input: columns x vectors of pixels
  static constexpr int kInputVectors = 6;
  static constexpr int kValueEntries = 16;  // gradient of the values: columns x pixels
  static constexpr int kValuePixels = 8;

  static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

  static Vec16 zero() { return {_mm512_setzero_ps()}; }
  static Vec16 broadcast(const float* p) { return {_mm512_set1_ps(*p)}; }
  static Vec16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  // Loads n <= 16 floats, the other lanes are zero; touches no memory beyond them.
  static Vec16 load_first(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  static Vec16 load_strided(const float* p, int64_t stride, int n) {
    if (stride == 2) {
      // 2n - 1 floats: the element after the last one may lie outside the tensor.
      const int span = 2 * n - 1;
      const __m512 low = _mm512_maskz_loadu_ps(first(span < 16 ? (span > 0 ? span : 0) : 16), p);
      const __m512 high = _mm512_maskz_loadu_ps(first(span > 16 ? span - 16 : 0), p + 16);
      const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
      return {_mm512_permutex2var_ps(low, even, high)};
    }
    alignas(64) float lane[16] = {};
    for (int i = 0; i < n; ++i) lane[i] = p[i * stride];
    return {_mm512_load_ps(lane)};
  }
  // Lane i: the next float from p on where bit i of `kept` is set, else 0; touches as many floats as bits are set.
  // Merged into a register of zeros that the compiler must not see through: the zeroing form of vexpandps waits for the
  // old contents of its target on Zen 4 and 5 (llvm/llvm-project#206849).
  static Vec16 expand_load(const float* p, uint32_t kept) {
    __m512 zeros = _mm512_setzero_ps();
    asm("" : "+v"(zeros));
    return {_mm512_mask_expandloadu_ps(zeros, static_cast<__mmask16>(kept), p)};
  }
  // The lanes whose bit of `kept` is set, side by side; the lanes behind them hold anything. In a register, because
  // vcompressps to memory is microcoded (llvm/llvm-project#133568).
  static Vec16 compress(Vec16 a, uint32_t kept) {
    return {_mm512_mask_compress_ps(a.v, static_cast<__mmask16>(kept), a.v)};
  }
  // Of 64 bytes the sum of the first n < 64.
  static int64_t sum_first_bytes(const uint8_t* p, int n) {
    const __m512i bytes = _mm512_maskz_loadu_epi8((uint64_t{1} << n) - 1, p);
    const __m512i eight = _mm512_sad_epu8(bytes, _mm512_setzero_si512());
    const __m256i four = _mm256_add_epi64(_mm512_castsi512_si256(eight), _mm512_extracti64x4_epi64(eight, 1));
    const __m128i two = _mm_add_epi64(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
    return _mm_cvtsi128_si64(_mm_add_epi64(two, _mm_unpackhi_epi64(two, two)));
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  // Past the caches, to a multiple of 64 bytes; `fence` must follow before others may read.
  void stream(float* p) const { _mm512_stream_ps(p, v); }
  static void fence() { _mm_sfence(); }
  void store_first(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), v); }

  static Vec16 fma(Vec16 a, Vec16 b, Vec16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec16 add(Vec16 a, Vec16 b) { return {_mm512_add_ps(a.v, b.v)}; }
  static Vec16 sub(Vec16 a, Vec16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
  static Vec16 mul(Vec16 a, Vec16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
  static Vec16 div(Vec16 a, Vec16 b) { return {_mm512_div_ps(a.v, b.v)}; }
  // Of a number and NaN, the second operand.
  static Vec16 max(Vec16 a, Vec16 b) { return {_mm512_max_ps(a.v, b.v)}; }
  // NaN where either is.
  static Vec16 max_nan(Vec16 a, Vec16 b) {
    return {_mm512_mask_mov_ps(_mm512_max_ps(a.v, b.v), _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), a.v)};
  }
  static Vec16 min(Vec16 a, Vec16 b) { return {_mm512_min_ps(a.v, b.v)}; }
  // b where a is positive or NaN, else 0.
  static Vec16 where_positive(Vec16 a, Vec16 b) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_NLE_UQ), b.v)};
  }
  // 2^n of whole numbers -127 <= n <= 128, the first of which is rounded to 0 and the last is infinity.
  static Vec16 pow2(Vec16 n) {
    const __m512i bits = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 23))};
  }

  // In place: lane j of row i becomes lane i of row j.
  static void transpose(Vec16 (&r)[16]) {
    __m512 t[16];
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
      t[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
    }
    __m512 u[16];
    for (int i = 0; i < 16; i += 4) {
      u[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
      u[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
      u[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
      u[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
    }
    // u[4 * g + j]: column j + 4 * (128-bit lane) of rows 4g..4g+3.
    for (int j = 0; j < 4; ++j) {
      const __m512 a = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88);
      const __m512 b = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xdd);
      const __m512 c = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88);
      const __m512 d = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xdd);
      r[j].v = _mm512_shuffle_f32x4(a, c, 0x88);
      r[8 + j].v = _mm512_shuffle_f32x4(a, c, 0xdd);
      r[4 + j].v = _mm512_shuffle_f32x4(b, d, 0x88);
      r[12 + j].v = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
  }
  // Lane i: the sum of the lanes of r[i]. Every step adds two halves and halves the number of vectors.
  static Vec16 sum_rows(const Vec16 (&r)[16]) {
    __m512 pairs[8], fours[4], eights[2];
    for (int i = 0; i < 8; ++i)
      pairs[i] =
          _mm512_add_ps(_mm512_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v), _mm512_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v));
    for (int i = 0; i < 4; ++i) {
      const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
      fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    const auto halves = [](__m512 a, __m512 b) {
      return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    for (int i = 0; i < 2; ++i) eights[i] = halves(fours[2 * i], fours[2 * i + 1]);
    return {halves(eights[0], eights[1])};
  }

  // Writes lane j of r[0..7] as `rows` <= 8 floats to target + j * stride, for the first `cols` lanes.
  static void store_transposed8(const Vec16 (&r)[8], float* target, int64_t stride, int cols, int rows) {
    __m512 t[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
      t[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
    }
    __m512d u[8];
    for (int i = 0; i < 8; i += 4) {
      u[i] = _mm512_unpacklo_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2]));
      u[i + 1] = _mm512_unpackhi_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2]));
      u[i + 2] = _mm512_unpacklo_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3]));
      u[i + 3] = _mm512_unpackhi_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3]));
    }
    // u[j] and u[4 + j]: column j + 4 * (128-bit lane) of rows 0..3 and 4..7.
    const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                  high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    const __mmask8 mask = static_cast<__mmask8>((1u << rows) - 1u);
    for (int j = 0; j < 4; ++j) {
      const __m512d a = _mm512_permutex2var_pd(u[j], low, u[4 + j]), b = _mm512_permutex2var_pd(u[j], high, u[4 + j]);
      const __m256d column[4] = {_mm512_castpd512_pd256(a), _mm512_extractf64x4_pd(a, 1), _mm512_castpd512_pd256(b),
                                 _mm512_extractf64x4_pd(b, 1)};
      for (int i = 0; i < 4; ++i)
        if (j + 4 * i < cols) _mm256_mask_storeu_ps(target + (j + 4 * i) * stride, mask, _mm256_castpd_ps(column[i]));
    }
  }
};

}  // namespace
