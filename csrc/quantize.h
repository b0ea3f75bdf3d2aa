// Floats to bytes.
#pragma once

#include <cstdint>

namespace sparsekd {

// y[i] = round(x[i] / scale) + zero, ties to even, within 0..255.
void quantize_u8(const float* x, int64_t count, float scale, int zero, uint8_t* y, int threads);

}  // namespace sparsekd
