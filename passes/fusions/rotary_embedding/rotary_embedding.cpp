// oxfuse::rotary_embedding on the CPU; its meaning is in reference.py.
#include "../ops.h"

namespace oxfuse {

template <class T>
static void rotate(const T* x, T* out, int64_t heads, int64_t dim, int64_t half, const float* cos, const float* sin) {
  for (int64_t head = 0; head < heads; ++head, x += dim, out += dim) {
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      const float first = widen(x[i]), second = widen(x[half + i]);
      out[i] = narrow<T>(first * cos[i] - second * sin[i]);
      out[half + i] = narrow<T>(second * cos[i] + first * sin[i]);
    }
    std::copy(x + 2 * half, x + dim, out + 2 * half);
  }
}

static std::tuple<Tensor, Tensor> rotary_embedding(const Tensor& q, const Tensor& k, const Tensor& positions,
                                                   const Tensor& inv_freq, double scale) {
  const int64_t tokens = positions.numel(), dim = q.size(-1), heads = q.size(-2), kv_heads = k.size(-2), half = inv_freq.numel();
  std::vector<int64_t> shape = positions.sizes().vec();
  shape.insert(shape.end(), {heads, dim});
  check_shape("q", q, shape);
  shape[shape.size() - 2] = kv_heads;
  check_shape("k", k, shape);
  check_dtype("k", k, dtype_name(q).c_str());
  check_dtype("positions", positions, "int64");
  OXFUSE_CHECK(2 * half <= dim, text(half) + " frequencies turn " + text(2 * half) + " dims, but a head has " + text(dim));
  const Tensor q_in = in_one_piece(q), k_in = in_one_piece(k), index = in_one_piece(positions);
  const Tensor q_out = uninitialized(q, q.sizes()), k_out = uninitialized(k, k.sizes());
  const Values freq("inv_freq", inv_freq);
  with_type("q", q, [&](auto type) {
    using T = decltype(type);
    parallel_for(0, tokens, 1 + 16384 / ((heads + kv_heads) * dim + 1), [&](int64_t begin, int64_t end) {
      std::vector<float> cos(half), sin(half);
      for (int64_t t = begin; t < end; ++t) {
        const float position = static_cast<float>(data<int64_t>(index)[t]);
        for (int64_t i = 0; i < half; ++i) {
          const float angle = position * freq[i];
          cos[i] = std::cos(angle) * static_cast<float>(scale);
          sin[i] = std::sin(angle) * static_cast<float>(scale);
        }
        const int64_t at = t * heads * dim, kv_at = t * kv_heads * dim;
        rotate(data<T>(q_in) + at, static_cast<T*>(q_out.data_ptr()) + at, heads, dim, half, cos.data(), sin.data());
        rotate(data<T>(k_in) + kv_at, static_cast<T*>(k_out.data_ptr()) + kv_at, kv_heads, dim, half, cos.data(), sin.data());
      }
    });
  });
  return {q_out, k_out};
}

}  // namespace oxfuse

OXFUSE_OP(rotary_embedding, "(Tensor q, Tensor k, Tensor positions, Tensor inv_freq, float scale) -> (Tensor, Tensor)")
