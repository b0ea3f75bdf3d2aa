// What the kernels of distillation losses are given. Plain data only; kernel_table.h says why.
#pragma once

#include "elements.h"

namespace sparsekd {

// One tapped layer [batch, channels, pixels], or [batch, pixels, channels] when channels_last.
struct FeatureLayer {
  const void* features;
  void* grad;  // in the format of features; not used in the forward pass
  Element element;
  bool channels_last;
  int64_t channels, pixels;
  int64_t means, energy;  // its first column in the rows of those two
};

// The means over pixels and the mean squares over channels of all layers, side by side in the rows of an image.
struct FeatureStats {
  const FeatureLayer* layer;
  int64_t count, batch;
  float* means;   // [batch, means_stride]
  float* energy;  // [batch, energy_stride]
  int64_t means_stride, energy_stride;
  int threads;
};

// grad = grad_means / pixels + 2 * features * grad_energy / channels, with the gradients laid out as FeatureStats.
struct FeatureStatsGrad {
  const FeatureLayer* layer;
  int64_t count, batch;
  const float* grad_means;
  const float* grad_energy;
  int64_t means_stride, energy_stride;
  int threads;
};

struct MapSize {
  int64_t height, width;
  int64_t energy;  // its first column
};

// sum_t mean_b sum_s attention * mean_hw (student pooled to t's size and normalised - teacher normalised)^2, and the
// gradients of that.
struct MatchMaps {
  int64_t batch, teachers, students;
  const float* attention;  // [batch, teachers, students]; null: teacher t meets student t alone, with weight 1
  const float* teacher;    // [batch, teacher_stride]
  const float* student;    // [batch, student_stride]
  const MapSize* teacher_size;
  const MapSize* student_size;
  int64_t teacher_stride, student_stride;
  float* loss;
  float* grad_attention;  // [batch, teachers, students], null with attention
  float* grad_student;    // [batch, student_stride]
  int threads;
};

// temperature^2 * sum_classes KL(softmax(teacher / temperature) || softmax(student / temperature)) / batch, and its
// gradient to the student's logits.
struct KdLoss {
  int64_t batch, classes;
  const float* student;
  const float* teacher;
  float temperature;
  float* loss;
  float* grad_student;
  int threads;
};

struct AttentionKernels {
  void (*feature_stats)(const FeatureStats&);
  void (*feature_stats_grad)(const FeatureStatsGrad&);
  void (*match_maps)(const MatchMaps&);
  void (*kd_loss)(const KdLoss&);
};

}  // namespace sparsekd
