// Logit distillation: loss and gradient while a row of logits is in cache.
#pragma once

#include "activation_impl.h"
#include "attention_match_impl.h"

namespace {

using sparsekd::KdLoss;

constexpr float kNoClass = -1e4f;  // fills a row up to whole vectors: finite, and e^x is 0

// out [padded] = (row - its largest) / temperature; returns the sum of e^out, which is left in weights [padded].
inline float softmax_terms(const float* row, int64_t classes, int64_t padded, float per_temperature, float* out,
                           float* weights) {
  float largest = row[0];
  for (int64_t i = 1; i < classes; ++i) largest = row[i] > largest ? row[i] : largest;
  for (int64_t i = 0; i < classes; ++i) out[i] = (row[i] - largest) * per_temperature;
  for (int64_t i = classes; i < padded; ++i) out[i] = kNoClass;
  Vec16 sum = Vec16::zero();
  for (int64_t i = 0; i < padded; i += 16) {
    const Vec16 weight = exp(Vec16::load(out + i));
    weight.store(weights + i);
    sum = Vec16::add(sum, weight);
  }
  return lane_sum(sum);
}

void kd_loss(const KdLoss& args) {
  const int64_t padded = round_up(args.classes, 16);
  const float t = args.temperature, images = static_cast<float>(args.batch);
  double* losses = scratch_of<double>(sparsekd::kScratchCall, args.batch);
  parallel(args.threads, args.batch, [&](int64_t image) {
    float* x = scratch_of<float>(sparsekd::kScratchSum, 4 * padded);
    float *y = x + padded, *p = y + padded, *q = p + padded;
    const float* student = args.student + image * args.classes;
    const float* teacher = args.teacher + image * args.classes;
    const float sum_q = softmax_terms(student, args.classes, padded, 1.0f / t, x, q);
    const float sum_p = softmax_terms(teacher, args.classes, padded, 1.0f / t, y, p);
    // A class that the teacher rules out (-inf) adds nothing, whatever the student says of it.
    for (int64_t i = 0; i < args.classes; ++i) {
      y[i] = p[i] == 0.0f ? 0.0f : y[i];
      x[i] = p[i] == 0.0f ? 0.0f : x[i];
    }
    Vec16 cross = Vec16::zero();
    for (int64_t i = 0; i < padded; i += 16)
      cross = Vec16::fma(Vec16::load(p + i), Vec16::sub(Vec16::load(y + i), Vec16::load(x + i)), cross);
    losses[image] = static_cast<double>(lane_sum(cross) / sum_p) + __builtin_log(static_cast<double>(sum_q)) -
                    __builtin_log(static_cast<double>(sum_p));
    float* grad = args.grad_student + image * args.classes;
    const float scale = t / images;  // equal rows must give 0, so both are divided before they are subtracted
    for (int64_t i = 0; i < args.classes; ++i) grad[i] = (q[i] / sum_q - p[i] / sum_p) * scale;
  });
  double loss = 0.0;
  for (int64_t image = 0; image < args.batch; ++image) loss += losses[image];
  *args.loss = static_cast<float>(loss * t * t / args.batch);
}

}  // namespace
