#include "strips.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace sparsekd {
namespace {

// The kernels follow the index blindly, so one pass over it (nnzb integers) stands between a wrong index and a read
// past the input. pybind11 turns std::invalid_argument into ValueError.
void check_index(const BlockWeight& w) {
  const int64_t block_rows = (w.rows + w.bh - 1) / w.bh;
  bool rises = w.row_ptr[0] == 0 && w.row_ptr[block_rows] == w.nnzb;
  for (int64_t i = 0; i < block_rows; ++i) rises &= w.row_ptr[i] <= w.row_ptr[i + 1];
  if (!rises) throw std::invalid_argument("sparsekd: row_ptr must rise from 0 to nnzb = " + std::to_string(w.nnzb));
  const int64_t column_blocks = w.taps * ((w.columns + w.bw - 1) / w.bw);
  // Bit 31 of column or of last - column, where either is negative: without a branch, so that it becomes vectors.
  const uint32_t last = static_cast<uint32_t>(column_blocks) - 1;
  uint32_t outside = 0;
  for (int64_t block = 0; block < w.nnzb; ++block) {
    const uint32_t column = static_cast<uint32_t>(w.col_idx[block]);
    outside |= column | (last - column);
  }
  if (outside >> 31 != 0)
    throw std::invalid_argument("sparsekd: col_idx must lie in [0, " + std::to_string(column_blocks) +
                                ") for this input; the weight belongs to a layer with more inputs");
}

// Rows of the strip that begins at `row` which really exist, and the group of a row of blocks.
int32_t lanes_from(const BlockWeight& w, int64_t row) {
  return static_cast<int32_t>(std::clamp<int64_t>(w.rows - row, 0, kStripRows));
}
int32_t group_of(const BlockWeight& w, int64_t block_row) {
  return static_cast<int32_t>(block_row * w.bh / (w.rows / w.groups));
}

}  // namespace

void StripSet::build(const BlockWeight& weight) {
  check_index(weight);
  strips_.clear();
  columns_.clear();
  rows_.clear();
  in_place_ = tall(weight) && weight.bw == weight.depth && weight.columns % weight.depth == 0;
  in_place_ ? build_in_place(weight) : tall(weight) ? build_tall(weight) : build_packed(weight);
  view_.strip = strips_.data();
  view_.count = static_cast<int32_t>(strips_.size());
}

void StripSet::build_in_place(const BlockWeight& w) {
  const int64_t block_rows = (w.rows + w.bh - 1) / w.bh;
  for (int64_t i = 0; i < block_rows; ++i)
    for (int64_t row = i * w.bh; row < (i + 1) * w.bh; row += kStripRows)
      strips_.push_back({.weights = w.row_ptr[i] * w.bh + row - i * w.bh,
                         .first = w.row_ptr[i],
                         .count = w.row_ptr[i + 1] - w.row_ptr[i],
                         .lanes = lanes_from(w, row),
                         .group = group_of(w, i),
                         .row = static_cast<int32_t>(row),
                         .rows = nullptr});
  view_.weight_stride = w.bh;
  view_.num_weights = w.nnzb * w.bh;
  view_.columns = w.col_idx;
  view_.num_columns = w.nnzb;
}

void StripSet::add_columns(const BlockWeight& w, int64_t i) {
  const int64_t column_blocks = (w.columns + w.bw - 1) / w.bw;
  for (int32_t block = w.row_ptr[i]; block < w.row_ptr[i + 1]; ++block) {
    const int64_t tap = w.col_idx[block] / column_blocks, c = w.col_idx[block] % column_blocks * w.bw;
    for (int64_t word = c / w.depth; word * w.depth < std::min(c + w.bw, w.columns); ++word) {
      const int32_t column = static_cast<int32_t>(tap * w.words() + word);
      if (taken_[column]) continue;
      taken_[column] = true;
      columns_.push_back(column);
    }
  }
}

void StripSet::build_tall(const BlockWeight& w) {
  const int64_t block_rows = (w.rows + w.bh - 1) / w.bh;
  int64_t weights = 0;
  size_columns(w);
  for (int64_t i = 0; i < block_rows; ++i) {
    const size_t first = columns_.size();
    add_columns(w, i);
    for (size_t j = first; j < columns_.size(); ++j) taken_[columns_[j]] = false;
    const int32_t count = static_cast<int32_t>(columns_.size() - first);
    for (int64_t row = i * w.bh; row < (i + 1) * w.bh; row += kStripRows, weights += count * kStripRows)
      strips_.push_back({.weights = weights,
                         .first = static_cast<int32_t>(first),
                         .count = count,
                         .lanes = lanes_from(w, row),
                         .group = group_of(w, i),
                         .row = static_cast<int32_t>(row),
                         .rows = nullptr});
  }
  view_packed(weights);
}

void StripSet::build_packed(const BlockWeight& w) {
  const int64_t group_rows = w.rows / w.groups;
  size_columns(w);
  std::vector<int32_t> empty;
  for (int64_t group = 0; group < w.groups; ++group) {
    for (int64_t row = group * group_rows; row < (group + 1) * group_rows; ++row) {
      const int64_t i = row / w.bh;
      if (w.row_ptr[i] == w.row_ptr[i + 1]) {
        empty.push_back(static_cast<int32_t>(row));
        continue;
      }
      open_.push_back(static_cast<int32_t>(row));
      if (open_.size() == kStripRows) close_strip(w, static_cast<int32_t>(group));
    }
    close_strip(w, static_cast<int32_t>(group));
  }
  // Rows without blocks still get their bias.
  for (const int32_t row : empty) {
    open_.push_back(row);
    if (open_.size() == kStripRows) close_strip(w, 0);
  }
  close_strip(w, 0);
  for (size_t s = 0; s < strips_.size(); ++s) {
    const int32_t* rows = rows_.data() + s * kStripRows;
    bool contiguous = true;
    for (int32_t lane = 1; lane < strips_[s].lanes; ++lane) contiguous &= rows[lane] == rows[0] + lane;
    strips_[s].rows = contiguous ? nullptr : rows;
  }
  view_packed(static_cast<int64_t>(columns_.size()) * kStripRows);
}

void StripSet::size_columns(const BlockWeight& w) {
  const size_t columns = static_cast<size_t>(w.taps * w.words());
  taken_.assign(columns, false);
  position_.resize(columns);
}

void StripSet::view_packed(int64_t num_weights) {
  view_.weight_stride = kStripRows;
  view_.num_weights = num_weights;
  view_.columns = columns_.data();
  view_.num_columns = static_cast<int64_t>(columns_.size());
}

void StripSet::close_strip(const BlockWeight& w, int32_t group) {
  if (open_.empty()) return;
  const size_t first = columns_.size();
  int64_t previous = -1;
  for (const int32_t row : open_) {
    const int64_t i = row / w.bh;
    if (i == previous) continue;
    previous = i;
    add_columns(w, i);
  }
  for (size_t j = first; j < columns_.size(); ++j) taken_[columns_[j]] = false;
  std::sort(columns_.begin() + static_cast<std::ptrdiff_t>(first), columns_.end());
  strips_.push_back({.weights = static_cast<int64_t>(first) * kStripRows,
                     .first = static_cast<int32_t>(first),
                     .count = static_cast<int32_t>(columns_.size() - first),
                     .lanes = static_cast<int32_t>(open_.size()),
                     .group = group,
                     .row = open_[0],
                     .rows = nullptr});
  open_.resize(kStripRows, -1);
  rows_.insert(rows_.end(), open_.begin(), open_.end());
  open_.clear();
}

}  // namespace sparsekd
