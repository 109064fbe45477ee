// `load_model`: an artifact's folder enters, a model that runs leaves. Everything is checked before the first library is opened,
// since a program is trusted machine code and a wrong one ends the process.

#include "failure.h"
#include "files.h"
#include "host.h"
#include "model.h"

#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>
#include <c10/core/DeviceGuard.h>

#include <optional>
#include <set>

namespace oxfuse::internal {
namespace {

constexpr int most_threads = 1024;

// Loads of several threads would register ops, and set up a GPU, at the same time.
std::mutex& loading() {
  static std::mutex one;
  return one;
}

// Return "cpu" or "cuda", whichever the artifact runs on. Throws Failure where `device` is of another kind, or the programs are
// not for what the manifest says that the artifact is for.
std::string check_targets(const Manifest& manifest, const std::string& device) {
  std::set<std::string> stated, held;
  for (const std::string& arch : manifest.requirements.gpu_archs) {
    stated.insert("cuda:" + arch);
  }
  if (stated.empty()) {
    stated.insert("cpu");
  }
  for (const ProgramSpec& program : manifest.programs) {
    held.insert(program.target);
  }
  if (held != stated) {
    throw Failure(
        OXFUSE_BAD_ARTIFACT, "The manifest says that the artifact is for " + shown(*stated.begin()) +
                                 ", and its programs are for " + (held.empty() ? "nothing" : shown(*held.begin())) +
                                 ": the manifest is damaged. Compile the checkpoint again."
    );
  }
  const std::string kind = manifest.requirements.gpu_archs.empty() ? "cpu" : "cuda";
  if (!device.empty() && device.substr(0, device.find(':')) != kind) {
    throw Failure(
        OXFUSE_BAD_ARGUMENT, "The artifact has no program for device " + shown(device) + ", only for " + *held.begin() +
                                 ": compile with another --target, or give that device."
    );
  }
  return kind;
}

void check_hashes(const std::filesystem::path& folder, const Manifest& manifest) {
  std::map<std::string, std::string> hashes = manifest.tokenizer_files;
  for (const ProgramSpec& program : manifest.programs) {
    if (program.files.count(program.library) == 0) {
      throw damaged((folder / program.path / program.library).string(), "has no hash in the manifest");
    }
    for (const auto& [name, digest] : program.files) {
      hashes[program.path + "/" + name] = digest;
    }
  }
  if (manifest.ops_library) {
    hashes[manifest.ops_library->path] = manifest.ops_library->sha256;
  }
  for (const auto& [name, expected] : hashes) {
    const File file(folder / name);
    if (const std::string found = file.hash(0, file.size()); found != expected) {
      throw damaged(file.name(), "has sha256 " + found + ", the manifest says " + shown(expected, 64));
    }
  }
}

// Copy the weights that programs read to the GPU, once each.
std::map<std::string, at::Tensor> upload(
    const std::map<std::string, at::Tensor>& mapped, const std::vector<const ProgramSpec*>& programs, at::Device device
) {
  std::map<std::string, at::Tensor> out;
  for (const ProgramSpec* program : programs) {
    for (const auto& [constant, name] : program->constants) {
      if (const auto found = mapped.find(name); found != mapped.end() && out.count(name) == 0) {
        out[name] = found->second.to(device);
      }
    }
  }
  return out;
}

}  // namespace

std::shared_ptr<Model> load_model(const std::string& path, const oxfuse_load_options& options) {
  if (options.threads < 0 || options.threads > most_threads) {
    throw Failure(
        OXFUSE_BAD_ARGUMENT, "threads is " + std::to_string(options.threads) + ": give a whole number from 1 to " +
                                 std::to_string(most_threads) + ", or 0 for torch's own setting."
    );
  }
  if (options.check != OXFUSE_CHECK_QUICK && options.check != OXFUSE_CHECK_FULL) {
    throw Failure(OXFUSE_BAD_ARGUMENT, "check is " + std::to_string(options.check) + ": give one of oxfuse_check.");
  }
  if (options.cache_bytes > static_cast<uint64_t>(INT64_MAX)) {
    throw Failure(OXFUSE_BAD_ARGUMENT, "cache_bytes is " + std::to_string(options.cache_bytes) + ": give less than 2**63.");
  }
  if (options.prefix_cache_bytes < -1) {
    throw Failure(
        OXFUSE_BAD_ARGUMENT, "prefix_cache_bytes is " + std::to_string(options.prefix_cache_bytes) +
                                 ": give a number of bytes, 0 for none, or -1 for the default."
    );
  }
  const std::lock_guard guard(loading());
  const std::filesystem::path folder(path);
  auto model = std::make_shared<Model>();
  const Manifest& manifest = model->manifest = read_manifest(folder);
  check_supported(manifest);
  const std::string asked = options.device == nullptr ? "" : options.device;
  const bool gpu = check_targets(manifest, asked) == "cuda";
  const Gpus gpus = gpu ? find_gpus() : Gpus{};
  check_host(manifest.requirements, gpus);
  std::string target = "cpu";
  model->device = "cpu";
  if (gpu) {
    const Gpu chosen = choose_gpu(manifest.requirements.gpu_archs, asked, gpus);
    target = "cuda:" + chosen.arch;
    model->device = "cuda:" + std::to_string(chosen.index);
  }
  const ProgramSpec* step = find_program(manifest, "step", target);
  const ProgramSpec* decode = gpu ? find_program(manifest, "decode", target) : nullptr;
  if (step == nullptr) {
    throw Failure(
        OXFUSE_BAD_ARTIFACT, "The artifact has no step program for " + target + ": the manifest is damaged. Compile it again."
    );
  }
  std::vector<const ProgramSpec*> programs = {step};
  if (decode != nullptr) {
    programs.push_back(decode);
  }
  for (const ProgramSpec* program : programs) {
    check_program(*program, manifest);
  }
  check_hashes(folder, manifest);
  for (const WeightFile& file : manifest.weights) {
    model->maps.push_back(std::make_unique<WeightMap>(folder, file));
    if (options.check == OXFUSE_CHECK_FULL) {
      model->maps.back()->check_hashes(file);
    }
    model->maps.back()->add_tensors(model->weights);
    model->weight_bytes += file.bytes;
  }
  const at::Device device(model->device);
  const Limits limits = gpu ? gpu_step_limits(manifest.limits) : manifest.limits;
  const int64_t chunk = prefill_chunk(limits);
  auto cache_bytes = static_cast<int64_t>(options.cache_bytes);
  std::optional<c10::DeviceGuard> on_device;
  if (gpu) {
    at::globalContext().lazyInitDevice(device.type());
    on_device.emplace(device);
    const auto [free, total] = at::accelerator::getMemoryInfo(device.index());
    std::set<std::string> names;
    int64_t needed = 0;
    for (const ProgramSpec* program : programs) {
      for (const auto& [constant, name] : program->constants) {
        if (const auto found = model->weights.find(name); found != model->weights.end() && names.insert(name).second) {
          needed += static_cast<int64_t>(found->second.nbytes());
        }
      }
    }
    cache_bytes = plan_gpu_caches(manifest, limits, chunk, needed, static_cast<int64_t>(free), cache_bytes);
    model->weights = upload(model->weights, programs, device);
    model->maps.clear();  // no tensor borrows them any more
  }
  const CacheSize size = size_cache(manifest.cache, limits, chunk, chunk, cache_bytes);
  TeamSwitch team = nullptr;
  if (manifest.ops_library) {
    load_ops_library(folder, *manifest.ops_library);
    team = team_switch(*manifest.ops_library);
  }
  auto loaded = std::make_unique<Program>(folder, *step, model->weights, device);
  std::unique_ptr<Program> fast;
  int64_t most_decodes = 0;
  if (decode != nullptr) {
    fast = std::make_unique<Program>(folder, *decode, model->weights, device);
    const auto range = decode->dims.find("N");
    most_decodes = range == decode->dims.end() ? 0 : range->second.max;
  }
  model->engine = std::make_unique<Engine>(
      manifest, limits, size, prefix_bound(size, gpu, options.prefix_cache_bytes), chunk, device, options.threads, team,
      std::move(loaded), std::move(fast), most_decodes
  );
  if (gpu) {
    model->engine->try_largest_step();
  }
  return model;
}

}  // namespace oxfuse::internal
