#include "moves.h"

#include <cstring>
#include <numeric>

#include "../strips.h"
#include "ops.h"
#include "strided.h"

namespace sparsekd {

std::array<int, kMaxRank> axes_in_memory(int rank, bool last) {
  std::array<int, kMaxRank> axes{};
  std::iota(axes.begin(), axes.end(), 0);
  if (last && rank == 4) axes = {0, 2, 3, 1};
  return axes;
}

namespace {

// Elements of any type, by their size.
template <class T>
void copy_rows(const Walk<2>& walk, int threads, const void* from, void* to) {
  const T* const x = static_cast<const T*>(from);
  T* const y = static_cast<T*>(to);
  for_each_row(walk, threads, [&](const auto& at, int64_t length, const auto& step) {
    const T* const source = x + at[0];
    T* const target = y + at[1];
    if (step[0] == 1 && step[1] == 1)
      std::memcpy(target, source, sizeof(T) * static_cast<size_t>(length));
    else
      for (int64_t i = 0; i < length; ++i) target[i * step[1]] = source[i * step[0]];
  });
}

void copy_elements(int64_t size, const Walk<2>& walk, int threads, const void* from, void* to) {
  switch (size) {
    case 1:
      return copy_rows<uint8_t>(walk, threads, from, to);
    case 2:
      return copy_rows<uint16_t>(walk, threads, from, to);
    case 4:
      return copy_rows<uint32_t>(walk, threads, from, to);
    default:
      return copy_rows<uint64_t>(walk, threads, from, to);
  }
}

// A copy of `sizes` elements between two tensors that are walked with these strides.
Walk<2> walk_of(const Shape& shape, bool last, const Sizes& sizes, const Sizes& from, const Sizes& to) {
  Walk<2> walk;
  const auto axes = axes_in_memory(shape.rank, last);
  for (int i = 0; i < shape.rank; ++i) {
    const size_t axis = static_cast<size_t>(axes[static_cast<size_t>(i)]);
    walk.add(sizes[axis], {from[axis], to[axis]});
  }
  return walk;
}

void reshape(Compiler& compiler, const Node& node) {
  expect_counts(node, 1, 1);
  const int x = compiler.of(node.inputs[0], Layout::kRowMajor);
  const Shape from = compiler.operand(x).shape;
  const Shape to = compiler.graph().values[static_cast<size_t>(node.outputs[0])].shape;
  expect(from.batched() == to.batched() && from.elements() == to.elements(),
         "it cannot make " + to_string(to) + " of " + to_string(from));
  compiler.give(node.outputs[0], compiler.reinterpret(x, to));
}

void permute(Compiler& compiler, const Node& node) {
  expect_counts(node, 1, 1);
  const int x = compiler.of(node.inputs[0]);
  const Operand from = compiler.operand(x);
  const auto& order = node.attributes.at("order").array();
  expect(order.size() == static_cast<size_t>(from.shape.rank), "its order has another number of axes than its input");
  std::array<size_t, kMaxRank> axes{};
  std::array<bool, kMaxRank> seen{};
  Shape shape = from.shape;
  for (size_t i = 0; i < order.size(); ++i) {
    axes[i] = static_cast<size_t>(order[i].integer(0, from.shape.rank - 1));
    expect(!seen[axes[i]], "its order has an axis twice");
    seen[axes[i]] = true;
    shape.dims[i] = from.shape.dims[axes[i]];
  }
  const int y = compiler.fresh(from.dtype, shape);
  compiler.step({x}, {y}, [=, size = size_of(from.dtype)](const Frame& frame) {
    const Sizes strides = from.shape.strides(frame.n, from.last);
    Sizes permuted{};
    for (int i = 0; i < shape.rank; ++i) permuted[static_cast<size_t>(i)] = strides[axes[static_cast<size_t>(i)]];
    const Walk<2> walk = walk_of(shape, false, shape.sizes(frame.n), permuted, shape.strides(frame.n, false));
    copy_elements(size, walk, frame.threads, frame.at[x], frame.at[y]);
  });
  compiler.give(node.outputs[0], y);
}

void concat(Compiler& compiler, const Node& node) {
  expect(!node.inputs.empty() && node.outputs.size() == 1, "it takes one operand or more and makes one");
  std::vector<int> parts;
  bool last = true;
  for (int value : node.inputs) last &= compiler.operand(compiler.of(value)).last;
  for (int value : node.inputs) parts.push_back(compiler.of(value, last ? Layout::kChannelsLast : Layout::kRowMajor));
  const Operand first = compiler.operand(parts[0]);
  const size_t axis = static_cast<size_t>(axis_of(node.attributes.at("axis"), first.shape.rank));
  Shape shape = first.shape;
  shape.dims[axis] = 0;
  for (int part : parts) {
    const Operand& one = compiler.operand(part);
    Shape other = one.shape;
    const bool alike = one.shape.rank == shape.rank && one.dtype == first.dtype &&
                       (one.shape.dims[axis] < 0) == (first.shape.dims[axis] < 0);
    if (alike) other.dims[axis] = first.shape.dims[axis];
    expect(alike && other == first.shape,
           "it joins " + to_string(first.shape) + " and " + to_string(one.shape) + ", which do not fit");
    shape.dims[axis] += one.shape.dims[axis];
  }
  if (shape.dims[axis] < 0) compiler.mixes_samples();
  const int y = compiler.fresh(first.dtype, shape, last);
  std::vector<Shape> shapes;
  for (int part : parts) shapes.push_back(compiler.operand(part).shape);
  compiler.step(parts, {y}, [=, size = size_of(first.dtype)](const Frame& frame) {
    const Sizes to = shape.strides(frame.n, last);
    char* target = frame.at[y];
    for (size_t i = 0; i < parts.size(); ++i) {
      const Sizes sizes = shapes[i].sizes(frame.n);
      const Walk<2> walk = walk_of(shape, last, sizes, shapes[i].strides(frame.n, last), to);
      copy_elements(size, walk, frame.threads, frame.at[parts[i]], target);
      target += sizes[axis] * to[axis] * size;
    }
  });
  compiler.give(node.outputs[0], y);
}

void slice(Compiler& compiler, const Node& node) {
  expect_counts(node, 1, 1);
  const int x = compiler.of(node.inputs[0]);
  const Operand from = compiler.operand(x);
  const size_t axis = static_cast<size_t>(axis_of(node.attributes.at("axis"), from.shape.rank));
  const int64_t length = from.shape.dims[axis];
  expect(length >= 0, "it cuts along the batch");
  const int64_t start = node.attributes.at("start").integer(0, length);
  const int64_t stop = node.attributes.at("stop").integer(start, length);
  const int64_t by = node.attributes.at("step").integer(1, kMostElements);
  Shape shape = from.shape;
  shape.dims[axis] = (stop - start + by - 1) / by;
  const int y = compiler.fresh(from.dtype, shape, from.last);
  compiler.step({x}, {y}, [=, size = size_of(from.dtype)](const Frame& frame) {
    Sizes strides = from.shape.strides(frame.n, from.last);
    const char* const source = frame.at[x] + start * strides[axis] * size;
    strides[axis] *= by;
    const Walk<2> walk = walk_of(shape, from.last, shape.sizes(frame.n), strides, shape.strides(frame.n, from.last));
    copy_elements(size, walk, frame.threads, source, frame.at[y]);
  });
  compiler.give(node.outputs[0], y);
}

void expand(Compiler& compiler, const Node& node) {
  expect_counts(node, 1, 1);
  const int x = compiler.of(node.inputs[0], Layout::kRowMajor);
  const Operand from = compiler.operand(x);
  const Shape shape = compiler.graph().values[static_cast<size_t>(node.outputs[0])].shape;
  bool fits = from.shape.rank <= shape.rank;
  const int more = shape.rank - from.shape.rank;
  for (int i = 0; fits && i < from.shape.rank; ++i)
    fits = from.shape.at(i) == shape.at(i + more) || from.shape.at(i) == 1;
  expect(fits, "it cannot repeat " + to_string(from.shape) + " to " + to_string(shape));
  const int y = compiler.fresh(from.dtype, shape);
  compiler.step({x}, {y}, [=, size = size_of(from.dtype)](const Frame& frame) {
    const Sizes given = from.shape.strides(frame.n, false);
    Sizes strides{};
    for (int i = 0; i < from.shape.rank; ++i)
      if (from.shape.at(i) != 1) strides[static_cast<size_t>(i + more)] = given[static_cast<size_t>(i)];
    const Walk<2> walk = walk_of(shape, false, shape.sizes(frame.n), strides, shape.strides(frame.n, false));
    copy_elements(size, walk, frame.threads, frame.at[x], frame.at[y]);
  });
  compiler.give(node.outputs[0], y);
}

// Zeros around a tensor; before and after: elements along every axis.
void pad(Compiler& compiler, const Node& node) {
  expect_counts(node, 1, 1);
  const int x = compiler.of(node.inputs[0]);
  const Operand from = compiler.operand(x);
  const auto &before = node.attributes.at("before").array(), &after = node.attributes.at("after").array();
  expect(before.size() == static_cast<size_t>(from.shape.rank) && after.size() == before.size(),
         "it pads another number of axes than its input has");
  Shape shape = from.shape;
  Sizes skip{};
  for (size_t i = 0; i < before.size(); ++i) {
    skip[i] = before[i].integer(0, 1 << 30);
    const int64_t more = skip[i] + after[i].integer(0, 1 << 30);
    expect(more == 0 || shape.dims[i] >= 0, "it pads along the batch");
    shape.dims[i] += more;
  }
  const int y = compiler.fresh(from.dtype, shape, from.last);
  compiler.step({x}, {y}, [=, size = size_of(from.dtype)](const Frame& frame) {
    const Sizes to = shape.strides(frame.n, from.last), sizes = from.shape.sizes(frame.n);
    int64_t offset = 0;
    for (int i = 0; i < shape.rank; ++i) offset += skip[static_cast<size_t>(i)] * to[static_cast<size_t>(i)];
    const int64_t samples = shape.batched() ? frame.n : 1;
    std::memset(frame.at[y], 0, static_cast<size_t>(shape.elements() * samples * size));
    const Walk<2> walk = walk_of(shape, from.last, sizes, from.shape.strides(frame.n, from.last), to);
    copy_elements(size, walk, frame.threads, frame.at[x], frame.at[y] + offset * size);
  });
  compiler.give(node.outputs[0], y);
}

// The elements of an axis at given places, which are constants.
void take(Compiler& compiler, const Node& node) {
  expect_counts(node, 2, 1);
  const int x = compiler.of(node.inputs[0], Layout::kRowMajor);
  const Operand from = compiler.operand(x);
  const size_t axis = static_cast<size_t>(axis_of(node.attributes.at("axis"), from.shape.rank));
  const Value& index = compiler.graph().values[static_cast<size_t>(node.inputs[1])];
  expect(index.stored != nullptr && index.dtype == DType::kInt64 && index.shape.rank == 1,
         "its places have to be a constant list of int64");
  const int64_t length = from.shape.dims[axis], count = index.shape.at(0);
  expect(length >= 0, "it picks along the batch");
  const auto* const given = reinterpret_cast<const int64_t*>(index.stored->data);
  std::vector<int64_t> places(given, given + count);
  for (int64_t place : places) expect(place >= 0 && place < length, "it picks at a place that does not exist");
  Shape shape = from.shape;
  shape.dims[axis] = count;
  const int y = compiler.fresh(from.dtype, shape);
  compiler.step({x}, {y}, [=, size = size_of(from.dtype), places = std::move(places)](const Frame& frame) {
    Sizes sizes = shape.sizes(frame.n);
    sizes[axis] = 1;
    const Sizes source = from.shape.strides(frame.n, false), to = shape.strides(frame.n, false);
    const Walk<2> walk = walk_of(shape, false, sizes, source, to);
    for (size_t i = 0; i < places.size(); ++i)
      copy_elements(size, walk, frame.threads, frame.at[x] + places[i] * source[axis] * size,
                    frame.at[y] + static_cast<int64_t>(i) * to[axis] * size);
  });
  compiler.give(node.outputs[0], y);
}

template <class X, class Y>
void cast_elements(const void* from, void* to, int64_t count) {
  const X* const x = static_cast<const X*>(from);
  Y* const y = static_cast<Y*>(to);
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (std::is_same_v<X, Bfloat16> || std::is_same_v<Y, Bfloat16>)
      convert(x[i], y[i]);
    else
      y[i] = static_cast<Y>(x[i]);
  }
}

using Cast = void (*)(const void*, void*, int64_t);

Cast cast_between(DType from, DType to) {
  const auto is = [&](DType x, DType y) { return from == x && to == y; };
  if (is(DType::kFloat32, DType::kBfloat16)) return cast_elements<float, Bfloat16>;
  if (is(DType::kBfloat16, DType::kFloat32)) return cast_elements<Bfloat16, float>;
  if (is(DType::kInt32, DType::kInt64)) return cast_elements<int32_t, int64_t>;
  if (is(DType::kInt64, DType::kInt32)) return cast_elements<int64_t, int32_t>;
  if (is(DType::kInt32, DType::kFloat32)) return cast_elements<int32_t, float>;
  if (is(DType::kInt64, DType::kFloat32)) return cast_elements<int64_t, float>;
  if (is(DType::kUint8, DType::kFloat32)) return cast_elements<uint8_t, float>;
  throw FormatError(std::string("it cannot make ") + name_of(to) + " of " + name_of(from));
}

void cast(Compiler& compiler, const Node& node) {
  expect_counts(node, 1, 1);
  const int x = compiler.of(node.inputs[0]);
  const Operand from = compiler.operand(x);
  const DType dtype = dtype_named(node.attributes.at("dtype").string());
  const Cast cast = cast_between(from.dtype, dtype);
  const int y = compiler.fresh(dtype, from.shape, from.last);
  const int64_t sizes[] = {size_of(from.dtype), size_of(dtype)};
  compiler.step({x}, {y}, [=](const Frame& frame) {
    const int64_t count = from.shape.elements() * (from.shape.batched() ? frame.n : 1);
    constexpr int64_t kPiece = 1 << 15;
    parallel(frame.threads, (count + kPiece - 1) / kPiece, [&](int64_t piece) {
      const int64_t first = piece * kPiece;
      cast(frame.at[x] + first * sizes[0], frame.at[y] + first * sizes[1], std::min(kPiece, count - first));
    });
  });
  compiler.give(node.outputs[0], y);
}

}  // namespace

void copy_operand(Compiler& compiler, int from, int to) {
  const Operand x = compiler.operand(from), y = compiler.operand(to);
  compiler.step({from}, {to}, [=, size = size_of(x.dtype)](const Frame& frame) {
    const Walk<2> walk = walk_of(y.shape, y.last, y.shape.sizes(frame.n), x.shape.strides(frame.n, x.last),
                                 y.shape.strides(frame.n, y.last));
    copy_elements(size, walk, frame.threads, frame.at[from], frame.at[to]);
  });
}

void add_moves(OpTable& table) {
  table["reshape"] = reshape;
  table["permute"] = permute;
  table["concat"] = concat;
  table["slice"] = slice;
  table["expand"] = expand;
  table["pad"] = pad;
  table["take"] = take;
  table["cast"] = cast;
}

}  // namespace sparsekd
