#include "files.h"

#include "failure.h"
#include "sha256.h"

#include <algorithm>
#include <cerrno>
#include <fcntl.h>
#include <sys/stat.h>
#include <system_error>
#include <unistd.h>
#include <vector>

namespace oxfuse::internal {
namespace {

constexpr int64_t longest_text = 1 << 30;
constexpr size_t hash_chunk = 1 << 20;

Failure unreadable(const std::string& name, int number) {
  return Failure(OXFUSE_BAD_ARTIFACT, name + " cannot be read: " + std::generic_category().message(number) + ".");
}

}  // namespace

File::File(const std::filesystem::path& path) : name_(path.string()) {
  descriptor_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe in its place must not hold the process up
  if (descriptor_ < 0) {
    throw errno == ENOENT ? damaged(name_, "does not exist") : unreadable(name_, errno);
  }
  struct stat found{};
  const int failed = fstat(descriptor_, &found) ? errno : 0;
  if (failed || !S_ISREG(found.st_mode)) {
    close(descriptor_);
    throw failed ? unreadable(name_, failed) : damaged(name_, "is no regular file");
  }
  size_ = found.st_size;
}

File::~File() {
  close(descriptor_);
}

void File::read(void* into, size_t bytes, int64_t offset) const {
  auto* to = static_cast<char*>(into);
  while (bytes) {
    const ssize_t got = pread(descriptor_, to, bytes, offset);
    if (got < 0 && errno == EINTR) {
      continue;
    }
    if (got < 0) {
      throw unreadable(name_, errno);
    }
    if (got == 0) {
      throw damaged(name_, "ended at byte " + std::to_string(offset) + " while it was read");
    }
    to += got, offset += got, bytes -= got;
  }
}

std::string File::hash(int64_t begin, int64_t end) const {
  Sha256 digest;
  std::vector<char> piece(std::min<int64_t>(hash_chunk, std::max<int64_t>(end - begin, 0)));
  while (begin < end) {
    const auto count = static_cast<size_t>(std::min<int64_t>(piece.size(), end - begin));
    read(piece.data(), count, begin);
    digest.update(piece.data(), count);
    begin += static_cast<int64_t>(count);
  }
  return digest.hex();
}

std::string read_file(const std::filesystem::path& path) {
  const File file(path);
  if (file.size() > longest_text) {
    throw damaged(file.name(), "has " + std::to_string(file.size()) + " bytes");
  }
  std::string out(file.size(), '\0');
  file.read(out.data(), out.size(), 0);
  return out;
}

}  // namespace oxfuse::internal
