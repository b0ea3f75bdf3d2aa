// How large the caches are that kernels fit their work into. Plain declarations only; kernel_table.h says why.
#pragma once

#include <cstdint>

namespace sparsekd {

struct DataCache {
  int64_t bytes;
  const char* source;  // what said so: cpuid, sysctl, sysfs, or assumed
};

// The first level's data cache of the core that the first call of a process runs on.
const DataCache& l1_data_cache();

// Floats that a register tile of single pixels may read from a first-level cache of so many bytes: three quarters, beside
// weights that stream through the rest.
int64_t tile_floats(int64_t cache_bytes);

}  // namespace sparsekd
