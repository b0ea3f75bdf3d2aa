// The bf16 forward pass on vdpbf16ps, and the pair of multiply-adds it does per word; the rest is AVX-512's.
#include "simd/vec_avx512.h"

#include "conv2d_forward_impl.h"
#include "madd_burst_impl.h"

namespace {

// Two neighbouring channels of one pixel times two weights, added to a float. Denormals count as zero.
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
};

struct PairWords {
  using Sums = PairSums;
  using X = sparsekd::Bfloat16;
  using Y = sparsekd::Bfloat16;
  static constexpr int kDepth = 2;
};

}  // namespace

namespace sparsekd {
extern const Bf16Kernels kAvx512Bf16Kernels = {PairWords::kDepth, conv2d_forward<PairWords>, madd_burst<PairSums, 2>};
}
