#include "bindings.h"
#include "dispatch.h"

namespace sparsekd {

void bind_norm_relu(py::module_& m) {
  m.def(
      "norm_relu",
      [](int64_t rows, int64_t channels, Address x, Address residual, Address weight, Address bias, float epsilon,
         Address y, Address mean, Address variance, int threads) {
        py::gil_scoped_release release;
        kernels().norm_relu.forward({.sizes = {rows, channels, threads},
                                     .x = in<float>(x),
                                     .residual = in<float>(residual),
                                     .weight = in<float>(weight),
                                     .bias = in<float>(bias),
                                     .epsilon = epsilon,
                                     .y = out(y),
                                     .mean = out(mean),
                                     .variance = out(variance)});
      },
      "rows"_a, "channels"_a, "x"_a, "residual"_a, "weight"_a, "bias"_a, "epsilon"_a, "y"_a, "mean"_a, "variance"_a,
      "threads"_a);
  m.def(
      "norm_relu_grad",
      [](int64_t rows, int64_t channels, Address dy, Address x, Address y, Address weight, Address bias, Address mean,
         Address variance, float epsilon, Address dx, Address dresidual, Address dweight, Address dbias, int threads) {
        py::gil_scoped_release release;
        kernels().norm_relu.grad({.sizes = {rows, channels, threads},
                                  .dy = in<float>(dy),
                                  .x = in<float>(x),
                                  .y = in<float>(y),
                                  .weight = in<float>(weight),
                                  .bias = in<float>(bias),
                                  .mean = in<float>(mean),
                                  .variance = in<float>(variance),
                                  .epsilon = epsilon,
                                  .dx = out(dx),
                                  .dresidual = out(dresidual),
                                  .dweight = out(dweight),
                                  .dbias = out(dbias)});
      },
      "rows"_a, "channels"_a, "dy"_a, "x"_a, "y"_a, "weight"_a, "bias"_a, "mean"_a, "variance"_a, "epsilon"_a, "dx"_a,
      "dresidual"_a, "dweight"_a, "dbias"_a, "threads"_a);
}

}  // namespace sparsekd
