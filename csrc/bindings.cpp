// Python sees pointers as integers; sizes, types and memory formats were checked by the caller (sparsekd/ops).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <iterator>
#include <tuple>
#include <type_traits>
#include <vector>

#include "conv2d.h"
#include "dispatch.h"
#include "network.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

using sparsekd::Activation;
using sparsekd::Bfloat16;
using sparsekd::Blocks;
using sparsekd::Conv2dGeometry;
using sparsekd::Conv2dShape;
using sparsekd::FeatureLayer;
using sparsekd::MapSize;
using sparsekd::PackedConv2d;
using Address = std::uintptr_t;

template <class T>
const T* in(Address address) {
  return reinterpret_cast<const T*>(address);
}

template <class T = float>
T* out(Address address) {
  return reinterpret_cast<T*>(address);
}

Blocks blocks(Address row_ptr, Address col_idx, int64_t nnzb) {
  return {in<int32_t>(row_ptr), in<int32_t>(col_idx), nnzb};
}

const char* const kActivationNames[] = {"none", "relu", "relu6", "silu"};

Activation to_activation(int activation) {
  if (activation >= 0 && activation < static_cast<int>(std::size(kActivationNames)))
    return static_cast<Activation>(activation);
  throw py::value_error("sparsekd._C: activation must be one of ACTIVATIONS.values(), 0 to 3, got " +
                        std::to_string(activation));
}

int64_t output_size(const char* axis, int64_t in, int64_t taps, int64_t stride, int64_t pad, int64_t dilation) {
  const int64_t span = dilation * (taps - 1) + 1;
  if (taps < 1 || stride < 1 || pad < 0 || dilation < 1 || in + 2 * pad < span)
    throw py::value_error(std::string("sparsekd._C.Conv2dShape: the kernel does not fit the ") + axis +
                          ": expected input + 2 * padding >= dilation * (kernel - 1) + 1, got input " +
                          std::to_string(in) + ", padding " + std::to_string(pad) + ", kernel " + std::to_string(taps) +
                          ", dilation " + std::to_string(dilation) + ", stride " + std::to_string(stride));
  return (in + 2 * pad - span) / stride + 1;
}

using Pair = std::array<int64_t, 2>;

Conv2dShape make_shape(const std::array<int64_t, 4>& input, int64_t k, Pair kernel, Pair stride, Pair padding,
                       Pair dilation, int64_t groups, Pair block) {
  const auto [n, c, h, w] = input;
  const auto [bh, bw] = block;
  if (groups < 1 || c % groups || k % groups || bh < 1 || bw < 1 || (groups > 1 && (k / groups) % bh))
    throw py::value_error(
        "sparsekd._C.Conv2dShape: channels must divide into the groups and a group's output channels "
        "into blocks, got input channels " +
        std::to_string(c) + ", output channels " + std::to_string(k) + ", groups " + std::to_string(groups) +
        ", block " + std::to_string(bh) + "x" + std::to_string(bw));
  const int64_t p = output_size("height", h, kernel[0], stride[0], padding[0], dilation[0]);
  const int64_t q = output_size("width", w, kernel[1], stride[1], padding[1], dilation[1]);
  return {{n, c, h, w, k, p, q, kernel[0], kernel[1], stride[0], stride[1], padding[0], padding[1], dilation[0],
           dilation[1], groups},
          bh,
          bw};
}

// Multiply-adds on `threads` threads at once for `seconds`: the sum of every thread's best burst, in 1e9 operations a
// second. Bursts of some 30 microseconds, so that other processes' time slices do not count.
double peak_gflops(int threads, double seconds, const std::string& dtype) {
  using Clock = std::chrono::steady_clock;
  const sparsekd::KernelTable& table = sparsekd::kernels();
  const auto burst = dtype == "float32"    ? table.fma_burst
                     : dtype == "bfloat16" ? table.bf16.burst
                     : dtype == "int8"     ? table.int8.burst
                                           : nullptr;
  if (burst == nullptr)
    throw py::value_error("sparsekd._C.peak_gflops: dtype must be float32, bfloat16 or int8, got '" + dtype + "'");
  struct Work {
    double seconds;
    double (*burst)(int64_t, float*);
    std::vector<double> best;
  } work{seconds, burst, std::vector<double>(static_cast<size_t>(threads))};
  sparsekd::parallel_for(
      threads, threads,
      [](void* context, int64_t item, bool) {
        Work& work = *static_cast<Work*>(context);
        alignas(64) float sink[32];
        for (float& value : sink) value = 0.5f;
        const auto begin = Clock::now();
        auto now = begin;
        double best = 0;
        while (std::chrono::duration<double>(now - begin).count() < work.seconds) {
          const auto start = now;
          const double operations = work.burst(20000, sink);
          now = Clock::now();
          best = std::max(best, operations / std::chrono::duration<double>(now - start).count());
        }
        work.best[static_cast<size_t>(item)] = best;
      },
      &work);
  double total = 0;
  for (const double rate : work.best) total += rate;
  return total * 1e-9;
}

void bind_machine(py::module_& m) {
  m.def("isas", &sparsekd::available_isas, "Instruction sets this CPU runs, best first.");
  m.def("isa", [] { return std::string(sparsekd::kernels().isa); }, "The instruction set in use.");
  m.def("use_isa", &sparsekd::use_isa, "name"_a, "Uses another instruction set from now on.");
  m.def("openmp", &sparsekd::openmp_name, "The OpenMP library in use and its thread limit.");
  m.def("cpu_name", &sparsekd::cpu_name);
  m.def("peak_gflops", &peak_gflops, "threads"_a, "seconds"_a = 0.05, "dtype"_a = "float32",
        py::call_guard<py::gil_scoped_release>(),
        "Measured multiply-add peak of the kernels for `dtype` (float32, bfloat16 or int8) in the instruction set in "
        "use.");
}

template <class T>
void def_conv2d(py::module_& m, const char* name) {
  m.def(
      name,
      [](const Conv2dShape& shape, Address x, bool x_channels_last, Address values, Address row_ptr, Address col_idx,
         int64_t nnzb, Address bias, Address residual, Address y, bool y_channels_last, int activation, int threads) {
        const Activation act = to_activation(activation);
        py::gil_scoped_release release;
        sparsekd::conv2d<T>(shape, {in<T>(x), x_channels_last}, in<T>(values), blocks(row_ptr, col_idx, nnzb),
                            {in<float>(bias), in<T>(residual), act}, {out<T>(y), y_channels_last}, threads);
      },
      "shape"_a, "x"_a, "x_channels_last"_a, "values"_a, "row_ptr"_a, "col_idx"_a, "nnzb"_a, "bias"_a, "residual"_a,
      "y"_a, "y_channels_last"_a, "activation"_a, "threads"_a);
}

using sparsekd::PackedConv2dInt8;

template <class Layer>
void refuse_residual([[maybe_unused]] const Layer& layer, [[maybe_unused]] Address residual) {
  if constexpr (std::is_base_of_v<PackedConv2dInt8, Layer>)
    if (residual != 0 && layer.bytes_out())
      throw py::value_error(
          "sparsekd._C: an int8 layer with u8 output takes no residual; leave y_scale at 0 for float output");
}

// X, Residual, Y: element types of the tensors.
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

// A linear layer's tensors are channels_last: a sample's features lie together.
template <class X, class Residual, class Y, class Layer>
void def_run_linear(py::class_<Layer>& layer) {
  layer.def(
      "run",
      [](const Layer& self, Address x, int64_t batch, Address residual, Address y, int threads) {
        refuse_residual(self, residual);
        Conv2dGeometry geometry = self.shape().geometry;
        geometry.w = geometry.q = batch;
        py::gil_scoped_release release;
        self.run(geometry, {in<X>(x), true}, in<Residual>(residual), {out<Y>(y), true}, threads);
      },
      "x"_a, "batch"_a, "residual"_a, "y"_a, "threads"_a);
}

template <class T>
void def_conv2d_grad_input(py::module_& m, const char* name) {
  m.def(
      name,
      [](const Conv2dShape& shape, Address dy, bool dy_channels_last, Address values, Address row_ptr, Address col_idx,
         int64_t nnzb, Address dx, bool dx_channels_last, int threads) {
        py::gil_scoped_release release;
        sparsekd::conv2d_grad_input<T>(shape, {in<T>(dy), dy_channels_last}, in<T>(values),
                                       blocks(row_ptr, col_idx, nnzb), {out<T>(dx), dx_channels_last}, threads);
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
        sparsekd::conv2d_grad_values<T>(shape, {in<T>(x), x_channels_last}, {in<T>(dy), dy_channels_last},
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
  def_run<T, T, T>(layer);
}

template <class Layer>
std::unique_ptr<Layer> make_int8(const Conv2dShape& shape, Address values, Address scale, Address row_ptr,
                                 Address col_idx, int64_t nnzb, Address bias, int activation, float x_scale, int x_zero,
                                 float y_scale, int y_zero) {
  const sparsekd::ByteScale y{y_scale, y_zero};
  return std::make_unique<Layer>(shape, in<int8_t>(values), in<float>(scale), blocks(row_ptr, col_idx, nnzb),
                                 in<float>(bias), to_activation(activation), sparsekd::ByteScale{x_scale, x_zero},
                                 y_scale > 0 ? &y : nullptr);
}

void bind_int8(py::module_& m) {
  m.def(
      "quantize_u8",
      [](Address x, int64_t count, float scale, int zero, Address y, int threads) {
        py::gil_scoped_release release;
        struct Work {
          const float* x;
          int64_t count;
          float inverse;
          int zero;
          uint8_t* y;
        } work{in<float>(x), count, 1.0f / scale, zero, out<uint8_t>(y)};
        static constexpr int64_t kPiece = 16384;
        sparsekd::parallel_for(
            threads, (count + kPiece - 1) / kPiece,
            [](void* context, int64_t item, bool) {
              const Work& work = *static_cast<Work*>(context);
              const int64_t begin = item * kPiece, n = std::min(kPiece, work.count - begin);
              sparsekd::kernels().quantize(work.x + begin, n, work.inverse, work.zero, work.y + begin);
            },
            &work);
      },
      "x"_a, "count"_a, "scale"_a, "zero"_a, "y"_a, "threads"_a);
  py::class_<PackedConv2dInt8> conv2d(m, "PackedConv2dInt8");
  conv2d.def(py::init(&make_int8<PackedConv2dInt8>), "shape"_a, "values"_a, "scale"_a, "row_ptr"_a, "col_idx"_a,
             "nnzb"_a, "bias"_a, "activation"_a, "x_scale"_a, "x_zero"_a, "y_scale"_a = 0.0f, "y_zero"_a = 0);
  def_run<uint8_t, float, void>(conv2d);
  struct PackedLinearInt8 : PackedConv2dInt8 {
    using PackedConv2dInt8::PackedConv2dInt8;
  };
  py::class_<PackedLinearInt8> linear(m, "PackedLinearInt8");
  linear.def(py::init([](int64_t in_features, int64_t out_features, int64_t bh, int64_t bw, Address values,
                         Address scale, Address row_ptr, Address col_idx, int64_t nnzb, Address bias, int activation,
                         float x_scale, int x_zero, float y_scale, int y_zero) {
               return make_int8<PackedLinearInt8>(sparsekd::linear_shape(1, in_features, out_features, bh, bw), values,
                                                  scale, row_ptr, col_idx, nnzb, bias, activation, x_scale, x_zero,
                                                  y_scale, y_zero);
             }),
             "in_features"_a, "out_features"_a, "bh"_a, "bw"_a, "values"_a, "scale"_a, "row_ptr"_a, "col_idx"_a,
             "nnzb"_a, "bias"_a, "activation"_a, "x_scale"_a, "x_zero"_a, "y_scale"_a = 0.0f, "y_zero"_a = 0);
  def_run_linear<uint8_t, float, void>(linear);
}

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
}

void bind_depthwise(py::module_& m) {
  using sparsekd::PackedDepthwise;
  py::class_<PackedDepthwise>(m, "PackedDepthwise")
      .def(py::init([](const Conv2dShape& shape, Address weights, Address bias, int activation) {
             if (shape.geometry.k != shape.geometry.c || shape.geometry.groups != shape.geometry.c)
               throw py::value_error("sparsekd._C.PackedDepthwise: expected as many groups and outputs as channels");
             return std::make_unique<PackedDepthwise>(shape, in<float>(weights), in<float>(bias),
                                                      to_activation(activation));
           }),
           "shape"_a, "weights"_a, "bias"_a = 0, "activation"_a = 0)
      .def(
          "run",
          [](const PackedDepthwise& self, Address x, Address residual, Address y, int threads, int64_t n) {
            py::gil_scoped_release release;
            self.run(n, in<float>(x), in<float>(residual), out(y), threads);
          },
          "x"_a, "residual"_a, "y"_a, "threads"_a, "n"_a);
}

template <class T>
void def_linear(py::module_& m, const char* name) {
  m.def(
      name,
      [](Address x, int64_t batch, int64_t in_features, Address values, Address row_ptr, Address col_idx, int64_t nnzb,
         int64_t bh, int64_t bw, Address bias, Address residual, Address y, int64_t out_features, int activation,
         int threads) {
        const Activation act = to_activation(activation);
        py::gil_scoped_release release;
        sparsekd::conv2d<T>(sparsekd::linear_shape(batch, in_features, out_features, bh, bw), {in<T>(x), true},
                            in<T>(values), blocks(row_ptr, col_idx, nnzb), {in<float>(bias), in<T>(residual), act},
                            {out<T>(y), true}, threads);
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
        sparsekd::conv2d_grad_input<T>(sparsekd::linear_shape(batch, in_features, out_features, bh, bw),
                                       {in<T>(dy), true}, in<T>(values), blocks(row_ptr, col_idx, nnzb),
                                       {out<T>(dx), true}, threads);
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
        sparsekd::conv2d_grad_values<T>(sparsekd::linear_shape(batch, in_features, out_features, bh, bw),
                                        {in<T>(x), true}, {in<T>(dy), true}, blocks(row_ptr, col_idx, nnzb),
                                        out<T>(dvalues), threads);
      },
      "x"_a, "batch"_a, "in_features"_a, "dy"_a, "out_features"_a, "row_ptr"_a, "col_idx"_a, "nnzb"_a, "bh"_a, "bw"_a,
      "dvalues"_a, "threads"_a);
}

template <class T>
struct PackedLinear : PackedConv2d<T> {
  using PackedConv2d<T>::PackedConv2d;
};

template <class T>
void def_packed_linear(py::module_& m, const char* name) {
  using Layer = PackedLinear<T>;
  py::class_<Layer> layer(m, name);
  layer.def(py::init([](int64_t in_features, int64_t out_features, int64_t bh, int64_t bw, Address values,
                        Address row_ptr, Address col_idx, int64_t nnzb, Address bias, int activation) {
              return std::make_unique<Layer>(sparsekd::linear_shape(1, in_features, out_features, bh, bw),
                                             in<T>(values), blocks(row_ptr, col_idx, nnzb), in<float>(bias),
                                             to_activation(activation));
            }),
            "in_features"_a, "out_features"_a, "bh"_a, "bw"_a, "values"_a, "row_ptr"_a, "col_idx"_a, "nnzb"_a,
            "bias"_a = 0, "activation"_a = 0);
  def_run_linear<T, T, T>(layer);
}

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

// One layer's tuple: features, grad, element, channels_last, channels, pixels. Columns of means and energy follow from
// the order.
using LayerTuple = std::tuple<Address, Address, int, bool, int64_t, int64_t>;

struct Layers {
  std::vector<FeatureLayer> layers;
  int64_t means = 0, energy = 0;

  explicit Layers(const std::vector<LayerTuple>& tuples) {
    layers.reserve(tuples.size());
    for (const auto& [features, grad, element, channels_last, channels, pixels] : tuples) {
      layers.push_back({in<void>(features), reinterpret_cast<void*>(grad), static_cast<sparsekd::Element>(element),
                        channels_last, channels, pixels, means, energy});
      means += channels;
      energy += pixels;
    }
  }
  int64_t count() const { return static_cast<int64_t>(layers.size()); }
};

std::vector<MapSize> map_sizes(const std::vector<int64_t>& sizes, int64_t& columns) {
  std::vector<MapSize> maps;
  columns = 0;
  for (size_t i = 0; i + 1 < sizes.size(); i += 2) {
    maps.push_back({sizes[i], sizes[i + 1], columns});
    columns += sizes[i] * sizes[i + 1];
  }
  return maps;
}

void bind_attention(py::module_& m) {
  m.attr("ELEMENTS") = py::dict("float32"_a = 0, "bfloat16"_a = 1, "float16"_a = 2);
  m.def(
      "feature_stats",
      [](const std::vector<LayerTuple>& tuples, int64_t batch, Address means, Address energy, int threads) {
        const Layers list(tuples);
        py::gil_scoped_release release;
        sparsekd::kernels().attention.feature_stats(
            {list.layers.data(), list.count(), batch, out(means), out(energy), list.means, list.energy, threads});
      },
      "layers"_a, "batch"_a, "means"_a, "energy"_a, "threads"_a);
  m.def(
      "feature_stats_grad",
      [](const std::vector<LayerTuple>& tuples, int64_t batch, Address grad_means, Address grad_energy, int threads) {
        const Layers list(tuples);
        py::gil_scoped_release release;
        sparsekd::kernels().attention.feature_stats_grad({list.layers.data(), list.count(), batch,
                                                          in<float>(grad_means), in<float>(grad_energy), list.means,
                                                          list.energy, threads});
      },
      "layers"_a, "batch"_a, "grad_means"_a, "grad_energy"_a, "threads"_a);
  m.def(
      "match_maps",
      [](int64_t batch, Address attention, Address teacher, const std::vector<int64_t>& teacher_sizes, Address student,
         const std::vector<int64_t>& student_sizes, Address loss, Address grad_attention, Address grad_student,
         int threads) {
        int64_t teacher_columns, student_columns;
        const auto teachers = map_sizes(teacher_sizes, teacher_columns);
        const auto students = map_sizes(student_sizes, student_columns);
        py::gil_scoped_release release;
        sparsekd::kernels().attention.match_maps(
            {batch, static_cast<int64_t>(teachers.size()), static_cast<int64_t>(students.size()), in<float>(attention),
             in<float>(teacher), in<float>(student), teachers.data(), students.data(), teacher_columns, student_columns,
             out(loss), out(grad_attention), out(grad_student), threads});
      },
      "batch"_a, "attention"_a, "teacher"_a, "teacher_sizes"_a, "student"_a, "student_sizes"_a, "loss"_a,
      "grad_attention"_a, "grad_student"_a, "threads"_a);
  m.def(
      "kd_loss",
      [](int64_t batch, int64_t classes, Address student, Address teacher, float temperature, Address loss,
         Address grad_student, int threads) {
        py::gil_scoped_release release;
        sparsekd::kernels().attention.kd_loss({batch, classes, in<float>(student), in<float>(teacher), temperature,
                                               out(loss), out(grad_student), threads});
      },
      "batch"_a, "classes"_a, "student"_a, "teacher"_a, "temperature"_a, "loss"_a, "grad_student"_a, "threads"_a);
}

using sparsekd::Network;
using sparsekd::NetworkLayer;

struct PoolLayer {
  NetworkLayer run;
};

template <class T>
void def_add_conv2d(py::class_<Network>& network) {
  network.def(
      "add",
      [](Network& self, const PackedConv2d<T>& layer, int64_t x, bool x_channels_last, int64_t residual, int64_t y,
         bool y_channels_last) {
        const auto run = [&layer, x_channels_last, y_channels_last](int64_t n, const void* x, const void* residual,
                                                                    void* y, int threads) {
          Conv2dGeometry geometry = layer.shape().geometry;
          geometry.n = n;
          layer.run(geometry, {static_cast<const T*>(x), x_channels_last}, static_cast<const T*>(residual),
                    {static_cast<T*>(y), y_channels_last}, threads);
        };
        self.add(run, x, residual, y);
      },
      py::keep_alive<1, 2>(), "layer"_a, "x"_a, "x_channels_last"_a, "residual"_a, "y"_a, "y_channels_last"_a);
}

template <class T>
void def_add_linear(py::class_<Network>& network) {
  network.def(
      "add",
      [](Network& self, const PackedLinear<T>& layer, int64_t rows, int64_t x, int64_t residual, int64_t y) {
        const auto run = [&layer, rows](int64_t n, const void* x, const void* residual, void* y, int threads) {
          Conv2dGeometry geometry = layer.shape().geometry;
          geometry.w = geometry.q = n * rows;
          layer.run(geometry, {static_cast<const T*>(x), true}, static_cast<const T*>(residual),
                    {static_cast<T*>(y), true}, threads);
        };
        self.add(run, x, residual, y);
      },
      py::keep_alive<1, 2>(), "layer"_a, "rows"_a, "x"_a, "residual"_a, "y"_a);
}

void bind_network(py::module_& m) {
  py::class_<PoolLayer>(m, "Pool")
      .def(py::init([](const Conv2dShape& shape, bool mean, const std::string& dtype) {
             if (shape.geometry.k != shape.geometry.c || (dtype != "float32" && dtype != "bfloat16"))
               throw py::value_error(
                   "sparsekd._C.Pool: expected as many outputs as channels in float32 or bfloat16, got " + dtype);
             return PoolLayer{dtype == "float32" ? sparsekd::pool_layer<float>(shape, mean)
                                                 : sparsekd::pool_layer<Bfloat16>(shape, mean)};
           }),
           "shape"_a, "mean"_a, "dtype"_a)
      .def(
          "run",
          [](const PoolLayer& self, Address x, Address y, int threads, int64_t n) {
            py::gil_scoped_release release;
            self.run(n, in<void>(x), nullptr, out<void>(y), threads);
          },
          "x"_a, "y"_a, "threads"_a, "n"_a);

  py::class_<Network> network(m, "Network");
  network.def(py::init([](const std::vector<std::tuple<int64_t, int64_t, int64_t>>& values, int64_t buffer_bytes) {
                std::vector<sparsekd::NetworkValue> all;
                for (const auto& [pointer, offset, bytes] : values) all.push_back({pointer, offset, bytes});
                return std::make_unique<Network>(std::move(all), buffer_bytes);
              }),
              "values"_a, "buffer_bytes"_a);
  def_add_conv2d<float>(network);
  def_add_conv2d<Bfloat16>(network);
  def_add_linear<float>(network);
  def_add_linear<Bfloat16>(network);
  network.def(
      "add",
      [](Network& self, const sparsekd::PackedDepthwise& layer, int64_t x, int64_t residual, int64_t y) {
        const auto run = [&layer](int64_t n, const void* x, const void* residual, void* y, int threads) {
          layer.run(n, static_cast<const float*>(x), static_cast<const float*>(residual), static_cast<float*>(y),
                    threads);
        };
        self.add(run, x, residual, y);
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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels. Pointers are integers and nothing is checked here: call sparsekd.ops instead.";
  bind_machine(m);
  bind_conv2d(m);
  bind_depthwise(m);
  bind_linear(m);
  bind_int8(m);
  bind_attention(m);
  bind_network(m);
}
