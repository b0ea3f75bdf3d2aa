// The speed that kernels are compared with.
#pragma once

#include <cstdint>
#include <string>

namespace sparsekd {

// Multiply-adds on `threads` threads at once for `seconds`: the sum of every thread's best burst, in 1e9 operations a
// second. dtype: float32, bfloat16 or int8; std::invalid_argument for others.
double peak_gflops(int threads, double seconds, const std::string& dtype);

// Lines of 64 bytes a second that `threads` threads read at random places of memory, none waiting for another: what
// looking up rows is up against.
double random_lines(const void* memory, int64_t bytes, int threads, double seconds);

}  // namespace sparsekd
