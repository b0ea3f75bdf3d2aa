// The convolutions that kernels are checked with, and their operands.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "conv2d.h"
#include "guarded.h"

namespace sparsekd {

struct Problem {
  std::string name;
  int64_t n, c, h, w, k, r, s;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
  int64_t bh, bw;
  double density;

  int64_t p() const { return (h + 2 * pad_h - dilation_h * (r - 1) - 1) / stride_h + 1; }
  int64_t q() const { return (w + 2 * pad_w - dilation_w * (s - 1) - 1) / stride_w + 1; }
  int64_t cg() const { return c / groups; }
  Conv2dShape shape() const {
    return conv2d_shape({.n = n,
                         .c = c,
                         .h = h,
                         .w = w,
                         .k = k,
                         .r = r,
                         .s = s,
                         .stride_h = stride_h,
                         .stride_w = stride_w,
                         .pad_h = pad_h,
                         .pad_w = pad_w,
                         .dilation_h = dilation_h,
                         .dilation_w = dilation_w,
                         .groups = groups},
                        bh, bw);
  }
};

// The suite "kernels" of tests/conv2d_cases.txt.
std::vector<Problem> read_problems();

// [n][c][h][w] between guard pages, in either memory format.
class Image {
 public:
  Image(int64_t n, int64_t c, int64_t h, int64_t w, bool channels_last, Side side)
      : c_(c), h_(h), w_(w), last_(channels_last), memory_(sizeof(float) * static_cast<size_t>(n * c * h * w), side) {}

  size_t place(int64_t n, int64_t c, int64_t y, int64_t x) const {
    return static_cast<size_t>(last_ ? ((n * h_ + y) * w_ + x) * c_ + c : ((n * c_ + c) * h_ + y) * w_ + x);
  }
  float& at(int64_t n, int64_t c, int64_t y, int64_t x) const { return memory_.floats()[place(n, c, y, x)]; }
  const Guarded& memory() const { return memory_; }
  Tensor4d<const float> in() const { return {memory_.floats(), last_}; }
  Tensor4d<float> out() const { return {memory_.floats(), last_}; }
  template <class Random>
  void fill(Random& random) const {
    for (size_t i = 0; i < memory_.bytes() / sizeof(float); ++i) memory_.floats()[i] = random();
  }

 private:
  int64_t c_, h_, w_;
  bool last_;
  Guarded memory_;
};

// Floats cut to bf16, and what they are worth.
struct Halves {
  Guarded memory;
  std::vector<float> exact;

  Halves(const Guarded& floats, Side side) : memory(floats.bytes() / 2, side) {
    Bfloat16* target = reinterpret_cast<Bfloat16*>(memory.floats());
    for (size_t i = 0; i < floats.bytes() / sizeof(float); ++i) {
      uint32_t bits;
      memcpy(&bits, floats.floats() + i, sizeof bits);
      target[i].bits = static_cast<uint16_t>(bits >> 16);
      exact.push_back(to_float(target[i]));
    }
  }
  Halves(const Image& image, Side side) : Halves(image.memory(), side) {}
};

inline Guarded guarded_ints(const std::vector<int32_t>& values, Side side) {
  Guarded memory(values.size() * sizeof(int32_t), side);
  if (!values.empty()) memcpy(memory.floats(), values.data(), memory.bytes());
  return memory;
}

// A random weight in storage form.
struct Weight {
  Problem problem;
  std::vector<int32_t> row_ptr{0}, col_idx;
  Guarded row_ptr_memory, col_idx_memory, values;

  template <class Random>
  Weight(const Problem& p, Random& random, Side side) : problem(p) {
    const int64_t column_blocks = p.r * p.s * ((p.cg() + p.bw - 1) / p.bw);
    for (int64_t row = 0; row * p.bh < p.k; ++row) {
      const bool dead = row == 1 && p.density < 1;  // a row of blocks without blocks
      for (int64_t column = 0; column < column_blocks; ++column)
        if (!dead && (random() + 1) / 2 < p.density) col_idx.push_back(static_cast<int32_t>(column));
      row_ptr.push_back(static_cast<int32_t>(col_idx.size()));
    }
    row_ptr_memory = guarded_ints(row_ptr, side);
    col_idx_memory = guarded_ints(col_idx, side);
    values = Guarded(sizeof(float) * size(), side);
    for (size_t i = 0; i < size(); ++i) values.floats()[i] = random();
  }

  size_t size() const { return col_idx.size() * static_cast<size_t>(problem.bh * problem.bw); }
  Blocks blocks() const {
    return {reinterpret_cast<const int32_t*>(row_ptr_memory.floats()),
            reinterpret_cast<const int32_t*>(col_idx_memory.floats()), static_cast<int64_t>(col_idx.size())};
  }

  // body(index into values, k, r, s, channel inside the group) for every weight inside the layer.
  template <class Body>
  void each(const Body& body) const {
    const int64_t column_blocks = (problem.cg() + problem.bw - 1) / problem.bw;
    for (size_t row = 0; row + 1 < row_ptr.size(); ++row)
      for (int32_t block = row_ptr[row]; block < row_ptr[row + 1]; ++block)
        for (int64_t i = 0; i < problem.bh; ++i)
          for (int64_t j = 0; j < problem.bw; ++j) {
            const int64_t tap = col_idx[static_cast<size_t>(block)] / column_blocks;
            const int64_t channel = col_idx[static_cast<size_t>(block)] % column_blocks * problem.bw + j;
            const int64_t k = static_cast<int64_t>(row) * problem.bh + i;
            if (k < problem.k && channel < problem.cg())
              body((block * problem.bh + i) * problem.bw + j, k, tap / problem.s, tap % problem.s, channel);
          }
  }

  // body(index into values, n, k, output y, x, c, input y, x) for every product of the convolution.
  template <class Body>
  void each_product(const Body& body) const {
    const Problem& l = problem;
    each([&](int64_t value, int64_t k, int64_t r, int64_t s, int64_t channel) {
      const int64_t c = k / (l.k / l.groups) * l.cg() + channel;
      for (int64_t n = 0; n < l.n; ++n)
        for (int64_t y = 0; y < l.p(); ++y)
          for (int64_t x = 0; x < l.q(); ++x) {
            const int64_t iy = y * l.stride_h + r * l.dilation_h - l.pad_h;
            const int64_t ix = x * l.stride_w + s * l.dilation_w - l.pad_w;
            if (iy >= 0 && iy < l.h && ix >= 0 && ix < l.w) body(value, n, k, y, x, c, iy, ix);
          }
    });
  }
};

}  // namespace sparsekd
