// MXFP4 experts in the packed layout (packed.py), as a format of `panels.h`; and products for bfloat16 models, of which twice as many values
// fit an instruction: in bfloat16, to which weights are decoded exactly, where the processor is fast at it, else as 16-bit numbers.
#pragma once

#include "../panels.h"

namespace oxfuse {

constexpr int BLOCK_BYTES = 256;  // 32 values of 16 rows

struct Mxfp4 {
  static constexpr int ZERO = 12;       // bytes are twice the values, more by this
  static constexpr float UNIT = 0.5f;
  static constexpr int NEAR = 3, FAR = 30;
  struct Panel {
    const uint8_t *blocks, *scales;
  };
  using Raw = Bits;

  const uint8_t *values, *factors;
  int64_t panels, length;  // of an expert; `length` is a multiple of 32
  const float* power;      // [256]: 2^(byte - 127)

  Panel at(int64_t expert, int64_t panel) const {
    const int64_t block = (expert * panels + panel) * (length / BLOCK);
    return {values + block * BLOCK_BYTES, factors + block * PANEL_ROWS};
  }
  Reading reading(int64_t, int64_t) const { return {values}; }  // of which experts is not known before
  Raw load(const Panel& panel, int64_t block, int c, int part) const {
    return load_bits(panel.blocks + block * BLOCK_BYTES + c * 64 + part * LANES * 4);
  }
  template <int CACHE>
  ASK void ask(const Panel& panel, int64_t block, int c) const {
    __builtin_prefetch(panel.blocks + block * BLOCK_BYTES + c * 64, 0, CACHE);
    if (c == 0) __builtin_prefetch(panel.scales + block * PANEL_ROWS, 0, CACHE);
  }
  // Value k of eight begins at bit 4 * (k / 2) + 16 * (k % 2) of a lane.
  static Floats value(Raw raw, int k) { return e2m1(raw >> (4 * (k / 2) + 16 * (k % 2))); }
  static Bits bytes(Raw raw, int half) { return twice_e2m1((half ? raw >> 4 : raw) & 0x0f0f0f0fu); }
  Floats scale(const Panel& panel, int64_t block, int part) const {
    const uint8_t* from = panel.scales + block * PANEL_ROWS + part * LANES;
#ifdef __AVX512F__
    // 2^(byte - 127); that of 0 is subnormal, and of 255 there is none.
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return (Floats)_mm512_max_epi32(_mm512_slli_epi32(bytes, 23), _mm512_set1_epi32(0x00400000));
#else
    Floats out;
    for (int i = 0; i < LANES; ++i) out[i] = power[from[i]];
    return out;
#endif
  }

 private:
  // The e2m1 values that the lowest four bits of each lane say.
  static Floats e2m1(Bits lanes) {
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

  // 12 + twice the e2m1 value, for each byte, of which the lower four bits alone are set.
  static Bits twice_e2m1(Bits codes) {
#if defined(__AVX512BW__)
    const __m128i table = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
    return (Bits)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), (__m512i)codes);
#elif defined(__AVX2__)
    const __m128i table = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
    return (Bits)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), (__m256i)codes);
#else
    constexpr uint8_t table[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
    uint8_t bytes[LANES * 4];
    std::memcpy(bytes, &codes, sizeof(bytes));
    for (uint8_t& byte : bytes) byte = table[byte];
    return load_bits(bytes);
#endif
  }
};

#ifdef __AVX512F__
inline __m512i e2m1_table() {  // as bfloat16, twice
  alignas(64) static const uint16_t table[32] = {0,      0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0, 0x8000, 0xBF00, 0xBF80,
                                                 0xBFC0, 0xC000, 0xC040, 0xC080, 0xC0C0, 0,      0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040,
                                                 0x4080, 0x40C0, 0x8000, 0xBF00, 0xBF80, 0xBFC0, 0xC000, 0xC040, 0xC080, 0xC0C0};
  return _mm512_load_si512(table);
}

// Decodes blocks of two panels to scaled bfloat16, pairs of values beside each other: to[k / 2][panel][row][k % 2]. Returns whether all are
// exact, which scales at the ends of their range prevent: multiplying bfloat16 takes subnormal values for 0.
inline bool decode_pairs(const Mxfp4& w, const Panels<Mxfp4>& panels, int64_t first, int64_t count, __m512i* to) {
  const __m512i values = e2m1_table();
  // A scale adds to the exponent, but a zero has none: values are raised, zeros are not, and what is taken off stops at zero.
  constexpr int RAISED = 124 << 7;
  const __mmask32 some = _mm512_test_epi16_mask(values, _mm512_set1_epi16(0x7fff));
  const __m512i table = _mm512_maskz_add_epi16(some, values, _mm512_set1_epi16(RAISED));
  bool exact = true;
  for (int p = 0; p < PAIR; ++p)
    for (int64_t b = 0; b < count; ++b) {
      const uint8_t* block = panels[p].blocks + (first + b) * BLOCK_BYTES;
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(panels[p].scales + (first + b) * PANEL_ROWS));
      const __m128i inside = _mm_and_si128(_mm_cmpeq_epi8(_mm_max_epu8(bytes, _mm_set1_epi8(2)), bytes),
                                           _mm_cmpeq_epi8(_mm_min_epu8(bytes, _mm_set1_epi8(static_cast<char>(251))), bytes));
      exact &= _mm_movemask_epi8(inside) == 0xffff;
      const __m512i wide = _mm512_sub_epi32(_mm512_set1_epi32(127 + (RAISED >> 7)), _mm512_cvtepu8_epi32(bytes));
      const __m512i off = _mm512_slli_epi16(_mm512_or_si512(_mm512_slli_epi32(wide, 16), wide), 7);
      for (int c = 0; c < 4; ++c) {
        const __m512i lanes = _mm512_loadu_si512(block + c * 64);
        panels.ask_chunk(w, first + b, p, c);
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n)
          to[(b * 16 + 4 * c + n) * PAIR + p] = _mm512_subs_epu16(_mm512_permutexvar_epi16(_mm512_srli_epi16(lanes, 4 * n), table), off);
      }
    }
  return exact;
}

// `advance_wide` in bfloat16.
template <int R>
__attribute__((noinline)) void advance_panel_pairs(const __m512i* w, const Activations& rows, int64_t count, float* c) {
  const bfloat16* x = rows.half;
  Sums<R> sums(c);
  for (int64_t b = 0; b < count; ++b, x += rows.rows * BLOCK) {
    __m512 acc[R][PAIR];
#pragma GCC unroll 32
    for (int i = 0; i < R * PAIR; ++i) acc[i / PAIR][i % PAIR] = _mm512_setzero_ps();
    for (int k = 0; k < 16; ++k, w += PAIR) {
      const __m512i first = w[0], second = w[1];
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const __m512i factor = pair_at(x + r * BLOCK + 2 * k);
        add_pairs(acc[r][0], first, factor);
        add_pairs(acc[r][1], second, factor);
      }
    }
#pragma GCC unroll 32
    for (int i = 0; i < R * PAIR; ++i) sums.add(i, (Floats)acc[i / PAIR][i % PAIR]);
  }
  sums.end();
}


template <int R = HELD_ROWS>
void advance_pair_rows(int64_t some, const __m512i* w, const Activations& x, int64_t count, float* c) {
  if constexpr (R > 1)
    if (some < R) return advance_pair_rows<R - 1>(some, w, x, count, c);
  advance_panel_pairs<R>(w, x, count, c);
}

inline __m512i twice_table() {  // twice the values in 16 bits, all of them twice
  alignas(64) static const int16_t table[32] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12,
                                                0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  return _mm512_load_si512(table);
}

inline __attribute__((always_inline)) void add_words(__m512i& acc, __m512i a, __m512i b) { asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b)); }

// Two ways to multiply two values of 16 bits a lane: in bfloat16, and as whole numbers, where a block's sum is exact.
struct InBfloat16 {
  using Sum = __m512;
  static constexpr float UNIT = 1;
  static __m512i table() { return e2m1_table(); }
  static const bfloat16* values(const Activations& x) { return x.half; }
  static __attribute__((always_inline)) void add(Sum& acc, __m512i a, __m512i b) { add_pairs(acc, a, b); }
  static Floats scaled(Sum acc, Floats scale, const Activations&, int) { return (Floats)acc * scale; }
};
struct InWords {
  using Sum = __m512i;
  static constexpr float UNIT = Mxfp4::UNIT;
  static __m512i table() { return twice_table(); }
  static const int16_t* values(const Activations& x) { return x.words.values; }
  static __attribute__((always_inline)) void add(Sum& acc, __m512i a, __m512i b) { add_words(acc, a, b); }
  static Floats scaled(Sum acc, Floats scale, const Activations& x, int m) { return (Floats)_mm512_cvtepi32_ps(acc) * (scale * x.words.scales[m]); }
};

// `stream_panels` in one of these.
template <class Way, int M>
__attribute__((noinline)) void stream_twos(const Mxfp4& w, const Panels<Mxfp4>& panels, const Activations& x, float* out) {
  const __m512i table = Way::table();
  Floats total[M][PAIR] = {};
  for (int64_t b = 0; b < w.length / BLOCK; ++b) {
    const Activations at = x.from(0, b);
    typename Way::Sum acc[M][PAIR] = {};
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      __m512i lanes[PAIR];
      panels.ask(w, b, c);
#pragma GCC unroll 2
      for (int p = 0; p < PAIR; ++p) lanes[p] = (__m512i)w.load(panels[p], b, c, 0);
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) {
        __m512i value[PAIR];
#pragma GCC unroll 2
        for (int p = 0; p < PAIR; ++p) value[p] = _mm512_permutexvar_epi16(_mm512_srli_epi16(lanes[p], 4 * n), table);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          const __m512i factor = pair_at(Way::values(at) + m * BLOCK + 8 * c + 2 * n);
#pragma GCC unroll 2
          for (int p = 0; p < PAIR; ++p) Way::add(acc[m][p], value[p], factor);
        }
      }
    }
#pragma GCC unroll 2
    for (int p = 0; p < PAIR; ++p) {
      const Floats scale = w.scale(panels[p], b, 0) * Way::UNIT;
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) total[m][p] = total[m][p] + Way::scaled(acc[m][p], scale, at, m);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M * PAIR; ++i) store(out + i * LANES, total[i / PAIR][i % PAIR]);  // one by one: copied whole they stay in memory
}

template <class Way, int M = STREAMED_ROWS>
void stream_rows_in_twos(int m, const Mxfp4& w, const Panels<Mxfp4>& panels, const Activations& x, float* out) {
  if constexpr (M > 1)
    if (m < M) return stream_rows_in_twos<Way, M - 1>(m, w, panels, x, out);
  stream_twos<Way, M>(w, panels, x, out);
}

// Decodes blocks of two panels to twice the values in 16 bits, pairs of values beside each other: to[k / 2][panel][row][k % 2].
inline void decode_words(const Mxfp4& w, const Panels<Mxfp4>& panels, int64_t first, int64_t count, __m512i* to, Floats (*factors)[V]) {
  const __m512i table = twice_table();
  for (int p = 0; p < PAIR; ++p)
    for (int64_t b = 0; b < count; ++b) {
      factors[b][p] = w.scale(panels[p], first + b, 0) * Mxfp4::UNIT;
      for (int c = 0; c < 4; ++c) {
        panels.ask_chunk(w, first + b, p, c);
        const __m512i lanes = (__m512i)w.load(panels[p], first + b, c, 0);
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) to[(b * 16 + 4 * c + n) * PAIR + p] = _mm512_permutexvar_epi16(_mm512_srli_epi16(lanes, 4 * n), table);
      }
    }
}

// `advance_wide` for rows of x in 16 bits.
template <int R>
__attribute__((noinline)) void advance_words(const __m512i* w, const Floats (*factors)[V], const Activations& rows, int64_t count, float* c) {
  Numbers<int16_t> x = rows.words;
  Sums<R> sums(c);
  for (int64_t b = 0; b < count; ++b, x.values += rows.rows * BLOCK, x.scales += rows.rows) {
    __m512i acc[R][PAIR];
#pragma GCC unroll 32
    for (int i = 0; i < R * PAIR; ++i) acc[i / PAIR][i % PAIR] = _mm512_setzero_si512();
    for (int k = 0; k < BLOCK / 2; ++k, w += PAIR) {
      const __m512i first = w[0], second = w[1];
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const __m512i factor = pair_at(x.values + r * BLOCK + 2 * k);
        add_words(acc[r][0], first, factor);
        add_words(acc[r][1], second, factor);
      }
    }
#pragma GCC unroll 32
    for (int i = 0; i < R * PAIR; ++i)
      sums.add(i, (Floats)_mm512_cvtepi32_ps(acc[i / PAIR][i % PAIR]) * (factors[b][i % PAIR] * x.scales[i / PAIR]));
  }
  sums.end();
}

template <int R = HELD_ROWS>
void advance_word_rows(int64_t some, const __m512i* w, const Floats (*factors)[V], const Activations& x, int64_t count, float* c) {
  if constexpr (R > 1)
    if (some < R) return advance_word_rows<R - 1>(some, w, factors, x, count, c);
  advance_words<R>(w, factors, x, count, c);
}
#endif

// Whether bfloat16 activations are multiplied as 16-bit numbers, by their block's largest: 2^-16 of that is a hundredth of what bfloat16 rounds
// off, sums are exact, and where bfloat16 is slow it takes half the time of float32.
inline bool multiplies_words() {
#ifdef __AVX512F__
  return multiplies_bytes() && !multiplies_bfloat16();
#else
  return false;
#endif
}

// scratch.out = x . two panels where bfloat16 or 16-bit numbers serve best; returns whether they did.
inline bool multiply_specially(const Mxfp4& w, const Panels<Mxfp4>& panels, const Activations& x, int m, PanelScratch& scratch) {
#ifdef __AVX512F__
  const bool pairs = x.half;
  if (!pairs && !x.words) return false;
  if (m <= STREAMED_ROWS) {
    (pairs ? stream_rows_in_twos<InBfloat16> : stream_rows_in_twos<InWords>)(m, w, panels, x, scratch.out);
    return true;
  }
  std::fill_n(scratch.out, m * WIDTH, 0.f);
  __m512i* decoded = reinterpret_cast<__m512i*>(scratch.wide.values);
  for (int64_t b = 0; b < w.length / BLOCK; b += CHUNK_BLOCKS) {
    const int64_t count = std::min<int64_t>(CHUNK_BLOCKS, w.length / BLOCK - b);
    if (!pairs) {
      decode_words(w, panels, b, count, decoded, scratch.wide.scales);
      for_tiles(m, HELD_ROWS, [&](int64_t first, int64_t some) {
        advance_word_rows(some, decoded, scratch.wide.scales, x.from(first, b), count, scratch.out + first * WIDTH);
      });
    } else if (decode_pairs(w, panels, b, count, decoded)) {
      for_tiles(m, HELD_ROWS, [&](int64_t first, int64_t some) {
        advance_pair_rows(some, decoded, x.from(first, b), count, scratch.out + first * WIDTH);
      });
    } else {
      decode_wide(w, panels, b, count, scratch.wide);
      const int64_t values = count * x.rows * BLOCK;  // so few weights need it that rows are widened anew each time, and not held
      const Buffer<float> wide = buffer<float>(values);
      for (int64_t i = 0; i < values; i += LANES) store(&wide[i], load(x.from(0, b).half + i));
      const Activations rows{.wide = wide.get(), .rows = x.rows};
      for_tiles(m, WIDE_ROWS, [&](int64_t first, int64_t some) {
        advance_wide_rows(some, scratch.wide, rows.from(first), count, scratch.out + first * WIDTH);
      });
    }
  }
  return true;
#else
  return false;
#endif
}

}  // namespace oxfuse
