#include "host.h"

#include "failure.h"

#include <ATen/Context.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <charconv>
#include <dlfcn.h>
#include <fstream>
#include <gnu/libc-version.h>
#include <set>
#include <sstream>
#include <sys/utsname.h>

namespace oxfuse::internal {
namespace {

// Return the numbers that a version begins with: "2.13.0+cpu" gives 2, 13, 0.
std::vector<int> version_numbers(const std::string& text) {
  std::vector<int> out;
  const char *at = text.data(), *end = at + text.size();
  while (at < end) {
    int part = 0;
    const auto [next, error] = std::from_chars(at, end, part);
    if (error != std::errc()) {
      break;
    }
    out.push_back(part);
    at = next;
    if (at == end || *at != '.') {
      break;
    }
    ++at;
  }
  return out;
}

std::set<std::string> cpu_features() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("flags", 0) == 0 || line.rfind("Features", 0) == 0) {
      std::istringstream words(line.substr(std::min(line.find(':') + 1, line.size())));
      return {std::istream_iterator<std::string>(words), {}};
    }
  }
  return {};
}

std::string join(const std::vector<std::string>& words, const char* between) {
  std::string out;
  for (const std::string& word : words) {
    out += (out.empty() ? "" : between) + word;
  }
  return out.substr(0, 300);
}

std::string tell(const Gpus& gpus) {
  std::vector<std::string> lines;
  for (const Gpu& gpu : gpus.found) {
    lines.push_back("cuda:" + std::to_string(gpu.index) + ", " + gpu.name + ", " + gpu.arch);
  }
  return lines.empty() ? gpus.problem : join(lines, "; ");
}

bool contains(const std::vector<std::string>& archs, const std::string& arch) {
  return std::find(archs.begin(), archs.end(), arch) != archs.end();
}

void add_gpu_misfits(const std::vector<std::string>& archs, const Gpus& gpus, std::vector<std::string>& wrong) {
  const std::string needed = join(archs, " or ");
  const bool fits = std::any_of(gpus.found.begin(), gpus.found.end(), [&](const Gpu& g) { return contains(archs, g.arch); });
  if (!at::hasCUDA()) {
    wrong.push_back(
        "libtorch is its CPU build or finds no GPU, the artifact's programs run on a GPU of " + needed +
        ": link with its CUDA build (pytorch.org), or compile with --target cpu"
    );
  }
  if (!gpus.problem.empty()) {
    wrong.push_back(
        gpus.problem + ", a GPU of " + needed + " is needed: run it where there is one, or compile with --target cpu"
    );
  } else if (!fits) {
    wrong.push_back(
        "the GPUs here (" + tell(gpus) + ") are not of " + needed +
        ", which the artifact was compiled for: compile for what is here"
    );
  }
}

// The driver's functions that tell what GPUs there are; cuda.h's numbers are part of its binary interface.
template <typename... Args>
int call_driver(void* library, const char* name, Args... args) {
  const auto function = reinterpret_cast<int (*)(Args...)>(dlsym(library, name));
  return function == nullptr ? -1 : function(args...);
}

}  // namespace

Gpus find_gpus() {
  constexpr int major_attribute = 75, minor_attribute = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
  void* driver = dlopen("libcuda.so.1", RTLD_NOW);           // never closed: the driver does not expect it
  if (driver == nullptr) {
    return {{}, "there is no NVIDIA driver here (libcuda.so.1 cannot be loaded)"};
  }
  if (const int code = call_driver(driver, "cuInit", 0U)) {
    return {{}, "the NVIDIA driver finds no GPU that it can use (code " + std::to_string(code) + ")"};
  }
  int count = 0;
  call_driver(driver, "cuDeviceGetCount", &count);
  Gpus out;
  for (int index = 0; index < count; ++index) {
    int device = 0, major = 0, minor = 0;
    char name[256] = "";
    call_driver(driver, "cuDeviceGet", &device, index);
    call_driver(driver, "cuDeviceGetName", static_cast<char*>(name), static_cast<int>(sizeof(name)), device);
    call_driver(driver, "cuDeviceGetAttribute", &major, major_attribute, device);
    call_driver(driver, "cuDeviceGetAttribute", &minor, minor_attribute, device);
    out.found.push_back({index, name, "sm_" + std::to_string(major) + std::to_string(minor)});
  }
  if (out.found.empty()) {
    out.problem = "the NVIDIA driver shows no GPU to this process";
  }
  return out;
}

void check_host(const Requirements& need, const Gpus& gpus) {
  std::vector<std::string> wrong;
  const uint64_t abi = aoti_torch_abi_version();  // of the library that is loaded, which need not be the one of the headers
  const std::vector<int> torch = {static_cast<int>(abi >> 56 & 0xFF), static_cast<int>(abi >> 48 & 0xFF)};
  std::vector<int> wanted = version_numbers(need.torch);
  wanted.resize(std::min<size_t>(wanted.size(), 2));
  if (!need.torch.empty() && torch != wanted) {
    wrong.push_back(
        "libtorch is " + std::to_string(torch[0]) + "." + std::to_string(torch[1]) + ", the artifact was compiled for " +
        need.torch.substr(0, 40) + ": link with that version or compile with this one"
    );
  }
  std::string platform = need.platform;
  std::transform(platform.begin(), platform.end(), platform.begin(), [](unsigned char c) { return std::tolower(c); });
  if (!platform.empty() && platform != "linux") {
    wrong.push_back(
        "the platform is linux, the artifact was compiled for " + need.platform.substr(0, 40) + ": compile on this platform"
    );
  }
  utsname system{};
  uname(&system);
  if (!need.machine.empty() && need.machine != system.machine) {
    wrong.push_back(
        std::string("the machine is ") + system.machine + ", the artifact was compiled for " + need.machine.substr(0, 40) +
        ": compile on this machine"
    );
  } else {
    const auto here = cpu_features();
    std::vector<std::string> missing;
    std::copy_if(need.cpu_features.begin(), need.cpu_features.end(), std::back_inserter(missing), [&](const std::string& one) {
      return here.count(one) == 0;
    });
    if (!missing.empty()) {
      wrong.push_back(
          "the processor lacks " + join(missing, ", ") + ", which --cpu-isa " + need.cpu_isa.substr(0, 40) +
          " uses: compile here, or with --cpu-isa x86-64-v3 for older processors"
      );
    }
  }
  if (!need.glibc.empty() && version_numbers(gnu_get_libc_version()) < version_numbers(need.glibc)) {
    wrong.push_back(
        std::string("the C library is glibc ") + gnu_get_libc_version() + ", " + need.glibc.substr(0, 40) +
        " or later is needed: compile here"
    );
  }
  if (!need.gpu_archs.empty()) {
    add_gpu_misfits(need.gpu_archs, gpus, wrong);
  }
  if (!wrong.empty()) {
    std::string all;
    for (const std::string& one : wrong) {
      all += (all.empty() ? "" : "; ") + one;
    }
    throw Failure(OXFUSE_UNFIT_HOST, "The artifact does not fit this machine: " + all + ".");
  }
}

Gpu choose_gpu(const std::vector<std::string>& archs, const std::string& device, const Gpus& gpus) {
  if (device.rfind("cuda:", 0) == 0) {
    size_t index = 0;
    const char *begin = device.data() + 5, *end = device.data() + device.size();
    const auto [last, error] = std::from_chars(begin, end, index);
    if (error != std::errc() || last != end || index >= gpus.found.size()) {
      throw Failure(OXFUSE_BAD_ARGUMENT, "device is " + shown(device) + ", and this machine has " + tell(gpus) + ".");
    }
    if (!contains(archs, gpus.found[index].arch)) {
      throw Failure(
          OXFUSE_UNFIT_HOST, "The GPU " + device + " is of " + gpus.found[index].arch + ", the artifact was compiled for " +
                                 join(archs, " or ") + ": compile for it, or give another device."
      );
    }
    return gpus.found[index];
  }
  for (const Gpu& gpu : gpus.found) {
    if (contains(archs, gpu.arch)) {
      return gpu;
    }
  }
  throw Failure(
      OXFUSE_UNFIT_HOST, "The artifact was compiled for " + join(archs, " or ") + ", this machine has " + tell(gpus) + "."
  );
}

}  // namespace oxfuse::internal
