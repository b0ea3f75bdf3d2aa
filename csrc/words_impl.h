// What the loops multiply: a word of 32 bits, which is a float or, on some CPUs, several narrower numbers side by side.
#pragma once

#include "half_impl.h"

namespace {

// What the loops do with a word of weights and a word of input. Stored: what a tile can write to y by itself; other
// types of y take the way through the buffer, so that they share its code.
struct FloatSums {
  using Stored = float;
  static constexpr bool kInteger = false;
  static Vec16 madd(Vec16 weight, Vec16 x, Vec16 sum) { return Vec16::fma(weight, x, sum); }
  // The same with one word of input for all lanes.
  static Vec16 madd(Vec16 weight, const float* x, Vec16 sum) { return madd(weight, Vec16::broadcast(x), sum); }
};

// X: type of x, Y: of residual and y, Line: of what neighbours in a line of pixels are packed as.
template <class T>
struct FloatWords {
  using Sums = FloatSums;
  using X = T;
  using Y = T;
  using Line = float;
  static constexpr int kDepth = 1;
};

}  // namespace
