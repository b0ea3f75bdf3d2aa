// What the kernels of embeddings are given. Plain data only; kernel_table.h says why.
#pragma once

#include "elements.h"

namespace sparsekd {

constexpr int64_t kRowsOfBase = 64;  // rows that share a base

// A table [rows, dim] of which every row keeps some dimensions (`kept`, one bit each, dimension i of a row in bit i % 64
// of its word i / 64); their values lie packed, row after row. A row begins at base[row / 64] plus the counts of the rows
// before it in its 64: eight bytes for 64 rows and one for each, which stay in the cache where an offset a row would not.
struct EmbeddingTable {
  int64_t rows, dim;
  const uint64_t* kept;   // [rows][ceil(dim / 64)]
  const int64_t* base;    // [ceil(rows / 64)]
  const uint8_t* counts;  // [64 ceil(rows / 64)] kept dimensions of a row; 255 stands for 255 and more
};

// out[i] = row ids[i]. T: float, Bfloat16 or Float16, of values and out.
template <class T>
struct EmbeddingLookup {
  EmbeddingTable table;
  const T* values;
  const int64_t* ids;
  int64_t count;
  T* out;  // [count, dim]
  int threads;
};

// out[b] = sum of scale[i] * row ids[i] over the i from offsets[b] to offsets[b + 1] whose id is not `padding`.
template <class T>
struct EmbeddingBag {
  EmbeddingTable table;
  const T* values;
  const int64_t* ids;
  const int64_t* offsets;  // [bags + 1]
  const float* scale;      // [ids], or null: 1
  int64_t bags, padding;   // padding: an id, or -1
  T* out;                  // [bags, dim]
  int threads;
};

// grad_values = of every kept entry the sum of scale[i] * grad[source[i]] over the i with its row's id; ids of `padding`
// are left out.
struct EmbeddingGrad {
  EmbeddingTable table;
  const float* grad;      // [any, dim]
  const int64_t* ids;     // [count]
  const int64_t* source;  // [count], or null: i
  const float* scale;     // [count], or null: 1
  int64_t count, padding, num_values;
  float* grad_values;  // [num_values], overwritten
  int threads;
};

// total[i] += grad[i] in the dimensions that row ids[i] does not keep, or += |grad[i]|.
struct EmbeddingAbsent {
  EmbeddingTable table;
  const float* grad;   // [count, dim]
  const int64_t* ids;  // [count]
  int64_t count;
  bool absolute;
  float* total;  // [count, dim]
  int threads;
};

// Of every query the k rows of largest product, the larger one first, the smaller id first among equals. Rows that
// `excluded` names are left out; a place that no row is left for holds -infinity and id -1.
struct EmbeddingTopK {
  EmbeddingTable table;
  const float* values;
  const float* queries;  // [count, dim]
  int64_t count, k;
  const int64_t* excluded_begin;  // [count + 1], or null
  const int64_t* excluded;        // ascending for each query
  float* scores;                  // [count, k]
  int64_t* ids;                   // [count, k]
  int threads;
};

struct EmbeddingKernels {
  void (*lookup_f32)(const EmbeddingLookup<float>&);
  void (*lookup_bf16)(const EmbeddingLookup<Bfloat16>&);
  void (*lookup_f16)(const EmbeddingLookup<Float16>&);
  void (*bag_f32)(const EmbeddingBag<float>&);
  void (*bag_bf16)(const EmbeddingBag<Bfloat16>&);
  void (*bag_f16)(const EmbeddingBag<Float16>&);
  void (*grad)(const EmbeddingGrad&);
  void (*absent)(const EmbeddingAbsent&);
  void (*top_k)(const EmbeddingTopK&);
};

}  // namespace sparsekd
