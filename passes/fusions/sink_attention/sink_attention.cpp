// oxfuse::sink_attention on the CPU: paged, causal, grouped queries, sinks, window; its meaning is in reference.py.
//
// One work item is a token and a KV head: its group of query heads walks the keys in tiles, with a running maximum and sum
// (Milakov and Gimelshein 2018, arXiv 1805.02867). Tiles begin at multiples of their length in the sequence, so that a token's result does not
// depend on how the sequence was cut into steps.
#include "../ops.h"

namespace oxfuse {

constexpr int KEYS = 60;  // keys of one tile, a multiple of NR

static int64_t whole_vectors(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

// out[m] = out[m] * keep[m] + the sum of p[m][j] * value[j] over the keys, for M heads and V vectors of dims from d on. A last
// vector that is not whole comes alone.
template <int M, int V, class T>
static void accumulate(const T* const* value, int keys, const float (*p)[KEYS], const float* keep, int64_t d, int64_t dim, int64_t stride,
                       float* out) {
  Floats acc[M][V];
#pragma GCC unroll 16
  for (int i = 0; i < M * V; ++i) acc[i / V][i % V] = load(out + i / V * stride + d + i % V * LANES) * keep[i / V];
  const int64_t count = std::min<int64_t>(V * LANES, dim - d);
  for (int j = 0; j < keys; ++j) {
    const T* at = value[j] + d;
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) {
      const Floats values = V == 1 && count < LANES ? load(at, count) : load(at + i * LANES);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) acc[m][i] += values * p[m][j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M * V; ++i) store(out + i / V * stride + d + i % V * LANES, acc[i / V][i % V]);
}

template <int M, class T>
static void accumulate_dims(const T* const* value, int keys, const float (*p)[KEYS], const float* keep, int64_t dim, float* out) {
  const int64_t stride = whole_vectors(dim);
  int64_t d = 0;
  for (; d + 4 * LANES <= dim; d += 4 * LANES) accumulate<M, 4>(value, keys, p, keep, d, dim, stride, out);
  for (; d < dim; d += LANES) accumulate<M, 1>(value, keys, p, keep, d, dim, stride, out);
}

// Attention of one token's `heads` query heads that share a KV head, over the keys [first, last].
template <class T>
class Group {
 public:
  Group(int64_t heads, int64_t dim)
      : heads_(heads), dim_(dim), stride_(whole_vectors(dim)), query_(heads * stride_), out_(heads * stride_), top_(heads), total_(heads) {}

  template <class Address>
  void run(const T* q, const float* sink, int64_t first, int64_t last, float scale, Address&& address, T* result) {
    for (int64_t h = 0; h < heads_; ++h) {
      for (int64_t d = 0; d < dim_; ++d) query_[h * stride_ + d] = widen(q[h * dim_ + d]);
      top_[h] = sink ? sink[h] : -INFINITY;
      total_[h] = sink ? 1.f : 0.f;
    }
    std::fill(out_.begin(), out_.end(), 0.f);
    for (int64_t key = first; key <= last;) {
      const int64_t end = std::min(last + 1, (key / KEYS + 1) * KEYS);
      const int keys = static_cast<int>(end - key);
      const T *k[KEYS], *v[KEYS];
      for (int j = 0; j < keys; ++j) address(key + j, &k[j], &v[j]);
      for (int64_t h = 0; h < heads_; h += MR) tile(h, std::min<int64_t>(MR, heads_ - h), k, v, keys, scale);
      key = end;
    }
    for (int64_t h = 0; h < heads_; ++h) {
      const float total = total_[h] == 0.f ? 1.f : total_[h];
      for (int64_t d = 0; d < dim_; ++d) result[h * dim_ + d] = narrow<T>(out_[h * stride_ + d] / total);
    }
  }

 private:
  void tile(int64_t h, int count, const T* const* k, const T* const* v, int keys, float scale) {
    float p[MR][KEYS], keep[MR];
    const float* query[MR];
    for (int m = 0; m < count; ++m) query[m] = &query_[(h + m) * stride_];
    for (int j = 0; j < keys; j += NR) {
      Dense<T> rows;
      for (int r = 0; r < NR; ++r) rows.row[r] = k[std::min(j + r, keys - 1)];
      Floats acc[MR * NR];
      dot_rows(rows, query, count, dim_, acc);
      for (int m = 0; m < count; ++m)
        for (int r = 0; r < NR && j + r < keys; ++r) p[m][j + r] = sum(acc[m * NR + r]) * scale;
    }
    for (int m = 0; m < count; ++m) {
      float top = top_[h + m];
      for (int j = 0; j < keys; ++j) top = p[m][j] > top || p[m][j] != p[m][j] ? p[m][j] : top;
      keep[m] = top == top_[h + m] ? 1.f : std::exp(top_[h + m] - top);
      const float shift = top == -INFINITY ? 0.f : top;
      Floats total = {};
      for (int j = 0; j < keys; j += LANES) {
        const int64_t part = std::min(LANES, keys - j);
        Floats weight = exp(load(p[m] + j, part) - shift);
        std::memcpy(p[m] + j, &weight, part * sizeof(float));
        total += load(p[m] + j, part);
      }
      total_[h + m] = total_[h + m] * keep[m] + sum(total);
      top_[h + m] = top;
    }
    float* out = &out_[h * stride_];
    if (count == 1) accumulate_dims<1>(v, keys, p, keep, dim_, out);
    if (count == 2) accumulate_dims<2>(v, keys, p, keep, dim_, out);
    if constexpr (MR > 2) {
      if (count == 3) accumulate_dims<3>(v, keys, p, keep, dim_, out);
      if (count == 4) accumulate_dims<4>(v, keys, p, keep, dim_, out);
    }
  }

  const int64_t heads_, dim_, stride_;
  std::vector<float> query_, out_, top_, total_;  // [heads, stride] twice, [heads] twice
};

static void check_cache(const char* name, const Tensor& cache, const Tensor& k) {
  OXFUSE_CHECK(cache.dim() == 4 && cache.is_contiguous(),
               std::string(name) + " must be a contiguous [blocks, block_size, KV, D]: it is changed in place");
  check_shape(name, cache, {cache.size(0), cache.size(1), k.size(1), k.size(2)});
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
  check_shape("v_cache", v_cache, sizes(k_cache));
  check_dtype("k", k, dtype_name(q).c_str());
  check_dtype("v", v, dtype_name(q).c_str());
  check_shape("query_start", query_start, {sequences + 1});
  check_shape("slots", slots, {tokens});
  check_shape("block_table", block_table, {sequences, block_table.size(-1)});
  for (const Tensor* index : {&query_start, &kv_lens, &slots, &block_table}) check_dtype("an index tensor", *index, "int64");
  OXFUSE_CHECK(sequences >= 1 && block_table.dim() == 2, "expected block_table [N, M] of at least one sequence");
  OXFUSE_CHECK(kv_heads > 0 && heads % kv_heads == 0, text(heads) + " query heads cannot share " + text(kv_heads) + " KV heads");
  if (sink) check_shape("sink", *sink, {heads});

  const int64_t blocks = k_cache.size(0), block_size = k_cache.size(1), columns = block_table.size(1), group = heads / kv_heads;
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
    const int64_t row = kv_heads * dim;
    for (int64_t t = 0; t < tokens; ++t) {
      if (slot[t] < 0) continue;
      std::memcpy(keys + slot[t] * row, data<T>(k_in) + t * row, row * sizeof(T));
      std::memcpy(values + slot[t] * row, data<T>(v_in) + t * row, row * sizeof(T));
    }
    const int64_t longest = *std::max_element(lens, lens + sequences), cost = (window ? std::min(window, longest) : longest) * group * dim;
    parallel_for(0, tokens * kv_heads, 1 + 32768 / (cost + 1), [&](int64_t begin, int64_t end) {
      Group<T> work(group, dim);
      for (int64_t item = begin; item < end; ++item) {
        // Early and late tokens in turn: a late one sees more keys, and every thread gets a run of items.
        const int64_t kv = item / tokens, place = item % tokens, t = place % 2 ? tokens - 1 - place / 2 : place / 2;
        const int64_t at = (t * heads + kv * group) * dim, last = index[t];
        const int64_t first = window ? std::max<int64_t>(0, last - window + 1) : 0;
        T* result = static_cast<T*>(out.data_ptr()) + at;
        if (last < 0) {
          std::fill(result, result + group * dim, T{});
          continue;
        }
        const int64_t* row_table = table + owner[t] * columns;
        work.run(data<T>(q_in) + at, sink ? &sinks[kv * group] : nullptr, first, last, static_cast<float>(scale),
                 [&](int64_t key, const T** k_at, const T** v_at) {
                   const int64_t offset = (row_table[key / block_size] * block_size + key % block_size) * row + kv * dim;
                   *k_at = keys + offset;
                   *v_at = values + offset;
                 },
                 result);
      }
    });
  });
  return out;
}

}  // namespace oxfuse

OXFUSE_OP(sink_attention,
          "(Tensor q, Tensor k, Tensor v, Tensor? sink, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor query_start, Tensor kv_lens, "
          "Tensor slots, Tensor block_table, int window, float scale) -> Tensor")
