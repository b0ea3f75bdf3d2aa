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

inline Vec16 every_lane(float value) { return Vec16::broadcast(&value); }

inline Vec16 negative(Vec16 x) { return Vec16::sub(Vec16::zero(), x); }

// y / (1 + e^-x) to 2.2e-7 of its value; NaN where y and x are -infinity, as in torch.
inline Vec16 sigmoid_of(Vec16 x, Vec16 y) { return Vec16::div(y, Vec16::add(every_lane(1.0f), exp(negative(x)))); }

// min(max(x + 3, 0), 6), a sixth of which is hardsigmoid; divided where torch divides, so rounded as there.
inline Vec16 hard_steps(Vec16 x) {
  return Vec16::min(every_lane(6.0f), Vec16::max(Vec16::zero(), Vec16::add(x, every_lane(3.0f))));
}

// x Phi(x) with the normal distribution function Phi, to 1.5e-7 of x and 2e-5 of its value down to -13. Beside an exact
// x or 0 stands a Phi(-a) of a = |x|: u p(u) e^(-a^2 / 2), u = 1 / (1 + 0.21 a), with a minimax p to 2e-8 of it.
// a stays finite on the right, so that infinity is infinity; NaN of -infinity, as in torch.
inline Vec16 gelu(Vec16 x) {
  constexpr float kP[] = {-0.071656618f, 0.28359011f,  -0.33025668f, 0.34940492f, -0.093928023f,
                          0.12487399f,   0.069191828f, 0.085068909f, 0.083711572f};
  const Vec16 a = Vec16::max(negative(x), Vec16::min(every_lane(15.0f), x));
  const Vec16 one = every_lane(1.0f), u = Vec16::div(one, Vec16::fma(every_lane(0.21f), a, one));
  Vec16 p = every_lane(kP[0]);
#pragma GCC unroll 8
  for (int i = 1; i < 9; ++i) p = Vec16::fma(p, u, every_lane(kP[i]));
  const Vec16 tail = Vec16::mul(Vec16::mul(u, p), exp(Vec16::mul(Vec16::mul(a, every_lane(-0.5f)), a)));
  return Vec16::sub(Vec16::max(Vec16::zero(), x), Vec16::mul(a, tail));
}

// x (1 + tanh(z)) / 2 with z = sqrt(2 / pi) (x + 0.044715 x^3), which is x / (1 + e^(-2 z)).
inline Vec16 gelu_tanh(Vec16 x) {
  const Vec16 cubic = Vec16::fma(Vec16::mul(Vec16::mul(x, x), x), every_lane(0.044715f), x);
  return sigmoid_of(Vec16::mul(cubic, every_lane(1.59576912f)), x);
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

// Whether `bounds_of` says all about an activation.
inline bool is_bounded(Activation activation) { return activation <= Activation::kRelu6; }

// NaN stays NaN.
inline Vec16 activate(Vec16 v, Activation activation) {
  switch (activation) {
    case Activation::kSilu:
      return sigmoid_of(v, v);
    case Activation::kSigmoid:
      return sigmoid_of(v, every_lane(1.0f));
    case Activation::kHardswish:
      return Vec16::div(Vec16::mul(v, hard_steps(v)), every_lane(6.0f));
    case Activation::kHardsigmoid:
      return Vec16::div(hard_steps(v), every_lane(6.0f));
    case Activation::kGelu:
      return gelu(v);
    case Activation::kGeluTanh:
      return gelu_tanh(v);
    default:
      return bounds_of(activation).clamp(v);
  }
}

// The same of `vectors` x 16 values in memory. One copy of the code for all: inlined in every register tile it would be most
// of a kernel. Through memory, because sums that are copied to an array as vectors have GCC 12 keep them in one throughout.
[[gnu::noinline]] void activate_floats(float* values, int vectors, Activation activation) {
  for (int i = 0; i < vectors; ++i, values += 16) activate(Vec16::load(values), activation).store(values);
}

}  // namespace
