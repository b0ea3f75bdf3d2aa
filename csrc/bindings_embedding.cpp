#include "bindings.h"
#include "embedding.h"

namespace sparsekd {

namespace {

template <class T>
void def_embedding(py::module_& m, const char* lookup, const char* bag) {
  m.def(
      lookup,
      [](const EmbeddingTable& table, Address values, Address ids, int64_t count, Address out_, int threads) {
        py::gil_scoped_release release;
        embedding<T>({.table = table,
                      .values = in<T>(values),
                      .ids = in<int64_t>(ids),
                      .count = count,
                      .out = out<T>(out_),
                      .threads = threads});
      },
      "table"_a, "values"_a, "ids"_a, "count"_a, "out"_a, "threads"_a);
  m.def(
      bag,
      [](const EmbeddingTable& table, Address values, Address ids, Address offsets, Address scale, int64_t bags,
         int64_t padding, Address out_, int threads) {
        py::gil_scoped_release release;
        embedding_bag<T>({.table = table,
                          .values = in<T>(values),
                          .ids = in<int64_t>(ids),
                          .offsets = in<int64_t>(offsets),
                          .scale = in<float>(scale),
                          .bags = bags,
                          .padding = padding,
                          .out = out<T>(out_),
                          .threads = threads});
      },
      "table"_a, "values"_a, "ids"_a, "offsets"_a, "scale"_a, "bags"_a, "padding"_a, "out"_a, "threads"_a);
}

}  // namespace

void bind_embedding(py::module_& m) {
  py::class_<EmbeddingTable>(m, "EmbeddingTable")
      .def(py::init([](int64_t rows, int64_t dim, Address kept, Address base, Address counts) {
             return EmbeddingTable{.rows = rows,
                                   .dim = dim,
                                   .kept = in<uint64_t>(kept),
                                   .base = in<int64_t>(base),
                                   .counts = in<uint8_t>(counts)};
           }),
           "rows"_a, "dim"_a, "kept"_a, "base"_a, "counts"_a);
  def_embedding<float>(m, "embedding_f32", "embedding_bag_f32");
  def_embedding<Bfloat16>(m, "embedding_bf16", "embedding_bag_bf16");
  def_embedding<Float16>(m, "embedding_f16", "embedding_bag_f16");
  m.def(
      "embedding_grad",
      [](const EmbeddingTable& table, Address grad, Address ids, Address source, Address scale, int64_t count,
         int64_t padding, int64_t num_values, Address grad_values, int threads) {
        py::gil_scoped_release release;
        embedding_grad({.table = table,
                        .grad = in<float>(grad),
                        .ids = in<int64_t>(ids),
                        .source = in<int64_t>(source),
                        .scale = in<float>(scale),
                        .count = count,
                        .padding = padding,
                        .num_values = num_values,
                        .grad_values = out(grad_values),
                        .threads = threads});
      },
      "table"_a, "grad"_a, "ids"_a, "source"_a, "scale"_a, "count"_a, "padding"_a, "num_values"_a, "grad_values"_a,
      "threads"_a);
  m.def(
      "embedding_absent",
      [](const EmbeddingTable& table, Address grad, Address ids, int64_t count, bool absolute, Address total,
         int threads) {
        py::gil_scoped_release release;
        embedding_absent({.table = table,
                          .grad = in<float>(grad),
                          .ids = in<int64_t>(ids),
                          .count = count,
                          .absolute = absolute,
                          .total = out(total),
                          .threads = threads});
      },
      "table"_a, "grad"_a, "ids"_a, "count"_a, "absolute"_a, "total"_a, "threads"_a);
  m.def(
      "embedding_top_k",
      [](const EmbeddingTable& table, Address values, Address queries, int64_t count, int64_t k, Address excluded_begin,
         Address excluded, Address scores, Address ids, int threads) {
        py::gil_scoped_release release;
        embedding_top_k({.table = table,
                         .values = in<float>(values),
                         .queries = in<float>(queries),
                         .count = count,
                         .k = k,
                         .excluded_begin = in<int64_t>(excluded_begin),
                         .excluded = in<int64_t>(excluded),
                         .scores = out(scores),
                         .ids = out<int64_t>(ids),
                         .threads = threads});
      },
      "table"_a, "values"_a, "queries"_a, "count"_a, "k"_a, "excluded_begin"_a, "excluded"_a, "scores"_a, "ids"_a,
      "threads"_a);
}

}  // namespace sparsekd
