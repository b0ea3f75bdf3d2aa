#include "peak.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <vector>

#include "dispatch.h"
#include "parallel.h"

namespace sparsekd {

namespace {

using Clock = std::chrono::steady_clock;
using Burst = double (*)(int64_t rounds, float* sink);

constexpr int64_t kRounds = 20000;  // some 30 microseconds, so that other processes' time slices do not count

Burst burst_of(const std::string& dtype) {
  const KernelTable& table = kernels();
  if (dtype == "float32") return table.fma_burst;
  if (dtype == "bfloat16") return table.bf16.burst;
  if (dtype == "int8") return table.int8.burst;
  throw std::invalid_argument("sparsekd._C.peak_gflops: dtype must be float32, bfloat16 or int8, got '" + dtype + "'");
}

// Operations a second of the best burst.
double best_burst(Burst burst, double seconds) {
  alignas(64) float sink[32];
  for (float& value : sink) value = 0.5f;
  const auto begin = Clock::now();
  auto now = begin;
  double best = 0;
  while (std::chrono::duration<double>(now - begin).count() < seconds) {
    const auto start = now;
    const double operations = burst(kRounds, sink);
    now = Clock::now();
    best = std::max(best, operations / std::chrono::duration<double>(now - start).count());
  }
  return best;
}

// Reads `lines` lines at random and returns what keeps the compiler from leaving them out.
uint64_t read_lines(const uint64_t* memory, uint64_t of, int64_t lines, uint64_t& state) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < lines; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    sum += memory[((state >> 32) * of >> 32) * 8];
  }
  return sum;
}

}  // namespace

double random_lines(const void* memory, int64_t bytes, int threads, double seconds) {
  struct Work {
    const uint64_t* memory;
    uint64_t lines;
    double seconds;
    std::vector<double> rate;
    std::vector<uint64_t> sink;
  } work{static_cast<const uint64_t*>(memory), static_cast<uint64_t>(bytes) / 64, seconds,
         std::vector<double>(static_cast<size_t>(threads)), std::vector<uint64_t>(static_cast<size_t>(threads))};
  parallel_for(
      threads, threads,
      [](void* context, int64_t item, bool) {
        constexpr int64_t kLines = 1 << 16;
        Work& work = *static_cast<Work*>(context);
        const size_t at = static_cast<size_t>(item);
        uint64_t state = 1 + at;
        const auto begin = Clock::now();
        double taken = 0;
        for (int64_t lines = kLines; taken < work.seconds; lines += kLines) {
          work.sink[at] += read_lines(work.memory, work.lines, kLines, state);
          taken = std::chrono::duration<double>(Clock::now() - begin).count();
          work.rate[at] = static_cast<double>(lines) / taken;
        }
      },
      &work);
  double total = 0;
  for (const double rate : work.rate) total += rate;
  return total;
}

double peak_gflops(int threads, double seconds, const std::string& dtype) {
  struct Work {
    Burst burst;
    double seconds;
    std::vector<double> best;
  } work{burst_of(dtype), seconds, std::vector<double>(static_cast<size_t>(threads))};
  parallel_for(
      threads, threads,
      [](void* context, int64_t item, bool) {
        Work& work = *static_cast<Work*>(context);
        work.best[static_cast<size_t>(item)] = best_burst(work.burst, work.seconds);
      },
      &work);
  double total = 0;
  for (const double rate : work.best) total += rate;
  return total * 1e-9;
}

}  // namespace sparsekd
