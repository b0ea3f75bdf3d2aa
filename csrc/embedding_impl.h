// Embeddings whose rows keep some dimensions each: rows are expanded, 16 dimensions at a time, where they are looked up,
// and gradients are compressed where they are added. Products with queries touch kept entries alone.
#pragma once

#include "copy_impl.h"
#include "embedding_kernels.h"
#include "parallel_impl.h"
#include "scratch_impl.h"

namespace {

using sparsekd::EmbeddingAbsent;
using sparsekd::EmbeddingBag;
using sparsekd::EmbeddingGrad;
using sparsekd::EmbeddingLookup;
using sparsekd::EmbeddingTable;

constexpr uint8_t kManyKept = 255;  // that and more

inline const uint64_t* kept_of(const EmbeddingTable& t, int64_t row) { return t.kept + row * ceil_div(t.dim, 64); }

inline int64_t count_kept(const EmbeddingTable& t, int64_t row) {
  if (t.counts[row] != kManyKept) return t.counts[row];
  const uint64_t* kept = kept_of(t, row);
  int64_t count = 0;
  for (int64_t i = 0; i < ceil_div(t.dim, 64); ++i) count += __builtin_popcountll(kept[i]);
  return count;
}

static_assert(sparsekd::kRowsOfBase == 64, "Vec16::sum_first_bytes adds the counts of as many rows");

// Whether a row of a base may keep more than its count can say.
inline bool any_of_many(const uint8_t* counts) {
  uint8_t most = 0;
  for (int i = 0; i < sparsekd::kRowsOfBase; ++i) most = counts[i] > most ? counts[i] : most;
  return most == kManyKept;
}

// Where the values of a row begin: behind those of the rows before it in its 64.
inline int64_t row_begin(const EmbeddingTable& t, int64_t row) {
  const int64_t base = static_cast<int64_t>(static_cast<uint64_t>(row) / sparsekd::kRowsOfBase);
  const int64_t first = base * sparsekd::kRowsOfBase;
  const uint8_t* counts = t.counts + first;
  if (t.dim < kManyKept || !any_of_many(counts))
    return t.base[base] + Vec16::sum_first_bytes(counts, static_cast<int>(row - first));
  int64_t begin = t.base[base];
  for (int64_t i = first; i < row; ++i) begin += count_kept(t, i);
  return begin;
}

inline Vec16 load16_first(const int8_t* p, int n) {
  float lane[16] = {};
  for (int i = 0; i < n; ++i) lane[i] = p[i];
  return Vec16::load(lane);
}

inline Vec16 expand(const float* values, uint32_t kept) { return Vec16::expand_load(values, kept); }
template <class T>
inline Vec16 expand(const T* values, uint32_t kept) {
  float floats[16];
  load16_first(values, __builtin_popcount(kept)).store(floats);
  return Vec16::expand_load(floats, kept);
}

// The bits of the 16 dimensions of group g in a word, and how many values those before it have.
inline uint32_t group_of(uint64_t word, int g) { return static_cast<uint32_t>(word >> 16 * g) & 0xffffu; }
inline int kept_before(uint64_t word, int g) { return __builtin_popcountll(word & ((uint64_t{1} << 16 * g) - 1)); }

// body(group, its bits, where its values lie) for every 16 dimensions of a row. What precedes each of the four groups of
// a word is counted from the word, so that none waits for the one before it. kWhole: `dim` is a multiple of 64.
template <bool kWhole = false, class Body>
inline void each_group(const EmbeddingTable& t, int64_t row, int64_t begin, const Body& body) {
  const uint64_t* kept = kept_of(t, row);
  const int64_t groups = ceil_div(t.dim, 16);
  for (int64_t first = 0; first < groups; first += 4) {
    const uint64_t word = kept[first / 4];
    const int have = kWhole ? 4 : static_cast<int>(min64(4, groups - first));
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g)
      if (g < have) body(first + g, group_of(word, g), begin + kept_before(word, g));
    begin += __builtin_popcountll(word);
  }
}

// Goes through ids and finds ahead where later rows begin, which takes as long as it then takes to expand them. If the
// table is cold it asks for them, too, in two steps: their bits and counts, then their values. `at` must be asked for
// every i from `begin` on, in order.
template <class T, bool kCold>
class RowStream {
 public:
  RowStream(const EmbeddingTable& t, const T* values, const int64_t* ids, int64_t begin, int64_t end)
      : t_(t), values_(values), ids_(ids), end_(end) {
    for (int64_t i = begin; i < min64(end, begin + kValuesAhead); ++i) find(i);
  }

  // Where the values of row ids[i] begin.
  int64_t at(int64_t i) {
    if (kCold && i + kBitsAhead < end_) ask_for_bits(ids_[i + kBitsAhead]);
    const int64_t begin = begins_[i % kBitsAhead];
    if (i + kValuesAhead < end_) find(i + kValuesAhead);
    return begin;
  }

 private:
  static constexpr int64_t kBitsAhead = 16, kValuesAhead = 8;

  void find(int64_t i) {
    const int64_t begin = row_begin(t_, ids_[i]);
    begins_[i % kBitsAhead] = begin;
    if (kCold) ask_for_values(values_ + begin, count_kept(t_, ids_[i]));
  }

  void ask_for_bits(int64_t row) const {
    __builtin_prefetch(kept_of(t_, row));
    __builtin_prefetch(t_.counts + row / sparsekd::kRowsOfBase * sparsekd::kRowsOfBase);
  }

  // Each line is asked for once if possible, since the processor has room for few at a time: with one of the bases, an
  // eighth of the counts, and one in the middle of every row that would be a quarter slower.
  static void ask_for_values(const T* values, int64_t count) {
    const char* first = reinterpret_cast<const char*>(values);
    const int64_t last = max64(1, static_cast<int64_t>(sizeof(T)) * count) - 1;
    __builtin_prefetch(first);
    __builtin_prefetch(first + last);
    for (int64_t byte = 64; byte < last; byte += 64) __builtin_prefetch(first + byte);
  }

  const EmbeddingTable& t_;
  const T* values_;
  const int64_t* ids_;
  int64_t end_, begins_[kBitsAhead];
};

constexpr int64_t kInCache = 256 << 10;  // half of a small L2 cache

template <class T>
inline bool is_cold(const EmbeddingTable& t) {
  const int64_t last = t.rows - 1;
  const int64_t values = t.rows > 0 ? row_begin(t, last) + count_kept(t, last) : 0;
  return static_cast<int64_t>(sizeof(T)) * values + 8 * t.rows * ceil_div(t.dim, 64) > kInCache;
}

// body(the stream of ids[begin .. end)).
template <class T, class Body>
inline void with_rows(const EmbeddingTable& t, const T* values, const int64_t* ids, int64_t begin, int64_t end,
                      const Body& body) {
  if (is_cold<T>(t)) {
    RowStream<T, true> rows(t, values, ids, begin, end);
    body(rows);
  } else {
    RowStream<T, false> rows(t, values, ids, begin, end);
    body(rows);
  }
}

template <class T>
constexpr bool kScaled = sizeof(T) == 1;  // int8_t, which has a scale for each row

constexpr int64_t kIdsOfPiece = 256;  // of one piece of work: some microseconds

template <class Out>
inline void store_group(Out* row, int64_t group, Vec16 v, int64_t dim) {
  if (16 * group + 16 <= dim)
    store16(row + 16 * group, v);
  else
    store16_first(row + 16 * group, v, static_cast<int>(dim - 16 * group));
}

template <bool kWhole, class T, class Rows>
inline void look_up(const EmbeddingLookup<T>& args, Rows& rows, int64_t begin_id, int64_t end_id) {
  const EmbeddingTable& t = args.table;
  for (int64_t i = begin_id; i < end_id; ++i) {
    auto* out = args.out + i * t.dim;
    Vec16 scale = Vec16::zero();
    if constexpr (kScaled<T>) scale = Vec16::broadcast(args.row_scale + args.ids[i]);
    each_group<kWhole>(t, args.ids[i], rows.at(i), [&](int64_t group, uint32_t bits, int64_t begin) {
      Vec16 row = expand(args.values + begin, bits);
      if constexpr (kScaled<T>) row = Vec16::mul(row, scale);
      if constexpr (kWhole)
        store16(out + 16 * group, row);
      else
        store_group(out, group, row, t.dim);
    });
  }
}

template <class T>
void embedding_lookup(const EmbeddingLookup<T>& args) {
  parallel(args.threads, ceil_div(args.count, kIdsOfPiece), [&](int64_t piece) {
    const int64_t begin = piece * kIdsOfPiece, end = min64(args.count, begin + kIdsOfPiece);
    with_rows(args.table, args.values, args.ids, begin, end, [&](auto& rows) {
      if (args.table.dim % 64 == 0)
        look_up<true>(args, rows, begin, end);
      else
        look_up<false>(args, rows, begin, end);
    });
  });
}

template <class T>
inline Vec16 scale_of(const EmbeddingBag<T>& args, int64_t i) {
  float scale = args.scale != nullptr ? args.scale[i] : 1.0f;
  if constexpr (kScaled<T>) scale *= args.row_scale[args.ids[i]];
  return Vec16::broadcast(&scale);
}

constexpr bool kManyRegisters = Vec16::kTilePixels > 8;  // eight sums and what is added to them

// Sums of a few bags whose rows have kGroups groups, in registers.
template <int kGroups, class T, class Rows>
inline void bags_in_registers(const EmbeddingBag<T>& args, Rows& rows, int64_t begin_bag, int64_t end_bag) {
  const EmbeddingTable& t = args.table;
  for (int64_t bag = begin_bag; bag < end_bag; ++bag) {
    Vec16 sum[kGroups];
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) sum[g] = Vec16::zero();
    for (int64_t i = args.offsets[bag]; i < args.offsets[bag + 1]; ++i) {
      int64_t begin = rows.at(i);
      if (args.ids[i] == args.padding) continue;
      const Vec16 scale = scale_of(args, i);
      const uint64_t* kept = kept_of(t, args.ids[i]);
#pragma GCC unroll 8
      for (int g = 0; g < kGroups; ++g) {
        const uint64_t word = kept[g / 4];
        const Vec16 row = expand(args.values + begin + kept_before(word, g % 4), group_of(word, g % 4));
        sum[g] = Vec16::fma(scale, row, sum[g]);
        if (g % 4 == 3) begin += __builtin_popcountll(word);
      }
    }
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) store_group(args.out + bag * t.dim, g, sum[g], t.dim);
  }
}

// The same for rows of any length.
template <class T, class Rows>
inline void bags_in_memory(const EmbeddingBag<T>& args, Rows& rows, int64_t begin_bag, int64_t end_bag) {
  const EmbeddingTable& t = args.table;
  const int64_t padded = round_up(t.dim, 16);
  float* sum = scratch_of<float>(sparsekd::kScratchSum, padded);
  for (int64_t bag = begin_bag; bag < end_bag; ++bag) {
    zero_floats(sum, padded);
    for (int64_t i = args.offsets[bag]; i < args.offsets[bag + 1]; ++i) {
      const int64_t begin_of_row = rows.at(i);
      if (args.ids[i] == args.padding) continue;
      const Vec16 scale = scale_of(args, i);
      each_group(t, args.ids[i], begin_of_row, [&](int64_t group, uint32_t bits, int64_t begin) {
        float* of_group = sum + 16 * group;
        Vec16::fma(scale, expand(args.values + begin, bits), Vec16::load(of_group)).store(of_group);
      });
    }
    copy_floats(args.out + bag * t.dim, sum, 1, t.dim);
  }
}

template <class T>
void embedding_bag(const EmbeddingBag<T>& args) {
  const int64_t per_bag = max64(1, args.offsets[args.bags] / max64(1, args.bags));
  const int64_t bags = max64(1, kIdsOfPiece / per_bag), groups = ceil_div(args.table.dim, 16);
  parallel(args.threads, ceil_div(args.bags, bags), [&](int64_t piece) {
    const int64_t begin_bag = piece * bags, end_bag = min64(args.bags, begin_bag + bags);
    const int64_t begin = args.offsets[begin_bag], end = args.offsets[end_bag];
    with_rows(args.table, args.values, args.ids, begin, end, [&](auto& rows) {
      if (groups == 1) return bags_in_registers<1>(args, rows, begin_bag, end_bag);
      if (groups == 2) return bags_in_registers<2>(args, rows, begin_bag, end_bag);
      if (groups == 4) return bags_in_registers<4>(args, rows, begin_bag, end_bag);
      if constexpr (kManyRegisters)
        if (groups == 8) return bags_in_registers<8>(args, rows, begin_bag, end_bag);
      bags_in_memory(args, rows, begin_bag, end_bag);
    });
  });
}

// Every worker has rows of its own and goes through all ids, so that sums are taken in the order of the ids, however
// many threads there are.
void embedding_grad(const EmbeddingGrad& args) {
  const EmbeddingTable& t = args.table;
  parallel(args.threads, args.threads, [&](int64_t part) {
    const Range range = share(args.num_values, args.threads, part);
    zero_floats(args.grad_values + range.begin, range.end - range.begin);
  });
  const int64_t bases = ceil_div(t.rows, sparsekd::kRowsOfBase);
  parallel(args.threads, args.threads, [&](int64_t part) {
    const Range owned = share(bases, args.threads, part);
    for (int64_t i = 0; i < args.count; ++i) {
      const int64_t row = args.ids[i], base = row / sparsekd::kRowsOfBase;
      if (base < owned.begin || base >= owned.end || row == args.padding) continue;
      const float* grad = args.grad + (args.source != nullptr ? args.source[i] : i) * t.dim;
      const float one = 1.0f;
      const Vec16 scale = Vec16::broadcast(args.scale != nullptr ? args.scale + i : &one);
      each_group(t, row, row_begin(t, row), [&](int64_t group, uint32_t bits, int64_t begin) {
        const int64_t d = 16 * group;
        const int count = __builtin_popcount(bits);
        if (count == 0) return;
        float* target = args.grad_values + begin;
        const Vec16 all = Vec16::load_first(grad + d, static_cast<int>(min64(16, t.dim - d)));
        Vec16::fma(scale, Vec16::compress(all, bits), Vec16::load_first(target, count)).store_first(target, count);
      });
    }
  });
}

void embedding_absent(const EmbeddingAbsent& args) {
  const EmbeddingTable& t = args.table;
  parallel(args.threads, ceil_div(args.count, kIdsOfPiece), [&](int64_t piece) {
    const int64_t end = min64(args.count, (piece + 1) * kIdsOfPiece);
    for (int64_t i = piece * kIdsOfPiece; i < end; ++i) {
      const uint64_t* kept = kept_of(t, args.ids[i]);
      const float* grad = args.grad + i * t.dim;
      float* total = args.total + i * t.dim;
      for (int64_t d = 0; d < t.dim; ++d) {
        const float added = args.absolute ? __builtin_fabsf(grad[d]) : grad[d];
        total[d] += kept[d / 64] >> d % 64 & 1 ? 0.0f : added;
      }
    }
  });
}

}  // namespace
