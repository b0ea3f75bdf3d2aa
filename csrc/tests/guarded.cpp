#include "guarded.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#include "parallel.h"

namespace {

std::atomic<int64_t> overrun_count{0};
std::atomic<Side> scratch_side{Side::kEnd};
constexpr unsigned char kCanary = 0xff;  // four of them are a NaN

size_t page() {
  static const size_t size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return size;
}

}  // namespace

Guarded::Guarded(size_t bytes, Side side) : bytes_(bytes) {
  page_bytes_ = (bytes + page() - 1) / page() * page();
  void* mapped = mmap(nullptr, page_bytes_ + 2 * page(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) abort();
  pages_ = static_cast<unsigned char*>(mapped) + page();
  if (page_bytes_ > 0 && mprotect(pages_, page_bytes_, PROT_READ | PROT_WRITE) != 0) abort();
  memset(pages_, kCanary, page_bytes_);
  data_ = side == Side::kBegin ? pages_ : pages_ + page_bytes_ - bytes;
}

Guarded::Guarded(Guarded&& other) noexcept { *this = std::move(other); }

Guarded& Guarded::operator=(Guarded&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(pages_, other.pages_);
  std::swap(bytes_, other.bytes_);
  std::swap(page_bytes_, other.page_bytes_);
  return *this;
}

Guarded::~Guarded() {
  if (pages_ == nullptr) return;
  const unsigned char* begin = static_cast<unsigned char*>(data_);
  bool touched = false;
  for (const unsigned char* p = pages_; p < pages_ + page_bytes_; ++p)
    touched |= (p < begin || p >= begin + bytes_) && *p != kCanary;
  if (touched) {
    fprintf(stderr, "written outside a buffer of %zu bytes\n", bytes_);
    ++overrun_count;
  }
  munmap(pages_ - page(), page_bytes_ + 2 * page());
}

int64_t Guarded::overruns() { return overrun_count; }

void set_scratch_side(Side side) { scratch_side = side; }

// Instead of ../parallel.cpp: exact buffers between forbidden pages, new ones for every thread of every loop, and plain
// threads, which sanitizers understand.
namespace sparsekd {

void* scratch(ScratchSlot slot, size_t bytes) {
  thread_local Guarded buffers[kScratchSlots];
  const size_t rounded = (bytes + 63) / 64 * 64;  // 64-byte aligned is promised
  Guarded& buffer = buffers[slot];
  if (rounded > buffer.bytes()) buffer = Guarded(rounded, scratch_side);
  return buffer.floats();
}

void parallel_for(int threads, int64_t items, ParallelBody body, void* context) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    bool first = true;
    for (int64_t item; (item = next++) < items; first = false) body(context, item, first);
  };
  std::vector<std::thread> workers;
  for (int i = 0; i < threads && i < items; ++i) workers.emplace_back(work);
  for (std::thread& worker : workers) worker.join();
}

NetworkLoops::NetworkLoops(int) : before_(false) {}
NetworkLoops::~NetworkLoops() = default;

}  // namespace sparsekd
