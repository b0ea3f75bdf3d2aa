// Vec16 from and to 16 elements of float, bfloat16 or float16; half types are rounded to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

#include "elements.h"
#include "simd/vec_contract.h"

namespace {

using sparsekd::Bfloat16;

using sparsekd::Float16;

inline Vec16 load16(const float* p) { return Vec16::load(p); }
inline Vec16 load16_first(const float* p, int n) { return Vec16::load_first(p, n); }
inline void store16(float* p, Vec16 v) { v.store(p); }
inline void store16_first(float* p, Vec16 v, int n) { v.store_first(p, n); }
inline void stream16(float* p, Vec16 v) { v.stream(p); }  // p, here and below, a multiple of what is stored

#ifdef __AVX512F__
inline __m256i half_load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void half_store(void* p, __m256i bits) { _mm256_storeu_si256(static_cast<__m256i*>(p), bits); }

inline Vec16 load16(const Bfloat16* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half_load(p)), 16))};
}
inline Vec16 load16(const Float16* p) { return {_mm512_cvtph_ps(half_load(p))}; }
inline __m256i half_bits(const Bfloat16*, Vec16 a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), last);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(kept);
}
inline __m256i half_bits(const Float16*, Vec16 a) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }
template <class Half>
inline void store16(Half* p, Vec16 a) {
  half_store(p, half_bits(p, a));
}
template <class Half>
inline void stream16(Half* p, Vec16 a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), half_bits(p, a));
}
#else
// Without a branch, so that the loops over 16 elements become vector instructions.
inline uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline float to_float(Bfloat16 h) { return bits_float(static_cast<uint32_t>(h.bits) << 16); }
inline float to_float(Float16 h) {
  const uint32_t magnitude = static_cast<uint32_t>(h.bits & 0x7fff) << 13, sign = (h.bits & 0x8000u) << 16;
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // infinity and NaN
  return bits_float(float_bits(bits_float(magnitude) * 0x1p112f) | special | sign);
}
inline void from_float(Bfloat16* h, float x) {
  const uint32_t bits = float_bits(x), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  h->bits = static_cast<uint16_t>(x == x ? rounded : 0x7fc0u);
}
inline void from_float(Float16* h, float x) {
  const uint32_t bits = float_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const uint32_t normal = ((magnitude + 0xfffu + ((magnitude >> 13) & 1u)) >> 13) - (112u << 10);
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;  // the addition rounds
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? 0x7c00u : half;  // from 2^16
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  h->bits = static_cast<uint16_t>(half | sign);
}
template <class Half>
inline Vec16 load16(const Half* p) {
  float lane[16];
  for (int i = 0; i < 16; ++i) lane[i] = to_float(p[i]);
  return Vec16::load(lane);
}
template <class Half>
inline void store16(Half* p, Vec16 v) {
  float lane[16];
  v.store(lane);
  for (int i = 0; i < 16; ++i) from_float(p + i, lane[i]);
}
template <class Half>
inline void stream16(Half* p, Vec16 v) {
  store16(p, v);
}
#endif

// n <= 16 elements, the other lanes are zero; touches no memory beyond them.
template <class Half>
inline Vec16 load16_first(const Half* p, int n) {
  Half lane[16] = {};
#ifdef __AVX512BW__
  half_store(lane, _mm256_maskz_loadu_epi16(Vec16::first(n), p));
#else
  memcpy(lane, p, sizeof(Half) * static_cast<unsigned>(n));
#endif
  return load16(lane);
}
template <class Half>
inline void store16_first(Half* p, Vec16 v, int n) {
#ifdef __AVX512BW__
  _mm256_mask_storeu_epi16(p, Vec16::first(n), half_bits(p, v));
#else
  Half lane[16];
  store16(lane, v);
  memcpy(p, lane, sizeof(Half) * static_cast<unsigned>(n));
#endif
}

// Up to 16 bytes of floats rounded to 0..255, ties to even; NaN becomes 0.
inline void store_bytes(uint8_t* p, Vec16 v, int n) {
  const float low = 0.0f, high = 255.0f, round = 12582912.0f;  // 1.5 * 2^23: leaves the integer in the last bits
  v = Vec16::min(Vec16::broadcast(&high), Vec16::max(Vec16::broadcast(&low), v));
  v = Vec16::add(v, Vec16::broadcast(&round));
  int32_t lane[16];
  memcpy(lane, &v, sizeof lane);
  uint8_t byte[16];
  for (int i = 0; i < 16; ++i) byte[i] = static_cast<uint8_t>(lane[i]);
  memcpy(p, byte, static_cast<unsigned>(n));
}

// n <= 16 elements that lie `stride` apart; the other lanes are zero.
inline Vec16 load16_strided(const float* p, int64_t stride, int n) { return Vec16::load_strided(p, stride, n); }
template <class Half>
inline Vec16 load16_strided(const Half* p, int64_t stride, int n) {
  Half lane[16] = {};
  for (int i = 0; i < n; ++i) lane[i] = p[i * stride];
  return load16(lane);
}

// An element as kDepth of them share a word: its bits, or where they would not fill it its distance from `zero`.
template <int kDepth>
inline uint32_t word_lane(Bfloat16 x, int) {
  return x.bits;
}
template <int kDepth>
inline uint32_t word_lane(uint8_t x, int zero) {
  return kDepth == 4 ? x : static_cast<uint16_t>(x - zero);
}

// Lane i: element i of `rows` <= kDepth rows side by side as one 32-bit word, missing rows as zeros. Rows lie
// `row_stride` apart, elements `stride`.
template <int kDepth, class T>
inline Vec16 load16_words(const T* p, int64_t row_stride, int rows, int64_t stride, int n, int zero) {
#ifdef __AVX512BW__
  if constexpr (sizeof(T) == 2)
    if (stride == 1) {
      const auto row = [&](int i) {
        return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(Vec16::first(n), p + i * row_stride));
      };
      const __m512i high = rows > 1 ? _mm512_slli_epi32(row(1), 16) : _mm512_setzero_si512();
      return {_mm512_castsi512_ps(_mm512_or_si512(row(0), high))};
    }
#endif
  uint32_t word[16] = {};
  for (int row = 0; row < rows; ++row, p += row_stride)
    for (int i = 0; i < n; ++i) word[i] |= word_lane<kDepth>(p[i * stride], zero) << (32 / kDepth * row);
  Vec16 v;
  memcpy(&v, word, sizeof v);
  return v;
}

// The first n <= 32 halves of 16 words.
inline void store16_words(Bfloat16* p, Vec16 v, int n) {
#ifdef __AVX512BW__
  const __mmask32 first = n == 32 ? 0xffffffffu : (1u << n) - 1u;
  _mm512_mask_storeu_epi16(p, first, _mm512_castps_si512(v.v));
#else
  memcpy(p, &v, sizeof(Bfloat16) * static_cast<unsigned>(n));
#endif
}

// The first n of 16 elements, without a mask where that is all of them.
template <class T>
inline Vec16 load_some(const T* p, int n) {
  return n == 16 ? load16(p) : load16_first(p, n);
}

template <class T>
inline void store_some(T* p, Vec16 v, int n) {
  n == 16 ? store16(p, v) : store16_first(p, v, n);
}

}  // namespace
