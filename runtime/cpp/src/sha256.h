// SHA-256 (FIPS 180-4), as the manifest has it for files and tensors. torch's wheel ships none.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace oxfuse::internal {

class Sha256 {
 public:
  void update(const void* data, size_t bytes);

  // Return the digest of all that was given. Nothing may follow.
  std::array<uint8_t, 32> digest();

  // Return the digest in hexadecimal digits.
  std::string hex();

 private:
  void block(const uint8_t* data);

  std::array<uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<uint8_t, 64> buffer_{};
  uint64_t bytes_ = 0;
};

}  // namespace oxfuse::internal
