#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#ifdef _OPENMP
#include <dlfcn.h>
#include <omp.h>
#endif
#if defined(SPARSEKD_AARCH64) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(SPARSEKD_AARCH64) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace sparsekd {

namespace {

// A table with some faster kernels, under the name of the CPUs that have them.
KernelTable with(KernelTable table, const char* isa, const Int8Kernels& int8) {
  table.isa = isa;
  table.int8 = int8;
  return table;
}
KernelTable with(KernelTable table, const char* isa, const Bf16Kernels& bf16) {
  table.isa = isa;
  table.bf16 = bf16;
  return table;
}

#ifdef SPARSEKD_X86
const KernelTable& avx512_vnni() {
  static const KernelTable table = with(kAvx512Kernels, "avx512_vnni", kAvx512VnniKernels);
  return table;
}

const KernelTable& avx512_bf16() {
  static const KernelTable table = with(avx512_vnni(), "avx512_bf16", kAvx512Bf16Kernels);
  return table;
}
#endif

#ifdef SPARSEKD_AARCH64
const KernelTable& neon_dotprod() {
  static const KernelTable table = with(kNeonKernels, "neon_dotprod", kNeonDotprodKernels);
  return table;
}

const KernelTable& neon_bf16() {
  static const KernelTable table = with(neon_dotprod(), "neon_bf16", kNeonBf16Kernels);
  return table;
}

struct ArmFeatures {
  bool dotprod, bf16;
};

ArmFeatures arm_features() {
#if defined(__linux__)
  constexpr unsigned long kDotprod = 1ul << 20, kBf16 = 1ul << 14;  // HWCAP_ASIMDDP, HWCAP2_BF16
  return {(getauxval(AT_HWCAP) & kDotprod) != 0, (getauxval(AT_HWCAP2) & kBf16) != 0};
#elif defined(__APPLE__)
  const auto has = [](const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
  };
  return {has("hw.optional.arm.FEAT_DotProd"), has("hw.optional.arm.FEAT_BF16")};
#else
  return {false, false};
#endif
}
#endif

std::vector<const KernelTable*> available() {
  std::vector<const KernelTable*> tables;
#ifdef SPARSEKD_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq")) {
    if (__builtin_cpu_supports("avx512vnni")) {
      if (__builtin_cpu_supports("avx512bf16")) tables.push_back(&avx512_bf16());
      tables.push_back(&avx512_vnni());
    }
    tables.push_back(&kAvx512Kernels);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables.push_back(&kAvx2Kernels);
#endif
#ifdef SPARSEKD_AARCH64
  const ArmFeatures features = arm_features();
  if (features.dotprod) {
    if (features.bf16) tables.push_back(&neon_bf16());
    tables.push_back(&neon_dotprod());
  }
  tables.push_back(&kNeonKernels);  // every aarch64 CPU has NEON
#endif
  tables.push_back(&kScalarKernels);
  return tables;
}

const KernelTable& find(const std::string& name, const char* asked_by) {
  std::string offered;
  for (const KernelTable* table : available()) {
    if (name == table->isa) return *table;
    offered += (offered.empty() ? "" : ", ") + std::string(table->isa);
  }
  throw std::runtime_error(std::string(asked_by) + ": expected one of " + offered + " (what this CPU runs), got '" +
                           name + "'; unset it to use the best one");
}

std::atomic<const KernelTable*> active{nullptr};

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : available()) names.emplace_back(table->isa);
  return names;
}

const KernelTable& kernels() {
  const KernelTable* table = active.load(std::memory_order_acquire);
  if (table == nullptr) {
    const char* forced = std::getenv("SPARSEKD_CPU_ISA");
    table = forced != nullptr && *forced != '\0' ? &find(forced, "SPARSEKD_CPU_ISA") : available().front();
    active.store(table, std::memory_order_release);
  }
  return *table;
}

void use_isa(const std::string& name) { active.store(&find(name, "use_isa"), std::memory_order_release); }

std::string openmp_name() {
#ifdef _OPENMP
  Dl_info info;
  std::string path = "statically linked";
  if (dladdr(reinterpret_cast<void*>(&omp_get_max_threads), &info) != 0 && info.dli_fname) path = info.dli_fname;
  return path + " (max threads " + std::to_string(omp_get_max_threads()) + ")";
#else
  return "none: built without OpenMP, kernels have threads of their own";
#endif
}

}  // namespace sparsekd
