#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"
#include "network.h"

namespace sparsekd {

namespace {

struct PoolLayer {
  NetworkLayer run;
};

PoolLayer make_pool(const Conv2dShape& shape, bool mean, const std::string& dtype) {
  if (dtype == "float32") return {pool_layer<float>(shape, mean)};
  if (dtype == "bfloat16") return {pool_layer<Bfloat16>(shape, mean)};
  throw py::value_error("sparsekd._C.Pool: dtype must be float32 or bfloat16, got '" + dtype + "'");
}

template <class T>
void def_add_conv2d(py::class_<Network>& network) {
  network.def(
      "add",
      [](Network& self, const PackedConv2d<T>& layer, int64_t x, bool x_channels_last, int64_t residual, int64_t y,
         bool y_channels_last) { self.add(conv2d_layer(layer, x_channels_last, y_channels_last), x, residual, y); },
      py::keep_alive<1, 2>(), "layer"_a, "x"_a, "x_channels_last"_a, "residual"_a, "y"_a, "y_channels_last"_a);
}

template <class T>
void def_add_linear(py::class_<Network>& network) {
  network.def(
      "add",
      [](Network& self, const PackedLinear<T>& layer, int64_t rows, int64_t x, int64_t residual, int64_t y) {
        self.add(linear_layer(layer, rows), x, residual, y);
      },
      py::keep_alive<1, 2>(), "layer"_a, "rows"_a, "x"_a, "residual"_a, "y"_a);
}

void def_pool(py::module_& m) {
  py::class_<PoolLayer>(m, "Pool")
      .def(py::init(&make_pool), "shape"_a, "mean"_a, "dtype"_a)
      .def(
          "run",
          [](const PoolLayer& self, Address x, Address y, int threads, int64_t n) {
            py::gil_scoped_release release;
            self.run(n, in<void>(x), nullptr, out<void>(y), threads);
          },
          "x"_a, "y"_a, "threads"_a, "n"_a);
}

}  // namespace

void bind_network(py::module_& m) {
  def_pool(m);
  py::class_<Network> network(m, "Network");
  network.def(py::init([](const std::vector<std::tuple<int64_t, int64_t, int64_t>>& values, int64_t buffer_bytes) {
                std::vector<NetworkValue> all;
                for (const auto& [pointer, offset, bytes] : values)
                  all.push_back({.pointer = pointer, .offset = offset, .bytes = bytes});
                return std::make_unique<Network>(std::move(all), buffer_bytes);
              }),
              "values"_a, "buffer_bytes"_a);
  def_add_conv2d<float>(network);
  def_add_conv2d<Bfloat16>(network);
  def_add_linear<float>(network);
  def_add_linear<Bfloat16>(network);
  network.def(
      "add",
      [](Network& self, const PackedDepthwise& layer, int64_t x, int64_t residual, int64_t y) {
        self.add(depthwise_layer(layer), x, residual, y);
      },
      py::keep_alive<1, 2>(), "layer"_a, "x"_a, "residual"_a, "y"_a);
  network.def(
      "add", [](Network& self, const PoolLayer& layer, int64_t x, int64_t y) { self.add(layer.run, x, -1, y); },
      "layer"_a, "x"_a, "y"_a);
  network.def(
      "run",
      [](const Network& self, const std::vector<Address>& pointers, int64_t n, int64_t images, int threads) {
        py::gil_scoped_release release;
        self.run(pointers, n, images, threads);
      },
      "pointers"_a, "n"_a, "images"_a, "threads"_a);
}

}  // namespace sparsekd
