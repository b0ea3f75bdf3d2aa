#include "graph.h"

#include <set>

namespace sparsekd {

namespace {

constexpr int64_t kVersion = 1;
constexpr const char* kFormat = "sparsekd-network";
constexpr int64_t kMostValues = 1'000'000;

std::vector<int> read_values(const Json& list, size_t count) {
  std::vector<int> values;
  for (const Json& one : list.array())
    values.push_back(static_cast<int>(one.integer(0, static_cast<int64_t>(count) - 1)));
  return values;
}

Value read_value(const Json& entry, const TensorFile& file) {
  Value value{dtype_named(entry.at("dtype").string()), read_shape(entry.at("shape")), nullptr};
  const Json* const tensor = entry.find("tensor");
  if (tensor == nullptr) return value;
  value.stored = &tensor_named(file, tensor->string());
  if (value.stored->dtype != value.dtype || !(value.stored->shape == value.shape))
    throw FormatError("the tensor " + tensor->string() + " is not of the type and shape that its value has");
  return value;
}

std::vector<Port> read_ports(const Json& list, size_t values, const char* what) {
  std::vector<Port> ports;
  std::set<std::string> names;
  for (const Json& one : list.array()) {
    ports.push_back(
        {one.at("name").string(), static_cast<int>(one.at("value").integer(0, static_cast<int64_t>(values) - 1))});
    if (!names.insert(ports.back().name).second)
      throw FormatError(std::string("it has two ") + what + " of the name '" + ports.back().name + "'");
  }
  if (ports.empty()) throw FormatError(std::string("it has no ") + what);
  return ports;
}

// Marks what is made, and refuses what is read before.
void check_order(const Graph& graph) {
  std::vector<bool> made(graph.values.size());
  const auto make = [&](int value) {
    const size_t at = static_cast<size_t>(value);
    if (made[at] || graph.values[at].stored != nullptr)
      throw FormatError("value " + std::to_string(value) + " is made twice");
    made[at] = true;
  };
  const auto read = [&](int value) {
    const size_t at = static_cast<size_t>(value);
    if (!made[at] && graph.values[at].stored == nullptr)
      throw FormatError("value " + std::to_string(value) + " is read before it is made");
  };
  for (const Port& port : graph.inputs) make(port.value);
  for (const Node& node : graph.nodes) {
    for (int value : node.inputs) read(value);
    for (int value : node.outputs) make(value);
  }
  for (const Port& port : graph.outputs) read(port.value);
}

void read_plan(const Json& plan, Graph& graph) {
  const std::string& format = plan.at("memory_format").string();
  if (format != "contiguous" && format != "channels_last")
    throw FormatError("its memory format is '" + format + "'; known are contiguous and channels_last");
  graph.channels_last = format == "channels_last";
  graph.images = plan.at("images").integer(0, int64_t{1} << 31);
  graph.threads = plan.at("threads").integer(1, 1 << 20);
  graph.isa = plan.at("isa").string();
}

}  // namespace

const StoredTensor& tensor_named(const TensorFile& file, const std::string& name) {
  const auto found = file.tensors.find(name);
  if (found == file.tensors.end())
    throw FormatError("it lacks the tensor '" + name + "', or that is of an unknown type");
  const auto address = reinterpret_cast<std::uintptr_t>(found->second.data);
  if (address % static_cast<std::uintptr_t>(size_of(found->second.dtype)) != 0)
    throw FormatError("the tensor '" + name + "' does not lie at a multiple of its elements' size");
  return found->second;
}

Graph read_graph(const TensorFile& file) {
  const auto text = file.metadata.find("sparsekd");
  const Json all = text == file.metadata.end() ? Json() : Json::parse(text->second);
  const Json* const format = all.kind() == Json::Kind::kObject ? all.find("format") : nullptr;
  if (format == nullptr || format->kind() != Json::Kind::kString || format->string() != kFormat)
    throw FormatError("it is no exported network; FrozenModel.export and `sparsekd export` write one");
  const int64_t version = all.at("version").integer(0, INT64_MAX);
  if (version != kVersion)
    throw FormatError("it is of version " + std::to_string(version) +
                      " of the format, and this program knows version " + std::to_string(kVersion) +
                      "; install a newer sparsekd, or export it with this one");
  Graph graph;
  const auto& values = all.at("values").array();
  if (values.size() > kMostValues) throw FormatError("it has more than a million values");
  for (const Json& entry : values) graph.values.push_back(read_value(entry, file));
  graph.inputs = read_ports(all.at("inputs"), values.size(), "inputs");
  graph.outputs = read_ports(all.at("outputs"), values.size(), "outputs");
  for (const Json& entry : all.at("nodes").array()) {
    Node node{entry.at("op").string(), entry.at("name").string(), read_values(entry.at("inputs"), values.size()),
              read_values(entry.at("outputs"), values.size()), entry.at("attributes")};
    node.attributes.object();
    graph.nodes.push_back(std::move(node));
  }
  read_plan(all.at("plan"), graph);
  check_order(graph);
  return graph;
}

}  // namespace sparsekd
