// What stands between layers: products with a gate, layer norms.
#pragma once

#include "activation_impl.h"
#include "between_kernels.h"
#include "half_impl.h"
#include "parallel_impl.h"
#include "ranges_impl.h"

namespace {

using sparsekd::Gate;
using sparsekd::LayerNorm;

constexpr int64_t kFewElements = 16384;  // stay on one thread

// Rows of a piece of work: some 4096 elements.
inline int64_t rows_at_once(int64_t width) { return max64(1, 4096 / max64(1, width)); }

// n neighbouring elements from `at` on; factor(i, lanes) is what element i and those behind it are multiplied with.
template <class T, class Factor>
inline void gate_run(const Gate<T>& d, int64_t at, int64_t n, const Factor& factor) {
  for (int64_t i = 0; i < n; i += 16) {
    const int lanes = static_cast<int>(min64(16, n - i));
    Vec16 v = Vec16::mul(load_some(d.x + at + i, lanes), factor(i, lanes));
    if (d.residual != nullptr) v = Vec16::add(v, load_some(d.residual + at + i, lanes));
    store_some(d.y + at + i, activate(v, d.activation), lanes);
  }
}

template <class T>
void gate(const Gate<T>& d) {
  const int64_t rows = d.images * (d.channels_last ? d.pixels : d.channels);
  const int64_t width = d.channels_last ? d.channels : d.pixels;
  const int64_t block = rows_at_once(width), per_image = d.channels_last ? d.pixels : d.channels;
  parallel(rows * width < kFewElements ? 1 : d.threads, ceil_div(rows, block), [&](int64_t item) {
    for (int64_t row = item * block; row < min64(rows, (item + 1) * block); ++row) {
      if (d.channels_last) {
        const T* gates = d.gate + row / per_image * d.channels;
        gate_run(d, row * width, width, [&](int64_t i, int lanes) { return load_some(gates + i, lanes); });
      } else {
        float lane[16];
        load16_first(d.gate + row, 1).store(lane);
        const Vec16 one = Vec16::broadcast(lane);
        gate_run(d, row * width, width, [&](int64_t, int) { return one; });
      }
    }
  });
}

inline float sum_lanes(Vec16 v) {
  float lane[16], sum = 0;
  v.store(lane);
  for (int i = 0; i < 16; ++i) sum += lane[i];
  return sum;
}

// The sum of (x - centre)^power over a row, power 1 or 2.
template <int kPower, class T>
inline float sum_row(const T* x, int64_t n, float centre) {
  const Vec16 minus = every_lane(-centre);
  Vec16 sum[4] = {Vec16::zero(), Vec16::zero(), Vec16::zero(), Vec16::zero()};
  int64_t i = 0;
  const auto join = [&](Vec16& to, Vec16 v) {
    v = Vec16::add(v, minus);
    to = kPower == 1 ? Vec16::add(to, v) : Vec16::fma(v, v, to);
  };
  for (; i + 64 <= n; i += 64)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) join(sum[j], load16(x + i + 16 * j));
  for (; i + 16 <= n; i += 16) join(sum[0], load16(x + i));
  float rest = 0;
  if (i < n) {
    float lane[16];
    load16_first(x + i, static_cast<int>(n - i)).store(lane);
    for (int64_t j = 0; j < n - i; ++j)
      rest += kPower == 1 ? lane[j] - centre : (lane[j] - centre) * (lane[j] - centre);
  }
  return sum_lanes(Vec16::add(Vec16::add(sum[0], sum[1]), Vec16::add(sum[2], sum[3]))) + rest;
}

// The variance is taken around the mean, in a second pass over a row that lies in L1: no digits cancel.
template <class T>
inline void layer_norm_row(const LayerNorm<T>& d, const T* x, T* y) {
  const float n = static_cast<float>(d.channels);
  const float mean = sum_row<1>(x, d.channels, 0.0f) / n;
  const float variance = sum_row<2>(x, d.channels, mean) / n;
  const float scale = 1.0f / __builtin_sqrtf(variance + d.epsilon);
  const Vec16 by = every_lane(scale), minus = every_lane(-mean);
  for (int64_t i = 0; i < d.channels; i += 16) {
    const int lanes = static_cast<int>(min64(16, d.channels - i));
    const Vec16 v = Vec16::mul(Vec16::add(load_some(x + i, lanes), minus), by);
    store_some(y + i, Vec16::fma(v, load_some(d.weight + i, lanes), load_some(d.bias + i, lanes)), lanes);
  }
}

template <class T>
void layer_norm(const LayerNorm<T>& d) {
  const int64_t block = rows_at_once(d.channels);
  parallel(d.rows * d.channels < kFewElements ? 1 : d.threads, ceil_div(d.rows, block), [&](int64_t item) {
    for (int64_t row = item * block; row < min64(d.rows, (item + 1) * block); ++row)
      layer_norm_row(d, d.x + row * d.channels, d.y + row * d.channels);
  });
}

}  // namespace
