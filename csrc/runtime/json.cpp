#include "json.h"

#include <charconv>
#include <cmath>
#include <cstdlib>

namespace sparsekd {

class JsonReader {
 public:
  explicit JsonReader(std::string_view text) : text_(text) {}

  Json document() {
    Json value = read(0);
    space();
    if (at_ != text_.size()) fail("text behind the end");
    return value;
  }

 private:
  static constexpr int kMostLevels = 64;

  [[noreturn]] void fail(const char* what) const {
    throw FormatError(std::string("its JSON is damaged at byte ") + std::to_string(at_) + ": " + what);
  }
  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  void space() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t' || text_[at_] == '\r'))
      ++at_;
  }
  bool take(char c) {
    if (peek() != c || at_ >= text_.size()) return false;
    ++at_;
    return true;
  }
  void word(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) fail("an unknown word");
    at_ += word.size();
  }

  Json read(int level) {
    if (level > kMostLevels) fail("nested too deep");
    space();
    Json value;
    switch (peek()) {
      case '{':
        read_object(value, level);
        break;
      case '[':
        read_array(value, level);
        break;
      case '"':
        value.kind_ = Json::Kind::kString;
        value.string_ = read_string();
        break;
      case 't':
        word("true");
        value.kind_ = Json::Kind::kBool;
        value.boolean_ = true;
        break;
      case 'f':
        word("false");
        value.kind_ = Json::Kind::kBool;
        break;
      case 'n':
        word("null");
        break;
      default:
        read_number(value);
    }
    return value;
  }

  void read_object(Json& value, int level) {
    value.kind_ = Json::Kind::kObject;
    ++at_;
    space();
    if (take('}')) return;
    do {
      space();
      if (peek() != '"') fail("expected a key");
      std::string key = read_string();
      space();
      if (!take(':')) fail("expected a colon");
      if (!value.object_.emplace(std::move(key), read(level + 1)).second) fail("a key stands there twice");
      space();
    } while (take(','));
    if (!take('}')) fail("expected } or a comma");
  }

  void read_array(Json& value, int level) {
    value.kind_ = Json::Kind::kArray;
    ++at_;
    space();
    if (take(']')) return;
    do {
      value.array_.push_back(read(level + 1));
      space();
    } while (take(','));
    if (!take(']')) fail("expected ] or a comma");
  }

  void read_number(Json& value) {
    const size_t begin = at_;
    while (at_ < text_.size() && (std::isdigit(static_cast<unsigned char>(text_[at_])) || text_[at_] == '-' ||
                                  text_[at_] == '+' || text_[at_] == '.' || text_[at_] == 'e' || text_[at_] == 'E'))
      ++at_;
    const std::string_view text = text_.substr(begin, at_ - begin);
    const char* const end = text.data() + text.size();
    if (text.empty()) fail("expected a value");
    const auto whole = std::from_chars(text.data(), end, value.integer_);
    if (whole.ec == std::errc() && whole.ptr == end) {
      value.kind_ = Json::Kind::kInteger;
      value.number_ = static_cast<double>(value.integer_);
      return;
    }
    const std::string copy(text);  // strtod wants an end
    char* stop = nullptr;
    value.number_ = std::strtod(copy.c_str(), &stop);
    if (stop != copy.c_str() + copy.size() || !std::isfinite(value.number_)) fail("no number");
    value.kind_ = Json::Kind::kNumber;
  }

  unsigned read_hex() {
    if (at_ + 4 > text_.size()) fail("a short escape");
    unsigned code = 0;
    const auto done = std::from_chars(text_.data() + at_, text_.data() + at_ + 4, code, 16);
    if (done.ptr != text_.data() + at_ + 4) fail("a wrong escape");
    at_ += 4;
    return code;
  }

  static void append_utf8(std::string& text, unsigned code) {
    if (code < 0x80) {
      text += static_cast<char>(code);
    } else if (code < 0x800) {
      text += static_cast<char>(0xc0 | code >> 6);
      text += static_cast<char>(0x80 | (code & 0x3f));
    } else if (code < 0x10000) {
      text += static_cast<char>(0xe0 | code >> 12);
      text += static_cast<char>(0x80 | (code >> 6 & 0x3f));
      text += static_cast<char>(0x80 | (code & 0x3f));
    } else {
      text += static_cast<char>(0xf0 | code >> 18);
      text += static_cast<char>(0x80 | (code >> 12 & 0x3f));
      text += static_cast<char>(0x80 | (code >> 6 & 0x3f));
      text += static_cast<char>(0x80 | (code & 0x3f));
    }
  }

  void read_escape(std::string& text) {
    const char kind = peek();
    ++at_;
    if (kind == 'u') {
      unsigned code = read_hex();
      if (code >= 0xd800 && code < 0xdc00 && text_.substr(at_, 2) == "\\u") {
        at_ += 2;
        const unsigned low = read_hex();
        if (low < 0xdc00 || low > 0xdfff) fail("half of a character");
        code = 0x10000 + (code - 0xd800) * 0x400 + (low - 0xdc00);
      }
      return append_utf8(text, code);
    }
    constexpr std::string_view kKinds = "\"\\/bfnrt", kMeanings = "\"\\/\b\f\n\r\t";
    const size_t place = kKinds.find(kind);
    if (place == std::string_view::npos) fail("an unknown escape");
    text += kMeanings[place];
  }

  std::string read_string() {
    ++at_;
    std::string text;
    for (;;) {
      if (at_ >= text_.size()) fail("a string without an end");
      const char c = text_[at_++];
      if (c == '"') return text;
      if (static_cast<unsigned char>(c) < 0x20) fail("a control character in a string");
      if (c == '\\')
        read_escape(text);
      else
        text += c;
    }
  }

  std::string_view text_;
  size_t at_ = 0;
};

Json Json::parse(std::string_view text) { return JsonReader(text).document(); }

namespace {

const char* name_of(Json::Kind kind) {
  constexpr const char* kNames[] = {"null", "true or false", "an integer", "a number", "a text", "a list", "an object"};
  return kNames[static_cast<int>(kind)];
}

void expect(bool right, const char* wanted, Json::Kind got) {
  if (!right) throw FormatError(std::string("it has ") + name_of(got) + " where " + wanted + " is expected");
}

}  // namespace

bool Json::boolean() const {
  expect(kind_ == Kind::kBool, "true or false", kind_);
  return boolean_;
}

int64_t Json::integer(int64_t low, int64_t high) const {
  expect(kind_ == Kind::kInteger, "an integer", kind_);
  if (integer_ < low || integer_ > high)
    throw FormatError("it has " + std::to_string(integer_) + " where a number from " + std::to_string(low) + " to " +
                      std::to_string(high) + " is expected");
  return integer_;
}

double Json::number() const {
  expect(kind_ == Kind::kNumber || kind_ == Kind::kInteger, "a number", kind_);
  return number_;
}

const std::string& Json::string() const {
  expect(kind_ == Kind::kString, "a text", kind_);
  return string_;
}

const std::vector<Json>& Json::array() const {
  expect(kind_ == Kind::kArray, "a list", kind_);
  return array_;
}

const Json::Object& Json::object() const {
  expect(kind_ == Kind::kObject, "an object", kind_);
  return object_;
}

const Json* Json::find(std::string_view key) const {
  const auto found = object().find(key);
  return found == object_.end() ? nullptr : &found->second;
}

const Json& Json::at(std::string_view key) const {
  const Json* found = find(key);
  if (found == nullptr) throw FormatError("it lacks the entry '" + std::string(key) + "'");
  return *found;
}

}  // namespace sparsekd
