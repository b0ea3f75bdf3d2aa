#include "file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <vector>

namespace sparsekd {

Mapping::Mapping(const std::string& path) {
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) throw FileError(path + ": " + std::strerror(errno), errno);
  struct stat about{};
  int code = ::fstat(file, &about) != 0 ? errno : S_ISREG(about.st_mode) ? 0 : S_ISDIR(about.st_mode) ? EISDIR : EINVAL;
  if (code == 0 && about.st_size > 0) {
    size_ = about.st_size;
    void* const data = ::mmap(nullptr, static_cast<size_t>(size_), PROT_READ, MAP_PRIVATE, file, 0);
    if (data == MAP_FAILED)
      code = errno;
    else
      data_ = static_cast<const char*>(data);
  }
  ::close(file);
  if (code != 0) throw FileError(path + ": " + (code == EINVAL ? "no regular file" : std::strerror(code)), code);
}

Mapping::~Mapping() {
  if (data_ != nullptr) ::munmap(const_cast<char*>(data_), static_cast<size_t>(size_));
}

namespace {

constexpr int64_t kMostHeader = 100'000'000;  // as the reference implementation has it

// Null for a type that no network has: the file may be that of another program, which is said first.
const DType* stored_dtype(const std::string& name) {
  static const std::map<std::string, DType> known = {{"F32", DType::kFloat32}, {"BF16", DType::kBfloat16},
                                                     {"I8", DType::kInt8},     {"U8", DType::kUint8},
                                                     {"I32", DType::kInt32},   {"I64", DType::kInt64}};
  const auto found = known.find(name);
  return found == known.end() ? nullptr : &found->second;
}

struct Piece {
  int64_t begin, end;
};

// The pieces have to cover the data without gaps and overlaps, so that no byte can mean two things.
void check_pieces(std::vector<Piece> pieces, int64_t size) {
  std::sort(pieces.begin(), pieces.end(),
            [](const Piece& a, const Piece& b) { return std::pair(a.begin, a.end) < std::pair(b.begin, b.end); });
  int64_t at = 0;
  for (const Piece& piece : pieces) {
    if (piece.begin != at) throw FormatError("its tensors overlap or leave gaps");
    at = piece.end;
  }
  if (at != size)
    throw FormatError("its tensors take " + std::to_string(at) + " bytes, and there are " + std::to_string(size) +
                      "; it was cut short, or something was added");
}

}  // namespace

TensorFile read_tensors(const std::string& path) {
  TensorFile file;
  file.mapping = std::make_shared<Mapping>(path);
  const Mapping& bytes = *file.mapping;
  if (bytes.size() < 8)
    throw FormatError("it was cut short: it has " + std::to_string(bytes.size()) + " bytes and no header");
  uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | static_cast<unsigned char>(bytes.data()[i]);
  if (length > kMostHeader || static_cast<int64_t>(length) > bytes.size() - 8)
    throw FormatError("it is no safetensors file, or was cut short in its header");
  const int64_t begin = 8 + static_cast<int64_t>(length), size = bytes.size() - begin;
  const Json header = Json::parse({bytes.data() + 8, static_cast<size_t>(length)});
  std::vector<Piece> pieces;
  for (const auto& [name, entry] : header.object()) {
    if (name == "__metadata__") {
      for (const auto& [key, value] : entry.object()) file.metadata[key] = value.string();
      continue;
    }
    const auto& offsets = entry.at("data_offsets").array();
    if (offsets.size() != 2) throw FormatError("the tensor " + name + " has no two offsets");
    const Piece piece{offsets[0].integer(0, INT64_MAX), offsets[1].integer(0, INT64_MAX)};
    if (std::max(piece.begin, piece.end) > size)
      throw FormatError("it was cut short, or is damaged: its tensor '" + name + "' ends at byte " +
                        std::to_string(std::max(piece.begin, piece.end)) + " of " + std::to_string(size));
    pieces.push_back(piece);
    const DType* const dtype = stored_dtype(entry.at("dtype").string());
    if (dtype == nullptr) continue;
    const StoredTensor tensor{*dtype, read_shape(entry.at("shape")), bytes.data() + begin + piece.begin};
    if (tensor.shape.batched() || piece.end - piece.begin != tensor.bytes())
      throw FormatError("the tensor " + name + " has other bytes than its shape " + to_string(tensor.shape) + " needs");
    file.tensors.emplace(name, tensor);
  }
  check_pieces(std::move(pieces), size);
  return file;
}

}  // namespace sparsekd
