// From the stored blocks of a weight to the strips the kernels walk, and back for gradients.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "conv2d_kernels.h"

namespace sparsekd {

// A block-sparse weight [rows, taps * columns]: `values` [nnzb, bh, bw] with block column tap * ceil(columns / bw) + cb.
struct BlockWeight {
  const int32_t* row_ptr;
  const int32_t* col_idx;
  int64_t nnzb, bh, bw;
  int64_t rows, columns, taps, groups;
  int64_t depth = 1;  // neighbouring columns that share a 32-bit word of a strip

  int64_t words() const { return (columns + depth - 1) / depth; }
};

// Blocks of 16 m x depth already are strips: their values are used where they lie. All other shapes are packed: blocks
// of 16 m rows as m strips, lower ones as 16 rows that have any blocks, the union of their columns, zeros where one of
// them lacks a column.
class StripSet {
 public:
  void build(const BlockWeight& weight);

  const Strips& strips() const { return view_; }
  // True when `values` itself holds the strips' weights.
  bool in_place() const { return in_place_; }
  // values [nnzb, bh, bw] to strip weights [num_weights] words of `depth` packed elements; needed when not in place, or
  // when the two types differ.
  template <class T, class Packed>
  void pack(const BlockWeight& weight, const T* values, Packed* packed);
  // And back from floats, when not in place or when the two types differ. `depth` is 1.
  template <class T>
  void unpack(const BlockWeight& weight, const float* packed, T* values);

 private:
  void build_in_place(const BlockWeight& weight);
  void build_tall(const BlockWeight& weight);
  void build_packed(const BlockWeight& weight);
  void close_strip(const BlockWeight& weight, int32_t group);
  void size_columns(const BlockWeight& weight);
  void view_packed(int64_t num_weights);                   // of columns_
  void add_columns(const BlockWeight& weight, int64_t i);  // of block row i, those that the strip being built lacks
  template <class Visit>
  void visit(const BlockWeight& weight, const Visit& body);

  static bool tall(const BlockWeight& weight) { return weight.bh % kStripRows == 0; }

  bool in_place_ = false;
  Strips view_{};
  std::vector<Strip> strips_;
  std::vector<int32_t> columns_;
  std::vector<int32_t> rows_;      // [strips][16]
  std::vector<int32_t> open_;      // rows of the strip being built
  std::vector<uint8_t> taken_;     // column -> whether the strip being built has it
  std::vector<int32_t> position_;  // column -> where the strip being visited has it
};

inline float to_float(float value) { return value; }
inline float to_float(Bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline void convert(float from, float& to) { to = from; }
inline void convert(int8_t from, int8_t& to) { to = from; }
inline void convert(int8_t from, int16_t& to) { to = from; }
inline void convert(Bfloat16 from, Bfloat16& to) { to = from; }
inline void convert(Bfloat16 from, float& to) { to = to_float(from); }
inline void convert(float from, Bfloat16& to) {  // to nearest even
  uint32_t bits;
  std::memcpy(&bits, &from, sizeof bits);
  to.bits = static_cast<uint16_t>(from == from ? (bits + 0x7fffu + (bits >> 16 & 1)) >> 16 : 0x7fc0u);
}

template <class T, class Packed>
void StripSet::pack(const BlockWeight& weight, const T* values, Packed* packed) {
  if (in_place_) {
    for (int64_t i = 0; i < view_.num_weights * weight.depth; ++i) convert(values[i], packed[i]);
    return;
  }
  std::fill_n(packed, view_.num_weights * weight.depth, Packed{});
  visit(weight, [&](int64_t value, int64_t at) { convert(values[value], packed[at]); });
}

template <class T>
void StripSet::unpack(const BlockWeight& weight, const float* packed, T* values) {
  if (in_place_) {
    for (int64_t i = 0; i < view_.num_weights; ++i) convert(packed[i], values[i]);
    return;
  }
  std::fill_n(values, weight.nnzb * weight.bh * weight.bw, T{});
  visit(weight, [&](int64_t value, int64_t at) { convert(packed[at], values[value]); });
}

// Calls body(index into values, index into the elements of the strip weights) for every weight that exists.
template <class Visit>
void StripSet::visit(const BlockWeight& w, const Visit& body) {
  const int64_t column_blocks = (w.columns + w.bw - 1) / w.bw;
  for (size_t s = 0; s < strips_.size(); ++s) {
    const Strip& strip = strips_[s];
    const int32_t* columns = columns_.data() + strip.first;
    for (int32_t j = 0; j < strip.count; ++j) position_[columns[j]] = j;
    if (tall(w)) {  // one row of blocks: lanes are the inner loop
      const int64_t i = strip.row / w.bh, inside = strip.row % w.bh;
      for (int32_t block = w.row_ptr[i]; block < w.row_ptr[i + 1]; ++block) {
        const int64_t tap = w.col_idx[block] / column_blocks, c = w.col_idx[block] % column_blocks * w.bw;
        for (int64_t j = c; j < std::min(c + w.bw, w.columns); ++j) {
          const int64_t value = (block * w.bh + inside) * w.bw + j - c;
          const int64_t word = strip.weights + position_[tap * w.words() + j / w.depth] * kStripRows;
          for (int32_t lane = 0; lane < strip.lanes; ++lane)
            body(value + lane * w.bw, (word + lane) * w.depth + j % w.depth);
        }
      }
      continue;
    }
    for (int32_t lane = 0; lane < strip.lanes; ++lane) {
      const int64_t row = rows_[s * kStripRows + lane], i = row / w.bh;
      for (int32_t block = w.row_ptr[i]; block < w.row_ptr[i + 1]; ++block) {
        const int64_t tap = w.col_idx[block] / column_blocks, c = w.col_idx[block] % column_blocks * w.bw;
        const int64_t value = (block * w.bh + row % w.bh) * w.bw;
        for (int64_t j = c; j < std::min(c + w.bw, w.columns); ++j) {
          const int64_t word = strip.weights + position_[tap * w.words() + j / w.depth] * kStripRows + lane;
          body(value + j - c, word * w.depth + j % w.depth);
        }
      }
    }
  }
}

}  // namespace sparsekd
