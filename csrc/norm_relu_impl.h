// Batch norm by the statistics of the batch, a residual and ReLU. Either direction reads its maps twice, once for sums
// over rows and once for what it writes. Maps read or written, with torch's ops one after the other in brackets: forward
// 3 (6), with a residual 4 (9); backward 5 (8), with a residual 7 (8).
#pragma once

#include "activation_impl.h"
#include "half_impl.h"
#include "norm_relu_kernels.h"
#include "parallel_impl.h"
#include "ranges_impl.h"
#include "scratch_impl.h"

namespace {

using sparsekd::NormRelu;
using sparsekd::NormReluGrad;
using sparsekd::NormReluSizes;

constexpr int64_t kNormPiece = 8192;  // floats whose rows are added up at once: they stay in L1 or L2 for a second pass
constexpr int64_t kNormAlone = 16384;  // floats that one thread handles sooner than two

// Rows cut into pieces by the shape alone, so that results are the same for any number of threads.
struct NormPieces {
  int64_t rows, each, count;
  int threads;

  explicit NormPieces(const NormReluSizes& sizes)
      : rows(sizes.rows),
        each(max64(1, kNormPiece / sizes.channels)),
        count(ceil_div(sizes.rows, each)),
        threads(sizes.rows * sizes.channels < kNormAlone ? 1 : sizes.threads) {}

  Range operator[](int64_t index) const { return {index * each, min64(rows, (index + 1) * each)}; }
  double size(int64_t index) const { return static_cast<double>((*this)[index].end - (*this)[index].begin); }

  // body(index of a piece) for all of them: the sums go through a thread's share from its end, which was written last,
  // and what is written goes the other way, so that it finds what the sums read last.
  template <class Body>
  void backwards(const Body& body) const {
    parallel(threads, threads, [&](int64_t thread) {
      const Range mine = share(count, threads, thread);
      for (int64_t i = mine.end; i-- > mine.begin;) body(i);
    });
  }
  template <class Body>
  void forwards(const Body& body) const {
    parallel(threads, threads, [&](int64_t thread) {
      const Range mine = share(count, threads, thread);
      for (int64_t i = mine.begin; i < mine.end; ++i) body(i);
    });
  }
};

// sums[i][c] = the sum over rows of what terms(row, c, lanes, into) adds to into[i] for the `lanes` channels from c on.
template <int kSums, class Terms>
inline void sum_rows_of(Range rows, int64_t channels, float* const (&sums)[kSums], Terms terms) {
  constexpr int kAtOnce = 2;  // vectors of channels: AVX2 has registers for so many
  int64_t c = 0;
  for (; c + 16 * kAtOnce <= channels; c += 16 * kAtOnce) {
    Vec16 into[kAtOnce][kSums];
    for (auto& of_column : into)
      for (Vec16& sum : of_column) sum = Vec16::zero();
    for (int64_t row = rows.begin; row < rows.end; ++row)
#pragma GCC unroll 2
      for (int i = 0; i < kAtOnce; ++i) terms(row, c + 16 * i, 16, into[i]);
    for (int i = 0; i < kAtOnce; ++i)
      for (int j = 0; j < kSums; ++j) into[i][j].store(sums[j] + c + 16 * i);
  }
  for (; c < channels; c += 16) {
    const int lanes = static_cast<int>(min64(16, channels - c));
    Vec16 into[kSums];
    for (Vec16& sum : into) sum = Vec16::zero();
    for (int64_t row = rows.begin; row < rows.end; ++row) terms(row, c, lanes, into);
    for (int j = 0; j < kSums; ++j) into[j].store_first(sums[j] + c, lanes);
  }
}

// body(place, c, lanes) for every 16 channels of every row, and for the rest of it; place is row * channels + c.
template <class Body>
inline void each_vector(Range rows, int64_t channels, Body body) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    int64_t c = 0;
    for (; c + 16 <= channels; c += 16) body(row * channels + c, c, 16);
    if (c < channels) body(row * channels + c, c, static_cast<int>(channels - c));
  }
}

// The norm as x * scale + shift. One function for both directions, so that they round alike: the gradient asks again
// where y was positive.
[[gnu::noinline]] void norm_as_affine(int64_t channels, const float* weight, const float* bias, const float* mean,
                                      const float* variance, float epsilon, float* scale, float* shift) {
  for (int64_t c = 0; c < channels; ++c) {
    scale[c] = weight[c] / __builtin_sqrtf(variance[c] + epsilon);
    shift[c] = bias[c] - mean[c] * scale[c];
  }
}

// Means and sums of squared distances from them, [piece][channel], into those of all rows (Chan, Golub, LeVeque 1983):
// no digits cancel, however large the mean.
inline void join_moments(const NormPieces& pieces, int64_t channels, const float* means, const float* squares,
                         float* mean, float* variance) {
  const double rows = static_cast<double>(pieces.rows);
  double* const centre = scratch_of<double>(sparsekd::kScratchSum, 2 * channels);
  double* const total = centre + channels;
  for (int64_t c = 0; c < 2 * channels; ++c) centre[c] = 0;
  for (int64_t i = 0; i < pieces.count; ++i)
    for (int64_t c = 0; c < channels; ++c) centre[c] += pieces.size(i) * means[i * channels + c];
  for (int64_t c = 0; c < channels; ++c) centre[c] /= rows;
  for (int64_t i = 0; i < pieces.count; ++i)
    for (int64_t c = 0; c < channels; ++c) {
      const double apart = means[i * channels + c] - centre[c];
      total[c] += squares[i * channels + c] + pieces.size(i) * apart * apart;
    }
  for (int64_t c = 0; c < channels; ++c) {
    mean[c] = static_cast<float>(centre[c]);
    variance[c] = static_cast<float>(total[c] / rows);
  }
}

void norm_relu(const NormRelu& d) {
  const int64_t channels = d.sizes.channels;
  const NormPieces pieces(d.sizes);
  float *means, *squares, *scale, *shift;
  Arena::carve(sparsekd::kScratchCall, [&](Arena& arena) {
    means = arena.take<float>(pieces.count * channels);
    squares = arena.take<float>(pieces.count * channels);
    scale = arena.take<float>(channels);
    shift = arena.take<float>(channels);
  });
  pieces.backwards([&](int64_t item) {
    const Range rows = pieces[item];
    float *const mean = means + item * channels, *const square = squares + item * channels;
    sum_rows_of<1>(rows, channels, {mean}, [&](int64_t row, int64_t c, int lanes, Vec16(&into)[1]) {
      into[0] = Vec16::add(into[0], load_some(d.x + row * channels + c, lanes));
    });
    for (int64_t c = 0; c < channels; ++c) mean[c] /= static_cast<float>(rows.end - rows.begin);
    sum_rows_of<1>(rows, channels, {square}, [&](int64_t row, int64_t c, int lanes, Vec16(&into)[1]) {
      const Vec16 apart = Vec16::sub(load_some(d.x + row * channels + c, lanes), load_some(mean + c, lanes));
      into[0] = Vec16::fma(apart, apart, into[0]);
    });
  });
  join_moments(pieces, channels, means, squares, d.mean, d.variance);
  norm_as_affine(channels, d.weight, d.bias, d.mean, d.variance, d.epsilon, scale, shift);
  pieces.forwards([&](int64_t item) {
    each_vector(pieces[item], channels, [&](int64_t at, int64_t c, int lanes) {
      Vec16 v = Vec16::fma(load_some(d.x + at, lanes), load_some(scale + c, lanes), load_some(shift + c, lanes));
      if (d.residual != nullptr) v = Vec16::add(v, load_some(d.residual + at, lanes));
      store_some(d.y + at, Vec16::max(Vec16::zero(), v), lanes);
    });
  });
}

// dx = scale * (g - mean of g - n * mean of (g * n)), where n is the normalised x and g is dy where y is positive.
void norm_relu_grad(const NormReluGrad& d) {
  const int64_t channels = d.sizes.channels;
  const NormPieces pieces(d.sizes);
  float *sums, *products, *scale, *shift, *slope, *start;
  Arena::carve(sparsekd::kScratchCall, [&](Arena& arena) {
    sums = arena.take<float>(pieces.count * channels);
    products = arena.take<float>(pieces.count * channels);
    float** const of_channels[] = {&scale, &shift, &slope, &start};
    for (float** values : of_channels) *values = arena.take<float>(channels);
  });
  norm_as_affine(channels, d.weight, d.bias, d.mean, d.variance, d.epsilon, scale, shift);
  const auto passed = [&](int64_t at, int64_t c, int lanes, Vec16 x) {
    const Vec16 y = d.y != nullptr ? load_some(d.y + at, lanes)
                                   : Vec16::fma(x, load_some(scale + c, lanes), load_some(shift + c, lanes));
    return Vec16::where_positive(y, load_some(d.dy + at, lanes));
  };
  pieces.backwards([&](int64_t item) {
    float* const into_pieces[] = {sums + item * channels, products + item * channels};
    sum_rows_of<2>(pieces[item], channels, into_pieces, [&](int64_t row, int64_t c, int lanes, Vec16(&into)[2]) {
      const int64_t at = row * channels + c;
      const Vec16 x = load_some(d.x + at, lanes), g = passed(at, c, lanes, x);
      if (d.dresidual != nullptr) store_some(d.dresidual + at, g, lanes);
      into[0] = Vec16::add(into[0], g);
      into[1] = Vec16::fma(g, Vec16::sub(x, load_some(d.mean + c, lanes)), into[1]);
    });
  });
  double* const sum = scratch_of<double>(sparsekd::kScratchSum, 2 * channels);
  double* const product = sum + channels;
  for (int64_t c = 0; c < 2 * channels; ++c) sum[c] = 0;
  for (int64_t i = 0; i < pieces.count; ++i)
    for (int64_t c = 0; c < channels; ++c) {
      sum[c] += sums[i * channels + c];
      product[c] += products[i * channels + c];
    }
  for (int64_t c = 0; c < channels; ++c) {
    const double inverse = 1 / __builtin_sqrt(static_cast<double>(d.variance[c]) + static_cast<double>(d.epsilon));
    const double by = -static_cast<double>(d.weight[c]) * inverse / static_cast<double>(pieces.rows);
    d.dbias[c] = static_cast<float>(sum[c]);
    d.dweight[c] = static_cast<float>(product[c] * inverse);
    slope[c] = static_cast<float>(by * product[c] * inverse * inverse);
    start[c] = static_cast<float>(by * sum[c]);
  }
  pieces.forwards([&](int64_t item) {
    each_vector(pieces[item], channels, [&](int64_t at, int64_t c, int lanes) {
      const Vec16 x = load_some(d.x + at, lanes);
      const Vec16 g = d.dresidual != nullptr ? load_some(d.dresidual + at, lanes) : passed(at, c, lanes, x);
      const Vec16 apart = Vec16::sub(x, load_some(d.mean + c, lanes));
      const Vec16 rest = Vec16::fma(apart, load_some(slope + c, lanes), load_some(start + c, lanes));
      store_some(d.dx + at, Vec16::fma(g, load_some(scale + c, lanes), rest), lanes);
    });
  });
}

}  // namespace
