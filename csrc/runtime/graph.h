// The network that a file describes (docs/file-format.md), before anything is made of it.
#pragma once

#include <vector>

#include "file.h"

namespace sparsekd {

struct Value {
  DType dtype;
  Shape shape;
  const StoredTensor* stored;  // of a constant, else null
};

struct Node {
  std::string op, name;
  std::vector<int> inputs, outputs;  // values
  Json attributes;
};

struct Port {
  std::string name;
  int value;
};

struct Graph {
  std::vector<Value> values;
  std::vector<Node> nodes;
  std::vector<Port> inputs, outputs;
  bool channels_last;  // how maps of convolutions lie
  int64_t images;      // of a larger batch, how many a thread takes through the network at a time; 0: all
  int64_t threads;     // that it was measured with
  std::string isa;     // likewise
};

// Every value is made once, and before it is read. Throws FormatError.
Graph read_graph(const TensorFile& file);

// The tensor of a name, aligned as its type wants. Throws FormatError.
const StoredTensor& tensor_named(const TensorFile& file, const std::string& name);

}  // namespace sparsekd
