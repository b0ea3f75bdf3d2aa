// Memory whose neighbourhood is watched: pages before and after it that fault, and NaN in what is left of its own
// pages.
#pragma once

#include <cstddef>
#include <cstdint>

// The side on which the data touches a forbidden page; the other side has up to a page of NaN, checked at the end.
enum class Side { kBegin, kEnd };

class Guarded {
 public:
  Guarded() = default;
  Guarded(size_t bytes, Side side);
  Guarded(Guarded&& other) noexcept;
  Guarded& operator=(Guarded&& other) noexcept;
  ~Guarded();  // says on stderr and counts it when something outside was written

  float* floats() const { return static_cast<float*>(data_); }
  size_t bytes() const { return bytes_; }
  // Buffers written beyond their ends so far.
  static int64_t overruns();

 private:
  void* data_ = nullptr;
  unsigned char* pages_ = nullptr;  // accessible part
  size_t bytes_ = 0, page_bytes_ = 0;
};

// What sparsekd::scratch gives out from now on touches a forbidden page on this side.
void set_scratch_side(Side side);
