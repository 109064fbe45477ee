#include "cache.h"

#include "failure.h"
#include "weights.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <algorithm>
#include <cassert>
#include <cerrno>
#include <cstring>
#include <sys/mman.h>
#include <system_error>
#include <unistd.h>

namespace oxfuse::internal {
namespace {

constexpr int64_t prefill_tokens = 640;             // enough to fill the experts' tiles, few enough that decodes need not wait long
constexpr int64_t prefix_bytes = int64_t(1) << 30;  // as runtime/cache_size.py
constexpr uintptr_t cache_alignment = 16;  // bytes; a program copies a cache that is not, and what it writes is lost
constexpr int64_t gpu_step_tokens = 2048;  // as runtime/memory_plan.py, as the next four
constexpr int64_t gpu_rows = 128;
constexpr int64_t gpu_reserve = int64_t(512) << 20;
constexpr int64_t gpu_token_bytes = int64_t(256) << 10;

// Numbers of a damaged manifest may multiply to anything.
int64_t times(int64_t a, int64_t b) {
  int64_t out = 0;
  if (__builtin_mul_overflow(a, b, &out)) {
    throw Failure(OXFUSE_BAD_ARTIFACT, "The manifest's cache and limits multiply beyond 64 bits: it is damaged. Compile again.");
  }
  return out;
}

int64_t plus(int64_t a, int64_t b) {
  int64_t out = 0;
  if (__builtin_add_overflow(a, b, &out)) {
    throw Failure(OXFUSE_BAD_ARTIFACT, "The manifest's cache and limits add up beyond 64 bits: it is damaged. Compile again.");
  }
  return out;
}

// Return the most blocks of a group that a sequence holds at any time while it grows to `tokens` tokens: a sliding group needs no
// more than its window, the reserve, one chunk, and the partial block at the window's old end.
int64_t sequence_blocks(const CacheGroup& group, int64_t tokens, int64_t block_size, int64_t chunk, int64_t reserve) {
  const int64_t blocks = blocks_for(tokens, block_size);
  return group.window ? std::min(blocks, blocks_for(plus(group.window, plus(reserve, chunk)), block_size) + 1) : blocks;
}

// Return the cache for `units` blocks' worth of sequences of `max_context`, of each group no less than one chunk needs.
CacheSize sized(const CacheSpec& spec, const Limits& limits, int64_t units, int64_t chunk, int64_t reserve) {
  const int64_t longest = blocks_for(limits.max_context, spec.block_size);
  CacheSize out;
  for (const CacheGroup& group : spec.groups) {
    // one more for the copy of a shared block
    const int64_t full = sequence_blocks(group, limits.max_context, spec.block_size, chunk, reserve) + 1;
    const int64_t least = group.window ? full : std::min(full, blocks_for(chunk, spec.block_size) + 2);
    out.blocks.push_back(1 + std::max(least, times(units, full) / longest));
    out.bytes = plus(out.bytes, times(out.blocks.back(), block_bytes(spec, group)));
  }
  return out;
}

}  // namespace

int64_t prefill_chunk(const Limits& limits) {
  return std::min({prefill_tokens, limits.max_step_tokens, limits.max_context});
}

int64_t blocks_for(int64_t tokens, int64_t block_size) {
  return tokens / block_size + (tokens % block_size != 0);
}

int64_t block_bytes(const CacheSpec& spec, const CacheGroup& group) {
  int64_t out = 0;
  const auto item = static_cast<int64_t>(c10::elementSize(dtype_of(spec.dtype)));
  for (const int64_t layer : group.layers) {
    const int64_t values = times(times(spec.kv_heads[layer], spec.head_dim[layer]), times(2, spec.block_size));
    out = plus(out, times(values, item));
  }
  return out;
}

CacheSize size_cache(const CacheSpec& spec, const Limits& limits, int64_t chunk, int64_t reserve, int64_t cache_bytes) {
  const int64_t units = times(limits.max_batch, blocks_for(limits.max_context, spec.block_size));
  CacheSize whole = sized(spec, limits, units, chunk, reserve);
  if (cache_bytes == 0 || whole.bytes <= cache_bytes) {
    return whole;
  }
  const CacheSize least = sized(spec, limits, 0, chunk, reserve);
  if (least.bytes > cache_bytes) {
    throw Failure(
        OXFUSE_BAD_ARGUMENT, "cache_bytes is " + std::to_string(cache_bytes) +
                                 "; the smallest cache that can run a prefill chunk of " + std::to_string(chunk) +
                                 " tokens takes " + std::to_string(least.bytes) + " bytes. Give at least that much."
    );
  }
  int64_t low = 0, high = units;  // low fits, high does not
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (sized(spec, limits, middle, chunk, reserve).bytes <= cache_bytes ? low : high) = middle;
  }
  return sized(spec, limits, low, chunk, reserve);
}

int64_t prefix_bound(const CacheSize& size, bool claimed, int64_t asked) {
  return std::min(size.bytes, asked >= 0 ? asked : claimed ? size.bytes : prefix_bytes);
}

Limits gpu_step_limits(const Limits& limits) {
  const int64_t together = times(limits.max_batch, prefill_chunk(limits));
  const int64_t tokens = std::min({limits.max_step_tokens, std::max(gpu_step_tokens, limits.max_batch), together});
  return {limits.max_context, limits.max_batch, tokens};
}

int64_t plan_gpu_caches(
    const Manifest& manifest, const Limits& limits, int64_t chunk, int64_t weights, int64_t free, int64_t cache_bytes
) {
  const int64_t logits = gpu_rows * times(manifest.vocab_size, 8);
  const int64_t workspace = plus(logits, times(limits.max_step_tokens, gpu_token_bytes));
  const int64_t left = free - weights - workspace - gpu_reserve;
  const int64_t least = sized(manifest.cache, limits, 0, chunk, chunk).bytes;
  const int64_t wanted = size_cache(manifest.cache, limits, chunk, chunk, cache_bytes).bytes;
  const int64_t needed = cache_bytes ? wanted : least;
  if (needed > left) {
    throw Failure(
        OXFUSE_OUT_OF_MEMORY,
        "The GPU has " + std::to_string(free) + " bytes free, the artifact needs " +
            std::to_string(plus(plus(weights, needed), workspace + gpu_reserve)) + ": weights " + std::to_string(weights) +
            ", caches " + std::to_string(needed) + ", workspace of a step " + std::to_string(workspace) + ", reserve " +
            std::to_string(gpu_reserve) +
            ". End what else uses its memory, give a smaller cache_bytes, or compile with a smaller max_context."
    );
  }
  return std::min(wanted, left);
}

void BlockPool::watch(int64_t* clock, std::function<void(int64_t)> on_forget) {
  clock_ = clock;
  on_forget_ = std::move(on_forget);
}

int64_t BlockPool::take(bool spare) {
  assert(free() > 0);
  if (returned_.empty() && !kept_.empty() && (spare || (blank_.empty() && fresh_ == blocks_))) {
    let_go();
  }
  int64_t block = fresh_;
  if (!returned_.empty()) {
    block = returned_.back();
    returned_.pop_back();
  } else if (!blank_.empty()) {
    block = blank_.back();
    blank_.pop_back();
  } else {
    ++fresh_;
    references_.push_back(0);
    remembered_.push_back(false);
    let_go_at_.push_back(0);
  }
  references_[block] = 1;
  ++used_;
  return block;
}

void BlockPool::share(int64_t block) {
  if (block && ++references_[block] == 1) {
    kept_.erase(let_go_at_[block]);
    ++used_;
  }
}

void BlockPool::drop(int64_t block) {
  if (block && --references_[block] == 0) {
    --used_;
    if (remembered_[block]) {
      let_go_at_[block] = ++*clock_;
      kept_[let_go_at_[block]] = block;
    } else {
      returned_.push_back(block);
    }
  }
}

void BlockPool::forget(int64_t block) {
  on_forget_(block);
  remembered_[block] = false;
}

void BlockPool::let_go() {
  const int64_t block = kept_.begin()->second;
  forget(block);
  kept_.erase(kept_.begin());
  returned_.push_back(block);
}

std::vector<std::pair<int64_t, int64_t>> BlockPool::blank() {
  std::sort(returned_.begin(), returned_.end());
  std::vector<std::pair<int64_t, int64_t>> runs;
  for (const int64_t block : returned_) {
    if (!runs.empty() && runs.back().second == block) {
      ++runs.back().second;
    } else {
      runs.emplace_back(block, block + 1);
    }
  }
  blank_.insert(blank_.end(), returned_.rbegin(), returned_.rend());  // low numbers first again
  returned_.clear();
  return runs;
}

void BlockPool::reset() {
  assert(used_ == 0 && kept_.empty());
  returned_.clear();
  blank_.clear();
  references_.assign(1, 0);
  remembered_.assign(1, false);
  let_go_at_.assign(1, 0);
  fresh_ = 1;
}

Caches::Caches(const CacheSpec& spec, const CacheSize& size, at::Device device) {
  std::vector<int64_t> blocks(spec.kv_heads.size());
  for (size_t group = 0; group < spec.groups.size(); ++group) {
    for (const int64_t layer : spec.groups[group].layers) {
      blocks[layer] = size.blocks[group];
    }
  }
  const at::ScalarType dtype = dtype_of(spec.dtype);
  try {
    for (size_t layer = 0; layer < blocks.size(); ++layer) {
      const int64_t heads = spec.kv_heads[layer], dim = spec.head_dim[layer];
      for (const auto& shape :
           {std::vector<int64_t>{blocks[layer], heads, dim, spec.block_size}, {blocks[layer], heads, spec.block_size, dim}}) {
        tensors_.push_back(device.is_cpu() ? reserve(shape, dtype) : at::empty(shape, at::TensorOptions(dtype).device(device)));
        if (reinterpret_cast<uintptr_t>(tensors_.back().data_ptr()) % cache_alignment) {
          throw Failure(
              OXFUSE_INTERNAL, "A cache begins at an address that is no multiple of 16, where a program would copy it."
          );
        }
      }
    }
  } catch (...) {
    unmap();
    throw;
  }
}

Caches::~Caches() {
  unmap();
}

void Caches::unmap() {
  tensors_.clear();
  for (const Pages& pages : pages_) {
    munmap(pages.begin, pages.bytes);
  }
}

at::Tensor Caches::reserve(const std::vector<int64_t>& shape, at::ScalarType dtype) {
  int64_t bytes = static_cast<int64_t>(c10::elementSize(dtype));
  for (const int64_t size : shape) {
    bytes = times(bytes, size);
  }
  void* begin = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (begin == MAP_FAILED) {
    throw Failure(
        OXFUSE_OUT_OF_MEMORY, "The system refuses to reserve " + std::to_string(bytes) +
                                  " bytes for a cache: " + std::generic_category().message(errno) +
                                  ". Load with a smaller cache_bytes, or compile with a smaller max_context or max_batch."
    );
  }
  pages_.push_back({begin, static_cast<size_t>(bytes)});
  return at::from_blob(begin, shape, at::TensorOptions(dtype));
}

void Caches::copy_block(const std::vector<int64_t>& layers, int64_t source, int64_t target) {
  for (const int64_t layer : layers) {
    for (const int64_t cache : {2 * layer, 2 * layer + 1}) {
      tensors_[cache].select(0, target).copy_(tensors_[cache].select(0, source));
    }
  }
}

void Caches::discard(const std::vector<int64_t>& layers) {
  for (const int64_t layer : layers) {
    for (size_t cache = 2 * layer; cache < 2 * static_cast<size_t>(layer) + 2 && cache < pages_.size(); ++cache) {
      madvise(pages_[cache].begin, pages_[cache].bytes, MADV_DONTNEED);  // where the system refuses, nothing has changed
    }
  }
}

void Caches::discard(const std::vector<int64_t>& layers, int64_t first, int64_t last) {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  for (const int64_t layer : layers) {
    for (size_t cache = 2 * layer; cache < 2 * static_cast<size_t>(layer) + 2 && cache < pages_.size(); ++cache) {
      const auto base = reinterpret_cast<uintptr_t>(pages_[cache].begin);
      const uintptr_t block = tensors_[cache].nbytes() / tensors_[cache].size(0);
      const uintptr_t begin = (base + first * block + page - 1) / page * page, end = (base + last * block) / page * page;
      if (begin < end) {
        madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
      }
    }
  }
}

}  // namespace oxfuse::internal
