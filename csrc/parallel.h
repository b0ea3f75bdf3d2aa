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
  kScratchSlots
};
void* scratch(ScratchSlot slot, size_t bytes);

// Runs body(context, item, first) for items 0..items-1 on up to `threads` OpenMP threads; with one thread it is a plain
// loop that never enters the OpenMP run time. Every worker begins with its share of neighbouring items and then helps
// the others; `first` says that it begins.
using ParallelBody = void (*)(void* context, int64_t item, bool first);
void parallel_for(int threads, int64_t items, ParallelBody body, void* context);

}  // namespace sparsekd
