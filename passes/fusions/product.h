// Products of rows of activations with rows of weights, of any count of either: what dense layers, routers and experts are made of.
//
// Few activations are multiplied as the weights stream by; where there are more than the registers hold, a register tile of weights is
// decoded to float32 once for up to BATCH of them. Activations are float32, and every sum's order depends on its length alone.
#pragma once

#include "ops.h"

namespace oxfuse {

constexpr int BATCH = 128;          // rows of activations that share one decoded tile; their accumulators take 48 KB
constexpr int64_t CHUNK = 512;      // values of a row that are decoded at a time: NR rows of them stay in the first-level cache

// Banks of dense weights, [E, rows, length], a bank being an expert or all; `tile(e, row)` gives NR rows, the last one again past the end.
template <class T>
struct DenseRows {
  using Tile = Dense<T>;
  const T* values;
  int64_t rows, length;
  Tile tile(int64_t expert, int64_t row) const {
    Tile out;
    out.ahead = NR * length;
    for (int r = 0; r < NR; ++r) out.row[r] = values + (expert * rows + std::min(row + r, rows - 1)) * length;
    return out;
  }
};

// Buffers of one thread.
struct Scratch {
  std::unique_ptr<Floats[]> acc{new Floats[BATCH * NR]};
  Buffer<float> decoded = buffer<float>(NR * CHUNK);
  Buffer<bfloat16> halves = buffer<bfloat16>(NR * CHUNK);
  float tile[BATCH * NR];  // [m][r]: what `product` leaves
};

// scratch.tile[m][r] = x[m] . row r, for m <= BATCH rows of x that are padded with zeros to whole vectors.
template <class W>
void product(const W& w, const float* const* x, int m, int64_t length, Scratch& scratch) {
  if (m <= MR) {
    Floats acc[MR * NR];
    dot_rows(w, x, m, length, acc);
    for (int i = 0; i < m * NR; ++i) scratch.tile[i] = sum(acc[i]);
    return;
  }
  std::fill_n(scratch.acc.get(), m * NR, Floats{});
  Decoded decoded;
  for (int r = 0; r < NR; ++r) decoded.row[r] = scratch.decoded.get() + r * CHUNK;
  for (int64_t begin = 0; begin < length; begin += CHUNK) {
    const int64_t count = std::min(CHUNK, length - begin), padded = round_up(count, LANES);
    for (int r = 0; r < NR; ++r) {
      float* out = scratch.decoded.get() + r * CHUNK;
      int64_t k = 0;
      for (; k + LANES <= count; k += LANES) store(out + k, w.vector(r, begin + k));
      if (k < count) store(out + k, load(w.row[r] + begin + k, count - k));
    }
    for (int i = 0; i < m; i += MR) {
      const float* rows[MR];
      const int some = std::min(MR, m - i);
      for (int j = 0; j < some; ++j) rows[j] = x[i + j] + begin;
      advance_rows(decoded, rows, some, 0, padded, scratch.acc.get() + i * NR);
    }
  }
  for (int i = 0; i < m * NR; ++i) scratch.tile[i] = sum(scratch.acc[i]);
}

// The same for rows of x in bfloat16, padded with zeros to twice whole vectors, where the processor multiplies those: products are exact
// and summed in float32, two at a time. Weights are values that bfloat16 holds.
template <class W>
void product(const W& w, const bfloat16* const* x, int m, int64_t length, Scratch& scratch) {
#ifdef __AVX512F__
  std::fill_n(scratch.acc.get(), m * NR, Floats{});
  const bfloat16* decoded[NR];
  for (int r = 0; r < NR; ++r) decoded[r] = scratch.halves.get() + r * CHUNK;
  for (int64_t begin = 0; begin < length; begin += CHUNK) {
    const int64_t count = std::min(CHUNK, length - begin), padded = round_up(count, 2 * LANES);
    for (int r = 0; r < NR; ++r) {
      bfloat16* out = scratch.halves.get() + r * CHUNK;
      int64_t k = 0;
      for (; k + LANES <= count; k += LANES) store_upper(out + k, w.vector(r, begin + k));
      if (k < count) store_upper(out + k, load(w.row[r] + begin + k, count - k)), k += LANES;
      if (k < padded) std::fill(out + k, out + padded, bfloat16{});
    }
    for (int i = 0; i < m; i += MR) {
      Floats* acc = scratch.acc.get() + i * NR;
      switch (std::min(MR, m - i)) {
        case 1: advance_pairs<1>(decoded, x + i, begin, padded, acc); break;
        case 2: advance_pairs<2>(decoded, x + i, begin, padded, acc); break;
        case 3: advance_pairs<3>(decoded, x + i, begin, padded, acc); break;
        default: advance_pairs<4>(decoded, x + i, begin, padded, acc);
      }
    }
  }
  for (int i = 0; i < m * NR; ++i) scratch.tile[i] = sum(scratch.acc[i]);
#endif
}

}  // namespace oxfuse
