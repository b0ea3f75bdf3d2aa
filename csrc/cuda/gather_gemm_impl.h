// out = activation(gather(x) * blocks + bias + residual): the walk of kernels/gather_gemm.py for 16-bit types, over
// the same tables (kernels/index.py), in CUDA C++ for devices without Triton.
//
// Written once over a Block of threads: gather_gemm.cu gives it those of a GPU, emulated.cpp runs the same code on a
// CPU, where tests hold every index against the reference. Shared memory of a stage: BM rows of gathered x, then BN
// rows of weights, each of BK elements whose 16-byte chunks are permuted (swizzle), so that 8 rows read at once lie in
// all banks.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define SPARSEKD_FN __device__ __forceinline__
#else
#define SPARSEKD_FN inline
#endif

// As in sparsekd/backends/cuda/driver.py, field by field.
struct GatherGemm {
  const uint16_t* x;         // [images, in_h, in_w, in_c]
  const uint16_t* values;    // [nnzb, bh, bw]
  const uint16_t* bias;      // [out_c] or null
  const uint16_t* residual;  // as out, or null
  uint16_t* out;             // [images, grid_h, grid_w, out_c]
  const int32_t* tiles;      // [num_tiles][8]: row_begin, row_end, step_begin, step_end, -
  const int32_t* slots;      // [num_steps + 1][4]: dy, dx, first channel, channels inside the weight
  const int32_t* offsets;    // [num_steps + 1][BN / lane]: of a lane's first weight in values, negative: zeros
  int32_t pixels, grid_h, grid_w, in_h, in_w, in_c, out_c, step_h, step_w;
  int32_t num_tiles, pixel_tiles, group, lane, bw, activation;
};

namespace {

template <class T>
SPARSEKD_FN T smaller(T a, T b) {
  return a < b ? a : b;
}

// Comparisons, not minima and maxima: a NaN must come through.
SPARSEKD_FN float activate(float x, int activation) {
  if (activation == 1) return x < 0.0f ? 0.0f : x;
  if (activation == 2) return x < 0.0f ? 0.0f : x > 6.0f ? 6.0f : x;
  return activation == 3 ? x / (1.0f + expf(-x)) : x;
}

template <int BM_, int BN_, int BK_, int WarpsM, int WarpsN, int Stages>
struct Tile {
  static constexpr int BM = BM_, BN = BN_, BK = BK_, kStages = Stages;
  static constexpr int kThreads = 32 * WarpsM * WarpsN;
  static constexpr int kChunks = BK / 8;                    // of 16 bytes in a row
  static constexpr int kCopiesX = BM * kChunks / kThreads;  // of a thread in a step
  static constexpr int kCopiesW = (BN * kChunks - 1) / kThreads + 1;
  static constexpr int kRowBytes = BK * 2, kStageBytes = (BM + BN) * kRowBytes;
  static constexpr int kSumsBytes = BM * BN * 4;
  static constexpr int kSharedBytes = Stages * kStageBytes > kSumsBytes ? Stages * kStageBytes : kSumsBytes;
  static constexpr int kWarpM = BM / WarpsM, kWarpN = BN / WarpsN;  // a warp's share of the tile
  static constexpr int kMs = kWarpM / 16, kNs = kWarpN / 8;         // in products of 16 x 8
  static_assert(BM * kChunks % kThreads == 0 && kNs % 2 == 0, "copies and fragments come out even");

  SPARSEKD_FN static int place(unsigned row, unsigned chunk) {
    constexpr unsigned rows_in_a_line = 8 / kChunks;  // of 128 bytes: all 32 banks
    return static_cast<int>(row * kRowBytes + 16 * (chunk ^ (row / rows_in_a_line % kChunks)));
  }
  // The place `rows` (a multiple of 8) further down and `chunks` (even) further right of an even pair's.
  SPARSEKD_FN static int moved(int place, int rows, int chunks) { return (place ^ 16 * chunks) + rows * kRowBytes; }
  // Of sums, float [BM][BN], in groups of 8 columns.
  SPARSEKD_FN static int sums_place(int row, int column) {
    constexpr int groups = BN / 8;
    return (row * BN + 8 * (column / 8 ^ (row % smaller(groups, 8))) + column % 8) * 4;
  }
  SPARSEKD_FN static int warp_row(int warp) { return warp / WarpsN * kWarpM; }
  SPARSEKD_FN static int warp_column(int warp) { return warp % WarpsN * kWarpN; }
};

struct Slot {
  int32_t dy, dx, channel, width;  // `channel` becomes the distance from a pixel's first element
};

// What a thread carries from step to step: the pixels it gathers, and what the next step reads.
template <class T>
struct Carried {
  const uint16_t* pixel[T::kCopiesX];  // its first channel in x
  int32_t top[T::kCopiesX], left[T::kCopiesX];
  Slot slot;
  int32_t offset[T::kCopiesW];
};

constexpr int kNowhere = -(1 << 20);  // a row that no tap moves into an image

template <class T, class Block>
SPARSEKD_FN void locate(const GatherGemm& g, int first_pixel, int thread, Carried<T>& mine) {
#pragma unroll
  for (int i = 0; i < T::kCopiesX; ++i) {
    const int m = first_pixel + (i * T::kThreads + thread) / T::kChunks;
    const int row = m / g.grid_w, image = row / g.grid_h;
    mine.top[i] = m < g.pixels ? (row - image * g.grid_h) * g.step_h : kNowhere;
    mine.left[i] = (m - row * g.grid_w) * g.step_w;
    mine.pixel[i] = g.x + ((int64_t(image) * g.in_h + mine.top[i]) * g.in_w + mine.left[i]) * g.in_c;
  }
}

template <class T>
SPARSEKD_FN void read_tables(const GatherGemm& g, int step, int thread, Carried<T>& mine) {
  mine.slot = reinterpret_cast<const Slot*>(g.slots)[step];
  // An image has fewer than 2^31 elements; the entry behind the last, which is read in vain, may overflow.
  mine.slot.channel += static_cast<int32_t>((unsigned(mine.slot.dy) * g.in_w + mine.slot.dx) * unsigned(g.in_c));
#pragma unroll
  for (int i = 0; i < T::kCopiesW; ++i) {
    const int row = smaller((i * T::kThreads + thread) / T::kChunks, T::BN - 1);
    mine.offset[i] = g.offsets[int64_t(step) * (T::BN / g.lane) + row / g.lane];
  }
}

template <class T, class Block>
SPARSEKD_FN void copy_step(Block& block, const GatherGemm& g, int stage, int thread, const Carried<T>& mine) {
  const Slot& slot = mine.slot;
#pragma unroll
  for (int i = 0; i < T::kCopiesX; ++i) {
    const int copy = i * T::kThreads + thread, row = copy / T::kChunks, chunk = copy % T::kChunks;
    const int y = mine.top[i] + slot.dy, x = mine.left[i] + slot.dx;
    const bool wanted = unsigned(y) < unsigned(g.in_h) && unsigned(x) < unsigned(g.in_w) && chunk * 8 < slot.width;
    block.copy16(stage * T::kStageBytes + T::place(row, chunk), wanted ? mine.pixel[i] + slot.channel + chunk * 8 : g.x,
                 wanted);
  }
#pragma unroll
  for (int i = 0; i < T::kCopiesW; ++i) {
    const int copy = i * T::kThreads + thread, row = copy / T::kChunks, chunk = copy % T::kChunks;
    const bool kept = mine.offset[i] >= 0;
    const int64_t from = int64_t(mine.offset[i]) + row % g.lane * g.bw + chunk * 8;
    if (row < T::BN)
      block.copy16(stage * T::kStageBytes + T::BM * T::kRowBytes + T::place(row, chunk), g.values + (kept ? from : 0),
                   kept);
  }
}

// One warp's products of a stage. ldmatrix takes the address of row `lane % 8` of matrix `lane / 8`: of x the matrices
// are (rows 0-7, 8-15) x (k 0-7, 8-15), rows first; of the weights (columns 0-7, 8-15) x (k 0-7, 8-15), k first.
template <class T, class Block, class Sums>
SPARSEKD_FN void multiply_stage(Block& block, int stage, int warp, Sums& sums) {
  const int x_base = stage * T::kStageBytes, w_base = x_base + T::BM * T::kRowBytes;
#pragma unroll
  for (int k = 0; k < T::kChunks; k += 2) {
    typename Block::template Registers<uint32_t, T::kNs * 2> w;
#pragma unroll
    for (int j = 0; j < T::kNs; j += 2)
      block.load_matrices(w, 2 * j, [&](int lane) {
        const int first = T::place(T::warp_column(warp) + lane % 8 + lane / 16 * 8, lane / 8 % 2);
        return w_base + T::moved(first, 8 * j, k);
      });
#pragma unroll
    for (int i = 0; i < T::kMs; ++i) {
      typename Block::template Registers<uint32_t, 4> x;
      block.load_matrices(x, 0, [&](int lane) {
        const int first = T::place(T::warp_row(warp) + lane % 16, lane / 16);
        return x_base + T::moved(first, 16 * i, k);
      });
#pragma unroll
      for (int j = 0; j < T::kNs; ++j) block.multiply_add(sums, 4 * (i * T::kNs + j), x, w, 2 * j);
    }
  }
}

// The sums of a product of 16 x 8: lane l holds columns 2 (l % 4) + {0, 1} of rows l / 4 and l / 4 + 8.
template <class T, class Block>
SPARSEKD_FN void spread_sums(Block& block, int warp, int lane, const float* sums) {
#pragma unroll
  for (int i = 0; i < T::kMs; ++i)
#pragma unroll
    for (int j = 0; j < T::kNs; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = T::warp_row(warp) + 16 * i + lane / 4 + 8 * half;
        const int column = T::warp_column(warp) + 8 * j + lane % 4 * 2;
        float* place = reinterpret_cast<float*>(block.shared + T::sums_place(row, column));
        place[0] = sums[4 * (i * T::kNs + j) + 2 * half];
        place[1] = sums[4 * (i * T::kNs + j) + 2 * half + 1];
      }
}

struct alignas(16) Eight {
  uint16_t bits[8];
};

template <class T, class Type, class Block>
SPARSEKD_FN void finish(Block& block, const GatherGemm& g, int first_pixel, int row_begin, int row_end, int thread) {
  for (int i = thread; i < T::BM * T::BN / 8; i += T::kThreads) {
    const int row = i / (T::BN / 8), column = i % (T::BN / 8) * 8, channel = row_begin + column;
    if (first_pixel + row >= g.pixels || channel >= row_end) continue;
    const float* sums = reinterpret_cast<const float*>(block.shared + T::sums_place(row, column));
    const int64_t at = int64_t(first_pixel + row) * g.out_c + channel;
    Eight bias{}, residual{}, out;
    if (g.bias) bias = *reinterpret_cast<const Eight*>(g.bias + channel);
    if (g.residual) residual = *reinterpret_cast<const Eight*>(g.residual + at);
#pragma unroll
    for (int j = 0; j < 8; ++j)
      out.bits[j] =
          Type::narrow(activate(sums[j] + Type::widen(bias.bits[j]) + Type::widen(residual.bits[j]), g.activation));
    *reinterpret_cast<Eight*>(g.out + at) = out;
  }
}

// All of one program. `group` pixel tiles go through all channel tiles before the next ones: they share x in L2.
template <class T, class Type, class Block>
SPARSEKD_FN void gather_gemm(Block& block, const GatherGemm& g, int program) {
  const int chunk = program / (g.group * g.num_tiles), within = program - chunk * g.group * g.num_tiles;
  const int height = smaller(g.pixel_tiles - chunk * g.group, g.group);
  const int32_t* tile = g.tiles + within / height * 8;
  const int first_pixel = (chunk * g.group + within % height) * T::BM;
  const int row_begin = tile[0], row_end = tile[1], begin = tile[2], end = tile[3];

  typename Block::template PerThread<Carried<T>> carried;
  typename Block::template PerWarp<typename Block::template Registers<float, T::kMs * T::kNs * 4>> sums;
  block.each_thread([&](int thread) {
    locate<T, Block>(g, first_pixel, thread, carried[thread]);
    read_tables<T>(g, begin, thread, carried[thread]);
  });
  // The tables of the step after are on their way while a step is copied; the one entry beyond the last is there to
  // read.
  const auto start_copy = [&](int step) {
    block.each_thread([&](int thread) {
      if (step < end) {
        copy_step<T>(block, g, (step - begin) % T::kStages, thread, carried[thread]);
        read_tables<T>(g, step + 1, thread, carried[thread]);
      }
      block.commit(thread);
    });
  };
  for (int step = begin; step < begin + T::kStages - 1; ++step) start_copy(step);
  for (int step = begin; step < end; ++step) {
    block.template wait_for_all_but<T::kStages - 2>();
    block.sync();  // and the stage that is filled next has been read by all
    start_copy(step + T::kStages - 1);
    block.each_warp([&](int warp) { multiply_stage<T>(block, (step - begin) % T::kStages, warp, sums[warp]); });
  }
  block.template wait_for_all_but<0>();
  block.sync();
  block.each_thread(
      [&](int thread) { spread_sums<T>(block, thread / 32, thread % 32, sums[thread / 32].of(thread % 32)); });
  block.sync();
  block.each_thread([&](int thread) { finish<T, Type>(block, g, first_pixel, row_begin, row_end, thread); });
}

}  // namespace

// Every tile that is built: pixels, output channels, gathered channels of a step, warps down and across, stages.
#define SPARSEKD_TILES(X, BK) X(128, 128, BK, 2, 4, 4) X(128, 64, BK, 2, 2, 4) X(64, 32, BK, 2, 2, 4)
