// Scratch memory by type, and one buffer dealt out in pieces.
#pragma once

#include "parallel.h"

namespace {

template <class T>
inline T* scratch_of(sparsekd::ScratchSlot slot, int64_t n) {
  return static_cast<T*>(sparsekd::scratch(slot, sizeof(T) * static_cast<size_t>(n)));
}

// Pieces of one scratch buffer, each on cache lines of its own.
class Arena {
 public:
  // Calls body(arena) twice with the same takes: the first call only adds up the sizes, so that none is written down
  // twice, and what it takes must not be touched.
  template <class Body>
  static void carve(sparsekd::ScratchSlot slot, const Body& body) {
    Arena measured(nullptr);
    body(measured);
    Arena arena(scratch_of<char>(slot, static_cast<int64_t>(measured.taken())));
    body(arena);
  }

  // From memory that begins a cache line; of null only what is taken counts, which must not be touched.
  explicit Arena(void* memory) : begin_(reinterpret_cast<uintptr_t>(memory)), next_(begin_) {}

  size_t taken() const { return next_ - begin_; }

  template <class T>
  T* take(int64_t n) {
    const uintptr_t piece = next_;
    next_ += (sizeof(T) * static_cast<uintptr_t>(n) + kLine - 1) / kLine * kLine;
    return reinterpret_cast<T*>(piece);
  }

 private:
  static constexpr uintptr_t kLine = 64;

  const uintptr_t begin_;
  uintptr_t next_;
};

}  // namespace
