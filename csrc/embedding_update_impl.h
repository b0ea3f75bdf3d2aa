// Training of packed tables: gradients of the rows of a batch alone, the steps of optimizers on them, and the exchange of
// entries.
#pragma once

#include "embedding_top_k_impl.h"

namespace {

using sparsekd::EmbeddingMagnitudes;
using sparsekd::EmbeddingRepack;
using sparsekd::EmbeddingRowsGrad;
using sparsekd::EmbeddingThin;
using sparsekd::EmbeddingUpdate;

constexpr int64_t kRowsOfPiece = 64;

// Rows belong to one worker each, and their terms come in the order of the ids, however many threads there are.
void embedding_rows_grad(const EmbeddingRowsGrad& args) {
  const EmbeddingTable& t = args.table;
  parallel(args.threads, ceil_div(args.count, kRowsOfPiece), [&](int64_t piece) {
    const int64_t end = min64(args.count, (piece + 1) * kRowsOfPiece);
    for (int64_t r = piece * kRowsOfPiece; r < end; ++r) {
      const int64_t row = args.rows[r], size = args.begin[r + 1] - args.begin[r], begin = row_begin(t, row);
      float* sums = args.sums + args.begin[r];
      for (int64_t i = 0; i < size; ++i) args.places[args.begin[r] + i] = begin + i;
      zero_floats(sums, size);
      for (int64_t j = args.first[r]; j < args.first[r + 1]; ++j) {
        const int64_t i = args.order[j];
        const float* grad = args.grad + (args.source != nullptr ? args.source[i] : i) * t.dim;
        const float one = 1.0f;
        const Vec16 scale = Vec16::broadcast(args.scale != nullptr ? args.scale + i : &one);
        each_group(t, row, 0, [&](int64_t group, uint32_t bits, int64_t at) {
          const int64_t d = 16 * group;
          const int count = __builtin_popcount(bits);
          if (count == 0) return;
          const Vec16 all = Vec16::load_first(grad + d, static_cast<int>(min64(16, t.dim - d)));
          Vec16::fma(scale, Vec16::compress(all, bits), Vec16::load_first(sums + at, count))
              .store_first(sums + at, count);
        });
      }
    }
  });
}

// ---- Optimizers

constexpr int64_t kPlacesOfPiece = 1024;
constexpr int64_t kPlacesAhead = 64;

// The row that holds a place, found anew from the bases or, for ascending places, by going on.
struct RowCursor {
  const EmbeddingTable& t;
  int64_t row = -1, begin = 0, end = 0;  // places of the row

  void seek(int64_t place) {
    const int64_t bases = ceil_div(t.rows, sparsekd::kRowsOfBase), next = row / sparsekd::kRowsOfBase + 1;
    if (row < 0 || (next < bases && place >= t.base[next])) {
      int64_t low = 0, high = bases;  // the last base that is not behind the place
      while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        (t.base[middle] <= place ? low : high) = middle;
      }
      row = low * sparsekd::kRowsOfBase;
      begin = t.base[low];
      end = begin + count_kept(t, row);
    }
    while (place >= end) {
      begin = end;
      end += count_kept(t, ++row);
    }
  }
};

// body(begin, end) for pieces of the places, with what is needed later asked for ahead.
template <class Body>
inline void each_piece(const EmbeddingUpdate& args, const Body& body) {
  parallel(args.threads, ceil_div(args.count, kPlacesOfPiece),
           [&](int64_t piece) { body(piece * kPlacesOfPiece, min64(args.count, (piece + 1) * kPlacesOfPiece)); });
}

inline void prefetch_places(const EmbeddingUpdate& args, int64_t i) {
  if (i + kPlacesAhead >= args.count) return;
  const int64_t place = args.places[i + kPlacesAhead];
  __builtin_prefetch(args.values + place, 1);
  if (args.mean != nullptr) __builtin_prefetch(args.mean + place, 1);
  if (args.square != nullptr) __builtin_prefetch(args.square + place, 1);
}

// body(row, begin, end) for the places of each row; a row belongs to the piece in which it begins.
template <class Body>
inline void each_row(const EmbeddingUpdate& args, const Body& body) {
  each_piece(args, [&](int64_t begin, int64_t end) {
    RowCursor cursor{.t = args.table};
    int64_t i = begin;
    if (begin > 0) {
      cursor.seek(args.places[begin - 1]);
      while (i < args.count && args.places[i] < cursor.end) ++i;
    }
    while (i < end) {
      cursor.seek(args.places[i]);
      const int64_t first = i;
      while (i < args.count && args.places[i] < cursor.end) ++i;
      body(cursor.row, first, i);
    }
  });
}

void embedding_sgd(const EmbeddingUpdate& args) {
  each_piece(args, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (i % 4 == 0) prefetch_places(args, i);
      float& value = args.values[args.places[i]];
      value -= args.lr * (args.grad[i] + args.decay * value);
    }
  });
}

void embedding_adagrad(const EmbeddingUpdate& args) {
  each_piece(args, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (i % 4 == 0) prefetch_places(args, i);
      float& value = args.values[args.places[i]];
      float& square = args.square[args.places[i]];
      const float grad = args.grad[i] + args.decay * value;
      square += grad * grad;
      value -= args.lr * grad / (__builtin_sqrtf(square) + args.eps);
    }
  });
}

// One number for each row: the sum over steps of the mean square of its gradient.
void embedding_adagrad_rows(const EmbeddingUpdate& args) {
  each_row(args, [&](int64_t row, int64_t begin, int64_t end) {
    float squares = 0;
    for (int64_t i = begin; i < end; ++i) {
      const float grad = args.grad[i] + args.decay * args.values[args.places[i]];
      squares += grad * grad;
    }
    float& sum = args.square[row];
    sum += squares / static_cast<float>(end - begin);
    const float rate = args.lr / (__builtin_sqrtf(sum) + args.eps);
    for (int64_t i = begin; i < end; ++i) {
      float& value = args.values[args.places[i]];
      value -= rate * (args.grad[i] + args.decay * value);
    }
  });
}

void embedding_adam(const EmbeddingUpdate& args) {
  constexpr uint16_t kMany = 65535;
  each_row(args, [&](int64_t row, int64_t begin, int64_t end) {
    uint16_t& occurred = args.occurred[row];
    if (occurred != kMany) ++occurred;
    double bias1 = 1, bias2 = 1;
    if (occurred != kMany) {
      bias1 -= __builtin_pow(static_cast<double>(args.beta1), occurred);
      bias2 -= __builtin_pow(static_cast<double>(args.beta2), occurred);
    }
    const float rate = args.lr / static_cast<float>(bias1), root = static_cast<float>(1 / bias2);
    for (int64_t i = begin; i < end; ++i) {
      if (i % 4 == 0) prefetch_places(args, i);
      const int64_t place = args.places[i];
      const float grad = args.grad[i] + args.decay * args.values[place];
      const float mean = args.mean[place] + (1 - args.beta1) * (grad - args.mean[place]);
      const float square = args.beta2 * args.square[place] + (1 - args.beta2) * grad * grad;
      args.mean[place] = mean;
      args.square[place] = square;
      args.values[place] -= rate * mean / (__builtin_sqrtf(square * root) + args.eps);
    }
  });
}

// ---- Exchange of entries

// body(row, begin) for all rows of some bases.
template <class Body>
inline void each_table_row(const EmbeddingTable& t, int threads, const Body& body) {
  parallel(threads, ceil_div(t.rows, sparsekd::kRowsOfBase), [&](int64_t base) {
    int64_t begin = t.base[base];
    const int64_t end = min64(t.rows, (base + 1) * sparsekd::kRowsOfBase);
    for (int64_t row = base * sparsekd::kRowsOfBase; row < end; ++row) {
      const int64_t count = count_kept(t, row);
      body(row, begin, count);
      begin += count;
    }
  });
}

void embedding_magnitudes(const EmbeddingMagnitudes& args) {
  each_table_row(args.table, args.threads, [&](int64_t, int64_t begin, int64_t count) {
    int64_t best = 0;
    for (int64_t i = 0; i < count; ++i) {
      args.magnitudes[begin + i] = __builtin_fabsf(args.values[begin + i]);
      if (args.magnitudes[begin + i] > args.magnitudes[begin + best]) best = i;
    }
    if (count > 0) args.magnitudes[begin + best] = __builtin_inff();
  });
}

void embedding_thin(const EmbeddingThin& args) {
  const EmbeddingTable& t = args.table;
  const int64_t words = ceil_div(t.dim, 64);
  each_table_row(t, args.threads, [&](int64_t row, int64_t begin, int64_t) {
    for (int64_t word = 0; word < words; ++word) {
      uint64_t left = kept_of(t, row)[word];
      for (uint64_t bits = left; bits != 0; bits &= bits - 1, ++begin)
        if (!args.stays[begin]) left &= ~(bits & -bits);
      args.target[row * words + word] = left;
    }
  });
}

template <class T>
inline void repack(const EmbeddingRepack& args) {
  const T* source = static_cast<const T*>(args.source);
  T* target = static_cast<T*>(args.target);
  const int64_t words = ceil_div(args.from.dim, 64);
  each_table_row(args.from, args.threads, [&](int64_t row, int64_t begin, int64_t) {
    int64_t to = row_begin(args.to, row);
    for (int64_t word = 0; word < words; ++word) {
      const uint64_t had = kept_of(args.from, row)[word], has = kept_of(args.to, row)[word];
      for (uint64_t bits = had | has; bits != 0; bits &= bits - 1) {
        const uint64_t bit = bits & -bits;
        if (had & has & bit) target[to] = source[begin];
        begin += (had & bit) != 0;
        to += (has & bit) != 0;
      }
    }
  });
}

void embedding_repack(const EmbeddingRepack& args) {
  if (args.bytes == 1) return repack<uint8_t>(args);
  if (args.bytes == 2) return repack<uint16_t>(args);
  if (args.bytes == 4) return repack<uint32_t>(args);
  repack<uint64_t>(args);
}

constexpr sparsekd::EmbeddingKernels kEmbedding = {.lookup_f32 = embedding_lookup<float>,
                                                   .lookup_bf16 = embedding_lookup<Bfloat16>,
                                                   .lookup_f16 = embedding_lookup<Float16>,
                                                   .lookup_i8 = embedding_lookup<int8_t>,
                                                   .bag_f32 = embedding_bag<float>,
                                                   .bag_bf16 = embedding_bag<Bfloat16>,
                                                   .bag_f16 = embedding_bag<Float16>,
                                                   .bag_i8 = embedding_bag<int8_t>,
                                                   .grad = embedding_grad,
                                                   .absent = embedding_absent,
                                                   .top_k_f32 = embedding_top_k<float>,
                                                   .top_k_bf16 = embedding_top_k<Bfloat16>,
                                                   .top_k_f16 = embedding_top_k<Float16>,
                                                   .top_k_i8 = embedding_top_k<int8_t>,
                                                   .rows_grad = embedding_rows_grad,
                                                   .sgd = embedding_sgd,
                                                   .adagrad = embedding_adagrad,
                                                   .adagrad_rows = embedding_adagrad_rows,
                                                   .adam = embedding_adam,
                                                   .magnitudes = embedding_magnitudes,
                                                   .thin = embedding_thin,
                                                   .repack = embedding_repack};

}  // namespace
