// A random packed table beside the dense rows that it stands for, in memory that is guarded against reads beyond it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "check.h"
#include "embedding.h"

namespace sparsekd {

template <class T>
Guarded guarded(const std::vector<T>& values, Side side) {
  Guarded memory(values.size() * sizeof(T), side);
  if (!values.empty()) memcpy(memory.floats(), values.data(), memory.bytes());
  return memory;
}

template <class T>
T* at(const Guarded& memory) {
  return reinterpret_cast<T*>(memory.floats());
}

// A random table; every seventh row keeps nothing, every eleventh everything.
struct Table {
  int64_t rows, dim;
  std::vector<float> dense;
  std::vector<int64_t> place;  // of a dense entry among the values, -1: not kept
  Guarded kept, base, counts, values;

  template <class Random>
  Table(int64_t rows, int64_t dim, Random& random, Side side)
      : rows(rows), dim(dim), dense(static_cast<size_t>(rows * dim)), place(static_cast<size_t>(rows * dim), -1) {
    std::vector<uint64_t> bits(static_cast<size_t>(rows * ((dim + 63) / 64)));
    std::vector<int64_t> bases;
    std::vector<uint8_t> sizes(static_cast<size_t>((rows + 63) / 64 * 64));
    std::vector<float> packed;
    for (int64_t row = 0; row < rows; ++row) {
      if (row % kRowsOfBase == 0) bases.push_back(static_cast<int64_t>(packed.size()));
      const size_t before = packed.size();
      for (int64_t d = 0; d < dim; ++d) {
        if (row % 7 == 3 || (row % 11 != 0 && random() > -0.6f)) continue;
        const size_t entry = static_cast<size_t>(row * dim + d);
        bits[static_cast<size_t>(row * ((dim + 63) / 64) + d / 64)] |= uint64_t{1} << d % 64;
        place[entry] = static_cast<int64_t>(packed.size());
        // What bfloat16 can hold, so that all types share one answer.
        packed.push_back(std::round(random() * 64) / 64);
        dense[entry] = packed.back();
      }
      sizes[static_cast<size_t>(row)] = static_cast<uint8_t>(std::min<size_t>(255, packed.size() - before));
    }
    kept = guarded(bits, side);
    base = guarded(bases, side);
    counts = guarded(sizes, side);
    values = guarded(packed, side);
  }

  int64_t size() const { return static_cast<int64_t>(values.bytes() / sizeof(float)); }
  double entry(int64_t row, int64_t d) const { return dense[static_cast<size_t>(row * dim + d)]; }
  EmbeddingTable table() const {
    return {
        .rows = rows, .dim = dim, .kept = at<uint64_t>(kept), .base = at<int64_t>(base), .counts = at<uint8_t>(counts)};
  }
  // The values in a half type, which holds all of them exactly.
  template <class Half>
  Guarded halves(Side side) const {
    std::vector<Half> halves;
    for (int64_t i = 0; i < size(); ++i) halves.push_back(half<Half>(values.floats()[i]));
    return guarded(halves, side);
  }

  template <class Half>
  static Half half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if constexpr (std::is_same_v<Half, Bfloat16>) return {static_cast<uint16_t>(bits >> 16)};
    if (value == 0) return {0};
    return {
        static_cast<uint16_t>((bits >> 16 & 0x8000u) | (((bits >> 23 & 0xffu) - 112u) << 10) | (bits >> 13 & 0x3ffu))};
  }
};

}  // namespace sparsekd
