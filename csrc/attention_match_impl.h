// Distances between energy maps, and their gradients, image by image: pooled, normalised and compared while in cache.
#pragma once

#include "attention_kernels.h"
#include "copy_impl.h"
#include "parallel_impl.h"
#include "scratch_impl.h"

namespace {

using sparsekd::MapSize;
using sparsekd::MatchMaps;

// The window of output i of an adaptive average pooling from `in` to `out`.
inline Range window(int64_t in, int64_t out, int64_t i) { return {i * in / out, ceil_div((i + 1) * in, out)}; }

inline bool same_size(const MapSize& a, const MapSize& b) { return a.height == b.height && a.width == b.width; }

struct ColumnWindow {
  int32_t begin, end;
};

inline void fill_columns(int64_t in, int64_t out, ColumnWindow* columns) {
  for (int64_t j = 0; j < out; ++j) {
    const Range range = window(in, out, j);
    columns[j] = {static_cast<int32_t>(range.begin), static_cast<int32_t>(range.end)};
  }
}

// Average pooling and its transpose. The outputs whose windows hold an input are the window of the opposite pooling, so
// both directions are sums over windows.
struct Pooling {
  MapSize from, to;
  ColumnWindow* columns;  // [to.width]
  ColumnWindow* back;     // [from.width]
  float* share;           // [to.width] 1 / columns in the window
  float* row;             // [the larger width] a sum of rows
  float* sums;            // [the larger width] its columns' sums

  // Divisions of integers are dear, and neighbouring maps are often alike.
  void set(const MapSize& new_from, const MapSize& new_to) {
    if (same_size(from, new_from) && same_size(to, new_to)) return;
    from = new_from;
    to = new_to;
    fill_columns(from.width, to.width, columns);
    fill_columns(to.width, from.width, back);
    for (int64_t j = 0; j < to.width; ++j) share[j] = 1.0f / static_cast<float>(columns[j].end - columns[j].begin);
  }
};

// visit(i, n) for every row i of the result, when `sums` holds the sums over its windows, n rows high.
template <class Visit>
inline void sum_windows(const float* x, const MapSize& from, const MapSize& to, const ColumnWindow* columns, float* row,
                        float* sums, const Visit& visit) {
  Range seen{0, 0};
  for (int64_t i = 0; i < to.height; ++i) {
    const Range rows = window(from.height, to.height, i);
    if (rows.begin != seen.begin || rows.end != seen.end) {
      const float* line = x + rows.begin * from.width;
      if (rows.end - rows.begin > 1) {
        for (int64_t c = 0; c < from.width; ++c) row[c] = line[c] + line[from.width + c];
        for (int64_t r = rows.begin + 2; r < rows.end; ++r)
          for (int64_t c = 0; c < from.width; ++c) row[c] += x[r * from.width + c];
        line = row;
      }
      for (int64_t j = 0; j < to.width; ++j) {
        float sum = line[columns[j].begin];
        for (int32_t c = columns[j].begin + 1; c < columns[j].end; ++c) sum += line[c];
        sums[j] = sum;
      }
      seen = rows;
    }
    visit(i, rows.end - rows.begin);
  }
}

inline void pool(const Pooling& p, const float* x, float* out) {
  sum_windows(x, p.from, p.to, p.columns, p.row, p.sums, [&](int64_t i, int64_t height) {
    const float scale = 1.0f / static_cast<float>(height);
    for (int64_t j = 0; j < p.to.width; ++j) out[i * p.to.width + j] = p.sums[j] * (p.share[j] * scale);
  });
}

// Adds what the gradient of out, which is overwritten, gives x to grad.
inline void pool_grad(const Pooling& p, float* grad_out, float* grad) {
  for (int64_t i = 0; i < p.to.height; ++i) {
    const Range rows = window(p.from.height, p.to.height, i);
    const float scale = 1.0f / static_cast<float>(rows.end - rows.begin);
    for (int64_t j = 0; j < p.to.width; ++j) grad_out[i * p.to.width + j] *= p.share[j] * scale;
  }
  sum_windows(grad_out, p.to, p.from, p.back, p.row, p.sums, [&](int64_t i, int64_t) {
    for (int64_t c = 0; c < p.from.width; ++c) grad[i * p.from.width + c] += p.sums[c];
  });
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
  int64_t i = 0;
  for (; i + 16 <= length; i += 16) visit(i, 16);
  if (i < length) visit(i, static_cast<int>(length - i));
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
  const float inverse = 1.0f / divisor;
  for (int64_t i = 0; i < length; ++i) out[i] = x[i] * inverse;
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
  float* teacher;  // [area] one normalised teacher map
  float* student;  // [students][area] student maps at the size of a teacher's, normalised
  float* grad;     // [students][area] gradients of these
  float* divisor;  // [students]
  float* pooled;   // [area]
  Pooling pooling;
};

inline MatchScratch match_scratch(const MatchMaps& args) {
  int64_t area = 0, from = 0, to = 0;
  for (int64_t t = 0; t < args.teachers; ++t) {
    area = max64(area, args.teacher_size[t].height * args.teacher_size[t].width);
    to = max64(to, args.teacher_size[t].width);
  }
  for (int64_t s = 0; s < args.students; ++s) from = max64(from, args.student_size[s].width);
  const int64_t maps = args.students * area, wide = max64(from, to);
  MatchScratch m{};
  Arena::carve(sparsekd::kScratchSum, [&](Arena& arena) {
    m.teacher = arena.take<float>(area);
    m.pooled = arena.take<float>(area);
    m.student = arena.take<float>(maps);
    m.grad = arena.take<float>(maps);
    m.divisor = arena.take<float>(args.students);
    m.pooling.share = arena.take<float>(to);
    m.pooling.row = arena.take<float>(wide);
    m.pooling.sums = arena.take<float>(wide);
    m.pooling.columns = arena.take<ColumnWindow>(to);
    m.pooling.back = arena.take<ColumnWindow>(from);
  });
  return m;
}

// All pairs whose teacher has the size of teacher `first`; returns their part of the image's loss.
inline double match_size(const MatchMaps& args, int64_t image, int64_t first, MatchScratch& m) {
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
      m.pooling.set(args.student_size[s], size);
      pool(m.pooling, map, m.pooled);
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
      m.pooling.set(args.student_size[s], size);
      pool_grad(m.pooling, grad, out);
    }
  }
  return loss;
}

void match_maps(const MatchMaps& args) {
  double* losses = scratch_of<double>(sparsekd::kScratchCall, args.batch);
  parallel(args.threads, args.batch, [&](int64_t image) {
    MatchScratch memory = match_scratch(args);
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
