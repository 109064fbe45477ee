// Vectors of float32 of the compiled ISA's width, and the two products that the ops are made of.
//
// GCC's vector extension makes the code the same for AVX2, AVX-512 and anything else. Every sum is taken in an order that depends
// on nothing but its length, so a row's result is the same alone and in a batch, and for any number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#ifdef __x86_64__
#include <cpuid.h>
#endif

namespace oxfuse {

#ifdef __AVX512F__
constexpr int LANES = 16;
constexpr int MR = 4;  // rows of x in one register tile; MR * NR accumulators, MR values and one weight fill the registers
#else
constexpr int LANES = 8;
constexpr int MR = 2;
#endif
constexpr int NR = 6;  // rows of weights in one register tile; even, since gate and up alternate

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

struct bfloat16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

template <class T>
T narrow(float x);
template <>
inline float narrow<float>(float x) { return x; }
template <>
inline bfloat16 narrow<bfloat16>(float x) {  // to nearest even, as torch does
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {static_cast<uint16_t>(0x7fc0)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// Rounds to bfloat16 as `narrow` does.
inline void store_narrow(bfloat16* out, Floats x) {
  const Bits bits = (Bits)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits value = x == x ? rounded : Bits{} + 0x7fc0;
  const Halves halves = __builtin_convertvector(value, Halves);
  std::memcpy(out, &halves, sizeof(halves));
}

inline Floats splat(float x) { return Floats{} + x; }

inline Floats load(const float* x) {
  Floats out;
  std::memcpy(&out, x, sizeof(out));
  return out;
}
inline Floats load(const bfloat16* x) {
#if defined(__AVX512F__)  // GCC 12 widens in two halves otherwise
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))), 16);
#elif defined(__AVX2__)
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))), 16);
#else
  Halves halves;
  std::memcpy(&halves, x, sizeof(halves));
  return (Floats)(__builtin_convertvector(halves, Bits) << 16);
#endif
}
// The first `count` values, then zeros: never reads past them.
template <class T>
Floats load(const T* x, int64_t count) {
  T part[LANES] = {};
  std::memcpy(part, x, count * sizeof(T));
  return load(part);
}
inline Bits load_bits(const void* from) {
  Bits out;
  std::memcpy(&out, from, sizeof(out));
  return out;
}
inline void store(float* out, Floats x) { std::memcpy(out, &x, sizeof(x)); }
inline void store(bfloat16* out, Floats x) { store_narrow(out, x); }

// `-0.0 + x` is x for every x, so the tree needs no special first step.
inline float sum(Floats x) {
  typedef float Half __attribute__((vector_size(LANES * 2)));
  typedef float Quarter __attribute__((vector_size(16)));
  Half parts[2];
  std::memcpy(parts, &x, sizeof(x));
  const Half half = parts[0] + parts[1];
  Quarter four[LANES / 8];
  std::memcpy(four, &half, sizeof(half));
  Quarter total = four[0];
  for (int i = 1; i < LANES / 8; ++i) total += four[i];
  return (total[0] + total[2]) + (total[1] + total[3]);
}

// a > b ? a : b, one instruction where GCC 12 makes two. Where one is NaN, b.
inline Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// e^x within 2 units in the last place; 0 below -87.3, 2.4e38 above 88.3, NaN stays NaN.
inline Floats exp(Floats x) {
  const Floats inside = x > 88.3f ? splat(88.3f) : x;
  const Floats magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer, which its low bits then hold
  const Floats rounded = inside * 1.44269504f + magic;
  const Floats n = rounded - magic;
  const Floats f = (inside - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats y = splat(1.3888889e-3f);
  y = y * f + 8.3333333e-3f;
  y = y * f + 4.1666667e-2f;
  y = y * f + 1.6666667e-1f;
  y = y * f + 0.5f;
  y = y * f + 1.f;
  y = y * f + 1.f;
  const Floats power = (Floats)(((Bits)rounded + 127) << 23);
  return x < -87.3f ? Floats{} : y * power;
}

// 2^x within 3 units of 2^-24, for x up to 127: 1 at 0, 0 below -126.5, NaN stays NaN. With e^x = 2^(x * log2 e) the factor can be part of a
// scale that is applied anyway, and there is less to reduce than for `exp`. The coefficients make the relative error least on [-1/2, 1/2].
inline Floats exp2(Floats x) {
  const Floats inside = larger(splat(-127.f), x);
  const Floats magic = splat(12582912.f + 127.f);  // 1.5 * 2^23 + 127: the low bits of the sum are the exponent of 2^n
  const Floats rounded = inside + magic, f = inside - (rounded - magic);
  Floats y = splat(1.3264727e-3f);
  y = y * f + 9.671513e-3f;
  y = y * f + 5.5507336e-2f;
  y = y * f + 2.4022242e-1f;
  y = y * f + 6.93147e-1f;
  y = y * f + 1.f;
  return y * (Floats)((Bits)rounded << 23);
}

// Weights of a register tile, row by row: `vector(r, k)` gives the values from k on. `fetch(r, k)`
// asks the memory for the same place of the next tile, `ahead` elements on: a row is often too short for the processor to see by itself
// what comes after it. With rows of 1024 bfloat16 values that is worth a quarter.
template <class T>
struct Dense {
  const T* row[NR];
  int64_t ahead;
  void fetch(int r, int64_t k) const { __builtin_prefetch(row[r] + k + ahead, 0, 2); }
  Floats vector(int r, int64_t k) const { return load(row[r] + k); }
};

// Decoded weights, which the first-level cache holds.
struct Decoded {
  const float* row[NR];
  void fetch(int, int64_t) const {}
  Floats vector(int r, int64_t k) const { return load(row[r] + k); }
};

struct Powers {
  float of[256];
  Powers() {
    for (int byte = 0; byte < 256; ++byte) of[byte] = std::ldexp(1.f, byte - 127);
  }
};

// acc[m * NR + r] += x[m] . row r over the values [begin, begin + length), whole vectors, for M rows of x.
template <int M, class W>
__attribute__((noinline)) void advance_steps(const W& w, const float* const* x, int64_t begin, int64_t length, Floats* acc) {
  Floats local[M][NR];
  const float* rows[M];
#pragma GCC unroll 24
  for (int i = 0; i < M * NR; ++i) local[i / NR][i % NR] = acc[i];
  for (int m = 0; m < M; ++m) rows[m] = x[m] + begin;
  for (int64_t k = 0; k < length; k += LANES) {
    Floats values[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) values[m] = load(rows[m] + k);
#pragma GCC unroll 6
    for (int r = 0; r < NR; ++r) {
      w.fetch(r, begin + k);
      const Floats weight = w.vector(r, begin + k);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) local[m][r] += values[m] * weight;
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < M * NR; ++i) acc[i] = local[i / NR][i % NR];
}

// Whether the processor at hand multiplies bfloat16, and fastest so. Intel's cores take two cycles for what AMD's do in one; twice as many float32
// values are multiplied meanwhile (Emerald Rapids, registers alone: 86 against 176 GFLOP/s a core). The library is built for a level that need
// not have it, so this is asked when it runs. OXFUSE_EMULATE_BF16 stands in for such a processor: what surrounds the instruction can then be tested
// anywhere. OXFUSE_NO_BF16 stands for one without.
inline bool multiplies_bfloat16() {
#ifdef OXFUSE_EMULATE_BF16
  return true;
#elif defined(__AVX512F__) && !defined(OXFUSE_NO_BF16)
  return __builtin_cpu_supports("avx512bf16") && !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

// Whether it has units that multiply matrices of bfloat16 (AMX): torch uses them, and nothing here comes near.
inline bool multiplies_matrices() {
#ifdef __x86_64__
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
#else
  return false;
#endif
}

#ifdef __AVX512F__
#ifdef OXFUSE_EMULATE_BF16
#define OXFUSE_BF16_TARGET
typedef __m512i Pairs;
inline Floats dot_pairs(Floats acc, Pairs a, Pairs b) {
  const __m512i high = _mm512_set1_epi32(0xffff0000);
  acc += (Floats)_mm512_and_si512(a, high) * (Floats)_mm512_and_si512(b, high);
  return acc + (Floats)_mm512_slli_epi32(a, 16) * (Floats)_mm512_slli_epi32(b, 16);
}
#else
#define OXFUSE_BF16_TARGET __attribute__((target("avx512bf16")))
typedef __m512bh Pairs;
OXFUSE_BF16_TARGET inline Floats dot_pairs(Floats acc, Pairs a, Pairs b) { return (Floats)_mm512_dpbf16_ps((__m512)acc, a, b); }
#endif

// acc[m * NR + r] += x[m] . w[r] over the values [0, length) of w and [begin, begin + length) of x, a multiple of 2 * LANES.
template <int M>
OXFUSE_BF16_TARGET __attribute__((noinline)) void advance_pairs(const bfloat16* const* w, const bfloat16* const* x, int64_t begin, int64_t length,
                                                                Floats* acc) {
  Floats local[M][NR];
#pragma GCC unroll 24
  for (int i = 0; i < M * NR; ++i) local[i / NR][i % NR] = acc[i];
  for (int64_t k = 0; k < length; k += 2 * LANES) {
    Pairs values[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) std::memcpy(&values[m], x[m] + begin + k, sizeof(Pairs));
#pragma GCC unroll 6
    for (int r = 0; r < NR; ++r) {
      Pairs weight;
      std::memcpy(&weight, w[r] + k, sizeof(Pairs));
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) local[m][r] = dot_pairs(local[m][r], values[m], weight);
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < M * NR; ++i) acc[i] = local[i / NR][i % NR];
}

#ifdef OXFUSE_EMULATE_BF16
inline void add_pairs(__m512& acc, __m512i a, __m512i b) { acc = (__m512)dot_pairs((Floats)acc, a, b); }
#else
// With the intrinsic GCC 12 keeps sums in memory; the assembler knows the instruction whatever the target.
inline __attribute__((always_inline)) void add_pairs(__m512& acc, __m512i a, __m512i b) { asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b)); }
#endif

template <class T>
__m512i pair_at(const T* x) {  // two values of 16 bits, in every lane
  int32_t both;
  std::memcpy(&both, x, 4);
  return _mm512_set1_epi32(both);
}

// Rounds to bfloat16 as `narrow` does, but for subnormal numbers, which may become zero, and returns what that is.
inline Floats store_rounded(bfloat16* out, Floats x) {
#ifdef OXFUSE_EMULATE_BF16
  store_narrow(out, x);
  return load(out);
#else
  __m256i halves;
  asm("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(x));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), halves);
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
#endif
}

// Pairs (a[i], b[i]) of sixteen values of 16 bits.
template <class T>
Bits pairs_of(const T* a, const T* b) {
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i first = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)));
  const __m512i both = _mm512_inserti64x4(first, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)), 1);
  return (Bits)_mm512_permutexvar_epi16(_mm512_load_si512(order), both);
}

// The upper halves of float32 values: exact where they are bfloat16 values.
inline void store_upper(bfloat16* out, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)x, 16)));
}
#endif

template <class W>
void advance_rows(const W& w, const float* const* x, int m, int64_t begin, int64_t length, Floats* acc) {
  if (m == 1) advance_steps<1>(w, x, begin, length, acc);
  if (m == 2) advance_steps<2>(w, x, begin, length, acc);
  if constexpr (MR > 2) {
    if (m == 3) advance_steps<3>(w, x, begin, length, acc);
    if (m == 4) advance_steps<4>(w, x, begin, length, acc);
  }
}

// acc[m * NR + r] = x[m] . row r for m <= MR rows of x, which are padded with zeros to whole vectors; `sum` it.
template <class W>
void dot_rows(const W& w, const float* const* x, int m, int64_t length, Floats* acc) {
  const int64_t whole = length - length % LANES;
  std::fill_n(acc, m * NR, Floats{});
  advance_rows(w, x, m, 0, whole, acc);
  if (whole == length) return;
  float ends[NR][LANES], *starts = ends[0];
  Decoded rest;
  const float* places[MR];
  for (int r = 0; r < NR; ++r) {
    store(ends[r], load(w.row[r] + whole, length - whole));
    rest.row[r] = starts + r * LANES;
  }
  for (int i = 0; i < m; ++i) places[i] = x[i] + whole;
  advance_rows(rest, places, m, 0, LANES, acc);
}

}  // namespace oxfuse
