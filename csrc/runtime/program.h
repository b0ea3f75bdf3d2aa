// What a session runs: steps over operands, and where in memory those lie.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "graph.h"

namespace sparsekd {

// One run: the batch, threads, and the address of every operand.
struct Frame {
  int64_t n;
  int threads;
  char* const* at;

  template <class T>
  T* address(int operand) const {
    return reinterpret_cast<T*>(at[operand]);
  }
};

using Step = std::function<void(const Frame&)>;

// A tensor as steps see it; maps (of four dimensions) may lie channels_last. Operands that reinterpret the same memory
// have one storage.
struct Operand {
  DType dtype;
  Shape shape;
  bool last;
  int storage;
};

struct Storage {
  enum class Kind { kInput, kOutput, kConstant, kBuffer };
  Kind kind;
  int64_t number = 0;              // of the input or output
  const char* constant = nullptr;  // address of a constant
  int64_t bytes = 0;               // of one sample where it is batched
  bool batched = false;
  int64_t offset = 0;         // in the buffer: times the batch where it is batched
  int first = -1, last = -1;  // steps that make it, and read it last
};

struct Program {
  std::vector<Operand> operands;
  std::vector<Storage> storages;
  std::vector<Step> steps;
  std::vector<int> inputs, outputs;     // operands
  int64_t batched_bytes, fixed_bytes;   // of the buffer
  bool sliceable;                       // samples do not mix, so that any number may go through at once
  std::shared_ptr<const Mapping> keep;  // what constants lie in
};

// Checks every node against what its kernel takes, and lays out memory. Throws FormatError that names the node.
Program compile(const Graph& graph, const TensorFile& file);

}  // namespace sparsekd
