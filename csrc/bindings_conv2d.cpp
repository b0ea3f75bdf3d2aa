#include <array>
#include <memory>

#include "bindings.h"

namespace sparsekd {

namespace {

using Pair = std::array<int64_t, 2>;

Conv2dShape make_shape(const std::array<int64_t, 4>& input, int64_t out_channels, Pair kernel, Pair stride,
                       Pair padding, Pair dilation, int64_t groups, Pair block) {
  const auto [n, c, h, w] = input;
  return conv2d_shape({.n = n,
                       .c = c,
                       .h = h,
                       .w = w,
                       .k = out_channels,
                       .r = kernel[0],
                       .s = kernel[1],
                       .stride_h = stride[0],
                       .stride_w = stride[1],
                       .pad_h = padding[0],
                       .pad_w = padding[1],
                       .dilation_h = dilation[0],
                       .dilation_w = dilation[1],
                       .groups = groups},
                      block[0], block[1]);
}

template <class T>
void def_conv2d(py::module_& m, const char* name) {
  m.def(
      name,
      [](const Conv2dShape& shape, Address x, bool x_channels_last, Address values, Address row_ptr, Address col_idx,
         int64_t nnzb, Address bias, Address residual, Address y, bool y_channels_last, int activation, int threads) {
        const Activation act = to_activation(activation);
        py::gil_scoped_release release;
        conv2d<T>(shape, {in<T>(x), x_channels_last}, in<T>(values), blocks(row_ptr, col_idx, nnzb),
                  {in<float>(bias), in<T>(residual), act}, {out<T>(y), y_channels_last}, threads);
      },
      "shape"_a, "x"_a, "x_channels_last"_a, "values"_a, "row_ptr"_a, "col_idx"_a, "nnzb"_a, "bias"_a, "residual"_a,
      "y"_a, "y_channels_last"_a, "activation"_a, "threads"_a);
}

template <class T>
void def_conv2d_grad_input(py::module_& m, const char* name) {
  m.def(
      name,
      [](const Conv2dShape& shape, Address dy, bool dy_channels_last, Address values, Address row_ptr, Address col_idx,
         int64_t nnzb, Address dx, bool dx_channels_last, int threads) {
        py::gil_scoped_release release;
        conv2d_grad_input<T>(shape, {in<T>(dy), dy_channels_last}, in<T>(values), blocks(row_ptr, col_idx, nnzb),
                             {out<T>(dx), dx_channels_last}, threads);
      },
      "shape"_a, "dy"_a, "dy_channels_last"_a, "values"_a, "row_ptr"_a, "col_idx"_a, "nnzb"_a, "dx"_a,
      "dx_channels_last"_a, "threads"_a);
}

template <class T>
void def_conv2d_grad_values(py::module_& m, const char* name) {
  m.def(
      name,
      [](const Conv2dShape& shape, Address x, bool x_channels_last, Address dy, bool dy_channels_last, Address row_ptr,
         Address col_idx, int64_t nnzb, Address dvalues, int threads) {
        py::gil_scoped_release release;
        conv2d_grad_values<T>(shape, {in<T>(x), x_channels_last}, {in<T>(dy), dy_channels_last},
                              blocks(row_ptr, col_idx, nnzb), out<T>(dvalues), threads);
      },
      "shape"_a, "x"_a, "x_channels_last"_a, "dy"_a, "dy_channels_last"_a, "row_ptr"_a, "col_idx"_a, "nnzb"_a,
      "dvalues"_a, "threads"_a);
}

template <class T>
void def_packed_conv2d(py::module_& m, const char* name) {
  using Layer = PackedConv2d<T>;
  py::class_<Layer> layer(m, name);
  layer.def(py::init([](const Conv2dShape& shape, Address values, Address row_ptr, Address col_idx, int64_t nnzb,
                        Address bias, int activation) {
              return std::make_unique<Layer>(shape, in<T>(values), blocks(row_ptr, col_idx, nnzb), in<float>(bias),
                                             to_activation(activation));
            }),
            "shape"_a, "values"_a, "row_ptr"_a, "col_idx"_a, "nnzb"_a, "bias"_a = 0, "activation"_a = 0);
  layer.def_property_readonly("plans_made", &Layer::plans_made);
  def_run<T, T, T>(layer);
}

void def_depthwise(py::module_& m) {
  py::class_<PackedDepthwise>(m, "PackedDepthwise")
      .def(py::init([](const Conv2dShape& shape, Address weights, Address bias, int activation) {
             return std::make_unique<PackedDepthwise>(shape, in<float>(weights), in<float>(bias),
                                                      to_activation(activation));
           }),
           "shape"_a, "weights"_a, "bias"_a = 0, "activation"_a = 0)
      .def(
          "run",
          [](const PackedDepthwise& self, Address x, Address residual, Address y, int threads, int64_t n) {
            py::gil_scoped_release release;
            self.run(with_images(self.geometry(), n), in<float>(x), in<float>(residual), out(y), threads);
          },
          "x"_a, "residual"_a, "y"_a, "threads"_a, "n"_a);
}

}  // namespace

void bind_conv2d(py::module_& m) {
  py::dict activations;
  for (const char* name : kActivationNames) activations[name] = py::len(activations);
  m.attr("ACTIVATIONS") = activations;

  py::class_<Conv2dShape>(m, "Conv2dShape")
      .def(py::init(&make_shape), "input"_a, "out_channels"_a, "kernel_size"_a, "stride"_a = Pair{1, 1},
           "padding"_a = Pair{0, 0}, "dilation"_a = Pair{1, 1}, "groups"_a = 1, "block"_a = Pair{16, 1})
      .def_property_readonly("n", [](const Conv2dShape& s) { return s.geometry.n; })
      .def_property_readonly("p", [](const Conv2dShape& s) { return s.geometry.p; })
      .def_property_readonly("q", [](const Conv2dShape& s) { return s.geometry.q; });

  def_conv2d<float>(m, "conv2d_f32");
  def_conv2d<Bfloat16>(m, "conv2d_bf16");
  def_conv2d_grad_input<float>(m, "conv2d_grad_input_f32");
  def_conv2d_grad_input<Bfloat16>(m, "conv2d_grad_input_bf16");
  def_conv2d_grad_values<float>(m, "conv2d_grad_values_f32");
  def_conv2d_grad_values<Bfloat16>(m, "conv2d_grad_values_bf16");

  def_packed_conv2d<float>(m, "PackedConv2d");
  def_packed_conv2d<Bfloat16>(m, "PackedConv2dBf16");
  def_depthwise(m);
}

}  // namespace sparsekd
