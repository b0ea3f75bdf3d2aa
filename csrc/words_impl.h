// What the loops multiply: a word of 32 bits, which is a float or, on some CPUs, several narrower numbers side by side.
// CONTRACTS.md lists all kinds of words and says what each of their members means.
#pragma once

#include <concepts>

#include "half_impl.h"

namespace {

// How a word of weights times a word of input is added to a sum.
template <class S>
concept IsSums = requires(Vec16 weight, const float* x, Vec16 sum) {
  typename S::Stored;
  requires std::same_as<decltype(S::kInteger), const bool>;
  { S::madd(weight, weight, sum) } -> std::same_as<Vec16>;
  { S::madd(weight, x, sum) } -> std::same_as<Vec16>;
};

// What the forward loop needs to know of words.
template <class W>
concept IsWords = IsSums<typename W::Sums> && requires {
  typename W::X;
  typename W::Y;
  requires W::kDepth == 1 || W::kDepth == 2 || W::kDepth == 4;
};

// What both gradients need besides; their sums are floats.
template <class W>
concept IsGradientWords = IsWords<W> && !W::Sums::kInteger && requires(Vec16 a) {
  typename W::Line;
  requires W::kDepth * sizeof(typename W::Line) == sizeof(float);
  requires W::kDepth == 1 || requires {
    { W::join(a, a) } -> std::same_as<Vec16>;
  };
};

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
