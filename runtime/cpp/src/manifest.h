// The artifact's manifest: manifest.json enters, checked values leave. The schema is that of runtime/manifest.py, field by field:
// a missing field, an unknown one or a value of the wrong type is a failure that names the field.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <variant>
#include <vector>

namespace oxfuse::internal {

constexpr int64_t format_version = 3;

using Dim = std::variant<int64_t, std::string>;  // a number, or the name of a dynamic dim

struct TensorSpec {
  std::string name;
  std::string dtype;
  std::vector<Dim> shape;
};

struct DimRange {
  int64_t min = 0;
  int64_t max = 0;
};

struct ProgramSpec {
  std::string name;
  std::string target;
  std::string kind;
  std::string path;
  std::string library;
  std::vector<TensorSpec> inputs;
  std::vector<TensorSpec> outputs;
  std::map<std::string, DimRange> dims;
  std::map<std::string, std::string> constants;
  std::map<std::string, std::string> files;
};

struct OpsLibrary {
  std::string path;
  std::string probe;
  std::string sha256;
};

struct CacheGroup {
  int64_t window = 0;  // 0 sees every earlier token
  std::vector<int64_t> layers;
};

struct CacheSpec {
  int64_t block_size = 0;
  std::string dtype;
  std::vector<int64_t> kv_heads;
  std::vector<int64_t> head_dim;
  std::vector<CacheGroup> groups;
};

struct Limits {
  int64_t max_context = 0;
  int64_t max_batch = 0;
  int64_t max_step_tokens = 0;
};

struct Requirements {
  std::string torch;
  std::string platform;
  std::string machine;
  std::string cpu_isa;
  std::vector<std::string> cpu_features;
  std::string glibc;
  std::vector<std::string> gpu_archs;
};

struct WeightTensor {
  std::string dtype;
  std::vector<int64_t> shape;
  std::string sha256;
};

struct WeightFile {
  std::string path;
  int64_t bytes = 0;
  std::string header_sha256;
  std::map<std::string, WeightTensor> tensors;
};

struct Manifest {
  std::string name;
  std::string task;
  std::string dtype;
  int64_t vocab_size = 0;
  std::vector<int64_t> eos_token_ids;
  std::vector<ProgramSpec> programs;
  std::optional<OpsLibrary> ops_library;
  CacheSpec cache;
  Limits limits;
  Requirements requirements;
  std::vector<WeightFile> weights;
  std::map<std::string, std::string> tokenizer_files;
};

// Return the manifest of the artifact in `folder`. Throws Failure where there is none or it is damaged.
Manifest read_manifest(const std::filesystem::path& folder);

// Return the only program of this name for `target`, null where there is none.
const ProgramSpec* find_program(const Manifest& manifest, const std::string& name, const std::string& target);

// Throw Failure unless the artifact holds programs of text generation for one CPU or for GPUs.
void check_supported(const Manifest& manifest);

// Throw Failure unless the program takes and gives what a step of this model and cache takes and gives.
void check_program(const ProgramSpec& program, const Manifest& manifest);

}  // namespace oxfuse::internal
