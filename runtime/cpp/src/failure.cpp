#include "failure.h"

namespace oxfuse::internal {

Failure damaged(const std::string& path, const std::string& what) {
  return Failure(
      OXFUSE_BAD_ARTIFACT,
      path + " " + what + ": the artifact is damaged or incomplete. Copy it again, or compile the checkpoint again."
  );
}

std::string shown(std::string_view text, size_t most) {
  std::string out = "'";
  for (size_t at = 0; at < text.size(); ++at) {
    const auto byte = static_cast<unsigned char>(text[at]);
    if (out.size() > most && (byte & 0xC0) != 0x80) {  // never within a character
      return out + "'… (" + std::to_string(text.size()) + " bytes)";
    }
    out += byte < 0x20 || byte == 0x7F ? '?' : text[at];
  }
  return out + "'";
}

std::string first_line(std::string_view text) {
  return std::string(text.substr(0, text.find('\n')));
}

}  // namespace oxfuse::internal
