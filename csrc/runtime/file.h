// A safetensors file (https://github.com/huggingface/safetensors): mapped, its header checked.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "tensor.h"

namespace sparsekd {

// A file that cannot be opened or read: `code` is that of errno.
struct FileError : std::runtime_error {
  FileError(const std::string& what, int code) : std::runtime_error(what), code(code) {}
  int code;
};

struct StoredTensor {
  DType dtype;
  Shape shape;
  const char* data;  // of no particular alignment

  int64_t bytes() const { return shape.elements() * size_of(dtype); }
};

// Bytes that stay readable while somebody holds them. Two processes that open one file share its memory.
class Mapping {
 public:
  explicit Mapping(const std::string& path);
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping();

  const char* data() const { return data_; }
  int64_t size() const { return size_; }

 private:
  const char* data_ = nullptr;
  int64_t size_ = 0;
};

struct TensorFile {
  std::shared_ptr<const Mapping> mapping;
  std::map<std::string, std::string> metadata;
  std::map<std::string, StoredTensor> tensors;
};

// Throws FileError, and FormatError for whatever is no safetensors file or has been cut short.
TensorFile read_tensors(const std::string& path);

}  // namespace sparsekd
