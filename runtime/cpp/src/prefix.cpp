#include "prefix.h"

#include "engine.h"

#include <algorithm>

namespace oxfuse::internal {

PrefixCache::PrefixCache(const CacheSpec& spec, std::vector<BlockPool>& pools, int64_t bound)
    : size_(spec.block_size), bound_(bound), pools_(pools), nodes_(pools.size()), root_(std::make_unique<Prefix>()) {
  root_->blocks.resize(pools.size());
  for (const CacheGroup& group : spec.groups) {
    windows_.push_back(group.window);
    bytes_.push_back(block_bytes(spec, group));
  }
  for (size_t group = 0; group < pools.size(); ++group) {
    pools[group].watch(&clock_, [this, group](int64_t block) {
      const auto found = nodes_[group].find(block);
      if (found != nodes_[group].end()) {
        Prefix* node = found->second;
        nodes_[group].erase(found);
        node->blocks[group] = 0;
        prune(node);
      }
    });
  }
}

// Node by node, since each would end its children from within: a chain of a long context is deeper than a thread's stack.
PrefixCache::~PrefixCache() {
  std::vector<std::unique_ptr<Prefix>> left;
  left.push_back(std::move(root_));
  while (!left.empty()) {
    const std::unique_ptr<Prefix> node = std::move(left.back());
    left.pop_back();
    for (auto& [content, child] : node->children) {
      left.push_back(std::move(child));
    }
  }
}

Prefix* PrefixCache::last(const TokenSequence& sequence) const {
  return sequence.prefix ? sequence.prefix : root_.get();
}

std::vector<int64_t> PrefixCache::content(const TokenSequence& sequence, int64_t index) const {
  const auto begin = sequence.tokens.begin() + index * size_;
  return {begin, begin + size_};
}

// Return the first table entry of a group that a token sees which begins the block `end`.
int64_t PrefixCache::first_seen(size_t group, int64_t end) const {
  return windows_[group] ? std::max<int64_t>(0, end * size_ - windows_[group] + 1) / size_ : 0;
}

bool PrefixCache::next_block(const TokenSequence& sequence, Block& block) const {
  const int64_t index = sequence.cached / size_;
  if (!bound_ || (index + 1) * size_ > sequence.length()) {
    return false;
  }
  block = {last(sequence), content(sequence, index)};
  return true;
}

// Return the nodes after those that the sequence has run, as far as full-attention groups have them, before the block `end`.
std::vector<Prefix*> PrefixCache::follow(const TokenSequence& sequence, int64_t end) const {
  Prefix* node = last(sequence);
  std::vector<Prefix*> path;
  for (int64_t index = sequence.cached / size_; index < end; ++index) {
    const auto child = node->children.find(content(sequence, index));
    if (child == node->children.end()) {
      break;
    }
    node = child->second.get();
    for (size_t group = 0; group < pools_.size(); ++group) {
      if (!windows_[group] && !node->blocks[group]) {
        return path;
      }
    }
    path.push_back(node);
  }
  return path;
}

int64_t PrefixCache::adopt(TokenSequence& sequence, int64_t most) {
  const int64_t before = sequence.cached, depth = before / size_;
  if (!bound_ || most / size_ <= depth) {
    return 0;
  }
  const std::vector<Prefix*> path = follow(sequence, most / size_);
  std::vector<int64_t> begins = sequence.live;  // of each group, where the entries begin that are there without a gap
  int64_t best = 0;
  for (int64_t end = depth + 1; end <= depth + static_cast<int64_t>(path.size()); ++end) {
    bool whole = true;
    for (size_t group = 0; group < pools_.size(); ++group) {
      if (windows_[group] && !path[end - depth - 1]->blocks[group]) {
        begins[group] = end;
      }
      whole = whole && (!windows_[group] || begins[group] <= first_seen(group, end));
    }
    best = whole ? end : best;
  }
  if (!best) {
    return 0;
  }
  std::vector<std::vector<int64_t>> dropped(pools_.size());
  for (size_t group = 0; group < pools_.size(); ++group) {
    auto& table = sequence.tables[group];
    const int64_t first = std::max(sequence.live[group], first_seen(group, best));
    const auto old = table.begin() + std::min(first, depth), own = table.begin() + depth;
    dropped[group].assign(table.begin(), old);
    dropped[group].insert(dropped[group].end(), own, table.end());
    std::fill(table.begin(), old, 0);
    table.resize(depth);
    for (int64_t index = depth; index < best; ++index) {
      table.push_back(index >= first ? path[index - depth]->blocks[group] : 0);
      pools_[group].share(table.back());
    }
    sequence.live[group] = first;
  }
  move(sequence, path[best - depth - 1]);
  sequence.cached = best * size_;
  for (size_t group = 0; group < pools_.size(); ++group) {
    for (const int64_t block : dropped[group]) {
      pools_[group].drop(block);
    }
  }
  settle();
  return sequence.cached - before;
}

void PrefixCache::record(TokenSequence& sequence, int64_t before) {
  Prefix* node = last(sequence);
  if (!bound_ || node->depth != before / size_) {
    return;
  }
  for (int64_t index = node->depth; index < sequence.cached / size_; ++index) {
    auto& child = node->children[content(sequence, index)];
    if (!child) {
      child = std::make_unique<Prefix>();
      child->parent = node;
      child->content = content(sequence, index);
      child->blocks.resize(pools_.size());
      child->depth = node->depth + 1;
    }
    node = child.get();
    for (size_t group = 0; group < pools_.size(); ++group) {
      int64_t &own = sequence.tables[group][index], &known = node->blocks[group];
      if (!known) {
        pools_[group].remember(own);
        nodes_[group][own] = node;
        known = own;
      } else if (known != own) {
        pools_[group].share(known);
        pools_[group].drop(own);
        own = known;
      }
    }
  }
  move(sequence, node);
}

void PrefixCache::cut(TokenSequence& sequence, int64_t length) {
  Prefix* node = last(sequence);
  while (node->parent && node->depth > length / size_) {
    node = node->parent;
  }
  move(sequence, node);
}

void PrefixCache::fork(TokenSequence& twin) {
  if (twin.prefix) {
    ++twin.prefix->holders;
  }
}

// Make `node` the sequence's last full block; nodes that are some sequence's last stay in the tree.
void PrefixCache::move(TokenSequence& sequence, Prefix* node) {
  Prefix* const former = sequence.prefix;
  if (node != former) {
    ++node->holders;
    sequence.prefix = node;
    leave(former);
  }
}

void PrefixCache::leave(Prefix* node) {
  if (node) {
    --node->holders;
    prune(node);
  }
}

// Take a node out, and then its parents, where nothing hangs on it.
void PrefixCache::prune(Prefix* node) {
  while (node->parent && !node->holders && node->children.empty() &&
         std::all_of(node->blocks.begin(), node->blocks.end(), [](int64_t block) { return block == 0; })) {
    Prefix* const parent = node->parent;
    parent->children.erase(std::vector<int64_t>(node->content));  // a copy: the node ends with its entry
    node = parent;
  }
}

int64_t PrefixCache::kept_bytes() const {
  int64_t out = 0;
  for (size_t group = 0; group < pools_.size(); ++group) {
    out += pools_[group].kept() * bytes_[group];
  }
  return out;
}

void PrefixCache::settle() {
  while (kept_bytes() > bound_) {
    BlockPool* oldest = nullptr;
    for (BlockPool& pool : pools_) {
      if (pool.kept() && (!oldest || pool.oldest() < oldest->oldest())) {
        oldest = &pool;
      }
    }
    oldest->let_go();
  }
}

bool PrefixCache::crowded(const std::vector<int64_t>& needs) const {
  int64_t wanted = 0, held = 0;
  const int64_t kept = kept_bytes();
  for (size_t group = 0; group < pools_.size(); ++group) {
    wanted += needs[group] * bytes_[group];
    held += pools_[group].used() * bytes_[group];
  }
  return held + kept + wanted > bound_ && 2 * (kept - wanted) >= bound_;
}

}  // namespace oxfuse::internal
