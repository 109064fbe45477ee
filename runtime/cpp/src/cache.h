// The paged cache: how many blocks it needs, which of them are in use and by how many sequences, and the memory behind them.
// The arithmetic is that of runtime/cache_size.py and runtime/memory_plan.py, the pool that of runtime/blocks.py.
#pragma once

#include "manifest.h"

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <map>
#include <utility>
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

// Return the most bytes of a cache of `size` that stay for later sequences: `asked`, or where that is -1 the default. Where the
// cache's memory is `claimed` at once, nothing is saved by less than all of it.
int64_t prefix_bound(const CacheSize& size, bool claimed, int64_t asked);

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
// stands for freed entries. Low numbers go first, so that what was never needed is never committed. A block whose content is
// remembered stays as it is when its last reference goes: it is kept, and free all the same, since it is handed out again, the
// least recently used first, when no other is left.
class BlockPool {
 public:
  explicit BlockPool(int64_t blocks) : blocks_(blocks) {}

  // Let `clock` tell which of two blocks was let go of first, and `on_forget` hear of remembered blocks before they are written.
  void watch(int64_t* clock, std::function<void(int64_t)> on_forget);

  int64_t free() const { return blocks_ - 1 - used_; }  // kept ones included
  int64_t used() const { return used_; }
  int64_t kept() const { return static_cast<int64_t>(kept_.size()); }
  int64_t oldest() const { return kept_.begin()->first; }  // when the least recently used of them lost its last reference
  int64_t returned() const { return static_cast<int64_t>(returned_.size()); }  // there may be memory behind them for nothing
  bool shared(int64_t block) const { return references_[block] > 1; }
  bool remembers(int64_t block) const { return remembered_[block]; }

  // Hand out a block with one reference. The caller has looked at `free`. With `spare`, kept blocks are taken before those that
  // have no memory behind them yet.
  int64_t take(bool spare = false);

  // Add a reference; block 0 is passed over.
  void share(int64_t block);

  // Remove a reference, and take the block back when it was the last; block 0 is passed over.
  void drop(int64_t block);

  // Keep a held block's content beyond its last reference, until the block is needed or let go.
  void remember(int64_t block) { remembered_[block] = true; }

  // Remember a held or kept block's content no more.
  void forget(int64_t block);

  // Forget the least recently used of the kept blocks, of which there is one, and take it back.
  void let_go();

  // Forget which blocks have been handed out; nobody holds one, and none is kept.
  void reset();

  // Return the blocks behind which there is memory for nothing, as runs [first, last) of neighbours; the caller gives it back.
  std::vector<std::pair<int64_t, int64_t>> blank();

 private:
  int64_t blocks_;
  int64_t used_ = 0;
  int64_t fresh_ = 1;
  std::vector<uint32_t> references_ = {0};  // by block; grows as blocks are first handed out, as the next two
  std::vector<bool> remembered_ = {false};
  std::vector<int64_t> let_go_at_ = {0};
  std::map<int64_t, int64_t> kept_;  // blocks by when they lost their last reference
  std::vector<int64_t> returned_;
  std::vector<int64_t> blank_;  // handed out before; their memory was given back to the system
  int64_t* clock_ = nullptr;
  std::function<void(int64_t)> on_forget_;
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

  // Give the memory behind the caches of these layers back to the system, on a CPU, or behind their blocks from `first` up to
  // before `last` as far as they fill pages. It reads as zeros then.
  void discard(const std::vector<int64_t>& layers);
  void discard(const std::vector<int64_t>& layers, int64_t first, int64_t last);

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
