// The kernels that train packed tables, and those of int8 values, against plain double loops.
#include <numeric>
#include <random>

#include "check.h"
#include "dispatch.h"
#include "embedding.h"
#include "embedding_table.h"

using namespace sparsekd;

namespace {

using Random = std::mt19937;

// Every third row or so, ascending, and ids of them in any order.
void check_rows_grad(const std::string& name, const Table& t, Random& generator, const Setting& set) {
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<int64_t> rows, first{0}, order, begin{0};
  for (int64_t row = generator() % 3; row < t.rows; row += 1 + static_cast<int64_t>(generator() % 4)) {
    int64_t size = 0;
    for (int64_t d = 0; d < t.dim; ++d) size += t.place[static_cast<size_t>(row * t.dim + d)] >= 0;
    rows.push_back(row);
    first.push_back(first.back() + 1 + static_cast<int64_t>(generator() % 3));
    begin.push_back(begin.back() + size);
  }
  order.resize(static_cast<size_t>(first.back()));
  std::iota(order.begin(), order.end(), int64_t{0});
  std::shuffle(order.begin(), order.end(), generator);
  std::vector<float> grad, scale;
  for (int64_t i = 0; i < first.back() * t.dim; ++i) grad.push_back(uniform(generator));
  for (int64_t i = 0; i < first.back(); ++i) scale.push_back(uniform(generator));
  const Guarded some = guarded(rows, set.side), firsts = guarded(first, set.side), orders = guarded(order, set.side),
                begins = guarded(begin, set.side), grads = guarded(grad, set.side), scales = guarded(scale, set.side);
  const size_t count = static_cast<size_t>(begin.back());
  for (const bool weighted : {false, true}) {
    const Guarded places(sizeof(int64_t) * count, set.side), sums(sizeof(float) * count, set.side);
    embedding_rows_grad({.table = t.table(),
                         .grad = grads.floats(),
                         .rows = at<int64_t>(some),
                         .first = at<int64_t>(firsts),
                         .order = at<int64_t>(orders),
                         .source = nullptr,
                         .scale = weighted ? scales.floats() : nullptr,
                         .begin = at<int64_t>(begins),
                         .count = static_cast<int64_t>(rows.size()),
                         .places = at<int64_t>(places),
                         .sums = sums.floats(),
                         .threads = set.threads});
    Exact exact(static_cast<int64_t>(2 * count));
    int64_t at_place = 0;
    for (size_t r = 0; r < rows.size(); ++r)
      for (int64_t d = 0; d < t.dim; ++d) {
        const int64_t place = t.place[static_cast<size_t>(rows[r] * t.dim + d)];
        if (place < 0) continue;
        for (int64_t j = first[r]; j < first[r + 1]; ++j) {
          const size_t id = static_cast<size_t>(order[static_cast<size_t>(j)]);
          const double term = grad[id * static_cast<size_t>(t.dim) + static_cast<size_t>(d)];
          exact.add(2 * at_place, weighted ? term * scale[id] : term);
        }
        exact.value[static_cast<size_t>(2 * at_place + 1)] = static_cast<double>(place);
        compare(name + " gradient of rows", exact, 2 * at_place, sums.floats()[at_place]);
        compare(name + " place", exact, 2 * at_place + 1, static_cast<double>(at<int64_t>(places)[at_place]));
        ++at_place;
      }
  }
}

// One step of Adam on about half of the entries; the other optimizers are tested from Python alone.
void check_adam(const std::string& name, const Table& t, Random& generator, const Setting& set) {
  std::uniform_real_distribution<float> uniform(0.1f, 1);
  std::vector<int64_t> places;
  std::vector<float> grad, mean, square;
  std::vector<uint16_t> occurred(static_cast<size_t>(t.rows));
  for (uint16_t& number : occurred) number = static_cast<uint16_t>(generator() % 3 ? generator() % 9 : 65535);
  for (int64_t i = 0; i < t.size(); ++i) {
    mean.push_back(uniform(generator));
    square.push_back(uniform(generator));
    if (generator() % 2) continue;
    places.push_back(i);
    grad.push_back(uniform(generator));
  }
  const std::vector<float> start(t.values.floats(), t.values.floats() + t.size());
  const Guarded values = guarded(start, set.side), means = guarded(mean, set.side), squares = guarded(square, set.side),
                counts = guarded(occurred, set.side), some = guarded(places, set.side), grads = guarded(grad, set.side);
  embedding_update(EmbeddingOptimizer::kAdam, {.table = t.table(),
                                               .places = at<int64_t>(some),
                                               .grad = grads.floats(),
                                               .count = static_cast<int64_t>(places.size()),
                                               .num_values = t.size(),
                                               .values = values.floats(),
                                               .mean = means.floats(),
                                               .square = squares.floats(),
                                               .occurred = at<uint16_t>(counts),
                                               .lr = 0.5f,
                                               .beta1 = 0.75f,
                                               .beta2 = 0.875f,
                                               .eps = 0.25f,
                                               .decay = 0.125f,
                                               .threads = set.threads});
  Exact exact(t.size());
  size_t next = 0;
  for (int64_t row = 0; row < t.rows; ++row) {
    bool touched = false;
    for (int64_t d = 0; d < t.dim; ++d) {
      const int64_t place = t.place[static_cast<size_t>(row * t.dim + d)];
      touched |= place >= 0 && std::binary_search(places.begin(), places.end(), place);
    }
    uint16_t& times = occurred[static_cast<size_t>(row)];
    if (touched && times != 65535) ++times;
    const bool often = times == 65535;
    const double bias1 = often ? 1 : 1 - std::pow(0.75, times), bias2 = often ? 1 : 1 - std::pow(0.875, times);
    for (int64_t d = 0; d < t.dim; ++d) {
      const int64_t place = t.place[static_cast<size_t>(row * t.dim + d)];
      if (place < 0) continue;
      const size_t i = static_cast<size_t>(place);
      exact.add(place, start[i]);
      if (next < places.size() && places[next] == place) {
        const double g = grad[next++] + 0.125 * start[i], m = 0.75 * mean[i] + 0.25 * g,
                     s = 0.875 * square[i] + 0.125 * g * g;
        exact.add(place, -0.5 / bias1 * m / (std::sqrt(s / bias2) + 0.25));
      }
      compare(name + " adam", exact, place, values.floats()[place], 1e-5);
    }
    Exact count(1);
    count.value[0] = times;
    compare(name + " occurred", count, 0, at<uint16_t>(counts)[row]);
  }
}

// Entries go and come: what stays is found where the other table has it.
void check_exchange(const std::string& name, const Table& from, const Table& to, Random& generator,
                    const Setting& set) {
  const std::vector<float> fresh(static_cast<size_t>(to.size()), 7.0f);
  const Guarded target = guarded(fresh, set.side);
  embedding_repack({.from = from.table(),
                    .to = to.table(),
                    .source = from.values.floats(),
                    .target = target.floats(),
                    .bytes = sizeof(float),
                    .threads = set.threads});
  Exact exact(to.size());
  for (size_t i = 0; i < from.place.size(); ++i) {
    if (to.place[i] < 0) continue;
    exact.value[static_cast<size_t>(to.place[i])] = from.place[i] < 0 ? 7 : from.dense[i];
    compare(name + " repack", exact, to.place[i], target.floats()[to.place[i]]);
  }
  std::vector<uint8_t> stay;
  for (int64_t i = 0; i < from.size(); ++i) stay.push_back(generator() % 2);
  const Guarded stays = guarded(stay, set.side), kept(from.kept.bytes(), set.side),
                magnitudes(from.values.bytes(), set.side);
  embedding_thin(
      {.table = from.table(), .stays = at<uint8_t>(stays), .target = at<uint64_t>(kept), .threads = set.threads});
  embedding_magnitudes({.table = from.table(),
                        .values = from.values.floats(),
                        .magnitudes = magnitudes.floats(),
                        .threads = set.threads});
  const int64_t words = (from.dim + 63) / 64;
  for (int64_t row = 0; row < from.rows; ++row) {
    int64_t best = -1;
    for (int64_t d = 0; d < from.dim; ++d) {
      const int64_t place = from.place[static_cast<size_t>(row * from.dim + d)];
      Exact bit(1);
      bit.value[0] = place >= 0 && stay[static_cast<size_t>(place)];
      compare(name + " thin", bit, 0, at<uint64_t>(kept)[row * words + d / 64] >> d % 64 & 1);
      if (place >= 0 && (best < 0 || std::fabs(from.values.floats()[place]) > std::fabs(from.values.floats()[best])))
        best = place;
    }
    for (int64_t d = 0; d < from.dim; ++d) {
      const int64_t place = from.place[static_cast<size_t>(row * from.dim + d)];
      if (place < 0) continue;
      Exact magnitude(1);
      magnitude.value[0] = place == best ? 1 : std::fabs(from.values.floats()[place]);
      compare(name + " magnitude", magnitude, 0,
              place == best ? std::isinf(magnitudes.floats()[place]) : magnitudes.floats()[place]);
    }
  }
}

// Values are multiples of 1/64 up to 1, so that int8 with scales of a power of two holds them exactly.
void check_int8(const std::string& name, const Table& t, Random& generator, const Setting& set) {
  std::vector<int8_t> byte;
  std::vector<float> scale;
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < t.size(); ++i) byte.push_back(static_cast<int8_t>(t.values.floats()[i] * 64));
  for (int64_t row = 0; row < t.rows; ++row) scale.push_back(1.0f / static_cast<float>(8 << generator() % 4));
  for (int i = 0; i < 300; ++i) ids.push_back(static_cast<int64_t>(generator() % static_cast<uint32_t>(t.rows)));
  const Guarded bytes = guarded(byte, set.side), scales = guarded(scale, set.side), some = guarded(ids, set.side),
                rows(sizeof(float) * ids.size() * static_cast<size_t>(t.dim), set.side);
  embedding<int8_t>({.table = t.table(),
                     .values = at<int8_t>(bytes),
                     .row_scale = scales.floats(),
                     .ids = at<int64_t>(some),
                     .count = static_cast<int64_t>(ids.size()),
                     .out = rows.floats(),
                     .threads = set.threads});
  Exact exact(static_cast<int64_t>(ids.size()) * t.dim);
  for (int64_t i = 0; i < static_cast<int64_t>(ids.size()) * t.dim; ++i) {
    const int64_t row = ids[static_cast<size_t>(i / t.dim)];
    exact.value[static_cast<size_t>(i)] = 64 * t.entry(row, i % t.dim) * scale[static_cast<size_t>(row)];
    compare(name + " int8", exact, i, rows.floats()[i]);
  }
}

}  // namespace

void check_embedding_training(const std::string& isa) {
  for (const Setting& set : {Setting{false, false, 1, Side::kEnd}, Setting{false, false, 2, Side::kBegin},
                             Setting{false, false, 3, Side::kEnd}}) {
    set_scratch_side(set.side);
    const int64_t shapes[][2] = {{1, 1}, {64, 16}, {200, 64}, {130, 37}, {70, 300}};
    for (const auto& [rows, dim] : shapes) {
      Random generator(5);
      std::uniform_real_distribution<float> uniform(-1, 1);
      const auto random = [&] { return uniform(generator); };
      const std::string name = isa + " embedding " + std::to_string(rows) + "x" + std::to_string(dim);
      const Table t(rows, dim, random, set.side), other(rows, dim, random, set.side);
      check_rows_grad(name, t, generator, set);
      check_adam(name, t, generator, set);
      check_exchange(name, t, other, generator, set);
      check_int8(name, t, generator, set);
    }
  }
}
