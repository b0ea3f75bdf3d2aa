// The kernels of distillation losses against plain double loops.
#include <algorithm>
#include <cstring>
#include <random>

#include "check.h"
#include "dispatch.h"

using namespace sparsekd;

namespace {

// Statistics of feature maps and their gradient; `loads` turns an element of a half type into a float.
template <class T, class Loads>
void check_maps(const Setting& set, Element element, double rounding, const std::string& isa, Loads loads,
                int64_t batch, int64_t channels, int64_t pixels) {
  const std::string name = isa + " maps " + std::to_string(channels) + "x" + std::to_string(pixels);
  const size_t count = static_cast<size_t>(batch * channels * pixels);
  const Guarded maps(sizeof(T) * count, set.side), grads(sizeof(T) * count, set.side);
  const Guarded means(sizeof(float) * static_cast<size_t>(batch * channels), set.side);
  const Guarded energy(sizeof(float) * static_cast<size_t>(batch * pixels), set.side);
  std::mt19937 generator(2);
  T* x = reinterpret_cast<T*>(maps.floats());
  for (size_t i = 0; i < count; ++i) {
    if constexpr (sizeof(T) == sizeof(float))
      x[i] = std::uniform_real_distribution<float>(-1, 1)(generator);
    else  // any pattern with an exponent around 1
      x[i] = static_cast<T>((generator() & 0x83ffu) | (element == Element::kFloat16 ? 0x3800u : 0x3e00u));
  }
  const FeatureLayer layer{.features = x,
                           .grad = grads.floats(),
                           .element = element,
                           .channels_last = set.x_last,
                           .channels = channels,
                           .pixels = pixels,
                           .means = 0,
                           .energy = 0};
  const auto index = [&](int64_t b, int64_t c, int64_t i) {
    return (b * channels * pixels) + (set.x_last ? i * channels + c : c * pixels + i);
  };
  kernels().attention.feature_stats({&layer, 1, batch, means.floats(), energy.floats(), channels, pixels, set.threads});
  Exact mean(batch * channels), square(batch * pixels), grad(static_cast<int64_t>(count));
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < pixels; ++i) {
        const double v = loads(x[index(b, c, i)]);
        mean.add(b * channels + c, v / static_cast<double>(pixels));
        square.add(b * pixels + i, v * v / static_cast<double>(channels));
      }
  for (int64_t i = 0; i < batch * channels; ++i) compare(name + " means", mean, i, means.floats()[i]);
  for (int64_t i = 0; i < batch * pixels; ++i) compare(name + " energy", square, i, energy.floats()[i]);
  // The statistics serve as their own gradients: any numbers do.
  kernels().attention.feature_stats_grad(
      {&layer, 1, batch, means.floats(), energy.floats(), channels, pixels, set.threads});
  const T* got = reinterpret_cast<const T*>(grads.floats());
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < pixels; ++i) {
        const int64_t at = index(b, c, i);
        grad.add(at, means.floats()[b * channels + c] / static_cast<double>(pixels));
        grad.add(at, 2.0 * loads(x[at]) * energy.floats()[b * pixels + i] / static_cast<double>(channels));
        grad.magnitude[static_cast<size_t>(at)] += rounding * std::fabs(grad.value[static_cast<size_t>(at)]) / 4e-6;
        compare(name + " gradient", grad, at, loads(got[at]));
      }
}

double from_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return value;
}

double from_float16(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  const double magnitude = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
  return bits & 0x8000 ? -magnitude : magnitude;
}

// One map pooled to the size of another and divided by its norm, the way back for gradients, and bounds for the rounding
// errors of both.
class Unit {
 public:
  Unit(const float* maps, MapSize from, MapSize to) : from_(from), to_(to) {
    const float* map = maps + from.energy;
    for (int64_t i = 0; i < to.height * to.width; ++i) {
      double sum = 0;
      each_cell(i, [&](int64_t cell) { sum += map[cell]; });
      values_.push_back(sum / cells(i));
      norm_ += values_.back() * values_.back();
    }
    norm_ = std::sqrt(norm_);
    for (double& value : values_) value /= norm_;
  }

  size_t size() const { return values_.size(); }
  double operator[](size_t i) const { return values_[i]; }

  // From the gradient of the unit to that of the map, whose first element is `exact`'s element `first`:
  // (g - v <v, g>) / norm, spread over the cells that were pooled.
  void add_gradient(const std::vector<double>& grad, const std::vector<double>& magnitude, Exact& exact,
                    int64_t first) const {
    double along = 0, along_magnitude = 0;
    for (size_t i = 0; i < size(); ++i) {
      along += values_[i] * grad[i];
      along_magnitude += std::fabs(values_[i]) * magnitude[i];
    }
    for (size_t i = 0; i < size(); ++i) {
      const int64_t place = static_cast<int64_t>(i);
      const double share = 1 / (norm_ * cells(place));
      each_cell(place, [&](int64_t cell) {
        const size_t at = static_cast<size_t>(first + cell);
        exact.value[at] += (grad[i] - values_[i] * along) * share;
        exact.magnitude[at] += (magnitude[i] + std::fabs(values_[i]) * along_magnitude) * share;
      });
    }
  }

 private:
  // body(cell of the map) for every cell of the window that is pooled to place i.
  template <class Body>
  void each_cell(int64_t i, const Body& body) const {
    const int64_t row = i / to_.width, column = i % to_.width;
    for (int64_t y = row * from_.height / to_.height; y * to_.height < (row + 1) * from_.height; ++y)
      for (int64_t x = column * from_.width / to_.width; x * to_.width < (column + 1) * from_.width; ++x)
        body(y * from_.width + x);
  }
  double cells(int64_t i) const {
    double count = 0;
    each_cell(i, [&](int64_t) { ++count; });
    return count;
  }

  MapSize from_, to_;
  std::vector<double> values_;
  double norm_ = 0;
};

// Maps of 5 x 3 and 2 x 2 against 4 x 4 and 2 x 2: pooling both ways. Distances and gradients by plain loops.
void check_match(const Setting& set, const std::string& isa) {
  const int64_t batch = 3, teacher_row = 20, student_row = 19;
  const MapSize teachers[] = {{4, 4, 0}, {2, 2, 16}}, students[] = {{5, 3, 0}, {2, 2, 15}};
  const auto memory = [&](int64_t floats) { return Guarded(sizeof(float) * static_cast<size_t>(floats), set.side); };
  const Guarded attention = memory(batch * 4), teacher = memory(batch * teacher_row),
                student = memory(batch * student_row);
  const Guarded loss = memory(1), distance = memory(batch * 4), grad = memory(batch * student_row);
  std::mt19937 generator(3);
  for (const Guarded* operand : {&attention, &teacher, &student})
    for (size_t i = 0; i < operand->bytes() / sizeof(float); ++i)
      operand->floats()[i] = std::uniform_real_distribution<float>(0, 1)(generator);
  kernels().attention.match_maps({.batch = batch,
                                  .teachers = 2,
                                  .students = 2,
                                  .attention = attention.floats(),
                                  .teacher = teacher.floats(),
                                  .student = student.floats(),
                                  .teacher_size = teachers,
                                  .student_size = students,
                                  .teacher_stride = teacher_row,
                                  .student_stride = student_row,
                                  .loss = loss.floats(),
                                  .grad_attention = distance.floats(),
                                  .grad_student = grad.floats(),
                                  .threads = set.threads});
  Exact total(1), exact(batch * 4), exact_grad(batch * student_row);
  for (int64_t b = 0, pair = 0; b < batch; ++b)
    for (const MapSize& t : teachers)
      for (const MapSize& s : students) {
        const Unit want(teacher.floats() + b * teacher_row, t, t), got(student.floats() + b * student_row, s, t);
        const double share = 1 / static_cast<double>(want.size() * batch), weight = attention.floats()[pair];
        std::vector<double> grad_unit, magnitude;
        for (size_t i = 0; i < want.size(); ++i) {
          exact.add(pair, (got[i] - want[i]) * (got[i] - want[i]) * share);
          grad_unit.push_back(2 * weight * share * (got[i] - want[i]));
          magnitude.push_back(2 * weight * share * (got[i] + want[i]));
        }
        got.add_gradient(grad_unit, magnitude, exact_grad, b * student_row + s.energy);
        exact.magnitude[static_cast<size_t>(pair)] += 0.1;  // of the units that were subtracted
        total.add(0, exact.value[static_cast<size_t>(pair)] * weight);
        ++pair;
      }
  total.magnitude[0] += 1;
  compare(isa + " loss of maps", total, 0, loss.floats()[0]);
  for (int64_t i = 0; i < batch * 4; ++i) compare(isa + " distance of maps", exact, i, distance.floats()[i]);
  for (int64_t i = 0; i < batch * student_row; ++i) compare(isa + " gradient of maps", exact_grad, i, grad.floats()[i]);
}

void check_kd(const Setting& set, const std::string& isa, int64_t classes) {
  const int64_t batch = 3;
  const auto memory = [&](int64_t floats) { return Guarded(sizeof(float) * static_cast<size_t>(floats), set.side); };
  const Guarded student = memory(batch * classes), teacher = memory(batch * classes);
  const Guarded loss = memory(1), grad = memory(batch * classes);
  std::mt19937 generator(4);
  for (const Guarded* operand : {&student, &teacher})
    for (int64_t i = 0; i < batch * classes; ++i)
      operand->floats()[i] = std::uniform_real_distribution<float>(-5, 5)(generator);
  kernels().attention.kd_loss(
      {batch, classes, student.floats(), teacher.floats(), 2.0f, loss.floats(), grad.floats(), set.threads});
  Exact total(1), exact(batch * classes);
  for (int64_t b = 0; b < batch; ++b) {
    const float *x = student.floats() + b * classes, *y = teacher.floats() + b * classes;
    double q = 0, p = 0;
    for (int64_t i = 0; i < classes; ++i) q += std::exp(x[i] / 2.0), p += std::exp(y[i] / 2.0);
    for (int64_t i = 0; i < classes; ++i) {
      const double pi = std::exp(y[i] / 2.0) / p, qi = std::exp(x[i] / 2.0) / q;
      total.add(0, 4.0 / batch * pi * (std::log(pi) - std::log(qi)));
      exact.add(b * classes + i, 2.0 / batch * qi);
      exact.add(b * classes + i, -2.0 / batch * pi);
    }
  }
  total.magnitude[0] += 1;
  compare(isa + " kd", total, 0, loss.floats()[0]);
  for (int64_t i = 0; i < batch * classes; ++i) compare(isa + " kd gradient", exact, i, grad.floats()[i]);
}

}  // namespace

void check_attention(const std::string& isa) {
  for (const Setting& set : {Setting{false, false, 1, Side::kEnd}, Setting{true, true, 2, Side::kEnd},
                             Setting{true, true, 1, Side::kBegin}, Setting{false, false, 3, Side::kBegin}}) {
    set_scratch_side(set.side);
    const auto same = [](float x) { return static_cast<double>(x); };
    const int64_t shapes[][3] = {{2, 20, 49}, {1, 5, 1}, {3, 64, 64}, {2, 3, 2500}, {1, 33, 15}};
    for (const auto& [batch, channels, pixels] : shapes) {
      check_maps<float>(set, Element::kFloat32, 0, isa, same, batch, channels, pixels);
      check_maps<uint16_t>(set, Element::kBfloat16, 4e-3, isa, from_bfloat16, batch, channels, pixels);
      check_maps<uint16_t>(set, Element::kFloat16, 5e-4, isa, from_float16, batch, channels, pixels);
    }
    check_match(set, isa);
    for (const int64_t classes : {1, 10, 100}) check_kd(set, isa, classes);
  }
}
