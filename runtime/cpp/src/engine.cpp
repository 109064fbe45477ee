#include "engine.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <set>

namespace oxfuse::internal {
namespace {

constexpr int64_t kept_bytes = int64_t(8) << 20;  // caches that stay in memory while nothing runs: committing is not for nothing
constexpr int64_t most_gpu_rows = 128;            // what the memory of a step was planned for

// The number of threads inside an operator, for as long as a step runs. It belongs to the process, so that steps of models with
// different numbers must not restore each other's: those that set it run one at a time.
class Threads {
 public:
  explicit Threads(int count) {
    if (count) {
      lock_.emplace(mutex());
      before_ = at::get_num_threads();
      at::set_num_threads(count);
    }
  }

  ~Threads() {
    if (lock_) {
      at::set_num_threads(before_);
    }
  }

  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

 private:
  static std::mutex& mutex() {
    static std::mutex one;
    return one;
  }

  std::optional<std::lock_guard<std::mutex>> lock_;
  int before_ = 0;
};

// Gives the C++ ops' own threads a step of few tokens. torch's would be in their way, so it has one meanwhile.
class Team {
 public:
  Team(TeamSwitch team, int64_t tokens) : team_(tokens <= team_rows ? team : nullptr) {
    if (team_) {
      regions_ = at::get_num_threads();
      team_(regions_, 1);
    }
  }

  ~Team() {
    if (team_) {
      team_(0, regions_);
    }
  }

  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

 private:
  TeamSwitch team_;
  int64_t regions_ = 0;
};

at::Tensor integers(const std::vector<int64_t>& values, at::IntArrayRef shape) {
  at::Tensor out = at::empty(shape, at::kLong);
  std::copy(values.begin(), values.end(), out.mutable_data_ptr<int64_t>());
  return out;
}

std::vector<BlockPool> pools_of(const CacheSize& size) {
  return {size.blocks.begin(), size.blocks.end()};
}

}  // namespace

Engine::Engine(
    const Manifest& manifest, const Limits& limits, const CacheSize& size, int64_t prefix_cache_bytes, int64_t chunk,
    at::Device device, int threads, TeamSwitch team, std::unique_ptr<Program> step, std::unique_ptr<Program> decode, int64_t most_decodes
)
    : cache(manifest.cache),
      limits(limits),
      size(size),
      chunk(chunk),
      vocab_size(manifest.vocab_size),
      device_(device),
      threads_(threads),
      team_(team),
      step_(std::move(step)),
      decode_(std::move(decode)),
      most_decodes_(most_decodes),
      most_sequences_(device.is_cpu() ? limits.max_batch : std::min(limits.max_batch, most_gpu_rows)),
      pools_(pools_of(size)),
      prefixes_(cache, pools_, prefix_cache_bytes),
      caches_(manifest.cache, size, device) {}

TokenSequence Engine::sequence() const {
  TokenSequence out;
  out.tables.resize(cache.groups.size());
  out.live.resize(cache.groups.size());
  return out;
}

TokenSequence Engine::fork(const TokenSequence& source) {
  const std::lock_guard guard(lock_);
  TokenSequence twin = source;
  for (size_t group = 0; group < pools_.size(); ++group) {
    for (const int64_t block : twin.tables[group]) {
      pools_[group].share(block);
    }
  }
  prefixes_.fork(twin);
  return twin;
}

void Engine::release(TokenSequence& sequence) {
  const std::lock_guard guard(lock_);
  drop_all(sequence);
}

void Engine::drop_all(TokenSequence& sequence) {
  cut(sequence, 0);
  shrink();
}

// Let go of what the caches hold beyond `length` tokens, the last blocks first, so that others are found without them.
void Engine::cut(TokenSequence& sequence, int64_t length) {
  const int64_t keep = blocks_for(length, cache.block_size);
  size_t longest = 0;
  for (const auto& table : sequence.tables) {
    longest = std::max(longest, table.size());
  }
  for (int64_t entry = static_cast<int64_t>(longest) - 1; entry >= keep; --entry) {
    for (size_t group = 0; group < pools_.size(); ++group) {
      if (auto& table = sequence.tables[group]; entry < static_cast<int64_t>(table.size())) {
        pools_[group].drop(table[entry]);
        table.resize(entry);
      }
    }
  }
  for (int64_t& live : sequence.live) {
    live = std::min(live, keep);
  }
  sequence.cached = length;
  prefixes_.cut(sequence, length);
  prefixes_.settle();
}

// Give memory that holds nothing of use back to the system when no sequence runs, if it is worth the trouble.
void Engine::shrink() {
  int64_t idle = 0;
  for (size_t group = 0; group < pools_.size(); ++group) {
    if (pools_[group].used()) {
      return;
    }
    idle += pools_[group].returned() * block_bytes(cache, cache.groups[group]);
  }
  if (idle <= kept_bytes) {
    return;
  }
  for (size_t group = 0; group < pools_.size(); ++group) {
    const auto& layers = cache.groups[group].layers;
    if (pools_[group].kept()) {
      for (const auto& [first, last] : pools_[group].blank()) {
        caches_.discard(layers, first, last);
      }
    } else {
      caches_.discard(layers);
      pools_[group].reset();
    }
  }
}

// Tell whether the sequence can be continued after its first `length` tokens without running any of those again.
bool Engine::remembers(const TokenSequence& sequence, int64_t length) const {
  for (size_t group = 0; group < cache.groups.size(); ++group) {
    const int64_t window = cache.groups[group].window;
    if (window && std::max<int64_t>(0, length - window + 1) / cache.block_size < sequence.live[group]) {
      return false;
    }
  }
  return length <= sequence.cached;
}

void Engine::truncate(TokenSequence& sequence, int64_t length) {
  const std::lock_guard guard(lock_);
  sequence.tokens.resize(length);
  if (length >= sequence.cached) {
    return;
  }
  if (!remembers(sequence, length)) {
    drop_all(sequence);
    return;
  }
  cut(sequence, length);
}

bool Engine::is_short(const std::vector<int64_t>& needs) const {
  for (size_t group = 0; group < pools_.size(); ++group) {
    if (needs[group] > pools_[group].free()) {
      return true;
    }
  }
  return false;
}

// Make the next `count` tokens' blocks the sequence's own: take new ones, copy a shared one. False, and nothing done, if short.
bool Engine::secure(TokenSequence& sequence, int64_t count) {
  const int64_t end = blocks_for(sequence.cached + count, cache.block_size);
  const int64_t written = sequence.cached / cache.block_size, partial = sequence.cached % cache.block_size;
  std::vector<char> copied(pools_.size());
  for (size_t group = 0; group < pools_.size(); ++group) {
    const int64_t block = partial ? sequence.tables[group][written] : 0;
    copied[group] = partial && (pools_[group].shared(block) || pools_[group].remembers(block));
  }
  const auto count_needs = [&] {
    std::vector<int64_t> needs;
    for (size_t group = 0; group < pools_.size(); ++group) {
      needs.push_back(std::max<int64_t>(0, end - static_cast<int64_t>(sequence.tables[group].size())) + copied[group]);
    }
    return needs;
  };
  std::vector<int64_t> needs = count_needs();
  if (is_short(needs)) {
    for (size_t group = 0; group < pools_.size(); ++group) {
      if (copied[group] && !pools_[group].shared(sequence.tables[group][written])) {
        pools_[group].forget(sequence.tables[group][written]);  // kept for others alone: there is no room for that
        copied[group] = false;
      }
    }
    needs = count_needs();
    if (is_short(needs)) {
      return false;
    }
  }
  const bool spare = prefixes_.crowded(needs);
  for (size_t group = 0; group < pools_.size(); ++group) {
    auto& table = sequence.tables[group];
    int64_t more = needs[group];
    if (copied[group]) {
      const int64_t own = pools_[group].take(spare);
      caches_.copy_block(cache.groups[group].layers, table[written], own);
      pools_[group].drop(table[written]);
      table[written] = own;
      --more;
    }
    for (; more > 0; --more) {
      table.push_back(pools_[group].take(spare));
    }
  }
  return true;
}

void Engine::free_old(TokenSequence& sequence) {
  for (size_t group = 0; group < pools_.size(); ++group) {
    const int64_t window = cache.groups[group].window;
    if (window == 0) {
      continue;
    }
    // the next token sees `window` tokens, itself included; one after a rewind of a chunk sees older ones
    const int64_t live = std::max<int64_t>(0, sequence.cached - chunk - window + 1) / cache.block_size;
    for (; sequence.live[group] < live; ++sequence.live[group]) {
      int64_t& entry = sequence.tables[group][sequence.live[group]];
      pools_[group].drop(entry);
      entry = 0;
    }
  }
}

// Choose the feeds of a step and secure their blocks: decodes first, then prefill chunks, each in the order given.
std::vector<Feed> Engine::plan(const std::vector<TokenSequence*>& sequences) {
  std::vector<TokenSequence*> order(sequences);
  std::stable_partition(order.begin(), order.end(), [](const TokenSequence* sequence) { return sequence->pending() == 1; });
  std::vector<Feed> out;
  int64_t budget = limits.max_step_tokens;
  std::set<PrefixCache::Block> coming;  // blocks that this step fills
  for (TokenSequence* sequence : order) {
    if (budget == 0) {
      break;
    }
    const int64_t last = sequence->length() - 1;  // whose logits are wanted, so that it runs
    if (sequence->pending() > 1) {
      reused_tokens_ += prefixes_.adopt(*sequence, last);
    }
    PrefixCache::Block following;
    const bool fills = prefixes_.next_block(*sequence, following);
    if (fills && coming.count(following) && last >= prefixes_.end(following)) {
      continue;  // the next step finds it
    }
    const int64_t pending = sequence->pending(), steps = (pending + chunk - 1) / chunk;  // as alike as can be
    int64_t count = std::min((pending + steps - 1) / steps, budget);
    while (count && !secure(*sequence, count)) {
      count /= 2;
    }
    if (count) {
      if (fills && sequence->cached + count >= prefixes_.end(following)) {
        coming.insert(following);
      }
      out.push_back({sequence, count});
      budget -= count;
    }
    if (static_cast<int64_t>(out.size()) == most_sequences_) {
      break;
    }
  }
  return out;
}

at::Tensor Engine::advance(const std::vector<TokenSequence*>& sequences) {
  at::Tensor logits = at::empty({static_cast<int64_t>(sequences.size()), vocab_size}, at::kFloat);
  while (true) {
    std::vector<TokenSequence*> waiting;
    std::copy_if(sequences.begin(), sequences.end(), std::back_inserter(waiting), [](const TokenSequence* sequence) {
      return sequence->pending() > 0;
    });
    if (waiting.empty()) {
      return logits;
    }
    const std::lock_guard guard(lock_);
    const std::vector<Feed> feeds = plan(waiting);
    if (feeds.empty()) {
      throw full(*waiting.front());
    }
    std::vector<int64_t> rows, places;
    int64_t end = 0;
    for (const Feed& feed : feeds) {
      end += feed.count;
      if (feed.count == feed.sequence->pending()) {
        rows.push_back(end - 1);
        places.push_back(std::find(sequences.begin(), sequences.end(), feed.sequence) - sequences.begin());
      }
    }
    const at::Tensor found = run(feeds, rows.empty() ? std::vector<int64_t>{0} : rows);
    ++steps_;
    for (const Feed& feed : feeds) {
      const int64_t before = feed.sequence->cached;
      feed.sequence->cached += feed.count;
      prefixes_.record(*feed.sequence, before);
      free_old(*feed.sequence);
    }
    prefixes_.settle();
    for (size_t row = 0; row < places.size(); ++row) {
      logits.select(0, places[row]).copy_(found.select(0, static_cast<int64_t>(row)));
    }
  }
}

at::Tensor Engine::run(const std::vector<Feed>& feeds, const std::vector<int64_t>& rows) {
  const auto groups = static_cast<int64_t>(pools_.size()), sequences = static_cast<int64_t>(feeds.size());
  std::vector<int64_t> tokens, positions, starts = {0}, kv_lens;
  for (const Feed& feed : feeds) {
    const TokenSequence& sequence = *feed.sequence;
    for (int64_t at = sequence.cached; at < sequence.cached + feed.count; ++at) {
      tokens.push_back(sequence.tokens[at]);
      positions.push_back(at);
    }
    starts.push_back(static_cast<int64_t>(tokens.size()));
    kv_lens.push_back(sequence.cached + feed.count);
  }
  const auto total = static_cast<int64_t>(tokens.size());
  const bool decodes = decode_ && total == sequences && sequences <= most_decodes_ && rows.size() == feeds.size();
  // The decode program's tables are as wide as the longest sequence needs, as the runtime in Python records its graphs.
  const int64_t longest = decodes ? limits.max_context : *std::max_element(kv_lens.begin(), kv_lens.end());
  const int64_t width = blocks_for(longest, cache.block_size);
  std::vector<int64_t> slots(groups * total), tables(groups * sequences * width);
  for (int64_t n = 0; n < sequences; ++n) {
    for (int64_t g = 0; g < groups; ++g) {
      const auto& table = feeds[n].sequence->tables[g];
      std::copy_n(
          table.begin(), std::min(width, static_cast<int64_t>(table.size())), tables.begin() + (g * sequences + n) * width
      );
      for (int64_t t = starts[n]; t < starts[n + 1]; ++t) {
        slots[g * total + t] = table[positions[t] / cache.block_size] * cache.block_size + positions[t] % cache.block_size;
      }
    }
  }
  const auto wanted = static_cast<int64_t>(rows.size());
  at::Tensor logits = run_program(
      decodes ? *decode_ : *step_,
      {integers(tokens, {total}), integers(positions, {total}), integers(starts, {sequences + 1}), integers(kv_lens, {sequences}),
       integers(slots, {groups, total}), integers(tables, {groups, sequences, width}), integers(rows, {wanted})}
  );
  if (logits.dim() != 2 || logits.size(0) != wanted || logits.size(1) != vocab_size) {
    throw Failure(
        OXFUSE_INTERNAL, "The step returned logits of another shape than [" + std::to_string(wanted) + ", " +
                             std::to_string(vocab_size) + "]: run `oxfuse verify`."
    );
  }
  return logits.to(at::kCPU, at::kFloat);
}

at::Tensor Engine::run_program(Program& program, std::vector<at::Tensor> inputs) {
  for (at::Tensor& input : inputs) {
    input = input.to(device_);
  }
  inputs.insert(inputs.end(), caches_.tensors().begin(), caches_.tensors().end());
  const at::NoGradGuard no_grad;
  const std::optional<c10::DeviceGuard> on_device =
      device_.is_cpu() ? std::nullopt : std::make_optional<c10::DeviceGuard>(device_);
  const Threads threads(threads_);
  const Team team(team_, inputs.front().size(0));
  return program.run(inputs);
}

void Engine::try_largest_step() {
  const std::lock_guard guard(lock_);
  const int64_t tokens = limits.max_step_tokens, sequences = std::min(most_sequences_, tokens);
  const auto groups = static_cast<int64_t>(pools_.size());
  std::vector<int64_t> starts(sequences + 1);
  for (int64_t n = 0; n <= sequences; ++n) {
    starts[n] = n * tokens / sequences;
  }
  const auto zeros = [](at::IntArrayRef shape) {
    return at::zeros(shape, at::kLong);
  };
  run_program(
      *step_, {zeros({tokens}), zeros({tokens}), integers(starts, {sequences + 1}), zeros({sequences}),
               at::full({groups, tokens}, -1, at::kLong), zeros({groups, sequences, 1}), zeros({sequences})}
  )
      .to(at::kCPU);  // waits until it was run
}

int64_t Engine::used_blocks() const {
  const std::lock_guard guard(lock_);
  return std::accumulate(pools_.begin(), pools_.end(), int64_t(0), [](int64_t sum, const BlockPool& pool) {
    return sum + pool.used();
  });
}

int64_t Engine::steps() const {
  const std::lock_guard guard(lock_);
  return steps_;
}

int64_t Engine::reused_tokens() const {
  const std::lock_guard guard(lock_);
  return reused_tokens_;
}

Failure Engine::full(const TokenSequence& sequence) const {
  return Failure(
      OXFUSE_OUT_OF_CACHE, "The cache is full: a sequence of " + std::to_string(sequence.length()) +
                               " tokens needs more than the " + std::to_string(sequence.tables[0].size()) + " blocks (" +
                               std::to_string(cache.block_size) +
                               " tokens each) that it has, and open sessions hold the rest of " +
                               std::to_string(size.blocks[0] - 1) + ". Close sessions, or load with a larger cache_bytes."
  );
}

}  // namespace oxfuse::internal
