// Weight files: safetensors on disk become tensors that cost no memory of their own. Pages come from the page cache, read-only
// and shared by all sessions, programs and processes; a write through such a tensor is a segmentation fault, never a silent
// change.
#pragma once

#include "files.h"
#include "manifest.h"

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace oxfuse::internal {

// Where one tensor lies: `begin` and `end` are offsets in the file, in bytes.
struct Extent {
  at::ScalarType dtype;
  std::vector<int64_t> shape;
  int64_t begin = 0;
  int64_t end = 0;
};

// Return the dtype that a manifest calls so. Throws Failure for one that artifacts do not have.
at::ScalarType dtype_of(const std::string& name);

// A weight file that was compared with the manifest: size, header's hash, dtype and shape of each tensor, and that each lies
// inside the file.
class WeightMap {
 public:
  // Map the file of `spec` in `folder`. Throws Failure naming the first thing that differs.
  WeightMap(const std::filesystem::path& folder, const WeightFile& spec);
  ~WeightMap();
  WeightMap(const WeightMap&) = delete;
  WeightMap& operator=(const WeightMap&) = delete;

  // Compare the hash of every tensor with the manifest's. Reads the file. Throws Failure naming a tensor that differs.
  void check_hashes(const WeightFile& spec) const;

  // Add every tensor to `into` by its name. They borrow the map.
  void add_tensors(std::map<std::string, at::Tensor>& into) const;

 private:
  File file_;
  std::map<std::string, Extent> extents_;
  void* pages_ = nullptr;
};

}  // namespace oxfuse::internal
