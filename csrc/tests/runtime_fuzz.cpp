// Hostile files: changes a good file at random and opens, describes and runs what comes out, for so many seconds. Under
// address and undefined-behaviour sanitizers; every answer and every error is fine, everything else is not.
//
//     runtime_fuzz network.skd SECONDS FOLDER
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "../runtime/sparsekd.h"

namespace {

std::vector<char> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// Mostly the header, mostly by characters that leave it JSON.
std::vector<char> changed(std::vector<char> data, std::mt19937& random) {
  uint64_t length = 0;
  std::memcpy(&length, data.data(), sizeof length);
  const auto below = [&](size_t n) { return n == 0 ? size_t{0} : random() % n; };
  for (size_t i = below(4) + 1; i > 0 && data.size() > 8; --i) {
    const size_t place = below(below(5) ? std::min<size_t>(length + 8, data.size()) : data.size());
    constexpr std::string_view kText = "0123456789-[]{},\"e.";
    switch (below(8)) {
      case 0:
        data.erase(data.begin() + static_cast<int64_t>(place),
                   data.begin() + static_cast<int64_t>(std::min(place + 1 + below(9), data.size())));
        break;
      case 1:
        data.resize(place);
        break;
      case 2:
        data[place] = static_cast<char>(random());
        break;
      default:
        data[place] = kText[below(kText.size())];
    }
  }
  return data;
}

// Whether the file was opened.
bool run(const std::string& path) {
  sparsekd_session* session = nullptr;
  if (sparsekd_open(path.c_str(), 1, &session) != SPARSEKD_OK) return false;
  constexpr int64_t kBatch = 2;
  constexpr size_t kMost = 1 << 24;         // bytes of a tensor that is worth the time
  std::vector<std::vector<double>> memory;  // aligned for every type
  std::vector<sparsekd_buffer> inputs, outputs;
  bool fits = true;
  const auto add = [&](const sparsekd_tensor& tensor, std::vector<sparsekd_buffer>& buffers) {
    const size_t bytes = sparsekd_bytes(&tensor, kBatch);
    fits &= bytes < kMost;
    memory.emplace_back(fits ? bytes / sizeof(double) + 1 : 1, 0.0);
    buffers.push_back({memory.back().data(), bytes});
  };
  sparsekd_tensor tensor;
  for (int i = 0; i < sparsekd_input_count(session); ++i)
    if (sparsekd_input(session, i, &tensor) == SPARSEKD_OK) add(tensor, inputs);
  for (int i = 0; i < sparsekd_output_count(session); ++i)
    if (sparsekd_output(session, i, &tensor) == SPARSEKD_OK) add(tensor, outputs);
  if (fits) sparsekd_run(session, kBatch, inputs.data(), outputs.data());
  sparsekd_close(session);
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return std::fprintf(stderr, "expected a file, seconds and a folder\n"), 2;
  const std::vector<char> good = read(argv[1]);
  const std::string path = std::string(argv[3]) + "/changed.skd";
  if (good.size() < 8 || !run(argv[1])) return std::fprintf(stderr, "%s: %s\n", argv[1], sparsekd_error()), 1;
  std::mt19937 random(0);
  int64_t turns = 0, opened = 0;
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(std::atof(argv[2]));
  for (; std::chrono::steady_clock::now() < end; ++turns) {
    const std::vector<char> data = changed(good, random);
    std::ofstream(path, std::ios::binary).write(data.data(), static_cast<int64_t>(data.size()));
    opened += run(path);
  }
  std::printf("%lld changed files, %lld opened\n", static_cast<long long>(turns), static_cast<long long>(opened));
  return turns > 100 && opened < turns ? 0 : 1;
}
