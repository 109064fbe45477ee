// aten::linear on the CPU for bfloat16: products with activations widened to float32, one rounding at the end.
//
// torch multiplies bfloat16 by its own kernels, which on processors without instructions for it run far below the memory's speed
// at one row and below float32's at many. Where a processor is fast at it, many rows go to torch. A few rows are multiplied as weights
// stream by; for more, weights are turned into panels of 16 rows, a lane for each, in the cache.
#include "../panels.h"

namespace oxfuse {

static Tensor by_torch(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(input), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(aoti_torch_call_dispatcher("aten::linear", "", stack.data()));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

#ifdef __AVX512F__
// Turns sixteen vectors of sixteen numbers: to[i][j] = from[j][i].
static void turn(__m512i* rows) {
  __m512i pairs[16], fours[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      fours[i + 2 * j] = _mm512_unpacklo_epi64(pairs[i + j], pairs[i + 2 + j]);
      fours[i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[i + j], pairs[i + 2 + j]);
    }
  // fours[4 q + c] holds, in its part p of 128 bits, number 4 p + c of the rows 4 q .. 4 q + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i even = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0x88), odd = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0xdd);
    const __m512i even2 = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0x88), odd2 = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0xdd);
    rows[c] = _mm512_shuffle_i32x4(even, even2, 0x88);
    rows[8 + c] = _mm512_shuffle_i32x4(even, even2, 0xdd);
    rows[4 + c] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
    rows[12 + c] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
  }
}
#endif

// Rows [rows, width] as a format of panels.h for many rows of activations, which decodes whole panels alone; `length` is the width rounded up.
struct DensePanels {
  using Panel = int64_t;  // its first row
  const bfloat16* values;
  int64_t rows, width, panels, length;
  DensePanels(const bfloat16* values, int64_t rows, int64_t width)
      : values(values), rows(rows), width(width), panels((rows + PANEL_ROWS - 1) / PANEL_ROWS), length(round_up(width, BLOCK)) {}
  Panel at(int64_t, int64_t panel) const { return panel * PANEL_ROWS; }
  Reading reading(int64_t items, int64_t some) const { return {values, items, some * PANEL_ROWS * width * int64_t{sizeof(bfloat16)}}; }
  // Row `row`, or the last one past the end: what is made of it is not used.
  const bfloat16* row(int64_t row) const { return values + std::min(row, rows - 1) * width; }
};

static void decode_wide(const DensePanels& w, const Panels<DensePanels>& panels, int64_t first, int64_t count, DecodedWide& to) {
  for (int64_t b = 0; b < count; ++b)
    for (int p = 0; p < PAIR; ++p) {
      for (int i = 0; i < PV; ++i) to.scales[b][p * PV + i] = splat(1.f);
      const int64_t k = (first + b) * BLOCK;
      bfloat16 ends[PANEL_ROWS][BLOCK];
      const bfloat16* from[PANEL_ROWS];
      for (int r = 0; r < PANEL_ROWS; ++r) {
        const bfloat16* row = w.row(panels[p] + r) + k;
        from[r] = row;
        __builtin_prefetch(row + CHUNK_BLOCKS * BLOCK);  // of the next chunk; past the last row it asks for nothing
        if (k + BLOCK <= w.width) continue;
        std::fill_n(ends[r], BLOCK, bfloat16{});
        std::memcpy(ends[r], row, (w.width - k) * sizeof(bfloat16));
        from[r] = ends[r];
      }
      float* out = to.values + b * BLOCK * WIDTH + p * PANEL_ROWS;
#ifdef __AVX512F__
      __m512i pairs[16];  // of values: the lower half of a number is the one with the even place
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) pairs[r] = _mm512_loadu_si512(from[r]);
      turn(pairs);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        store(out + 2 * i * WIDTH, (Floats)_mm512_slli_epi32(pairs[i], 16));
        store(out + (2 * i + 1) * WIDTH, (Floats)_mm512_and_si512(pairs[i], _mm512_set1_epi32(0xffff0000)));
      }
#else
      for (int r = 0; r < PANEL_ROWS; ++r)
        for (int i = 0; i < BLOCK; ++i) out[i * WIDTH + r] = widen(from[r][i]);
#endif
    }
}

constexpr int STEP = 2 * LANES;       // values of a row that are taken at once
constexpr int64_t AHEAD = 1024;       // values: how far ahead of what is multiplied the memory is asked, for the second cache: the first has less room
constexpr int64_t PART = 512 * 1024;  // values of weights that a thread takes at a time at most

// Rows that are read at once, each from a place of its own on. The memory serves several streams better than one; with more activations their
// sums would not fit the registers.
constexpr int streams_of(int tokens) { return tokens == 1 ? 4 : 2; }

// Takes STEP values apart: those with even places, and the others. A shift and a mask do it.
static void take_apart(const bfloat16* from, Floats& even, Floats& odd) {
  Bits pairs;
  std::memcpy(&pairs, from, sizeof(pairs));
  even = (Floats)(pairs << 16);
  odd = (Floats)(pairs & 0xffff0000u);
}

// out[m][r] = x[m] . row r. Each STEP values of x are taken apart, and zeros fill its rows, `stride` apart, up to whole steps.
template <int M, int R = streams_of(M)>
__attribute__((noinline)) void stream_rows(const bfloat16* const* rows, const float* x, int64_t stride, int64_t length, float (*out)[R]) {
  Floats even[M][R] = {}, odd[M][R] = {};
  bfloat16 ends[R][STEP];
  for (int64_t k = 0; k < length; k += STEP) {
    const bfloat16* from[R];
    for (int r = 0; r < R; ++r) from[r] = rows[r] + k;
    if (k + STEP > length)
      for (int r = 0; r < R; ++r) {
        std::fill(std::copy_n(from[r], length - k, ends[r]), ends[r] + STEP, bfloat16{});
        from[r] = ends[r];
      }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(rows[r] + k + AHEAD, 0, SECOND_CACHE);  // the row's next one follows it
      Floats first, second;
      take_apart(from[r], first, second);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        even[m][r] += load(x + m * stride + k) * first;
        odd[m][r] += load(x + m * stride + k + LANES) * second;
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M * R; ++i) out[i / R][i % R] = sum(even[i / R][i % R] + odd[i / R][i % R]);  // in a loop they stay in memory
}

// out[t] = x[t] . rows + bias for M rows of x, of which each STEP values are taken apart.
template <int M>
static void multiply_rows(const float* x, int64_t stride, const bfloat16* weight, int64_t rows, int64_t length, const std::optional<Values>& bias,
                          bfloat16* out) {
  constexpr int R = streams_of(M);
  const int64_t items = (rows + R - 1) / R;
  const Reading reading{weight, items, R * length * int64_t{sizeof(bfloat16)}};
  share(M, items, std::max<int64_t>(1, PART / (R * length)), M * rows * length, reading, [&](const auto& next) {
    for (Range part = next(); part.begin < part.end; part = next()) {
      const int64_t apart = part.end - part.begin, first = part.begin * R;  // a stream reads so many rows, one after the other
      for (int64_t row = first; row < first + apart; ++row) {
        const bfloat16* from[R];
        for (int r = 0; r < R; ++r) from[r] = weight + std::min(row + r * apart, rows - 1) * length;
        float results[M][R];
        stream_rows<M>(from, x, stride, length, results);
        for (int t = 0; t < M; ++t)
          for (int r = 0; r < R; ++r)
            if (const int64_t at = row + r * apart; at < rows) out[t * rows + at] = narrow<bfloat16>(results[t][r] + (bias ? (*bias)[at] : 0.f));
      }
    }
  });
}

template <int M = MR>
void multiply_some(int64_t tokens, const float* x, int64_t stride, const bfloat16* weight, int64_t rows, int64_t length,
                   const std::optional<Values>& bias, bfloat16* out) {
  if constexpr (M > 1)
    if (tokens < M) return multiply_some<M - 1>(tokens, x, stride, weight, rows, length, bias, out);
  multiply_rows<M>(x, stride, weight, rows, length, bias, out);
}

// The same for at most MR rows of x as they are.
static void multiply_few(const bfloat16* x, int64_t tokens, const bfloat16* weight, int64_t rows, int64_t length, const std::optional<Values>& bias,
                         bfloat16* out) {
  const int64_t stride = round_up(length, STEP);
  const Buffer<float> wide = buffer<float>(tokens * stride);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t k = 0; k < stride; k += STEP) {
      bfloat16 values[STEP] = {};
      std::memcpy(values, x + t * length + k, std::min<int64_t>(STEP, length - k) * sizeof(bfloat16));
      Floats even, odd;
      take_apart(values, even, odd);
      store(&wide[t * stride + k], even);
      store(&wide[t * stride + k + LANES], odd);
    }
  multiply_some(tokens, wide.get(), stride, weight, rows, length, bias, out);
}

static Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  OXFUSE_CHECK(weight.dim() == 2 && input.dim() >= 1 && input.size(-1) == weight.size(1),
               "expected input [..., " + text(weight.size(-1)) + "], found " + text(input.sizes()));
  const int64_t rows = weight.size(0), length = weight.size(1);
  check_dtype("input", input, "bfloat16");
  check_dtype("weight", weight, "bfloat16");
  OXFUSE_CHECK(weight.is_contiguous(), "weight must be contiguous: a silent copy would cost its size in memory");
  if (bias) check_shape("bias", *bias, {rows});
  std::vector<int64_t> shape = input.sizes().vec();
  shape.back() = rows;
  OXFUSE_CHECK(length > 0, "weight has rows of no values");
  const int64_t tokens = input.numel() / length;
  const Tensor in = in_one_piece(input);
  if (tokens > MR && (multiplies_bfloat16() || multiplies_matrices())) return by_torch(in, weight, bias);

  const Tensor out = uninitialized(input, shape);
  if (!tokens) return out;
  std::optional<Values> added;
  if (bias) added.emplace("bias", *bias);
  const bfloat16 *from = data<bfloat16>(in), *rows_from = data<bfloat16>(weight);
  bfloat16* to = static_cast<bfloat16*>(out.data_ptr());
  if (tokens > MR) {
    const DensePanels panels(rows_from, rows, length);
    const Places places({0, tokens}, panels.length / BLOCK);
    const Buffer<float> wide = widened(from, tokens, length, places);
    for_each_panel_pair(panels, places, {wide.get()}, tokens, [&](const Group& group, int64_t panel, const PanelScratch& scratch) {
      store_results(scratch.out, group, panel, rows, added, to);
    });
    return out;
  }
  multiply_few(from, tokens, rows_from, rows, length, added, to);
  return out;
}

}  // namespace oxfuse

OXFUSE_OP(linear, "(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor")
