// Runs steps: turns "these tokens of these sequences" into steps of the program, over paged caches that it owns.
//
// A sequence is its tokens and how many of them the caches hold; the rest is pending. That is all the state there is, so a
// sequence whose blocks were taken away is merely pending again, and a rewind is a shorter list.
#pragma once

#include "cache.h"
#include "failure.h"
#include "manifest.h"
#include "prefix.h"
#include "program.h"
#include "weights.h"

#include <ATen/core/Tensor.h>

#include <memory>
#include <mutex>
#include <vector>

namespace oxfuse::internal {

struct TokenSequence {
  std::vector<int64_t> tokens;
  int64_t cached = 0;                        // tokens whose keys and values the blocks hold
  std::vector<std::vector<int64_t>> tables;  // of each group, its blocks in order
  std::vector<int64_t> live;                 // of each group, the first entry that is still held; those before it read 0
  Prefix* prefix = nullptr;                  // its last full block, as the PrefixCache knows it

  int64_t length() const { return static_cast<int64_t>(tokens.size()); }
  int64_t pending() const { return length() - cached; }
};

// The next `count` pending tokens of a sequence; logits are wanted if they are all of them.
struct Feed {
  TokenSequence* sequence;
  int64_t count;
};

// Caches, block pools and programs. Every function takes the lock for itself, and `advance` for one step at a time.
class Engine {
 public:
  // `step` runs anything, `decode`, where there is one, a token for each of up to `most_decodes` sequences. `threads` 0 leaves
  // torch's setting; `team` is null or what `team_switch` returned. Blocks of up to `prefix_cache_bytes` bytes stay when no sequence holds them, for those that begin alike.
  Engine(
      const Manifest& manifest, const Limits& limits, const CacheSize& size, int64_t prefix_cache_bytes, int64_t chunk,
      at::Device device, int threads, TeamSwitch team, std::unique_ptr<Program> step, std::unique_ptr<Program> decode, int64_t most_decodes
  );

  // Return an empty sequence.
  TokenSequence sequence() const;

  // Return a sequence with the same tokens that shares the blocks; whoever writes to a shared block copies it first.
  TokenSequence fork(const TokenSequence& source);

  // Give all blocks back. The tokens stay and are pending again.
  void release(TokenSequence& sequence);

  // Keep the first `length` tokens. Where a sliding group has freed blocks that the next token would see, everything is pending
  // again: keys and values of a layer follow from all earlier tokens, so nothing less than a new run gives them back exactly.
  void truncate(TokenSequence& sequence, int64_t length);

  // Run all that is pending of these sequences, none of which comes twice, and return the logits after the last token of each,
  // float32 [n, V]. Throws Failure; the sequences have then advanced as far as their steps succeeded.
  at::Tensor advance(const std::vector<TokenSequence*>& sequences);

  // Run the largest step that there will be, all padding, so that what memory it takes is there or is refused: for GPUs.
  void try_largest_step();

  int64_t used_blocks() const;
  int64_t steps() const;
  int64_t reused_tokens() const;

  const CacheSpec cache;
  const Limits limits;
  const CacheSize size;
  const int64_t chunk;  // most tokens of one sequence in a step; as many beyond the window stay, so that a rewind finds them
  const int64_t vocab_size;

 private:
  bool remembers(const TokenSequence& sequence, int64_t length) const;
  bool secure(TokenSequence& sequence, int64_t count);
  bool is_short(const std::vector<int64_t>& needs) const;
  void drop_all(TokenSequence& sequence);
  void cut(TokenSequence& sequence, int64_t length);
  void shrink();
  void free_old(TokenSequence& sequence);
  std::vector<Feed> plan(const std::vector<TokenSequence*>& sequences);
  at::Tensor run(const std::vector<Feed>& feeds, const std::vector<int64_t>& rows);
  at::Tensor run_program(Program& program, std::vector<at::Tensor> inputs);
  Failure full(const TokenSequence& sequence) const;

  const at::Device device_;
  const int threads_;
  const TeamSwitch team_;
  std::unique_ptr<Program> step_;
  std::unique_ptr<Program> decode_;
  const int64_t most_decodes_;
  const int64_t most_sequences_;
  mutable std::mutex lock_;
  std::vector<BlockPool> pools_;
  PrefixCache prefixes_;
  Caches caches_;
  int64_t steps_ = 0;
  int64_t reused_tokens_ = 0;
};

}  // namespace oxfuse::internal
