// The forward pass's register tiles: a strip of 16 output rows x some pixels, accumulated over the strip's kept columns.
#pragma once

#include "activation_impl.h"
#include "bands_impl.h"
#include "words_impl.h"

namespace {

constexpr int kTileRowsMax = 8;  // base pointers that still fit in general registers

// One register tile: a strip of 16 output rows x (A image rows x B pixels).
template <IsSums Sums>
struct ForwardTile {
  const float* input[kTileRowsMax];                     // packed input of the first pixel of every image row
  typename Sums::Stored* output[kTileRowsMax];          // its output, when written directly
  const typename Sums::Stored* residual[kTileRowsMax];  // or null
  const int32_t* offsets;                               // [count]
  const float* weights;                                 // [count][16], weight_stride apart
  int64_t weight_stride;
  int64_t count;
  const float* start;  // [16] words that sums start from
  const float* scale;  // [16] and bias [16] make floats of integers
  const float* bias;
  int64_t output_stride;  // floats from one pixel to the next
  float* buffer;          // [A * B][16], written when not null, instead of the output
  bool stream;            // output is written past the caches
  bool bounded;           // bounds are not infinite
  Bounds bounds;
};

// Integers in the lanes of a Vec16.
inline Vec16 add_integers(Vec16 a, Vec16 b) {
  int32_t x[16], y[16];
  memcpy(x, &a, sizeof x);
  memcpy(y, &b, sizeof y);
  for (int i = 0; i < 16; ++i) x[i] += y[i];
  memcpy(&a, x, sizeof a);
  return a;
}

template <IsSums Sums>
inline Vec16 add_sums(Vec16 a, Vec16 b) {
  return Sums::kInteger ? add_integers(a, b) : Vec16::add(a, b);
}

// A finished sum as a float.
template <IsSums Sums>
inline Vec16 sum_value(const ForwardTile<Sums>& t, Vec16 sum) {
  if constexpr (!Sums::kInteger) return sum;
  int32_t integer[16];
  memcpy(integer, &sum, sizeof integer);
  float lane[16];
  for (int i = 0; i < 16; ++i) lane[i] = static_cast<float>(integer[i]);
  return Vec16::fma(Vec16::load(lane), Vec16::load(t.scale), Vec16::load(t.bias));
}

// Hands finished accumulators over: to the buffer, or with residual and activation to the output. What is the same for
// all pixels is decided once and read before the stores, which may alias it. Inlined, or GCC 12 keeps all sums in memory.
template <IsSums Sums, int A, int B>
[[gnu::always_inline]] inline void finish_tile(const ForwardTile<Sums>& t, Vec16 (&acc)[A * B]) {
  if (Sums::kInteger || t.buffer != nullptr) {
#pragma GCC unroll 32
    for (int i = 0; i < A * B; ++i) sum_value(t, acc[i]).store(t.buffer + i * kStripRows);
    return;
  }
  if constexpr (!Sums::kInteger) {
    const int64_t stride = t.output_stride;
    typename Sums::Stored* output[A];
#pragma GCC unroll 8
    for (int a = 0; a < A; ++a) output[a] = t.output[a];
    if (t.residual[0] != nullptr) {
#pragma GCC unroll 32
      for (int i = 0; i < A * B; ++i) acc[i] = Vec16::add(acc[i], load16(t.residual[i / B] + i % B * stride));
    }
    if (t.bounded) {
      const Bounds bounds = t.bounds;
#pragma GCC unroll 32
      for (int i = 0; i < A * B; ++i) acc[i] = bounds.clamp(acc[i]);
    }
    if (t.stream) {
#pragma GCC unroll 32
      for (int i = 0; i < A * B; ++i) stream16(output[i / B] + i % B * stride, acc[i]);
    } else {
#pragma GCC unroll 32
      for (int i = 0; i < A * B; ++i) store16(output[i / B] + i % B * stride, acc[i]);
    }
  }
}

template <IsSums Sums, int A, int B>
void forward_tile(const ForwardTile<Sums>& t) {
  Vec16 acc[A * B];
  const float* input[A];
  const Vec16 start = Vec16::load(t.start);
#pragma GCC unroll 32
  for (int i = 0; i < A * B; ++i) acc[i] = start;
#pragma GCC unroll 8
  for (int a = 0; a < A; ++a) input[a] = t.input[a];
  const float* w = t.weights;
  const int64_t weight_stride = t.weight_stride;
  const int32_t* const end = t.offsets + t.count;
  // Wide tiles load an offset one column before its use, so that their multiply-adds need not wait for it: 10 to 18 % on
  // CPUs with two 512-bit multipliers. Narrow ones would only have more to do.
  constexpr bool kAhead = A * B >= 12;
  int64_t next = kAhead && t.count > 0 ? *t.offsets : 0;
  for (const int32_t* offset = t.offsets; offset != end; w += weight_stride) {
    const Vec16 weight = Vec16::load(w);
    const int64_t o = kAhead ? next : *offset;
    ++offset;
    if (kAhead) next = *(offset - (offset == end));  // the last one's again: nothing need be readable behind it
#pragma GCC unroll 8
    for (int a = 0; a < A; ++a)
#pragma GCC unroll 32
      for (int b = 0; b < B; ++b) acc[a * B + b] = Sums::madd(weight, input[a] + o + b, acc[a * B + b]);
  }
  finish_tile<Sums, A, B>(t, acc);
}

// Few pixels: U columns at once keep the multiply-adds independent, and U weight loads in flight.
template <IsSums Sums, int A, int U>
void forward_few(const ForwardTile<Sums>& t) {
  Vec16 acc[U][A];
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u)
#pragma GCC unroll 4
    for (int a = 0; a < A; ++a) acc[u][a] = u == 0 ? Vec16::load(t.start) : Vec16::zero();
  const float* w = t.weights;
  int64_t i = 0;
  for (; i + U <= t.count; i += U)
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u, w += t.weight_stride) {
      const Vec16 weight = Vec16::load(w);
#pragma GCC unroll 4
      for (int a = 0; a < A; ++a) acc[u][a] = Sums::madd(weight, t.input[a] + t.offsets[i + u], acc[u][a]);
    }
  for (; i < t.count; ++i, w += t.weight_stride)
#pragma GCC unroll 4
    for (int a = 0; a < A; ++a) acc[0][a] = Sums::madd(Vec16::load(w), t.input[a] + t.offsets[i], acc[0][a]);
#pragma GCC unroll 8
  for (int u = 1; u < U; ++u)
#pragma GCC unroll 4
    for (int a = 0; a < A; ++a) acc[0][a] = add_sums<Sums>(acc[0][a], acc[u][a]);
  finish_tile<Sums, A, 1>(t, acc[0]);
}

template <IsSums Sums>
using ForwardTileFn = void (*)(const ForwardTile<Sums>&);

template <IsSums Sums, int A, int B>
ForwardTileFn<Sums> find_cols(int64_t b) {
  if (b == B) return forward_tile<Sums, A, B>;
  if constexpr (B > 1) return find_cols<Sums, A, B - 1>(b);
  return nullptr;
}

// The kernel of an a x b tile; a * b <= Vec16::kTilePixels.
template <IsSums Sums, int A = 1>
ForwardTileFn<Sums> find_forward_tile(int64_t a, int64_t b) {
  if (a == A) return find_cols<Sums, A, Vec16::kTilePixels / A>(b);
  if constexpr (A < kTileRowsMax && A < Vec16::kTilePixels) return find_forward_tile<Sums, A + 1>(a, b);
  return nullptr;
}

struct TileShape {
  int64_t rows, cols;
};

// Fills the accumulators as well as the width allows: 56 = 28 + 28, 14 = two rows at once.
inline TileShape choose_tile(int64_t cols) {
  const int64_t b = ceil_div(cols, ceil_div(cols, Vec16::kTilePixels));
  return {min64(kTileRowsMax, Vec16::kTilePixels / b), b};
}

template <IsSums Sums, int A, int U>
ForwardTileFn<Sums> find_few_rows(int64_t a) {
  if (a == A) return forward_few<Sums, A, U>;
  if constexpr (A > 1) return find_few_rows<Sums, A - 1, U>(a);
  return nullptr;
}

// The kernel of `a` of the few pixels that a whole call has, or null where they need no more than one chain of sums. How
// many there are follows from the call, so that its sums do not depend on how it was cut.
template <IsSums Sums, int N = 1>
ForwardTileFn<Sums> find_few_tile(int64_t pixels, int64_t a) {
  constexpr int kChains = Vec16::kTilePixels < 8 ? Vec16::kTilePixels : 8;
  if constexpr (N <= 4 && kChains / N > 1) {
    if (pixels == N) return find_few_rows<Sums, N, kChains / N>(a);
    return find_few_tile<Sums, N + 1>(pixels, a);
  }
  return nullptr;
}

}  // namespace
