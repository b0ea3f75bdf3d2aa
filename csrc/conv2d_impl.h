// The kernels of one instruction set. Everything is written over Vec16, which the including file must have defined, and
// lives in anonymous namespaces; README.md beside this file explains the loops and shows figures.
#pragma once

#include "conv2d_forward_impl.h"
#include "conv2d_grad_input_impl.h"
#include "conv2d_grad_values_impl.h"

namespace {

// Independent fused multiply-adds on registers only: what the figures of the kernels are compared with. `sink` is [32].
double fma_burst(int64_t rounds, float* sink) {
  constexpr int kChains = Vec16::kTilePixels < 12 ? Vec16::kTilePixels : 12;
  Vec16 acc[kChains];
  const Vec16 a = Vec16::load(sink), b = Vec16::load(sink + 16);
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) acc[i] = Vec16::load(sink + i);  // all different, or the compiler merges them
  for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) acc[i] = Vec16::fma(a, acc[i], b);
  Vec16 sum = b;
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) sum = Vec16::add(sum, acc[i]);
  sum.store(sink);
  return 2.0 * 16.0 * kChains * static_cast<double>(rounds);
}

}  // namespace
