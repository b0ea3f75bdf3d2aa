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

// What rows of a table of T come out as: T itself, but floats of int8_t, which a scale for each row belongs to.
template <class T>
struct EmbeddingOut {
  using Type = T;
};
template <>
struct EmbeddingOut<int8_t> {
  using Type = float;
};

// out[i] = row ids[i]. T: float, Bfloat16, Float16 or int8_t.
template <class T>
struct EmbeddingLookup {
  EmbeddingTable table;
  const T* values;
  const float* row_scale;  // [rows] for int8_t, else null
  const int64_t* ids;
  int64_t count;
  typename EmbeddingOut<T>::Type* out;  // [count, dim]
  int threads;
};

// out[b] = sum of scale[i] * row ids[i] over the i from offsets[b] to offsets[b + 1] whose id is not `padding`.
template <class T>
struct EmbeddingBag {
  EmbeddingTable table;
  const T* values;
  const float* row_scale;  // [rows] for int8_t, else null
  const int64_t* ids;
  const int64_t* offsets;               // [bags + 1]
  const float* scale;                   // [ids], or null: 1
  int64_t bags, padding;                // padding: an id, or -1
  typename EmbeddingOut<T>::Type* out;  // [bags, dim]
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
template <class T>
struct EmbeddingTopK {
  EmbeddingTable table;
  const T* values;
  const float* row_scale;  // [rows] for int8_t, else null
  const float* queries;    // [count, dim]
  int64_t count, k;
  const int64_t* excluded_begin;  // [count + 1], or null
  const int64_t* excluded;        // ascending for each query
  float* scores;                  // [count, k]
  int64_t* ids;                   // [count, k]
  int threads;
};

// The gradient of the rows that a batch touches, and of no others: of row rows[r], which keeps the entries
// places[begin[r] .. begin[r + 1]), the sums of scale[i] * grad[source[i]] over i = order[first[r] .. first[r + 1]).
struct EmbeddingRowsGrad {
  EmbeddingTable table;
  const float* grad;      // [any, dim]
  const int64_t* rows;    // [count], ascending
  const int64_t* first;   // [count + 1]
  const int64_t* order;   // [first[count]]
  const int64_t* source;  // of an id, or null: itself
  const float* scale;     // of an id, or null: 1
  const int64_t* begin;   // [count + 1]
  int64_t count;
  int64_t* places;  // [begin[count]], ascending
  float* sums;      // [begin[count]]
  int threads;
};

// One step of an optimizer on the kept entries at `places`, which are ascending; of the state what the optimizer has.
struct EmbeddingUpdate {
  EmbeddingTable table;   // only for state that rows share
  const int64_t* places;  // [count]
  const float* grad;      // [count]
  int64_t count, num_values;
  float* values;  // [num_values]
  float* mean;    // Adam: of gradients [num_values]
  float* square;  // Adam: mean of squares, Adagrad: sum of squares [num_values]; of a whole row [rows]
  uint16_t*
      occurred;  // Adam: steps that a row took part in [rows]; stays at its highest number, which counts as infinite
  float lr, beta1, beta2, eps, decay;
  int threads;
};

// Magnitudes of the kept entries; infinite for the first largest one of each row, which is to stay.
struct EmbeddingMagnitudes {
  EmbeddingTable table;
  const float* values;
  float* magnitudes;
  int threads;
};

// target = kept without the entries whose `stays` is 0.
struct EmbeddingThin {
  EmbeddingTable table;
  const uint8_t* stays;  // [values]
  uint64_t* target;      // [rows][ceil(dim / 64)]
  int threads;
};

// Values of one table to their places in another one of as many rows: of the entries that both keep. What is new in
// `to` is left as it is.
struct EmbeddingRepack {
  EmbeddingTable from, to;
  const void* source;
  void* target;
  int64_t bytes;  // of a value: 1, 2, 4 or 8
  int threads;
};

struct EmbeddingKernels {
  void (*lookup_f32)(const EmbeddingLookup<float>&);
  void (*lookup_bf16)(const EmbeddingLookup<Bfloat16>&);
  void (*lookup_f16)(const EmbeddingLookup<Float16>&);
  void (*lookup_i8)(const EmbeddingLookup<int8_t>&);
  void (*bag_f32)(const EmbeddingBag<float>&);
  void (*bag_bf16)(const EmbeddingBag<Bfloat16>&);
  void (*bag_f16)(const EmbeddingBag<Float16>&);
  void (*bag_i8)(const EmbeddingBag<int8_t>&);
  void (*grad)(const EmbeddingGrad&);
  void (*absent)(const EmbeddingAbsent&);
  void (*top_k_f32)(const EmbeddingTopK<float>&);
  void (*top_k_bf16)(const EmbeddingTopK<Bfloat16>&);
  void (*top_k_f16)(const EmbeddingTopK<Float16>&);
  void (*top_k_i8)(const EmbeddingTopK<int8_t>&);
  void (*rows_grad)(const EmbeddingRowsGrad&);
  void (*sgd)(const EmbeddingUpdate&);
  void (*adagrad)(const EmbeddingUpdate&);
  void (*adagrad_rows)(const EmbeddingUpdate&);
  void (*adam)(const EmbeddingUpdate&);
  void (*magnitudes)(const EmbeddingMagnitudes&);
  void (*thin)(const EmbeddingThin&);
  void (*repack)(const EmbeddingRepack&);
};

}  // namespace sparsekd
