// Tensors of a network: element types, and shapes with one size that is known only when it runs.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "json.h"

namespace sparsekd {

enum class DType : int32_t { kFloat32, kBfloat16, kInt8, kUint8, kInt32, kInt64 };

int64_t size_of(DType dtype);
const char* name_of(DType dtype);
DType dtype_named(const std::string& name);  // as in numpy and torch: "float32"

constexpr int kMaxRank = 8;
constexpr int64_t kMostElements = int64_t{1} << 40;  // of a tensor, for one sample

using Sizes = std::array<int64_t, kMaxRank>;

// A size of -k is k times the batch of the call.
struct Shape {
  int rank = 0;
  Sizes dims{};

  bool operator==(const Shape& other) const;
  bool batched() const;                                // whether one of its sizes follows the batch
  bool leads() const;                                  // whether that is the first one, and none of the others
  int64_t elements() const;                            // for a batch of one
  Sizes sizes(int64_t n) const;                        // for a batch of n
  Sizes strides(int64_t n, bool channels_last) const;  // in elements
  int64_t at(int axis) const { return dims[static_cast<size_t>(axis)]; }
};

Shape shape_of(std::initializer_list<int64_t> dims);
std::string to_string(const Shape& shape);  // "[N, 3, 32, 32]"
// From a list of numbers, of which one at most follows the batch and none is larger than a tensor.
Shape read_shape(const Json& sizes);
void check_shape(const Shape& shape);

}  // namespace sparsekd
