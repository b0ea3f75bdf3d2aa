// The int8 forward pass on sdot (Armv8.2), and the four multiply-adds it does per word; the rest is NEON's.
#include "simd/vec_neon.h"

#include "byte_words_impl.h"

namespace {

// Four neighbouring channels of one pixel times four weights, added to a 32-bit integer. Both operands are signed, so
// the inputs lose 128 on their way in, and that is their zero.
struct ByteSums {
  using Stored = void;
  static constexpr bool kInteger = true;
  static constexpr int kZero = 128;
  static Vec16 madd(Vec16 weight, Vec16 x, Vec16 sum) {
    for (int i = 0; i < 4; ++i) {
      const int8x16_t input = vreinterpretq_s8_u8(veorq_u8(vreinterpretq_u8_f32(x.v[i]), vdupq_n_u8(0x80)));
      const int32x4_t total = vreinterpretq_s32_f32(sum.v[i]);
      sum.v[i] = vreinterpretq_f32_s32(vdotq_s32(total, vreinterpretq_s8_f32(weight.v[i]), input));
    }
    return sum;
  }
  // The instruction takes one word for all lanes, which GCC 12 does not find in a broadcast.
  static Vec16 madd(Vec16 weight, const float* x, Vec16 sum) {
    const uint8x8_t bytes = vreinterpret_u8_f32(vset_lane_f32(*x, vdup_n_f32(0), 0));
    const int8x8_t input = vreinterpret_s8_u8(veor_u8(bytes, vdup_n_u8(0x80)));
    for (int i = 0; i < 4; ++i) {
      const int32x4_t total = vreinterpretq_s32_f32(sum.v[i]);
      sum.v[i] = vreinterpretq_f32_s32(vdotq_lane_s32(total, vreinterpretq_s8_f32(weight.v[i]), input, 0));
    }
    return sum;
  }
};

}  // namespace

namespace sparsekd {
extern const Int8Kernels kNeonDotprodKernels = kByteKernels<ByteSums>;
}
