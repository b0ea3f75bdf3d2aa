#include "compiler.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <utility>

#include "moves.h"
#include "ops.h"

namespace sparsekd {

namespace {

constexpr int64_t kLine = 64;
int64_t round_up(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

struct Room {
  int64_t begin, end;
};

// Begin of the first room of this size between those taken.
int64_t gap(std::vector<Room> taken, int64_t size) {
  std::sort(taken.begin(), taken.end(), [](const Room& a, const Room& b) { return a.begin < b.begin; });
  int64_t begin = 0;
  for (const Room& room : taken) {
    if (room.begin - begin >= size) break;
    begin = std::max(begin, room.end);
  }
  return begin;
}

}  // namespace

Compiler::Compiler(const Graph& graph, const TensorFile& file)
    : graph_(graph), file_(file), operand_of_(graph.values.size(), -1) {
  program_.sliceable = true;
  int64_t number = 0;
  for (const Port& port : graph.inputs) {
    const Value& value = graph.values[static_cast<size_t>(port.value)];
    program_.sliceable &= value.shape.leads();
    const int operand = add({value.dtype, value.shape, false, 0}, {.kind = Storage::Kind::kInput, .number = number++});
    program_.inputs.push_back(operand);
    operand_of_[static_cast<size_t>(port.value)] = operand;
  }
  for (size_t i = 0; i < graph.values.size(); ++i)
    if (const Value& value = graph.values[i]; value.stored != nullptr) {
      operand_of_[i] =
          add({value.dtype, value.shape, false, 0}, {.kind = Storage::Kind::kConstant, .constant = value.stored->data});
      keep_file();
    }
  for (const Node& node : graph.nodes) read_node(node);
}

void Compiler::read_node(const Node& node) {
  try {
    const OpTable& table = ops();
    const auto found = table.find(node.op);
    if (found == table.end()) throw FormatError("this version does not know it");
    found->second(*this, node);
  } catch (const std::invalid_argument& error) {  // of a kernel
    throw FormatError("the node '" + node.name + "' (" + node.op + "): " + error.what());
  } catch (const FormatError& error) {
    throw FormatError("the node '" + node.name + "' (" + node.op + "): " + error.what());
  }
}

int Compiler::add(const Operand& operand, const Storage& storage) {
  check_shape(operand.shape);
  program_.sliceable &= !operand.shape.batched() || operand.shape.leads();
  program_.operands.push_back(operand);
  program_.operands.back().storage = static_cast<int>(program_.storages.size());
  program_.storages.push_back(storage);
  Storage& one = program_.storages.back();
  one.bytes = operand.shape.elements() * size_of(operand.dtype);
  one.batched = operand.shape.batched();
  one.first = one.last = -1;
  twin_.push_back({-1, -1});
  return static_cast<int>(program_.operands.size()) - 1;
}

int Compiler::fresh(DType dtype, const Shape& shape, bool last) {
  return add({dtype, shape, last, 0}, {.kind = Storage::Kind::kBuffer});
}

int Compiler::reinterpret(int number, const Shape& shape) {
  const Operand from = operand(number);
  check_shape(shape);
  program_.sliceable &= !shape.batched() || shape.leads();
  program_.operands.push_back({from.dtype, shape, false, from.storage});
  twin_.push_back({-1, -1});
  return static_cast<int>(program_.operands.size()) - 1;
}

int Compiler::of(int value, Layout layout) {
  const int number = operand_of_[static_cast<size_t>(value)];
  const Operand from = operand(number);
  const bool last = layout == Layout::kChannelsLast;
  if (layout == Layout::kAny || from.last == last) return number;
  if (last && from.shape.rank != 4) throw FormatError("it takes maps of four dimensions, got " + to_string(from.shape));
  int& twin = twin_[static_cast<size_t>(number)][last];
  if (twin >= 0) return twin;
  if (from.shape.at(1) == 1 || (from.shape.at(2) == 1 && from.shape.at(3) == 1)) {  // both layouts are the same
    const int same = reinterpret(number, from.shape);
    program_.operands[static_cast<size_t>(same)].last = last;
    return twin_[static_cast<size_t>(number)][last] = same;
  }
  const int copy = fresh(from.dtype, from.shape, last);
  copy_operand(*this, number, copy);
  return twin_[static_cast<size_t>(number)][last] = copy;
}

void Compiler::give(int value, int number) {
  const Value& said = graph_.values[static_cast<size_t>(value)];
  const Operand& made = operand(number);
  if (made.dtype != said.dtype || !(made.shape == said.shape))
    throw FormatError(std::string("it makes ") + name_of(made.dtype) + " " + to_string(made.shape) +
                      ", and the file says " + name_of(said.dtype) + " " + to_string(said.shape));
  operand_of_[static_cast<size_t>(value)] = number;
}

void Compiler::step(std::initializer_list<int> reads, std::initializer_list<int> writes, Step step, int overwrites) {
  this->step(std::vector<int>(reads), std::vector<int>(writes), std::move(step), overwrites);
}

void Compiler::step(const std::vector<int>& reads, const std::vector<int>& writes, Step step, int overwrites) {
  const int now = static_cast<int>(program_.steps.size());
  const auto storage = [&](int number) -> Storage& {
    return program_.storages[static_cast<size_t>(operand(number).storage)];
  };
  Use use{{}, {}, overwrites < 0 ? -1 : operand(overwrites).storage};
  for (int read : reads) {
    if (read < 0) continue;
    storage(read).last = now;
    use.reads.push_back(operand(read).storage);
  }
  for (int write : writes) {
    storage(write).first = storage(write).last = now;
    use.writes.push_back(operand(write).storage);
  }
  // Whatever an op asks for: memory that the step reads as another operand too, or as a view of it, is not overwritten,
  // since what is read at one place would be gone before it is read at another.
  if (std::count(use.reads.begin(), use.reads.end(), use.overwrites) != 1) use.overwrites = -1;
  uses_.push_back(std::move(use));
  program_.steps.push_back(std::move(step));
}

// Outputs are row-major and have memory of their own: what is one already is made there, the rest is copied.
void Compiler::end_in_outputs() {
  std::vector<bool> used(program_.storages.size());
  for (const Port& port : graph_.outputs) {
    int result = of(port.value, Layout::kRowMajor);
    const Operand made = operand(result);
    used.resize(program_.storages.size());
    const size_t storage = static_cast<size_t>(made.storage);
    if (program_.storages[storage].kind != Storage::Kind::kBuffer || used[storage]) {
      const int copy = fresh(made.dtype, made.shape);
      copy_operand(*this, result, copy);
      result = copy;
      used.resize(program_.storages.size());
    }
    program_.sliceable &= made.shape.leads();
    used[static_cast<size_t>(operand(result).storage)] = true;
    program_.outputs.push_back(result);
  }
  for (size_t i = 0; i < program_.outputs.size(); ++i) {
    Storage& storage = program_.storages[static_cast<size_t>(operand(program_.outputs[i]).storage)];
    storage.kind = Storage::Kind::kOutput;
    storage.number = static_cast<int64_t>(i);
  }
}

// Offsets of what lies in the buffer, first what grows with the batch, then the rest.
void Compiler::place() {
  for (const bool batched : {true, false}) {
    std::map<int, Room> live;
    int64_t& size = batched ? program_.batched_bytes : program_.fixed_bytes;
    for (int now = 0; now < static_cast<int>(program_.steps.size()); ++now) {
      const Use& use = uses_[static_cast<size_t>(now)];
      for (int write : use.writes) {
        Storage& storage = program_.storages[static_cast<size_t>(write)];
        if (storage.kind != Storage::Kind::kBuffer || storage.batched != batched || live.count(write)) continue;
        Room room{};
        const auto taken = use.overwrites < 0 ? live.end() : live.find(use.overwrites);
        const bool takes = taken != live.end() && program_.storages[static_cast<size_t>(use.overwrites)].last == now &&
                           program_.storages[static_cast<size_t>(use.overwrites)].bytes == storage.bytes;
        if (takes) {
          room = taken->second;
          live.erase(taken);
        } else {
          std::vector<Room> rooms;
          for (const auto& [_, one] : live) rooms.push_back(one);
          room.begin = gap(std::move(rooms), round_up(storage.bytes));
          room.end = room.begin + round_up(storage.bytes);
        }
        storage.offset = room.begin;
        size = std::max(size, room.end);
        live[write] = room;
      }
      std::erase_if(live,
                    [&](const auto& one) { return program_.storages[static_cast<size_t>(one.first)].last <= now; });
    }
  }
}

void Compiler::also_by_rows(RowLayer layer, int64_t images, int x, int residual, int y) {
  Use& use = uses_.back();
  use.row_layer = std::move(layer);
  use.images = images;
  use.x = x;
  use.residual = residual;
  use.y = y;
}

// The layers from this step on that only pass on what they make.
std::vector<RowLayer> Compiler::row_layers(size_t first) const {
  std::vector<RowLayer> layers;
  for (size_t i = first; i < uses_.size() && uses_[i].row_layer.run; ++i) {
    if (i > first) {
      const int x = operand(uses_[i - 1].y).storage;
      int64_t reads = 0;
      for (const Use& use : uses_) reads += std::count(use.reads.begin(), use.reads.end(), x);
      const bool in_buffer = program_.storages[static_cast<size_t>(x)].kind == Storage::Kind::kBuffer;
      if (uses_[i].x != uses_[i - 1].y || reads > 1 || !in_buffer || uses_[i].images != uses_[first].images) break;
    }
    layers.push_back(uses_[i].row_layer);
  }
  return layers;
}

// The last step of a chain does what all of them did, one after the other where rows would not feed all threads; so
// whatever they read has to be there until then.
void Compiler::join(size_t first, std::shared_ptr<const RowChain> chain) {
  const size_t last = first + chain->size() - 1;
  std::vector<int> residuals;
  std::vector<Step> steps;  // which own the layers
  for (size_t i = first; i <= last; ++i) {
    residuals.push_back(uses_[i].residual);
    steps.push_back(std::exchange(program_.steps[i], nullptr));
    for (const int read : uses_[i].reads) {
      int& end = program_.storages[static_cast<size_t>(read)].last;
      end = std::max(end, static_cast<int>(last));
    }
    uses_[i].overwrites = -1;
  }
  const int64_t images = uses_[first].images;
  const int x = uses_[first].x, y = uses_[last].y;
  program_.steps[last] = [chain = std::move(chain), residuals = std::move(residuals), steps = std::move(steps), images,
                          x, y](const Frame& frame) {
    if (!chain->feeds(images * frame.n, frame.threads)) {
      for (const Step& step : steps) step(frame);
      return;
    }
    std::vector<const void*> rest;
    for (const int residual : residuals) rest.push_back(residual < 0 ? nullptr : frame.at[residual]);
    chain->run(images * frame.n, frame.at[x], rest.data(), frame.at[y], frame.threads);
  };
}

void Compiler::go_depth_first() {
  for (size_t first = 0; first < uses_.size();) {
    std::shared_ptr<const RowChain> chain = longest_chain(row_layers(first));
    const size_t count = chain == nullptr ? 1 : chain->size();
    if (chain != nullptr) join(first, std::move(chain));
    first += count;
  }
}

Program Compiler::finish() {
  end_in_outputs();
  go_depth_first();
  place();
  std::erase_if(program_.steps, [](const Step& step) { return !step; });
  return std::move(program_);
}

Program compile(const Graph& graph, const TensorFile& file) { return Compiler(graph, file).finish(); }

}  // namespace sparsekd
