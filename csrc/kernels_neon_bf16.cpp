// bf16 on bfdot (Armv8.6): forward pass and gradients, and the pair of multiply-adds per word; the rest is NEON's.
#include "simd/vec_neon.h"

#include "pair_words_impl.h"

namespace {

// Two numbers of a word times two weights, added to a float. Denormals count as zero, and a sum is rounded to odd.
struct PairSums {
  using Stored = sparsekd::Bfloat16;
  static constexpr bool kInteger = false;
  static Vec16 madd(Vec16 weight, Vec16 x, Vec16 sum) {
    for (int i = 0; i < 4; ++i)
      sum.v[i] = vbfdotq_f32(sum.v[i], vreinterpretq_bf16_f32(weight.v[i]), vreinterpretq_bf16_f32(x.v[i]));
    return sum;
  }
  // The instruction takes one pair for all lanes, which GCC 12 does not find in a broadcast.
  static Vec16 madd(Vec16 weight, const float* x, Vec16 sum) {
    const bfloat16x4_t pair = vreinterpret_bf16_f32(vset_lane_f32(*x, vdup_n_f32(0), 0));
    for (int i = 0; i < 4; ++i) sum.v[i] = vbfdotq_lane_f32(sum.v[i], vreinterpretq_bf16_f32(weight.v[i]), pair, 0);
    return sum;
  }
  static Vec16 join(Vec16 low, Vec16 high) {
    for (int i = 0; i < 4; ++i) {
      const uint32x4_t first = vshrq_n_u32(vreinterpretq_u32_f32(low.v[i]), 16);
      low.v[i] = vreinterpretq_f32_u32(vbslq_u32(vdupq_n_u32(0xffff0000u), vreinterpretq_u32_f32(high.v[i]), first));
    }
    return low;
  }
};

}  // namespace

namespace sparsekd {
extern const Bf16Kernels kNeonBf16Kernels = kPairKernels<PairSums>;
}
