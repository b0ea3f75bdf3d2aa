// The best rows of a packed table for each query: blocks of queries against rows, whose kept entries alone are touched.
#pragma once

#include <type_traits>

#include "embedding_impl.h"

namespace {

using sparsekd::EmbeddingTopK;

constexpr int kQueryVectors = 4;                  // at most in a tile: as many accumulators hide the latency of fma
constexpr int64_t kQueries = 16 * kQueryVectors;  // a tile's queries of 64 dimensions are 16 KiB: half the L1 cache
constexpr int64_t kRowsOfTile = 64;

// The k best of one query so far, the worst in front (a heap).
struct Best {
  float* score;
  int64_t* id;
  int64_t k;

  bool worse(int64_t a, int64_t b) const { return score[a] < score[b] || (score[a] == score[b] && id[a] > id[b]); }
  void swap(int64_t a, int64_t b) const {
    const float s = score[a];
    const int64_t i = id[a];
    score[a] = score[b];
    id[a] = id[b];
    score[b] = s;
    id[b] = i;
  }
  void sink(int64_t at, int64_t size) const {
    for (;;) {
      int64_t child = 2 * at + 1;
      if (child >= size) return;
      if (child + 1 < size && worse(child + 1, child)) ++child;
      if (!worse(child, at)) return;
      swap(child, at);
      at = child;
    }
  }
  // Ids must come in ascending order, or an equal score of a smaller id would be lost.
  void offer(float s, int64_t i) const {
    if (!(s > score[0])) return;
    score[0] = s;
    id[0] = i;
    sink(0, k);
  }
  void sort() const {  // the best first
    for (int64_t size = k; size > 1; --size) {
      swap(0, size - 1);
      sink(0, size - 1);
    }
  }
};

template <class T>
inline bool is_excluded(const EmbeddingTopK<T>& args, int64_t query, int64_t row) {
  if (args.excluded_begin == nullptr) return false;
  int64_t low = args.excluded_begin[query], high = args.excluded_begin[query + 1];
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (args.excluded[middle] == row) return true;
    if (args.excluded[middle] < row)
      low = middle + 1;
    else
      high = middle;
  }
  return false;
}

// products [16 * kVectors] of one row with the queries of a tile, which lie [dim][16 * kVectors].
template <int kVectors>
inline void row_products(const EmbeddingTable& t, int64_t row, const float* values, const float* queries,
                         float* products) {
  Vec16 acc[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) acc[v] = Vec16::zero();
  const uint64_t* kept = kept_of(t, row);
  for (int64_t word = 0; word < ceil_div(t.dim, 64); ++word)
    for (uint64_t bits = kept[word]; bits != 0; bits &= bits - 1, ++values) {
      const float* query = queries + (64 * word + __builtin_ctzll(bits)) * 16 * kVectors;
      const Vec16 value = Vec16::broadcast(values);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[v] = Vec16::fma(value, Vec16::load(query + 16 * v), acc[v]);
    }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) acc[v].store(products + 16 * v);
}

// A tile's queries against the rows of a range; best [queries] are heaps.
template <int kVectors, class T>
inline void top_k_rows(const EmbeddingTopK<T>& args, const float* queries, int64_t first, int64_t count, Range rows,
                       const Best* best) {
  const EmbeddingTable& t = args.table;
  constexpr int64_t kOfTile = 16 * kVectors;
  alignas(64) float products[kOfTile], worst[kOfTile];
  for (int64_t q = 0; q < kOfTile; ++q) worst[q] = q < count ? best[q].score[0] : __builtin_inff();
  if (rows.begin >= rows.end) return;
  int64_t begin = row_begin(t, rows.begin);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t kept = count_kept(t, row);
    if constexpr (std::is_same_v<T, float>) {
      row_products<kVectors>(t, row, args.values + begin, queries, products);
    } else {
      float* values = scratch_of<float>(sparsekd::kScratchWords, t.dim);
      const float one = 1.0f;
      const Vec16 scale = Vec16::broadcast(kScaled<T> ? args.row_scale + row : &one);
      for (int64_t i = 0; i < kept; i += 16) {
        const int have = static_cast<int>(min64(16, kept - i));
        Vec16::mul(scale, load16_first(args.values + begin + i, have)).store_first(values + i, have);
      }
      row_products<kVectors>(t, row, values, queries, products);
    }
    begin += kept;
    int better = 0;
    for (int64_t q = 0; q < kOfTile; ++q) better |= products[q] > worst[q];
    if (!better) continue;
    for (int64_t q = 0; q < count; ++q) {
      if (!(products[q] > worst[q]) || is_excluded(args, first + q, row)) continue;
      best[q].offer(products[q], row);
      worst[q] = best[q].score[0];
    }
  }
}

// Lays the queries of a tile out as its products read them, and finds their best rows in a range.
template <int kVectors, class T>
inline void top_k_tile(const EmbeddingTopK<T>& args, int64_t first, int64_t count, Range rows, const Best* best) {
  constexpr int64_t kOfTile = 16 * kVectors;
  const int64_t dim = args.table.dim;
  float* queries = scratch_of<float>(sparsekd::kScratchInput, dim * kOfTile);
  for (int64_t d = 0; d < dim; ++d)
    for (int64_t q = 0; q < kOfTile; ++q)
      queries[d * kOfTile + q] = q < count ? args.queries[(first + q) * dim + d] : 0.0f;
  top_k_rows<kVectors>(args, queries, first, count, rows, best);
}

// Tiles of queries are dealt out; where they are fewer than threads, parts of the rows are, too. The order of scores and
// ids is total, so the parts' best together hold the best, whatever the parts are.
template <class T>
void embedding_top_k(const EmbeddingTopK<T>& args) {
  const EmbeddingTable& t = args.table;
  const int64_t tiles = ceil_div(args.count, kQueries);
  if (tiles == 0 || args.k == 0) return;
  const int64_t parts = max64(1, min64(ceil_div(args.threads, tiles), ceil_div(t.rows, kRowsOfTile)));
  const int64_t places = args.count * parts * args.k;
  float* scores;
  int64_t* ids;
  Arena::carve(sparsekd::kScratchCall, [&](Arena& arena) {
    scores = arena.take<float>(places);
    ids = arena.take<int64_t>(places);
  });
  const auto best_of = [&](int64_t query, int64_t part) {
    const int64_t at = (query * parts + part) * args.k;
    return Best{.score = scores + at, .id = ids + at, .k = args.k};
  };
  parallel(args.threads, tiles * parts, [&](int64_t item) {
    const int64_t first = item / parts * kQueries, part = item % parts, count = min64(kQueries, args.count - first);
    Best best[kQueries];
    for (int64_t q = 0; q < count; ++q) {
      best[q] = best_of(first + q, part);
      for (int64_t i = 0; i < args.k; ++i) {
        best[q].score[i] = -__builtin_inff();
        best[q].id[i] = -1;
      }
    }
    const Range rows = share(t.rows, parts, part);
    if (count <= 16)  // one user's request does not pay for 63 others
      top_k_tile<1>(args, first, count, rows, best);
    else if (count <= 32)
      top_k_tile<2>(args, first, count, rows, best);
    else
      top_k_tile<kQueryVectors>(args, first, count, rows, best);
  });
  parallel(args.threads, args.count, [&](int64_t query) {
    const Best all{.score = args.scores + query * args.k, .id = args.ids + query * args.k, .k = args.k};
    for (int64_t i = 0; i < args.k; ++i) {
      all.score[i] = -__builtin_inff();
      all.id[i] = -1;
    }
    for (int64_t part = 0; part < parts; ++part) {  // in the order of rows
      const Best best = best_of(query, part);
      best.sort();
      for (int64_t i = 0; i < args.k && best.id[i] >= 0; ++i) all.offer(best.score[i], best.id[i]);
    }
    all.sort();
  });
}

}  // namespace
