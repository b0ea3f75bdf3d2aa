#include <tuple>
#include <vector>

#include "attention.h"
#include "bindings.h"
#include "dispatch.h"

namespace sparsekd {

namespace {

// Of one layer: features, grad, element, channels_last, channels, pixels.
using LayerTuple = std::tuple<Address, Address, int, bool, int64_t, int64_t>;

FeatureLayers feature_layers(const std::vector<LayerTuple>& tuples) {
  FeatureLayers layers;
  for (const auto& [features, grad, element, channels_last, channels, pixels] : tuples)
    layers.add(in<void>(features), out<void>(grad), static_cast<Element>(element), channels_last, channels, pixels);
  return layers;
}

}  // namespace

void bind_attention(py::module_& m) {
  m.attr("ELEMENTS") = py::dict("float32"_a = 0, "bfloat16"_a = 1, "float16"_a = 2);
  m.def(
      "feature_stats",
      [](const std::vector<LayerTuple>& layers, int64_t batch, Address means, Address energy, int threads) {
        py::gil_scoped_release release;
        feature_layers(layers).stats(batch, out(means), out(energy), threads);
      },
      "layers"_a, "batch"_a, "means"_a, "energy"_a, "threads"_a);
  m.def(
      "feature_stats_grad",
      [](const std::vector<LayerTuple>& layers, int64_t batch, Address grad_means, Address grad_energy, int threads) {
        py::gil_scoped_release release;
        feature_layers(layers).stats_grad(batch, in<float>(grad_means), in<float>(grad_energy), threads);
      },
      "layers"_a, "batch"_a, "grad_means"_a, "grad_energy"_a, "threads"_a);
  m.def(
      "match_maps",
      [](int64_t batch, Address attention, Address teacher, const std::vector<int64_t>& teacher_sizes, Address student,
         const std::vector<int64_t>& student_sizes, Address loss, Address grad_attention, Address grad_student,
         int threads) {
        py::gil_scoped_release release;
        match_maps(batch, in<float>(attention), {.maps = in<float>(teacher), .sizes = teacher_sizes},
                   {.maps = in<float>(student), .sizes = student_sizes}, out(loss), out(grad_attention),
                   out(grad_student), threads);
      },
      "batch"_a, "attention"_a, "teacher"_a, "teacher_sizes"_a, "student"_a, "student_sizes"_a, "loss"_a,
      "grad_attention"_a, "grad_student"_a, "threads"_a);
  m.def(
      "kd_loss",
      [](int64_t batch, int64_t classes, Address student, Address teacher, float temperature, Address loss,
         Address grad_student, int threads) {
        py::gil_scoped_release release;
        kernels().attention.kd_loss({.batch = batch,
                                     .classes = classes,
                                     .student = in<float>(student),
                                     .teacher = in<float>(teacher),
                                     .temperature = temperature,
                                     .loss = out(loss),
                                     .grad_student = out(grad_student),
                                     .threads = threads});
      },
      "batch"_a, "classes"_a, "student"_a, "teacher"_a, "temperature"_a, "loss"_a, "grad_student"_a, "threads"_a);
}

}  // namespace sparsekd
