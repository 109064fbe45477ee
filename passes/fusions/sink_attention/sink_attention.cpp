// oxfuse::sink_attention on the CPU: paged, causal, grouped queries, sinks, window; its meaning is in reference.py.
//
// One work item is a block of tokens of one sequence and a KV head (block.h). Tiles of keys begin at multiples of their length in the
// sequence, so that a token's result does not depend on how the sequence was cut into steps.
#include <atomic>

#include "block.h"

namespace oxfuse {

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
  const Tensor q_in = torch::stable::contiguous(q), k_in = torch::stable::contiguous(k), v_in = torch::stable::contiguous(v);
  const Tensor starts_in = torch::stable::contiguous(query_start), lens_in = torch::stable::contiguous(kv_lens),
               slots_in = torch::stable::contiguous(slots), table_in = torch::stable::contiguous(block_table);
  const int64_t *start = data<int64_t>(starts_in), *lens = data<int64_t>(lens_in), *slot = data<int64_t>(slots_in),
                *table = data<int64_t>(table_in);
  std::vector<float> sinks(sink ? heads : 0);
  if (sink) {
    const Values values("sink", *sink);
    for (int64_t h = 0; h < heads; ++h) sinks[h] = values[h];
  }
  const Tensor out = torch::stable::new_empty(q, q.sizes());

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
    const int64_t width = whole(dim, LANES);
    const auto decode = [&](int64_t sequence, int64_t kv) {
      return [=](int64_t key, int64_t end, float* keys_out, float* values_out, Floats* zeros) {
        const int64_t column = key / block_size, first = key - column * block_size, count = std::min(block_size - first, end - key);
        const int64_t offset = (table[sequence * columns + column] * kv_heads + kv) * dim * block_size;
        for (int64_t d = 0; d < dim; ++d) widen_all(keys + offset + first + d * block_size, count, keys_out + d * TILE);
        for (int64_t i = 0; i < count; ++i) *zeros += widen_all(values + offset + (first + i) * dim, dim, values_out + i * width);
        return count;
      };
    };
    const T* queries = data<T>(q_in);
    T* results = static_cast<T*>(out.data_ptr());
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
    for (int64_t t = 0; t < tokens; ++t)
      if (index[t] < 0) std::fill_n(results + t * heads * dim, heads * dim, T{});

    // Late blocks see the most keys, so they come first; whoever is done takes the next.
    std::sort(runs.begin(), runs.end(), [&](const auto& a, const auto& b) { return index[a.first] > index[b.first]; });
    const int64_t items = static_cast<int64_t>(runs.size()) * kv_heads;
    std::atomic<int64_t> next{0};
    parallel_for(0, std::min<int64_t>({items, 1 + work_size / GRAIN, torch::stable::get_num_threads()}), 1, [&](int64_t, int64_t) {
      Block<T> work(longest, group, dim);
      for (int64_t item; (item = next.fetch_add(1)) < items;) {
        const auto [t, count] = runs[item / kv_heads];
        const int64_t kv = item % kv_heads, at = (t * heads + kv * group) * dim;
        work.run(queries + at, heads * dim, dim, count, Causal{index[t], count, window}, sink ? &sinks[kv * group] : nullptr,
                 static_cast<float>(scale), decode(owner[t], kv), results + at, heads * dim);
      }
    });
  });
  return out;
}

}  // namespace oxfuse

OXFUSE_OP(sink_attention,
          "(Tensor q, Tensor k, Tensor v, Tensor? sink, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor query_start, Tensor kv_lens, "
          "Tensor slots, Tensor block_table, int window, float scale) -> Tensor")
