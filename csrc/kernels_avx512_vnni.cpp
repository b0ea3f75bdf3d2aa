// The int8 forward pass on vpdpbusd, and the four multiply-adds it does per word; the rest is AVX-512's.
#include "simd/vec_avx512.h"

#include "byte_words_impl.h"

namespace {

// Four neighbouring channels of one pixel, unsigned, times four signed weights, added to a 32-bit integer. Memory could
// be broadcast into the signed operand for nothing, but then the weights would have to be the unsigned one, and every
// pixel's sum of inputs be subtracted again.
struct ByteSums {
  using Stored = void;
  static constexpr bool kInteger = true;
  static constexpr int kZero = 0;
  static Vec16 madd(Vec16 weight, Vec16 x, Vec16 sum) {
    return {_mm512_castsi512_ps(
        _mm512_dpbusd_epi32(_mm512_castps_si512(sum.v), _mm512_castps_si512(x.v), _mm512_castps_si512(weight.v)))};
  }
  static Vec16 madd(Vec16 weight, const float* x, Vec16 sum) { return madd(weight, Vec16::broadcast(x), sum); }
};

}  // namespace

namespace sparsekd {
extern const Int8Kernels kAvx512VnniKernels = kByteKernels<ByteSums>;
}
