// The kernels for any CPU.
#include "simd/vec_scalar.h"

#include "kernels_impl.h"

namespace sparsekd {
extern const KernelTable kScalarKernels = kKernels;
}
