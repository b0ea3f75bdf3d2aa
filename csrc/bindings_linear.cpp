#include <memory>

#include "bindings.h"

namespace sparsekd {

namespace {

template <class T>
void def_linear(py::module_& m, const char* name) {
  m.def(
      name,
      [](Address x, int64_t batch, int64_t in_features, Address values, Address row_ptr, Address col_idx, int64_t nnzb,
         int64_t bh, int64_t bw, Address bias, Address residual, Address y, int64_t out_features, int activation,
         int threads) {
        const Activation act = to_activation(activation);
        py::gil_scoped_release release;
        conv2d<T>(linear_shape(batch, in_features, out_features, bh, bw), {in<T>(x), true}, in<T>(values),
                  blocks(row_ptr, col_idx, nnzb), {in<float>(bias), in<T>(residual), act}, {out<T>(y), true}, threads);
      },
      "x"_a, "batch"_a, "in_features"_a, "values"_a, "row_ptr"_a, "col_idx"_a, "nnzb"_a, "bh"_a, "bw"_a, "bias"_a,
      "residual"_a, "y"_a, "out_features"_a, "activation"_a, "threads"_a);
}

template <class T>
void def_linear_grad_input(py::module_& m, const char* name) {
  m.def(
      name,
      [](Address dy, int64_t batch, int64_t out_features, Address values, Address row_ptr, Address col_idx,
         int64_t nnzb, int64_t bh, int64_t bw, Address dx, int64_t in_features, int threads) {
        py::gil_scoped_release release;
        conv2d_grad_input<T>(linear_shape(batch, in_features, out_features, bh, bw), {in<T>(dy), true}, in<T>(values),
                             blocks(row_ptr, col_idx, nnzb), {out<T>(dx), true}, threads);
      },
      "dy"_a, "batch"_a, "out_features"_a, "values"_a, "row_ptr"_a, "col_idx"_a, "nnzb"_a, "bh"_a, "bw"_a, "dx"_a,
      "in_features"_a, "threads"_a);
}

template <class T>
void def_linear_grad_values(py::module_& m, const char* name) {
  m.def(
      name,
      [](Address x, int64_t batch, int64_t in_features, Address dy, int64_t out_features, Address row_ptr,
         Address col_idx, int64_t nnzb, int64_t bh, int64_t bw, Address dvalues, int threads) {
        py::gil_scoped_release release;
        conv2d_grad_values<T>(linear_shape(batch, in_features, out_features, bh, bw), {in<T>(x), true},
                              {in<T>(dy), true}, blocks(row_ptr, col_idx, nnzb), out<T>(dvalues), threads);
      },
      "x"_a, "batch"_a, "in_features"_a, "dy"_a, "out_features"_a, "row_ptr"_a, "col_idx"_a, "nnzb"_a, "bh"_a, "bw"_a,
      "dvalues"_a, "threads"_a);
}

template <class T>
void def_packed_linear(py::module_& m, const char* name) {
  using Layer = PackedLinear<T>;
  py::class_<Layer> layer(m, name);
  layer.def(py::init([](int64_t in_features, int64_t out_features, int64_t bh, int64_t bw, Address values,
                        Address row_ptr, Address col_idx, int64_t nnzb, Address bias, int activation) {
              return std::make_unique<Layer>(linear_shape(1, in_features, out_features, bh, bw), in<T>(values),
                                             blocks(row_ptr, col_idx, nnzb), in<float>(bias),
                                             to_activation(activation));
            }),
            "in_features"_a, "out_features"_a, "bh"_a, "bw"_a, "values"_a, "row_ptr"_a, "col_idx"_a, "nnzb"_a,
            "bias"_a = 0, "activation"_a = 0);
  def_run_linear<T, T, T>(layer);
}

}  // namespace

void bind_linear(py::module_& m) {
  def_linear<float>(m, "linear_f32");
  def_linear<Bfloat16>(m, "linear_bf16");
  def_linear_grad_input<float>(m, "linear_grad_input_f32");
  def_linear_grad_input<Bfloat16>(m, "linear_grad_input_bf16");
  def_linear_grad_values<float>(m, "linear_grad_values_f32");
  def_linear_grad_values<Bfloat16>(m, "linear_grad_values_bf16");

  def_packed_linear<float>(m, "PackedLinear");
  def_packed_linear<Bfloat16>(m, "PackedLinearBf16");
}

}  // namespace sparsekd
