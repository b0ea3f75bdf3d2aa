// The kernels for NEON on aarch64.
#include "simd/vec_neon.h"

#include "kernels_impl.h"

namespace sparsekd {
extern const KernelTable kNeonKernels = kKernels;
}
