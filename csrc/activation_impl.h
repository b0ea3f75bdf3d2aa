// What a layer does to a finished sum, 16 values at a time.
#pragma once

#include "conv2d_kernels.h"

namespace {

using sparsekd::Activation;

// e^x: x = n ln 2 + r with |r| <= ln 2 / 2, then 2^n (1 + r + r^2 q(r)) with a minimax
// q. Above 88.4 it is infinite, below -87.7 zero; NaN stays NaN.
inline Vec16 exp(Vec16 x) {
  const auto constant = [](float value) { return Vec16::broadcast(&value); };
  const Vec16 round = constant(12582912.0f);  // 1.5 * 2^23: adding it leaves an integer in the last bits
  x = Vec16::min(constant(89.0f), Vec16::max(constant(-88.0f), x));
  const Vec16 n = Vec16::sub(Vec16::fma(x, constant(1.44269504f), round), round);
  const Vec16 r = Vec16::fma(n, constant(2.12194440e-4f), Vec16::fma(n, constant(-0.693359375f), x));
  Vec16 q = Vec16::fma(r, constant(1.3926184e-3f), constant(8.363179e-3f));
  q = Vec16::fma(r, q, constant(4.1666556e-2f));
  q = Vec16::fma(r, q, constant(1.6666576e-1f));
  q = Vec16::fma(r, q, constant(0.5f));
  const Vec16 one = constant(1.0f);
  return Vec16::mul(Vec16::pow2(n), Vec16::fma(Vec16::mul(r, r), q, Vec16::add(one, r)));
}

// x / (1 + e^-x) to 2.2e-7 of its value; NaN of -infinity, as in torch.
inline Vec16 silu(Vec16 x) {
  const float one = 1.0f;
  return Vec16::div(x, Vec16::add(Vec16::broadcast(&one), exp(Vec16::sub(Vec16::zero(), x))));
}

// ReLU and ReLU6 are bounds, so that the register tiles apply them, or none, without a branch.
struct Bounds {
  float low, high;

  // NaN stays NaN as in torch: max and min return their second operand when either is NaN.
  Vec16 clamp(Vec16 v) const { return Vec16::min(Vec16::broadcast(&high), Vec16::max(Vec16::broadcast(&low), v)); }
};

inline Bounds bounds_of(Activation activation) {
  constexpr float kInfinity = __builtin_inff();
  return {activation == Activation::kRelu || activation == Activation::kRelu6 ? 0.0f : -kInfinity,
          activation == Activation::kRelu6 ? 6.0f : kInfinity};
}

inline Vec16 activate(Vec16 v, Activation activation) {
  return activation == Activation::kSilu ? silu(v) : bounds_of(activation).clamp(v);
}

}  // namespace
