// Networks without torch: numpy arrays in and out. This is the one binding that checks what it is given.
#include <pybind11/numpy.h>

#include <memory>
#include <vector>

#include "bindings.h"
#include "runtime/session.h"

namespace sparsekd {

namespace {

py::tuple describe(const std::vector<TensorInfo>& tensors) {
  py::tuple all(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto& [name, dtype, shape] = tensors[i];
    py::tuple sizes(shape.rank);
    for (int axis = 0; axis < shape.rank; ++axis) sizes[static_cast<size_t>(axis)] = shape.at(axis);
    all[i] = py::make_tuple(name, std::string(name_of(dtype)), sizes);
  }
  return all;
}

py::dtype dtype_of(DType dtype) { return py::dtype(name_of(dtype)); }

// The array as the kernels read it: of the right type, in one piece, aligned.
py::array taken(const TensorInfo& info, const py::handle& given) {
  if (!py::isinstance<py::array>(given))
    throw py::type_error("sparsekd.Session: expected a numpy array for '" + info.name + "', got " +
                         std::string(py::str(py::type::of(given).attr("__name__"))));
  py::array array = py::reinterpret_borrow<py::array>(given);
  if (!array.dtype().is(dtype_of(info.dtype)) && !array.dtype().equal(dtype_of(info.dtype)))
    throw py::type_error("sparsekd.Session: expected '" + info.name + "' of the type " + name_of(info.dtype) +
                         ", got " + std::string(py::str(array.dtype())) + "; use x.astype(\"" + name_of(info.dtype) +
                         "\")");
  constexpr int kWhole = py::array::c_style | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
  if ((array.flags() & kWhole) == kWhole) return array;
  return py::array::ensure(py::module_::import("numpy").attr("require")(array, py::none(), "CA"));
}

py::list run(const Session& session, const py::sequence& given) {
  const auto& inputs = session.inputs();
  if (given.size() != inputs.size())
    throw py::value_error("sparsekd.Session: expected " + std::to_string(inputs.size()) + " inputs, got " +
                          std::to_string(given.size()));
  std::vector<py::array> arrays;
  std::vector<Sizes> sizes;
  std::vector<int> ranks;
  std::vector<const void*> from;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const py::array& array = arrays.emplace_back(taken(inputs[i], given[i]));
    Sizes& own = sizes.emplace_back();
    ranks.push_back(static_cast<int>(array.ndim()));
    for (int axis = 0; axis < std::min(ranks.back(), kMaxRank); ++axis)
      own[static_cast<size_t>(axis)] = array.shape(axis);
    if (ranks.back() > kMaxRank)
      throw py::value_error("sparsekd.Session: expected '" + inputs[i].name + "' of shape " +
                            to_string(inputs[i].shape) + ", got " + std::to_string(ranks.back()) + " dimensions");
    from.push_back(array.data());
  }
  const int64_t batch = session.batch_of(sizes, ranks);
  py::list results;
  std::vector<void*> to;
  for (const auto& [name, dtype, shape] : session.outputs()) {
    const Sizes all = shape.sizes(batch);
    py::array array(dtype_of(dtype), std::vector<py::ssize_t>(all.begin(), all.begin() + shape.rank));
    to.push_back(array.mutable_data());
    results.append(std::move(array));
  }
  py::gil_scoped_release release;
  session.run(batch, from.data(), to.data());
  return results;
}

}  // namespace

void bind_runtime(py::module_& m) {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const FileError& error) {
      const py::object raised = py::reinterpret_borrow<py::object>(PyExc_OSError)(error.code, error.what());
      PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(raised.ptr())), raised.ptr());
    } catch (const FormatError& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
    }
  });
  py::class_<Session>(m, "Session")
      .def(py::init<const std::string&, int>(), "path"_a, "threads"_a, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("inputs", [](const Session& self) { return describe(self.inputs()); })
      .def_property_readonly("outputs", [](const Session& self) { return describe(self.outputs()); })
      .def_property_readonly("threads", &Session::threads)
      .def_property_readonly("note", &Session::note)
      .def("run", &run, "inputs"_a);
}

}  // namespace sparsekd
