#include "manifest.h"

#include "failure.h"
#include "files.h"
#include "json.h"

#include <algorithm>
#include <array>
#include <initializer_list>
#include <numeric>

namespace oxfuse::internal {
namespace {

constexpr int64_t most = int64_t(1) << 53;  // no number of an artifact is larger
constexpr const char* again = ": the manifest is damaged. Compile the checkpoint again.";

[[noreturn]] void wrong(const std::string& where, const Json& found, const std::string& expected) {
  throw Failure(OXFUSE_BAD_ARTIFACT, where + " is " + found.describe() + ", expected " + expected + again);
}

std::string text(const Json& json, const std::string& where) {
  if (json.kind != Json::Kind::string) {
    wrong(where, json, "a text");
  }
  if (json.text.find('\0') != std::string::npos) {
    throw Failure(OXFUSE_BAD_ARTIFACT, where + " holds a zero byte, which no text has" + again);
  }
  return json.text;
}

int64_t number(const Json& json, const std::string& where) {
  if (json.kind != Json::Kind::integer || json.integer <= -most || json.integer >= most) {
    wrong(where, json, "a whole number");
  }
  return json.integer;
}

template <typename T>
std::vector<T> list(const Json& json, const std::string& where, T (*read)(const Json&, const std::string&)) {
  if (json.kind != Json::Kind::array) {
    wrong(where, json, "a list");
  }
  std::vector<T> out;
  for (size_t i = 0; i < json.items.size(); ++i) {
    out.push_back(read(json.items[i], where + "[" + std::to_string(i) + "]"));
  }
  return out;
}

template <typename T>
std::map<std::string, T> table(const Json& json, const std::string& where, T (*read)(const Json&, const std::string&)) {
  if (json.kind != Json::Kind::object) {
    wrong(where, json, "an object");
  }
  std::map<std::string, T> out;
  for (const auto& [name, value] : json.members) {
    if (name.find('\0') != std::string::npos) {
      throw Failure(OXFUSE_BAD_ARTIFACT, where + " has a name with a zero byte" + again);
    }
    out.emplace(name, read(value, where + "." + name.substr(0, 100)));
  }
  return out;
}

// One object whose fields are known: none may be missing, and no other may be there.
class Fields {
 public:
  Fields(const Json& json, const std::string& where, std::initializer_list<const char*> names) : json_(json), where_(where) {
    if (json.kind != Json::Kind::object) {
      wrong(where, json, "an object");
    }
    for (const char* name : names) {
      if (json.find(name) == nullptr) {
        throw Failure(OXFUSE_BAD_ARTIFACT, where + " lacks " + name + again);
      }
    }
    for (const auto& [name, value] : json.members) {
      if (std::find(names.begin(), names.end(), name) == names.end()) {
        throw Failure(OXFUSE_BAD_ARTIFACT, where + " has the unknown field " + shown(name) + again);
      }
    }
  }

  template <typename T>
  T read(const char* name, T (*reader)(const Json&, const std::string&)) const {
    return reader(*json_.find(name), at(name));
  }

  template <typename T>
  std::vector<T> read_list(const char* name, T (*reader)(const Json&, const std::string&)) const {
    return list(*json_.find(name), at(name), reader);
  }

  template <typename T>
  std::map<std::string, T> read_table(const char* name, T (*reader)(const Json&, const std::string&)) const {
    return table(*json_.find(name), at(name), reader);
  }

  bool is_null(const char* name) const { return json_.find(name)->kind == Json::Kind::null; }
  std::string at(const char* name) const { return where_ + "." + name; }

 private:
  const Json& json_;
  const std::string& where_;
};

Json anything(const Json& json, const std::string&) {
  return json;
}

bool boolean_or_number(const Json& json, const std::string& where) {
  if (json.kind != Json::Kind::integer && json.kind != Json::Kind::number) {
    wrong(where, json, "a number");
  }
  return true;
}

Dim dim(const Json& json, const std::string& where) {
  if (json.kind == Json::Kind::string) {
    return text(json, where);
  }
  return number(json, where);
}

TensorSpec tensor_spec(const Json& json, const std::string& where) {
  const Fields fields(json, where, {"name", "dtype", "shape"});
  return {fields.read("name", text), fields.read("dtype", text), fields.read_list("shape", dim)};
}

DimRange dim_range(const Json& json, const std::string& where) {
  const Fields fields(json, where, {"min", "max"});
  return {fields.read("min", number), fields.read("max", number)};
}

ProgramSpec program_spec(const Json& json, const std::string& where) {
  const Fields fields(
      json, where, {"name", "target", "kind", "path", "library", "inputs", "outputs", "dims", "constants", "files"}
  );
  return {
      fields.read("name", text),
      fields.read("target", text),
      fields.read("kind", text),
      fields.read("path", text),
      fields.read("library", text),
      fields.read_list("inputs", tensor_spec),
      fields.read_list("outputs", tensor_spec),
      fields.read_table("dims", dim_range),
      fields.read_table("constants", text),
      fields.read_table("files", text)
  };
}

OpsLibrary ops_library(const Json& json, const std::string& where) {
  const Fields fields(json, where, {"path", "probe", "sha256"});
  return {fields.read("path", text), fields.read("probe", text), fields.read("sha256", text)};
}

int64_t at_least(int64_t least, int64_t value, const std::string& where) {
  if (value < least) {
    throw Failure(
        OXFUSE_BAD_ARTIFACT, where + " is " + std::to_string(value) + ", expected " + std::to_string(least) + " or more" + again
    );
  }
  return value;
}

CacheGroup cache_group(const Json& json, const std::string& where) {
  const Fields fields(json, where, {"window", "layers"});
  return {at_least(0, fields.read("window", number), fields.at("window")), fields.read_list("layers", number)};
}

CacheSpec cache_spec(const Json& json, const std::string& where) {
  const Fields fields(json, where, {"block_size", "dtype", "kv_heads", "head_dim", "groups"});
  CacheSpec cache{
      at_least(1, fields.read("block_size", number), fields.at("block_size")), fields.read("dtype", text),
      fields.read_list("kv_heads", number), fields.read_list("head_dim", number), fields.read_list("groups", cache_group)
  };
  std::vector<int64_t> layers;
  for (const CacheGroup& group : cache.groups) {
    layers.insert(layers.end(), group.layers.begin(), group.layers.end());
  }
  std::sort(layers.begin(), layers.end());
  std::vector<int64_t> expected(cache.kv_heads.size());
  std::iota(expected.begin(), expected.end(), 0);
  if (layers.empty() || layers != expected || cache.head_dim.size() != expected.size()) {
    throw Failure(
        OXFUSE_BAD_ARTIFACT, where + " has " + std::to_string(cache.kv_heads.size()) + " kv_heads and " +
                                 std::to_string(cache.head_dim.size()) + " head_dim, and groups of " +
                                 std::to_string(layers.size()) + " layers, expected one each for every layer" + again
    );
  }
  for (size_t i = 0; i < layers.size(); ++i) {
    at_least(1, cache.kv_heads[i], fields.at("kv_heads"));
    at_least(1, cache.head_dim[i], fields.at("head_dim"));
  }
  return cache;
}

Limits limits(const Json& json, const std::string& where) {
  const Fields fields(json, where, {"max_context", "max_batch", "max_step_tokens"});
  return {
      at_least(1, fields.read("max_context", number), fields.at("max_context")),
      at_least(1, fields.read("max_batch", number), fields.at("max_batch")),
      at_least(1, fields.read("max_step_tokens", number), fields.at("max_step_tokens"))
  };
}

Requirements requirements(const Json& json, const std::string& where) {
  const Fields fields(json, where, {"torch", "platform", "machine", "cpu_isa", "cpu_features", "glibc", "gpu_archs"});
  return {fields.read("torch", text),         fields.read("platform", text),          fields.read("machine", text),
          fields.read("cpu_isa", text),       fields.read_list("cpu_features", text), fields.read("glibc", text),
          fields.read_list("gpu_archs", text)};
}

WeightTensor weight_tensor(const Json& json, const std::string& where) {
  const Fields fields(json, where, {"dtype", "shape", "source", "layout", "sha256"});
  fields.read("source", text);
  fields.read_list("layout", text);
  return {fields.read("dtype", text), fields.read_list("shape", number), fields.read("sha256", text)};
}

WeightFile weight_file(const Json& json, const std::string& where) {
  const Fields fields(json, where, {"path", "bytes", "header_sha256", "tensors"});
  return {
      fields.read("path", text), fields.read("bytes", number), fields.read("header_sha256", text),
      fields.read_table("tensors", weight_tensor)
  };
}

bool pass_record(const Json& json, const std::string& where) {
  const Fields fields(json, where, {"name", "count", "checked", "max_error"});
  fields.read("name", text);
  fields.read("count", number);
  fields.read("checked", number);
  return fields.is_null("max_error") || fields.read("max_error", boolean_or_number);
}

void read_model(const Json& json, const std::string& where, Manifest& out) {
  static constexpr std::array tasks = {
      "text-generation", "text-classification", "token-classification", "question-answering", "feature-extraction"
  };
  static constexpr std::array poolings = {"none", "rightmost"};
  static constexpr std::array problems = {"regression", "single_label_classification", "multi_label_classification"};
  const Fields fields(json, where, {"model_type", "task", "dtype", "vocab_size", "config", "pooling", "labels", "problem_type"});
  fields.read("model_type", text);
  out.task = fields.read("task", text);
  out.dtype = fields.read("dtype", text);
  out.vocab_size = at_least(1, fields.read("vocab_size", number), fields.at("vocab_size"));
  fields.read_table("config", anything);
  fields.read_list("labels", text);
  const std::string pooling = fields.read("pooling", text);
  const std::string problem = fields.is_null("problem_type") ? "" : fields.read("problem_type", text);
  const auto check = [&](const char* name, const std::string& value, const auto& known) {
    if (std::find(known.begin(), known.end(), value) == known.end()) {
      throw Failure(OXFUSE_BAD_ARTIFACT, fields.at(name) + " is " + shown(value) + ", which is not known" + again);
    }
  };
  check("task", out.task, tasks);
  check("pooling", pooling, poolings);
  if (!problem.empty()) {
    check("problem_type", problem, problems);
  }
}

void read_generation(const Json& json, const std::string& where, Manifest& out) {
  const Fields fields(json, where, {"eos_token_ids", "bos_token_id", "pad_token_id"});
  out.eos_token_ids = fields.read_list("eos_token_ids", number);
  for (const char* name : {"bos_token_id", "pad_token_id"}) {
    if (!fields.is_null(name)) {
      fields.read(name, number);
    }
  }
}

Manifest read_fields(const Json& json, const std::string& where) {
  const Fields fields(
      json, where,
      {"format_version", "name", "created_by", "source", "model", "generation", "programs", "ops_library", "cache", "limits",
       "requirements", "weights", "passes", "numerics", "tokenizer_files", "golden"}
  );
  Manifest out;
  out.name = fields.read("name", text);
  fields.read_table("created_by", text);
  fields.read_table("source", text);
  read_model(*json.find("model"), fields.at("model"), out);
  read_generation(*json.find("generation"), fields.at("generation"), out);
  out.programs = fields.read_list("programs", program_spec);
  if (!fields.is_null("ops_library")) {
    out.ops_library = fields.read("ops_library", ops_library);
  }
  out.cache = fields.read("cache", cache_spec);
  out.limits = fields.read("limits", limits);
  out.requirements = fields.read("requirements", requirements);
  out.weights = fields.read_list("weights", weight_file);
  fields.read_list("passes", pass_record);
  fields.read_table("numerics", text);
  out.tokenizer_files = fields.read_table("tokenizer_files", text);
  if (!fields.is_null("golden")) {
    fields.read("golden", text);
  }
  return out;
}

std::string shape_text(const std::vector<Dim>& shape) {
  std::string out = "[";
  for (const Dim& size : shape) {
    out += (out.size() > 1 ? ", " : "");
    out += std::holds_alternative<int64_t>(size) ? std::to_string(std::get<int64_t>(size)) : std::get<std::string>(size);
  }
  return (out + "]").substr(0, 100);
}

}  // namespace

Manifest read_manifest(const std::filesystem::path& folder) {
  const std::filesystem::path path = folder / "manifest.json";
  std::error_code ignored;
  if (!std::filesystem::exists(path, ignored)) {
    const bool there = std::filesystem::is_directory(folder, ignored);
    throw Failure(
        OXFUSE_BAD_ARTIFACT, folder.string() + (there ? " has no manifest.json" : " does not exist") +
                                 ", so it is not an oxfuse artifact. Make one with `oxfuse compile SRC -o DIR`."
    );
  }
  const std::string where = path.string();
  Json json;
  try {
    json = parse_json(read_file(path));
  } catch (const JsonError& error) {
    throw Failure(OXFUSE_BAD_ARTIFACT, where + " is not JSON (" + error.what() + ")" + again);
  }
  const Json* version = json.find("format_version");
  if (version == nullptr || version->kind != Json::Kind::integer || version->integer != format_version) {
    throw Failure(
        OXFUSE_BAD_ARTIFACT, where + " has format version " + (version ? version->describe() : "none") +
                                 "; this oxfuse reads version " + std::to_string(format_version) +
                                 ". Compile the checkpoint again, or use the oxfuse that made the artifact."
    );
  }
  return read_fields(json, where);
}

const ProgramSpec* find_program(const Manifest& manifest, const std::string& name, const std::string& target) {
  for (const ProgramSpec& program : manifest.programs) {
    if (program.name == name && program.target == target) {
      return &program;
    }
  }
  return nullptr;
}

void check_supported(const Manifest& manifest) {
  for (const ProgramSpec& program : manifest.programs) {
    if (program.kind != "aoti") {
      throw Failure(
          OXFUSE_UNSUPPORTED,
          "The artifact has a program of kind " + shown(program.kind) +
              ", this library runs those of targets cpu and cuda: " + "compile with --target cpu, or use onnxruntime."
      );
    }
  }
  if (manifest.task != "text-generation") {
    throw Failure(
        OXFUSE_UNSUPPORTED,
        "The artifact is for " + manifest.task + ", this library runs text-generation: use oxfuse's Python runtime."
    );
  }
}

void check_program(const ProgramSpec& program, const Manifest& manifest) {
  const auto groups = static_cast<int64_t>(manifest.cache.groups.size());
  std::vector<TensorSpec> expected = {{"token_ids", "int64", {"T"}},     {"positions", "int64", {"T"}},
                                      {"query_start", "int64", {"N+1"}}, {"kv_lens", "int64", {"N"}},
                                      {"slots", "int64", {groups, "T"}}, {"block_tables", "int64", {groups, "N", "M"}},
                                      {"rows", "int64", {"R"}}};
  const int64_t block_size = manifest.cache.block_size;
  for (size_t layer = 0; layer < manifest.cache.kv_heads.size(); ++layer) {
    const int64_t heads = manifest.cache.kv_heads[layer], dim = manifest.cache.head_dim[layer];
    expected.push_back({"K of layer " + std::to_string(layer), manifest.cache.dtype, {"B", heads, dim, block_size}});
    expected.push_back({"V of layer " + std::to_string(layer), manifest.cache.dtype, {"B", heads, block_size, dim}});
  }
  const auto differ = [&](const std::string& what) {
    return Failure(OXFUSE_BAD_ARTIFACT, "The program " + shown(program.name) + " " + what + again);
  };
  if (program.inputs.size() != expected.size()) {
    throw differ(
        "takes " + std::to_string(program.inputs.size()) + " inputs, expected " + std::to_string(expected.size()) +
        " for the manifest's cache"
    );
  }
  for (size_t i = 0; i < expected.size(); ++i) {
    const TensorSpec &found = program.inputs[i], &want = expected[i];
    // What dynamic dims are called is the compiler's affair; numbers must be these.
    bool same = found.dtype == want.dtype && found.shape.size() == want.shape.size();
    for (size_t d = 0; same && d < want.shape.size(); ++d) {
      const bool fixed = std::holds_alternative<int64_t>(want.shape[d]);
      same = fixed ? found.shape[d] == want.shape[d] : std::holds_alternative<std::string>(found.shape[d]);
    }
    if (!same || (i < 7 && found.name != want.name)) {
      throw differ(
          "takes " + shown(found.name) + " as " + shown(found.dtype) + " " + shape_text(found.shape) + ", expected " + want.name +
          " as " + want.dtype + " " + shape_text(want.shape)
      );
    }
  }
  if (program.outputs.size() != 1 || program.outputs[0].shape.size() != 2 ||
      !std::holds_alternative<std::string>(program.outputs[0].shape[0]) ||
      program.outputs[0].shape[1] != Dim(manifest.vocab_size)) {
    throw differ(
        "gives " + (program.outputs.empty() ? "nothing" : shape_text(program.outputs[0].shape)) +
        ", expected one output of rows by " + std::to_string(manifest.vocab_size) + " logits"
    );
  }
}

}  // namespace oxfuse::internal
