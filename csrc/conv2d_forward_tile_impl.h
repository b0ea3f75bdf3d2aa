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
  int64_t input_stride;   // words from one pixel to the next, of a line tile
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

// The first tile of a group of strips finds their weights in memory or in a far cache, and a CPU's own prefetching ends
// with every page of 4 KiB: wide tiles ask for the weights of the column that is a page ahead. Later tiles find them in L2.
constexpr int64_t kColumnsAhead = 64;
template <int A, int B>
constexpr bool kWide = 2 * A * B >= Vec16::kTilePixels;

template <bool kCold>
inline void ask_ahead(const float* weights, int64_t weight_stride) {
  if (kCold) __builtin_prefetch(weights + kColumnsAhead * weight_stride, 0, 2);
}

template <IsSums Sums, int A, int B, bool kCold>
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
    ask_ahead<kCold>(w, weight_stride);
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

// Where the pixels of a line tile lie: seven of them share a base register, as three index registers and the scales of
// an address give all multiples of the stride up to 6.
struct LineSteps {
  int64_t one, three, five, seven;  // bytes

  explicit LineSteps(int64_t words) : one(4 * words), three(3 * one), five(5 * one), seven(7 * one) {}
  const float* pixel(const char* base, int i) const {
    const int64_t at[] = {0, one, 2 * one, three, 4 * one, five, 2 * three};
    return reinterpret_cast<const float*>(base + at[i]);
  }
};

// A tile of one row whose pixels are `input_stride` apart, as in [pixel][channel]: as wide there as others.
template <IsSums Sums, int B, bool kCold>
void forward_line(const ForwardTile<Sums>& t) {
  Vec16 acc[B];
  const Vec16 start = Vec16::load(t.start);
#pragma GCC unroll 32
  for (int i = 0; i < B; ++i) acc[i] = start;
  const LineSteps steps(t.input_stride);
  const float* const input = t.input[0];
  const float* w = t.weights;
  const int64_t weight_stride = t.weight_stride;
  const int32_t* const end = t.offsets + t.count;
  int64_t next = t.count > 0 ? *t.offsets : 0;  // a column ahead, as above
  for (const int32_t* offset = t.offsets; offset != end; w += weight_stride) {
    const Vec16 weight = Vec16::load(w);
    ask_ahead<kCold>(w, weight_stride);
    const char* base = reinterpret_cast<const char*>(input + next);
    ++offset;
    next = *(offset - (offset == end));
#pragma GCC unroll 32
    for (int i = 0; i < B; ++i) {
      acc[i] = Sums::madd(weight, steps.pixel(base, i % 7), acc[i]);
      if (i % 7 == 6) base += steps.seven;
    }
  }
  finish_tile<Sums, 1, B>(t, acc);
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
ForwardTileFn<Sums> find_cols(int64_t b, bool cold) {
  if (b == B) return cold ? forward_tile<Sums, A, B, kWide<A, B>> : forward_tile<Sums, A, B, false>;
  if constexpr (B > 1) return find_cols<Sums, A, B - 1>(b, cold);
  return nullptr;
}

// The kernel of an a x b tile; a * b <= Vec16::kTilePixels. cold: its weights are far.
template <IsSums Sums, int A = 1>
ForwardTileFn<Sums> find_forward_tile(int64_t a, int64_t b, bool cold) {
  if (a == A) return find_cols<Sums, A, Vec16::kTilePixels / A>(b, cold);
  if constexpr (A < kTileRowsMax && A < Vec16::kTilePixels) return find_forward_tile<Sums, A + 1>(a, b, cold);
  return nullptr;
}

// The kernel of a line of `b` pixels.
template <IsSums Sums, int B = Vec16::kTilePixels>
ForwardTileFn<Sums> find_line_tile(int64_t b, bool cold) {
  if (b == B) return cold ? forward_line<Sums, B, kWide<1, B>> : forward_line<Sums, B, false>;
  if constexpr (B > 1) return find_line_tile<Sums, B - 1>(b, cold);
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
