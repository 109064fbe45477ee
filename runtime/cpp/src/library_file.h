// Shared libraries, before the system's loader sees them: it believes what their headers say, and a file that is cut short ends
// the process (SIGBUS) where it would read behind the end. A library of another kind is not for trying either: one that registers
// ops which are there already ends the process as well.
#pragma once

#include <filesystem>
#include <string>

namespace oxfuse::internal {

// Throw Failure unless the file at `path` is a 64-bit ELF library that holds all segments that it names, and the text `name` of a
// function or an op, without which it is another library.
void check_library(const std::filesystem::path& path, const std::string& name);

}  // namespace oxfuse::internal
