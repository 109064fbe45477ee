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
  // Row `row`, or the last one past the end: what is made of it is not used.
  const bfloat16* row(int64_t row) const { return values + std::min(row, rows - 1) * width; }
};

static void decode_wide(const DensePanels& w, const int64_t* panels, int64_t first, int64_t count, DecodedWide& to) {
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

// out[t] = x[t] . rows + bias for rows of x in float32, padded with zeros to whole vectors.
static void multiply_few(const float* const* x, int64_t tokens, const DenseRows<bfloat16>& weight, const std::optional<Values>& bias,
                         bfloat16* out) {
  const int64_t tiles = round_up(weight.rows, NR) / NR;
  parallel_for(0, tiles, 1 + GRAIN / (tokens * NR * weight.length + 1), [&](int64_t first, int64_t last) {
    Scratch scratch;
    for (int64_t row = first * NR; row < std::min(last * NR, weight.rows); row += NR) {
      product(weight.tile(0, row), x, static_cast<int>(tokens), weight.length, scratch);
      for (int64_t i = 0; i < tokens; ++i)
        for (int64_t r = 0; r < NR && row + r < weight.rows; ++r)
          out[i * weight.rows + row + r] = narrow<bfloat16>(scratch.tile[i * NR + r] + (bias ? (*bias)[row + r] : 0.f));
    }
  });
}

static Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  OXFUSE_CHECK(weight.dim() == 2 && input.dim() >= 1 && input.size(-1) == weight.size(1),
               "expected input [..., " + text(weight.size(-1)) + "], found " + text(sizes(input)));
  const int64_t rows = weight.size(0), length = weight.size(1);
  check_dtype("input", input, "bfloat16");
  check_dtype("weight", weight, "bfloat16");
  OXFUSE_CHECK(weight.is_contiguous(), "weight must be contiguous: a silent copy would cost its size in memory");
  if (bias) check_shape("bias", *bias, {rows});
  std::vector<int64_t> shape = sizes(input);
  shape.back() = rows;
  const int64_t tokens = length ? input.numel() / length : 0;
  const Tensor in = torch::stable::contiguous(input);
  if (tokens > MR && (multiplies_bfloat16() || multiplies_matrices())) return by_torch(in, weight, bias);

  const Tensor out = torch::stable::new_empty(input, shape);
  std::optional<Values> added;
  if (bias) added.emplace("bias", *bias);
  const bfloat16 *from = data<bfloat16>(in), *rows_from = data<bfloat16>(weight);
  bfloat16* to = static_cast<bfloat16*>(out.data_ptr());
  if (tokens > MR) {
    const DensePanels panels(rows_from, rows, length);
    const Places places({0, tokens}, panels.length / BLOCK);
    const Buffer<float> wide = widened(from, tokens, length, places);
    for_each_panel_pair(panels, places, {wide.get()}, [&](const Group& group, int64_t panel, const float* results) {
      store_results(results, group, panel, rows, added, to);
    });
    return out;
  }
  const int64_t stride = round_up(length, LANES);
  const Buffer<float> wide = buffer<float>(tokens * stride);
  const float* x[MR];
  for (int64_t t = 0; t < tokens; ++t) {
    x[t] = &wide[t * stride];
    for (int64_t i = 0; i < stride; i += LANES) {
      const bfloat16* source = from + t * length + i;
      store(&wide[t * stride + i], i + LANES <= length ? load(source) : load(source, length - i));
    }
  }
  multiply_few(x, tokens, {rows_from, rows, length}, added, to);
  return out;
}

}  // namespace oxfuse

OXFUSE_OP(linear, "(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor")
