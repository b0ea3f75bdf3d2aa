// bf16 on vdpbf16ps: forward pass and gradients, and the pair of multiply-adds per word; the rest is AVX-512's.
#include "simd/vec_avx512.h"

#include "pair_words_impl.h"

namespace {

// Two numbers of a word times two weights, added to a float. Denormals count as zero.
struct PairSums {
  using Stored = sparsekd::Bfloat16;
  static constexpr bool kInteger = false;
  static Vec16 madd(Vec16 weight, Vec16 x, Vec16 sum) {
    return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(weight.v), reinterpret_cast<__m512bh>(x.v))};
  }
  // In assembly because GCC 12 loads the broadcast into a register first, which takes a third of the time.
  static Vec16 madd(Vec16 weight, const float* x, Vec16 sum) {
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum.v) : "v"(weight.v), "m"(*x));
    return sum;
  }
  static Vec16 join(Vec16 low, Vec16 high) {
    const __m512i bits = _mm512_castps_si512(high.v);
    return {_mm512_castsi512_ps(
        _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(_mm512_castps_si512(low.v), 16), bits))};
  }
};

}  // namespace

namespace sparsekd {
extern const Bf16Kernels kAvx512Bf16Kernels = kPairKernels<PairSums>;
}
