#include <new>
#include <stdexcept>

#include "../dispatch.h"
#include "session.h"
#include "sparsekd.h"

struct sparsekd_session {
  sparsekd::Session session;
};

namespace {

using sparsekd::Session;
using sparsekd::TensorInfo;

static_assert(SPARSEKD_MAX_RANK == sparsekd::kMaxRank);
static_assert(SPARSEKD_INT64 == static_cast<int>(sparsekd::DType::kInt64));

thread_local std::string last_error;

int failed(sparsekd_status status, const char* what) {
  try {
    last_error = what;
  } catch (...) {  // no memory for the text either
    last_error.clear();
  }
  return status;
}

// What the body does, with every exception as a status.
template <class Body>
int guarded(const Body& body) {
  try {
    body();
    return SPARSEKD_OK;
  } catch (const sparsekd::FileError& error) {
    return failed(SPARSEKD_FILE, error.what());
  } catch (const sparsekd::FormatError& error) {
    return failed(SPARSEKD_FORMAT, error.what());
  } catch (const std::invalid_argument& error) {
    return failed(SPARSEKD_ARGUMENT, error.what());
  } catch (const std::out_of_range& error) {
    return failed(SPARSEKD_ARGUMENT, error.what());
  } catch (const std::length_error& error) {
    return failed(SPARSEKD_MEMORY, error.what());
  } catch (const std::bad_alloc&) {
    return failed(SPARSEKD_MEMORY, "sparsekd: not enough memory");
  } catch (const std::exception& error) {
    return failed(SPARSEKD_INTERNAL, error.what());
  } catch (...) {
    return failed(SPARSEKD_INTERNAL, "sparsekd: an unknown error");
  }
}

void expect(bool right, const std::string& message) {
  if (!right) throw std::invalid_argument("sparsekd: " + message);
}

size_t bytes_of(sparsekd::DType dtype, const sparsekd::Shape& shape, int64_t batch) {
  int64_t bytes = shape.elements() * sparsekd::size_of(dtype);
  if (batch < 0 || (shape.batched() && __builtin_mul_overflow(bytes, batch, &bytes))) return 0;
  return static_cast<size_t>(bytes);
}

int describe(const std::vector<TensorInfo>& tensors, int index, sparsekd_tensor* tensor) {
  return guarded([&] {
    expect(tensor != nullptr, "the tensor to fill in is null");
    expect(index >= 0 && static_cast<size_t>(index) < tensors.size(),
           "expected an index below " + std::to_string(tensors.size()) + ", got " + std::to_string(index));
    const TensorInfo& info = tensors[static_cast<size_t>(index)];
    *tensor = {info.name.c_str(), static_cast<sparsekd_dtype>(info.dtype), info.shape.rank, {}};
    for (int axis = 0; axis < info.shape.rank; ++axis) tensor->shape[axis] = info.shape.at(axis);
  });
}

void check_buffers(const std::vector<TensorInfo>& tensors, const sparsekd_buffer* buffers, int64_t batch) {
  expect(buffers != nullptr, "the buffers are null");
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto& [name, dtype, shape] = tensors[i];
    const size_t want = bytes_of(dtype, shape, batch);
    expect(buffers[i].bytes == want, "expected " + std::to_string(want) + " bytes for '" + name + "' " +
                                         to_string(shape) + " at a batch of " + std::to_string(batch) + ", got " +
                                         std::to_string(buffers[i].bytes));
    expect(want == 0 || buffers[i].data != nullptr, "the buffer of '" + name + "' is null");
    expect(
        reinterpret_cast<std::uintptr_t>(buffers[i].data) % static_cast<std::uintptr_t>(sparsekd::size_of(dtype)) == 0,
        "the buffer of '" + name + "' is not aligned to its elements");
  }
}

}  // namespace

extern "C" {

int sparsekd_open(const char* path, int threads, sparsekd_session** session) {
  return guarded([&] {
    expect(session != nullptr, "the place for the session is null");
    *session = nullptr;
    expect(path != nullptr, "the path is null");
    *session = new sparsekd_session{Session(path, threads)};
  });
}

void sparsekd_close(sparsekd_session* session) { delete session; }

int sparsekd_input_count(const sparsekd_session* session) {
  return session == nullptr ? 0 : static_cast<int>(session->session.inputs().size());
}

int sparsekd_output_count(const sparsekd_session* session) {
  return session == nullptr ? 0 : static_cast<int>(session->session.outputs().size());
}

int sparsekd_input(const sparsekd_session* session, int index, sparsekd_tensor* tensor) {
  if (session == nullptr) return failed(SPARSEKD_ARGUMENT, "sparsekd: the session is null");
  return describe(session->session.inputs(), index, tensor);
}

int sparsekd_output(const sparsekd_session* session, int index, sparsekd_tensor* tensor) {
  if (session == nullptr) return failed(SPARSEKD_ARGUMENT, "sparsekd: the session is null");
  return describe(session->session.outputs(), index, tensor);
}

size_t sparsekd_bytes(const sparsekd_tensor* tensor, int64_t batch) {
  if (tensor == nullptr || tensor->rank < 0 || tensor->rank > SPARSEKD_MAX_RANK) return 0;
  sparsekd::Shape shape;
  shape.rank = tensor->rank;
  for (int axis = 0; axis < shape.rank; ++axis) shape.dims[static_cast<size_t>(axis)] = tensor->shape[axis];
  return bytes_of(static_cast<sparsekd::DType>(tensor->dtype), shape, batch);
}

int sparsekd_run(const sparsekd_session* session, int64_t batch, const sparsekd_buffer* inputs,
                 const sparsekd_buffer* outputs) {
  return guarded([&] {
    expect(session != nullptr, "the session is null");
    expect(batch >= 0, "expected a batch of 0 or more, got " + std::to_string(batch));
    const Session& network = session->session;
    network.check_batch(batch);
    check_buffers(network.inputs(), inputs, batch);
    check_buffers(network.outputs(), outputs, batch);
    std::vector<const void*> from;
    std::vector<void*> to;
    for (size_t i = 0; i < network.inputs().size(); ++i) from.push_back(inputs[i].data);
    for (size_t i = 0; i < network.outputs().size(); ++i) to.push_back(outputs[i].data);
    network.run(batch, from.data(), to.data());
  });
}

const char* sparsekd_error(void) { return last_error.c_str(); }

const char* sparsekd_note(const sparsekd_session* session) {
  return session == nullptr ? "" : session->session.note().c_str();
}

const char* sparsekd_isa(void) {
  try {
    return sparsekd::kernels().isa;
  } catch (const std::exception& error) {
    failed(SPARSEKD_ARGUMENT, error.what());
    return "";
  }
}

}  // extern "C"
