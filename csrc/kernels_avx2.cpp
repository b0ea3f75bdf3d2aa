// The kernels for AVX2 and FMA: the algorithms below compiled over this Vec16.
#include "simd/vec_avx2.h"

#include "attention_impl.h"
#include "conv2d_impl.h"

namespace sparsekd {
extern const KernelTable kAvx2Kernels = {Vec16::kIsa,        conv2d_forward, conv2d_grad_input,
                                         conv2d_grad_values, kAttention,     fma_burst};
}
