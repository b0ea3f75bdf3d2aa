#include "problems.h"

#include <fstream>
#include <sstream>
#include <stdexcept>

namespace sparsekd {

std::vector<Problem> read_problems() {
  std::ifstream file(SPARSEKD_CASES);
  std::vector<Problem> problems;
  for (std::string line; std::getline(file, line);) {
    if (line[0] == '#') continue;
    Problem l;
    std::string suites;
    std::istringstream words(line);
    words >> l.name >> suites >> l.n >> l.c >> l.h >> l.w >> l.k >> l.r >> l.s >> l.stride_h >> l.stride_w >> l.pad_h >>
        l.pad_w >> l.dilation_h >> l.dilation_w >> l.groups >> l.bh >> l.bw >> l.density;
    if (!words) throw std::runtime_error(std::string(SPARSEKD_CASES) + ": not a case: " + line);
    if (("," + suites + ",").find(",kernels,") != std::string::npos) problems.push_back(l);
  }
  if (problems.empty()) throw std::runtime_error(std::string(SPARSEKD_CASES) + ": no cases of the suite \"kernels\"");
  return problems;
}

}  // namespace sparsekd
