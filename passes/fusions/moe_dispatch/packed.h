// Products of rows of activations with MXFP4 experts in the packed layout (packed.py): panels of 16 rows, a lane for each row.
//
// A few activations are multiplied as the weights stream by; for more, two panels are decoded once for up to TALLEST of them. Decoded weights
// are bfloat16, which is exact, where the activations are and the processor multiplies it: for a few, since more values fit an instruction;
// for many, if that is also faster. Elsewhere they are float32.
// Sums never cross lanes. A block is summed by itself, then added: to scale a block's sum, or its values before, is the same, since scales are
// powers of two, so that a row's result is the same alone and in a batch, but for bfloat16 on processors that are slow at it.
#pragma once

#include <atomic>

#include "../product.h"

namespace oxfuse {

constexpr int PANEL_ROWS = 16;
constexpr int PV = PANEL_ROWS / LANES;      // vectors of float32 of a panel
constexpr int PAIR = 2;                     // panels that are decoded and multiplied together: gates, and the ups that belong to them
constexpr int BLOCK_BYTES = 256;            // 32 values of 16 rows
constexpr int CHUNK_BLOCKS = 9;             // blocks that are decoded at a time: 18 KB in bfloat16, 36 KB in float32
constexpr int TALLEST = 240;                // rows of activations that share decoded panels; their results take 30 KB
constexpr int WIDTH = PAIR * PANEL_ROWS;    // results of a row

struct PackedExperts {
  const uint8_t *values, *scales;
  int64_t panels, length;  // of an expert; `length` is a multiple of 32
  const float* power;      // [256]: 2^(byte - 127)
  const uint8_t* block(int64_t expert, int64_t panel) const { return values + (expert * panels + panel) * (length / 32) * BLOCK_BYTES; }
  const uint8_t* scale(int64_t expert, int64_t panel) const { return scales + (expert * panels + panel) * (length / 32) * PANEL_ROWS; }
};

// Rows of activations, `stride` values apart; `half` is null where bfloat16 cannot be multiplied.
struct Activations {
  const float* wide;
  const bfloat16* half;
  int64_t stride;
  Activations from(int64_t row) const { return {wide + row * stride, half ? half + row * stride : nullptr, stride}; }
};

// The e2m1 values that the lowest four bits of each lane say.
inline Floats e2m1(Bits lanes) {
#if defined(__AVX512F__)
  const __m512 table = _mm512_setr_ps(0, .5f, 1, 1.5f, 2, 3, 4, 6, 0, -.5f, -1, -1.5f, -2, -3, -4, -6);
  return _mm512_permutexvar_ps((__m512i)lanes, table);  // it looks at the low four bits alone
#elif defined(__AVX2__)
  const __m256 table = _mm256_setr_ps(0, .5f, 1, 1.5f, 2, 3, 4, 6);
  return (Floats)((Bits)_mm256_permutevar8x32_ps(table, (__m256i)lanes) | ((lanes << 28) & 0x80000000u));  // the low three bits
#else
  constexpr float table[16] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, 0, -.5f, -1, -1.5f, -2, -3, -4, -6};
  Floats out;
  for (int i = 0; i < LANES; ++i) out[i] = table[lanes[i] & 15];
  return out;
#endif
}

inline Bits load_bits(const uint8_t* from) {
  Bits out;
  std::memcpy(&out, from, sizeof(out));
  return out;
}

// The scales of LANES rows.
inline Floats scales_of(const uint8_t* from, const float* power) {
  Floats out;
  for (int i = 0; i < LANES; ++i) out[i] = power[from[i]];
  return out;
}

// At which bit of a lane value k of eight begins.
constexpr int bit_of(int k) { return 4 * (k / 2) + 16 * (k % 2); }

// out[m][panel][row] of two panels for M rows of x, in float32.
template <int M>
__attribute__((noinline)) void stream_panels(const PackedExperts& w, const uint8_t* const* blocks, const uint8_t* const* scales, const float* x,
                                             int64_t stride, float* out) {
  Floats total[M][PAIR][PV] = {};
  for (int64_t b = 0; b < w.length / 32; ++b) {
    Floats acc[M][PAIR][PV] = {};
    for (int c = 0; c < 4; ++c) {
      Bits lanes[PAIR][PV];
#pragma GCC unroll 4
      for (int i = 0; i < PAIR * PV; ++i) {
        const uint8_t* from = blocks[i / PV] + b * BLOCK_BYTES + c * 64 + i % PV * LANES * 4;
        lanes[i / PV][i % PV] = load_bits(from);
        __builtin_prefetch(from + 8 * BLOCK_BYTES);
      }
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) {
        Floats value[PAIR][PV];
#pragma GCC unroll 4
        for (int i = 0; i < PAIR * PV; ++i) value[i / PV][i % PV] = e2m1(lanes[i / PV][i % PV] >> bit_of(k));
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          const float factor = x[m * stride + b * 32 + 8 * c + k];
#pragma GCC unroll 4
          for (int i = 0; i < PAIR * PV; ++i) acc[m][i / PV][i % PV] += value[i / PV][i % PV] * factor;
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < PAIR * PV; ++i) {
      const Floats scale = scales_of(scales[i / PV] + b * PANEL_ROWS + i % PV * LANES, w.power);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) total[m][i / PV][i % PV] += acc[m][i / PV][i % PV] * scale;
    }
  }
  std::memcpy(out, total, sizeof(total));
}

// Decodes blocks of two panels to float32, scaled: to[k][panel][row].
inline void decode_wide(const PackedExperts& w, const uint8_t* const* blocks, const uint8_t* const* scales, int64_t count, float* to) {
  for (int64_t b = 0; b < count; ++b)
    for (int i = 0; i < PAIR * PV; ++i) {
      const Floats scale = scales_of(scales[i / PV] + b * PANEL_ROWS + i % PV * LANES, w.power);
      for (int c = 0; c < 4; ++c) {
        const Bits lanes = load_bits(blocks[i / PV] + b * BLOCK_BYTES + c * 64 + i % PV * LANES * 4);
#pragma GCC unroll 8
        for (int k = 0; k < 8; ++k) store(to + ((b * 32 + 8 * c + k) * PAIR * PV + i) * LANES, e2m1(lanes >> bit_of(k)) * scale);
      }
    }
}

// c[m] += x[m] . w for R rows of x and `count` decoded blocks.
template <int R>
__attribute__((noinline)) void advance_wide(const float* w, const float* x, int64_t stride, int64_t count, float* c) {
  constexpr int V = PAIR * PV;
  for (int64_t b = 0; b < count; ++b, x += 32) {
    asm volatile("" ::: "memory");  // or GCC keeps c in memory of its own from block to block
    Floats acc[R][V] = {};
    for (int k = 0; k < 32; ++k, w += WIDTH) {
      Floats value[V];
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) value[i] = load(w + i * LANES);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const float factor = x[r * stride + k];
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) acc[r][i] += value[i] * factor;
      }
    }
#pragma GCC unroll 32
    for (int i = 0; i < R * V; ++i) store(c + i * LANES, load(c + i * LANES) + acc[i / V][i % V]);
  }
}

constexpr int WIDE_ROWS = LANES == 16 ? 12 : 3;  // rows of x in a register tile: their sums, the weights and a value fill the registers

template <int R = WIDE_ROWS>
void advance_wide_rows(int some, const float* w, const float* x, int64_t stride, int64_t count, float* c) {
  if constexpr (R > 1)
    if (some < R) return advance_wide_rows<R - 1>(some, w, x, stride, count, c);
  advance_wide<R>(w, x, stride, count, c);
}

#ifdef __AVX512F__
#ifdef OXFUSE_EMULATE_BF16
inline void add_pairs(__m512& acc, __m512i a, __m512i b) { acc = (__m512)dot_pairs((Floats)acc, a, b); }
#else
// With the intrinsic GCC 12 keeps sums in memory; the assembler knows the instruction whatever the target.
inline __attribute__((always_inline)) void add_pairs(__m512& acc, __m512i a, __m512i b) { asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b)); }
#endif

inline __m512i e2m1_table() {  // as bfloat16, twice
  alignas(64) static const uint16_t table[32] = {0,      0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0, 0x8000, 0xBF00, 0xBF80,
                                                 0xBFC0, 0xC000, 0xC040, 0xC080, 0xC0C0, 0,      0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040,
                                                 0x4080, 0x40C0, 0x8000, 0xBF00, 0xBF80, 0xBFC0, 0xC000, 0xC040, 0xC080, 0xC0C0};
  return _mm512_load_si512(table);
}

inline __m512i pair_at(const bfloat16* x) {  // two values, in every lane
  int32_t both;
  std::memcpy(&both, x, 4);
  return _mm512_set1_epi32(both);
}

// `stream_panels` in bfloat16.
template <int M>
__attribute__((noinline)) void stream_pairs(const PackedExperts& w, const uint8_t* const* blocks, const uint8_t* const* scales, const bfloat16* x,
                                            int64_t stride, float* out) {
  const __m512i table = e2m1_table();
  __m512 total[M][PAIR];
#pragma GCC unroll 8
  for (int i = 0; i < M * PAIR; ++i) total[i / PAIR][i % PAIR] = _mm512_setzero_ps();
  for (int64_t b = 0; b < w.length / 32; ++b) {
    __m512 acc[M][PAIR];
#pragma GCC unroll 8
    for (int i = 0; i < M * PAIR; ++i) acc[i / PAIR][i % PAIR] = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      __m512i lanes[PAIR];
#pragma GCC unroll 2
      for (int p = 0; p < PAIR; ++p) {
        lanes[p] = _mm512_loadu_si512(blocks[p] + b * BLOCK_BYTES + c * 64);
        _mm_prefetch(reinterpret_cast<const char*>(blocks[p] + (b + 8) * BLOCK_BYTES + c * 64), _MM_HINT_T0);
      }
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) {
        __m512i value[PAIR];
#pragma GCC unroll 2
        for (int p = 0; p < PAIR; ++p) value[p] = _mm512_permutexvar_epi16(_mm512_srli_epi16(lanes[p], 4 * n), table);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          const __m512i factor = pair_at(x + m * stride + b * 32 + 8 * c + 2 * n);
#pragma GCC unroll 2
          for (int p = 0; p < PAIR; ++p) add_pairs(acc[m][p], value[p], factor);
        }
      }
    }
#pragma GCC unroll 2
    for (int p = 0; p < PAIR; ++p) {
      const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales[p] + b * PANEL_ROWS)));
      // 2^(byte - 127); that of 0 is subnormal
      const __m512 scale = (__m512)_mm512_max_epi32(_mm512_slli_epi32(bytes, 23), _mm512_set1_epi32(0x00400000));
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) total[m][p] = _mm512_fmadd_ps(acc[m][p], scale, total[m][p]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M * PAIR; ++i) _mm512_storeu_ps(out + i * 16, total[i / PAIR][i % PAIR]);
}

// Decodes blocks of two panels to scaled bfloat16, pairs of values beside each other: to[k / 2][panel][row][k % 2]. Returns whether all are
// exact, which scales at the ends of their range prevent: multiplying bfloat16 takes subnormal values for 0.
inline bool decode_pairs(const uint8_t* const* blocks, const uint8_t* const* scales, int64_t count, __m512i* to) {
  const __m512i table = e2m1_table(), magnitude = _mm512_set1_epi16(0x7fff);
  bool exact = true;
  for (int p = 0; p < PAIR; ++p)
    for (int64_t b = 0; b < count; ++b) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales[p] + b * PANEL_ROWS));
      const __m128i inside = _mm_and_si128(_mm_cmpeq_epi8(_mm_max_epu8(bytes, _mm_set1_epi8(2)), bytes),
                                           _mm_cmpeq_epi8(_mm_min_epu8(bytes, _mm_set1_epi8(static_cast<char>(251))), bytes));
      exact &= _mm_movemask_epi8(inside) == 0xffff;
      const __m512i wide = _mm512_sub_epi32(_mm512_cvtepu8_epi32(bytes), _mm512_set1_epi32(127));
      const __m512i exponent = _mm512_slli_epi16(_mm512_or_si512(_mm512_slli_epi32(wide, 16), _mm512_and_si512(wide, _mm512_set1_epi32(0xffff))), 7);
      for (int c = 0; c < 4; ++c) {
        const __m512i lanes = _mm512_loadu_si512(blocks[p] + b * BLOCK_BYTES + c * 64);
        _mm_prefetch(reinterpret_cast<const char*>(blocks[p] + (b + CHUNK_BLOCKS) * BLOCK_BYTES + c * 64), _MM_HINT_T1);
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) {
          const __m512i value = _mm512_permutexvar_epi16(_mm512_srli_epi16(lanes, 4 * n), table);
          const __mmask32 some = _mm512_test_epi16_mask(value, magnitude);  // a zero has no exponent
          to[(b * 16 + 4 * c + n) * PAIR + p] = _mm512_mask_add_epi16(value, some, value, exponent);
        }
      }
    }
  return exact;
}

// `advance_wide` in bfloat16.
template <int R>
__attribute__((noinline)) void advance_panel_pairs(const __m512i* w, const bfloat16* x, int64_t stride, int64_t count, float* c) {
  for (int64_t b = 0; b < count; ++b, x += 32) {
    asm volatile("" ::: "memory");  // or GCC keeps c in memory of its own from block to block
    __m512 acc[R][PAIR];
#pragma GCC unroll 32
    for (int i = 0; i < R * PAIR; ++i) acc[i / PAIR][i % PAIR] = _mm512_setzero_ps();
    for (int k = 0; k < 16; ++k, w += PAIR) {
      const __m512i first = w[0], second = w[1];
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const __m512i factor = pair_at(x + r * stride + 2 * k);
        add_pairs(acc[r][0], first, factor);
        add_pairs(acc[r][1], second, factor);
      }
    }
#pragma GCC unroll 32
    for (int i = 0; i < R * PAIR; ++i)
      _mm512_storeu_ps(c + i * 16, _mm512_add_ps(_mm512_loadu_ps(c + i * 16), acc[i / PAIR][i % PAIR]));
  }
}

constexpr int PAIR_ROWS = 12;

template <int R = PAIR_ROWS>
void advance_pair_rows(int some, const __m512i* w, const bfloat16* x, int64_t stride, int64_t count, float* c) {
  if constexpr (R > 1)
    if (some < R) return advance_pair_rows<R - 1>(some, w, x, stride, count, c);
  advance_panel_pairs<R>(w, x, stride, count, c);
}
#endif

// Calls each(first, some) for runs of at most `most` of m rows, as alike as can be: a small rest would leave a processor waiting.
template <class Each>
void for_tiles(int m, int most, Each&& each) {
  const int tiles = (m + most - 1) / most;
  for (int tile = 0, first = 0; tile < tiles; ++tile) {
    const int some = m / tiles + (tile < m % tiles);
    each(first, some);
    first += some;
  }
}

constexpr int STREAMED_ROWS = LANES == 16 ? 4 : 2;  // rows of x that are multiplied as weights stream by

// Buffers of one thread.
struct PackedScratch {
  alignas(64) float decoded[CHUNK_BLOCKS * 32 * WIDTH];  // in bfloat16 the half of it
  alignas(64) float out[TALLEST * WIDTH];                // [m][panel][row]
};

// scratch.out = x . two panels from `panel` on of an expert, for m <= TALLEST rows of x.
inline void multiply_panels(const PackedExperts& w, int64_t expert, int64_t panel, const Activations& x, int m, PackedScratch& scratch) {
  const uint8_t *blocks[PAIR], *scales[PAIR];
  for (int p = 0; p < PAIR; ++p) {  // the last panel twice where their number is odd
    const int64_t at = std::min(panel + p, w.panels - 1);
    blocks[p] = w.block(expert, at), scales[p] = w.scale(expert, at);
  }
  if (m <= STREAMED_ROWS) {
#ifdef __AVX512F__
    if (x.half) {
      switch (m) {
        case 1: return stream_pairs<1>(w, blocks, scales, x.half, x.stride, scratch.out);
        case 2: return stream_pairs<2>(w, blocks, scales, x.half, x.stride, scratch.out);
        case 3: return stream_pairs<3>(w, blocks, scales, x.half, x.stride, scratch.out);
        default: return stream_pairs<4>(w, blocks, scales, x.half, x.stride, scratch.out);
      }
    }
    if (m == 3) return stream_panels<3>(w, blocks, scales, x.wide, x.stride, scratch.out);
    if (m == 4) return stream_panels<4>(w, blocks, scales, x.wide, x.stride, scratch.out);
#endif
    return m == 1 ? stream_panels<1>(w, blocks, scales, x.wide, x.stride, scratch.out)
                  : stream_panels<2>(w, blocks, scales, x.wide, x.stride, scratch.out);
  }
  std::fill_n(scratch.out, m * WIDTH, 0.f);
  for (int64_t b = 0; b < w.length / 32; b += CHUNK_BLOCKS) {
    const int64_t count = std::min<int64_t>(CHUNK_BLOCKS, w.length / 32 - b);
#ifdef __AVX512F__
    if (x.half && multiplies_bfloat16()) {
      __m512i* decoded = reinterpret_cast<__m512i*>(scratch.decoded);
      if (decode_pairs(blocks, scales, count, decoded)) {
        for_tiles(m, PAIR_ROWS, [&](int first, int some) {
          advance_pair_rows(some, decoded, x.half + first * x.stride + b * 32, x.stride, count, scratch.out + first * WIDTH);
        });
        for (int p = 0; p < PAIR; ++p) blocks[p] += count * BLOCK_BYTES, scales[p] += count * PANEL_ROWS;
        continue;
      }
    }
#endif
    decode_wide(w, blocks, scales, count, scratch.decoded);
    for_tiles(m, WIDE_ROWS, [&](int first, int some) {
      advance_wide_rows(some, scratch.decoded, x.wide + first * x.stride + b * 32, x.stride, count, scratch.out + first * WIDTH);
    });
    for (int p = 0; p < PAIR; ++p) blocks[p] += count * BLOCK_BYTES, scales[p] += count * PANEL_ROWS;
  }
}

// Calls out(expert, first sorted row, count, first panel, results) for all products of the routed rows, sorted by expert, with the panels of
// their experts, two panels at a time. Whoever of the threads is free takes the next part, so that none waits long for a slower one.
template <class Out>
static void for_each_panel_pair(const PackedExperts& w, const std::vector<int64_t>& begin, const Activations& x, Out&& out) {
  const int64_t experts = begin.size() - 1, pairs = (w.panels + PAIR - 1) / PAIR, rows = begin[experts];
  const int64_t parts = std::min<int64_t>(pairs, 12);  // of the panels of an expert
  std::vector<int64_t> busy;
  for (int64_t e = 0; e < experts; ++e)
    if (begin[e] < begin[e + 1]) busy.push_back(e);
  const int64_t items = busy.size() * parts, work = rows * w.panels * PANEL_ROWS * w.length;
  std::atomic<int64_t> next{0};
  parallel_for(0, std::min<int64_t>({items, 1 + work / GRAIN, torch::stable::get_num_threads()}), 1, [&](int64_t, int64_t) {
    const std::unique_ptr<PackedScratch> scratch(new PackedScratch);
    for (int64_t item; (item = next.fetch_add(1)) < items;) {
      const int64_t e = busy[item / parts], part = item % parts;
      for (int64_t m = begin[e]; m < begin[e + 1]; m += TALLEST) {
        const int some = static_cast<int>(std::min<int64_t>(TALLEST, begin[e + 1] - m));
        for (int64_t pair = pairs * part / parts; pair < pairs * (part + 1) / parts; ++pair) {
          multiply_panels(w, e, pair * PAIR, x.from(m), some, *scratch);
          out(e, m, some, pair * PAIR, scratch->out);
        }
      }
    }
  });
}

}  // namespace oxfuse
