#include "program.h"

#include "library_file.h"
#include "failure.h"
#include "sha256.h"

#include <ATen/DynamicLibrary.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/inductor/aoti_runner/model_container_runner.h>

#include <dlfcn.h>
#include <sys/stat.h>
#include <unordered_map>

namespace oxfuse::internal {
namespace {

constexpr size_t cpu_padding = 64, gpu_padding = 256;  // libraries tell a constant's bytes rounded up to these

bool has_op(const std::string& qualified) {
  return c10::Dispatcher::singleton().findOp(c10::OperatorName(qualified, "")).has_value();
}

// Return a spelling of `path` that belongs to the file that is there now. The system's loader takes a library that it has by the
// same name for the same library, and never forgets one with C++ statics: an artifact that was compiled again into its folder
// would so be run with the programs of the old one. It compares names as they are spelled, and then files; this one spells who
// the file is, in `/` and `/./`.
std::string loadable_path(const std::filesystem::path& path) {
  const std::filesystem::path real = std::filesystem::canonical(path);
  struct stat found{};
  if (stat(real.c_str(), &found)) {
    throw damaged(path.string(), "does not exist");
  }
  Sha256 identity;
  const int64_t told[] = {
      static_cast<int64_t>(found.st_dev), static_cast<int64_t>(found.st_ino), found.st_mtim.tv_sec, found.st_mtim.tv_nsec,
      found.st_size
  };
  identity.update(told, sizeof(told));
  std::string out = real.parent_path().string();
  const auto digest = identity.digest();
  for (int bit = 0; bit < 128; ++bit) {
    out += digest[bit / 8] >> (bit % 8) & 1 ? "/." : "/";
  }
  return out + "/" + real.filename().string();
}

}  // namespace

// torch's runner by its base class, which loads and runs a library for any device: those for single devices add no more than a
// stream, for which the base takes the device's default, the one that everything here is queued on. So a libtorch with CUDA
// serves without its headers.
class Program::Runner final : public torch::inductor::AOTIModelContainerRunner {
 public:
  Runner(const std::string& library, at::Device device, const std::string& folder)
      // "single threaded" means without events that tell which of several instances is free: there is one
      : AOTIModelContainerRunner(library, 1, device.str(), folder, /*run_single_threaded=*/!device.is_cpu()) {}

  size_t inputs() const { return count("AOTInductorModelContainerGetNumInputs"); }
  size_t outputs() const { return count("AOTInductorModelContainerGetNumOutputs"); }

  // Return the bytes of each constant that the library wants, by the name that it uses.
  std::unordered_map<std::string, size_t> constant_bytes() const {
    const auto bytes_of = symbol<AOTIRuntimeError(AOTInductorModelContainerHandle, size_t, size_t*)>(
        "AOTInductorModelContainerGetConstantDataSize"
    );
    std::unordered_map<std::string, size_t> out;
    const size_t constants = count("AOTInductorModelContainerGetNumConstants");
    for (size_t index = 0; index < constants; ++index) {
      const char* name = nullptr;
      size_t bytes = 0;
      if (get_constant_name_func_(container_handle_, index, &name) || bytes_of(container_handle_, index, &bytes)) {
        throw Failure(
            OXFUSE_BAD_ARTIFACT, "The program does not tell its constants: it is damaged. Compile the checkpoint again."
        );
      }
      out[name] = bytes;
    }
    return out;
  }

 private:
  template <typename Signature>
  Signature* symbol(const char* name) const {
    return reinterpret_cast<Signature*>(model_so_->sym(name));
  }

  size_t count(const char* name) const {
    size_t out = 0;
    if (symbol<AOTIRuntimeError(AOTInductorModelContainerHandle, size_t*)>(name)(container_handle_, &out)) {
      throw Failure(OXFUSE_BAD_ARTIFACT, std::string("The program does not answer ") + name + ": it is damaged. Compile again.");
    }
    return out;
  }
};

void load_ops_library(const std::filesystem::path& folder, const OpsLibrary& spec) {
  if (has_op(spec.probe)) {
    return;
  }
  const std::string path = std::filesystem::absolute(folder / spec.path).string();
  check_library(path, spec.probe.substr(spec.probe.rfind(':') + 1));
  if (dlopen(path.c_str(), RTLD_NOW) == nullptr) {  // never closed: what it registers stays
    throw Failure(
        OXFUSE_BAD_ARTIFACT, path + " cannot be loaded: " + dlerror() + ". Compile the checkpoint again on this machine."
    );
  }
  if (!has_op(spec.probe)) {
    throw damaged(path, "does not register the op " + shown(spec.probe));
  }
}

TeamSwitch team_switch(const OpsLibrary& spec) {
  const std::string tag = spec.probe.substr(spec.probe.rfind('_') + 1);
  const auto op = c10::Dispatcher::singleton().findOp(c10::OperatorName("oxfuse::few_" + tag + "_address", ""));
  if (!op) {
    return nullptr;
  }
  torch::jit::Stack results;
  op->callBoxed(results);
  return reinterpret_cast<TeamSwitch>(results.at(0).toInt());
}

Program::Program(
    const std::filesystem::path& folder, const ProgramSpec& spec, const std::map<std::string, at::Tensor>& weights,
    at::Device device
)
    : name_(spec.name) {
  const std::filesystem::path path = folder / spec.path / spec.library;
  check_library(path, "AOTInductorModelContainerCreateWithDevice");
  const std::string library = loadable_path(path);
  try {
    runner_ = std::make_unique<Runner>(library, device, std::filesystem::canonical(path).parent_path().string());
    if (runner_->inputs() != spec.inputs.size() || runner_->outputs() != 1) {
      throw damaged(
          path.string(), "takes " + std::to_string(runner_->inputs()) + " inputs and gives " +
                             std::to_string(runner_->outputs()) + " outputs, the manifest says " +
                             std::to_string(spec.inputs.size()) + " and 1"
      );
    }
    const auto dtypes = runner_->getConstantNamesToDtypes();
    const auto bytes = runner_->constant_bytes();
    std::unordered_map<std::string, at::Tensor> bound;
    for (const auto& [name, qualified] : runner_->getConstantNamesToOriginalFQNs()) {
      auto stored = spec.constants.find(name);
      stored = stored == spec.constants.end() ? spec.constants.find(qualified) : stored;
      const auto weight = stored == spec.constants.end() ? weights.end() : weights.find(stored->second);
      if (weight == weights.end()) {
        const std::string mapped = stored == spec.constants.end() ? "nothing" : shown(stored->second);
        throw damaged(path.string(), "wants the constant " + shown(qualified) + ", which the manifest maps to " + mapped);
      }
      const size_t held = weight->second.nbytes(), wanted = bytes.at(name);
      const bool same_size = held <= wanted && wanted - held < (device.is_cpu() ? cpu_padding : gpu_padding);
      if (dtypes.at(name) != static_cast<int32_t>(weight->second.scalar_type()) || !same_size) {
        throw damaged(
            path.string(), "wants the constant " + shown(qualified) + " with dtype code " + std::to_string(dtypes.at(name)) +
                               " and " + std::to_string(wanted) + " bytes, " + shown(weight->first) + " is " +
                               c10::toString(weight->second.scalar_type()) + " of " + std::to_string(held)
        );
      }
      bound.emplace(name, weight->second);
    }
    runner_->update_constant_buffer(bound, /*use_inactive=*/false, /*validate_full_updates=*/true, /*user_managed=*/true);
  } catch (const Failure&) {
    throw;
  } catch (const std::exception& error) {
    throw Failure(
        OXFUSE_BAD_ARTIFACT,
        path.string() + " cannot be loaded: " + first_line(error.what()) + ". Compile the checkpoint again on this machine."
    );
  }
}

Program::~Program() = default;

at::Tensor Program::run(const std::vector<at::Tensor>& inputs) {
  try {
    return runner_->run(inputs).at(0);
  } catch (const c10::OutOfMemoryError&) {
    throw;
  } catch (const std::exception& error) {
    throw Failure(OXFUSE_INTERNAL, "The program " + name_ + " failed: " + first_line(error.what()));
  }
}

}  // namespace oxfuse::internal
