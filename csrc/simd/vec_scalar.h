// Vec16 in portable C++ (GCC and Clang vector extensions): four 128-bit vectors with the baseline flags of the target,
// so SSE2 on x86-64. Runs on any CPU and is the oracle of the other instruction sets.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

typedef float f32x4 __attribute__((vector_size(16)));

struct Vec16 {
  f32x4 v[4];

  static constexpr const char* kIsa = "scalar";
  static constexpr int kTilePixels = 2;
  static constexpr int kInputEntries = 2;
  static constexpr int kInputVectors = 1;
  static constexpr int kValueEntries = 2;
  static constexpr int kValuePixels = 1;

  static Vec16 zero() { return {}; }
  static Vec16 broadcast(const float* p) {
    const f32x4 x = {*p, *p, *p, *p};
    return {{x, x, x, x}};
  }
  static Vec16 load(const float* p) {
    Vec16 a;
    memcpy(a.v, p, sizeof a.v);
    return a;
  }
  // Loads n <= 16 floats, the other lanes are zero; touches no memory beyond them.
  static Vec16 load_first(const float* p, int n) {
    Vec16 a = zero();
    memcpy(a.v, p, sizeof(float) * static_cast<unsigned>(n));
    return a;
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
  // Of 64 bytes the sum of the first n < 64. Pairs of bytes are added as words of 16 bits, and those by a multiplication
  // whose highest word is their sum.
  static int64_t sum_first_bytes(const uint8_t* p, int n) {
    constexpr uint64_t kEven = 0x00ff00ff00ff00ffu, kPairs = 0x0001000100010001u;
    uint8_t bytes[64] = {};
    memcpy(bytes, p, static_cast<unsigned>(n));
    uint64_t pairs = 0;
    for (int i = 0; i < 64; i += 8) {
      uint64_t eight;
      memcpy(&eight, bytes + i, sizeof eight);
      pairs += (eight & kEven) + (eight >> 8 & kEven);
    }
    return static_cast<int64_t>(pairs * kPairs >> 48);
  }
  // The lanes whose bit of `kept` is set, side by side; the lanes behind them hold anything.
  static Vec16 compress(Vec16 a, uint32_t kept) {
    float lane[16], packed[16] = {};
    a.store(lane);
    for (int i = 0; kept != 0; kept &= kept - 1) packed[i++] = lane[__builtin_ctz(kept)];
    return load(packed);
  }
  void store(float* p) const { memcpy(p, v, sizeof v); }
  void stream(float* p) const { store(p); }
  static void fence() {}
  void store_first(float* p, int n) const { memcpy(p, v, sizeof(float) * static_cast<unsigned>(n)); }

  static Vec16 fma(Vec16 a, Vec16 b, Vec16 c) {
    for (int i = 0; i < 4; ++i) c.v[i] += a.v[i] * b.v[i];
    return c;
  }
  static Vec16 add(Vec16 a, Vec16 b) {
    for (int i = 0; i < 4; ++i) a.v[i] += b.v[i];
    return a;
  }
  static Vec16 sub(Vec16 a, Vec16 b) {
    for (int i = 0; i < 4; ++i) a.v[i] -= b.v[i];
    return a;
  }
  static Vec16 mul(Vec16 a, Vec16 b) {
    for (int i = 0; i < 4; ++i) a.v[i] *= b.v[i];
    return a;
  }
  static Vec16 div(Vec16 a, Vec16 b) {
    for (int i = 0; i < 4; ++i) a.v[i] /= b.v[i];
    return a;
  }
  // Of a number and NaN, the second operand.
  static Vec16 max(Vec16 a, Vec16 b) {
    for (int i = 0; i < 4; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return a;
  }
  // NaN where either is.
  static Vec16 max_nan(Vec16 a, Vec16 b) {
    const Vec16 larger = max(a, b);
    for (int i = 0; i < 4; ++i) a.v[i] = a.v[i] == a.v[i] ? larger.v[i] : a.v[i];
    return a;
  }
  static Vec16 min(Vec16 a, Vec16 b) {
    for (int i = 0; i < 4; ++i) a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
    return a;
  }
  // b where a is positive or NaN, else 0.
  static Vec16 where_positive(Vec16 a, Vec16 b) {
    const f32x4 zeros = {};
    for (int i = 0; i < 4; ++i) b.v[i] = a.v[i] <= zeros ? zeros : b.v[i];
    return b;
  }
  // 2^n of whole numbers -127 <= n <= 128, the first of which is rounded to 0 and the last is infinity.
  static Vec16 pow2(Vec16 n) {
    int32_t bits[16];
    float lane[16];
    n.store(lane);
    for (int i = 0; i < 16; ++i) bits[i] = (lane[i] == lane[i] ? static_cast<int32_t>(lane[i]) + 127 : 0) << 23;
    Vec16 a;
    memcpy(a.v, bits, sizeof a.v);
    return a;
  }

  // In place: lane j of row i becomes lane i of row j.
  static void transpose(Vec16 (&r)[16]) {
    float in[16][16], out[16][16];
    for (int i = 0; i < 16; ++i) r[i].store(in[i]);
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 16; ++j) out[j][i] = in[i][j];
    for (int i = 0; i < 16; ++i) r[i] = load(out[i]);
  }
  // Lane i: the sum of the lanes of r[i].
  static Vec16 sum_rows(Vec16 (&r)[16]) {
    transpose(r);
    Vec16 sum = r[0];
    for (int i = 1; i < 16; ++i) sum = add(sum, r[i]);
    return sum;
  }
  // Writes lane j of r[0..7] as `rows` <= 8 floats to target + j * stride, for the first `cols` lanes.
  static void store_transposed8(const Vec16 (&r)[8], float* target, int64_t stride, int cols, int rows) {
    float in[8][16];
    for (int i = 0; i < 8; ++i) r[i].store(in[i]);
    for (int j = 0; j < cols; ++j)
      for (int i = 0; i < rows; ++i) target[j * stride + i] = in[i][j];
  }
};

}  // namespace
