// The speed that the kernels are compared with.
#pragma once

#include <cstdint>

#include "words_impl.h"

namespace {

// Independent multiply-adds on registers only: what the figures of the kernels are compared with. `sink` is [32].
template <IsSums Sums, int kDepth>
double madd_burst(int64_t rounds, float* sink) {
  constexpr int kChains = Vec16::kTilePixels < 12 ? Vec16::kTilePixels : 12;
  Vec16 acc[kChains];
  const Vec16 a = Vec16::load(sink), b = Vec16::load(sink + 16);
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) acc[i] = Vec16::load(sink + i);  // all different, or the compiler merges them
  for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) acc[i] = Sums::madd(a, acc[i], b);
  Vec16 sum = b;
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) sum = Vec16::add(sum, acc[i]);
  sum.store(sink);
  return 2.0 * kDepth * 16.0 * kChains * static_cast<double>(rounds);
}

}  // namespace
