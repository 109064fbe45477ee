// Attention of a block of queries of one sequence: they walk the keys in tiles, each decoded once and laid out so that sums run along
// whole vectors, with a running maximum and sum for each row. After FlashAttention (Dao et al. 2022, arXiv 2205.14135): no row of
// scores is ever whole.
//
// A row's result does not depend on the rows beside it, nor on who computes which part: tiles and segments begin at multiples of their
// length, each segment has a state of its own, and states are merged in the order of the keys. Rows walk a tile in strips; a strip
// multiplies what its rows see alone, to a vector of keys.
#pragma once

#include <array>
#include <utility>

#include "../ops.h"

namespace oxfuse {

constexpr int TILE = 64;         // keys of a tile, whole vectors of them
constexpr int64_t SEGMENT = 512; // keys of a segment, whole tiles: several threads may take segments of one row
constexpr int STRIP = 6;         // rows of one register tile; STRIP * WIDE accumulators, WIDE values and one factor
#if defined(__x86_64__) && !defined(__AVX2__)
constexpr int WIDE = 1;  // a vector of ours takes two of its 16 registers
#else
constexpr int WIDE = LANES == 16 ? 4 : 2;  // vectors of one register tile
#endif
constexpr int64_t BLOCK_ROWS = 384;  // query rows (tokens times heads of a group) that share a decoded tile
constexpr int64_t FEW = 2 * STRIP;    // rows whose scores of a tile are held at once
constexpr float LOG2E = 1.44269504f;
static_assert(TILE % LANES == 0 && SEGMENT % TILE == 0 && STRIP <= LANES, "a tile is whole vectors, a segment whole tiles");

// float32 values, not set, from the beginning of a cache line on: a vector that lies across two lines takes twice as long to load and to store.
class Aligned {
 public:
  explicit Aligned(int64_t count) : vectors_(new Floats[(count + LANES - 1) / LANES]) {}
  float* data() const { return reinterpret_cast<float*>(vectors_.get()); }
  float& operator[](int64_t i) const { return data()[i]; }

 private:
  std::unique_ptr<Floats[]> vectors_;
};

inline int64_t whole(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// out[m] = out[m] * keep[m] (zeros without `keep`) + the sum over k of a[m][k] * b[k], for M rows m and V vectors. At each step the
// memory is asked for one line of `ahead`, to lie in the second-level cache when it is decoded.
template <int M, int V>
__attribute__((noinline)) static void outer(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t count, const float* keep,
                                            float* out, int64_t out_stride, const uint64_t* ahead) {
  Floats acc[M][V];
#pragma GCC unroll 24
  for (int i = 0; i < M * V; ++i) acc[i / V][i % V] = keep ? load(out + i / V * out_stride + i % V * LANES) * keep[i / V] : Floats{};
  for (int64_t k = 0; k < count; ++k, b += b_stride) {
    __builtin_prefetch(reinterpret_cast<const void*>(ahead[k]), 0, 2);
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

typedef uint32_t Pair;  // two bfloat16 values, the first in the lower half

#ifdef __AVX512F__
// The same for bfloat16: `count` pairs of a[m] and of b, and the sums times `scale`. Two lines of `ahead` at each step.
template <int M, int V>
__attribute__((noinline)) static void outer_pairs(const bfloat16* a, int64_t a_stride, const Pair* b, int64_t b_stride, int64_t count, const float* keep,
                                                  float* out, int64_t out_stride, const uint64_t* ahead, float scale) {
  __m512 acc[M][V];
#pragma GCC unroll 24
  for (int i = 0; i < M * V; ++i) acc[i / V][i % V] = (__m512)(keep ? load(out + i / V * out_stride + i % V * LANES) * keep[i / V] : Floats{});
  for (int64_t k = 0; k < count; ++k, b += b_stride) {
    __builtin_prefetch(reinterpret_cast<const void*>(ahead[2 * k]), 0, 2);
    __builtin_prefetch(reinterpret_cast<const void*>(ahead[2 * k + 1]), 0, 2);
    __m512i values[V];
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) values[i] = _mm512_loadu_si512(b + i * LANES);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const __m512i factor = pair_at(a + m * a_stride + 2 * k);
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) add_pairs(acc[m][i], values[i], factor);
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < M * V; ++i) store(out + i / V * out_stride + i % V * LANES, (Floats)acc[i / V][i % V] * scale);
}
#endif

struct InFloat32 {
  template <int... I>
  static constexpr auto sizes(std::integer_sequence<int, I...>) { return std::array{&outer<I / WIDE + 1, I % WIDE + 1>...}; }
};
struct InPairs {
#ifdef __AVX512F__
  template <int... I>
  static constexpr auto sizes(std::integer_sequence<int, I...>) { return std::array{&outer_pairs<I / WIDE + 1, I % WIDE + 1>...}; }
  static Floats rounded(Floats x, bfloat16* to) { return store_rounded(to, x); }
#endif
};

// The same for `rows` <= STRIP rows and any number of vectors, in passes of about the same width.
template <class Way, class A, class B, class... Scale>
void outer_all(int64_t rows, int64_t vectors, const A* a, int64_t a_stride, const B* b, int64_t b_stride, int64_t count, const float* keep, float* out,
               int64_t out_stride, const uint64_t* ahead, Scale... scale) {
  static constexpr auto sizes = Way::sizes(std::make_integer_sequence<int, STRIP * WIDE>());
  for (int64_t left = (vectors + WIDE - 1) / WIDE, done = 0; left > 0; --left) {
    const int64_t some = left == 1 ? vectors - done : (vectors - done + left - 1) / left;
    sizes[(rows - 1) * WIDE + some - 1](a, a_stride, b + done * LANES, b_stride, count, keep, out + done * LANES, out_stride, ahead, scale...);
    done += some;
  }
}

inline Ints load_count() {  // 0, 1, 2, ...
  static constexpr int32_t count[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Ints out;
  std::memcpy(&out, count, sizeof(out));
  return out;
}

// Writes `count` values in float32.
template <class T>
void widen_all(const T* from, int64_t count, float* to) {
  int64_t i = 0;
#pragma GCC unroll 4
  for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = widen(from[i]);
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

// Lines of memory that the next tile is in, which are asked for one by one while this one is worked on.
class Lines {
 public:
  // `steps` lines at most are taken at once.
  explicit Lines(int64_t steps) : steps_(whole(steps, PLACES)), lines_(steps_) { clear(); }
  void clear() { count_ = taken_ = 0; }
  void add(const void* from, int64_t bytes) {
    const int64_t more = (bytes + LINE - 1) / LINE;
    write(reinterpret_cast<uint64_t>(from), LINE, more);
    count_ += more;
  }
  void end() { write(reinterpret_cast<uint64_t>(this), 0, steps_); }  // after the last line comes one that is at hand
  const uint64_t* take(int64_t steps) {
    const uint64_t* at = &lines_[taken_];
    taken_ = std::min(count_, taken_ + steps);
    return at;
  }

 private:
  static constexpr int64_t LINE = 64, PLACES = LANES / 2;
  typedef uint64_t Places __attribute__((vector_size(PLACES * 8)));
  void write(uint64_t first, uint64_t apart, int64_t count) {
    if (static_cast<int64_t>(lines_.size()) < count_ + count + PLACES) lines_.resize(2 * (count_ + count + PLACES));
    Places at;
    for (int i = 0; i < PLACES; ++i) at[i] = first + i * apart;
    for (int64_t i = 0; i < count; i += PLACES, at += PLACES * apart) std::memcpy(&lines_[count_ + i], &at, sizeof(at));
  }
  const int64_t steps_;
  std::vector<uint64_t> lines_;
  int64_t count_ = 0, taken_ = 0;
};

// What the tokens of a block see where no mask is given: those before them, no further back than `window`, all where it is 0. `index` is
// the first token's place in the sequence.
struct Causal {
  static constexpr bool MASKED = false;
  int64_t index, tokens, window;
  // The keys that any token from `first` to `last` sees lie from begin to end.
  int64_t begin(int64_t first, int64_t) const { return window ? std::max<int64_t>(0, index + first - window + 1) : 0; }
  int64_t end(int64_t, int64_t last) const { return index + last + 1; }
  const float* added(int64_t, int64_t) const { return nullptr; }  // to a token's scores of the tile, where MASKED
};

// Queries of up to some tokens of one sequence with the heads that share a KV head, and where their results go.
template <class T>
struct Queries {
  const T* q;  // the group's heads of the first token
  int64_t stride, head_stride, tokens;
  const float* sink;  // of each head, or null
  float scale;
  T* result;
  int64_t stride_out;  // from one token's results to the next one's; its heads lie side by side
};

// Of some rows, over the keys of a segment or of those so far: the largest score, and what is relative to it, the sum of the weights and
// of the values with their weights.
struct State {
  Aligned top, out;
  std::vector<Floats> total;
  State(int64_t rows, int64_t width) : top(rows + LANES), out(rows * width), total(rows) { std::fill_n(top.data(), rows + LANES, 0.f); }
  void clear(int64_t rows) {
    std::fill_n(top.data(), rows, -INFINITY);
    std::fill_n(total.begin(), rows, Floats{});
  }
  void clear_out(int64_t values) { std::fill_n(out.data(), values, 0.f); }
};

// Attention of up to `tokens` tokens of one sequence with the `group` query heads that share a KV head; with `Way` InPairs in bfloat16, where
// weights are rounded to it and `dim` is whole vectors.
//
// A `view` is `Causal`, or has its members. A `source` has three, which decode to float32 from `key` on, as many keys below `end` as lie in
// one piece, and return their number: keys(key, end, tile, to) to to[d * TILE + i] for key tile + i, what it leaves for others may be
// anything; values(key, end, tile, to) to to[i * width + d] for key tile + i, where `width` is dim in whole vectors; lines(key, end, to) names
// the memory that both would read. In pairs they leave values d and d + 1 of a key at to[d / 2 * TILE + i], and those of keys tile + i and
// tile + i + 1 at to[i / 2 * width + d], a key that was not asked for being zero. `then(to)` names what the thread will read after this block.
template <class T, class Way = InFloat32>
class Block {
  static constexpr bool PAIRS = std::is_same_v<Way, InPairs>;
  using Value = std::conditional_t<PAIRS, bfloat16, float>;  // of queries and weights
  using Step = std::conditional_t<PAIRS, Pair, float>;       // of keys and values
  static constexpr int64_t STEP = sizeof(Step) / sizeof(Value);

 public:
  Block(int64_t tokens, int64_t group, int64_t dim)
      : group_(group), dim_(dim), width_(whole(dim, LANES)), query_(tokens * group * dim / STEP), keys_(TILE * width_ / STEP),
        values_(tokens * group > FEW ? TILE * width_ / STEP : 0),
        token_(tokens * group), part_(tokens * group, width_), all_(tokens * group, width_), lines_(std::max<int64_t>(dim, TILE)) {
    for (int64_t r = 0; r < tokens * group; ++r) token_[r] = static_cast<int>(r / group);
  }

  // Computes the whole block.
  template <class View, class Source, class Then>
  void run(const Queries<T>& to, const View& view, const Source& source, Then&& then) {
    for (const bool alone : {false, true}) {
      start<View>(to);
      const int64_t begin = view.begin(0, to.tokens - 1), end = view.end(0, to.tokens - 1);
      if (begin >= end) all_.clear_out(rows_ * width_);
      for (int64_t key = begin; key < end; key = (key / SEGMENT + 1) * SEGMENT) {
        walk(view, source, key, std::min(end, (key / SEGMENT + 1) * SEGMENT), end, alone, then);
        merge<View>(part_, key <= begin);
      }
      if (finish(to) || alone) return;
      // A weight of 0 does not hide infinity and NaN, so each row takes the keys that it sees, and not those of its strip.
    }
  }

  // The same by parts: `part` leaves the state of a segment, whatever its keys; `join` merges those of all segments that any of the tokens
  // sees, in their order, and returns whether the results are finite: where not, `run` has to be asked.
  template <class View, class Source, class Then>
  void part(const Queries<T>& to, const View& view, const Source& source, int64_t segment, State& state, Then&& then) {
    start<View>(to);
    const int64_t begin = std::max(view.begin(0, to.tokens - 1), segment * SEGMENT);
    const int64_t end = std::min(view.end(0, to.tokens - 1), (segment + 1) * SEGMENT);
    std::swap(state, part_);
    walk(view, source, begin, end, end, false, then);
    std::swap(state, part_);
  }
  template <class View>
  bool join(const Queries<T>& to, const State* states, int64_t count) {
    start<View>(to);
    for (int64_t i = 0; i < count; ++i) merge<View>(states[i], i == 0);
    return finish(to);
  }

 private:
  // Scores are logarithms of base 2, and the factor is part of the scale; where a mask is added, its least value times the factor would be
  // infinite, so that differences take the factor there.
  template <class View>
  static Floats weight(Floats difference) {
    if constexpr (View::MASKED) return exp2(difference * LOG2E);
    return exp2(difference);
  }

  template <class View>
  void start(const Queries<T>& to) {
    const float factor = View::MASKED ? 1.f : LOG2E, scale = scale_ = to.scale * factor;
    rows_ = to.tokens * group_;
    all_.clear(rows_);
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t head = r - token_[r] * group_;
      if (to.sink) all_.top[r] = to.sink[head] * factor, all_.total[r][0] = 1.f;
      const T* from = to.q + token_[r] * to.stride + head * to.head_stride;
      if constexpr (PAIRS) {
        std::memcpy(query(r), from, dim_ * sizeof(bfloat16));
        continue;
      }
      float* row = &query_[r * dim_];
      int64_t d = 0;
      for (; d + LANES <= dim_; d += LANES) store(row + d, load(from + d) * scale);
      for (; d < dim_; ++d) row[d] = widen(from[d]) * scale;
    }
  }

  // Leaves in part_ the state over the keys [first, end) of one segment. The tokens see keys up to `last`: these are asked for ahead.
  template <class View, class Source, class Then>
  void walk(const View& view, const Source& source, int64_t first, int64_t end, int64_t last, bool alone, Then&& then) {
    part_.clear(rows_);
    part_.clear_out(rows_ * width_);
    const int64_t strips = (rows_ + STRIP - 1) / STRIP;  // of about the same height
    const int64_t low_height = alone ? 1 : rows_ / strips, higher = alone ? 0 : rows_ % strips;
    // Few rows take a tile of values in the place of its keys, when all have their scores: one is then in the first-level cache with what it
    // is decoded from. Many rows would not have their scores there.
    const bool few = rows_ <= FEW;
    Step *keys = reinterpret_cast<Step*>(keys_.data()), *values = few ? keys : reinterpret_cast<Step*>(values_.data());
    for (int64_t tile = first / TILE * TILE; tile < end; tile += TILE) {
      const int64_t next = tile + TILE;
      const auto fill = [&](auto&& piece) {
        for (int64_t key = std::max(first, tile); key < std::min(end, next);) key += piece(key, std::min(end, next));
      };
      const auto fill_values = [&] { fill([&](int64_t key, int64_t stop) { return source.values(key, stop, tile, values); }); };
      const auto each_strip = [&](auto&& act) {  // act(first row, rows, the keys of the tile that any of them sees, scores, keep)
        float *scores = scores_, *keep = keep_;
        for (int64_t r = 0, strip = 0; r < rows_; ++strip) {
          const int64_t some = low_height + (strip < higher);
          const int64_t begin = std::max(view.begin(token_[r], token_[r + some - 1]), tile) - tile;
          const int64_t stop = std::min(view.end(token_[r], token_[r + some - 1]), next) - tile;
          if (begin < stop) act(r, some, begin, stop, scores, keep);
          r += some;
          if (few) scores += some * TILE, keep += LANES;
        }
      };
      const auto score = [&](int64_t r, int64_t some, int64_t begin, int64_t stop, float* scores, float* keep) {
        const int low = static_cast<int>(begin / LANES * LANES), high = static_cast<int>(whole(stop, LANES));
        if constexpr (PAIRS)
          outer_all<Way>(some, (high - low) / LANES, query(r), dim_, keys + low, TILE, dim_ / 2, nullptr, scores + low, TILE, lines_.take(dim_), scale_);
        else
          outer_all<Way>(some, (high - low) / LANES, query(r), dim_, keys + low, TILE, dim_, nullptr, scores + low, TILE, lines_.take(dim_));
        softmax(view, r, some, tile, low, high, scores, keep);
      };
      const auto add = [&](int64_t r, int64_t some, int64_t begin, int64_t stop, float* scores, float* keep) {
        float* out = &part_.out[r * width_];
        if constexpr (PAIRS) {
          const bfloat16* weights = reinterpret_cast<const bfloat16*>(scores);
          const int64_t low = begin / 2, high = (stop + 1) / 2;  // what the row does not see of these pairs has no weight
          const auto add_pairs_of = [&](int64_t k, int64_t count, const Pair* from, const float* kept) {
            outer_all<Way>(some, width_ / LANES, weights + 2 * k, 2 * TILE, from, width_, count, kept, out, width_, lines_.take(2 * count), 1.f);
          };
          if (!alone) return add_pairs_of(low, high - low, values + low * width_, keep);
          for (int64_t k = low; k < high; ++k) {
            static constexpr float whole_sum = 1.f;
            const Pair seen = (2 * k < begin ? 0 : 0xffffu) | (2 * k + 1 < stop ? 0xffff0000u : 0);
            for (int64_t d = 0; d < width_; d += LANES) store(&alone_[d], (Floats)(load_bits(values + k * width_ + d) & seen));
            add_pairs_of(k, 1, reinterpret_cast<const Pair*>(alone_.data()), k > low ? &whole_sum : keep);
          }
        } else {
          outer_all<Way>(some, width_ / LANES, scores + begin, TILE, values + begin * width_, width_, stop - begin, keep, out, width_,
                         lines_.take(stop - begin));
        }
      };
      lines_.clear();
      if (next < last) {
        source.lines(next, std::min(last, next + TILE), lines_);
      } else {
        then(lines_);
      }
      lines_.end();
      fill([&](int64_t key, int64_t stop) { return source.keys(key, stop, tile, keys); });
      if (few) {
        each_strip(score);
        fill_values();
        each_strip(add);
      } else {
        fill_values();
        each_strip([&](auto... of) { score(of...), add(of...); });
      }
    }
  }

  // Turns the scores of `some` rows from r on, of the keys [low, high) of the tile, into weights relative to the rows' running maxima, 0
  // for keys that a row does not see.
  template <class View>
  void softmax(const View& view, int64_t r, int64_t some, int64_t tile, int low, int high, float* scores, float* keep) {
    float shift[LANES];
    store(shift, splat(-INFINITY));
    for (int64_t m = 0; m < some; ++m) {
      float* s = scores + m * TILE;
      const int token = token_[r + m];
      const int first = static_cast<int>(std::max<int64_t>(view.begin(token, token) - tile, low));
      const int last = static_cast<int>(std::max<int64_t>(first, std::min<int64_t>(view.end(token, token) - tile, high)));
      Floats best = splat(-INFINITY);
      if (View::MASKED || first > low || last < high) {
        const float* added = view.added(token, tile);
        for (int j = low; j < high; j += LANES) {
          Floats x = load(s + j);
          if constexpr (View::MASKED) x += load(added + j);
          x = (Bits)(load_count() + (j - first)) < static_cast<uint32_t>(last - first) ? x : splat(-INFINITY);
          store(s + j, x);
          best = larger(x, best);
        }
      } else {
        for (int j = low; j < high; j += LANES) {
          const Floats x = load(s + j);
          best = larger(x, best);
        }
      }
      shift[m] = largest(best);
    }
    float* tops = &part_.top[r];  // of more rows than the strip's, whose shift is -inf: they stay as they are
    const Floats before = load(tops), found = load(shift), top = larger(found, before);
    const Floats base = top == -INFINITY ? Floats{} : top;
    store(keep, weight<View>(before - base));
    store(shift, base);
    store(tops, top);
    for (int64_t m = 0; m < some; ++m) {
      float* s = scores + m * TILE;
      Floats total = part_.total[r + m] * keep[m];
      for (int j = low; j < high; j += LANES) {
        Floats x = weight<View>(load(s + j) - shift[m]);
        if constexpr (PAIRS)
          x = Way::rounded(x, reinterpret_cast<bfloat16*>(s) + j);  // they begin where the scores began, and take half of the place
        else
          store(s + j, x);
        total += x;
      }
      part_.total[r + m] = total;
    }
  }

  // Adds the state of the next segment to all_, which has no values yet where it is the first.
  template <class View>
  void merge(const State& part, bool first) {
    for (int64_t r = 0; r < rows_; r += LANES) {
      const Floats a = load(&all_.top[r]), b = load(&part.top[r]), top = larger(a, b), base = top == -INFINITY ? Floats{} : top;
      const Floats of_a = weight<View>(a - base), of_b = weight<View>(b - base);
      store(&all_.top[r], top);
      for (int64_t i = r; i < std::min(rows_, r + LANES); ++i) {
        all_.total[i] = all_.total[i] * of_a[i - r] + part.total[i] * of_b[i - r];
        const float *more = &part.out[i * width_], keep = of_a[i - r], factor = of_b[i - r];
        float* out = &all_.out[i * width_];
        for (int64_t d = 0; d < width_; d += LANES) store(out + d, (first ? Floats{} : load(out + d) * keep) + load(more + d) * factor);
      }
    }
  }

  // Writes the results and returns whether all are finite.
  bool finish(const Queries<T>& to) {
    Floats zeros = {};
    for (int64_t r = 0; r < rows_; ++r) {
      const float total = sum(all_.total[r]), factor = total == 0.f ? 1.f : 1.f / total;
      const float* from = &all_.out[r * width_];
      T* result = to.result + token_[r] * to.stride_out + (r - token_[r] * group_) * dim_;
      int64_t d = 0;
      for (; d + LANES <= dim_; d += LANES) {
        const Floats x = load(from + d) * factor;
        zeros += x * 0.f;
        store(result + d, x);
      }
      for (; d < dim_; ++d) {
        const float x = from[d] * factor;
        zeros[0] += x * 0.f;
        result[d] = narrow<T>(x);
      }
    }
    return sum(zeros) == 0.f;
  }

  Value* query(int64_t row) const { return reinterpret_cast<Value*>(query_.data()) + row * dim_; }

  const int64_t group_, dim_, width_;
  Aligned query_, keys_, values_, alone_{PAIRS ? width_ : 0};
  std::vector<int> token_;  // of each row
  State part_, all_;        // of a segment, and of all so far
  Lines lines_;
  alignas(64) float scores_[FEW * TILE], keep_[FEW * LANES];
  int64_t rows_ = 0;
  float scale_ = 1;  // of scores, where queries do not have it
};

}  // namespace oxfuse
