// What the bindings of all ops share. Python sees pointers as integers; sizes, types and memory formats were checked by
// the caller (sparsekd/ops). Nothing is computed here: every binding turns integers into pointers, releases the GIL and
// makes one call.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <iterator>
#include <string>
#include <type_traits>

#include "linear.h"

namespace py = pybind11;

namespace sparsekd {

using namespace pybind11::literals;

using Address = std::uintptr_t;

template <class T>
const T* in(Address address) {
  return reinterpret_cast<const T*>(address);
}

template <class T = float>
T* out(Address address) {
  return reinterpret_cast<T*>(address);
}

inline Blocks blocks(Address row_ptr, Address col_idx, int64_t nnzb) {
  return {.row_ptr = in<int32_t>(row_ptr), .col_idx = in<int32_t>(col_idx), .nnzb = nnzb};
}

inline Activation to_activation(int activation) {
  if (activation >= 0 && activation < static_cast<int>(std::size(kActivationNames)))
    return static_cast<Activation>(activation);
  throw py::value_error("sparsekd._C: activation must be one of ACTIVATIONS.values(), 0 to " +
                        std::to_string(std::size(kActivationNames) - 1) + ", got " + std::to_string(activation));
}

template <class Layer>
void refuse_residual([[maybe_unused]] const Layer& layer, [[maybe_unused]] Address residual) {
  if constexpr (std::is_base_of_v<PackedConv2dInt8, Layer>)
    if (residual != 0 && layer.bytes_out())
      throw py::value_error(
          "sparsekd._C: an int8 layer with u8 output takes no residual; leave y_scale at 0 for float output");
}

// run() of a packed layer. X, Residual, Y: element types of the tensors.
template <class X, class Residual, class Y, class Layer>
void def_run(py::class_<Layer>& layer) {
  layer.def(
      "run",
      [](const Layer& self, Address x, bool x_channels_last, Address residual, Address y, bool y_channels_last,
         int threads, int64_t n) {
        refuse_residual(self, residual);
        Conv2dGeometry geometry = self.shape().geometry;
        if (n >= 0) geometry.n = n;
        py::gil_scoped_release release;
        self.run(geometry, {in<X>(x), x_channels_last}, in<Residual>(residual), {out<Y>(y), y_channels_last}, threads);
      },
      "x"_a, "x_channels_last"_a, "residual"_a, "y"_a, "y_channels_last"_a, "threads"_a, "n"_a = -1);
}

// The same of a linear layer.
template <class X, class Residual, class Y, class Layer>
void def_run_linear(py::class_<Layer>& layer) {
  layer.def(
      "run",
      [](const Layer& self, Address x, int64_t batch, Address residual, Address y, int threads) {
        refuse_residual(self, residual);
        const Conv2dGeometry geometry = with_batch(self.shape().geometry, batch);
        py::gil_scoped_release release;
        self.run(geometry, {in<X>(x), true}, in<Residual>(residual), {out<Y>(y), true}, threads);
      },
      "x"_a, "batch"_a, "residual"_a, "y"_a, "threads"_a);
}

// One function each, in bindings_<name>.cpp.
void bind_conv2d(py::module_& m);
void bind_linear(py::module_& m);
void bind_embedding(py::module_& m);
void bind_int8(py::module_& m);
void bind_attention(py::module_& m);
void bind_norm_relu(py::module_& m);
void bind_network(py::module_& m);
void bind_runtime(py::module_& m);

}  // namespace sparsekd
