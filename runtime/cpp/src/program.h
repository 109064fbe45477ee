// One compiled program: an unpacked AOTInductor library, run with weights that it borrows. Only this file touches torch's runner
// of such libraries, which torch calls private.
#pragma once

#include "manifest.h"

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace oxfuse::internal {

// Load the C++ ops that programs call, unless they are registered already, by whatever copy of the library. Throws Failure.
void load_ops_library(const std::filesystem::path& folder, const OpsLibrary& spec);

// Has threads of the C++ ops' own share steps of at most `team_rows` tokens. It is called on the thread that runs the step, with
// the number of threads and 1 before it, with 0 and torch's number of threads after it. passes/fusions/threads.h has both.
using TeamSwitch = void (*)(int64_t threads, int64_t regions);
constexpr int64_t team_rows = 4;

// Return the switch of the loaded ops of `spec`, or null where they are of an older version, without threads of their own.
TeamSwitch team_switch(const OpsLibrary& spec);

class Program {
 public:
  // Load the library of `spec` and give it its constants from `weights`, which must outlive it. Throws Failure where it cannot be
  // loaded, or wants a constant that the manifest or the weight file lacks or has with another dtype or size.
  Program(
      const std::filesystem::path& folder, const ProgramSpec& spec, const std::map<std::string, at::Tensor>& weights,
      at::Device device
  );
  ~Program();

  // Run one step; changes the caches among `inputs`. Return the only output. Throws Failure where the library fails.
  at::Tensor run(const std::vector<at::Tensor>& inputs);

 private:
  class Runner;

  std::string name_;
  std::unique_ptr<Runner> runner_;
};

}  // namespace oxfuse::internal
