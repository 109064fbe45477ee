// The paged cache: how many blocks it needs, which of them are in use and by how many sequences, and the memory behind them.
// The arithmetic is that of runtime/cache_size.py and runtime/memory_plan.py, the pool that of runtime/blocks.py.
#pragma once

#include "manifest.h"

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace oxfuse::internal {

// How many blocks each group gets (block 0 included), and the bytes that they would take when all are written.
struct CacheSize {
  std::vector<int64_t> blocks;
  int64_t bytes = 0;
};

// Return the most tokens that one sequence adds to a step.
int64_t prefill_chunk(const Limits& limits);

// Return how many blocks `tokens` tokens fill.
int64_t blocks_for(int64_t tokens, int64_t block_size);

// Return the bytes of one block of a group: keys and values of `block_size` tokens in each of its layers.
int64_t block_bytes(const CacheSpec& spec, const CacheGroup& group);

// Choose the block counts: enough for `max_batch` sequences of `max_context`, or what fits in `cache_bytes` (0: no cap). Throws
// Failure where not even one chunk fits. `chunk` and `reserve` are tokens.
CacheSize size_cache(const CacheSpec& spec, const Limits& limits, int64_t chunk, int64_t reserve, int64_t cache_bytes);

// Return the limits of steps on a GPU, where no more tokens are allowed than can come together.
Limits gpu_step_limits(const Limits& limits);

// Return the bytes that a GPU's caches may take beside `weights` bytes of weights. Throws Failure that prints the bytes where the
// smallest cache, or one of `cache_bytes` where that is not 0, does not fit.
int64_t plan_gpu_caches(
    const Manifest& manifest, const Limits& limits, int64_t chunk, int64_t weights, int64_t free, int64_t cache_bytes
);

// Counted references to the blocks of one group, numbered from 1 to `blocks` - 1. Block 0 is never handed out: it pads tables and
// stands for freed entries. Low numbers go first, so that what was never needed is never committed.
class BlockPool {
 public:
  explicit BlockPool(int64_t blocks) : blocks_(blocks) {}

  int64_t free() const { return blocks_ - 1 - used_; }
  int64_t used() const { return used_; }
  int64_t touched() const { return fresh_ - 1; }  // handed out since the pool was made or reset
  bool shared(int64_t block) const { return references_[block] > 1; }

  // Hand out a block with one reference. The caller has looked at `free`.
  int64_t take();

  // Add a reference; block 0 is passed over.
  void share(int64_t block);

  // Remove a reference, and take the block back when it was the last; block 0 is passed over.
  void drop(int64_t block);

  // Forget which blocks have been handed out; nobody holds one.
  void reset();

 private:
  int64_t blocks_;
  int64_t used_ = 0;
  int64_t fresh_ = 1;
  std::vector<uint32_t> references_ = {0};  // by block; grows as blocks are first handed out
  std::vector<int64_t> returned_;
};

// K and V of each layer in layer order, [blocks, kv_heads, head_dim, block_size] and [blocks, kv_heads, block_size, head_dim]. On
// a CPU they are virtual memory, zeros that the system commits page by page as they are written.
class Caches {
 public:
  Caches(const CacheSpec& spec, const CacheSize& size, at::Device device);
  ~Caches();
  Caches(const Caches&) = delete;
  Caches& operator=(const Caches&) = delete;

  const std::vector<at::Tensor>& tensors() const { return tensors_; }

  // Copy block `source` to block `target` in these layers.
  void copy_block(const std::vector<int64_t>& layers, int64_t source, int64_t target);

  // Give the memory behind the caches back to the system, on a CPU. They read as zeros then.
  void discard();

 private:
  struct Pages {
    void* begin;
    size_t bytes;
  };

  at::Tensor reserve(const std::vector<int64_t>& shape, at::ScalarType dtype);
  void unmap();

  std::vector<Pages> pages_;
  std::vector<at::Tensor> tensors_;
};

}  // namespace oxfuse::internal
