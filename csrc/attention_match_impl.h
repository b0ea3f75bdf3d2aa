// Distances between energy maps, and their gradients, image by image: pooled, normalised and compared while in cache.
#pragma once

#include "kernel_table.h"
#include "layout_impl.h"

namespace {

using sparsekd::MapSize;
using sparsekd::MatchMaps;

// The window of output i of an adaptive average pooling from `in` to `out`.
inline Range window(int64_t in, int64_t out, int64_t i) { return {i * in / out, ceil_div((i + 1) * in, out)}; }

// The windows of all columns; divisions of integers are dear, and every row has the same columns.
struct ColumnWindow {
  int32_t begin, end;
};

inline void fill_columns(const MapSize& from, const MapSize& to, ColumnWindow* columns) {
  for (int64_t j = 0; j < to.width; ++j) {
    const Range range = window(from.width, to.width, j);
    columns[j] = {static_cast<int32_t>(range.begin), static_cast<int32_t>(range.end)};
  }
}

// x [from] pooled to out [to]; rows are summed first. `row` holds a row of x.
inline void pool(const float* x, const MapSize& from, const MapSize& to, const ColumnWindow* columns, float* row,
                 float* out) {
  for (int64_t i = 0; i < to.height; ++i) {
    const Range rows = window(from.height, to.height, i);
    const float* line = x + rows.begin * from.width;
    if (rows.end - rows.begin > 1) {
      for (int64_t c = 0; c < from.width; ++c) row[c] = line[c];
      for (int64_t r = rows.begin + 1; r < rows.end; ++r)
        for (int64_t c = 0; c < from.width; ++c) row[c] += x[r * from.width + c];
      line = row;
    }
    const int32_t height = static_cast<int32_t>(rows.end - rows.begin);
    for (int64_t j = 0; j < to.width; ++j) {
      const ColumnWindow of = columns[j];
      float sum = line[of.begin];
      for (int32_t c = of.begin + 1; c < of.end; ++c) sum += line[c];
      out[i * to.width + j] = sum / static_cast<float>(height * (of.end - of.begin));
    }
  }
}

// The transpose of `pool`: adds what the gradient of out gives x to grad.
inline void pool_grad(const float* grad_out, const MapSize& from, const MapSize& to, const ColumnWindow* columns,
                      float* row, float* grad) {
  for (int64_t i = 0; i < to.height; ++i) {
    const Range rows = window(from.height, to.height, i);
    const int32_t height = static_cast<int32_t>(rows.end - rows.begin);
    for (int64_t c = 0; c < from.width; ++c) row[c] = 0.0f;
    for (int64_t j = 0; j < to.width; ++j) {
      const ColumnWindow of = columns[j];
      const float each = grad_out[i * to.width + j] / static_cast<float>(height * (of.end - of.begin));
      for (int32_t c = of.begin; c < of.end; ++c) row[c] += each;
    }
    for (int64_t r = rows.begin; r < rows.end; ++r)
      for (int64_t c = 0; c < from.width; ++c) grad[r * from.width + c] += row[c];
  }
}

inline float lane_sum(Vec16 v) {
  float lane[16];
  v.store(lane);
  for (int step = 8; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lane[i] += lane[i + step];
  return lane[0];
}

// visit(i, n) for the vectors of a length: 16 lanes each, fewer in the last.
template <class Visit>
inline void for_vectors(int64_t length, const Visit& visit) {
  for (int64_t i = 0; i < length; i += 16) visit(i, static_cast<int>(min64(16, length - i)));
}

inline float dot(const float* a, const float* b, int64_t length) {
  Vec16 sum = Vec16::zero();
  for_vectors(length, [&](int64_t i, int n) {
    sum = Vec16::fma(Vec16::load_first(a + i, n), Vec16::load_first(b + i, n), sum);
  });
  return lane_sum(sum);
}

constexpr float kNormEpsilon = 1e-12f;  // as in ops/attention.py

// out = x / max(|x|, epsilon); returns the divisor.
inline float normalize(const float* x, int64_t length, float* out) {
  const float norm = __builtin_sqrtf(dot(x, x, length));
  const float divisor = norm > kNormEpsilon ? norm : kNormEpsilon;
  for (int64_t i = 0; i < length; ++i) out[i] = x[i] / divisor;
  return divisor;
}

// |a - b|^2, and grad += weight * (a - b).
inline float difference(const float* a, const float* b, int64_t length, float weight, float* grad) {
  const Vec16 weights = Vec16::broadcast(&weight);
  Vec16 sum = Vec16::zero();
  for_vectors(length, [&](int64_t i, int n) {
    const Vec16 d = Vec16::sub(Vec16::load_first(a + i, n), Vec16::load_first(b + i, n));
    sum = Vec16::fma(d, d, sum);
    Vec16::fma(weights, d, Vec16::load_first(grad + i, n)).store_first(grad + i, n);
  });
  return lane_sum(sum);
}

struct MatchScratch {
  float* teacher;         // [area] one normalised teacher map
  float* student;         // [students][area] student maps at the size of a teacher's, normalised
  float* grad;            // [students][area] gradients of these
  float* divisor;         // [students]
  float* row;             // [student width]
  float* pooled;          // [area]
  ColumnWindow* columns;  // [teacher width]
};

inline MatchScratch match_scratch(const MatchMaps& args) {
  int64_t area = 0, width = 0, columns = 0;
  for (int64_t t = 0; t < args.teachers; ++t) {
    area = max64(area, args.teacher_size[t].height * args.teacher_size[t].width);
    columns = max64(columns, args.teacher_size[t].width);
  }
  for (int64_t s = 0; s < args.students; ++s) width = max64(width, args.student_size[s].width);
  const int64_t maps = args.students * area, floats = 2 * maps + 2 * area + args.students + width;
  const size_t bytes = sizeof(float) * static_cast<size_t>(floats);
  const size_t total = bytes + sizeof(ColumnWindow) * static_cast<size_t>(columns);
  float* p = static_cast<float*>(scratch(sparsekd::kScratchSum, total));
  MatchScratch m;
  m.teacher = p;
  m.pooled = m.teacher + area;
  m.student = m.pooled + area;
  m.grad = m.student + maps;
  m.divisor = m.grad + maps;
  m.row = m.divisor + args.students;
  m.columns = reinterpret_cast<ColumnWindow*>(m.row + width);
  return m;
}

inline bool same_size(const MapSize& a, const MapSize& b) { return a.height == b.height && a.width == b.width; }

// All pairs whose teacher has the size of teacher `first`; returns their part of the image's loss.
inline double match_size(const MatchMaps& args, int64_t image, int64_t first, const MatchScratch& m) {
  const MapSize size = args.teacher_size[first];
  const int64_t area = size.height * size.width;
  const auto meets = [&](int64_t t, int64_t s) { return args.attention != nullptr || s == t; };
  const auto wanted = [&](int64_t t) { return t >= first && same_size(args.teacher_size[t], size); };
  const auto seen = [&](int64_t s) { return args.attention != nullptr || (s < args.teachers && wanted(s)); };
  const float* students = args.student + image * args.student_stride;
  for (int64_t s = 0; s < args.students; ++s) {
    if (!seen(s)) continue;
    const float* map = students + args.student_size[s].energy;
    if (!same_size(args.student_size[s], size)) {
      fill_columns(args.student_size[s], size, m.columns);
      pool(map, args.student_size[s], size, m.columns, m.row, m.pooled);
      map = m.pooled;
    }
    m.divisor[s] = normalize(map, area, m.student + s * area);
    for (int64_t i = 0; i < area; ++i) m.grad[s * area + i] = 0.0f;
  }

  const float per_pair = 1.0f / static_cast<float>(args.batch), per_pixel = 1.0f / static_cast<float>(area);
  double loss = 0.0;
  for (int64_t t = first; t < args.teachers; ++t) {
    if (!wanted(t)) continue;
    normalize(args.teacher + image * args.teacher_stride + args.teacher_size[t].energy, area, m.teacher);
    for (int64_t s = 0; s < args.students; ++s) {
      if (!meets(t, s)) continue;
      const int64_t pair = (image * args.teachers + t) * args.students + s;
      const float weight = args.attention != nullptr ? args.attention[pair] : 1.0f;
      const float factor = 2.0f * weight * per_pixel * per_pair;
      const float distance =
          difference(m.student + s * area, m.teacher, area, factor, m.grad + s * area) * per_pixel * per_pair;
      loss += static_cast<double>(weight) * distance;
      if (args.attention != nullptr) args.grad_attention[pair] = distance;
    }
  }

  // Of v = m / max(|m|, epsilon): (dv - v <v, dv>) / |m|, without the second term where epsilon divided.
  for (int64_t s = 0; s < args.students; ++s) {
    if (!seen(s)) continue;
    const float* v = m.student + s * area;
    float* grad = m.grad + s * area;
    const float along = m.divisor[s] > kNormEpsilon ? dot(v, grad, area) : 0.0f;
    const float inverse = 1.0f / m.divisor[s];
    for (int64_t i = 0; i < area; ++i) grad[i] = (grad[i] - v[i] * along) * inverse;
    float* out = args.grad_student + image * args.student_stride + args.student_size[s].energy;
    if (same_size(args.student_size[s], size)) {
      for (int64_t i = 0; i < area; ++i) out[i] += grad[i];
    } else {
      fill_columns(args.student_size[s], size, m.columns);
      pool_grad(grad, args.student_size[s], size, m.columns, m.row, out);
    }
  }
  return loss;
}

void match_maps(const MatchMaps& args) {
  double* losses =
      static_cast<double*>(scratch(sparsekd::kScratchCall, sizeof(double) * static_cast<size_t>(args.batch)));
  parallel(args.threads, args.batch, [&](int64_t image) {
    const MatchScratch memory = match_scratch(args);
    zero_floats(args.grad_student + image * args.student_stride, args.student_stride);
    double loss = 0.0;
    for (int64_t t = 0; t < args.teachers; ++t) {
      bool first = true;
      for (int64_t before = 0; before < t && first; ++before)
        first = !same_size(args.teacher_size[before], args.teacher_size[t]);
      if (first) loss += match_size(args, image, t, memory);
    }
    losses[image] = loss;
  });
  double loss = 0.0;
  for (int64_t image = 0; image < args.batch; ++image) loss += losses[image];
  *args.loss = static_cast<float>(loss);
}

}  // namespace
