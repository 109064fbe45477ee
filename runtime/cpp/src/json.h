// Reads JSON, strictly: the manifest and the headers of weight files. torch's wheel ships no JSON header, and one that is fetched
// while building would not be there offline.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace oxfuse::internal {

struct Json {
  enum class Kind { null, boolean, integer, number, string, array, object };

  Kind kind = Kind::null;
  bool boolean = false;
  int64_t integer = 0;  // of kind integer; a whole number beyond 64 bits is of kind number
  double number = 0;    // of kinds integer and number
  std::string text;
  std::vector<Json> items;
  std::vector<std::pair<std::string, Json>> members;  // in the order of the file; no name comes twice

  // Return the member of this name, null where there is none or this is no object.
  const Json* find(std::string_view name) const;

  // Return what kind of value this is, as a message says it.
  std::string describe() const;
};

class JsonError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Return the value that `text` is. Takes NaN and Infinity, as Python writes them. Throws JsonError where it is not JSON in UTF-8,
// a name comes twice in an object, or it is nested too deeply.
Json parse_json(std::string_view text);

}  // namespace oxfuse::internal
