// Finds the longest beginning of a sequence that the block pools still hold, from whoever ran the same tokens before: the rules of
// runtime/prefix.py, for positions that count up from 0.
#pragma once

#include "cache.h"

#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

namespace oxfuse::internal {

struct TokenSequence;

// A block's worth of tokens after those of `parent`, and where the caches hold their keys and values.
struct Prefix {
  Prefix* parent = nullptr;
  std::vector<int64_t> content;
  std::map<std::vector<int64_t>, std::unique_ptr<Prefix>> children;
  std::vector<int64_t> blocks;  // of each group, 0 where there is none any more
  int64_t depth = 0;
  int64_t holders = 0;  // sequences whose last full block this is
};

// The tree over the pools of an engine, guarded as the engine is. With a bound of 0 bytes nothing is kept, and none found.
class PrefixCache {
 public:
  // A block that a step is about to fill: what it follows, and its tokens.
  using Block = std::pair<const Prefix*, std::vector<int64_t>>;

  PrefixCache(const CacheSpec& spec, std::vector<BlockPool>& pools, int64_t bound);
  ~PrefixCache();
  PrefixCache(const PrefixCache&) = delete;
  PrefixCache& operator=(const PrefixCache&) = delete;

  // Write to `block` what names the block that the next pending token goes to. False where the tokens do not fill it, or if off.
  bool next_block(const TokenSequence& sequence, Block& block) const;

  // Return how many tokens a sequence has whose last block this is.
  int64_t end(const Block& block) const { return (block.first->depth + 1) * size_; }

  // Let the sequence hold the longest run of kept blocks that its pending tokens go on with, up to its first `most` tokens, and
  // return how many tokens need not run any more.
  int64_t adopt(TokenSequence& sequence, int64_t most);

  // Enter the blocks that have become full since the sequence had `before` tokens in the caches. Where the tree has a block of the
  // same content already, the sequence takes that in place of its own.
  void record(TokenSequence& sequence, int64_t before);

  // Follow a sequence that was cut back to its first `length` tokens.
  void cut(TokenSequence& sequence, int64_t length);

  // Let `twin`, which shares all blocks of another sequence and was copied from it, hold what that holds.
  void fork(TokenSequence& twin);

  // Let the least recently used blocks go until those that nobody holds take no more than the bound.
  void settle();

  // Tell whether `needs` blocks of each group should be taken from kept ones before memory is used that was not yet: where blocks
  // held and kept take more than the bound together. Half of the bound is left for those who come while others run.
  bool crowded(const std::vector<int64_t>& needs) const;

  int64_t kept_bytes() const;

 private:
  Prefix* last(const TokenSequence& sequence) const;
  std::vector<int64_t> content(const TokenSequence& sequence, int64_t index) const;
  int64_t first_seen(size_t group, int64_t end) const;
  std::vector<Prefix*> follow(const TokenSequence& sequence, int64_t end) const;
  void move(TokenSequence& sequence, Prefix* node);
  void leave(Prefix* node);
  void prune(Prefix* node);

  const int64_t size_, bound_;
  std::vector<int64_t> windows_, bytes_;
  std::vector<BlockPool>& pools_;
  std::vector<std::map<int64_t, Prefix*>> nodes_;  // of each group, by block
  std::unique_ptr<Prefix> root_;
  int64_t clock_ = 0;
};

}  // namespace oxfuse::internal
