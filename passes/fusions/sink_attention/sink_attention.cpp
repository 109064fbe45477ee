// oxfuse::sink_attention on the CPU: paged, causal, grouped queries, sinks, window; its meaning is in reference.py.
//
// One work item is a block of tokens of one sequence and a KV head (block.h), or a segment of its keys where these are too few for the
// threads. Tiles and segments begin at multiples of their length in the sequence, so that a token's result does not depend on how the
// sequence was cut into steps, nor on the number of threads. Of a bfloat16 model a processor that multiplies bfloat16 at full speed multiplies
// the numbers as they are, and weights of keys rounded to it: with random numbers that is 2 to 4 % more error than the result's own rounding.
#include <atomic>

#include "block.h"

namespace oxfuse {

constexpr int64_t ITEMS = 4;              // blocks for each thread that are enough for all to end at about the same time
constexpr int64_t MOST_PARTS = 16 << 20;  // float32 values of states that threads may leave to each other

// Keys and values of one sequence and KV head in the paged cache: `all_keys` and `all_values` are the head's of block 0.
template <class T>
struct Pages {
  const int64_t* table;
  const T *all_keys, *all_values;
  int64_t kv_heads, block_size, dim;

  struct Piece {
    int64_t offset, first, count;  // of the head's keys and values in block 0, the first key's place in the block, keys
  };
  Piece piece(int64_t key, int64_t end) const {
    const int64_t column = key / block_size, first = key - column * block_size;
    return {table[column] * kv_heads * dim * block_size, first, std::min(block_size - first, end - key)};
  }
  int64_t keys(int64_t key, int64_t end, int64_t tile, float* to) const {
    const auto [offset, first, count] = piece(key, end);
    const T* from = all_keys + offset;
    const int64_t rows = dim, apart = block_size;  // beside `this`, which what is stored might lie over
    to += key - tile;
    if (apart % LANES == 0) {  // whole vectors, wherever the keys begin and end
      const int64_t low = first / LANES * LANES;
      to -= first - low;
      for (int64_t i = low; i < first + count; i += LANES, to += LANES)
#pragma GCC unroll 4
        for (int64_t d = 0; d < rows; ++d) store(to + d * TILE, load(from + d * apart + i));
    } else {
      for (int64_t d = 0; d < rows; ++d) widen_all(from + d * apart + first, count, to + d * TILE);
    }
    return count;
  }
  int64_t values(int64_t key, int64_t end, int64_t tile, float* to) const {
    const auto [offset, first, count] = piece(key, end);
    const int64_t width = whole(dim, LANES);
    const T* from = all_values + offset + first * dim;
    to += (key - tile) * width;
    if (dim == width) {
      widen_all(from, count * dim, to);
    } else {
      for (int64_t i = 0; i < count; ++i) widen_all(from + i * dim, dim, to + i * width);
    }
    return count;
  }
#ifdef __AVX512F__
  // The same in pairs; a block of the cache, and a key or value, are whole vectors.
  int64_t keys(int64_t key, int64_t end, int64_t tile, Pair* to) const {
    const auto [offset, first, count] = piece(key, end);
    const T* from = all_keys + offset;
    const int64_t rows = dim, apart = block_size, low = first / LANES * LANES;
    to += key - tile - (first - low);
    for (int64_t i = low; i < first + count; i += LANES, to += LANES)
#pragma GCC unroll 4
      for (int64_t d = 0; d < rows; d += 2) {
        const Bits pairs = pairs_of(from + d * apart + i, from + (d + 1) * apart + i);
        std::memcpy(to + d / 2 * TILE, &pairs, sizeof(pairs));
      }
    return count;
  }
  int64_t values(int64_t key, int64_t end, int64_t tile, Pair* to) const {
    const auto [offset, first, count] = piece(key, end);
    const T* from = all_values + offset;
    const int64_t width = dim, last = first + count;
    to += (key - tile - first) / 2 * width;
    for (int64_t i = first / 2 * 2; i < last; i += 2) {
      const Pair asked = (i < first ? 0 : 0xffffu) | (i + 1 < last ? 0xffff0000u : 0);
      for (int64_t d = 0; d < width; d += LANES) {
        const Bits pairs = pairs_of(from + i * width + d, from + (i + 1) * width + d) & asked;
        std::memcpy(to + i / 2 * width + d, &pairs, sizeof(pairs));
      }
    }
    return count;
  }
#endif
  void lines(int64_t key, int64_t end, Lines& to) const {
    while (key < end) {
      const auto [offset, first, count] = piece(key, end);
      to.add(all_keys + offset, dim * block_size * sizeof(T));  // their rows cross all of it
      to.add(all_values + offset + first * dim, count * dim * sizeof(T));
      key += count;
    }
  }
};

static void check_cache(const char* name, const Tensor& cache, const Tensor& k) {
  OXFUSE_CHECK(cache.dim() == 4 && cache.is_contiguous(),
               std::string(name) + " must be a contiguous [blocks, KV, ...]: it is changed in place");
  check_dtype(name, cache, dtype_name(k).c_str());
}

static Tensor sink_attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& sink, const Tensor& k_cache,
                             const Tensor& v_cache, const Tensor& query_start, const Tensor& kv_lens, const Tensor& slots,
                             const Tensor& block_table, int64_t window, double scale) {
  OXFUSE_CHECK(q.dim() == 3 && k.dim() == 3 && window >= 0, "expected q [T, NH, D], k [T, KV, D] and a window of at least 0");
  const int64_t tokens = q.size(0), heads = q.size(1), dim = q.size(2), kv_heads = k.size(1), sequences = kv_lens.size(0);
  check_shape("k", k, {tokens, kv_heads, dim});
  check_shape("v", v, {tokens, kv_heads, dim});
  check_cache("k_cache", k_cache, k);
  check_cache("v_cache", v_cache, k);
  check_shape("k_cache", k_cache, {k_cache.size(0), kv_heads, dim, k_cache.size(3)});
  check_shape("v_cache", v_cache, {k_cache.size(0), kv_heads, k_cache.size(3), dim});
  check_dtype("k", k, dtype_name(q).c_str());
  check_dtype("v", v, dtype_name(q).c_str());
  check_shape("query_start", query_start, {sequences + 1});
  check_shape("slots", slots, {tokens});
  check_shape("block_table", block_table, {sequences, block_table.size(-1)});
  for (const Tensor* index : {&query_start, &kv_lens, &slots, &block_table}) check_dtype("an index tensor", *index, "int64");
  OXFUSE_CHECK(sequences >= 1 && block_table.dim() == 2, "expected block_table [N, M] of at least one sequence");
  OXFUSE_CHECK(kv_heads > 0 && heads % kv_heads == 0, text(heads) + " query heads cannot share " + text(kv_heads) + " KV heads");
  if (sink) check_shape("sink", *sink, {heads});

  const int64_t blocks = k_cache.size(0), block_size = k_cache.size(3), columns = block_table.size(1), group = heads / kv_heads;
  const Tensor q_in = in_one_piece(q), k_in = in_one_piece(k), v_in = in_one_piece(v);
  const Tensor starts_in = in_one_piece(query_start), lens_in = in_one_piece(kv_lens),
               slots_in = in_one_piece(slots), table_in = in_one_piece(block_table);
  const int64_t *start = data<int64_t>(starts_in), *lens = data<int64_t>(lens_in), *slot = data<int64_t>(slots_in),
                *table = data<int64_t>(table_in);
  std::vector<float> sinks(sink ? heads : 0);
  if (sink) {
    const Values values("sink", *sink);
    for (int64_t h = 0; h < heads; ++h) sinks[h] = values[h];
  }
  const Tensor out = uninitialized(q, q.sizes());

  // Everything that an index could point outside of is checked here, once, before memory is touched.
  std::vector<int64_t> owner(tokens, -1), index(tokens, -1);  // of each token: its sequence, and its place in it
  for (int64_t n = 0; n < sequences; ++n) {
    OXFUSE_CHECK(0 <= start[n] && start[n] <= start[n + 1] && start[n + 1] <= tokens,
                 "query_start must rise from 0 to " + text(tokens) + ", found " + text(start[n]) + ", " + text(start[n + 1]));
    const int64_t fresh = start[n + 1] - start[n], oldest = std::max<int64_t>(0, lens[n] - fresh);
    for (int64_t t = start[n]; t < start[n + 1]; ++t) owner[t] = n, index[t] = lens[n] - (start[n + 1] - t);
    if (!fresh || lens[n] <= 0) continue;
    OXFUSE_CHECK(lens[n] <= columns * block_size, "a sequence of " + text(lens[n]) + " keys needs more than " + text(columns) +
                                                      " blocks of " + text(block_size));
    const int64_t first = window ? std::max<int64_t>(0, oldest - window + 1) : 0;
    for (int64_t m = first / block_size; m <= (lens[n] - 1) / block_size; ++m) {
      const int64_t block = table[n * columns + m];
      OXFUSE_CHECK(0 <= block && block < blocks, "block_table names block " + text(block) + " of " + text(blocks));
    }
  }
  for (int64_t t = 0; t < tokens; ++t)
    OXFUSE_CHECK(-1 <= slot[t] && slot[t] < blocks * block_size, "slot " + text(slot[t]) + " is outside of the cache");

  with_type("q", q, [&](auto type) {
    using T = decltype(type);
    T *keys = static_cast<T*>(k_cache.data_ptr()), *values = static_cast<T*>(v_cache.data_ptr());
    const T *new_keys = data<T>(k_in), *new_values = data<T>(v_in);
    parallel_for(0, tokens, 1 + GRAIN / (kv_heads * dim), [=](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        if (slot[t] < 0) continue;
        const int64_t block = slot[t] / block_size, place = slot[t] - block * block_size;
        for (int64_t kv = 0; kv < kv_heads; ++kv) {
          const int64_t from = (t * kv_heads + kv) * dim, to = (block * kv_heads + kv) * dim * block_size;
          for (int64_t d = 0; d < dim; ++d) keys[to + d * block_size + place] = new_keys[from + d];
          std::memcpy(values + to + place * dim, new_values + from, dim * sizeof(T));
        }
      }
    });
    const T* queries = data<T>(q_in);
    T* results = static_cast<T*>(out.data_ptr());
    for (int64_t t = 0; t < tokens; ++t)
      if (index[t] < 0) std::fill_n(results + t * heads * dim, heads * dim, T{});

    std::vector<std::pair<int64_t, int64_t>> runs;  // first token and number of tokens of each block
    const int64_t most = std::max<int64_t>(1, BLOCK_ROWS / group);
    int64_t longest = 1;
    int64_t work_size = 0;  // multiplications
    for (int64_t n = 0; n < sequences; ++n) {
      for (int64_t t = std::max(start[n], start[n + 1] - std::max<int64_t>(0, lens[n])); t < start[n + 1]; t += most) {
        const int64_t count = std::min(most, start[n + 1] - t), seen = index[t] + count;
        runs.emplace_back(t, count);
        longest = std::max(longest, count);
        work_size += 2 * count * heads * dim * (window ? std::min(window + count, seen) : seen);
      }
    }
    // Late blocks see the most keys, so they come first; whoever is done takes the next.
    std::sort(runs.begin(), runs.end(), [&](const auto& a, const auto& b) { return index[a.first] > index[b.first]; });
    struct Item {
      int64_t token, count, kv, segment;  // the whole run where `segment` is -1
    };
    const auto view = [&](const Item& item) { return Causal{index[item.token], item.count, window}; };
    const auto segments = [&](const Item& item) {  // that any of its tokens sees: the first one, and their number
      const Causal seen = view(item);
      const int64_t first = seen.begin(0, 0) / SEGMENT, last = (seen.end(0, item.count - 1) - 1) / SEGMENT;
      return std::pair(first, last - first + 1);
    };
    std::vector<Item> all, parts;
    int64_t rows = 0;  // of all parts
    for (const auto& [t, count] : runs) {
      for (int64_t kv = 0; kv < kv_heads; ++kv) {
        all.push_back({t, count, kv, -1});
        const auto [first, number] = segments(all.back());
        for (int64_t segment = first; segment < first + number; ++segment) parts.push_back({t, count, kv, segment});
        rows += number * count * group;
      }
    }
    const int64_t threads = std::min<int64_t>(1 + work_size / GRAIN, threads_for(tokens)), width = whole(dim, LANES);
    // Where there are few blocks for so many threads, these share the segments of a block.
    const bool split = static_cast<int64_t>(all.size()) < ITEMS * threads && threads > 1 && parts.size() > all.size() && rows * width <= MOST_PARTS;
    const auto source = [&](const Item& item) {
      const int64_t head = item.kv * dim * block_size;
      return Pages<T>{table + owner[item.token] * columns, keys + head, values + head, kv_heads, block_size, dim};
    };
    const auto to = [&](const Item& item) {
      const int64_t at = (item.token * heads + item.kv * group) * dim;
      return Queries<T>{queries + at, heads * dim, dim, item.count, sink ? &sinks[item.kv * group] : nullptr, static_cast<float>(scale),
                        results + at, heads * dim};
    };
    // Calls each(block, item, its place, then) for all items.
    const auto share_in = [&]<class Way>(Way, const std::vector<Item>& items, auto&& each) {
      const int64_t count = static_cast<int64_t>(items.size());
      std::atomic<int64_t> next{0};
      parallel_for_rows(tokens, std::min(threads, count), 1, [&](int64_t, int64_t) {
        Block<T, Way> work(longest, group, dim);
        for (int64_t i = next.fetch_add(1); i < count;) {
          const int64_t following = next.fetch_add(1);
          each(work, items[i], i, [&](Lines& lines) {
            if (following >= count) return;
            const Item& item = items[following];
            const Causal seen = view(item);
            const int64_t key = std::max(seen.begin(0, 0), item.segment * SEGMENT);
            const int64_t end = std::min(seen.end(0, item.count - 1), (key / TILE + 1) * TILE);
            source(item).lines(key, end, lines);
          });
          i = following;
        }
      });
    };
    const auto share = [&](const std::vector<Item>& items, auto&& each) {
#ifdef __AVX512F__
      if constexpr (std::is_same_v<T, bfloat16>)
        if (multiplies_bfloat16() && dim % LANES == 0 && block_size % LANES == 0) return share_in(InPairs(), items, each);
#endif
      share_in(InFloat32(), items, each);
    };
    if (!split) {
      share(all, [&](auto& work, const Item& item, int64_t, auto&& then) { work.run(to(item), view(item), source(item), then); });
      return;
    }
    std::vector<State> states;
    states.reserve(parts.size());
    for (const Item& item : parts) states.emplace_back(longest * group, width);
    share(parts, [&](auto& work, const Item& item, int64_t i, auto&& then) {
      work.part(to(item), view(item), source(item), item.segment, states[i], then);
    });
    std::vector<int64_t> first_part(all.size());
    for (size_t i = 1; i < all.size(); ++i) first_part[i] = first_part[i - 1] + segments(all[i - 1]).second;
    share(all, [&](auto& work, const Item& item, int64_t i, auto&&) {
      if (!work.template join<Causal>(to(item), &states[first_part[i]], segments(item).second))
        work.run(to(item), view(item), source(item), [](Lines&) {});
    });
  });
  return out;
}

}  // namespace oxfuse

OXFUSE_OP(sink_attention,
          "(Tensor q, Tensor k, Tensor v, Tensor? sink, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor query_start, Tensor kv_lens, "
          "Tensor slots, Tensor block_table, int window, float scale) -> Tensor")
