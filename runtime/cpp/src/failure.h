// How the inside of the library says that something does not work; the C interface turns it into a status and a message.
#pragma once

#include "oxfuse.h"

#include <stdexcept>
#include <string>
#include <string_view>

namespace oxfuse::internal {

class Failure : public std::runtime_error {
 public:
  Failure(oxfuse_status status, const std::string& message) : std::runtime_error(message), status(status) {}

  oxfuse_status status;
};

// Return the failure of a file of an artifact that is not what the compiler wrote.
Failure damaged(const std::string& path, const std::string& what);

// Return a text as a message shows it: quoted, without control characters, cut where a damaged file made it long.
std::string shown(std::string_view text, size_t most = 80);

// Return the first line of an exception's text: what torch adds below is a backtrace.
std::string first_line(std::string_view text);

}  // namespace oxfuse::internal
