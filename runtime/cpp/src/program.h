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
