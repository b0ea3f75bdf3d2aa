#include "tensor.h"

#include <algorithm>

namespace sparsekd {

namespace {

struct Known {
  DType dtype;
  const char* name;
  int64_t size;
};
constexpr Known kKnown[] = {{DType::kFloat32, "float32", 4}, {DType::kBfloat16, "bfloat16", 2},
                            {DType::kInt8, "int8", 1},       {DType::kUint8, "uint8", 1},
                            {DType::kInt32, "int32", 4},     {DType::kInt64, "int64", 8}};

}  // namespace

int64_t size_of(DType dtype) { return kKnown[static_cast<int>(dtype)].size; }
const char* name_of(DType dtype) { return kKnown[static_cast<int>(dtype)].name; }

DType dtype_named(const std::string& name) {
  for (const Known& one : kKnown)
    if (name == one.name) return one.dtype;
  throw FormatError("it has tensors of the type '" + name + "', which this version does not know");
}

bool Shape::operator==(const Shape& other) const {
  return rank == other.rank && std::equal(dims.begin(), dims.begin() + rank, other.dims.begin());
}

bool Shape::batched() const {
  return std::any_of(dims.begin(), dims.begin() + rank, [](int64_t size) { return size < 0; });
}

bool Shape::leads() const {
  return rank > 0 && dims[0] < 0 &&
         std::all_of(dims.begin() + 1, dims.begin() + rank, [](int64_t d) { return d >= 0; });
}

int64_t Shape::elements() const {
  int64_t count = 1;
  for (int i = 0; i < rank; ++i) count *= std::abs(at(i));
  return count;
}

Sizes Shape::sizes(int64_t n) const {
  Sizes sizes = dims;
  for (int i = 0; i < rank; ++i)
    if (at(i) < 0) sizes[static_cast<size_t>(i)] = -at(i) * n;
  return sizes;
}

Sizes Shape::strides(int64_t n, bool channels_last) const {
  const Sizes size = sizes(n);
  Sizes strides{};
  int64_t step = 1;
  const auto place = [&](int axis) {
    strides[static_cast<size_t>(axis)] = step;
    step *= size[static_cast<size_t>(axis)];
  };
  if (channels_last) {
    for (int axis : {1, 3, 2, 0}) place(axis);
  } else {
    for (int axis = rank - 1; axis >= 0; --axis) place(axis);
  }
  return strides;
}

Shape shape_of(std::initializer_list<int64_t> dims) {
  Shape shape;
  for (int64_t size : dims) shape.dims[static_cast<size_t>(shape.rank++)] = size;
  return shape;
}

std::string to_string(const Shape& shape) {
  std::string text = "[";
  for (int i = 0; i < shape.rank; ++i) {
    const int64_t size = shape.at(i);
    text += i ? ", " : "";
    text += size >= 0 ? std::to_string(size) : size == -1 ? "N" : std::to_string(-size) + "N";
  }
  return text + "]";
}

void check_shape(const Shape& shape) {
  int64_t count = 1, batched = 0;
  for (int i = 0; i < shape.rank; ++i) {
    const int64_t size = std::abs(shape.at(i));
    batched += shape.at(i) < 0;
    if (size > kMostElements || (size != 0 && count > kMostElements / size))
      throw FormatError("it has a tensor of the shape " + to_string(shape) + ", which is too large");
    count *= std::max<int64_t>(size, 1);
  }
  if (batched > 1) throw FormatError("it has a tensor of the shape " + to_string(shape) + ", with the batch twice");
}

Shape read_shape(const Json& sizes) {
  Shape shape;
  if (sizes.array().size() > kMaxRank)
    throw FormatError("it has a tensor of " + std::to_string(sizes.array().size()) + " dimensions; at most " +
                      std::to_string(kMaxRank) + " are known");
  for (const Json& size : sizes.array())
    shape.dims[static_cast<size_t>(shape.rank++)] = size.integer(-kMostElements, kMostElements);
  check_shape(shape);
  return shape;
}

}  // namespace sparsekd
