#include "bindings.h"

#include "cache.h"
#include "dispatch.h"
#include "peak.h"

namespace sparsekd {

namespace {

void bind_machine(py::module_& m) {
  m.def("isas", &available_isas, "Instruction sets this CPU runs, best first.");
  m.def("isa", [] { return std::string(kernels().isa); }, "The instruction set in use.");
  m.def("use_isa", &use_isa, "name"_a, "Uses another instruction set from now on.");
  m.def(
      "l1_data_cache", [] { return py::make_tuple(l1_data_cache().bytes, std::string(l1_data_cache().source)); },
      "Bytes of the first level's data cache, and what said so.");
  m.def("tile_floats", &tile_floats, "cache_bytes"_a,
        "Floats that a tile of single pixels may read, for such a cache.");
  m.def("openmp", &openmp_name, "The OpenMP library in use and its thread limit.");
  m.def(
      "random_lines",
      [](Address memory, int64_t bytes, int threads, double seconds) {
        py::gil_scoped_release release;
        return random_lines(in<uint8_t>(memory), bytes, threads, seconds);
      },
      "memory"_a, "bytes"_a, "threads"_a, "seconds"_a = 0.2);
  m.def("peak_gflops", &peak_gflops, "threads"_a, "seconds"_a = 0.05, "dtype"_a = "float32",
        py::call_guard<py::gil_scoped_release>(),
        "Measured multiply-add peak of the kernels for `dtype` (float32, bfloat16 or int8) in the instruction set in "
        "use.");
}

}  // namespace

}  // namespace sparsekd

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels. Pointers are integers and nothing is checked here: call sparsekd.ops instead.";
  sparsekd::bind_machine(m);
  sparsekd::bind_conv2d(m);
  sparsekd::bind_linear(m);
  sparsekd::bind_embedding(m);
  sparsekd::bind_int8(m);
  sparsekd::bind_attention(m);
  sparsekd::bind_norm_relu(m);
  sparsekd::bind_network(m);
  sparsekd::bind_runtime(m);
}
