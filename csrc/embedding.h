// Embeddings as the bindings see them: a table and ids in, checked ids to a kernel call out.
#pragma once

#include "embedding_kernels.h"

namespace sparsekd {

// All throw std::out_of_range, which Python sees as IndexError, for ids that are no row of the table and for places that
// are none of its entries. T: float, Bfloat16, Float16 or int8_t.
template <class T>
void embedding(const EmbeddingLookup<T>& args);
template <class T>
void embedding_bag(const EmbeddingBag<T>& args);
template <class T>
void embedding_top_k(const EmbeddingTopK<T>& args);
void embedding_grad(const EmbeddingGrad& args);
void embedding_rows_grad(const EmbeddingRowsGrad& args);
void embedding_absent(const EmbeddingAbsent& args);

// Throw std::invalid_argument, which Python sees as ValueError, unless offsets [bags + 1] rise from 0 to `count`.
void check_offsets(const int64_t* offsets, int64_t bags, int64_t count);

// scale[i] = 1 / how many ids of its bag are not `padding` (an id, or -1): what makes the mean of a sum. Offsets are
// checked.
struct EmbeddingBagScale {
  const int64_t* ids;      // [count]
  const int64_t* offsets;  // [bags + 1]
  int64_t count, bags, padding;
  float* scale;  // [count]
};
void embedding_bag_scale(const EmbeddingBagScale& args);

enum class EmbeddingOptimizer { kSgd, kAdagrad, kAdagradRows, kAdam };
void embedding_update(EmbeddingOptimizer optimizer, const EmbeddingUpdate& args);

void embedding_magnitudes(const EmbeddingMagnitudes& args);
void embedding_thin(const EmbeddingThin& args);
void embedding_repack(const EmbeddingRepack& args);

}  // namespace sparsekd
