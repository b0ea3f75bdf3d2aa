// Every kernel of every instruction set of this CPU against plain double loops, between guard pages. No Python, no
// torch: it runs under sanitizers and under qemu-user (.ci/kernels). Arguments: instruction sets that must be there.
//
// To add an op: a check_<op>(const Problem&, ...) that computes the answer with `each_product` or by hand, runs the op
// through the functions of the headers (conv2d.h), compares with `compare`; and a line in `check_problem`. Its operands
// are Guarded, its outputs start as NaN. Other number formats bring their own operands and their own tolerance.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "conv2d.h"
#include "dispatch.h"
#include "guarded.h"
#include "network.h"

namespace {

using namespace sparsekd;

struct Problem {
  const char* name;
  int64_t n, c, h, w, k, r, s;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
  int64_t bh, bw;
  double density;

  int64_t p() const { return (h + 2 * pad_h - dilation_h * (r - 1) - 1) / stride_h + 1; }
  int64_t q() const { return (w + 2 * pad_w - dilation_w * (s - 1) - 1) / stride_w + 1; }
  int64_t cg() const { return c / groups; }
  Conv2dShape shape() const {
    return {{n, c, h, w, k, p(), q(), r, s, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups}, bh, bw};
  }
};

// clang-format off
const Problem kProblems[] = {
    //                         n   c   h   w   k  r  s  stride pad dilation g  block density
    {"3x3",                    2, 20,  9, 30, 40, 3, 3, 1, 1, 1, 1, 1, 1, 1, 16, 1, 0.3},
    {"dense",                  1, 16,  8, 14, 32, 3, 3, 1, 1, 1, 1, 1, 1, 1, 16, 1, 1.0},
    {"tall-blocks-ragged",     1,  7,  8,  8, 40, 3, 3, 1, 1, 1, 1, 1, 1, 1, 32, 1, 0.5},
    {"strided",                3, 16, 13, 17, 32, 3, 3, 2, 2, 1, 1, 1, 1, 1, 16, 1, 0.3},
    {"mixed-strides",          2,  5, 11, 14, 16, 2, 4, 3, 2, 0, 3, 2, 1, 1, 16, 1, 0.6},
    {"stride-beyond-kernel",   2,  6, 11, 11, 16, 2, 2, 3, 3, 0, 0, 1, 1, 1, 16, 1, 0.6},
    {"7x7-image",              5, 12,  7,  7, 32, 3, 3, 1, 1, 1, 1, 1, 1, 1, 16, 1, 0.3},
    {"4x4-image",              9, 33,  4,  4, 48, 3, 3, 1, 1, 1, 1, 1, 1, 1, 16, 1, 0.2},
    {"4x4-deep",               3, 18,  4,  4,150, 3, 3, 1, 1, 1, 1, 1, 1, 1, 16, 1, 0.6},
    {"7x7-tall-blocks",        1, 40,  7,  7,128, 3, 3, 1, 1, 1, 1, 1, 1, 1, 32, 1, 0.5},
    {"deep-strided",           3, 20,  5,  6,150, 3, 3, 2, 2, 1, 1, 1, 1, 1, 16, 1, 0.8},
    {"deep-groups-dilated",    2, 10,  5,  5, 96, 3, 3, 1, 2, 2, 1, 2, 1, 2, 16, 1, 0.8},
    {"wide-image",             1,  3,  3, 61, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1, 16, 1, 0.5},
    {"1x1-image",              3,  9,  1,  1, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1, 16, 1, 0.5},
    {"pointwise",              2, 33,  7,  7, 48, 1, 1, 1, 1, 0, 0, 1, 1, 1, 16, 1, 0.3},
    {"pointwise-strided",      2,130,  8,  8, 16, 1, 1, 2, 2, 0, 0, 1, 1, 1, 16, 1, 0.3},
    {"pointwise-padded",       2,  8,  3,  5, 16, 1, 1, 1, 1, 2, 1, 1, 1, 1, 16, 1, 0.5},
    {"linear-1",               1, 75,  1,  1, 52, 1, 1, 1, 1, 0, 0, 1, 1, 1, 16, 1, 0.4},
    {"linear-3",               1, 70,  1,  3, 52, 1, 1, 1, 1, 0, 0, 1, 1, 1, 16, 1, 0.4},
    {"linear-67",              1, 41,  1, 67, 37, 1, 1, 1, 1, 0, 0, 1, 1, 1,  8, 3, 0.4},
    {"groups",                 2, 12,  6,  6, 48, 3, 3, 1, 1, 1, 1, 1, 1, 3, 16, 1, 0.5},
    {"depthwise",              2, 10,  6,  6, 10, 3, 3, 1, 1, 1, 1, 1, 1,10,  1, 1, 0.7},
    {"depthwise-wide",         2, 37,  5, 23, 37, 3, 5, 2, 1, 1, 2, 1, 1,37,  1, 1, 1.0},
    {"channel-scales",         2, 37,  3,  7, 37, 1, 1, 1, 1, 0, 0, 1, 1,37,  1, 1, 1.0},
    {"small-blocks",           2, 10,  6,  6, 21, 3, 3, 1, 1, 1, 1, 1, 1, 1,  4, 4, 0.4},
    {"filters",                2,  6,  6,  6, 20, 3, 3, 1, 1, 1, 1, 1, 1, 1,  1, 6, 0.5},
    {"16x2",                   1,  9,  6,  6, 32, 3, 3, 1, 1, 1, 1, 1, 1, 1, 16, 2, 0.4},
    {"kernel-beyond-image",    1,  8,  2,  3, 16, 5, 5, 1, 1, 2, 2, 1, 1, 1, 16, 1, 0.5},
    {"much-padding",           2,  4,  5,  6, 16, 3, 3, 1, 1, 5, 4, 1, 1, 1, 16, 1, 0.5},
    {"dilated",                1,  6, 12, 13, 16, 3, 3, 2, 3, 3, 2, 2, 3, 1, 16, 1, 0.5},
    {"no-blocks",              1,  8,  5,  5, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1, 16, 1, 0.0},
    {"batch-0",                0,  8,  5,  5, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1, 16, 1, 0.5},
    {"images-beside",         15,  5,  4,  5, 33, 3, 3, 1, 1, 1, 1, 1, 1, 1, 16, 1, 0.3},
    {"images-beside-strided", 31,  6,  9,  7, 40, 3, 3, 2, 2, 1, 1, 1, 1, 1, 16, 1, 0.5},
    {"images-beside-bands",   16, 33, 14, 14, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1, 16, 1, 0.1},
    {"images-beside-sparse",  16,  4,  8,  8, 21, 2, 2, 3, 3, 0, 0, 1, 1, 1,  4, 4, 0.5},
    {"several-bands",          2,130, 26, 28, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1, 16, 1, 0.05},
};
// clang-format on

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

Guarded guarded_ints(const std::vector<int32_t>& values, Side side) {
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

// The right answer in double with the sum of its terms' magnitudes, which rounding errors scale with.
struct Exact {
  std::vector<double> value, magnitude;
  explicit Exact(int64_t size) : value(static_cast<size_t>(size)), magnitude(value) {}
  void add(int64_t i, double term) {
    value[static_cast<size_t>(i)] += term;
    magnitude[static_cast<size_t>(i)] += std::fabs(term);
  }
};

int64_t compared = 0, failures = 0;

void compare(const std::string& what, const Exact& exact, int64_t i, double got, double rounding = 0) {
  const double want = exact.value[static_cast<size_t>(i)];
  ++compared;
  const double allowed = 4e-6 * exact.magnitude[static_cast<size_t>(i)] + rounding * std::fabs(want);
  if (std::fabs(got - want) <= allowed) return;  // false for NaN
  if (++failures <= 20)
    fprintf(stderr, "%s: element %ld: expected %.9g, got %.9g\n", what.c_str(), static_cast<long>(i), want, got);
}

struct Setting {
  bool x_last, y_last;
  int threads;
  Side side;
};

int64_t flat(const Problem& l, int64_t n, int64_t k, int64_t y, int64_t x) {
  return ((n * l.k + k) * l.p() + y) * l.q() + x;
}

double activate(double v, Activation activation) {
  if (activation == Activation::kSilu) return v / (1 + std::exp(-v));
  if (activation == Activation::kNone) return v;
  return std::fmin(std::fmax(v, 0), activation == Activation::kRelu6 ? 6 : HUGE_VAL);
}

struct Check {
  const Problem& l;
  const Setting& set;
  std::string name;
  Weight weight;
  Image x, dy;
  Guarded bias;

  template <class Random>
  Check(const Problem& problem, const Setting& setting, const char* isa, Random& random)
      : l(problem),
        set(setting),
        name(std::string(isa) + " " + l.name + (set.x_last ? " nhwc" : " nchw") + (set.y_last ? "-nhwc" : "-nchw")),
        weight(l, random, set.side),
        x(l.n, l.c, l.h, l.w, set.x_last, set.side),
        dy(l.n, l.k, l.p(), l.q(), set.y_last, set.side),
        bias(sizeof(float) * static_cast<size_t>(l.k), set.side) {
    x.fill(random);
    dy.fill(random);
    for (int64_t i = 0; i < l.k; ++i) bias.floats()[i] = random();
  }

  template <class Body>
  void each_output(const Body& body) const {
    for (int64_t n = 0; n < l.n; ++n)
      for (int64_t k = 0; k < l.k; ++k)
        for (int64_t y = 0; y < l.p(); ++y)
          for (int64_t i = 0; i < l.q(); ++i) body(n, k, y, i);
  }

  Exact products() const {
    Exact bare(l.n * l.k * l.p() * l.q());
    weight.each_product(
        [&](int64_t v, int64_t n, int64_t k, int64_t oy, int64_t ox, int64_t c, int64_t iy, int64_t ix) {
          bare.add(flat(l, n, k, oy, ox), double(weight.values.floats()[v]) * x.at(n, c, iy, ix));
        });
    return bare;
  }

  // With bias and dy as the residual.
  Exact fused(const Exact& bare, Activation activation) const {
    Exact all = bare;
    each_output([&](int64_t n, int64_t k, int64_t oy, int64_t ox) {
      const int64_t i = flat(l, n, k, oy, ox);
      all.add(i, bias.floats()[k]);
      all.add(i, dy.at(n, k, oy, ox));
      double& value = all.value[static_cast<size_t>(i)];
      value = activate(value, activation);
    });
    return all;
  }

  void expect(const char* what, const Exact& exact, const Image& y) const {
    each_output([&](int64_t n, int64_t k, int64_t oy, int64_t ox) {
      compare(name + what, exact, flat(l, n, k, oy, ox), y.at(n, k, oy, ox));
    });
  }

  // Once bare, then with every activation, through both entrances.
  void forward() const {
    const Exact bare = products();
    {
      const Image y(l.n, l.k, l.p(), l.q(), set.y_last, set.side);
      conv2d<float>(l.shape(), x.in(), weight.values.floats(), weight.blocks(), {}, y.out(), set.threads);
      expect(" forward", bare, y);
    }
    for (const Activation activation : {Activation::kNone, Activation::kRelu, Activation::kRelu6, Activation::kSilu}) {
      const Image y(l.n, l.k, l.p(), l.q(), set.y_last, set.side);
      if (activation == Activation::kRelu) {
        const PackedConv2d<float> packed(l.shape(), weight.values.floats(), weight.blocks(), bias.floats(), activation);
        packed.run(l.shape().geometry, x.in(), dy.in().data, y.out(), set.threads);
      } else {
        conv2d<float>(l.shape(), x.in(), weight.values.floats(), weight.blocks(),
                      {bias.floats(), dy.in().data, activation}, y.out(), set.threads);
      }
      expect(" forward fused", fused(bare, activation), y);
    }
  }

  // The kernel for single channels, with zeros where the weight has no block.
  void depthwise() const {
    if (l.groups != l.c || l.k != l.c || !set.x_last || !set.y_last) return;
    const Guarded dense(sizeof(float) * static_cast<size_t>(l.c * l.r * l.s), set.side);
    for (int64_t i = 0; i < l.c * l.r * l.s; ++i) dense.floats()[i] = 0;
    weight.each([&](int64_t v, int64_t k, int64_t r, int64_t s, int64_t) {
      dense.floats()[(k * l.r + r) * l.s + s] = weight.values.floats()[v];
    });
    for (const Activation activation : {Activation::kNone, Activation::kRelu6, Activation::kSilu}) {
      const Image y(l.n, l.k, l.p(), l.q(), true, set.side);
      const PackedDepthwise packed(l.shape(), dense.floats(), bias.floats(), activation);
      packed.run(l.n, x.in().data, dy.in().data, y.out().data, set.threads);
      expect(" depthwise", fused(products(), activation), y);
    }
  }

  // Pooling over this layer's window, in slices of one image, through a buffer that a pool of one pixel reads.
  void pools() const {
    if (l.groups != l.c || l.k != l.c || !set.x_last || !set.y_last) return;
    Conv2dShape pixel = l.shape();
    pixel.geometry = {l.n, l.k, l.p(), l.q(), l.k, l.p(), l.q(), 1, 1, 1, 1, 0, 0, 1, 1, l.k};
    const int64_t in_bytes = l.c * l.h * l.w * 4, out_bytes = l.k * l.p() * l.q() * 4;
    for (const bool mean : {false, true}) {
      Exact exact(l.n * l.k * l.p() * l.q());
      each_output([&](int64_t n, int64_t k, int64_t oy, int64_t ox) {
        const int64_t i = flat(l, n, k, oy, ox);
        double& value = exact.value[static_cast<size_t>(i)];
        if (!mean) value = -HUGE_VAL;
        for (int64_t r = 0; r < l.r; ++r)
          for (int64_t s = 0; s < l.s; ++s) {
            const int64_t iy = oy * l.stride_h + r * l.dilation_h - l.pad_h;
            const int64_t ix = ox * l.stride_w + s * l.dilation_w - l.pad_w;
            if (iy < 0 || iy >= l.h || ix < 0 || ix >= l.w) continue;
            if (mean)
              exact.add(i, double(x.at(n, k, iy, ix)) / double(l.r * l.s));
            else
              value = std::max(value, double(x.at(n, k, iy, ix)));
          }
      });
      const Image y(l.n, l.k, l.p(), l.q(), true, set.side);
      Network network({{0, 0, in_bytes}, {1, 0, out_bytes}, {-1, 0, 0}}, (out_bytes + 63) / 64 * 64);
      network.add(pool_layer<float>(l.shape(), mean), 0, -1, 2);
      network.add(pool_layer<float>(pixel, false), 2, -1, 1);
      const auto address = [](const float* p) { return reinterpret_cast<std::uintptr_t>(p); };
      network.run({address(x.in().data), address(y.out().data)}, l.n, 1, set.threads);
      expect(mean ? " mean" : " max", exact, y);
    }
  }

  // y, dx and the gradients of the values in bf16. What the kernels are given is rounded, so exact answers are taken
  // from that; results are off by their own rounding.
  void bf16() const {
    const Halves x16(x, set.side), dy16(dy, set.side), values(weight.values, set.side);
    const auto at = [](const Guarded& memory) { return reinterpret_cast<Bfloat16*>(memory.floats()); };
    const auto value = [&](int64_t v) { return double(values.exact[static_cast<size_t>(v)]); };
    const Tensor4d<const Bfloat16> in{at(x16.memory), set.x_last}, out{at(dy16.memory), set.y_last};

    Exact y(l.n * l.k * l.p() * l.q()), dx(l.n * l.c * l.h * l.w), dvalues(static_cast<int64_t>(weight.size()));
    weight.each_product(
        [&](int64_t v, int64_t n, int64_t k, int64_t oy, int64_t ox, int64_t c, int64_t iy, int64_t ix) {
          const double from = x16.exact[x.place(n, c, iy, ix)], to = dy16.exact[dy.place(n, k, oy, ox)];
          y.add(static_cast<int64_t>(dy.place(n, k, oy, ox)), value(v) * from);
          dx.add(static_cast<int64_t>(x.place(n, c, iy, ix)), value(v) * to);
          dvalues.add(v, from * to);
        });
    const auto expect16 = [&](const char* what, const Exact& exact, const Guarded& got, int64_t i) {
      compare(name + what, exact, i, to_float(at(got)[i]), 1.0 / 256);
    };
    const auto memory = [&](const Exact& exact) { return Guarded(sizeof(Bfloat16) * exact.value.size(), set.side); };
    const Guarded y16 = memory(y), dx16 = memory(dx);
    conv2d<Bfloat16>(l.shape(), in, at(values.memory), weight.blocks(), {}, {at(y16), set.y_last}, set.threads);
    for (int64_t i = 0; i < static_cast<int64_t>(y.value.size()); ++i) expect16(" forward bf16", y, y16, i);
    conv2d_grad_input<Bfloat16>(l.shape(), out, at(values.memory), weight.blocks(), {at(dx16), set.x_last},
                                set.threads);
    for (int64_t i = 0; i < static_cast<int64_t>(dx.value.size()); ++i) expect16(" grad_input bf16", dx, dx16, i);
    const Guarded dvalues16 = memory(dvalues);
    conv2d_grad_values<Bfloat16>(l.shape(), in, out, weight.blocks(), at(dvalues16), set.threads);
    weight.each(
        [&](int64_t v, int64_t, int64_t, int64_t, int64_t) { expect16(" grad_values bf16", dvalues, dvalues16, v); });
  }

  // Bytes in; floats with everything fused out, then bytes.
  void forward_int8() const {
    const ByteScale x_scale{0.02f, 119}, y_scale{0.05f, 131};
    const Guarded x8(static_cast<size_t>(l.n * l.c * l.h * l.w), set.side), values(weight.size(), set.side);
    const Guarded scale(sizeof(float) * static_cast<size_t>(l.k), set.side);
    uint8_t* bytes = reinterpret_cast<uint8_t*>(x8.floats());
    int8_t* weights = reinterpret_cast<int8_t*>(values.floats());
    for (size_t i = 0; i < x8.bytes(); ++i) bytes[i] = static_cast<uint8_t>(127.5f * (x.in().data[i] + 1));
    for (size_t i = 0; i < values.bytes(); ++i) weights[i] = static_cast<int8_t>(127 * weight.values.floats()[i]);
    for (int64_t k = 0; k < l.k; ++k) scale.floats()[k] = 0.001f * static_cast<float>(1 + k % 7);
    const auto place = [](bool last, int64_t n, int64_t c, int64_t y, int64_t i, int64_t channels, int64_t h,
                          int64_t w) {
      return last ? ((n * h + y) * w + i) * channels + c : ((n * channels + c) * h + y) * w + i;
    };
    Exact bare(l.n * l.k * l.p() * l.q());
    weight.each_product(
        [&](int64_t v, int64_t n, int64_t k, int64_t oy, int64_t ox, int64_t c, int64_t iy, int64_t ix) {
          const int distance = bytes[place(set.x_last, n, c, iy, ix, l.c, l.h, l.w)] - x_scale.zero;
          bare.add(flat(l, n, k, oy, ox), double(scale.floats()[k]) * x_scale.scale * weights[v] * distance);
        });
    const Tensor4d<const uint8_t> in{bytes, set.x_last};
    {
      const PackedConv2dInt8 packed(l.shape(), weights, scale.floats(), weight.blocks(), bias.floats(),
                                    Activation::kRelu, x_scale, nullptr);
      const Image y(l.n, l.k, l.p(), l.q(), set.y_last, set.side);
      packed.run(l.shape().geometry, in, dy.in().data, {y.out().data, set.y_last}, set.threads);
      expect(" forward int8", fused(bare, Activation::kRelu), y);
    }
    const PackedConv2dInt8 packed(l.shape(), weights, scale.floats(), weight.blocks(), nullptr, Activation::kNone,
                                  x_scale, &y_scale);
    const Guarded y(bare.value.size(), set.side);
    packed.run(l.shape().geometry, in, nullptr, {y.floats(), set.y_last}, set.threads);
    each_output([&](int64_t n, int64_t k, int64_t oy, int64_t ox) {
      const int64_t i = flat(l, n, k, oy, ox);
      double& want = bare.value[static_cast<size_t>(i)];
      want = std::fmin(std::fmax(want / y_scale.scale + y_scale.zero, 0), 255);
      bare.magnitude[static_cast<size_t>(i)] += 0.501 / 4e-6;  // rounded to a whole number
      const int64_t at = place(set.y_last, n, k, oy, ox, l.k, l.p(), l.q());
      compare(name + " forward int8 to bytes", bare, i, reinterpret_cast<const uint8_t*>(y.floats())[at]);
    });
  }

  void grad_input() const {
    Exact exact(l.n * l.c * l.h * l.w);
    weight.each_product(
        [&](int64_t v, int64_t n, int64_t k, int64_t oy, int64_t ox, int64_t c, int64_t iy, int64_t ix) {
          exact.add(((n * l.c + c) * l.h + iy) * l.w + ix, double(weight.values.floats()[v]) * dy.at(n, k, oy, ox));
        });
    const Image dx(l.n, l.c, l.h, l.w, set.x_last, set.side);
    conv2d_grad_input<float>(l.shape(), dy.in(), weight.values.floats(), weight.blocks(), dx.out(), set.threads);
    for (int64_t n = 0, i = 0; n < l.n; ++n)
      for (int64_t c = 0; c < l.c; ++c)
        for (int64_t y = 0; y < l.h; ++y)
          for (int64_t j = 0; j < l.w; ++j, ++i) compare(name + " grad_input", exact, i, dx.at(n, c, y, j));
  }

  void grad_values() const {
    Exact exact(static_cast<int64_t>(weight.size()));
    weight.each_product([&](int64_t v, int64_t n, int64_t k, int64_t oy, int64_t ox, int64_t c, int64_t iy,
                            int64_t ix) { exact.add(v, double(x.at(n, c, iy, ix)) * dy.at(n, k, oy, ox)); });
    const Guarded dvalues(sizeof(float) * weight.size(), set.side);
    conv2d_grad_values<float>(l.shape(), x.in(), dy.in(), weight.blocks(), dvalues.floats(), set.threads);
    weight.each([&](int64_t v, int64_t, int64_t, int64_t, int64_t) {
      compare(name + " grad_values", exact, v, dvalues.floats()[v]);
    });
  }
};

void check_problem(const Problem& problem, const char* isa) {
  const Setting settings[] = {{false, false, 1, Side::kEnd},
                              {true, true, 2, Side::kEnd},
                              {true, true, 1, Side::kBegin},
                              {false, true, 3, Side::kBegin},
                              {true, false, 1, Side::kEnd}};
  for (const Setting& setting : settings) {
    set_scratch_side(setting.side);
    std::mt19937 generator(1);
    std::uniform_real_distribution<float> uniform(-1, 1);
    const auto random = [&] { return uniform(generator); };
    const Check check(problem, setting, isa, random);
    check.forward();
    check.bf16();
    check.forward_int8();
    check.depthwise();
    check.pools();
    check.grad_input();
    check.grad_values();
  }
}

// Statistics of feature maps and their gradient; `loads` turns an element of a half type into a float.
template <class T, class Loads>
void check_maps(const Setting& set, Element element, double rounding, const std::string& isa, Loads loads,
                int64_t batch, int64_t channels, int64_t pixels) {
  const std::string name = isa + " maps " + std::to_string(channels) + "x" + std::to_string(pixels);
  const size_t count = static_cast<size_t>(batch * channels * pixels);
  const Guarded maps(sizeof(T) * count, set.side), grads(sizeof(T) * count, set.side);
  const Guarded means(sizeof(float) * static_cast<size_t>(batch * channels), set.side);
  const Guarded energy(sizeof(float) * static_cast<size_t>(batch * pixels), set.side);
  std::mt19937 generator(2);
  T* x = reinterpret_cast<T*>(maps.floats());
  for (size_t i = 0; i < count; ++i) {
    if constexpr (sizeof(T) == sizeof(float))
      x[i] = std::uniform_real_distribution<float>(-1, 1)(generator);
    else  // any pattern with an exponent around 1
      x[i] = static_cast<T>((generator() & 0x83ffu) | (element == Element::kFloat16 ? 0x3800u : 0x3e00u));
  }
  const FeatureLayer layer{x, grads.floats(), element, set.x_last, channels, pixels, 0, 0};
  const auto index = [&](int64_t b, int64_t c, int64_t i) {
    return (b * channels * pixels) + (set.x_last ? i * channels + c : c * pixels + i);
  };
  kernels().attention.feature_stats({&layer, 1, batch, means.floats(), energy.floats(), channels, pixels, set.threads});
  Exact mean(batch * channels), square(batch * pixels), grad(static_cast<int64_t>(count));
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < pixels; ++i) {
        const double v = loads(x[index(b, c, i)]);
        mean.add(b * channels + c, v / static_cast<double>(pixels));
        square.add(b * pixels + i, v * v / static_cast<double>(channels));
      }
  for (int64_t i = 0; i < batch * channels; ++i) compare(name + " means", mean, i, means.floats()[i]);
  for (int64_t i = 0; i < batch * pixels; ++i) compare(name + " energy", square, i, energy.floats()[i]);
  // The statistics serve as their own gradients: any numbers do.
  kernels().attention.feature_stats_grad(
      {&layer, 1, batch, means.floats(), energy.floats(), channels, pixels, set.threads});
  const T* got = reinterpret_cast<const T*>(grads.floats());
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < pixels; ++i) {
        const int64_t at = index(b, c, i);
        grad.add(at, means.floats()[b * channels + c] / static_cast<double>(pixels));
        grad.add(at, 2.0 * loads(x[at]) * energy.floats()[b * pixels + i] / static_cast<double>(channels));
        grad.magnitude[static_cast<size_t>(at)] += rounding * std::fabs(grad.value[static_cast<size_t>(at)]) / 4e-6;
        compare(name + " gradient", grad, at, loads(got[at]));
      }
}

double from_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return value;
}

double from_float16(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  const double magnitude = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
  return bits & 0x8000 ? -magnitude : magnitude;
}

// Maps of 5 x 3 and 2 x 2 against 4 x 4 and 2 x 2: pooling both ways. Distances by plain loops; of the gradients that
// the operands are not overrun and every element is written, tests/test_attention.py has their values.
void check_match(const Setting& set, const std::string& isa) {
  const int64_t batch = 3;
  const MapSize teachers[] = {{4, 4, 0}, {2, 2, 16}}, students[] = {{5, 3, 0}, {2, 2, 15}};
  const auto memory = [&](int64_t floats) { return Guarded(sizeof(float) * static_cast<size_t>(floats), set.side); };
  const Guarded attention = memory(batch * 4), teacher = memory(batch * 20), student = memory(batch * 19);
  const Guarded loss = memory(1), distance = memory(batch * 4), grad = memory(batch * 19);
  std::mt19937 generator(3);
  for (const Guarded* operand : {&attention, &teacher, &student})
    for (size_t i = 0; i < operand->bytes() / sizeof(float); ++i)
      operand->floats()[i] = std::uniform_real_distribution<float>(0, 1)(generator);
  kernels().attention.match_maps({batch, 2, 2, attention.floats(), teacher.floats(), student.floats(), teachers,
                                  students, 20, 19, loss.floats(), distance.floats(), grad.floats(), set.threads});
  const auto unit = [](const float* map, MapSize from, MapSize to) {
    std::vector<double> pooled;
    double norm = 0;
    for (int64_t i = 0; i < to.height; ++i)
      for (int64_t j = 0; j < to.width; ++j) {
        double sum = 0;
        int64_t cells = 0;
        for (int64_t y = i * from.height / to.height; y * to.height < (i + 1) * from.height; ++y)
          for (int64_t x = j * from.width / to.width; x * to.width < (j + 1) * from.width; ++x, ++cells)
            sum += map[from.energy + y * from.width + x];
        pooled.push_back(sum / static_cast<double>(cells));
        norm += pooled.back() * pooled.back();
      }
    for (double& value : pooled) value /= std::sqrt(norm);
    return pooled;
  };
  Exact total(1), exact(batch * 4);
  for (int64_t b = 0, pair = 0; b < batch; ++b)
    for (const MapSize& t : teachers)
      for (const MapSize& s : students) {
        const auto want = unit(teacher.floats() + b * 20, t, t), got = unit(student.floats() + b * 19, s, t);
        for (size_t i = 0; i < want.size(); ++i)
          exact.add(pair, (got[i] - want[i]) * (got[i] - want[i]) / static_cast<double>(want.size() * batch));
        exact.magnitude[static_cast<size_t>(pair)] += 0.1;  // of the units that were subtracted
        total.add(0, exact.value[static_cast<size_t>(pair)] * attention.floats()[pair]);
        ++pair;
      }
  total.magnitude[0] += 1;
  compare(isa + " loss of maps", total, 0, loss.floats()[0]);
  for (int64_t i = 0; i < batch * 4; ++i) compare(isa + " distance of maps", exact, i, distance.floats()[i]);
  for (int64_t i = 0; i < batch * 19; ++i) failures += !std::isfinite(grad.floats()[i]);
}

void check_kd(const Setting& set, const std::string& isa, int64_t classes) {
  const int64_t batch = 3;
  const auto memory = [&](int64_t floats) { return Guarded(sizeof(float) * static_cast<size_t>(floats), set.side); };
  const Guarded student = memory(batch * classes), teacher = memory(batch * classes);
  const Guarded loss = memory(1), grad = memory(batch * classes);
  std::mt19937 generator(4);
  for (const Guarded* operand : {&student, &teacher})
    for (int64_t i = 0; i < batch * classes; ++i)
      operand->floats()[i] = std::uniform_real_distribution<float>(-5, 5)(generator);
  kernels().attention.kd_loss(
      {batch, classes, student.floats(), teacher.floats(), 2.0f, loss.floats(), grad.floats(), set.threads});
  Exact total(1), exact(batch * classes);
  for (int64_t b = 0; b < batch; ++b) {
    const float *x = student.floats() + b * classes, *y = teacher.floats() + b * classes;
    double q = 0, p = 0;
    for (int64_t i = 0; i < classes; ++i) q += std::exp(x[i] / 2.0), p += std::exp(y[i] / 2.0);
    for (int64_t i = 0; i < classes; ++i) {
      const double pi = std::exp(y[i] / 2.0) / p, qi = std::exp(x[i] / 2.0) / q;
      total.add(0, 4.0 / batch * pi * (std::log(pi) - std::log(qi)));
      exact.add(b * classes + i, 2.0 / batch * qi);
      exact.add(b * classes + i, -2.0 / batch * pi);
    }
  }
  total.magnitude[0] += 1;
  compare(isa + " kd", total, 0, loss.floats()[0]);
  for (int64_t i = 0; i < batch * classes; ++i) compare(isa + " kd gradient", exact, i, grad.floats()[i]);
}

void check_attention(const std::string& isa) {
  for (const Setting& set : {Setting{false, false, 1, Side::kEnd}, Setting{true, true, 2, Side::kEnd},
                             Setting{true, true, 1, Side::kBegin}, Setting{false, false, 3, Side::kBegin}}) {
    set_scratch_side(set.side);
    const auto same = [](float x) { return static_cast<double>(x); };
    const int64_t shapes[][3] = {{2, 20, 49}, {1, 5, 1}, {3, 64, 64}, {2, 3, 2500}, {1, 33, 15}};
    for (const auto& [batch, channels, pixels] : shapes) {
      check_maps<float>(set, Element::kFloat32, 0, isa, same, batch, channels, pixels);
      check_maps<uint16_t>(set, Element::kBfloat16, 4e-3, isa, from_bfloat16, batch, channels, pixels);
      check_maps<uint16_t>(set, Element::kFloat16, 5e-4, isa, from_float16, batch, channels, pixels);
    }
    check_match(set, isa);
    for (const int64_t classes : {1, 10, 100}) check_kd(set, isa, classes);
  }
}

}  // namespace

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) use_isa(argv[i]);  // throws, naming what there is
  for (const std::string& isa : available_isas()) {
    use_isa(isa);
    const int64_t before = compared;
    for (const Problem& problem : kProblems) check_problem(problem, isa.c_str());
    check_attention(isa);
    printf("%s: %ld elements compared\n", isa.c_str(), static_cast<long>(compared - before));
  }
  printf("%ld wrong, %ld buffers overrun\n", static_cast<long>(failures), static_cast<long>(Guarded::overruns()));
  return failures + Guarded::overruns() == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
