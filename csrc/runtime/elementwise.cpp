// What is computed number by number: functions of one tensor, and of two that broadcast.
#include "elementwise.h"

#include <cmath>
#include <cstring>
#include <map>

#include "../strips.h"
#include "moves.h"
#include "ops.h"
#include "strided.h"

namespace sparsekd {

namespace {

// In torch NaN stays NaN; comparisons are written so that it does.
float relu(float x) { return x < 0 ? 0.0f : x; }
float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }
float relu6(float x) { return clamp(x, 0, 6); }
float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }
float silu(float x) { return x / (1.0f + std::exp(-x)); }
float hardsigmoid(float x) { return clamp(x + 3.0f, 0, 6) / 6.0f; }
float hardswish(float x) { return x * clamp(x + 3.0f, 0, 6) / 6.0f; }
float gelu(float x) { return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752440f)); }
float gelu_tanh(float x) {
  return 0.5f * x * (1.0f + std::tanh(0.79788456080286535588f * (x + 0.044715f * x * x * x)));
}
float exponential(float x) { return std::exp(x); }
float hyperbolic(float x) { return std::tanh(x); }
float logarithm(float x) { return std::log(x); }
float logarithm_of_more(float x) { return std::log1p(x); }
float sign(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : 0.0f; }  // of NaN it is 0 in torch, too
float root(float x) { return std::sqrt(x); }
float inverse_root(float x) { return 1.0f / std::sqrt(x); }
float magnitude(float x) { return std::fabs(x); }
float negative(float x) { return -x; }
float square(float x) { return x * x; }

template <class T>
float read(T x) {
  return to_float(x);
}

template <class T>
T written(float x) {
  T y;
  convert(x, y);
  return y;
}

using Unary = void (*)(const void*, void*, int64_t);

template <class T, float (*F)(float)>
void apply(const void* from, void* to, int64_t count) {
  const T* const x = static_cast<const T*>(from);
  T* const y = static_cast<T*>(to);
  for (int64_t i = 0; i < count; ++i) y[i] = written<T>(F(read(x[i])));
}

struct UnaryOp {
  Unary of_float, of_bf16;
};

template <float (*F)(float)>
constexpr UnaryOp unary() {
  return {apply<float, F>, apply<Bfloat16, F>};
}

const std::map<std::string, UnaryOp, std::less<>>& unaries() {
  static const std::map<std::string, UnaryOp, std::less<>> table = {
      {"relu", unary<relu>()},           {"relu6", unary<relu6>()},     {"silu", unary<silu>()},
      {"hardswish", unary<hardswish>()}, {"sigmoid", unary<sigmoid>()}, {"hardsigmoid", unary<hardsigmoid>()},
      {"tanh", unary<hyperbolic>()},     {"gelu", unary<gelu>()},       {"gelu_tanh", unary<gelu_tanh>()},
      {"exp", unary<exponential>()},     {"log", unary<logarithm>()},   {"sqrt", unary<root>()},
      {"rsqrt", unary<inverse_root>()},  {"abs", unary<magnitude>()},   {"neg", unary<negative>()},
      {"square", unary<square>()},       {"sign", unary<sign>()},       {"log1p", unary<logarithm_of_more>()},
  };
  return table;
}

void unary_node(Compiler& compiler, const Node& node) {
  expect_counts(node, 1, 1);
  compiler.give(node.outputs[0], activated(compiler, node.op, compiler.of(node.inputs[0])));
}

// ---- Two operands

struct Add {
  template <class T>
  static T of(T a, T b) {
    return a + b;
  }
};
struct Subtract {
  template <class T>
  static T of(T a, T b) {
    return a - b;
  }
};
struct Multiply {
  template <class T>
  static T of(T a, T b) {
    return a * b;
  }
};
struct Divide {
  static float of(float a, float b) { return a / b; }
};
struct Maximum {
  template <class T>
  static T of(T a, T b) {
    return a > b || a != a ? a : b;
  }
};
struct Minimum {
  template <class T>
  static T of(T a, T b) {
    return a < b || a != a ? a : b;
  }
};

// Of int64 alone, which come as uint64.
struct Xor {
  static uint64_t of(uint64_t a, uint64_t b) { return a ^ b; }
};
struct ShiftRight {  // by more bits than there are, only the sign is left
  static uint64_t of(uint64_t a, uint64_t b) {
    return static_cast<uint64_t>(static_cast<int64_t>(a) >> (b < 63 ? b : 63));
  }
};
struct Remainder {  // with the sign of the divisor, as in Python; the divisor is not 0
  static uint64_t of(uint64_t a, uint64_t b) {
    const auto x = static_cast<int64_t>(a), y = static_cast<int64_t>(b);
    if (y == -1) return 0;
    const int64_t rest = x % y;
    return static_cast<uint64_t>(rest != 0 && (rest < 0) != (y < 0) ? rest + y : rest);
  }
};

using Binary = void (*)(const Walk<3>&, int threads, const void*, const void*, void*);

// Integers wrap as they do in torch.
template <class T>
auto operand_of(T x) {
  if constexpr (std::is_same_v<T, int64_t>)
    return static_cast<uint64_t>(x);
  else
    return read(x);
}

template <class T, class R>
T result_of(R x) {
  if constexpr (std::is_same_v<T, int64_t>)
    return static_cast<int64_t>(x);
  else
    return written<T>(x);
}

template <class T, class F>
void combine(const Walk<3>& walk, int threads, const void* a, const void* b, void* to) {
  const T *const first = static_cast<const T*>(a), *const second = static_cast<const T*>(b);
  T* const target = static_cast<T*>(to);
  for_each_row(walk, threads, [&](const auto& at, int64_t length, const auto& step) {
    const T *const x = first + at[0], *const z = second + at[1];
    T* const y = target + at[2];
    const auto loop = [&](int64_t x_step, int64_t z_step) {
      for (int64_t i = 0; i < length; ++i)
        y[i] = result_of<T>(F::of(operand_of(x[i * x_step]), operand_of(z[i * z_step])));
    };
    // The usual steps as constants, so that the loops are vectorised; the target is walked in its own order.
    if (step[2] != 1 && length > 1)
      for (int64_t i = 0; i < length; ++i)
        y[i * step[2]] = result_of<T>(F::of(operand_of(x[i * step[0]]), operand_of(z[i * step[1]])));
    else if (step[0] == 1 && step[1] == 1)
      loop(1, 1);
    else if (step[0] == 1 && step[1] == 0)
      loop(1, 0);
    else
      loop(step[0], step[1]);
  });
}

struct BinaryOp {
  Binary of_float, of_bf16, of_int64;
};

template <class F>
constexpr BinaryOp binary() {
  return {combine<float, F>, combine<Bfloat16, F>, combine<int64_t, F>};
}

const std::map<std::string, BinaryOp, std::less<>>& binaries() {
  static const std::map<std::string, BinaryOp, std::less<>> table = {
      {"add", binary<Add>()},
      {"sub", binary<Subtract>()},
      {"mul", binary<Multiply>()},
      {"div", {combine<float, Divide>, combine<Bfloat16, Divide>, nullptr}},
      {"max", {combine<float, Maximum>, combine<Bfloat16, Maximum>, nullptr}},
      {"min", {combine<float, Minimum>, combine<Bfloat16, Minimum>, nullptr}},
      {"xor", {nullptr, nullptr, combine<int64_t, Xor>}},
      {"shift_right", {nullptr, nullptr, combine<int64_t, ShiftRight>}},
      {"remainder", {nullptr, nullptr, combine<int64_t, Remainder>}},
  };
  return table;
}

Shape broadcast(const Shape& a, const Shape& b) {
  Shape shape;
  shape.rank = std::max(a.rank, b.rank);
  for (int i = 0; i < shape.rank; ++i) {
    const int64_t x = i < shape.rank - a.rank ? 1 : a.at(i - (shape.rank - a.rank));
    const int64_t y = i < shape.rank - b.rank ? 1 : b.at(i - (shape.rank - b.rank));
    expect(x == y || x == 1 || y == 1, to_string(a) + " and " + to_string(b) + " do not broadcast");
    shape.dims[static_cast<size_t>(i)] = x == 1 ? y : x;
  }
  return shape;
}

// Strides of an operand along the axes of what it is broadcast to.
Sizes broadcast_strides(const Operand& x, const Shape& shape, int64_t n) {
  const Sizes own = x.shape.strides(n, x.last);
  Sizes strides{};
  const int more = shape.rank - x.shape.rank;
  for (int i = 0; i < x.shape.rank; ++i)
    if (x.shape.at(i) != 1) strides[static_cast<size_t>(i + more)] = own[static_cast<size_t>(i)];
  return strides;
}

void expect_divisors(Compiler& compiler, int value) {
  const Value& divisors = compiler.graph().values[static_cast<size_t>(value)];
  expect(divisors.stored != nullptr, "its divisor has to be a constant");
  const auto* const given = reinterpret_cast<const int64_t*>(divisors.stored->data);
  for (int64_t i = 0; i < divisors.shape.elements(); ++i) expect(given[i] != 0, "it divides by 0");
}

void binary_node(Compiler& compiler, const Node& node) {
  expect_counts(node, 2, 1);
  const int a = compiler.of(node.inputs[0]), b = compiler.of(node.inputs[1]);
  const Operand first = compiler.operand(a), second = compiler.operand(b);
  expect(first.dtype == second.dtype,
         std::string("it joins ") + name_of(first.dtype) + " and " + name_of(second.dtype));
  const BinaryOp& op = binaries().at(node.op);
  const Binary run = first.dtype == DType::kFloat32    ? op.of_float
                     : first.dtype == DType::kBfloat16 ? op.of_bf16
                     : first.dtype == DType::kInt64    ? op.of_int64
                                                       : nullptr;
  expect(run != nullptr, std::string("it does not take ") + name_of(first.dtype));
  if (node.op == "remainder") expect_divisors(compiler, node.inputs[1]);
  const Shape shape = broadcast(first.shape, second.shape);
  // The layout of the larger operand, which is then walked as it lies.
  const bool last = (first.last && first.shape == shape) || (second.last && second.shape == shape);
  const int y = compiler.fresh(first.dtype, shape, last);
  const bool alike = first.shape == shape && first.last == last;
  compiler.step(
      {a, b}, {y},
      [=](const Frame& frame) {
        const Sizes sizes = shape.sizes(frame.n), to = shape.strides(frame.n, last);
        const Sizes x = broadcast_strides(first, shape, frame.n), z = broadcast_strides(second, shape, frame.n);
        const auto axes = axes_in_memory(shape.rank, last);
        Walk<3> walk;
        for (int i = 0; i < shape.rank; ++i) {
          const size_t axis = static_cast<size_t>(axes[static_cast<size_t>(i)]);
          walk.add(sizes[axis], {x[axis], z[axis], to[axis]});
        }
        run(walk, frame.threads, frame.at[a], frame.at[b], frame.at[y]);
      },
      alike ? a : -1);
  compiler.give(node.outputs[0], y);
}

}  // namespace

bool knows_activation(const std::string& name) { return unaries().count(name) != 0; }

int activated(Compiler& compiler, const std::string& name, int x) {
  const Operand from = compiler.operand(x);
  expect_float(from.dtype);
  const UnaryOp& op = unaries().at(name);
  const bool floats = from.dtype == DType::kFloat32;
  const Unary run = floats ? op.of_float : op.of_bf16;
  const int64_t size = size_of(from.dtype);
  const int y = compiler.fresh(from.dtype, from.shape, from.last);
  compiler.step(
      {x}, {y},
      [=](const Frame& frame) {
        constexpr int64_t kPiece = 1 << 13;
        const int64_t count = from.shape.elements() * (from.shape.batched() ? frame.n : 1);
        parallel(frame.threads, (count + kPiece - 1) / kPiece, [&](int64_t piece) {
          const int64_t first = piece * kPiece;
          run(frame.at[x] + first * size, frame.at[y] + first * size, std::min(kPiece, count - first));
        });
      },
      x);
  return y;
}

void add_elementwise(OpTable& table) {
  for (const auto& [name, _] : unaries()) table[name] = unary_node;
  for (const auto& [name, _] : binaries()) table[name] = binary_node;
}

}  // namespace sparsekd
