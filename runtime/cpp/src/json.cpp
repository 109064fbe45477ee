#include "json.h"

#include "failure.h"

#include <charconv>
#include <cmath>
#include <limits>
#include <unordered_set>

namespace oxfuse::internal {
namespace {

constexpr int deepest = 200;

void append_utf8(std::string& out, uint32_t code) {
  if (code < 0x80) {
    out += static_cast<char>(code);
  } else if (code < 0x800) {
    out += static_cast<char>(0xC0 | code >> 6);
    out += static_cast<char>(0x80 | (code & 0x3F));
  } else if (code < 0x10000) {
    out += static_cast<char>(0xE0 | code >> 12);
    out += static_cast<char>(0x80 | (code >> 6 & 0x3F));
    out += static_cast<char>(0x80 | (code & 0x3F));
  } else {
    out += static_cast<char>(0xF0 | code >> 18);
    out += static_cast<char>(0x80 | (code >> 12 & 0x3F));
    out += static_cast<char>(0x80 | (code >> 6 & 0x3F));
    out += static_cast<char>(0x80 | (code & 0x3F));
  }
}

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Json document() {
    Json value = this->value(0);
    space();
    if (at_ != text_.size()) {
      fail("more follows the value");
    }
    return value;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const { throw JsonError(what + " at byte " + std::to_string(at_)); }

  void space() {
    while (at_ < text_.size() && std::string_view(" \t\r\n").find(text_[at_]) != std::string_view::npos) {
      ++at_;
    }
  }

  bool take(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) {
      return false;
    }
    at_ += word.size();
    return true;
  }

  Json value(int depth) {
    if (depth > deepest) {
      fail("it is nested too deeply");
    }
    space();
    if (at_ == text_.size()) {
      fail("it ends where a value is expected");
    }
    Json out;
    switch (text_[at_]) {
      case '{':
        return object(depth);
      case '[':
        return array(depth);
      case '"':
        out.kind = Json::Kind::string;
        out.text = string();
        return out;
      default:
        break;
    }
    if (take("null")) {
      return out;
    }
    for (const bool truth : {true, false}) {
      if (take(truth ? "true" : "false")) {
        out.kind = Json::Kind::boolean;
        out.boolean = truth;
        return out;
      }
    }
    return number();
  }

  Json object(int depth) {
    Json out;
    out.kind = Json::Kind::object;
    std::unordered_set<std::string> names;
    ++at_;
    space();
    if (take("}")) {
      return out;
    }
    do {
      space();
      if (at_ == text_.size() || text_[at_] != '"') {
        fail("a name in quotes is expected");
      }
      std::string name = string();
      if (!names.insert(name).second) {
        fail("the name " + shown(name) + " comes twice");
      }
      space();
      if (!take(":")) {
        fail("a colon is expected");
      }
      Json member = value(depth + 1);
      out.members.emplace_back(std::move(name), std::move(member));
      space();
    } while (take(","));
    if (!take("}")) {
      fail("a comma or } is expected");
    }
    return out;
  }

  Json array(int depth) {
    Json out;
    out.kind = Json::Kind::array;
    ++at_;
    space();
    if (take("]")) {
      return out;
    }
    do {
      out.items.push_back(value(depth + 1));
      space();
    } while (take(","));
    if (!take("]")) {
      fail("a comma or ] is expected");
    }
    return out;
  }

  uint32_t hex() {
    uint32_t code = 0;
    const auto piece = text_.substr(at_, 4);
    const auto [end, error] = std::from_chars(piece.data(), piece.data() + piece.size(), code, 16);
    if (piece.size() != 4 || error != std::errc() || end != piece.data() + 4) {
      fail("four hexadecimal digits are expected");
    }
    at_ += 4;
    return code;
  }

  std::string string() {
    std::string out;
    ++at_;
    while (true) {
      if (at_ == text_.size()) {
        fail("it ends within a string");
      }
      const auto byte = static_cast<unsigned char>(text_[at_]);
      if (byte == '"') {
        ++at_;
        return out;
      }
      if (byte < 0x20) {
        fail("a control character stands in a string");
      }
      if (byte >= 0x80) {
        character(out);
      } else if (byte == '\\') {
        ++at_;
        escape(out);
      } else {
        out += text_[at_++];
      }
    }
  }

  void escape(std::string& out) {
    static constexpr std::string_view letters = "\"\\/bfnrt", meanings = "\"\\/\b\f\n\r\t";
    if (at_ == text_.size()) {
      fail("it ends within a string");
    }
    const char letter = text_[at_++];
    if (const size_t known = letters.find(letter); known != std::string_view::npos) {
      out += meanings[known];
      return;
    }
    if (letter != 'u') {
      fail("an escape is unknown");
    }
    uint32_t code = hex();
    if (code >= 0xD800 && code < 0xDC00 && take("\\u")) {
      const uint32_t low = hex();
      if (low < 0xDC00 || low > 0xDFFF) {
        fail("half of a surrogate pair stands alone");
      }
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    if (code >= 0xD800 && code <= 0xDFFF) {
      fail("half of a surrogate pair stands alone");
    }
    append_utf8(out, code);
  }

  // Copy one character of several bytes, if it is UTF-8: no overlong form, no surrogate, nothing beyond U+10FFFF.
  void character(std::string& out) {
    const auto lead = static_cast<unsigned char>(text_[at_]);
    const int length = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
    static constexpr uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    uint32_t code = lead & (0xFF >> (length + 1));
    if (lead < 0xC2 || lead > 0xF4 || at_ + length > text_.size()) {
      fail("a byte is not UTF-8");
    }
    for (int i = 1; i < length; ++i) {
      const auto byte = static_cast<unsigned char>(text_[at_ + i]);
      if ((byte & 0xC0) != 0x80) {
        fail("a byte is not UTF-8");
      }
      code = code << 6 | (byte & 0x3F);
    }
    if (code < least[length] || code > 0x10FFFF || (code >= 0xD800 && code <= 0xDFFF)) {
      fail("a byte is not UTF-8");
    }
    out.append(text_.substr(at_, length));
    at_ += length;
  }

  bool digits() {
    const size_t begin = at_;
    while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') {
      ++at_;
    }
    return at_ > begin;
  }

  Json number() {
    Json out;
    out.kind = Json::Kind::number;
    const size_t begin = at_;
    const bool negative = take("-");
    if (take("Infinity")) {
      out.number = negative ? -std::numeric_limits<double>::infinity() : std::numeric_limits<double>::infinity();
      return out;
    }
    if (!negative && take("NaN")) {
      out.number = std::numeric_limits<double>::quiet_NaN();
      return out;
    }
    bool whole = true;
    const bool zero = at_ < text_.size() && text_[at_] == '0';
    const size_t first = at_;
    if (!digits() || (zero && at_ - first > 1)) {
      at_ = begin;
      fail("a value is expected");
    }
    if (take(".")) {
      whole = false;
      if (!digits()) {
        fail("a digit is expected");
      }
    }
    if (take("e") || take("E")) {
      whole = false;
      if (!take("+")) {
        take("-");
      }
      if (!digits()) {
        fail("a digit is expected");
      }
    }
    const char *from = text_.data() + begin, *to = text_.data() + at_;
    if (whole && std::from_chars(from, to, out.integer).ec == std::errc()) {
      out.kind = Json::Kind::integer;
      out.number = static_cast<double>(out.integer);
    } else if (std::from_chars(from, to, out.number).ec != std::errc()) {
      out.number = std::numeric_limits<double>::quiet_NaN();  // too large or too small for a double, which nothing here needs
    }
    return out;
  }

  std::string_view text_;
  size_t at_ = 0;
};

}  // namespace

const Json* Json::find(std::string_view name) const {
  for (const auto& [known, value] : members) {
    if (known == name) {
      return &value;
    }
  }
  return nullptr;
}

std::string Json::describe() const {
  switch (kind) {
    case Kind::null:
      return "null";
    case Kind::boolean:
      return boolean ? "true" : "false";
    case Kind::integer:
      return std::to_string(integer);
    case Kind::number:
      return "the number " + std::to_string(number).substr(0, 40);
    case Kind::string:
      return shown(text);
    case Kind::array:
      return "a list of " + std::to_string(items.size());
    case Kind::object:
      return "an object of " + std::to_string(members.size());
  }
  return "unknown";
}

Json parse_json(std::string_view text) {
  return Parser(text).document();
}

}  // namespace oxfuse::internal
