// Products of rows of activations with experts that lie as models in memory hold them: [E, length, rows], one column an output.
//
// A few activations are multiplied as the weights stream by, many columns at a time, so that memory is read in long pieces; for more,
// panels are decoded to float32 once for up to BATCH of them. Every sum goes from the first value to the last, so a row's result is the
// same alone and in a batch.
#pragma once

#include "../product.h"

namespace oxfuse {

constexpr int PANEL = 64;                       // columns of a decoded panel, whole vectors of them
constexpr int64_t STREAMED = 16 * PANEL;        // columns that a few activations are multiplied with at a time
constexpr int64_t DEPTH = 256;                  // values of a column that are decoded at a time: a panel of them takes 64 KB
constexpr int TALL = 6;                         // rows of x in one register tile; TALL * ACROSS accumulators, ACROSS weights, one value
constexpr int ACROSS = LANES == 16 ? 4 : 2;     // vectors of columns in one register tile
static_assert(PANEL % (ACROSS * LANES) == 0, "a panel is whole register tiles");

template <class T>
struct DenseColumns {
  const T* values;
  int64_t rows, length;
};

// out[m][n] = x[m] . column n for M rows of x and `columns` columns of w [length, stride]; `out` has whole vectors, STREAMED apart.
template <int M, class T>
__attribute__((noinline)) void stream_columns(const T* w, int64_t stride, int64_t columns, const float* const* x, int64_t length, float* out) {
  constexpr int AHEAD = 4;  // values of a column at a time: sums go through the first-level cache that much less often
  const int64_t whole = columns / LANES * LANES;
  std::fill_n(out, M * STREAMED, 0.f);
  for (int64_t k = 0; k < length; k += AHEAD) {
    const int some = static_cast<int>(std::min<int64_t>(AHEAD, length - k));
    const T* from = w + k * stride;
    if (some == AHEAD) {
      for (int64_t n = 0; n < whole; n += LANES) {
        Floats values[AHEAD];
#pragma GCC unroll 4
        for (int j = 0; j < AHEAD; ++j) {
          values[j] = load(from + j * stride + n);
          __builtin_prefetch(from + (j + AHEAD) * stride + n);  // rows lie pages apart, which the processor does not foresee
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          Floats acc = load(out + m * STREAMED + n);
#pragma GCC unroll 4
          for (int j = 0; j < AHEAD; ++j) acc += values[j] * x[m][k + j];
          store(out + m * STREAMED + n, acc);
        }
      }
    }
    for (int64_t n = some == AHEAD ? whole : 0; n < columns; n += LANES) {
      const int64_t part = std::min<int64_t>(LANES, columns - n);
      for (int j = 0; j < some; ++j) {
        const Floats value = load(from + j * stride + n, part);
        for (int m = 0; m < M; ++m) store(out + m * STREAMED + n, load(out + m * STREAMED + n) + value * x[m][k + j]);
      }
    }
  }
}

// out[m][...] += x[m][begin...] . w for M rows of x and ACROSS vectors of a decoded panel w [count, PANEL]; `out` has PANEL columns.
template <int M>
__attribute__((noinline)) void advance_columns(const float* const* x, int64_t begin, const float* w, int64_t count, float* out) {
  Floats acc[M][ACROSS];
  const float* rows[M];
#pragma GCC unroll 24
  for (int i = 0; i < M * ACROSS; ++i) acc[i / ACROSS][i % ACROSS] = load(out + i / ACROSS * PANEL + i % ACROSS * LANES);
  for (int m = 0; m < M; ++m) rows[m] = x[m] + begin;
  for (int64_t k = 0; k < count; ++k) {
    Floats values[ACROSS];
#pragma GCC unroll 4
    for (int i = 0; i < ACROSS; ++i) values[i] = load(w + k * PANEL + i * LANES);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const float factor = rows[m][k];
#pragma GCC unroll 4
      for (int i = 0; i < ACROSS; ++i) acc[m][i] += values[i] * factor;
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < M * ACROSS; ++i) store(out + i / ACROSS * PANEL + i % ACROSS * LANES, acc[i / ACROSS][i % ACROSS]);
}

template <int M = TALL>
void advance_panel(const float* const* x, int some, int64_t begin, const float* w, int64_t count, float* out) {
  if constexpr (M > 1)
    if (some < M) return advance_panel<M - 1>(x, some, begin, w, count, out);
  for (int n = 0; n < PANEL; n += ACROSS * LANES) advance_columns<M>(x, begin, w + n, count, out + n);
}

// Buffers of one thread.
struct ColumnScratch {
  std::unique_ptr<float[]> decoded{new float[DEPTH * PANEL]};
  std::unique_ptr<float[]> out{new float[std::max<int64_t>(MR * STREAMED, BATCH * PANEL)]};
};

// Calls out(first column, columns, values, stride) with x[m] . column n in values[m * stride + n - first], for the columns from `begin` to
// `end`, both multiples of PANEL or the last, and m <= BATCH rows of x.
template <class T, class Out>
void multiply_columns(const T* w, int64_t stride, int64_t begin, int64_t end, const float* const* x, int m, int64_t length,
                      ColumnScratch& scratch, Out&& out) {
  float* values = scratch.out.get();
  if (m <= MR) {
    for (int64_t n = begin; n < end; n += STREAMED) {
      const int64_t columns = std::min(STREAMED, end - n);
      switch (m) {
        case 1: stream_columns<1>(w + n, stride, columns, x, length, values); break;
        case 2: stream_columns<2>(w + n, stride, columns, x, length, values); break;
#ifdef __AVX512F__
        case 3: stream_columns<3>(w + n, stride, columns, x, length, values); break;
        default: stream_columns<4>(w + n, stride, columns, x, length, values);
#endif
      }
      out(n, columns, values, STREAMED);
    }
    return;
  }
  for (int64_t n = begin; n < end; n += PANEL) {
    const int64_t columns = std::min<int64_t>(PANEL, end - n);
    std::fill_n(values, m * PANEL, 0.f);
    for (int64_t k = 0; k < length; k += DEPTH) {
      const int64_t count = std::min(DEPTH, length - k);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t c = 0; c < PANEL; c += LANES) {
          const T* from = w + (k + i) * stride + n + c;
          store(scratch.decoded.get() + i * PANEL + c,
                c + LANES <= columns ? load(from) : load(from, std::max<int64_t>(0, columns - c)));
        }
      for (int i = 0; i < m; i += TALL) advance_panel(x + i, std::min(TALL, m - i), k, scratch.decoded.get(), count, values + i * PANEL);
    }
    out(n, columns, values, PANEL);
  }
}

}  // namespace oxfuse
