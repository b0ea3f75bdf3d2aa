#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"
#include "network.h"

namespace sparsekd {

namespace {

struct PoolLayer {
  NetworkLayer step;
};

PoolLayer make_pool(const Conv2dShape& shape, bool mean, const std::string& dtype) {
  if (dtype == "float32") return {pool_layer<float>(shape, mean)};
  if (dtype == "bfloat16") return {pool_layer<Bfloat16>(shape, mean)};
  throw py::value_error("sparsekd._C.Pool: dtype must be float32 or bfloat16, got '" + dtype + "'");
}

// What stands between layers.
struct BetweenLayer {
  NetworkLayer step;
  size_t operands;
};

BetweenLayer make_gate(int64_t pixels, int64_t channels, bool channels_last, int activation, const std::string& dtype) {
  const Activation kind = to_activation(activation);
  if (dtype == "float32") return {gate_layer<float>(pixels, channels, channels_last, kind), 3};
  if (dtype == "bfloat16") return {gate_layer<Bfloat16>(pixels, channels, channels_last, kind), 3};
  throw py::value_error("sparsekd._C.gate: dtype must be float32 or bfloat16, got '" + dtype + "'");
}

BetweenLayer make_layer_norm(int64_t rows, int64_t channels, Address weight, Address bias, float epsilon,
                             const std::string& dtype) {
  const float *w = in<float>(weight), *b = in<float>(bias);
  if (dtype == "float32") return {layer_norm_layer<float>(rows, channels, w, b, epsilon), 1};
  if (dtype == "bfloat16") return {layer_norm_layer<Bfloat16>(rows, channels, w, b, epsilon), 1};
  throw py::value_error("sparsekd._C.layer_norm: dtype must be float32 or bfloat16, got '" + dtype + "'");
}

BetweenLayer make_join(int64_t rows, const std::vector<int64_t>& widths) {
  return {join_layer(rows, widths), widths.size()};
}

void def_between(py::module_& m) {
  py::class_<BetweenLayer>(m, "BetweenLayer")
      .def(
          "run",
          [](const BetweenLayer& self, const std::vector<Address>& operands, Address y, int threads, int64_t n) {
            if (operands.size() != self.operands)
              throw py::value_error("sparsekd._C.BetweenLayer: expected " + std::to_string(self.operands) +
                                    " operands, got " + std::to_string(operands.size()));
            std::vector<const void*> read;
            for (const Address operand : operands) read.push_back(in<void>(operand));
            py::gil_scoped_release release;
            self.step.run(n, read.data(), out<void>(y), threads);
          },
          "operands"_a, "y"_a, "threads"_a, "n"_a);
  m.def("gate", &make_gate, "pixels"_a, "channels"_a, "channels_last"_a, "activation"_a, "dtype"_a);
  m.def("layer_norm", &make_layer_norm, "rows"_a, "channels"_a, "weight"_a, "bias"_a, "epsilon"_a, "dtype"_a);
  m.def("join", &make_join, "rows"_a, "widths"_a);
}

template <class T>
void def_add_conv2d(py::class_<Network>& network) {
  network.def(
      "add",
      [](Network& self, const PackedConv2d<T>& layer, int64_t x, bool x_channels_last, int64_t residual, int64_t y,
         bool y_channels_last) { self.add(conv2d_layer(layer, x_channels_last, y_channels_last), {x, residual}, y); },
      py::keep_alive<1, 2>(), "layer"_a, "x"_a, "x_channels_last"_a, "residual"_a, "y"_a, "y_channels_last"_a);
}

template <class T>
void def_add_linear(py::class_<Network>& network) {
  network.def(
      "add",
      [](Network& self, const PackedLinear<T>& layer, int64_t rows, int64_t x, int64_t residual, int64_t y) {
        self.add(linear_layer(layer, rows), {x, residual}, y);
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
            const void* const operands[] = {in<void>(x)};
            self.step.run(n, operands, out<void>(y), threads);
          },
          "x"_a, "y"_a, "threads"_a, "n"_a);
}

}  // namespace

void bind_network(py::module_& m) {
  def_pool(m);
  def_between(m);
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
        self.add(depthwise_layer(layer), {x, residual}, y);
      },
      py::keep_alive<1, 2>(), "layer"_a, "x"_a, "residual"_a, "y"_a);
  network.def(
      "add", [](Network& self, const PoolLayer& layer, int64_t x, int64_t y) { self.add(layer.step, {x}, y); },
      "layer"_a, "x"_a, "y"_a);
  network.def(
      "add",
      [](Network& self, const BetweenLayer& layer, const std::vector<int64_t>& operands, int64_t y) {
        if (operands.size() != layer.operands)
          throw py::value_error("sparsekd._C.Network: a layer of " + std::to_string(layer.operands) +
                                " operands was given " + std::to_string(operands.size()));
        self.add(layer.step, operands, y);
      },
      "layer"_a, "operands"_a, "y"_a);
  network.def("finish", &Network::finish);
  network.def_property_readonly("chain_lengths", &Network::chain_lengths);
  network.def(
      "run",
      [](const Network& self, const std::vector<Address>& pointers, int64_t n, int64_t images, int threads) {
        py::gil_scoped_release release;
        self.run(pointers, n, images, threads);
      },
      "pointers"_a, "n"_a, "images"_a, "threads"_a);
}

}  // namespace sparsekd
