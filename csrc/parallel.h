// Threads and the memory that each of them keeps (parallel.cpp). Plain declarations only; kernel_table.h says why.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparsekd {

// Memory of the calling thread, 64-byte aligned, kept and grown from call to call. Slots do not overlap.
enum ScratchSlot {
  kScratchCall,
  kScratchAxes,
  kScratchInput,
  kScratchOutput,
  kScratchWords,
  kScratchSum,
  kScratchNetwork,
  kScratchRows,
  kScratchSlots
};
void* scratch(ScratchSlot slot, size_t bytes);

// Runs body(context, item, first) for items 0..items-1 on up to `threads` threads, the calling one among them; with one
// thread, and inside of another loop, it is a plain loop. Every worker begins with its share of neighbouring items and
// then helps the others; `first` says that it begins. Throws what the first failed item threw, and std::system_error
// where the machine has no more threads.
using ParallelBody = void (*)(void* context, int64_t item, bool first);
void parallel_for(int threads, int64_t items, ParallelBody body, void* context);

// While one lives, the loops of its thread are those of a network, which follow each other closely: they use threads of
// our own, unless torch's (OpenMP's) are awake. Other loops use torch's.
class NetworkLoops {
 public:
  explicit NetworkLoops(int threads);
  ~NetworkLoops();
  NetworkLoops(const NetworkLoops&) = delete;
  NetworkLoops& operator=(const NetworkLoops&) = delete;

 private:
  const bool before_;
};

}  // namespace sparsekd
