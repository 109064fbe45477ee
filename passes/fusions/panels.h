// Products of rows of activations with weights in panels of 16 rows, a lane for each row: what packed formats have in common.
//
// A few activations are multiplied as the weights stream by; for more, two panels are decoded once for up to TALLEST of them. Sums never
// cross lanes. A block of 32 values along the input is summed by itself, then scaled and added, so that a row's result is the same alone and
// in a batch, and for any number of threads.
//
// A format says what its panels are: how many, of how many values (`panels`, `length`), where one is (`Panel at(expert, panel)`), and to stream
// them, or have them decoded here,
//   Raw load(panel, block, c, part)        eight values (8 c .. 8 c + 7) of LANES rows, as they are stored
//   void ask<CACHE>(panel, block, c)       to have the memory of those of all rows in that cache, and the block's scales
//   NEAR, FAR                              blocks: how far ahead of what is multiplied it asks, for the first cache and for the
//                                          second, which has room for more that is under way; 0: for that one not at all
//   static Floats value(raw, k)            the k-th of the eight, without its scale
//   Floats scale(panel, block, part)       the scales of LANES rows
//   Reading reading(items, some)           what is read where an item is `some` panels
// and for activations of 8 bits also
//   static Bits bytes(raw, half)           four values of each row as bytes, values 0 4 1 5 of the eight or 2 6 3 7: ZERO + value / UNIT
#pragma once

#include "activations.h"
#include "product.h"

// Before functions that do nothing but ask the memory for lines: a call of one GCC takes for a call without effect, and leaves it out.
#define ASK __attribute__((always_inline))

namespace oxfuse {

constexpr int FIRST_CACHE = 3, SECOND_CACHE = 2;  // as __builtin_prefetch calls them
constexpr int PANEL_ROWS = 16;
constexpr int PV = PANEL_ROWS / LANES;      // vectors of float32 of a panel
constexpr int PAIR = 2;                     // panels that are decoded and multiplied together: gates, and the ups that belong to them
constexpr int CHUNK_BLOCKS = 9;             // blocks that are decoded at a time: 18 KB in bfloat16, 36 KB in float32
constexpr int WIDTH = PAIR * PANEL_ROWS;    // results of a row
constexpr int V = PAIR * PV;                // the same in vectors

inline Ints splat_int(int32_t x) { return Ints{} + x; }

// Four activations in every lane.
inline Ints four_at(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return splat_int(four);
}

// Sums of four products a lane of bytes 0..255 with activations -127..127, added to `acc`. Weights are bytes less ZERO; `factor` times the sum of
// a block's activations is what its sum must begin with. All are exact.
#ifdef __AVX2__
struct Multiplied {  // two steps, the first in 16 bits
  template <int ZERO>
  static constexpr int factor() { return ZERO > 32 ? 0 : -ZERO; }
  template <int ZERO>
  static Ints add(Ints acc, Bits weights, Ints x) {
#ifdef __AVX512BW__
    const __m512i ones = _mm512_set1_epi16(1);
    __m512i w = (__m512i)weights, v = (__m512i)x;
    if constexpr (ZERO > 32) {  // two products of large bytes do not fit 16 bits: the sign goes to the activations
      w = _mm512_xor_si512(w, _mm512_set1_epi8(static_cast<char>(ZERO)));
      v = _mm512_mask_sub_epi8(v, _mm512_movepi8_mask(w), _mm512_setzero_si512(), v);
      w = _mm512_abs_epi8(w);
    }
    return acc + (Ints)_mm512_madd_epi16(_mm512_maddubs_epi16(w, v), ones);
#else
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i w = (__m256i)weights, v = (__m256i)x;
    if constexpr (ZERO > 32) {
      w = _mm256_xor_si256(w, _mm256_set1_epi8(static_cast<char>(ZERO)));
      v = _mm256_sign_epi8(v, w);
      w = _mm256_abs_epi8(w);
    }
    return acc + (Ints)_mm256_madd_epi16(_mm256_maddubs_epi16(w, v), ones);
#endif
  }
};

// One instruction, which the assembler knows whatever the target; with the intrinsic GCC 12 keeps sums in memory.
struct Vnni {
  template <int ZERO>
  static constexpr int factor() { return -ZERO; }
  template <int ZERO>
  static __attribute__((always_inline)) Ints add(Ints acc, Bits weights, Ints x) {
#ifdef __AVX512F__
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(weights), "v"(x));
#else
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(weights), "x"(x));
#endif
    return acc;
  }
};
#else
struct Multiplied {
  template <int ZERO>
  static constexpr int factor() { return 0; }
  template <int ZERO>
  static Ints add(Ints acc, Bits weights, Ints x) {
    for (int byte = 0; byte < 4; ++byte) {
      const Ints w = (Ints)(weights >> 8 * byte & 255) - ZERO, v = (x << (24 - 8 * byte)) >> 24;
      acc += w * v;
    }
    return acc;
  }
};
using Vnni = Multiplied;
#endif

// Whether the processor multiplies bytes in one instruction. OXFUSE_NO_VNNI stands for one that does not.
inline bool multiplies_bytes() {
#if defined(OXFUSE_NO_VNNI) || !defined(__AVX2__)
  return false;
#elif defined(__AVX512F__)
  return __builtin_cpu_supports("avx512vnni");
#else
  return __builtin_cpu_supports("avxvnni");
#endif
}

// What the sum of a block of 8-bit numbers is multiplied by where products with weights of a format begin.
template <class F>
int start_factor() {
  return multiplies_bytes() ? Vnni::factor<F::ZERO>() : Multiplied::factor<F::ZERO>();
}

// Two panels, and the two that the thread will read then. The memory is asked for the beginning of these while the end of the first ones is
// multiplied: a processor's own prefetching begins anew with each panel, which left it idle for a tenth of the time.
template <class F>
struct Panels {
  typename F::Panel now[PAIR], then[PAIR];
  const typename F::Panel& operator[](int64_t panel) const { return now[panel]; }
  ASK void ask(const F& w, int64_t block, int c) const {
    const int64_t ahead = block + (F::FAR ? F::FAR : F::NEAR), left = w.length / BLOCK - ahead;
#pragma GCC unroll 2
    for (int p = 0; p < PAIR; ++p) {
      if constexpr (F::FAR > 0) w.template ask<FIRST_CACHE>(now[p], block + F::NEAR, c);  // first: the other way round it was 3 % slower
      w.template ask<F::FAR ? SECOND_CACHE : FIRST_CACHE>(left > 0 ? now[p] : then[p], left > 0 ? ahead : -left, c);
    }
  }
  // The same of one of them while blocks are decoded: for those whose turn it is when all rows are multiplied with these.
  ASK void ask_chunk(const F& w, int64_t block, int p, int c) const {
    const int64_t ahead = block + CHUNK_BLOCKS, left = w.length / BLOCK - ahead;
    w.template ask<SECOND_CACHE>(left > 0 ? now[p] : then[p], left > 0 ? ahead : -left, c);
  }
};

// out[m][panel][row] of two panels for M rows of x, in float32.
template <int M, class F>
__attribute__((noinline)) void stream_panels(const F& w, const Panels<F>& panels, const Activations& x, float* out) {
  Floats total[M][V] = {};
  for (int64_t b = 0; b < w.length / BLOCK; ++b) {
    Floats acc[M][V] = {};
    for (int c = 0; c < 4; ++c) {
      typename F::Raw raw[V];
      panels.ask(w, b, c);
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) raw[i] = w.load(panels[i / PV], b, c, i % PV);
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) {
        Floats value[V];
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) value[i] = F::value(raw[i], k);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          const float factor = x.wide[(b * x.rows + m) * BLOCK + 8 * c + k];
#pragma GCC unroll 4
          for (int i = 0; i < V; ++i) acc[m][i] += value[i] * factor;
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) {
      const Floats scale = w.scale(panels[i / PV], b, i % PV);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) total[m][i] += acc[m][i] * scale;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M * V; ++i) store(out + i * LANES, total[i / V][i % V]);  // one by one: copied whole they stay in memory
}

// The same for rows of x in 8 bits.
template <class Dot, int M, class F>
__attribute__((noinline)) void stream_bytes(const F& w, const Panels<F>& panels, const Activations& x, float* out) {
  Floats total[M][V] = {};
  for (int64_t b = 0; b < w.length / BLOCK; ++b) {
    const Activations at = x.from(0, b);
    Ints acc[M][V];
#pragma GCC unroll 16
    for (int i = 0; i < M * V; ++i) acc[i / V][i % V] = splat_int(at.bytes.starts[i / V]);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      typename F::Raw raw[V];
      panels.ask(w, b, c);
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) raw[i] = w.load(panels[i / PV], b, c, i % PV);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        Bits value[V];
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) value[i] = F::bytes(raw[i], half);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          const Ints four = four_at(at.bytes.values + m * BLOCK + 8 * c + 4 * half);
#pragma GCC unroll 4
          for (int i = 0; i < V; ++i) acc[m][i] = Dot::template add<F::ZERO>(acc[m][i], value[i], four);
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) {
      const Floats scale = w.scale(panels[i / PV], b, i % PV) * F::UNIT;
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) total[m][i] += __builtin_convertvector(acc[m][i], Floats) * (scale * at.bytes.scales[m]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M * V; ++i) store(out + i * LANES, total[i / V][i % V]);  // one by one: copied whole they stay in memory
}

// Blocks of two panels in float32, without their scales: values[k][panel][row].
struct DecodedWide {
  alignas(64) float values[CHUNK_BLOCKS * BLOCK * WIDTH];
  alignas(64) Floats scales[CHUNK_BLOCKS][V];
};

// Decodes `count` blocks from block `first` on.
template <class F>
void decode_wide(const F& w, const Panels<F>& panels, int64_t first, int64_t count, DecodedWide& to) {
  for (int64_t b = 0; b < count; ++b)
    for (int i = 0; i < V; ++i) {
      to.scales[b][i] = w.scale(panels[i / PV], first + b, i % PV);
      for (int c = 0; c < 4; ++c) {
        panels.ask_chunk(w, first + b, i / PV, c);
        const typename F::Raw raw = w.load(panels[i / PV], first + b, c, i % PV);
#pragma GCC unroll 8
        for (int k = 0; k < 8; ++k) store(to.values + ((b * BLOCK + 8 * c + k) * V + i) * LANES, F::value(raw, k));
      }
    }
}

// Sums of R rows with two panels, c[m][panel][row], while blocks are added to them: in registers where these hold them beside a block's own sums.
template <int R>
class Sums {
 public:
  explicit Sums(float* c) : c_(c) {
    if constexpr (HELD) {
#pragma GCC unroll 32
      for (int i = 0; i < R * V; ++i) held_[i] = load(c + i * LANES);
    }
  }
  __attribute__((always_inline)) void add(int i, Floats x) {
    if constexpr (HELD)
      held_[i] += x;
    else
      store(c_ + i * LANES, load(c_ + i * LANES) + x);
  }
  __attribute__((always_inline)) void end_block() {
    if constexpr (!HELD) asm volatile("" ::: "memory");  // or GCC keeps c in memory of its own from block to block
  }
  __attribute__((always_inline)) void end() {
    if constexpr (HELD) {
#pragma GCC unroll 32
      for (int i = 0; i < R * V; ++i) store(c_ + i * LANES, held_[i]);
    }
  }

 private:
  static constexpr bool HELD = LANES == 16;
  float* c_;
  Floats held_[HELD ? R * V : 1];
};

constexpr int HELD_ROWS = 6;  // rows of x in a register tile whose sums are held: these, a block's, the weights and a value fill 32 registers

// c[m] += x[m] . w for R rows of x, and `count` decoded blocks of them.
template <int R>
__attribute__((noinline)) void advance_wide(const DecodedWide& decoded, const Activations& rows, int64_t count, float* c) {
  const float *w = decoded.values, *x = rows.wide;
  for (int64_t b = 0; b < count; ++b, x += rows.rows * BLOCK) {
    asm volatile("" ::: "memory");  // or GCC keeps c in memory of its own from block to block
    Floats acc[R][V] = {};
    for (int k = 0; k < BLOCK; ++k, w += WIDTH) {
      Floats value[V];
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) value[i] = load(w + i * LANES);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const float factor = x[r * BLOCK + k];
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) acc[r][i] += value[i] * factor;
      }
    }
#pragma GCC unroll 32
    for (int i = 0; i < R * V; ++i) store(c + i * LANES, load(c + i * LANES) + acc[i / V][i % V] * decoded.scales[b][i % V]);
  }
}

constexpr int WIDE_ROWS = LANES == 16 ? 12 : 3;  // rows of x in a register tile: their sums, the weights and a value fill the registers

template <int R = WIDE_ROWS>
void advance_wide_rows(int64_t some, const DecodedWide& w, const Activations& x, int64_t count, float* c) {
  if constexpr (R > 1)
    if (some < R) return advance_wide_rows<R - 1>(some, w, x, count, c);
  advance_wide<R>(w, x, count, c);
}

// Blocks of two panels as bytes: values[block][four of eight][panel and part], and their scales.
struct DecodedBytes {
  alignas(64) Bits values[CHUNK_BLOCKS][8][V];
  alignas(64) Floats scales[CHUNK_BLOCKS][V];
};

template <class F>
void decode_bytes(const F& w, const Panels<F>& panels, int64_t first, int64_t count, DecodedBytes& to) {
  for (int64_t b = 0; b < count; ++b)
    for (int i = 0; i < V; ++i) {
      to.scales[b][i] = w.scale(panels[i / PV], first + b, i % PV) * F::UNIT;
      for (int c = 0; c < 4; ++c) {
        panels.ask_chunk(w, first + b, i / PV, c);
        const typename F::Raw raw = w.load(panels[i / PV], first + b, c, i % PV);
        to.values[b][2 * c][i] = F::bytes(raw, 0);
        to.values[b][2 * c + 1][i] = F::bytes(raw, 1);
      }
    }
}

// `advance_wide` for rows of x in 8 bits.
template <class Dot, int ZERO, int R>
__attribute__((noinline)) void advance_bytes(const DecodedBytes& w, const Activations& rows, int64_t count, float* c) {
  Numbers<int8_t> x = rows.bytes;
  Sums<R> sums(c);
  for (int64_t b = 0; b < count; ++b, x.values += rows.rows * BLOCK, x.scales += rows.rows, x.starts += rows.rows) {
    Ints acc[R][V];
#pragma GCC unroll 32
    for (int i = 0; i < R * V; ++i) acc[i / V][i % V] = splat_int(x.starts[i / V]);
    for (int g = 0; g < 8; ++g) {
      Bits value[V];
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) value[i] = w.values[b][g][i];
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const Ints four = four_at(x.values + r * BLOCK + 4 * g);
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) acc[r][i] = Dot::template add<ZERO>(acc[r][i], value[i], four);
      }
    }
#pragma GCC unroll 32
    for (int i = 0; i < R * V; ++i) sums.add(i, __builtin_convertvector(acc[i / V][i % V], Floats) * (w.scales[b][i % V] * x.scales[i / V]));
    sums.end_block();
  }
  sums.end();
}

constexpr int BYTE_ROWS = LANES == 16 ? HELD_ROWS : 2;

template <class Dot, int ZERO, int R = BYTE_ROWS>
void advance_byte_rows(int64_t some, const DecodedBytes& w, const Activations& x, int64_t count, float* c) {
  if constexpr (R > 1)
    if (some < R) return advance_byte_rows<Dot, ZERO, R - 1>(some, w, x, count, c);
  advance_bytes<Dot, ZERO, R>(w, x, count, c);
}

constexpr int STREAMED_ROWS = LANES == 16 ? 4 : 2;  // rows of x that are multiplied as weights stream by

// Buffers of one thread.
struct PanelScratch {
  union {
    DecodedWide wide;
    DecodedBytes bytes;
  };
  alignas(64) float out[TALLEST * WIDTH];   // [m][panel][row]
  alignas(64) float kept[TALLEST * BLOCK];  // for who makes blocks of several results
  PanelScratch() {}
};

// scratch.out = x . two panels, for m <= TALLEST rows of x in 8 bits.
template <class Dot, class F>
void multiply_bytes(const F& w, const Panels<F>& panels, const Activations& x, int m, PanelScratch& scratch) {
  if (m <= STREAMED_ROWS) {
    if constexpr (STREAMED_ROWS > 2) {
      if (m == 3) return stream_bytes<Dot, 3>(w, panels, x, scratch.out);
      if (m == 4) return stream_bytes<Dot, 4>(w, panels, x, scratch.out);
    }
    return m == 1 ? stream_bytes<Dot, 1>(w, panels, x, scratch.out) : stream_bytes<Dot, 2>(w, panels, x, scratch.out);
  }
  std::fill_n(scratch.out, m * WIDTH, 0.f);
  for (int64_t b = 0; b < w.length / BLOCK; b += CHUNK_BLOCKS) {
    const int64_t count = std::min<int64_t>(CHUNK_BLOCKS, w.length / BLOCK - b);
    decode_bytes(w, panels, b, count, scratch.bytes);
    for_tiles(m, BYTE_ROWS, [&](int64_t first, int64_t some) {
      advance_byte_rows<Dot, F::ZERO>(some, scratch.bytes, x.from(first, b), count, scratch.out + first * WIDTH);
    });
  }
}

// The same for rows in float32.
template <class F>
void multiply_wide(const F& w, const Panels<F>& panels, const Activations& x, int m, PanelScratch& scratch) {
  if constexpr (requires { typename F::Raw; }) {
    if constexpr (STREAMED_ROWS > 2) {
      if (m == 3) return stream_panels<3>(w, panels, x, scratch.out);
      if (m == 4) return stream_panels<4>(w, panels, x, scratch.out);
    }
    if (m == 1) return stream_panels<1>(w, panels, x, scratch.out);
    if (m == 2) return stream_panels<2>(w, panels, x, scratch.out);
  }
  std::fill_n(scratch.out, m * WIDTH, 0.f);
  for (int64_t b = 0; b < w.length / BLOCK; b += CHUNK_BLOCKS) {
    const int64_t count = std::min<int64_t>(CHUNK_BLOCKS, w.length / BLOCK - b);
    decode_wide(w, panels, b, count, scratch.wide);
    for_tiles(m, WIDE_ROWS, [&](int64_t first, int64_t some) {
      advance_wide_rows(some, scratch.wide, x.from(first, b), count, scratch.out + first * WIDTH);
    });
  }
}

// What a format does better on some processors (moe_dispatch/packed.h); most have nothing. Returns whether scratch.out is made.
template <class F>
bool multiply_specially(const F&, const Panels<F>&, const Activations&, int, PanelScratch&) {
  return false;
}

struct PanelPair {
  int64_t expert, panel;  // the first of two
};

// scratch.out = x . two panels of an expert, for m <= TALLEST rows of x; `then` are those that the thread will read next, or the same.
template <class F>
void multiply_panels(const F& w, PanelPair now, PanelPair then, const Activations& x, int m, PanelScratch& scratch) {
  Panels<F> panels;
  for (int p = 0; p < PAIR; ++p) {  // the last one twice where their number is odd
    panels.now[p] = w.at(now.expert, std::min(now.panel + p, w.panels - 1));
    panels.then[p] = w.at(then.expert, std::min(then.panel + p, w.panels - 1));
  }
  if constexpr (requires { F::ZERO; })
    if (x.bytes)
      return multiplies_bytes() ? multiply_bytes<Vnni>(w, panels, x, m, scratch) : multiply_bytes<Multiplied>(w, panels, x, m, scratch);
  if (!multiply_specially(w, panels, x, m, scratch)) multiply_wide(w, panels, x, m, scratch);
}

// Calls out(group, first panel, scratch) for all products of groups of rows with the panels of their experts, two panels at a time; four follow
// each other on one thread, from a multiple of four on. The rows are those of `tokens` tokens.
template <class F, class Out>
void for_each_panel_pair(const F& w, const Places& places, const Activations& x, int64_t tokens, Out&& out) {
  const int64_t pairs = (w.panels + PAIR - 1) / PAIR, twos = (pairs + 1) / 2, items = places.groups.size() * twos, rows = places.group.size();
  if (!items) return;
  const int64_t most = (twos + 11) / 12;  // a dozenth of an expert
  share(tokens, items, most, rows * w.panels * PANEL_ROWS * w.length, w.reading(items, 2 * PAIR), [&](const auto& next) {
    const std::unique_ptr<PanelScratch> scratch(new PanelScratch);
    const auto first_of = [&](int64_t item) { return PanelPair{places.groups[item / twos].expert, item % twos * 2 * PAIR}; };
    for (Range part = next(); part.begin < part.end; part = next())
      for (int64_t item = part.begin; item < part.end; ++item) {
        const Group& group = places.groups[item / twos];
        const Activations own = x.at(group.first * places.blocks, group.count);
        PanelPair now = first_of(item);
        for (const int64_t end = std::min(w.panels, now.panel + 2 * PAIR); now.panel < end; now.panel += PAIR) {
          PanelPair then{now.expert, now.panel + PAIR};
          if (then.panel >= end) then = item + 1 < part.end ? first_of(item + 1) : now;
          multiply_panels(w, now, then, own, static_cast<int>(group.count), *scratch);
          out(group, now.panel, *scratch);
        }
      }
  });
}

// out[row][...] of `width` columns: the results of a pair of panels, and the bias.
template <class T>
void store_results(const float* results, const Group& group, int64_t panel, int64_t width, const std::optional<Values>& bias, T* out) {
  const int64_t first = panel * PANEL_ROWS, some = std::min<int64_t>(WIDTH, width - first);
  float added[WIDTH] = {};
  if (bias)
    for (int64_t r = 0; r < some; ++r) added[r] = (*bias)[first + r];
  for (int64_t i = 0; i < group.count; ++i)
    for (int64_t r = 0; r < some; ++r) out[(group.first + i) * width + first + r] = narrow<T>(results[i * WIDTH + r] + added[r]);
}

}  // namespace oxfuse
