// The kernels for AVX-512 F, VL, BW and DQ: the algorithms below compiled over this Vec16.
#include "simd/vec_avx512.h"

#include "attention_impl.h"
#include "conv2d_impl.h"

namespace sparsekd {
extern const KernelTable kAvx512Kernels = {Vec16::kIsa,        conv2d_forward, conv2d_grad_input,
                                           conv2d_grad_values, kAttention,     fma_burst};
}
