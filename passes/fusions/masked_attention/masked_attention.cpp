// oxfuse::masked_attention and oxfuse::sink_attention_dense on the CPU: attention over keys that lie in one tensor, with a mask that is
// given or causal; their meaning is in reference.py here and beside sink_attention.
//
// One work item is a block of tokens of one sequence and a KV head, as for the paged cache (../sink_attention/block.h). A mask is read
// before the keys: of a cache that has room for more than is written, what no token of a block sees is not touched.
#include <atomic>

#include "../sink_attention/block.h"

namespace oxfuse {

constexpr float HIDDEN = -1e30f;  // what is added to hide a key is the least value of some dtype; no score comes near it

// A given mask of a block: a row of `length` values for each token, and between which keys the token sees any. A token that sees none but
// has finite values to add attends to all alike, as in the models that write masks like that.
class Given {
 public:
  static constexpr bool MASKED = true;
  Given(int64_t tokens, int64_t length) : length_(whole(length, TILE)), keys_(length), values_(tokens * length_), begin_(tokens), end_(tokens) {}

  // Reads `tokens` rows from `mask`, `row` and `column` values apart.
  template <class M>
  void read(const M* mask, int64_t tokens, int64_t row, int64_t column) {
    for (int64_t t = 0; t < tokens; ++t) {
      float* to = &values_[t * length_];
      int64_t begin = keys_, end = 0;
      bool any = false;  // value that is not -inf
      for (int64_t j = 0; j < keys_; ++j) {
        to[j] = value(mask[t * row + j * column]);
        any |= to[j] != -INFINITY;
        if (to[j] > HIDDEN || to[j] != to[j]) begin = std::min(begin, j), end = j + 1;
      }
      if (end == 0 && any) begin = 0, end = keys_;
      begin_[t] = begin, end_[t] = end;
    }
  }
  int64_t begin(int64_t first, int64_t last) const { return *std::min_element(&begin_[first], &begin_[last] + 1); }
  int64_t end(int64_t first, int64_t last) const { return *std::max_element(&end_[first], &end_[last] + 1); }
  const float* added(int64_t token, int64_t tile) const { return &values_[token * length_ + tile]; }

 private:
  static float value(float x) { return x; }
  static float value(bfloat16 x) { return widen(x); }
  static float value(bool x) { return x ? 0.f : -INFINITY; }
  const int64_t length_, keys_;
  std::vector<float> values_;
  std::vector<int64_t> begin_, end_;
};

// Keys and values of one sequence and KV head, `k_stride` and `v_stride` values apart.
template <class T>
struct Strided {
  const T *all_keys, *all_values;
  int64_t k_stride, v_stride, dim;
  int64_t keys(int64_t key, int64_t end, int64_t tile, float* to) const {
    for (int64_t i = key - tile; i < end - tile; ++i) {
      const T* row = all_keys + (tile + i) * k_stride;
      for (int64_t d = 0; d < dim; ++d) to[d * TILE + i] = widen(row[d]);
    }
    return end - key;
  }
  int64_t values(int64_t key, int64_t end, int64_t tile, float* to) const {
    const int64_t width = whole(dim, LANES);
    to += (key - tile) * width;
    for (int64_t i = key; i < end; ++i, to += width) widen_all(all_values + i * v_stride, dim, to);
    return end - key;
  }
  void lines(int64_t, int64_t, Lines&) const {}  // at equal distances: the processor sees by itself what comes next
};

static Tensor with_whole_rows(const Tensor& x) { return x.stride(-1) == 1 ? x : in_one_piece(x); }

// Checks what both ops take, and calls each(b, first token, count, block, run) for all blocks, where run(view) computes the block.
// `most_keys` bounds what a token sees.
template <class MakeView>
static Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& sink, double scale, int64_t seen,
                     MakeView&& make_view) {
  OXFUSE_CHECK(q.dim() == 4 && k.dim() == 4, "expected q [B, S, NH, D] and k [B, L, KV, D]");
  const int64_t batch = q.size(0), tokens = q.size(1), heads = q.size(2), dim = q.size(3), keys = k.size(1), kv_heads = k.size(2);
  check_shape("k", k, {batch, keys, kv_heads, dim});
  check_shape("v", v, {batch, keys, kv_heads, dim});
  check_dtype("k", k, dtype_name(q).c_str());
  check_dtype("v", v, dtype_name(q).c_str());
  OXFUSE_CHECK(kv_heads > 0 && heads % kv_heads == 0, text(heads) + " query heads cannot share " + text(kv_heads) + " KV heads");
  if (sink) check_shape("sink", *sink, {heads});
  std::vector<float> sinks(sink ? heads : 0);
  if (sink) {
    const Values values("sink", *sink);
    for (int64_t h = 0; h < heads; ++h) sinks[h] = values[h];
  }
  const Tensor q_in = with_whole_rows(q), k_in = with_whole_rows(k), v_in = with_whole_rows(v);
  const Tensor out = uninitialized(q, q.sizes());
  const int64_t group = heads / kv_heads, most = std::max<int64_t>(1, BLOCK_ROWS / group), runs = (tokens + most - 1) / most;
  const int64_t items = batch * runs * kv_heads, work_size = 2 * batch * tokens * heads * dim * seen;
  const int64_t threads = std::min<int64_t>({items, 1 + work_size / GRAIN, torch::stable::get_num_threads()});
  with_type("q", q, [&](auto type) {
    using T = decltype(type);
    const T *queries = data<T>(q_in), *all_keys = data<T>(k_in), *all_values = data<T>(v_in);
    T* results = static_cast<T*>(out.data_ptr());
    std::atomic<int64_t> next{0};
    parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      Block<T> work(std::min(most, tokens), group, dim);
      auto view = make_view(std::min(most, tokens));
      for (int64_t item; (item = next.fetch_add(1)) < items;) {
        // Late blocks may see the most keys, so they come first; whoever is done takes the next.
        const int64_t kv = item % kv_heads, b = item / kv_heads % batch, first = (runs - 1 - item / kv_heads / batch) * most;
        const int64_t count = std::min(most, tokens - first);
        const T *k_at = all_keys + b * k_in.stride(0) + kv * k_in.stride(2), *v_at = all_values + b * v_in.stride(0) + kv * v_in.stride(2);
        const Strided<T> source{k_at, v_at, k_in.stride(1), v_in.stride(1), dim};
        const Queries<T> to{queries + b * q_in.stride(0) + first * q_in.stride(1) + kv * group * q_in.stride(2), q_in.stride(1), q_in.stride(2), count,
                            sink ? &sinks[kv * group] : nullptr, static_cast<float>(scale), results + ((b * tokens + first) * heads + kv * group) * dim,
                            heads * dim};
        work.run(to, view(b, first, count), source, [](Lines&) {});
      }
    });
  });
  return out;
}

static Tensor sink_attention_dense(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& sink, int64_t window,
                                   double scale) {
  OXFUSE_CHECK(window >= 0 && q.dim() == 4 && k.dim() == 4 && q.size(1) == k.size(1), "expected queries and keys of one sequence, and a window of at least 0");
  const int64_t length = q.size(1);
  return attend(q, k, v, sink, scale, window ? std::min(window, length) : length, [=](int64_t) {
    return [=](int64_t, int64_t first, int64_t count) { return Causal{first, count, window}; };
  });
}

static Tensor masked_attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& sink, const Tensor& mask,
                               double scale) {
  OXFUSE_CHECK(q.dim() == 4 && k.dim() == 4 && mask.dim() == 4, "expected q [B, S, NH, D], k [B, L, KV, D] and mask [B, 1, S, L]");
  const int64_t batch = q.size(0), tokens = q.size(1), keys = k.size(1);
  OXFUSE_CHECK((mask.size(0) == batch || mask.size(0) == 1) && mask.size(1) == 1 && (mask.size(2) == tokens || mask.size(2) == 1) && mask.size(3) == keys,
               "mask has shape " + text(mask.sizes()) + ", expected " + text({batch, 1, tokens, keys}));
  const ScalarType kind = mask.scalar_type();
  OXFUSE_CHECK(kind == ScalarType::Bool || kind == ScalarType::Float || kind == ScalarType::BFloat16,
               "mask has dtype " + dtype_name(mask) + ", expected bool, float32 or bfloat16");
  const int64_t of_batch = mask.size(0) == 1 ? 0 : mask.stride(0), row = mask.size(2) == 1 ? 0 : mask.stride(2), column = mask.stride(3);
  return attend(q, k, v, sink, scale, keys, [&](int64_t most) {
    return [=, &mask, view = Given(most, keys), last = std::pair<int64_t, int64_t>(-1, -1)](int64_t b, int64_t first, int64_t count) mutable -> Given& {
      if (last == std::pair(b, first)) return view;  // of another head
      last = {b, first};
      const int64_t at = b * of_batch + first * row;
      if (kind == ScalarType::Bool) view.read(data<bool>(mask) + at, count, row, column);
      if (kind == ScalarType::Float) view.read(data<float>(mask) + at, count, row, column);
      if (kind == ScalarType::BFloat16) view.read(data<bfloat16>(mask) + at, count, row, column);
      return view;
    };
  });
}

}  // namespace oxfuse

OXFUSE_OP(masked_attention, "(Tensor q, Tensor k, Tensor v, Tensor? sink, Tensor mask, float scale) -> Tensor")
OXFUSE_OP(sink_attention_dense, "(Tensor q, Tensor k, Tensor v, Tensor? sink, int window, float scale) -> Tensor")
