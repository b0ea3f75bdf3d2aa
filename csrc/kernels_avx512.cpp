// The kernels for AVX-512 F, VL, BW and DQ.
#include "simd/vec_avx512.h"

#include "kernels_impl.h"

namespace sparsekd {
extern const KernelTable kAvx512Kernels = kKernels;
}
