// Files of an artifact: read whole, hashed, or mapped. Only regular files are opened, and every failure names the file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>

namespace oxfuse::internal {

// An open file, read-only.
class File {
 public:
  // Open the regular file at `path`. Throws Failure where it is missing, is none, or cannot be read.
  explicit File(const std::filesystem::path& path);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  int64_t size() const { return size_; }
  int descriptor() const { return descriptor_; }
  const std::string& name() const { return name_; }

  // Read `bytes` bytes at `offset`. Throws Failure where the file ends before.
  void read(void* into, size_t bytes, int64_t offset) const;

  // Return the SHA-256 of the bytes from `begin` to `end`.
  std::string hash(int64_t begin, int64_t end) const;

 private:
  std::string name_;
  int descriptor_ = -1;
  int64_t size_ = 0;
};

// Return what the file holds. Throws Failure where it cannot be read, or is no text for a person: beyond 1 GB.
std::string read_file(const std::filesystem::path& path);

}  // namespace oxfuse::internal
