#include "weights.h"

#include "failure.h"
#include "json.h"
#include "sha256.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <sys/mman.h>
#include <system_error>

namespace oxfuse::internal {
namespace {

struct Dtype {
  const char* safetensors;
  const char* torch;
  at::ScalarType type;
};

constexpr std::array<Dtype, 10> dtypes = {{
    {"F64", "float64", at::kDouble},
    {"F32", "float32", at::kFloat},
    {"F16", "float16", at::kHalf},
    {"BF16", "bfloat16", at::kBFloat16},
    {"I64", "int64", at::kLong},
    {"I32", "int32", at::kInt},
    {"I16", "int16", at::kShort},
    {"I8", "int8", at::kChar},
    {"U8", "uint8", at::kByte},
    {"BOOL", "bool", at::kBool},
}};

constexpr int64_t header_limit = 100'000'000;  // longest header that safetensors itself accepts, in bytes

std::string name_of(at::ScalarType type) {
  return std::find_if(dtypes.begin(), dtypes.end(), [&](const Dtype& known) { return known.type == type; })->torch;
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string out = "[";
  for (const int64_t size : shape) {
    out += (out.size() > 1 ? ", " : "") + std::to_string(size);
  }
  return out.substr(0, 100) + "]";
}

const Json& member(const File& file, const std::string& name, const Json& entry, const char* field, Json::Kind kind) {
  const Json* found = entry.find(field);
  if (found == nullptr || found->kind != kind) {
    throw damaged(file.name(), "has tensor " + shown(name) + " without a proper " + field + " in its header");
  }
  return *found;
}

std::vector<int64_t> numbers(const File& file, const std::string& name, const Json& list) {
  std::vector<int64_t> out;
  for (const Json& item : list.items) {
    if (item.kind != Json::Kind::integer || item.integer < 0) {
      throw damaged(file.name(), "has tensor " + shown(name) + " with " + item.describe() + " among its sizes and offsets");
    }
    out.push_back(item.integer);
  }
  return out;
}

Extent extent_of(const File& file, const std::string& name, const Json& entry, int64_t data) {
  const std::string& called = member(file, name, entry, "dtype", Json::Kind::string).text;
  const auto known = std::find_if(dtypes.begin(), dtypes.end(), [&](const Dtype& one) { return one.safetensors == called; });
  if (known == dtypes.end()) {
    throw damaged(file.name(), "has tensor " + shown(name) + " of dtype " + shown(called));
  }
  Extent out{known->type, numbers(file, name, member(file, name, entry, "shape", Json::Kind::array))};
  const auto offsets = numbers(file, name, member(file, name, entry, "data_offsets", Json::Kind::array));
  int64_t needed = static_cast<int64_t>(c10::elementSize(out.dtype));
  bool counted = true;
  for (const int64_t size : out.shape) {
    counted = counted && !__builtin_mul_overflow(needed, size, &needed);
  }
  if (!counted || offsets.size() != 2 || __builtin_add_overflow(data, offsets[0], &out.begin) ||
      __builtin_add_overflow(data, offsets[1], &out.end) || out.end > file.size() || out.begin > out.end ||
      out.end - out.begin != needed) {
    throw damaged(
        file.name(), "has tensor " + shown(name) + " of shape " + shape_text(out.shape) + " where it does not lie inside its " +
                         std::to_string(file.size()) + " bytes"
    );
  }
  if (out.begin % static_cast<int64_t>(c10::elementSize(out.dtype))) {
    throw damaged(
        file.name(),
        "has tensor " + shown(name) + " at offset " + std::to_string(out.begin) + ", not a multiple of its elements' size"
    );
  }
  return out;
}

// Return the extents and the SHA-256 of the length prefix and the header.
std::pair<std::map<std::string, Extent>, std::string> read_header(const File& file) {
  std::array<uint8_t, 8> prefix{};
  uint64_t length = 0;
  if (file.size() >= 8) {
    file.read(prefix.data(), prefix.size(), 0);
    for (int i = 7; i >= 0; --i) {
      length = length << 8 | prefix[i];
    }
  }
  if (file.size() < 8 || length > static_cast<uint64_t>(std::min(file.size() - 8, header_limit))) {
    throw damaged(file.name(), "has no safetensors header (" + std::to_string(file.size()) + " bytes)");
  }
  std::string header(length, '\0');
  file.read(header.data(), header.size(), 8);
  Json entries;
  try {
    entries = parse_json(header);
  } catch (const JsonError& error) {
    throw damaged(file.name(), std::string("has an unreadable safetensors header (") + error.what() + ")");
  }
  if (entries.kind != Json::Kind::object) {
    throw damaged(file.name(), "has " + entries.describe() + " as its safetensors header");
  }
  std::map<std::string, Extent> extents;
  for (const auto& [name, entry] : entries.members) {
    if (name != "__metadata__") {
      extents.emplace(name, extent_of(file, name, entry, 8 + static_cast<int64_t>(length)));
    }
  }
  Sha256 digest;
  digest.update(prefix.data(), prefix.size());
  digest.update(header.data(), header.size());
  return {std::move(extents), digest.hex()};
}

}  // namespace

at::ScalarType dtype_of(const std::string& name) {
  const auto known = std::find_if(dtypes.begin(), dtypes.end(), [&](const Dtype& one) { return one.torch == name; });
  if (known == dtypes.end()) {
    throw Failure(
        OXFUSE_BAD_ARTIFACT,
        "The manifest has the dtype " + shown(name) + ", which no artifact has: it is damaged. Compile again."
    );
  }
  return known->type;
}

WeightMap::WeightMap(const std::filesystem::path& folder, const WeightFile& spec) : file_(folder / spec.path) {
  auto [extents, digest] = read_header(file_);
  if (file_.size() != spec.bytes) {
    throw damaged(
        file_.name(), "has " + std::to_string(file_.size()) + " bytes, the manifest says " + std::to_string(spec.bytes)
    );
  }
  if (digest != spec.header_sha256) {
    throw damaged(file_.name(), "has a header of sha256 " + digest + ", the manifest says " + shown(spec.header_sha256, 64));
  }
  for (const auto& [name, extent] : extents) {
    if (!spec.tensors.count(name)) {
      throw damaged(file_.name(), "and the manifest disagree about tensor " + shown(name) + ", which only the file has");
    }
  }
  for (const auto& [name, tensor] : spec.tensors) {
    const auto found = extents.find(name);
    if (found == extents.end()) {
      throw damaged(file_.name(), "and the manifest disagree about tensor " + shown(name) + ", which only the manifest has");
    }
    if (name_of(found->second.dtype) != tensor.dtype || found->second.shape != tensor.shape) {
      throw damaged(
          file_.name(), "has " + shown(name) + " as " + name_of(found->second.dtype) + " " + shape_text(found->second.shape) +
                            ", the manifest says " + shown(tensor.dtype, 20) + " " + shape_text(tensor.shape)
      );
    }
  }
  extents_ = std::move(extents);
  pages_ = mmap(nullptr, file_.size(), PROT_READ, MAP_SHARED, file_.descriptor(), 0);
  if (pages_ == MAP_FAILED) {
    pages_ = nullptr;
    throw Failure(
        OXFUSE_OUT_OF_MEMORY, "The system refuses to map the " + std::to_string(file_.size()) + " bytes of " + file_.name() +
                                  ": " + std::generic_category().message(errno) +
                                  ". Raise the limit of address space (ulimit -v)."
    );
  }
#ifdef MADV_HUGEPAGE
  madvise(pages_, file_.size(), MADV_HUGEPAGE);  // advice, as in runtime/weights.py: it may be refused
#endif
}

WeightMap::~WeightMap() {
  if (pages_ != nullptr) {
    munmap(pages_, file_.size());
  }
}

void WeightMap::check_hashes(const WeightFile& spec) const {
  for (const auto& [name, extent] : extents_) {  // read, not mapped: a hash should not leave the whole file in the resident set
    if (file_.hash(extent.begin, extent.end) != spec.tensors.at(name).sha256) {
      throw damaged(file_.name(), "has changed since it was compiled, in tensor " + shown(name));
    }
  }
}

void WeightMap::add_tensors(std::map<std::string, at::Tensor>& into) const {
  for (const auto& [name, extent] : extents_) {
    const auto options = at::TensorOptions(extent.dtype);
    into[name] = extent.begin == extent.end ? at::empty(extent.shape, options)
                                            : at::from_blob(static_cast<char*>(pages_) + extent.begin, extent.shape, options);
  }
}

}  // namespace oxfuse::internal
