// Means over pixels and mean squares over channels of feature maps, and their gradient: every map is read once in
// either direction, whatever its format. README.md beside this file says how.
#pragma once

#include "attention_kernels.h"
#include "copy_impl.h"
#include "parallel_impl.h"
#include "scratch_impl.h"

namespace {

using sparsekd::Element;
using sparsekd::FeatureLayer;
using sparsekd::FeatureStats;
using sparsekd::FeatureStatsGrad;

constexpr int64_t kPiecePixels = 1024;  // energy or gradient of a piece: 4 KiB beside the planes that stream past

// A piece of an image: neighbouring pixels of all channels.
struct Piece {
  const FeatureLayer* layer;
  int64_t image, index, pieces;
  Range pixels;

  int64_t size() const { return pixels.end - pixels.begin; }
  // Elements before the piece's first one.
  int64_t offset() const {
    return image * layer->channels * layer->pixels + pixels.begin * (layer->channels_last ? layer->channels : 1);
  }
};

// The cut depends on the shape alone, so results are the same for any number of threads.
inline int64_t pieces_of(const FeatureLayer& layer) { return ceil_div(layer.pixels, kPiecePixels); }

inline Piece find_piece(const FeatureLayer* layer, int64_t batch, int64_t item) {
  for (; item >= batch * pieces_of(*layer); ++layer) item -= batch * pieces_of(*layer);
  const int64_t pieces = pieces_of(*layer), index = item % pieces;
  return {layer, item / pieces, index, pieces, share(layer->pixels, pieces, index)};
}

inline int64_t count_pieces(const FeatureLayer* layer, int64_t count, int64_t batch) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += batch * pieces_of(layer[i]);
  return total;
}

// Gradients as large as this do not stay in a core's cache until they are read, and often another core reads them: they
// are written past the caches, which also saves reading the lines first.
constexpr int64_t kStreamBytes = 1 << 20;

inline int64_t map_bytes(const FeatureLayer* layer, int64_t count, int64_t batch) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i)
    total += batch * layer[i].channels * layer[i].pixels * (layer[i].element == Element::kFloat32 ? 4 : 2);
  return total;
}

inline Vec16 splat(float x) { return Vec16::broadcast(&x); }

// Turns vectors into their sums, 16 at a time.
struct LaneSums {
  float* out;
  float scale;
  Vec16 row[16];
  int filled = 0;

  LaneSums(float* out, float scale) : out(out), scale(scale) {}
  void push(Vec16 v) {
    row[filled++] = v;
    if (filled == 16) flush();
  }
  void flush() {
    if (filled == 0) return;
    for (int i = filled; i < 16; ++i) row[i] = Vec16::zero();
    Vec16::mul(Vec16::sum_rows(row), splat(scale)).store_first(out, filled);
    out += filled;
    filled = 0;
  }
};

inline void scale_floats(float* p, int64_t n, float scale) {
  for (int64_t i = 0; i < n; ++i) p[i] *= scale;
}

// Into the second cache: planes 4 KiB apart share the sets of the first one, which has no room for twice as many.
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
constexpr int64_t kAhead = 8192;  // bytes

// step(i, load, load_floats, store) for every 16 of n places, and once for the rest with loads and a store of so many.
template <class T, class Step>
inline void in_vectors(int64_t n, Step step) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    step(
        i, [](const T* at) { return load16(at); }, [](const float* at) { return Vec16::load(at); },
        [](float* at, Vec16 v) { v.store(at); });
  if (const int rest = static_cast<int>(n - i))
    step(
        i, [=](const T* at) { return load16_first(at, rest); },
        [=](const float* at) { return Vec16::load_first(at, rest); },
        [=](float* at, Vec16 v) { v.store_first(at, rest); });
}

// `kPlanes` channels of [channels][pitch]: adds their squares to energy, or begins it, and pushes their sums.
template <int kPlanes, class T>
inline void stats_of_planes(const T* x, int64_t pitch, int64_t pixels, bool first, float* energy, LaneSums& sums) {
  Vec16 sum[kPlanes];
  for (Vec16& s : sum) s = Vec16::zero();
  const int64_t ahead = max64(kPlanes * pitch, kAhead / static_cast<int64_t>(sizeof(T)));
  in_vectors<T>(pixels, [&](int64_t p, auto load, auto load_floats, auto store) {
    for (int i = 0; i < kPlanes; ++i) prefetch(x + i * pitch + p + ahead);
    Vec16 e = first ? Vec16::zero() : load_floats(energy + p);
    for (int i = 0; i < kPlanes; ++i) {
      const Vec16 v = load(x + i * pitch + p);
      sum[i] = Vec16::add(sum[i], v);
      e = Vec16::fma(v, v, e);
    }
    store(energy + p, e);
  });
  for (const Vec16& s : sum) sums.push(s);
}

template <class T>
inline void stats_contiguous(const T* x, int64_t channels, int64_t pitch, int64_t pixels, float* means, float scale,
                             float* energy) {
  LaneSums sums(means, scale);
  int64_t c = 0;
  for (; c + 4 <= channels; c += 4) stats_of_planes<4>(x + c * pitch, pitch, pixels, c == 0, energy, sums);
  for (; c < channels; ++c) stats_of_planes<1>(x + c * pitch, pitch, pixels, c == 0, energy, sums);
  sums.flush();
  scale_floats(energy, pixels, 1.0f / static_cast<float>(channels));
}

// `kPixels` pixels of [pixels][channels]: adds them to means, or begins it, and pushes the sums of their squares.
template <int kPixels, class T>
inline void stats_of_pixels(const T* x, int64_t channels, bool first, float* means, LaneSums& sums) {
  Vec16 square[kPixels];
  for (Vec16& s : square) s = Vec16::zero();
  const int64_t ahead = kAhead / static_cast<int64_t>(sizeof(T));
  in_vectors<T>(channels, [&](int64_t c, auto load, auto load_floats, auto store) {
    for (int i = 0; i < kPixels; ++i) prefetch(x + i * channels + c + ahead);
    Vec16 total = first ? Vec16::zero() : load_floats(means + c);
    for (int i = 0; i < kPixels; ++i) {
      const Vec16 v = load(x + i * channels + c);
      square[i] = Vec16::fma(v, v, square[i]);
      total = Vec16::add(total, v);
    }
    store(means + c, total);
  });
  for (const Vec16& s : square) sums.push(s);
}

template <class T>
inline void stats_channels_last(const T* x, int64_t channels, int64_t pixels, float* means, float scale,
                                float* energy) {
  LaneSums sums(energy, 1.0f / static_cast<float>(channels));
  int64_t p = 0;
  for (; p + 4 <= pixels; p += 4) stats_of_pixels<4>(x + p * channels, channels, p == 0, means, sums);
  for (; p < pixels; ++p) stats_of_pixels<1>(x + p * channels, channels, p == 0, means, sums);
  sums.flush();
  scale_floats(means, channels, scale);
}

template <class T>
inline void stats_of_piece(const Piece& piece, float* means, float scale, float* energy) {
  const FeatureLayer& layer = *piece.layer;
  const T* x = static_cast<const T*>(layer.features) + piece.offset();
  if (layer.channels_last)
    stats_channels_last(x, layer.channels, piece.size(), means, scale, energy);
  else
    stats_contiguous(x, layer.channels, layer.pixels, piece.size(), means, scale, energy);
}

// Elements of p up to the next address that `stream16` takes.
template <class T>
inline int64_t until_aligned(const T* p) {
  constexpr uintptr_t kVector = 16 * sizeof(T);
  return static_cast<int64_t>((kVector - reinterpret_cast<uintptr_t>(p) % kVector) % kVector / sizeof(T));
}

// out = gradient(x, load), where load(p) are the floats of p that belong to x.
template <class T, class Gradient>
inline void write_grad(const T* x, int64_t n, T* out, bool stream, Gradient gradient) {
  const auto some = [&](int64_t i, int count) {
    const auto load = [=](const float* p) { return Vec16::load_first(p + i, count); };
    store16_first(out + i, gradient(load16_first(x + i, count), load), count);
  };
  int64_t i = stream ? min64(until_aligned(out), n) : 0;
  if (i > 0) some(0, static_cast<int>(i));
  for (; i + 16 <= n; i += 16) {
    const Vec16 grad = gradient(load16(x + i), [=](const float* p) { return Vec16::load(p + i); });
    stream ? stream16(out + i, grad) : store16(out + i, grad);
  }
  if (i < n) some(i, static_cast<int>(n - i));
}

// out = x * scale over the pixels of a piece, or over the channels: the gradient's small factors, copied and scaled.
inline const float* scaled(const float* x, int64_t n, float scale) {
  float* out = scratch_of<float>(sparsekd::kScratchSum, n);
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * scale;
  return out;
}

template <class T>
inline void stats_grad_of_piece(const Piece& piece, const float* grad_means, const float* grad_energy, bool stream) {
  const FeatureLayer& layer = *piece.layer;
  const T* x = static_cast<const T*>(layer.features) + piece.offset();
  T* out = static_cast<T*>(layer.grad) + piece.offset();
  const float per_mean = 1.0f / static_cast<float>(layer.pixels),
              per_square = 2.0f / static_cast<float>(layer.channels);
  if (layer.channels_last) {
    const float* shift = scaled(grad_means, layer.channels, per_mean);
    for (int64_t p = 0; p < piece.size(); ++p) {
      const Vec16 scale = splat(grad_energy[p] * per_square);
      write_grad(x + p * layer.channels, layer.channels, out + p * layer.channels, stream,
                 [=](Vec16 v, auto load) { return Vec16::fma(v, scale, load(shift)); });
    }
  } else {
    const float* scale = scaled(grad_energy, piece.size(), per_square);
    for (int64_t c = 0; c < layer.channels; ++c) {
      const Vec16 shift = splat(grad_means[c] * per_mean);
      write_grad(x + c * layer.pixels, piece.size(), out + c * layer.pixels, stream,
                 [=](Vec16 v, auto load) { return Vec16::fma(v, load(scale), shift); });
    }
  }
  if (stream) Vec16::fence();
}

// Sums of a layer's pieces, [image][piece][channel], into its means, in order.
inline void add_pieces(const FeatureLayer& layer, const float* partial, float* means) {
  const int64_t pieces = pieces_of(layer);
  const float scale = 1.0f / static_cast<float>(layer.pixels);
  for (int64_t c = 0; c < layer.channels; ++c) means[c] = partial[c];
  for (int64_t i = 1; i < pieces; ++i)
    for (int64_t c = 0; c < layer.channels; ++c) means[c] += partial[i * layer.channels + c];
  scale_floats(means, layer.channels, scale);
}

void feature_stats(const FeatureStats& args) {
  int64_t floats = 0;
  for (int64_t i = 0; i < args.count; ++i)
    if (pieces_of(args.layer[i]) > 1) floats += args.batch * pieces_of(args.layer[i]) * args.layer[i].channels;
  float* const partial = scratch_of<float>(sparsekd::kScratchCall, floats);
  const auto partial_of = [&](const FeatureLayer* layer, int64_t image) {
    int64_t offset = 0;
    for (const FeatureLayer* before = args.layer; before != layer; ++before)
      if (pieces_of(*before) > 1) offset += args.batch * pieces_of(*before) * before->channels;
    return partial + offset + image * pieces_of(*layer) * layer->channels;
  };

  parallel(args.threads, count_pieces(args.layer, args.count, args.batch), [&](int64_t item) {
    const Piece piece = find_piece(args.layer, args.batch, item);
    const FeatureLayer& layer = *piece.layer;
    float* means = args.means + piece.image * args.means_stride + layer.means;
    float scale = 1.0f / static_cast<float>(layer.pixels);
    if (piece.pieces > 1) {
      means = partial_of(&layer, piece.image) + piece.index * layer.channels;
      scale = 1.0f;
    }
    float* energy = args.energy + piece.image * args.energy_stride + layer.energy + piece.pixels.begin;
    switch (layer.element) {
      case Element::kFloat32:
        return stats_of_piece<float>(piece, means, scale, energy);
      case Element::kBfloat16:
        return stats_of_piece<Bfloat16>(piece, means, scale, energy);
      case Element::kFloat16:
        return stats_of_piece<Float16>(piece, means, scale, energy);
    }
  });
  if (floats == 0) return;
  parallel(args.threads, args.batch, [&](int64_t image) {
    for (const FeatureLayer* layer = args.layer; layer != args.layer + args.count; ++layer)
      if (pieces_of(*layer) > 1)
        add_pieces(*layer, partial_of(layer, image), args.means + image * args.means_stride + layer->means);
  });
}

void feature_stats_grad(const FeatureStatsGrad& args) {
  const bool stream = map_bytes(args.layer, args.count, args.batch) >= kStreamBytes;
  parallel(args.threads, count_pieces(args.layer, args.count, args.batch), [&](int64_t item) {
    const Piece piece = find_piece(args.layer, args.batch, item);
    const FeatureLayer& layer = *piece.layer;
    const float* means = args.grad_means + piece.image * args.means_stride + layer.means;
    const float* energy = args.grad_energy + piece.image * args.energy_stride + layer.energy + piece.pixels.begin;
    switch (layer.element) {
      case Element::kFloat32:
        return stats_grad_of_piece<float>(piece, means, energy, stream);
      case Element::kBfloat16:
        return stats_grad_of_piece<Bfloat16>(piece, means, energy, stream);
      case Element::kFloat16:
        return stats_grad_of_piece<Float16>(piece, means, energy, stream);
    }
  });
}

}  // namespace
