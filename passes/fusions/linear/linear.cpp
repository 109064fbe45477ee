// aten::linear on the CPU for bfloat16: products with activations widened to float32, one rounding at the end.
//
// torch multiplies bfloat16 by its own kernels, which on processors without instructions for it run far below the memory's speed
// at one row and below float32's at many. Where a processor is fast at it, many rows go to torch.
#include "../product.h"

namespace oxfuse {

static Tensor by_torch(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(input), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(aoti_torch_call_dispatcher("aten::linear", "", stack.data()));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// out[t] = x[t] . rows + bias for rows of x in float32, padded with zeros to whole vectors.
static void multiply(const float* const* x, int64_t tokens, const DenseRows<bfloat16>& weight, const std::optional<Values>& bias,
                     bfloat16* out) {
  const int64_t tiles = round_up(weight.rows, NR) / NR;
  parallel_for(0, tiles, 1 + GRAIN / (tokens * NR * weight.length + 1), [&](int64_t first, int64_t last) {
    Scratch scratch;
    for (int64_t t = 0; t < tokens; t += BATCH) {
      const int some = static_cast<int>(std::min<int64_t>(BATCH, tokens - t));
      for (int64_t row = first * NR; row < std::min(last * NR, weight.rows); row += NR) {
        product(weight.tile(0, row), x + t, some, weight.length, scratch);
        for (int i = 0; i < some; ++i)
          for (int64_t r = 0; r < NR && row + r < weight.rows; ++r)
            out[(t + i) * weight.rows + row + r] = narrow<bfloat16>(scratch.tile[i * NR + r] + (bias ? (*bias)[row + r] : 0.f));
      }
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
  const int64_t stride = round_up(length, LANES);
  const std::unique_ptr<float[]> wide(new float[tokens * stride]);
  std::vector<const float*> x(tokens);
  for (int64_t t = 0; t < tokens; ++t) x[t] = &wide[t * stride];
  const bfloat16* narrow_in = data<bfloat16>(in);
  parallel_for(0, tokens, 1 + GRAIN / (stride + 1), [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
      for (int64_t i = 0; i < stride; i += LANES) {
        const bfloat16* from = narrow_in + t * length + i;
        store(&wide[t * stride + i], i + LANES <= length ? load(from) : load(from, length - i));
      }
  });
  std::optional<Values> added;
  if (bias) added.emplace("bias", *bias);
  multiply(x.data(), tokens, {data<bfloat16>(weight), rows, length}, added, static_cast<bfloat16*>(out.data_ptr()));
  return out;
}

}  // namespace oxfuse

OXFUSE_OP(linear, "(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor")
