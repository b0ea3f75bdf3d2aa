// The kernels of gather_gemm_impl.h for a GPU: cp.async into a ring of stages, ldmatrix, mma.sync with float32 sums.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "gather_gemm_impl.h"

namespace {

struct Float16 {
  __device__ static float widen(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
  __device__ static uint16_t narrow(float x) { return __half_as_ushort(__float2half_rn(x)); }
  __device__ static void multiply_add(float* c, const uint32_t* a, const uint32_t* b) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};

struct BFloat16 {
  __device__ static float widen(uint16_t bits) { return __bfloat162float(__ushort_as_bfloat16(bits)); }
  __device__ static uint16_t narrow(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
  __device__ static void multiply_add(float* c, const uint32_t* a, const uint32_t* b) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};

// Each thread is itself: what the emulation keeps for all of them is here one thread's registers.
template <class Type>
struct DeviceBlock {
  template <class V, int N>
  struct Registers {
    V own[N] = {};
    __device__ V* of(int) { return own; }
  };
  template <class V>
  struct PerThread {
    V own;
    __device__ V& operator[](int) { return own; }
  };
  template <class V>
  using PerWarp = PerThread<V>;

  char* shared;
  uint32_t address;  // of `shared`, as PTX wants it

  template <class F>
  __device__ void each_thread(F run) {
    run(static_cast<int>(threadIdx.x));
  }
  template <class F>
  __device__ void each_warp(F run) {
    run(static_cast<int>(threadIdx.x) / 32);
  }
  __device__ void sync() { __syncthreads(); }

  // 16 bytes, or as many zeros.
  __device__ void copy16(int place, const uint16_t* from, bool wanted) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address + place), "l"(from),
                 "r"(wanted ? 16 : 0));
  }
  __device__ void commit(int) { asm volatile("cp.async.commit_group;"); }
  template <int N>
  __device__ void wait_for_all_but() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
  }

  template <int N, class F>
  __device__ void load_matrices(Registers<uint32_t, N>& to, int at, F place) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to.own[at]), "=r"(to.own[at + 1]), "=r"(to.own[at + 2]), "=r"(to.own[at + 3])
                 : "r"(address + place(static_cast<int>(threadIdx.x) % 32))
                 : "memory");
  }
  template <int C, int B>
  __device__ void multiply_add(Registers<float, C>& sums, int c, const Registers<uint32_t, 4>& x,
                               const Registers<uint32_t, B>& w, int b) {
    Type::multiply_add(sums.own + c, x.own, w.own + b);
  }
};

template <class T, class Type>
__device__ void run(const GatherGemm& g) {
  extern __shared__ __align__(128) char shared[];
  DeviceBlock<Type> block{shared, static_cast<uint32_t>(__cvta_generic_to_shared(shared))};
  gather_gemm<T, Type>(block, g, static_cast<int>(blockIdx.x));
}

}  // namespace

#define SPARSEKD_KERNEL(name, Type, BM, BN, BK, M, N, S)                                                      \
  extern "C" __global__ void __launch_bounds__(32 * M * N, 2) name##_##BM##x##BN##x##BK(const GatherGemm g) { \
    run<Tile<BM, BN, BK, M, N, S>, Type>(g);                                                                  \
  }
#define SPARSEKD_BOTH(...)                                   \
  SPARSEKD_KERNEL(gather_gemm_float16, Float16, __VA_ARGS__) \
  SPARSEKD_KERNEL(gather_gemm_bfloat16, BFloat16, __VA_ARGS__)
SPARSEKD_TILES(SPARSEKD_BOTH, 16)
SPARSEKD_TILES(SPARSEKD_BOTH, 32)
#undef SPARSEKD_BOTH
#undef SPARSEKD_KERNEL
