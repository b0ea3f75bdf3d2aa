// Threads and per-thread memory: the only file that knows OpenMP.
#include <cstdlib>
#include <exception>
#include <new>

#include "kernel_table.h"

namespace sparsekd {

namespace {

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;
  ~Buffer() { std::free(data); }
};

thread_local Buffer buffers[kScratchSlots];

}  // namespace

void* scratch(ScratchSlot slot, size_t bytes) {
  Buffer& buffer = buffers[slot];
  if (bytes > buffer.bytes) {
    std::free(buffer.data);
    buffer.bytes = 0;
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(64, rounded);
    if (buffer.data == nullptr) throw std::bad_alloc();
    buffer.bytes = rounded;
  }
  return buffer.data;
}

void parallel_for(int threads, int64_t items, ParallelBody body, void* context) {
  if (threads <= 1 || items <= 1) {
    for (int64_t i = 0; i < items; ++i) body(context, i);
    return;
  }
#ifdef _OPENMP
  // An exception must not leave a parallel region; the first one is thrown again after it.
  std::exception_ptr error;
  const int workers = static_cast<int>(items < threads ? items : threads);
#pragma omp parallel for num_threads(workers) schedule(dynamic, 1)
  for (int64_t i = 0; i < items; ++i) {
    try {
      body(context, i);
    } catch (...) {
#pragma omp critical(sparsekd_error)
      if (!error) error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
#else
  for (int64_t i = 0; i < items; ++i) body(context, i);
#endif
}

}  // namespace sparsekd
