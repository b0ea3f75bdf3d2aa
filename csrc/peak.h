// The speed that kernels are compared with.
#pragma once

#include <string>

namespace sparsekd {

// Multiply-adds on `threads` threads at once for `seconds`: the sum of every thread's best burst, in 1e9 operations a
// second. dtype: float32, bfloat16 or int8; std::invalid_argument for others.
double peak_gflops(int threads, double seconds, const std::string& dtype);

}  // namespace sparsekd
