#include "check.h"

#include <cstdio>

namespace {

int64_t compared_count = 0, failure_count = 0;

}  // namespace

void compare(const std::string& what, const Exact& exact, int64_t i, double got, double rounding) {
  const double want = exact.value[static_cast<size_t>(i)];
  ++compared_count;
  const double allowed = 4e-6 * exact.magnitude[static_cast<size_t>(i)] + rounding * std::fabs(want);
  if (std::fabs(got - want) <= allowed) return;  // false for NaN
  if (++failure_count <= 20)
    fprintf(stderr, "%s: element %ld: expected %.9g, got %.9g\n", what.c_str(), static_cast<long>(i), want, got);
}

int64_t compared() { return compared_count; }
int64_t failures() { return failure_count; }
