// Walking over several tensors at once, whatever their layouts: row by row along the innermost dimension.
#pragma once

#include <algorithm>
#include <array>

#include "../parallel_impl.h"
#include "tensor.h"

namespace sparsekd {

// Dimensions from the outermost; strides in elements, 0 where a tensor repeats.
template <int K>
struct Walk {
  int rank = 0;
  Sizes size{};
  std::array<Sizes, K> stride{};

  void add(int64_t length, const std::array<int64_t, K>& strides) {
    if (length == 1) return;
    const size_t last = static_cast<size_t>(rank) - 1;
    bool joins = rank > 0;
    for (size_t k = 0; joins && k < K; ++k) joins = stride[k][last] == strides[k] * length;
    const size_t at = joins ? last : static_cast<size_t>(rank++);
    size[at] = joins ? size[at] * length : length;
    for (size_t k = 0; k < K; ++k) stride[k][at] = strides[k];
  }

  int64_t elements() const {
    int64_t count = 1;
    for (int i = 0; i < rank; ++i) count *= size[static_cast<size_t>(i)];
    return count;
  }
};

// Calls body(offsets, length, strides) for every row; rows are shared by threads where there is enough to do.
template <int K, class Body>
void for_each_row(const Walk<K>& walk, int threads, const Body& body) {
  constexpr int64_t kWorth = 1 << 15;  // elements that are worth waking a thread for
  const int64_t elements = walk.elements();
  if (elements == 0) return;
  const size_t inner = walk.rank > 0 ? static_cast<size_t>(walk.rank) - 1 : 0;
  const int64_t length = walk.rank > 0 ? walk.size[inner] : 1, rows = elements / length;
  std::array<int64_t, K> step{};
  for (size_t k = 0; k < K; ++k) step[k] = walk.rank > 0 ? walk.stride[k][inner] : 0;
  const int64_t worth = std::clamp<int64_t>(elements / kWorth, 1, int64_t{4} * threads);
  if (rows == 1) {
    parallel(threads, worth, [&](int64_t piece) {
      const int64_t first = length * piece / worth, end = length * (piece + 1) / worth;
      std::array<int64_t, K> offset{};
      for (size_t k = 0; k < K; ++k) offset[k] = first * step[k];
      body(offset, end - first, step);
    });
    return;
  }
  const int64_t pieces = std::min(rows, worth);
  parallel(threads, pieces, [&](int64_t piece) {
    const int64_t first = rows * piece / pieces, end = rows * (piece + 1) / pieces;
    Sizes at{};
    std::array<int64_t, K> offset{};
    int64_t rest = first;
    for (size_t i = inner; i-- > 0;) {
      at[i] = rest % walk.size[i];
      rest /= walk.size[i];
      for (size_t k = 0; k < K; ++k) offset[k] += at[i] * walk.stride[k][i];
    }
    for (int64_t row = first; row < end; ++row) {
      body(offset, length, step);
      for (size_t i = inner; i-- > 0;) {
        for (size_t k = 0; k < K; ++k) offset[k] += walk.stride[k][i];
        if (++at[i] < walk.size[i]) break;
        for (size_t k = 0; k < K; ++k) offset[k] -= at[i] * walk.stride[k][i];
        at[i] = 0;
      }
    }
  });
}

}  // namespace sparsekd
