// A network from a file, ready to run: what Python's Session and the C API stand on.
#pragma once

#include <string>
#include <vector>

#include "program.h"

namespace sparsekd {

struct TensorInfo {
  std::string name;
  DType dtype;
  Shape shape;
};

class Session {
 public:
  // threads: 1 or more. Throws FileError, and FormatError that begins with the path.
  Session(const std::string& path, int threads);

  const std::vector<TensorInfo>& inputs() const { return inputs_; }
  const std::vector<TensorInfo>& outputs() const { return outputs_; }
  int threads() const { return threads_; }
  // What a user should know, as that the file was timed on another processor; or empty.
  const std::string& note() const { return note_; }

  // The batch of which inputs have these sizes. Throws std::invalid_argument where they do not fit.
  int64_t batch_of(const std::vector<Sizes>& sizes, const std::vector<int>& ranks) const;
  // Throws std::invalid_argument where a tensor would be larger than any memory.
  void check_batch(int64_t batch) const;
  // Inputs and outputs row-major, in order, of the batch's sizes. May be called from several threads at once. Throws
  // std::out_of_range for ids that no table has, std::bad_alloc where memory does not suffice.
  void run(int64_t batch, const void* const* inputs, void* const* outputs) const;

 private:
  struct Call {
    int64_t batch;
    const void* const* inputs;
    void* const* outputs;
  };
  void run_slice(const Call& call, int64_t first, int64_t n, int threads) const;

  Program program_;
  std::vector<TensorInfo> inputs_, outputs_;
  int threads_;
  int64_t images_;
  std::string note_;
};

}  // namespace sparsekd
