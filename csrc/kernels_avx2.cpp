// The kernels for AVX2 and FMA.
#include "simd/vec_avx2.h"

#include "kernels_impl.h"

namespace sparsekd {
extern const KernelTable kAvx2Kernels = kKernels;
}
