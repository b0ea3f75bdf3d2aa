// Vec16 on NEON (aarch64): four registers.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace {

struct Vec16 {
  float32x4_t v[4];

  static constexpr const char* kIsa = "neon";
  static constexpr int kTilePixels = 6;  // 24 of the 32 registers accumulate, four hold the weights
  static constexpr int kInputEntries = 2;
  static constexpr int kInputVectors = 3;
  static constexpr int kValueEntries = 4;
  static constexpr int kValuePixels = 2;

  static Vec16 zero() {
    const float32x4_t x = vdupq_n_f32(0);
    return {{x, x, x, x}};
  }
  static Vec16 broadcast(const float* p) {
    const float32x4_t x = vld1q_dup_f32(p);
    return {{x, x, x, x}};
  }
  static Vec16 load(const float* p) { return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}}; }
  // Loads n <= 16 floats, the other lanes are zero; touches no memory beyond them.
  static Vec16 load_first(const float* p, int n) {
    if (n == 16) return load(p);
    float lane[16] = {};
    memcpy(lane, p, sizeof(float) * static_cast<unsigned>(n));
    return load(lane);
  }
  static Vec16 load_strided(const float* p, int64_t stride, int n) {
    float lane[16] = {};
    for (int i = 0; i < n; ++i) lane[i] = p[i * stride];
    return load(lane);
  }
  // Lane i: the next float from p on where bit i of `kept` is set, else 0; touches as many floats as bits are set.
  static Vec16 expand_load(const float* p, uint32_t kept) {
    float lane[16] = {};
    for (; kept != 0; kept &= kept - 1) lane[__builtin_ctz(kept)] = *p++;
    return load(lane);
  }
  // The lanes whose bit of `kept` is set, side by side; the lanes behind them hold anything.
  static Vec16 compress(Vec16 a, uint32_t kept) {
    float lane[16], packed[16] = {};
    a.store(lane);
    for (int i = 0; kept != 0; kept &= kept - 1) packed[i++] = lane[__builtin_ctz(kept)];
    return load(packed);
  }
  // Of 64 bytes the sum of the first n < 64.
  static int64_t sum_first_bytes(const uint8_t* p, int n) {
    alignas(16) constexpr uint8_t kPlace[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    uint16x8_t sums = vdupq_n_u16(0);
    for (int i = 0; i < 4; ++i) {
      const int have = n - 16 * i < 0 ? 0 : n - 16 * i;
      sums = vpadalq_u8(sums, vandq_u8(vld1q_u8(p + 16 * i), vcltq_u8(vld1q_u8(kPlace), vdupq_n_u8(have))));
    }
    return vaddlvq_u16(sums);
  }
  void store(float* p) const {
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, v[i]);
  }
  void stream(float* p) const { store(p); }
  static void fence() {}
  void store_first(float* p, int n) const {
    if (n == 16) return store(p);
    float lane[16];
    store(lane);
    memcpy(p, lane, sizeof(float) * static_cast<unsigned>(n));
  }

  static Vec16 fma(Vec16 a, Vec16 b, Vec16 c) {
    for (int i = 0; i < 4; ++i) c.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]);
    return c;
  }
  static Vec16 add(Vec16 a, Vec16 b) {
    for (int i = 0; i < 4; ++i) a.v[i] = vaddq_f32(a.v[i], b.v[i]);
    return a;
  }
  static Vec16 sub(Vec16 a, Vec16 b) {
    for (int i = 0; i < 4; ++i) a.v[i] = vsubq_f32(a.v[i], b.v[i]);
    return a;
  }
  static Vec16 mul(Vec16 a, Vec16 b) {
    for (int i = 0; i < 4; ++i) a.v[i] = vmulq_f32(a.v[i], b.v[i]);
    return a;
  }
  static Vec16 div(Vec16 a, Vec16 b) {
    for (int i = 0; i < 4; ++i) a.v[i] = vdivq_f32(a.v[i], b.v[i]);
    return a;
  }
  // NaN when either is.
  static Vec16 max(Vec16 a, Vec16 b) {
    for (int i = 0; i < 4; ++i) a.v[i] = vmaxq_f32(a.v[i], b.v[i]);
    return a;
  }
  static Vec16 max_nan(Vec16 a, Vec16 b) { return max(a, b); }
  static Vec16 min(Vec16 a, Vec16 b) {
    for (int i = 0; i < 4; ++i) a.v[i] = vminq_f32(a.v[i], b.v[i]);
    return a;
  }
  // b where a is positive or NaN, else 0.
  static Vec16 where_positive(Vec16 a, Vec16 b) {
    for (int i = 0; i < 4; ++i)
      b.v[i] = vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(b.v[i]), vclezq_f32(a.v[i])));
    return b;
  }
  // 2^n of whole numbers -127 <= n <= 128, the first of which is rounded to 0 and the last is infinity.
  static Vec16 pow2(Vec16 n) {
    for (float32x4_t& quarter : n.v) {
      const int32x4_t bits = vaddq_s32(vcvtq_s32_f32(quarter), vdupq_n_s32(127));
      quarter = vreinterpretq_f32_s32(vshlq_n_s32(bits, 23));
    }
    return n;
  }

  // In place: lane j of row i becomes lane i of row j.
  static void transpose(Vec16 (&r)[16]) {
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j <= i; ++j) {
        float32x4_t a[4], b[4];
        for (int k = 0; k < 4; ++k) {
          a[k] = r[4 * i + k].v[j];
          b[k] = r[4 * j + k].v[i];
        }
        transpose4(a);
        transpose4(b);
        for (int k = 0; k < 4; ++k) {
          r[4 * j + k].v[i] = a[k];
          r[4 * i + k].v[j] = b[k];
        }
      }
  }

  // Lane i: the sum of the lanes of r[i].
  static Vec16 sum_rows(const Vec16 (&r)[16]) {
    const auto fold = [&](int i) {
      return vaddq_f32(vaddq_f32(r[i].v[0], r[i].v[1]), vaddq_f32(r[i].v[2], r[i].v[3]));
    };
    Vec16 sum;
    for (int i = 0; i < 4; ++i)
      sum.v[i] = vpaddq_f32(vpaddq_f32(fold(4 * i), fold(4 * i + 1)), vpaddq_f32(fold(4 * i + 2), fold(4 * i + 3)));
    return sum;
  }

  // Writes lane j of r[0..7] as `rows` <= 8 floats to target + j * stride, for the first `cols` lanes.
  static void store_transposed8(const Vec16 (&r)[8], float* target, int64_t stride, int cols, int rows) {
    for (int quarter = 0; 4 * quarter < cols; ++quarter) {
      float32x4_t low[4], high[4];
      for (int k = 0; k < 4; ++k) {
        low[k] = r[k].v[quarter];
        high[k] = r[4 + k].v[quarter];
      }
      transpose4(low);
      transpose4(high);
      for (int k = 0; k < 4 && 4 * quarter + k < cols; ++k) {
        float lane[8];
        vst1q_f32(lane, low[k]);
        vst1q_f32(lane + 4, high[k]);
        memcpy(target + (4 * quarter + k) * stride, lane, sizeof(float) * static_cast<unsigned>(rows));
      }
    }
  }

 private:
  static void transpose4(float32x4_t (&r)[4]) {
    const float32x4x2_t a = vzipq_f32(r[0], r[2]), b = vzipq_f32(r[1], r[3]);
    const float32x4x2_t low = vzipq_f32(a.val[0], b.val[0]), high = vzipq_f32(a.val[1], b.val[1]);
    r[0] = low.val[0];
    r[1] = low.val[1];
    r[2] = high.val[0];
    r[3] = high.val[1];
  }
};

}  // namespace
