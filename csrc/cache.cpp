#include "cache.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__linux__)
#include <fstream>
#include <string>
#endif

namespace sparsekd {

namespace {

constexpr int64_t kAssumed = 32 * 1024;                // what most CPUs have
constexpr int64_t kLeast = 4 * 1024, kMost = 1 << 20;  // anything else was misread

#if defined(__x86_64__)
constexpr const char* kSource = "cpuid";

// Intel's leaf 4 and AMD's 0x8000001D describe one cache for each subleaf, in the same registers.
int64_t listed_bytes(unsigned leaf) {
  constexpr unsigned kData = 1, kUnified = 3, kSubleaves = 16;
  for (unsigned subleaf = 0; subleaf < kSubleaves; ++subleaf) {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (__get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx) == 0) return 0;
    const unsigned type = eax & 31, level = eax >> 5 & 7;
    if (type == 0) return 0;
    if (level != 1 || (type != kData && type != kUnified)) continue;
    const int64_t ways = (ebx >> 22) + 1, partitions = (ebx >> 12 & 1023) + 1, line = (ebx & 4095) + 1;
    return ways * partitions * line * (static_cast<int64_t>(ecx) + 1);
  }
  return 0;
}

int64_t asked() {
  constexpr unsigned kTopology = 1u << 22;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid(0x80000001, &eax, &ebx, &ecx, &edx) != 0 && (ecx & kTopology) != 0) return listed_bytes(0x8000001d);
  return listed_bytes(4);
}
#elif defined(__APPLE__)
constexpr const char* kSource = "sysctl";

int64_t asked() {
  int64_t bytes = 0;
  size_t size = sizeof bytes;
  return sysctlbyname("hw.l1dcachesize", &bytes, &size, nullptr, 0) == 0 ? bytes : 0;
}
#elif defined(__linux__)
constexpr const char* kSource = "sysfs";  // sysconf knows the size on x86 alone

int64_t asked() {
  for (int index = 0;; ++index) {
    const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index);
    std::string type;
    int level = 0;
    int64_t kibibytes = 0;
    if (!(std::ifstream(folder + "/type") >> type)) return 0;
    if (!(std::ifstream(folder + "/level") >> level) || level != 1 || type == "Instruction") continue;
    return std::ifstream(folder + "/size") >> kibibytes ? 1024 * kibibytes : 0;  // "32K"
  }
}
#else
constexpr const char* kSource = "assumed";

int64_t asked() { return kAssumed; }
#endif

}  // namespace

const DataCache& l1_data_cache() {
  static const DataCache cache = [] {
    const int64_t bytes = asked();
    return bytes < kLeast || bytes > kMost ? DataCache{kAssumed, "assumed"} : DataCache{bytes, kSource};
  }();
  return cache;
}

int64_t tile_floats(int64_t cache_bytes) { return cache_bytes * 3 / 4 / static_cast<int64_t>(sizeof(float)); }

}  // namespace sparsekd
