#include "quantize.h"

#include <algorithm>

#include "dispatch.h"
#include "parallel.h"

namespace sparsekd {

constexpr int64_t kPiece = 16384;

void quantize_u8(const float* x, int64_t count, float scale, int zero, uint8_t* y, int threads) {
  struct Work {
    const float* x;
    int64_t count;
    float inverse;
    int zero;
    uint8_t* y;
  } work{.x = x, .count = count, .inverse = 1.0f / scale, .zero = zero, .y = y};
  parallel_for(
      threads, (count + kPiece - 1) / kPiece,
      [](void* context, int64_t item, bool) {
        const Work& work = *static_cast<Work*>(context);
        const int64_t begin = item * kPiece, n = std::min(kPiece, work.count - begin);
        kernels().quantize(work.x + begin, n, work.inverse, work.zero, work.y + begin);
      },
      &work);
}

}  // namespace sparsekd
