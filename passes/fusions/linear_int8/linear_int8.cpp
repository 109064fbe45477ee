// oxfuse::linear_int8 on the CPU: weights of 8 bits in panels (packed.py), activations as they are or in 8 bits; its meaning is in reference.py.
#include "../panels.h"

namespace oxfuse {

// Panels of 16 rows: of each block of 32 values 512 bytes, eight fours of every row, in the order of `Numbers`; and 16 scales in bfloat16.
struct Int8 {
  static constexpr int ZERO = 128;
  static constexpr float UNIT = 1.f;
  static constexpr int NEAR = 4, FAR = 32;
  struct Panel {
    const uint8_t* blocks;
    const bfloat16* scales;
  };
  struct Raw {
    Bits fours[2];
  };

  const uint8_t* values;
  const bfloat16* factors;
  int64_t panels, length;

  Panel at(int64_t, int64_t panel) const {
    const int64_t block = panel * (length / BLOCK);
    return {values + block * BLOCK * PANEL_ROWS, factors + block * PANEL_ROWS};
  }
  Reading reading(int64_t items, int64_t some) const { return {values, items, some * PANEL_ROWS * length}; }
  Raw load(const Panel& panel, int64_t block, int c, int part) const {
    const uint8_t* from = panel.blocks + block * BLOCK * PANEL_ROWS + c * 128 + part * LANES * 4;
    return {load_bits(from), load_bits(from + 64)};
  }
  template <int CACHE>
  ASK void ask(const Panel& panel, int64_t block, int c) const {
    const uint8_t* from = panel.blocks + block * BLOCK * PANEL_ROWS + c * 128;
    __builtin_prefetch(from, 0, CACHE);
    __builtin_prefetch(from + 64, 0, CACHE);
    if (c == 0) __builtin_prefetch(panel.scales + block * PANEL_ROWS, 0, CACHE);
  }
  static Floats value(const Raw& raw, int k) {
    const int place = k % 4 / 2 * 4 + k % 2 * 2 + k / 4;  // 0 4 1 5 2 6 3 7: where value k is
    const Ints byte = (Ints)(raw.fours[place / 4] >> place % 4 * 8 & 255) - ZERO;
    return __builtin_convertvector(byte, Floats);
  }
  static Bits bytes(const Raw& raw, int half) { return raw.fours[half]; }
  Floats scale(const Panel& panel, int64_t block, int part) const { return oxfuse::load(panel.scales + block * PANEL_ROWS + part * LANES); }
};

template <class T>
static void multiply(const T* x, int64_t tokens, int64_t length, const Int8& w, int64_t rows, const std::optional<Values>& bias, bool rounded, T* out) {
  const int64_t blocks = w.length / BLOCK;
  const Places places({0, tokens}, blocks);
  Buffer<float> wide;
  std::optional<RoundedBlocks<int8_t>> bytes;
  if (rounded) {
    bytes.emplace(tokens * blocks);
    const int factor = start_factor<Int8>();
    widen_blocks(x, tokens, length, places, [&](int64_t place, const float* block) { bytes->round(place, block, factor); });
  } else {
    wide = widened(x, tokens, length, places);
  }
  const Activations from{.wide = wide.get(), .bytes = bytes ? bytes->numbers() : Numbers<int8_t>{}};
  for_each_panel_pair(w, places, from, tokens,
                      [&](const Group& group, int64_t panel, const PanelScratch& scratch) { store_results(scratch.out, group, panel, rows, bias, out); });
}

static Tensor linear_int8(const Tensor& x, const Tensor& values, const Tensor& scales, const std::optional<Tensor>& bias, int64_t rows,
                          bool int8_activations) {
  OXFUSE_CHECK(x.dim() >= 1 && x.size(-1) >= 1, "x must have features, found " + text(x.sizes()));
  const int64_t length = x.size(-1), panels = (rows + PANEL_ROWS - 1) / PANEL_ROWS, blocks = (length + BLOCK - 1) / BLOCK;
  check_shape("values", values, {panels, blocks, BLOCK * PANEL_ROWS});
  check_shape("scales", scales, {panels, blocks, PANEL_ROWS});
  check_dtype("values", values, "uint8");
  check_dtype("scales", scales, "bfloat16");
  if (bias) check_shape("bias", *bias, {rows});
  OXFUSE_CHECK(values.is_contiguous() && scales.is_contiguous(), "weights must be contiguous: a silent copy would cost their size in memory");
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = rows;
  const Tensor in = in_one_piece(x), out = uninitialized(x, shape);
  std::optional<Values> added;
  if (bias) added.emplace("bias", *bias);
  with_type("x", x, [&](auto type) {
    using T = decltype(type);
    const Int8 weight{data<uint8_t>(values), data<bfloat16>(scales), panels, blocks * BLOCK};
    multiply(data<T>(in), in.numel() / length, length, weight, rows, added, int8_activations, static_cast<T*>(out.data_ptr()));
  });
  return out;
}

}  // namespace oxfuse

OXFUSE_OP(linear_int8, "(Tensor x, Tensor values, Tensor scales, Tensor? bias, int rows, bool int8_activations=False) -> Tensor")
