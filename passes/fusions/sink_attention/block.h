// Attention of a block of queries of one sequence: they walk the keys in tiles, each decoded once and laid out so that sums run along
// whole vectors, with a running maximum and sum for each row. After FlashAttention (Dao et al. 2022, arXiv 2205.14135): no row of
// scores is ever whole. A row's result does not depend on the rows beside it.
#pragma once

#include "../ops.h"

namespace oxfuse {

constexpr int TILE = 64;                        // keys of a tile, whole vectors of them
constexpr int STRIP = 6;                        // rows of one register tile; STRIP * WIDE accumulators, WIDE values and one factor
constexpr int WIDE = LANES == 16 ? 4 : 2;       // vectors of one register tile
constexpr int64_t BLOCK_ROWS = 192;             // query rows (tokens times heads of a group) that share a decoded tile
static_assert(TILE % (WIDE * LANES) == 0, "a tile is whole register tiles");

inline int64_t whole(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// out[m] = out[m] * keep[m] (zeros without `keep`) + the sum over k of a[m][k] * b[k], for M rows m and V vectors.
template <int M, int V>
__attribute__((noinline)) static void outer(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t count, const float* keep,
                                            float* out, int64_t out_stride) {
  Floats acc[M][V];
#pragma GCC unroll 24
  for (int i = 0; i < M * V; ++i) acc[i / V][i % V] = keep ? load(out + i / V * out_stride + i % V * LANES) * keep[i / V] : Floats{};
  for (int64_t k = 0; k < count; ++k, b += b_stride) {
    Floats values[V];
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) values[i] = load(b + i * LANES);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const float factor = a[m * a_stride + k];
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) acc[m][i] += values[i] * factor;
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < M * V; ++i) store(out + i / V * out_stride + i % V * LANES, acc[i / V][i % V]);
}

// The same for `rows` <= STRIP rows and all vectors of a row of b, `stride` values.
template <int M = STRIP>
void outer_all(int64_t rows, const float* a, int64_t a_stride, const float* b, int64_t stride, int64_t count, const float* keep, float* out) {
  if constexpr (M > 1)
    if (rows < M) return outer_all<M - 1>(rows, a, a_stride, b, stride, count, keep, out);
  int64_t d = 0;
  for (; d + WIDE * LANES <= stride; d += WIDE * LANES) outer<M, WIDE>(a, a_stride, b + d, stride, count, keep, out + d, stride);
  for (; d < stride; d += LANES) outer<M, 1>(a, a_stride, b + d, stride, count, keep, out + d, stride);
}

inline Ints load_count() {  // 0, 1, 2, ...
  static const struct Count {
    Ints of;
    Count() {
      for (int i = 0; i < LANES; ++i) of[i] = i;
    }
  } count;
  return count.of;
}

// Writes `count` values in float32 and returns zeros, or NaN where a value is infinite or none.
template <class T>
Floats widen_all(const T* from, int64_t count, float* to) {
  Floats zeros = {};
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    const Floats x = load(from + i);
    zeros += x * 0.f;
    store(to + i, x);
  }
  for (; i < count; ++i) {
    to[i] = widen(from[i]);
    zeros[0] += to[i] * 0.f;
  }
  return zeros;
}

inline float largest(Floats x) {
  typedef float Half __attribute__((vector_size(LANES * 2)));
  typedef float Quarter __attribute__((vector_size(16)));
  Half parts[2];
  std::memcpy(parts, &x, sizeof(x));
  const Half half = parts[0] > parts[1] ? parts[0] : parts[1];
  Quarter four[LANES / 8];
  std::memcpy(four, &half, sizeof(half));
  Quarter top = four[0];
  for (int i = 1; i < LANES / 8; ++i) top = four[i] > top ? four[i] : top;
  return std::max(std::max(top[0], top[1]), std::max(top[2], top[3]));
}

// What the tokens of a block see where no mask is given: those before them, no further back than `window`, all where it is 0. `index` is
// the first token's place in the sequence.
struct Causal {
  int64_t index, tokens, window;
  int64_t begin() const { return window ? std::max<int64_t>(0, index - window + 1) : 0; }  // keys that any of them sees
  int64_t end() const { return index + tokens; }
  int64_t begin(int64_t token) const { return window ? std::max<int64_t>(0, index + token - window + 1) : 0; }
  int64_t end(int64_t token) const { return index + token + 1; }
  bool any(int64_t first, int64_t last, int64_t tile) const {  // whether a token from first to last sees a key of the tile
    return tile < end(last) && (!window || tile + TILE > index + first - window + 1);
  }
  const float* added(int64_t, int64_t) const { return nullptr; }  // to a token's scores of the tile
};

// Attention of up to `tokens` tokens of one sequence with the `group` query heads that share a KV head.
template <class T>
class Block {
 public:
  Block(int64_t tokens, int64_t group, int64_t dim)
      : group_(group), dim_(dim), width_(whole(dim, LANES)), query_(tokens * group * dim), keys_(dim * TILE), values_(TILE * width_),
        scores_(tokens * group * TILE), out_(tokens * group * width_), top_(tokens * group), keep_(tokens * group), total_(tokens * group) {}

  // q and result: the group's heads of the first token; `stride` and `stride_out` values further on are those of the next. `view` is
  // `Causal`, or has its members. `decode(key, end, keys, values)` writes the keys from `key` on, as many below `end` as lie in one piece, to
  // keys[d * TILE + i] and values[i * width + d] in float32, adds 0 to `zeros`, or NaN where a value is infinite or none, and returns
  // their number; `width` is dim in whole vectors.
  template <class View, class Decode>
  void run(const T* q, int64_t stride, int64_t head_stride, int64_t tokens, View&& view, const float* sink, float scale, Decode&& decode,
           T* result, int64_t stride_out) {
    const int64_t rows = tokens * group_;
    std::fill_n(out_.begin(), rows * width_, 0.f);
    for (int64_t r = 0; r < rows; ++r) {
      top_[r] = sink ? sink[r % group_] : -INFINITY;
      total_[r] = Floats{};
      total_[r][0] = sink ? 1.f : 0.f;
      const T* from = q + r / group_ * stride + r % group_ * head_stride;
      for (int64_t d = 0; d < dim_; ++d) query_[r * dim_ + d] = widen(from[d]);
    }
    const int64_t first = view.begin(), end = view.end();
    for (int64_t tile = first / TILE * TILE; tile < end; tile += TILE) {
      fill(tile, std::max(first, tile), std::min(end, tile + TILE), decode);
      const int64_t keys = std::min<int64_t>(TILE, end - tile);
      for (int64_t r = 0; r < rows; r += STRIP) {
        const int64_t some = std::min<int64_t>(STRIP, rows - r);
        if (!view.any(r / group_, (r + some - 1) / group_, tile)) continue;
        outer_all(some, &query_[r * dim_], dim_, keys_.data(), TILE, dim_, nullptr, &scores_[r * TILE]);
        for (int64_t m = r; m < r + some; ++m) {
          const int64_t token = m / group_;
          softmax(m, view.begin(token) - tile, view.end(token) - tile, scale, view.added(token, tile));
        }
        if (finite_) {
          outer_all(some, &scores_[r * TILE], TILE, values_.data(), width_, keys, &keep_[r], &out_[r * width_]);
          continue;
        }
        for (int64_t m = r; m < r + some; ++m) {  // a weight of 0 does not hide infinity and NaN, so each row takes what it sees
          const int64_t begin = std::max<int64_t>(0, view.begin(m / group_) - tile);
          const int64_t count = std::max<int64_t>(0, std::min<int64_t>(TILE, view.end(m / group_) - tile) - begin);
          outer_all(1, &scores_[m * TILE + begin], TILE, &values_[begin * width_], width_, count, &keep_[m], &out_[m * width_]);
        }
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const float total = sum(total_[r]), divisor = total == 0.f ? 1.f : total;
      T* to = result + r / group_ * stride_out + r % group_ * dim_;
      for (int64_t d = 0; d < dim_; ++d) to[d] = narrow<T>(out_[r * width_ + d] / divisor);
    }
  }

 private:
  // Fills keys_ [dim, TILE] and values_ [TILE, width] with the keys [begin, end) of the tile, in float32, and zeros around them: what lies
  // beside them in the cache may be anything.
  template <class Decode>
  void fill(int64_t tile, int64_t begin, int64_t end, Decode&& decode) {
    Floats zeros = {};
    if (begin > tile || end < tile + TILE) {
      std::fill(keys_.begin(), keys_.end(), 0.f);
      std::fill(values_.begin(), values_.end(), 0.f);
    }
    for (int64_t key = begin; key < end;)
      key += decode(key, end, &keys_[key - tile], &values_[(key - tile) * width_], &zeros);
    finite_ = sum(zeros) == 0.f;
  }

  // Turns a row's scores of the keys [begin, end) into weights relative to the running maximum, and those of others into 0. `added` is
  // added to the scores of the tile, where it is not null.
  void softmax(int64_t row, int64_t begin, int64_t end, float scale, const float* added) {
    float* s = &scores_[row * TILE];
    const bool edge = begin > 0 || end < TILE;
    const int first = static_cast<int>(std::max<int64_t>(begin, 0)), last = static_cast<int>(std::min<int64_t>(end, TILE));
    Floats best = splat(-INFINITY);
    for (int j = 0; j < TILE; j += LANES) {
      Floats x = load(s + j) * scale;
      if (added) x += load(added + j);
      if (edge) {
        const Ints place = load_count() + j;
        x = (place >= first) & (place < last) ? x : splat(-INFINITY);
      }
      store(s + j, x);
      best = x > best ? x : best;
    }
    const float top = std::max(top_[row], largest(best)), shift = top == -INFINITY ? 0.f : top;
    keep_[row] = top == top_[row] ? 1.f : std::exp(top_[row] - top);
    Floats total = total_[row] * keep_[row];
    for (int j = 0; j < TILE; j += LANES) {
      const Floats weight = exp(load(s + j) - shift);
      store(s + j, weight);
      total += weight;
    }
    total_[row] = total;
    top_[row] = top;
  }

  const int64_t group_, dim_, width_;
  std::vector<float> query_, keys_, values_, scores_, out_, top_, keep_;
  std::vector<Floats> total_;
  bool finite_ = true;  // whether all values of the tile are
};

}  // namespace oxfuse
