// The kernels for NEON on aarch64: the algorithms below compiled over this Vec16.
#include "simd/vec_neon.h"

#include "attention_impl.h"
#include "conv2d_impl.h"

namespace sparsekd {
extern const KernelTable kNeonKernels = {Vec16::kIsa,        conv2d_forward, conv2d_grad_input,
                                         conv2d_grad_values, kAttention,     fma_burst};
}
