// What this machine offers, against what an artifact requires. A program is machine code for one torch and one instruction set:
// running it elsewhere ends in a crash without a word. So everything is compared before anything is loaded.
#pragma once

#include "manifest.h"

#include <string>
#include <vector>

namespace oxfuse::internal {

// One GPU as its driver tells: `arch` is its compute capability as compilers spell it, "sm_90".
struct Gpu {
  int index = 0;
  std::string name;
  std::string arch;
};

// The GPUs of this machine, and why there is none where there is none.
struct Gpus {
  std::vector<Gpu> found;
  std::string problem;
};

// Ask the driver's library, which needs no CUDA toolkit and makes no context on a device.
Gpus find_gpus();

// Compare the host with `need`. Throws Failure that lists every misfit and what to do about it.
void check_host(const Requirements& need, const Gpus& gpus);

// Return the GPU that programs for `archs` are to run on: "cuda:N" names it, "" and "cuda" take the first that fits. Throws
// Failure.
Gpu choose_gpu(const std::vector<std::string>& archs, const std::string& device, const Gpus& gpus);

}  // namespace oxfuse::internal
