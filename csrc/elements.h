// The element types of tensors. Plain data only; kernel_table.h says why.
#pragma once

#include <cstdint>

namespace sparsekd {

struct Bfloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// Elements of a feature map; sums are float whatever they are.
enum class Element : int32_t { kFloat32, kBfloat16, kFloat16 };

}  // namespace sparsekd
