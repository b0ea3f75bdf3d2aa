#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#ifdef _OPENMP
#include <dlfcn.h>
#include <omp.h>
#endif

namespace sparsekd {

namespace {

#ifdef SPARSEKD_X86
const KernelTable& avx512_vnni() {
  static const KernelTable table = [] {
    KernelTable table = kAvx512Kernels;
    table.isa = "avx512_vnni";
    table.int8 = kAvx512VnniKernels;
    return table;
  }();
  return table;
}

const KernelTable& avx512_bf16() {
  static const KernelTable table = [] {
    KernelTable table = avx512_vnni();
    table.isa = "avx512_bf16";
    table.bf16 = kAvx512Bf16Kernels;
    return table;
  }();
  return table;
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
