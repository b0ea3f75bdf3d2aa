#include "attention.h"

#include "dispatch.h"

namespace sparsekd {

void FeatureLayers::add(const void* features, void* grad, Element element, bool channels_last, int64_t channels,
                        int64_t pixels) {
  layers_.push_back({.features = features,
                     .grad = grad,
                     .element = element,
                     .channels_last = channels_last,
                     .channels = channels,
                     .pixels = pixels,
                     .means = means_,
                     .energy = energy_});
  means_ += channels;
  energy_ += pixels;
}

void FeatureLayers::stats(int64_t batch, float* means, float* energy, int threads) const {
  kernels().attention.feature_stats({.layer = layers_.data(),
                                     .count = static_cast<int64_t>(layers_.size()),
                                     .batch = batch,
                                     .means = means,
                                     .energy = energy,
                                     .means_stride = means_,
                                     .energy_stride = energy_,
                                     .threads = threads});
}

void FeatureLayers::stats_grad(int64_t batch, const float* grad_means, const float* grad_energy, int threads) const {
  kernels().attention.feature_stats_grad({.layer = layers_.data(),
                                          .count = static_cast<int64_t>(layers_.size()),
                                          .batch = batch,
                                          .grad_means = grad_means,
                                          .grad_energy = grad_energy,
                                          .means_stride = means_,
                                          .energy_stride = energy_,
                                          .threads = threads});
}

namespace {

struct Maps {
  std::vector<MapSize> sizes;
  int64_t columns = 0;

  explicit Maps(const std::vector<int64_t>& pairs) {
    for (size_t i = 0; i + 1 < pairs.size(); i += 2) {
      sizes.push_back({.height = pairs[i], .width = pairs[i + 1], .energy = columns});
      columns += pairs[i] * pairs[i + 1];
    }
  }
  int64_t count() const { return static_cast<int64_t>(sizes.size()); }
};

}  // namespace

void match_maps(int64_t batch, const float* attention, MapRows teacher, MapRows student, float* loss,
                float* grad_attention, float* grad_student, int threads) {
  const Maps teachers(teacher.sizes), students(student.sizes);
  kernels().attention.match_maps({.batch = batch,
                                  .teachers = teachers.count(),
                                  .students = students.count(),
                                  .attention = attention,
                                  .teacher = teacher.maps,
                                  .student = student.maps,
                                  .teacher_size = teachers.sizes.data(),
                                  .student_size = students.sizes.data(),
                                  .teacher_stride = teachers.columns,
                                  .student_stride = students.columns,
                                  .loss = loss,
                                  .grad_attention = grad_attention,
                                  .grad_student = grad_student,
                                  .threads = threads});
}

}  // namespace sparsekd
