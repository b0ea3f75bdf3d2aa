// Batch norm with a residual and ReLU, and its gradients, against plain double loops.
#include <algorithm>
#include <random>

#include "check.h"
#include "dispatch.h"

using namespace sparsekd;

namespace {

// The maps of one call and what comes out of it; `residual` says whether there is one.
struct Call {
  int64_t rows, channels;
  bool residual;
  Guarded x, added, weight, bias, dy, y, mean, variance, dx, dresidual, dweight, dbias;

  Call(const Setting& set, int64_t rows, int64_t channels, bool residual)
      : rows(rows), channels(channels), residual(residual) {
    const auto memory = [&](int64_t n) { return Guarded(sizeof(float) * static_cast<size_t>(n), set.side); };
    for (Guarded* maps : {&x, &added, &dy, &y, &dx, &dresidual}) *maps = memory(rows * channels);
    for (Guarded* of_channels : {&weight, &bias, &mean, &variance, &dweight, &dbias}) *of_channels = memory(channels);
    std::mt19937 generator(5);
    for (const Guarded* operand : {&x, &added, &weight, &bias, &dy})
      for (size_t i = 0; i < operand->bytes() / sizeof(float); ++i)
        operand->floats()[i] = std::uniform_real_distribution<float>(-1, 1)(generator);
    // A mean of a hundred deviations: squares less squares would lose it.
    for (int64_t row = 0; row < rows; ++row) x.floats()[row * channels] += 60;
    const NormReluSizes sizes = {rows, channels, set.threads};
    const float* maps = residual ? added.floats() : nullptr;
    kernels().norm_relu.forward({sizes, x.floats(), maps, weight.floats(), bias.floats(), kEpsilon, y.floats(),
                                 mean.floats(), variance.floats()});
    kernels().norm_relu.grad({sizes, dy.floats(), x.floats(), residual ? y.floats() : nullptr, weight.floats(),
                              bias.floats(), mean.floats(), variance.floats(), kEpsilon, dx.floats(),
                              residual ? dresidual.floats() : nullptr, dweight.floats(), dbias.floats()});
  }

  static constexpr float kEpsilon = 1e-3f;
};

void check_channel(const Call& call, int64_t c, const std::string& name) {
  const auto at = [&](const Guarded& maps, int64_t row) {
    return static_cast<double>(maps.floats()[row * call.channels + c]);
  };
  const auto of = [&](const Guarded& values) { return static_cast<double>(values.floats()[c]); };
  const double rows = static_cast<double>(call.rows);
  Exact moments(2), sums(2), each(3);
  for (int64_t row = 0; row < call.rows; ++row) moments.add(0, at(call.x, row) / rows);
  const double mean = moments.value[0];
  double variance = 0;
  for (int64_t row = 0; row < call.rows; ++row) variance += (at(call.x, row) - mean) * (at(call.x, row) - mean) / rows;
  const double inverse = 1 / std::sqrt(variance + static_cast<double>(Call::kEpsilon));
  // Rounding of x, which is large in channel 0, and of the mean goes into everything that is normalised.
  const double coarse = 1 + std::fabs(mean) * inverse;
  moments.add(1, variance);
  moments.magnitude[1] += std::fabs(mean) * std::sqrt(variance);
  compare(name + " mean", moments, 0, of(call.mean));
  compare(name + " variance", moments, 1, of(call.variance));
  std::vector<double> normal, passed;
  for (int64_t row = 0; row < call.rows; ++row) {
    normal.push_back((at(call.x, row) - mean) * inverse);
    const double y = normal.back() * of(call.weight) + of(call.bias) + (call.residual ? at(call.added, row) : 0);
    each = Exact(3);
    each.add(0, std::max(0.0, y)), each.magnitude[0] += 3 * coarse;
    compare(name + " y", each, 0, at(call.y, row));
    // Beside 0 either side is right, and the kernel's answer is taken.
    passed.push_back(at(call.y, row) > 0 ? at(call.dy, row) : 0);
    sums.add(0, passed.back()), sums.add(1, passed.back() * normal.back());
  }
  sums.magnitude[1] += rows * coarse;
  compare(name + " gradient of the bias", sums, 0, of(call.dbias));
  compare(name + " gradient of the weight", sums, 1, of(call.dweight));
  for (int64_t row = 0; row < call.rows; ++row) {
    const size_t i = static_cast<size_t>(row);
    each = Exact(3);
    const double rest = sums.value[0] / rows + normal[i] * sums.value[1] / rows;
    each.add(1, (passed[i] - rest) * of(call.weight) * inverse);
    each.magnitude[1] += 3 * coarse * inverse;
    compare(name + " gradient", each, 1, at(call.dx, row));
    each.add(2, passed[i]);
    if (call.residual) compare(name + " gradient of the residual", each, 2, at(call.dresidual, row));
  }
}

}  // namespace

void check_norm_relu(const std::string& isa) {
  for (const Setting& set : {Setting{true, true, 1, Side::kEnd}, Setting{true, true, 2, Side::kBegin}}) {
    set_scratch_side(set.side);
    const int64_t shapes[][2] = {{2, 1}, {7, 5}, {300, 16}, {1030, 33}, {515, 64}, {3, 9000}, {4000, 40}};
    for (const auto& [rows, channels] : shapes)
      for (const bool residual : {false, true}) {
        const Call call(set, rows, channels, residual);
        const std::string name = isa + " norm_relu " + std::to_string(rows) + "x" + std::to_string(channels);
        for (int64_t c = 0; c < channels; ++c) check_channel(call, c, name);
      }
  }
}
