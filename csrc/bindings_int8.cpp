#include <memory>

#include "bindings.h"
#include "quantize.h"

namespace sparsekd {

namespace {

template <class Layer>
std::unique_ptr<Layer> make_int8(const Conv2dShape& shape, Address values, Address scale, Address row_ptr,
                                 Address col_idx, int64_t nnzb, Address bias, int activation, float x_scale, int x_zero,
                                 float y_scale, int y_zero) {
  const ByteScale y{y_scale, y_zero};
  return std::make_unique<Layer>(shape, in<int8_t>(values), in<float>(scale), blocks(row_ptr, col_idx, nnzb),
                                 in<float>(bias), to_activation(activation), ByteScale{x_scale, x_zero},
                                 y_scale > 0 ? &y : nullptr);
}

}  // namespace

void bind_int8(py::module_& m) {
  m.def(
      "quantize_u8",
      [](Address x, int64_t count, float scale, int zero, Address y, int threads) {
        py::gil_scoped_release release;
        quantize_u8(in<float>(x), count, scale, zero, out<uint8_t>(y), threads);
      },
      "x"_a, "count"_a, "scale"_a, "zero"_a, "y"_a, "threads"_a);
  py::class_<PackedConv2dInt8> conv2d(m, "PackedConv2dInt8");
  conv2d.def(py::init(&make_int8<PackedConv2dInt8>), "shape"_a, "values"_a, "scale"_a, "row_ptr"_a, "col_idx"_a,
             "nnzb"_a, "bias"_a, "activation"_a, "x_scale"_a, "x_zero"_a, "y_scale"_a = 0.0f, "y_zero"_a = 0);
  def_run<uint8_t, float, void>(conv2d);
  py::class_<PackedLinearInt8> linear(m, "PackedLinearInt8");
  linear.def(py::init([](int64_t in_features, int64_t out_features, int64_t bh, int64_t bw, Address values,
                         Address scale, Address row_ptr, Address col_idx, int64_t nnzb, Address bias, int activation,
                         float x_scale, int x_zero, float y_scale, int y_zero) {
               return make_int8<PackedLinearInt8>(linear_shape(1, in_features, out_features, bh, bw), values, scale,
                                                  row_ptr, col_idx, nnzb, bias, activation, x_scale, x_zero, y_scale,
                                                  y_zero);
             }),
             "in_features"_a, "out_features"_a, "bh"_a, "bw"_a, "values"_a, "scale"_a, "row_ptr"_a, "col_idx"_a,
             "nnzb"_a, "bias"_a, "activation"_a, "x_scale"_a, "x_zero"_a, "y_scale"_a = 0.0f, "y_zero"_a = 0);
  def_run_linear<uint8_t, float, void>(linear);
}

}  // namespace sparsekd
