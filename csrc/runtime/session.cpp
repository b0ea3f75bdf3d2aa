#include "session.h"

#include <algorithm>
#include <new>
#include <stdexcept>

#include "../dispatch.h"
#include "../parallel_impl.h"

namespace sparsekd {

namespace {

std::vector<TensorInfo> describe(const Graph& graph, const std::vector<Port>& ports) {
  std::vector<TensorInfo> all;
  for (const Port& port : ports) {
    const Value& value = graph.values[static_cast<size_t>(port.value)];
    all.push_back({port.name, value.dtype, value.shape});
  }
  return all;
}

bool runs_here(const std::string& isa) {
  const std::vector<std::string> isas = available_isas();
  return std::find(isas.begin(), isas.end(), isa) != isas.end();
}

}  // namespace

Session::Session(const std::string& path, int threads) : threads_(threads) {
  if (threads < 1)
    throw std::invalid_argument("sparsekd.Session: threads must be 1 or more, got " + std::to_string(threads));
  try {
    const TensorFile file = read_tensors(path);
    const Graph graph = read_graph(file);
    inputs_ = describe(graph, graph.inputs);
    outputs_ = describe(graph, graph.outputs);
    images_ = graph.images;
    if (!graph.isa.empty() && graph.isa != kernels().isa)
      note_ = "timed with " + graph.isa + (runs_here(graph.isa) ? "" : ", which this processor lacks") +
              ", runs with " + kernels().isa;
    program_ = compile(graph, file);
  } catch (const FormatError& error) {
    throw FormatError("sparsekd.Session: " + path + ": " + error.what());
  }
}

int64_t Session::batch_of(const std::vector<Sizes>& sizes, const std::vector<int>& ranks) const {
  int64_t batch = -1;
  for (size_t i = 0; i < inputs_.size(); ++i) {
    const auto& [name, dtype, shape] = inputs_[i];
    bool fits = ranks[i] == shape.rank;
    for (int axis = 0; fits && axis < shape.rank; ++axis) {
      const int64_t size = sizes[i][static_cast<size_t>(axis)], want = shape.at(axis);
      if (want >= 0) {
        fits = size == want;
        continue;
      }
      fits = size % -want == 0 && (batch < 0 || batch == size / -want);
      if (fits) batch = size / -want;
    }
    if (fits) continue;
    std::string got;
    for (int axis = 0; axis < ranks[i]; ++axis)
      got += (axis ? ", " : "") + std::to_string(sizes[i][static_cast<size_t>(axis)]);
    throw std::invalid_argument("sparsekd.Session: expected '" + name + "' of shape " + to_string(shape) + ", got [" +
                                got + "]" + (batch >= 0 ? " where N is " + std::to_string(batch) : "") +
                                "; export the network again for other sizes than the batch");
  }
  if (batch < 0) batch = 1;
  check_batch(batch);
  return batch;
}

void Session::check_batch(int64_t batch) const {
  constexpr int64_t kMost = int64_t{1} << 46;  // bytes of a tensor
  for (const auto* tensors : {&inputs_, &outputs_})
    for (const TensorInfo& one : *tensors)
      if (const int64_t bytes = one.shape.elements() * size_of(one.dtype); bytes > 0 && batch > kMost / bytes)
        throw std::invalid_argument("sparsekd.Session: a batch of " + std::to_string(batch) + " is too large for '" +
                                    one.name + "' " + to_string(one.shape));
}

void Session::run_slice(const Call& call, int64_t first, int64_t n, int threads) const {
  size_t bytes = 0;
  constexpr int64_t kMost = int64_t{1} << 46;
  int64_t grown = 0;
  if (__builtin_mul_overflow(program_.batched_bytes, n, &grown) || grown > kMost - program_.fixed_bytes)
    throw std::bad_alloc();
  bytes = static_cast<size_t>(grown + program_.fixed_bytes);
  char* const buffer = static_cast<char*>(scratch(kScratchNetwork, bytes));
  char* const fixed = buffer + grown;
  thread_local std::vector<char*> at;
  at.resize(program_.operands.size());
  for (size_t i = 0; i < at.size(); ++i) {
    const Storage& storage = program_.storages[static_cast<size_t>(program_.operands[i].storage)];
    const int64_t skip = storage.batched ? storage.bytes * first : 0;
    switch (storage.kind) {
      case Storage::Kind::kInput:
        at[i] = static_cast<char*>(const_cast<void*>(call.inputs[storage.number])) + skip;
        break;
      case Storage::Kind::kOutput:
        at[i] = static_cast<char*>(call.outputs[storage.number]) + skip;
        break;
      case Storage::Kind::kConstant:
        at[i] = const_cast<char*>(storage.constant);
        break;
      case Storage::Kind::kBuffer:
        at[i] = storage.batched ? buffer + storage.offset * n : fixed + storage.offset;
    }
  }
  const Frame frame{n, threads, at.data()};
  for (const Step& step : program_.steps) step(frame);
}

void Session::run(int64_t batch, const void* const* inputs, void* const* outputs) const {
  if (batch < 1) return;  // outputs are empty
  const NetworkLoops loops(threads_);
  const Call call{batch, inputs, outputs};
  const bool slices = program_.sliceable && images_ > 0 && batch > images_;
  const int64_t count = slices ? (batch + images_ - 1) / images_ : 1;
  const auto run = [&](int64_t slice, int threads) {
    const int64_t first = batch * slice / count, end = batch * (slice + 1) / count;
    run_slice(call, first, end - first, threads);
  };
  // As Network::run: while there is a slice for every thread each takes one alone, the rest is shared by all.
  const int64_t alone = threads_ > 1 ? count - count % threads_ : count;
  parallel(threads_, alone, [&](int64_t slice) { run(slice, threads_ > 1 ? 1 : threads_); });
  for (int64_t slice = alone; slice < count; ++slice) run(slice, threads_);
}

}  // namespace sparsekd
