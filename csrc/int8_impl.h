// Eight-bit operands: exact sums in 32-bit integers, and the way from and to floats.
#pragma once

#include <cstdint>
#include <cstring>

#include "conv2d_forward_impl.h"

namespace {

// Two 16-bit products per lane, added to a 32-bit sum.
inline Vec16 madd_shorts(Vec16 a, Vec16 b, Vec16 sum) {
#if defined(__AVX512BW__)
  const __m512i products = _mm512_madd_epi16(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v));
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(sum.v), products))};
#elif defined(__AVX2__)
  for (int i = 0; i < 2; ++i) {
    const __m256i products = _mm256_madd_epi16(_mm256_castps_si256(a.v[i]), _mm256_castps_si256(b.v[i]));
    sum.v[i] = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(sum.v[i]), products));
  }
  return sum;
#else
  int16_t p[32], q[32];
  memcpy(p, &a, sizeof p);
  memcpy(q, &b, sizeof q);
  int32_t total[16];
  memcpy(total, &sum, sizeof total);
  for (int i = 0; i < 16; ++i) total[i] += p[2 * i] * q[2 * i] + p[2 * i + 1] * q[2 * i + 1];
  memcpy(&sum, total, sizeof sum);
  return sum;
#endif
}

// x - x_zero and the weights as 16 bits: exact on every CPU (vpmaddubsw of bytes would saturate).
struct ShortSums {
  using Stored = void;
  static constexpr bool kInteger = true;
  static Vec16 madd(Vec16 weight, Vec16 x, Vec16 sum) { return madd_shorts(weight, x, sum); }
  static Vec16 madd(Vec16 weight, const float* x, Vec16 sum) { return madd(weight, Vec16::broadcast(x), sum); }
};

template <class Y_>
struct ShortWords {
  using Sums = ShortSums;
  using X = uint8_t;
  using Y = Y_;
  static constexpr int kDepth = 2;
};

void quantize(const float* x, int64_t n, float inverse, int zero, uint8_t* target) {
  const float shift = static_cast<float>(zero);
  const Vec16 scale = Vec16::broadcast(&inverse), zeros = Vec16::broadcast(&shift);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store_bytes(target + i, Vec16::fma(Vec16::load(x + i), scale, zeros), 16);
  const int rest = static_cast<int>(n - i);
  if (rest > 0) store_bytes(target + i, Vec16::fma(Vec16::load_first(x + i, rest), scale, zeros), rest);
}

}  // namespace
