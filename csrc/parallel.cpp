// Threads and per-thread memory: the only file that knows OpenMP.
#include <atomic>
#include <cstdlib>
#include <exception>
#include <new>

#include "parallel.h"

#ifdef _OPENMP
#include <omp.h>
#endif

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
    for (int64_t i = 0; i < items; ++i) body(context, i, i == 0);
    return;
  }
#ifdef _OPENMP
  // An exception must not leave a parallel region; the first one is thrown again after it.
  std::exception_ptr error;
  const int workers = static_cast<int>(items < threads ? items : threads);
  // A worker begins with its share, so that in the next loop over the same rows it finds in its cache what it wrote.
  // So many counters lie on the stack (512 bytes) instead of being allocated at every call; of more workers than that,
  // which machines of more than 64 cores have, two or three begin in the same share.
  constexpr int kShares = 64;
  const int shares = workers < kShares ? workers : kShares;
  std::atomic<int64_t> next[kShares];
  for (int i = 0; i < shares; ++i) next[i].store(items * i / shares, std::memory_order_relaxed);
#pragma omp parallel num_threads(workers)
  try {
    bool first = true;
    for (int i = 0; i < shares; ++i) {
      const int own = (omp_get_thread_num() + i) % shares;
      const int64_t end = items * (own + 1) / shares;
      for (int64_t item; (item = next[own].fetch_add(1, std::memory_order_relaxed)) < end; first = false)
        body(context, item, first);
    }
  } catch (...) {
#pragma omp critical(sparsekd_error)
    if (!error) error = std::current_exception();
  }
  if (error) std::rethrow_exception(error);
#else
  for (int64_t i = 0; i < items; ++i) body(context, i, i == 0);
#endif
}

}  // namespace sparsekd
