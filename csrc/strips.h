// From the stored blocks of a weight to the strips the kernels walk, and back for gradients.
#pragma once

#include <vector>

#include "kernel_table.h"

namespace sparsekd {

// A block-sparse weight [rows, taps * columns]: `values` [nnzb, bh, bw] with block column tap * ceil(columns / bw) +
// cb.
struct BlockWeight {
  const int32_t* row_ptr;
  const int32_t* col_idx;
  int64_t nnzb, bh, bw;
  int64_t rows, columns, taps, groups;
};

// Blocks of 16 m x 1 already are strips: their values are used where they lie. All other shapes are packed: 16 rows
// that have any blocks, the union of their columns, zeros where one of them lacks a column.
class StripSet {
 public:
  void build(const BlockWeight& weight);

  const Strips& strips() const { return view_; }
  // True when `values` itself holds the strips' weights.
  bool in_place() const { return in_place_; }
  // values [nnzb, bh, bw] <-> strip weights [num_weights]; only needed when not in place.
  void pack(const BlockWeight& weight, const float* values, float* packed);
  void unpack(const BlockWeight& weight, const float* packed, float* values);

 private:
  void build_in_place(const BlockWeight& weight);
  void build_packed(const BlockWeight& weight);
  void close_strip(const BlockWeight& weight, int32_t group);
  template <class Visit>
  void visit(const BlockWeight& weight, const Visit& body);

  bool in_place_ = false;
  Strips view_{};
  std::vector<Strip> strips_;
  std::vector<int32_t> columns_;
  std::vector<int32_t> rows_;  // [strips][16]
  std::vector<int32_t> open_;  // rows of the strip being built
  std::vector<int32_t> slot_;  // column -> position in the current strip
};

}  // namespace sparsekd
