// What all checks share: exact answers, how far a kernel may be from them, and the settings that every kernel runs in.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "guarded.h"

// The right answer in double with the sum of its terms' magnitudes, which rounding errors scale with.
struct Exact {
  std::vector<double> value, magnitude;
  explicit Exact(int64_t size) : value(static_cast<size_t>(size)), magnitude(value) {}
  void add(int64_t i, double term) {
    value[static_cast<size_t>(i)] += term;
    magnitude[static_cast<size_t>(i)] += std::fabs(term);
  }
};

// Counts what was compared and what was wrong, and says so on stderr. `rounding` is relative to the exact value.
void compare(const std::string& what, const Exact& exact, int64_t i, double got, double rounding = 0);
int64_t compared();
int64_t failures();

struct Setting {
  bool x_last, y_last;
  int threads;
  Side side;
};

// Statistics of feature maps, matching of maps and distillation of logits, in one instruction set (attention_test.cpp).
void check_attention(const std::string& isa);
// Batch norm with a residual and ReLU (norm_relu_test.cpp).
void check_norm_relu(const std::string& isa);
// Lookups, bags, their gradients and the best of all rows, from packed tables (embedding_test.cpp).
void check_embedding(const std::string& isa);
void check_embedding_training(const std::string& isa);
