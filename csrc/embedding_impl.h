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

// 64 bytes of 0xff, then as many of zero: from 64 - n on they choose the first n of 64 bytes.
struct BytesBefore {
  uint8_t byte[2 * sparsekd::kRowsOfBase];
  constexpr BytesBefore() : byte{} {
    for (int i = 0; i < sparsekd::kRowsOfBase; ++i) byte[i] = 0xff;
  }
};
constexpr BytesBefore kBytesBefore;

// Where the values of a row begin: behind those of the rows before it in its 64. All 64 counts are added, those from the
// row on as zeros, since the trip count of a loop that ends at the row would be mispredicted. Pairs of bytes are added as
// words of 16 bits, and those by a multiplication whose highest word is their sum.
inline int64_t row_begin(const EmbeddingTable& t, int64_t row) {
  constexpr uint64_t kBytes = 0x0101010101010101u, kEven = 0x00ff00ff00ff00ffu, kPairs = 0x0001000100010001u;
  const int64_t first = row / sparsekd::kRowsOfBase * sparsekd::kRowsOfBase;
  const uint8_t* before = kBytesBefore.byte + sparsekd::kRowsOfBase - (row - first);
  uint64_t pairs = 0, many = 0;
  for (int i = 0; i < sparsekd::kRowsOfBase; i += 8) {
    uint64_t counts, wanted;
    memcpy(&counts, t.counts + first + i, sizeof counts);
    memcpy(&wanted, before + i, sizeof wanted);
    counts &= wanted;
    pairs += (counts & kEven) + (counts >> 8 & kEven);
    many |= (~counts - kBytes) & counts & kBytes << 7;  // a byte of kManyKept
  }
  int64_t begin = t.base[row / sparsekd::kRowsOfBase];
  if (many == 0) return begin + static_cast<int64_t>(pairs * kPairs >> 48);
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

// body(first dimension, bits of the 16 dimensions from there, where their values lie) for a row.
template <class Body>
inline void each_group(const EmbeddingTable& t, int64_t row, int64_t begin, const Body& body) {
  const uint64_t* kept = kept_of(t, row);
  for (int64_t d = 0; d < t.dim; d += 16) {
    const uint32_t bits = static_cast<uint32_t>(kept[d / 64] >> d % 64) & 0xffffu;
    body(d, bits, begin);
    begin += __builtin_popcount(bits);
  }
}

// Goes through ids and asks ahead for the rows of later ones, in two steps: their bits and where they begin, then their
// values. `at` must be asked for every i from `begin` on, in order.
template <class T>
class RowStream {
 public:
  RowStream(const EmbeddingTable& t, const T* values, const int64_t* ids, int64_t begin, int64_t end)
      : t_(t), values_(values), ids_(ids), end_(end) {
    for (int64_t i = begin; i < min64(end, begin + kValuesAhead); ++i) ask_for_values(i);
  }

  // Where the values of row ids[i] begin.
  int64_t at(int64_t i) {
    if (i + kBitsAhead < end_) {
      const int64_t row = ids_[i + kBitsAhead];
      __builtin_prefetch(kept_of(t_, row));
      __builtin_prefetch(t_.counts + row / sparsekd::kRowsOfBase * sparsekd::kRowsOfBase);
      __builtin_prefetch(t_.base + row / sparsekd::kRowsOfBase);
    }
    const int64_t begin = begins_[i % kBitsAhead];
    if (i + kValuesAhead < end_) ask_for_values(i + kValuesAhead);
    return begin;
  }

 private:
  static constexpr int64_t kBitsAhead = 16, kValuesAhead = 8;

  void ask_for_values(int64_t i) {
    const int64_t row = ids_[i], begin = row_begin(t_, row);
    begins_[i % kBitsAhead] = begin;
    const char* first = reinterpret_cast<const char*>(values_ + begin);
    const int64_t bytes = static_cast<int64_t>(sizeof(T)) * count_kept(t_, row);
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(first + byte);
    if (bytes > 0) __builtin_prefetch(first + bytes - 1);
  }

  const EmbeddingTable& t_;
  const T* values_;
  const int64_t* ids_;
  int64_t end_, begins_[kBitsAhead];
};

template <class T>
constexpr bool kScaled = sizeof(T) == 1;  // int8_t, which has a scale for each row

constexpr int64_t kIdsOfPiece = 256;  // of one piece of work: some microseconds

template <class T>
void embedding_lookup(const EmbeddingLookup<T>& args) {
  const EmbeddingTable& t = args.table;
  parallel(args.threads, ceil_div(args.count, kIdsOfPiece), [&](int64_t piece) {
    const int64_t end = min64(args.count, (piece + 1) * kIdsOfPiece);
    RowStream<T> rows(t, args.values, args.ids, piece * kIdsOfPiece, end);
    for (int64_t i = piece * kIdsOfPiece; i < end; ++i) {
      auto* out = args.out + i * t.dim;
      Vec16 scale = Vec16::zero();
      if constexpr (kScaled<T>) scale = Vec16::broadcast(args.row_scale + args.ids[i]);
      each_group(t, args.ids[i], rows.at(i), [&](int64_t d, uint32_t bits, int64_t begin) {
        Vec16 row = expand(args.values + begin, bits);
        if constexpr (kScaled<T>) row = Vec16::mul(row, scale);
        if (d + 16 <= t.dim)
          store16(out + d, row);
        else
          store16_first(out + d, row, static_cast<int>(t.dim - d));
      });
    }
  });
}

template <class T>
void embedding_bag(const EmbeddingBag<T>& args) {
  const EmbeddingTable& t = args.table;
  const int64_t per_bag = max64(1, args.offsets[args.bags] / max64(1, args.bags));
  const int64_t bags = max64(1, kIdsOfPiece / per_bag), padded = round_up(t.dim, 16);
  parallel(args.threads, ceil_div(args.bags, bags), [&](int64_t piece) {
    float* sum = scratch_of<float>(sparsekd::kScratchSum, padded);
    const int64_t end_bag = min64(args.bags, (piece + 1) * bags), end = args.offsets[end_bag];
    RowStream<T> rows(t, args.values, args.ids, args.offsets[piece * bags], end);
    for (int64_t bag = piece * bags; bag < end_bag; ++bag) {
      zero_floats(sum, padded);
      for (int64_t i = args.offsets[bag]; i < args.offsets[bag + 1]; ++i) {
        const int64_t begin_of_row = rows.at(i);
        if (args.ids[i] == args.padding) continue;
        float weight = args.scale != nullptr ? args.scale[i] : 1.0f;
        if constexpr (kScaled<T>) weight *= args.row_scale[args.ids[i]];
        const Vec16 scale = Vec16::broadcast(&weight);
        each_group(t, args.ids[i], begin_of_row, [&](int64_t d, uint32_t bits, int64_t begin) {
          Vec16::fma(scale, expand(args.values + begin, bits), Vec16::load(sum + d)).store(sum + d);
        });
      }
      copy_floats(args.out + bag * t.dim, sum, 1, t.dim);
    }
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
      each_group(t, row, row_begin(t, row), [&](int64_t d, uint32_t bits, int64_t begin) {
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
