#include "library_file.h"

#include "failure.h"
#include "files.h"

#include <cstring>
#include <elf.h>
#include <string>
#include <vector>

namespace oxfuse::internal {

void check_library(const std::filesystem::path& path, const std::string& name) {
  const File file(path);
  const auto size = static_cast<uint64_t>(file.size());
  Elf64_Ehdr header{};
  if (size >= sizeof(header)) {
    file.read(&header, sizeof(header), 0);
  }
  const bool known = std::memcmp(header.e_ident, ELFMAG, SELFMAG) == 0 && header.e_ident[EI_CLASS] == ELFCLASS64;
  const uint64_t table = uint64_t(header.e_phnum) * sizeof(Elf64_Phdr);
  if (!known || header.e_type != ET_DYN || header.e_phentsize != sizeof(Elf64_Phdr) || table > size ||
      header.e_phoff > size - table) {
    throw damaged(file.name(), "is no shared library");
  }
  std::vector<Elf64_Phdr> segments(header.e_phnum);
  file.read(segments.data(), table, static_cast<int64_t>(header.e_phoff));
  for (const Elf64_Phdr& segment : segments) {
    if (segment.p_filesz > size || segment.p_offset > size - segment.p_filesz) {
      throw damaged(file.name(), "is cut short: it has " + std::to_string(size) + " bytes, and a segment ends behind them");
    }
  }
  if (read_file(path).find(name) == std::string::npos) {
    throw damaged(file.name(), "does not hold " + shown(name));
  }
}

}  // namespace oxfuse::internal
