#include "bindings.h"
#include "embedding.h"

namespace sparsekd {

namespace {

template <class T>
void def_embedding(py::module_& m, const char* lookup, const char* bag, const char* top_k) {
  m.def(
      lookup,
      [](const EmbeddingTable& table, Address values, Address row_scale, Address ids, int64_t count, Address out_,
         int threads) {
        py::gil_scoped_release release;
        embedding<T>({.table = table,
                      .values = in<T>(values),
                      .row_scale = in<float>(row_scale),
                      .ids = in<int64_t>(ids),
                      .count = count,
                      .out = out<typename EmbeddingOut<T>::Type>(out_),
                      .threads = threads});
      },
      "table"_a, "values"_a, "row_scale"_a, "ids"_a, "count"_a, "out"_a, "threads"_a);
  m.def(
      bag,
      [](const EmbeddingTable& table, Address values, Address row_scale, Address ids, int64_t count, Address offsets,
         Address scale, int64_t bags, int64_t padding, Address out_, int threads) {
        py::gil_scoped_release release;
        check_offsets(in<int64_t>(offsets), bags, count);
        embedding_bag<T>({.table = table,
                          .values = in<T>(values),
                          .row_scale = in<float>(row_scale),
                          .ids = in<int64_t>(ids),
                          .offsets = in<int64_t>(offsets),
                          .scale = in<float>(scale),
                          .bags = bags,
                          .padding = padding,
                          .out = out<typename EmbeddingOut<T>::Type>(out_),
                          .threads = threads});
      },
      "table"_a, "values"_a, "row_scale"_a, "ids"_a, "count"_a, "offsets"_a, "scale"_a, "bags"_a, "padding"_a, "out"_a,
      "threads"_a);
  m.def(
      top_k,
      [](const EmbeddingTable& table, Address values, Address row_scale, Address queries, int64_t count, int64_t k,
         Address excluded_begin, Address excluded, Address scores, Address ids, int threads) {
        py::gil_scoped_release release;
        embedding_top_k<T>({.table = table,
                            .values = in<T>(values),
                            .row_scale = in<float>(row_scale),
                            .queries = in<float>(queries),
                            .count = count,
                            .k = k,
                            .excluded_begin = in<int64_t>(excluded_begin),
                            .excluded = in<int64_t>(excluded),
                            .scores = out(scores),
                            .ids = out<int64_t>(ids),
                            .threads = threads});
      },
      "table"_a, "values"_a, "row_scale"_a, "queries"_a, "count"_a, "k"_a, "excluded_begin"_a, "excluded"_a, "scores"_a,
      "ids"_a, "threads"_a);
}

// Training: gradients of rows, optimizers, exchange of entries.
void def_training(py::module_& m) {
  m.def(
      "embedding_rows_grad",
      [](const EmbeddingTable& table, Address grad, Address rows, Address first, Address order, Address source,
         Address scale, Address begin, int64_t count, Address places, Address sums, int threads) {
        py::gil_scoped_release release;
        embedding_rows_grad({.table = table,
                             .grad = in<float>(grad),
                             .rows = in<int64_t>(rows),
                             .first = in<int64_t>(first),
                             .order = in<int64_t>(order),
                             .source = in<int64_t>(source),
                             .scale = in<float>(scale),
                             .begin = in<int64_t>(begin),
                             .count = count,
                             .places = out<int64_t>(places),
                             .sums = out(sums),
                             .threads = threads});
      },
      "table"_a, "grad"_a, "rows"_a, "first"_a, "order"_a, "source"_a, "scale"_a, "begin"_a, "count"_a, "places"_a,
      "sums"_a, "threads"_a);
  const auto def_update = [&](const char* name, EmbeddingOptimizer optimizer) {
    m.def(
        name,
        [optimizer](const EmbeddingTable& table, Address places, Address grad, int64_t count, int64_t num_values,
                    Address values, Address mean, Address square, Address occurred, float lr, float beta1, float beta2,
                    float eps, float decay, int threads) {
          py::gil_scoped_release release;
          embedding_update(optimizer, {.table = table,
                                       .places = in<int64_t>(places),
                                       .grad = in<float>(grad),
                                       .count = count,
                                       .num_values = num_values,
                                       .values = out(values),
                                       .mean = out(mean),
                                       .square = out(square),
                                       .occurred = out<uint16_t>(occurred),
                                       .lr = lr,
                                       .beta1 = beta1,
                                       .beta2 = beta2,
                                       .eps = eps,
                                       .decay = decay,
                                       .threads = threads});
        },
        "table"_a, "places"_a, "grad"_a, "count"_a, "num_values"_a, "values"_a, "mean"_a, "square"_a, "occurred"_a,
        "lr"_a, "beta1"_a, "beta2"_a, "eps"_a, "decay"_a, "threads"_a);
  };
  def_update("embedding_sgd", EmbeddingOptimizer::kSgd);
  def_update("embedding_adagrad", EmbeddingOptimizer::kAdagrad);
  def_update("embedding_adagrad_rows", EmbeddingOptimizer::kAdagradRows);
  def_update("embedding_adam", EmbeddingOptimizer::kAdam);
  m.def(
      "embedding_magnitudes",
      [](const EmbeddingTable& table, Address values, Address magnitudes, int threads) {
        py::gil_scoped_release release;
        embedding_magnitudes(
            {.table = table, .values = in<float>(values), .magnitudes = out(magnitudes), .threads = threads});
      },
      "table"_a, "values"_a, "magnitudes"_a, "threads"_a);
  m.def(
      "embedding_thin",
      [](const EmbeddingTable& table, Address stays, Address target, int threads) {
        py::gil_scoped_release release;
        embedding_thin(
            {.table = table, .stays = in<uint8_t>(stays), .target = out<uint64_t>(target), .threads = threads});
      },
      "table"_a, "stays"_a, "target"_a, "threads"_a);
  m.def(
      "embedding_repack",
      [](const EmbeddingTable& from, const EmbeddingTable& to, Address source, Address target, int64_t bytes,
         int threads) {
        py::gil_scoped_release release;
        embedding_repack({.from = from,
                          .to = to,
                          .source = in<uint8_t>(source),
                          .target = out<uint8_t>(target),
                          .bytes = bytes,
                          .threads = threads});
      },
      "from_table"_a, "to_table"_a, "source"_a, "target"_a, "bytes"_a, "threads"_a);
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
  def_embedding<float>(m, "embedding_f32", "embedding_bag_f32", "embedding_top_k_f32");
  def_embedding<Bfloat16>(m, "embedding_bf16", "embedding_bag_bf16", "embedding_top_k_bf16");
  def_embedding<Float16>(m, "embedding_f16", "embedding_bag_f16", "embedding_top_k_f16");
  def_embedding<int8_t>(m, "embedding_i8", "embedding_bag_i8", "embedding_top_k_i8");
  m.def(
      "embedding_bag_scale",
      [](Address ids, Address offsets, int64_t count, int64_t bags, int64_t padding, Address scale) {
        py::gil_scoped_release release;
        embedding_bag_scale({.ids = in<int64_t>(ids),
                             .offsets = in<int64_t>(offsets),
                             .count = count,
                             .bags = bags,
                             .padding = padding,
                             .scale = out(scale)});
      },
      "ids"_a, "offsets"_a, "count"_a, "bags"_a, "padding"_a, "scale"_a);
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
  def_training(m);
}

}  // namespace sparsekd
