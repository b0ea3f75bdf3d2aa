// The kernels of embeddings against plain double loops over dense rows.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>

#include "check.h"
#include "dispatch.h"
#include "embedding.h"
#include "embedding_table.h"

using namespace sparsekd;

namespace {

double number(float x) { return x; }
double number(Bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
double number(Float16 x) {
  const int exponent = (x.bits >> 10) & 31, mantissa = x.bits & 1023;
  const double magnitude = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
  return x.bits & 0x8000 ? -magnitude : magnitude;
}

// Lookups are exact in every type, bags are rounded once.
template <class T>
void check_rows(const std::string& name, const Table& t, const Guarded& values, const std::vector<int64_t>& ids,
                const Setting& set, double rounding) {
  const int64_t count = static_cast<int64_t>(ids.size()), bags = 5;
  const Guarded some = guarded(ids, set.side), rows(sizeof(T) * static_cast<size_t>(count * t.dim), set.side);
  embedding<T>({.table = t.table(),
                .values = at<T>(values),
                .row_scale = nullptr,
                .ids = at<int64_t>(some),
                .count = count,
                .out = at<T>(rows),
                .threads = set.threads});
  Exact exact(count * t.dim);
  for (int64_t i = 0; i < count * t.dim; ++i) {
    exact.value[static_cast<size_t>(i)] = t.entry(ids[static_cast<size_t>(i / t.dim)], i % t.dim);
    compare(name + " lookup", exact, i, number(at<T>(rows)[i]));
  }
  // The second bag is empty, and whole bags may be padding.
  const Guarded offsets = guarded<int64_t>({0, count / 3, count / 3, count / 2, count - count / 5, count}, set.side);
  std::vector<float> weights;
  for (int64_t i = 0; i < count; ++i) weights.push_back(0.25f * static_cast<float>(1 + i % 5));
  const Guarded scale = guarded(weights, set.side);
  for (const bool weighted : {false, true}) {
    const int64_t padding = weighted && count > 0 ? ids[0] : -1;
    const Guarded out(sizeof(T) * static_cast<size_t>(bags * t.dim), set.side);
    embedding_bag<T>({.table = t.table(),
                      .values = at<T>(values),
                      .row_scale = nullptr,
                      .ids = at<int64_t>(some),
                      .offsets = at<int64_t>(offsets),
                      .scale = weighted ? scale.floats() : nullptr,
                      .bags = bags,
                      .padding = padding,
                      .out = at<T>(out),
                      .threads = set.threads});
    Exact sums(bags * t.dim);
    for (int64_t bag = 0; bag < bags; ++bag)
      for (int64_t i = at<int64_t>(offsets)[bag]; i < at<int64_t>(offsets)[bag + 1]; ++i)
        for (int64_t d = 0; d < t.dim && ids[static_cast<size_t>(i)] != padding; ++d)
          sums.add(bag * t.dim + d,
                   (weighted ? weights[static_cast<size_t>(i)] : 1) * t.entry(ids[static_cast<size_t>(i)], d));
    for (int64_t i = 0; i < bags * t.dim; ++i) compare(name + " bag", sums, i, number(at<T>(out)[i]), rounding);
  }
}

void check_gradients(const std::string& name, const Table& t, const std::vector<int64_t>& ids, const Setting& set) {
  const int64_t count = static_cast<int64_t>(ids.size()), rows = 3;
  std::mt19937 generator(6);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> grad, scale, start;
  std::vector<int64_t> source;
  for (int64_t i = 0; i < std::max(count, rows) * t.dim; ++i) grad.push_back(uniform(generator));
  for (int64_t i = 0; i < count * t.dim; ++i) start.push_back(uniform(generator));
  for (int64_t i = 0; i < count; ++i) {
    scale.push_back(uniform(generator));
    source.push_back(i % rows);
  }
  const Guarded grads = guarded(grad, set.side), some = guarded(ids, set.side), scales = guarded(scale, set.side),
                sources = guarded(source, set.side);
  for (const bool bags : {false, true}) {
    const int64_t padding = bags && count > 0 ? ids[0] : -1;
    const Guarded got(sizeof(float) * static_cast<size_t>(t.size()), set.side);
    embedding_grad({.table = t.table(),
                    .grad = grads.floats(),
                    .ids = at<int64_t>(some),
                    .source = bags ? at<int64_t>(sources) : nullptr,
                    .scale = bags ? scales.floats() : nullptr,
                    .count = count,
                    .padding = padding,
                    .num_values = t.size(),
                    .grad_values = got.floats(),
                    .threads = set.threads});
    Exact exact(t.size());
    for (int64_t i = 0; i < count; ++i) {
      const size_t j = static_cast<size_t>(i);
      for (int64_t d = 0; d < t.dim && ids[j] != padding; ++d) {
        const int64_t place = t.place[static_cast<size_t>(ids[j] * t.dim + d)];
        const double term = grad[static_cast<size_t>((bags ? source[j] : i) * t.dim + d)];
        if (place >= 0) exact.add(place, bags ? term * scale[j] : term);
      }
    }
    for (int64_t i = 0; i < t.size(); ++i) compare(name + " gradient", exact, i, got.floats()[i]);
  }
  for (const bool absolute : {false, true}) {
    const Guarded total = guarded(start, set.side);
    embedding_absent({.table = t.table(),
                      .grad = grads.floats(),
                      .ids = at<int64_t>(some),
                      .count = count,
                      .absolute = absolute,
                      .total = total.floats(),
                      .threads = set.threads});
    Exact exact(count * t.dim);
    for (int64_t i = 0; i < count * t.dim; ++i) {
      const size_t j = static_cast<size_t>(i);
      exact.add(i, start[j]);
      if (t.place[static_cast<size_t>(ids[static_cast<size_t>(i / t.dim)] * t.dim + i % t.dim)] < 0)
        exact.add(i, absolute ? std::fabs(grad[j]) : grad[j]);
      compare(name + " absent", exact, i, total.floats()[i]);
    }
  }
}

// Queries are whole numbers, so that products are exact and ties are plenty.
void check_top_k(const std::string& name, const Table& t, int64_t count, int64_t k, const Setting& set) {
  std::mt19937 generator(7);
  std::vector<float> query;
  std::vector<int64_t> begin{0}, excluded;
  for (int64_t i = 0; i < count * t.dim; ++i)
    query.push_back(static_cast<float>(static_cast<int>(generator() % 5) - 2));
  for (int64_t q = 0; q < count; ++q) {
    for (int64_t row = q % 3; row < t.rows; row += 3 + q % 4) excluded.push_back(row);
    begin.push_back(static_cast<int64_t>(excluded.size()));
  }
  const Guarded queries = guarded(query, set.side), begins = guarded(begin, set.side),
                out = guarded(excluded, set.side);
  const Guarded scores(sizeof(float) * static_cast<size_t>(count * k), set.side),
      ids(sizeof(int64_t) * static_cast<size_t>(count * k), set.side);
  embedding_top_k<float>({.table = t.table(),
                          .values = t.values.floats(),
                          .row_scale = nullptr,
                          .queries = queries.floats(),
                          .count = count,
                          .k = k,
                          .excluded_begin = at<int64_t>(begins),
                          .excluded = at<int64_t>(out),
                          .scores = scores.floats(),
                          .ids = at<int64_t>(ids),
                          .threads = set.threads});
  for (int64_t q = 0; q < count; ++q) {
    std::vector<std::pair<double, int64_t>> all;
    const auto first = excluded.begin() + begin[static_cast<size_t>(q)],
               last = excluded.begin() + begin[static_cast<size_t>(q) + 1];
    for (int64_t row = 0; row < t.rows; ++row) {
      double product = 0;
      for (int64_t d = 0; d < t.dim; ++d) product += t.entry(row, d) * query[static_cast<size_t>(q * t.dim + d)];
      if (!std::binary_search(first, last, row)) all.emplace_back(-product, row);
    }
    std::sort(all.begin(), all.end());
    Exact exact(2 * k);
    for (int64_t i = 0; i < k; ++i) {
      const bool there = i < static_cast<int64_t>(all.size());
      exact.value[static_cast<size_t>(2 * i)] = there ? -all[static_cast<size_t>(i)].first : 0;
      exact.value[static_cast<size_t>(2 * i + 1)] =
          there ? static_cast<double>(all[static_cast<size_t>(i)].second) : -1;
      if (there) compare(name + " score", exact, 2 * i, scores.floats()[q * k + i]);
      compare(name + " id", exact, 2 * i + 1, static_cast<double>(at<int64_t>(ids)[q * k + i]));
    }
  }
}

}  // namespace

// A table that no near cache holds, whose rows are asked for ahead.
void check_far_rows(const std::string& isa, const Setting& set) {
  std::mt19937 generator(8);
  std::uniform_real_distribution<float> uniform(-1, 1);
  const auto random = [&] { return uniform(generator); };
  const Table t(4000, 128, random, set.side);
  std::vector<int64_t> ids(1000);
  for (int64_t& id : ids) id = static_cast<int64_t>(generator() % 4000);
  check_rows<float>(isa + " embedding far", t, t.values, ids, set, 0);
  check_rows<Bfloat16>(isa + " embedding far bf16", t, t.halves<Bfloat16>(set.side), ids, set, 1.0 / 256);
}

void check_embedding(const std::string& isa) {
  for (const Setting& set : {Setting{false, false, 1, Side::kEnd}, Setting{false, false, 2, Side::kBegin},
                             Setting{false, false, 3, Side::kEnd}}) {
    set_scratch_side(set.side);
    check_far_rows(isa, set);
    const int64_t shapes[][2] = {{1, 1},   {63, 8},   {64, 16},  {200, 64}, {130, 37},
                                 {90, 24}, {90, 100}, {90, 120}, {70, 300}};
    for (const auto& [rows, dim] : shapes) {
      std::mt19937 generator(5);
      std::uniform_real_distribution<float> uniform(-1, 1);
      const auto random = [&] { return uniform(generator); };
      const std::string name = isa + " embedding " + std::to_string(rows) + "x" + std::to_string(dim);
      const Table t(rows, dim, random, set.side);
      std::vector<int64_t> ids(static_cast<size_t>(rows + 300));
      for (int64_t& id : ids) id = static_cast<int64_t>(generator() % static_cast<uint32_t>(rows));
      for (int64_t i = 0; i < rows; ++i) ids[static_cast<size_t>(i)] = i;
      check_rows<float>(name, t, t.values, ids, set, 0);
      check_rows<float>(name, t, t.values, {}, set, 0);
      check_rows<Bfloat16>(name + " bf16", t, t.halves<Bfloat16>(set.side), ids, set, 1.0 / 256);
      check_rows<Float16>(name + " fp16", t, t.halves<Float16>(set.side), ids, set, 1.0 / 2048);
      check_gradients(name, t, ids, set);
      check_gradients(name, t, {}, set);
      for (const int64_t count : {0, 1, 20, 70})
        for (const int64_t k : {1, 20}) check_top_k(name, t, count, k, set);
    }
  }
}
