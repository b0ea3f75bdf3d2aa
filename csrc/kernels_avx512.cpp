// The kernels for AVX-512 F, VL, BW and DQ: the algorithms below compiled over
// this Vec16.
#include "simd/vec_avx512.h"

#include "attention_impl.h"
#include "conv2d_impl.h"
#include "int8_impl.h"

namespace sparsekd {
extern const KernelTable kAvx512Kernels = {
    Vec16::kIsa,
    conv2d_forward<FloatWords<float>>,
    conv2d_grad_input,
    conv2d_grad_values,
    depthwise,
    kAttention,
    madd_burst<FloatSums, 1>,
    {FloatWords<Bfloat16>::kDepth, conv2d_forward<FloatWords<Bfloat16>>, madd_burst<FloatSums, 1>},
    {2, conv2d_forward<ShortWords<float>>, conv2d_forward<ShortWords<uint8_t>>, madd_burst<ShortSums, 2>},
    quantize,
};
}
