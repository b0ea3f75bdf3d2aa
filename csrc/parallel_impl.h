// Loops over threads whose body is a closure.
#pragma once

#include "parallel.h"

namespace {

// parallel_for with a closure body(item, first).
template <class Body>
inline void parallel_workers(int threads, int64_t items, const Body& body) {
  sparsekd::parallel_for(
      threads, items,
      [](void* context, int64_t item, bool first) { (*static_cast<const Body*>(context))(item, first); },
      const_cast<Body*>(&body));
}

template <class Body>
inline void parallel(int threads, int64_t items, const Body& body) {
  parallel_workers(threads, items, [&](int64_t item, bool) { body(item); });
}

}  // namespace
