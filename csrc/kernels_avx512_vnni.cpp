// The int8 forward pass on vpdpbusd, and the four multiply-adds it does per word; the rest is AVX-512's.
#include "simd/vec_avx512.h"

#include "conv2d_forward_impl.h"
#include "kernel_table.h"
#include "madd_burst_impl.h"

namespace {

// Four neighbouring channels of one pixel, unsigned, times four signed weights, added to a 32-bit integer. Memory could
// be broadcast into the signed operand for nothing, but then the weights would have to be the unsigned one, and every
// pixel's sum of inputs be subtracted again.
struct ByteSums {
  using Stored = void;
  static constexpr bool kInteger = true;
  static Vec16 madd(Vec16 weight, Vec16 x, Vec16 sum) {
    return {_mm512_castsi512_ps(
        _mm512_dpbusd_epi32(_mm512_castps_si512(sum.v), _mm512_castps_si512(x.v), _mm512_castps_si512(weight.v)))};
  }
  static Vec16 madd(Vec16 weight, const float* x, Vec16 sum) { return madd(weight, Vec16::broadcast(x), sum); }
};

template <class Y_>
struct ByteWords {
  using Sums = ByteSums;
  using X = uint8_t;
  using Y = Y_;
  static constexpr int kDepth = 4;
};

}  // namespace

namespace sparsekd {
extern const Int8Kernels kAvx512VnniKernels = {.depth = ByteWords<float>::kDepth,
                                               .conv2d_float = conv2d_forward<ByteWords<float>>,
                                               .conv2d_byte = conv2d_forward<ByteWords<uint8_t>>,
                                               .burst = madd_burst<ByteSums, 4>};
}
