// Sums, means and maxima over axes, softmax, layer norms.
#include <cmath>
#include <limits>

#include "../network.h"
#include "../strips.h"
#include "moves.h"
#include "ops.h"
#include "strided.h"

namespace sparsekd {

namespace {

enum class Reduction { kSum, kMean, kMax };

template <class T>
float reduced(Reduction kind, const Walk<1>& inside, const T* x) {
  double sum = 0;
  float most = -std::numeric_limits<float>::infinity();
  for_each_row(inside, 1, [&](const auto& at, int64_t length, const auto& step) {
    const T* const row = x + at[0];
    if (kind == Reduction::kMax)
      for (int64_t i = 0; i < length; ++i) {
        const float value = to_float(row[i * step[0]]);
        most = value > most || value != value ? value : most;  // NaN stays, since nothing is more
      }
    else
      for (int64_t i = 0; i < length; ++i) sum += to_float(row[i * step[0]]);
  });
  if (kind == Reduction::kMax) return most;
  return static_cast<float>(kind == Reduction::kMean ? sum / static_cast<double>(inside.elements()) : sum);
}

template <class T>
void reduce(Reduction kind, const Walk<2>& outside, const Walk<1>& inside, int threads, const void* from, void* to) {
  const T* const x = static_cast<const T*>(from);
  T* const y = static_cast<T*>(to);
  for_each_row(outside, threads, [&](const auto& at, int64_t length, const auto& step) {
    for (int64_t i = 0; i < length; ++i)
      convert(reduced(kind, inside, x + at[0] + i * step[0]), y[at[1] + i * step[1]]);
  });
}

std::array<bool, kMaxRank> axes_of(const Json& axes, int rank) {
  std::array<bool, kMaxRank> among{};
  for (const Json& axis : axes.array()) {
    bool& one = among[static_cast<size_t>(axis_of(axis, rank))];
    expect(!one, "it has an axis twice");
    one = true;
  }
  return among;
}

template <Reduction kKind>
void reduce_node(Compiler& compiler, const Node& node) {
  expect_counts(node, 1, 1);
  const int x = compiler.of(node.inputs[0]);
  const Operand from = compiler.operand(x);
  expect_float(from.dtype);
  const auto among = axes_of(node.attributes.at("axes"), from.shape.rank);
  const bool keep = node.attributes.at("keepdim").boolean();
  Shape shape;
  for (int i = 0; i < from.shape.rank; ++i) {
    const bool gone = among[static_cast<size_t>(i)];
    expect(!gone || from.shape.at(i) > 0, "it reduces the batch, or an axis that is empty");
    if (!gone || keep) shape.dims[static_cast<size_t>(shape.rank++)] = gone ? 1 : from.shape.at(i);
  }
  const int y = compiler.fresh(from.dtype, shape);
  compiler.step({x}, {y}, [=](const Frame& frame) {
    const Sizes sizes = from.shape.sizes(frame.n), strides = from.shape.strides(frame.n, from.last);
    const Sizes to = shape.strides(frame.n, false);
    Walk<2> outside;
    Walk<1> inside;
    int place = 0;
    for (size_t i = 0; i < static_cast<size_t>(from.shape.rank); ++i) {
      const size_t at = static_cast<size_t>(place);
      if (!among[i]) outside.add(sizes[i], {strides[i], to[at]});
      place += !among[i] || keep;
    }
    for (int axis : axes_in_memory(from.shape.rank, from.last))
      if (const size_t i = static_cast<size_t>(axis); axis < from.shape.rank && among[i])
        inside.add(sizes[i], {strides[i]});
    const auto run = from.dtype == DType::kFloat32 ? reduce<float> : reduce<Bfloat16>;
    run(kKind, outside, inside, frame.threads, frame.at[x], frame.at[y]);
  });
  compiler.give(node.outputs[0], y);
}

// Of `count` numbers that lie `step` apart.
template <class T>
void softmax_row(const T* x, T* y, int64_t count, int64_t step) {
  float most = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < count; ++i) {
    const float value = to_float(x[i * step]);
    most = value > most || value != value ? value : most;
  }
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float value = std::exp(to_float(x[i * step]) - most);
    sum += value;
  }
  for (int64_t i = 0; i < count; ++i)
    convert(static_cast<float>(std::exp(to_float(x[i * step]) - most) / sum), y[i * step]);
}

void softmax_node(Compiler& compiler, const Node& node) {
  expect_counts(node, 1, 1);
  const int x = compiler.of(node.inputs[0]);
  const Operand from = compiler.operand(x);
  expect_float(from.dtype);
  const int axis = axis_of(node.attributes.at("axis"), from.shape.rank);
  const int64_t count = from.shape.at(axis);
  expect(count > 0, "it takes the softmax over the batch, or over an axis that is empty");
  const int y = compiler.fresh(from.dtype, from.shape, from.last);
  compiler.step({x}, {y}, [=](const Frame& frame) {
    const Sizes sizes = from.shape.sizes(frame.n), strides = from.shape.strides(frame.n, from.last);
    Walk<1> outside;
    for (int one : axes_in_memory(from.shape.rank, from.last))
      if (one < from.shape.rank && one != axis)
        outside.add(sizes[static_cast<size_t>(one)], {strides[static_cast<size_t>(one)]});
    const int64_t apart = strides[static_cast<size_t>(axis)];
    for_each_row(outside, frame.threads, [&](const auto& at, int64_t length, const auto& step) {
      for (int64_t i = 0; i < length; ++i) {
        const int64_t place = at[0] + i * step[0];
        if (from.dtype == DType::kFloat32)
          softmax_row(frame.address<const float>(x) + place, frame.address<float>(y) + place, count, apart);
        else
          softmax_row(frame.address<const Bfloat16>(x) + place, frame.address<Bfloat16>(y) + place, count, apart);
      }
    });
  });
  compiler.give(node.outputs[0], y);
}

// A constant of a norm as floats, or `blank` where it has none.
std::vector<float> numbers(const Compiler& compiler, const Node& node, size_t place, const Operand& x,
                           const Shape& normed, float blank) {
  if (node.inputs.size() == 1) return std::vector<float>(static_cast<size_t>(normed.elements()), blank);
  const Value& value = compiler.graph().values[static_cast<size_t>(node.inputs[place])];
  expect(value.stored != nullptr && value.dtype == x.dtype && value.shape == normed,
         "its scale or shift is no constant of the shape " + to_string(normed));
  std::vector<float> all;
  for (int64_t i = 0; i < normed.elements(); ++i)
    all.push_back(x.dtype == DType::kFloat32 ? reinterpret_cast<const float*>(value.stored->data)[i]
                                             : to_float(reinterpret_cast<const Bfloat16*>(value.stored->data)[i]));
  return all;
}

// Operands: x, and where they are there scale and shift of its last `axes` axes, constants.
void layer_norm_node(Compiler& compiler, const Node& node) {
  const size_t given = node.inputs.size();
  expect((given == 1 || given == 3) && node.outputs.size() == 1, "it takes x, or x, scale and shift, and makes one");
  const int x = compiler.of(node.inputs[0], Layout::kRowMajor);
  const Operand from = compiler.operand(x);
  expect_float(from.dtype);
  const int axes = static_cast<int>(node.attributes.at("axes").integer(1, from.shape.rank));
  const double eps = node.attributes.at("eps").number();
  expect(eps >= 0 && eps < 1, "its eps is no small number");
  Shape normed;
  for (int i = from.shape.rank - axes; i < from.shape.rank; ++i)
    normed.dims[static_cast<size_t>(normed.rank++)] = from.shape.at(i);
  const int64_t count = normed.elements();
  expect(!normed.batched() && count > 0 && count < 1 << 26, "it normalises over the batch, over nothing or too much");
  const std::vector<float> scale = numbers(compiler, node, 1, from, normed, 1.0f);
  const std::vector<float> shift = numbers(compiler, node, 2, from, normed, 0.0f);
  const auto make = from.dtype == DType::kFloat32 ? layer_norm_layer<float> : layer_norm_layer<Bfloat16>;
  const NetworkLayer layer = make(1, count, scale.data(), shift.data(), static_cast<float>(eps));
  const int y = compiler.fresh(from.dtype, from.shape);
  compiler.step({x}, {y}, [=](const Frame& frame) {
    const void* const in = frame.at[x];
    layer.run(from.shape.elements() / count * (from.shape.batched() ? frame.n : 1), &in, frame.at[y], frame.threads);
  });
  compiler.give(node.outputs[0], y);
}

}  // namespace

void add_reductions(OpTable& table) {
  table["sum"] = reduce_node<Reduction::kSum>;
  table["mean"] = reduce_node<Reduction::kMean>;
  table["amax"] = reduce_node<Reduction::kMax>;
  table["softmax"] = softmax_node;
  table["layer_norm"] = layer_norm_node;
}

}  // namespace sparsekd
