// JSON as far as the files of networks need it. Everything that is read throws FormatError where it is something else.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace sparsekd {

// A file that is damaged, foreign, newer, or asks for what no kernel does.
struct FormatError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Json {
 public:
  enum class Kind { kNull, kBool, kInteger, kNumber, kString, kArray, kObject };
  using Object = std::map<std::string, Json, std::less<>>;

  // At most 64 levels deep; a key may stand in an object once.
  static Json parse(std::string_view text);

  Kind kind() const { return kind_; }
  bool boolean() const;
  int64_t integer(int64_t low, int64_t high) const;
  double number() const;
  const std::string& string() const;
  const std::vector<Json>& array() const;
  const Object& object() const;
  // Of an object; `find` gives null where there is no such key.
  const Json& at(std::string_view key) const;
  const Json* find(std::string_view key) const;

 private:
  friend class JsonReader;

  Kind kind_ = Kind::kNull;
  bool boolean_ = false;
  int64_t integer_ = 0;
  double number_ = 0;
  std::string string_;
  std::vector<Json> array_;
  Object object_;
};

}  // namespace sparsekd
