// Embeddings as the bindings see them: a table and ids in, checked ids to a kernel call out.
#pragma once

#include "embedding_kernels.h"

namespace sparsekd {

// All throw std::out_of_range, which Python sees as IndexError, for ids that are no row of the table.
template <class T>
void embedding(const EmbeddingLookup<T>& args);
template <class T>
void embedding_bag(const EmbeddingBag<T>& args);
void embedding_grad(const EmbeddingGrad& args);
void embedding_absent(const EmbeddingAbsent& args);
void embedding_top_k(const EmbeddingTopK& args);

}  // namespace sparsekd
