// Making a program of a graph, node by node. The functions of ops (ops.h) check a node, say what they compute, and add
// steps; memory is laid out when all are there.
#pragma once

#include <initializer_list>
#include <string>

#include "../depth_first.h"
#include "program.h"

namespace sparsekd {

enum class Layout { kAny, kRowMajor, kChannelsLast };

class Compiler {
 public:
  Compiler(const Graph& graph, const TensorFile& file);

  Program finish();

  const Graph& graph() const { return graph_; }
  const Operand& operand(int number) const { return program_.operands[static_cast<size_t>(number)]; }
  const StoredTensor& tensor(const std::string& name) const { return tensor_named(file_, name); }

  // The operand of a value, copied into another layout if it has to be.
  int of(int value, Layout layout = Layout::kAny);
  // An operand in the buffer.
  int fresh(DType dtype, const Shape& shape, bool last = false);
  // The same memory, read as another shape; row-major.
  int reinterpret(int operand, const Shape& shape);
  // What a value is, from now on. Throws where the file says otherwise.
  void give(int value, int operand);
  // overwrites: an operand whose memory the first write may take, or -1. It does so where nothing reads that memory
  // later, and the step itself reads it as this one operand alone; each number of it is read before it is written.
  void step(std::initializer_list<int> reads, std::initializer_list<int> writes, Step step, int overwrites = -1);
  void step(const std::vector<int>& reads, const std::vector<int>& writes, Step step, int overwrites = -1);
  // The step before may be done by rows as well: by `layer` on `images` images of every sample, which reads x and a
  // residual (or -1).
  void also_by_rows(RowLayer layer, int64_t images, int x, int residual, int y);
  void mixes_samples() { program_.sliceable = false; }
  // Marks that constants are read from the file itself as long as the program lives.
  void keep_file() { program_.keep = file_.mapping; }

 private:
  int add(const Operand& operand, const Storage& storage);
  void read_node(const Node& node);
  void end_in_outputs();
  void go_depth_first();
  std::vector<RowLayer> row_layers(size_t first) const;
  void join(size_t first, std::shared_ptr<const RowChain> chain);
  void place();

  struct Use {
    std::vector<int> reads, writes;
    int overwrites;
    RowLayer row_layer = {};  // the same by rows, if it can
    int64_t images = 1;
    int x = -1, residual = -1, y = -1;  // operands
  };

  const Graph& graph_;
  const TensorFile& file_;
  Program program_{};
  std::vector<int> operand_of_;           // of values
  std::vector<std::array<int, 2>> twin_;  // operand -> the same in the other layout, or -1
  std::vector<Use> uses_;                 // of steps
};

}  // namespace sparsekd
