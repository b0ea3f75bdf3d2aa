// Every kernel of every instruction set of this CPU against plain double loops, between guard pages. No Python, no
// torch: it runs under sanitizers and under qemu-user (.ci/kernels). Arguments: instruction sets that must be there.
//
// To add an op: a check_<op>(const Problem&, ...) that computes the answer with `each_product` or by hand, runs the op
// through the functions of the headers (conv2d.h), compares with `compare`; and a line in `check_problem`. Its operands
// are Guarded, its outputs start as NaN. Other number formats bring their own operands and their own tolerance. To add a
// case: a line with the suite "kernels" in tests/conv2d_cases.txt.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "dispatch.h"
#include "network.h"
#include "problems.h"

using namespace sparsekd;

namespace {

int64_t flat(const Problem& l, int64_t n, int64_t k, int64_t y, int64_t x) {
  return ((n * l.k + k) * l.p() + y) * l.q() + x;
}

constexpr Activation kActivations[] = {Activation::kNone,    Activation::kRelu,      Activation::kRelu6,
                                       Activation::kSilu,    Activation::kHardswish, Activation::kHardsigmoid,
                                       Activation::kSigmoid, Activation::kGelu,      Activation::kGeluTanh};

double activate(double v, Activation activation) {
  const double steps = std::fmin(std::fmax(v + 3, 0), 6);
  switch (activation) {
    case Activation::kNone:
      return v;
    case Activation::kSilu:
      return v / (1 + std::exp(-v));
    case Activation::kHardswish:
      return v * steps / 6;
    case Activation::kHardsigmoid:
      return steps / 6;
    case Activation::kSigmoid:
      return 1 / (1 + std::exp(-v));
    case Activation::kGelu:
      return v * std::erfc(-v / std::sqrt(2.0)) / 2;
    case Activation::kGeluTanh:
      return v * (1 + std::tanh(0.7978845608028654 * (v + 0.044715 * v * v * v))) / 2;
    default:
      return std::fmin(std::fmax(v, 0), activation == Activation::kRelu6 ? 6 : HUGE_VAL);
  }
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
      double& magnitude = all.magnitude[static_cast<size_t>(i)];
      value = activate(value, activation);
      magnitude = std::max(magnitude, std::fabs(value));  // a sigmoid of next to nothing is rounded as a half is
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
    for (const Activation activation : kActivations) {
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
    for (const Activation activation : kActivations) {
      const Image y(l.n, l.k, l.p(), l.q(), true, set.side);
      const PackedDepthwise packed(l.shape(), dense.floats(), bias.floats(), activation);
      packed.run(with_images(packed.geometry(), l.n), x.in().data, dy.in().data, y.out().data, set.threads);
      expect(" depthwise", fused(products(), activation), y);
    }
  }

  // Pooling over this layer's window, in slices of one image, through a buffer that a pool of one pixel reads.
  void pools() const {
    if (l.groups != l.c || l.k != l.c || !set.x_last || !set.y_last) return;
    Conv2dShape pixel = l.shape();
    pixel.geometry = {.n = l.n, .c = l.k, .h = l.p(), .w = l.q(), .k = l.k, .p = l.p(), .q = l.q(), .groups = l.k};
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
      network.add(pool_layer<float>(l.shape(), mean), {0}, 2);
      network.add(pool_layer<float>(pixel, false), {2}, 1);
      const auto address = [](const float* p) { return reinterpret_cast<std::uintptr_t>(p); };
      network.run({address(x.in().data), address(y.out().data)}, l.n, 1, set.threads);
      expect(mean ? " mean" : " max", exact, y);
    }
  }

  // A gate for every channel of dy with dy as the residual too, a layer norm of its pixels, and both side by side.
  void between() const {
    const int64_t pixels = l.p() * l.q(), maps = l.n * l.k;
    const auto address = [](const float* p) { return reinterpret_cast<std::uintptr_t>(p); };
    const Guarded gates(sizeof(float) * static_cast<size_t>(maps), set.side);
    for (int64_t i = 0; i < maps; ++i) gates.floats()[i] = bias.floats()[i % l.k];
    for (const Activation activation : {Activation::kNone, Activation::kGelu}) {
      const Image y(l.n, l.k, l.p(), l.q(), set.y_last, set.side);
      Network network({{0, 0, l.k * pixels * 4}, {1, 0, l.k * 4}, {2, 0, l.k * pixels * 4}}, 0);
      network.add(gate_layer<float>(pixels, l.k, set.y_last, activation), {0, 1, 0}, 2);
      network.run({address(dy.in().data), address(gates.floats()), address(y.out().data)}, l.n, 0, set.threads);
      Exact exact(maps * pixels);
      each_output([&](int64_t n, int64_t k, int64_t oy, int64_t ox) {
        const double x = dy.at(n, k, oy, ox);
        exact.add(flat(l, n, k, oy, ox), x * bias.floats()[k]);
        exact.add(flat(l, n, k, oy, ox), x);
        double& value = exact.value[static_cast<size_t>(flat(l, n, k, oy, ox))];
        value = activate(value, activation);
      });
      expect(" gate", exact, y);
    }
    if (!set.y_last) return;
    const Image y(l.n, l.k, l.p(), l.q(), true, set.side);
    const Guarded joined(2 * y.memory().bytes(), set.side);
    const int64_t bytes = l.k * pixels * 4;
    Network network({{0, 0, bytes}, {1, 0, bytes}, {2, 0, 2 * bytes}}, 0);
    network.add(layer_norm_layer<float>(pixels, l.k, bias.floats(), bias.floats(), 0.5f), {0}, 1);
    network.add(join_layer(pixels, {l.k * 4, l.k * 4}), {1, 0}, 2);
    network.run({address(dy.in().data), address(y.out().data), address(joined.floats())}, l.n, 0, set.threads);
    Exact exact(maps * pixels);
    each_output([&](int64_t n, int64_t k, int64_t oy, int64_t ox) {
      double mean = 0, variance = 0.5;
      for (int64_t i = 0; i < l.k; ++i) mean += dy.at(n, i, oy, ox) / double(l.k);
      for (int64_t i = 0; i < l.k; ++i) variance += std::pow(dy.at(n, i, oy, ox) - mean, 2) / double(l.k);
      const int64_t i = flat(l, n, k, oy, ox), pixel = (n * l.p() + oy) * l.q() + ox;
      exact.add(i, (dy.at(n, k, oy, ox) - mean) / std::sqrt(variance) * bias.floats()[k]);
      exact.add(i, bias.floats()[k]);
      exact.magnitude[static_cast<size_t>(i)] += 1;
      const float* const both = joined.floats() + pixel * 2 * l.k + k;
      if (both[0] != y.at(n, k, oy, ox) || both[l.k] != dy.at(n, k, oy, ox)) compare(name + " join", exact, i, NAN);
    });
    expect(" layer norm", exact, y);
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

// A name as avx512_vnni is that of an instruction set with other kernels for bf16 or int8, and no others.
bool is_variant(const std::string& isa) { return isa.find('_') != std::string::npos; }

void check_problem(const Problem& problem, const std::string& isa) {
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
    const Check check(problem, setting, isa.c_str(), random);
    check.bf16();
    check.forward_int8();
    if (is_variant(isa)) continue;
    check.forward();
    check.depthwise();
    check.pools();
    check.between();
    check.grad_input();
    check.grad_values();
  }
}

}  // namespace

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) use_isa(argv[i]);  // throws, naming what there is
  const std::vector<Problem> problems = read_problems();
  for (const std::string& isa : available_isas()) {
    use_isa(isa);
    const int64_t before = compared();
    for (const Problem& problem : problems) check_problem(problem, isa);
    if (!is_variant(isa)) {
      check_attention(isa);
      check_norm_relu(isa);
      check_embedding(isa);
      check_embedding_training(isa);
    }
    printf("%s: %ld elements compared\n", isa.c_str(), static_cast<long>(compared() - before));
  }
  printf("%ld wrong, %ld buffers overrun\n", static_cast<long>(failures()), static_cast<long>(Guarded::overruns()));
  return failures() + Guarded::overruns() == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
