// oxfuse::moe_dispatch on the CPU: router, experts (float32, bfloat16 or MXFP4) and combination; its meaning is in reference.py.
//
// Tokens are grouped by expert. Of dense experts threads share the rows of the weights, so skewed routing costs nothing, and a register
// tile of rows that serves more tokens than fit the registers is decoded to float32 once for up to BATCH of them; packed ones (MXFP4) are
// handed out in parts (panels.h).
// Activations are float32 from the input to the one rounding at the end; but where a bfloat16 model meets a processor that multiplies
// bfloat16, that is used where it pays, and hidden values are rounded to it as the reference in that dtype does.
#include "columns.h"
#include "packed.h"

namespace oxfuse {

constexpr int64_t STEP_BYTES = 48 << 20;  // bound of the hidden values and outputs of the routed rows held at once, in float32

inline Floats swiglu(Floats gate, Floats up, float alpha, float limit) {
  gate = gate > limit ? splat(limit) : gate;  // in this form NaN stays NaN
  up = up > limit ? splat(limit) : up;
  up = up < -limit ? splat(-limit) : up;
  return (up + 1.f) * gate / (1.f + exp(-alpha * gate));
}

// hidden[i] = SwiGLU of the clamped pair (tile[2 * i], tile[2 * i + 1]).
static void activate(const float* tile, int64_t pairs, float alpha, float limit, float* hidden) {
  for (int64_t i = 0; i < pairs; i += LANES) {
    const int64_t part = std::min<int64_t>(LANES, pairs - i);
    float gates[LANES] = {}, ups[LANES] = {};
    for (int64_t j = 0; j < part; ++j) gates[j] = tile[2 * (i + j)], ups[j] = tile[2 * (i + j) + 1];
    const Floats value = swiglu(load(gates), load(ups), alpha, limit);
    std::memcpy(hidden + i, &value, part * sizeof(float));
  }
}

// The routed rows of one step, sorted by expert; `order` is stable, so an expert sees its tokens in their order.
struct Routing {
  std::vector<float> weight;   // [T * k]
  std::vector<int64_t> row;    // [T * k]: place of (token, j) in the sorted rows
  std::vector<int64_t> token;  // [T * k]: token of a sorted row
  std::vector<int64_t> begin;  // [E + 1]: first sorted row of each expert
};

// Picks the k largest logits, the lower expert first where two are equal, and their softmax.
static void choose(const float* logits, int64_t experts, int64_t k, int64_t* chosen, float* weight) {
  for (int64_t j = 0; j < k; ++j) {
    int64_t best = -1;
    for (int64_t e = 0; e < experts; ++e) {
      const bool taken = std::find(chosen, chosen + j, e) != chosen + j;
      if (!taken && (best < 0 || logits[e] > logits[best])) best = e;
    }
    chosen[j] = best;
  }
  float total = 0;
  for (int64_t j = 0; j < k; ++j) total += weight[j] = std::exp(logits[chosen[j]] - logits[chosen[0]]);
  for (int64_t j = 0; j < k; ++j) weight[j] /= total;
}

template <class T>
static Routing route(const float* const* x, int64_t tokens, const T* router, const Values& bias, int64_t experts, int64_t hidden, int64_t k) {
  Routing out;
  out.weight.resize(tokens * k);
  out.row.resize(tokens * k);
  out.token.resize(tokens * k);
  out.begin.assign(experts + 1, 0);
  std::vector<int64_t> chosen(tokens * k);
  const DenseRows<T> rows{router, experts, hidden};
  parallel_for(0, tokens, 1 + GRAIN / (experts * hidden), [&](int64_t first, int64_t last) {
    Scratch scratch;
    std::vector<float> logits(BATCH * experts);
    for (int64_t t = first; t < last; t += BATCH) {
      const int some = static_cast<int>(std::min<int64_t>(BATCH, last - t));
      for (int64_t e = 0; e < experts; e += NR) {
        product(rows.tile(0, e), x + t, some, hidden, scratch);
        for (int i = 0; i < some; ++i)
          for (int64_t r = 0; r < NR && e + r < experts; ++r) logits[i * experts + e + r] = scratch.tile[i * NR + r] + bias[e + r];
      }
      for (int i = 0; i < some; ++i) choose(&logits[i * experts], experts, k, &chosen[(t + i) * k], &out.weight[(t + i) * k]);
    }
  });
  for (int64_t e : chosen) ++out.begin[e + 1];
  for (int64_t e = 0; e < experts; ++e) out.begin[e + 1] += out.begin[e];
  std::vector<int64_t> next(out.begin.begin(), out.begin.end() - 1);
  for (int64_t i = 0; i < tokens * k; ++i) out.token[out.row[i] = next[chosen[i]]++] = i / k;
  return out;
}

// Rows of activations: in float32, and also in bfloat16 where the processor multiplies it.
struct Rows {
  std::vector<const float*> wide;
  std::vector<const bfloat16*> half;
};

// Calls out(e, first sorted row, count, first weight row, rows, tile, stride) for all products of the routed rows x with the rows of their
// experts: tile[i * stride + r] is that of the i-th routed row. Threads share the rows.
template <class T, class Out>
static void for_each_product(const DenseColumns<T>& weights, const Routing& routing, const Rows& x, Out&& out) {
  const int64_t experts = routing.begin.size() - 1, panels = round_up(weights.rows, PANEL) / PANEL;
  const int64_t cost = routing.begin[experts] * PANEL * weights.length;
  parallel_for(0, panels, 1 + GRAIN / (cost + 1), [&](int64_t first, int64_t last) {
    ColumnScratch scratch;
    for (int64_t e = 0; e < experts; ++e)
      for (int64_t m = routing.begin[e]; m < routing.begin[e + 1]; m += BATCH) {
        const int some = static_cast<int>(std::min<int64_t>(BATCH, routing.begin[e + 1] - m));
        multiply_columns(weights.values + e * weights.rows * weights.length, weights.rows, first * PANEL, std::min(last * PANEL, weights.rows),
                         &x.wide[m], some, weights.length, scratch,
                         [&](int64_t row, int64_t rows, float* tile, int64_t stride) { out(e, m, some, row, rows, tile, stride); });
      }
  });
}

template <class W, class Out>
static void for_each_product(const W& weights, const Routing& routing, const Rows& x, Out&& out) {
  const int64_t experts = routing.begin.size() - 1, tiles = round_up(weights.rows, NR) / NR;
  const int64_t cost = routing.begin[experts] * NR * weights.length;
  parallel_for(0, tiles, 1 + GRAIN / (cost + 1), [&](int64_t first, int64_t last) {
    Scratch scratch;
    for (int64_t e = 0; e < experts; ++e)
      for (int64_t m = routing.begin[e]; m < routing.begin[e + 1]; m += BATCH) {
        const int some = static_cast<int>(std::min<int64_t>(BATCH, routing.begin[e + 1] - m));
        for (int64_t tile = first; tile < last; ++tile) {
          if (some > MR && !x.half.empty())
            product(weights.tile(e, tile * NR), &x.half[m], some, weights.length, scratch);
          else
            product(weights.tile(e, tile * NR), &x.wide[m], some, weights.length, scratch);
          out(e, m, some, tile * NR, std::min<int64_t>(NR, weights.rows - tile * NR), scratch.tile, NR);
        }
      }
  });
}

// out[t] = the weighted sum of the routed rows of token t.
template <class T>
static void combine(const Routing& routing, const float* outer, int64_t tokens, int64_t k, int64_t hidden, T* out) {
  parallel_for(0, tokens, 1 + GRAIN / (k * hidden), [&](int64_t first, int64_t last) {
    std::vector<float> total(hidden);
    for (int64_t t = first; t < last; ++t) {
      std::fill(total.begin(), total.end(), 0.f);
      for (int64_t j = 0; j < k; ++j) {
        const float weight = routing.weight[t * k + j], *row = &outer[routing.row[t * k + j] * hidden];
#pragma omp simd
        for (int64_t i = 0; i < hidden; ++i) total[i] += weight * row[i];
      }
      for (int64_t i = 0; i < hidden; ++i) out[t * hidden + i] = narrow<T>(total[i]);
    }
  });
}

// One step of at most as many tokens as STEP_BYTES allows. x: rows, padded.
template <class T, class W>
static void run_experts(const Routing& routing, const Rows& x, const W& gate_up, const Values& gate_up_bias,
                        const W& down, const Values& down_bias, int64_t tokens, int64_t k, float alpha, float limit, T* out) {
  const int64_t rows = tokens * k, width = gate_up.rows / 2, stride = round_up(width, 32), hidden = down.rows;
  const Buffer<float> inner = buffer<float>(rows * stride), outer = buffer<float>(rows * hidden);
  const Buffer<bfloat16> inner_half = x.half.empty() ? nullptr : buffer<bfloat16>(rows * stride);
  Rows sources, inners;
  for (int64_t row = 0; row < rows; ++row) {
    std::fill(&inner[row * stride] + width, &inner[row * stride] + stride, 0.f);
    sources.wide.push_back(x.wide[routing.token[row]]);
    inners.wide.push_back(&inner[row * stride]);
    if (!inner_half) continue;
    std::fill(&inner_half[row * stride] + width, &inner_half[row * stride] + stride, bfloat16{});
    sources.half.push_back(x.half[routing.token[row]]);
    inners.half.push_back(&inner_half[row * stride]);
  }

  for_each_product(gate_up, routing, sources, [&](int64_t e, int64_t m, int count, int64_t first, int64_t some, float* tile, int64_t apart) {
    float values[std::max<int64_t>(MR * STREAMED, BATCH * PANEL) / 2];
    for (int i = 0; i < count; ++i)
      for (int64_t r = 0; r < some; ++r) tile[i * apart + r] += gate_up_bias[e * 2 * width + first + r];
    activate(tile, count * apart / 2, alpha, limit, values);
    for (int i = 0; i < count; ++i)
      for (int64_t r = 0; r < some / 2; ++r) {
        const int64_t at = (m + i) * stride + first / 2 + r;
        inner[at] = values[i * apart / 2 + r];
        if (inner_half) inner_half[at] = narrow<bfloat16>(inner[at]);
      }
  });
  for_each_product(down, routing, inners, [&](int64_t e, int64_t m, int count, int64_t first, int64_t some, float* tile, int64_t apart) {
    for (int i = 0; i < count; ++i)
      for (int64_t r = 0; r < some; ++r) outer[(m + i) * hidden + first + r] = tile[i * apart + r] + down_bias[e * hidden + first + r];
  });
  combine(routing, outer.get(), tokens, k, hidden, out);
}

// The same for experts in the packed layout; x are rows of the tokens, padded to blocks. With `rounded`, what is multiplied with experts has
// 8 bits; with `halved` it is bfloat16 where that serves better.
template <class T>
static void run_packed(const Routing& routing, const Rows& x, bool rounded, bool halved, const Mxfp4& gate_up, const Values& gate_up_bias,
                       const Mxfp4& down, const Values& down_bias, int64_t tokens, int64_t k, float alpha, float limit, T* out) {
  const int64_t rows = tokens * k, hidden = gate_up.length, width = down.length, blocks = hidden / BLOCK;
  const Places sorted_places(routing.begin, blocks), inner_places(routing.begin, width / BLOCK);
  const bool words = std::is_same_v<T, bfloat16> && !rounded && multiplies_words();
  Buffer<float> sorted = buffer<float>(rounded || words ? 0 : rows * hidden);
  Buffer<bfloat16> sorted_half = buffer<bfloat16>(halved ? rows * hidden : 0);
  const Buffer<float> inner = buffer<float>(rows * width);
  const Buffer<bfloat16> inner_half = buffer<bfloat16>(halved ? rows * width : 0);
  Activations sources{sorted.get(), halved ? sorted_half.get() : nullptr}, inners{inner.get(), halved ? inner_half.get() : nullptr};
  std::optional<RoundedBlocks<int8_t>> sorted_bytes, inner_bytes;
  std::optional<RoundedBlocks<int16_t>> sorted_words, inner_words;
  // Rows of x lie end to end, so that their blocks are numbered.
  const auto sort = [&](auto& sorted_numbers, const auto& numbers) {
    sorted_numbers.emplace(rows * blocks);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t b = 0; b < blocks; ++b) sorted_numbers->copy(sorted_places.of(row, b), numbers, routing.token[row] * blocks + b);
    return sorted_numbers->numbers();
  };
  if (rounded) {
    sources = {.bytes = sort(sorted_bytes, round_blocks<int8_t, Mxfp4>(x.wide[0], tokens * blocks))};
  } else if (words) {
    sources = {.words = sort(sorted_words, round_blocks<int16_t, Mxfp4>(x.wide[0], tokens * blocks))};
  } else {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t at = sorted_places.of(row, b) * BLOCK;
        std::memcpy(&sorted[at], x.wide[routing.token[row]] + b * BLOCK, BLOCK * sizeof(float));
        if (halved) std::memcpy(&sorted_half[at], x.half[routing.token[row]] + b * BLOCK, BLOCK * sizeof(bfloat16));
      }
  }
  for_each_panel_pair(gate_up, sorted_places, sources, [&](const Group& group, int64_t panel, const float* results) {
    float gate_bias[PANEL_ROWS], up_bias[PANEL_ROWS];
    const int64_t first = panel / 2 * PANEL_ROWS;
    for (int r = 0; r < PANEL_ROWS; ++r) {
      gate_bias[r] = gate_up_bias[group.expert * 2 * width + 2 * (first + r)];
      up_bias[r] = gate_up_bias[group.expert * 2 * width + 2 * (first + r) + 1];
    }
    for (int64_t i = 0; i < group.count; ++i)
      for (int v = 0; v < PANEL_ROWS; v += LANES) {
        const float* from = results + i * WIDTH + v;
        const Floats value = swiglu(load(from) + load(gate_bias + v), load(from + PANEL_ROWS) + load(up_bias + v), alpha, limit);
        const int64_t at = inner_places.of(group.first + i, first / BLOCK) * BLOCK + first % BLOCK + v;
        store(&inner[at], value);
        if (halved) store_narrow(&inner_half[at], value);
      }
  });
  sorted.reset(), sorted_half.reset(), sorted_bytes.reset(), sorted_words.reset();
  const Buffer<float> outer = buffer<float>(rows * hidden);
  if (rounded) inners = {.bytes = inner_bytes.emplace(round_blocks<int8_t, Mxfp4>(inner.get(), rows * width / BLOCK)).numbers()};
  if (words) inners = {.words = inner_words.emplace(round_blocks<int16_t, Mxfp4>(inner.get(), rows * width / BLOCK)).numbers()};
  for_each_panel_pair(down, inner_places, inners, [&](const Group& group, int64_t panel, const float* results) {
    float bias[WIDTH];
    const int64_t first = panel * PANEL_ROWS;
    for (int r = 0; r < WIDTH; ++r) bias[r] = down_bias[group.expert * hidden + first + r];
    for (int64_t i = 0; i < group.count; ++i)
      for (int v = 0; v < WIDTH; v += LANES) store(&outer[(group.first + i) * hidden + first + v], load(results + i * WIDTH + v) + load(bias + v));
  });
  combine(routing, outer.get(), tokens, k, hidden, out);
}

static Tensor moe_dispatch(const Tensor& x, const Tensor& router_weight, const Tensor& router_bias, const Tensor& gate_up,
                           const std::optional<Tensor>& gate_up_scales, const Tensor& gate_up_bias, const Tensor& down,
                           const std::optional<Tensor>& down_scales, const Tensor& down_bias, int64_t top_k, double alpha, double limit,
                           bool int8_activations) {
  const int64_t experts = router_weight.size(0), hidden = router_weight.size(1), width = gate_up_bias.size(1) / 2;
  OXFUSE_CHECK(x.dim() >= 1 && x.size(-1) == hidden, "x must end in the router's " + text(hidden) + " features");
  OXFUSE_CHECK(1 <= top_k && top_k <= experts, "top_k " + text(top_k) + " of " + text(experts) + " experts");
  OXFUSE_CHECK(gate_up_scales.has_value() == down_scales.has_value(), "both or neither of gate_up and down are MXFP4");
  check_shape("router_bias", router_bias, {experts});
  check_shape("gate_up_bias", gate_up_bias, {experts, 2 * width});
  check_shape("down_bias", down_bias, {experts, hidden});
  OXFUSE_CHECK(gate_up_scales || !int8_activations, "activations of 8 bits need experts in MXFP4");
  if (gate_up_scales) {
    OXFUSE_CHECK(hidden % 32 == 0 && width % 32 == 0, "MXFP4 needs sizes that 32 divides, found " + text(hidden) + " and " + text(width));
    check_shape("packed gate_up", gate_up, {experts, width / 8, hidden / 32, BLOCK_BYTES});
    check_shape("gate_up_scales", *gate_up_scales, {experts, width / 8, hidden / 32, PANEL_ROWS});
    check_shape("packed down", down, {experts, hidden / 16, width / 32, BLOCK_BYTES});
    check_shape("down_scales", *down_scales, {experts, hidden / 16, width / 32, PANEL_ROWS});
    for (const Tensor* bytes : {&gate_up, &*gate_up_scales, &down, &*down_scales}) check_dtype("an MXFP4 tensor", *bytes, "uint8");
  } else {
    check_shape("gate_up", gate_up, {experts, 2 * width, hidden});
    check_shape("down", down, {experts, hidden, width});
    check_dtype("gate_up", gate_up, dtype_name(x).c_str());
    check_dtype("down", down, dtype_name(x).c_str());
  }
  check_dtype("router_weight", router_weight, dtype_name(x).c_str());
  // Weights are mapped files: a silent copy would cost their size in memory.
  const bool columns = !gate_up_scales && gate_up.numel() && down.numel() && torch::stable::transpose(gate_up, 1, 2).is_contiguous() &&
                       torch::stable::transpose(down, 1, 2).is_contiguous();
  OXFUSE_CHECK(columns || (gate_up.is_contiguous() && down.is_contiguous()), "experts' weights must be contiguous, as rows or as columns");
  OXFUSE_CHECK(router_weight.is_contiguous() && (!gate_up_scales || (gate_up_scales->is_contiguous() && down_scales->is_contiguous())),
               "the router's weights must be contiguous, and scales");

  const Tensor x_in = torch::stable::contiguous(x), out = torch::stable::new_empty(x, x.sizes());
  const Values router_b("router_bias", router_bias), gate_up_b("gate_up_bias", gate_up_bias), down_b("down_bias", down_bias);
  const int64_t tokens = hidden ? x.numel() / hidden : 0, stride = round_up(hidden, 32);
  // Steps as alike as can be: experts are read in each of them, and a short one would gain little of it.
  const int64_t most = std::max<int64_t>(1, STEP_BYTES / (4 * top_k * (width + hidden)));
  const int64_t steps = std::max<int64_t>(1, (tokens + most - 1) / most), step = std::max<int64_t>(1, (tokens + steps - 1) / steps);
  with_type("x", x, [&](auto type) {
    using T = decltype(type);
    const T* router = data<T>(router_weight);
    const Buffer<float> wide = buffer<float>(std::min(step, tokens) * stride);
    Buffer<bfloat16> halves;
    const bool halved = !int8_activations && !columns && multiplies_bfloat16();
    if (std::is_same_v<T, bfloat16> && halved) halves = buffer<bfloat16>(std::min(step, tokens) * stride);
    for (int64_t begin = 0; begin < tokens; begin += step) {
      const int64_t count = std::min(step, tokens - begin);
      Rows rows;
      for (int64_t t = 0; t < count; ++t) {
        float* row = &wide[t * stride];
        const T* source = data<T>(x_in) + (begin + t) * hidden;
        for (int64_t i = 0; i < hidden; ++i) row[i] = widen(source[i]);
        std::fill(row + hidden, row + stride, 0.f);
        rows.wide.push_back(row);
        if (!halves) continue;
        for (int64_t i = 0; i < stride; ++i) halves[t * stride + i] = narrow<bfloat16>(row[i]);
        rows.half.push_back(&halves[t * stride]);
      }
      const Routing routing = route(rows.wide.data(), count, router, router_b, experts, hidden, top_k);
      T* result = static_cast<T*>(out.data_ptr()) + begin * hidden;
      const float a = static_cast<float>(alpha), l = static_cast<float>(limit);
      if (gate_up_scales) {
        static const Powers powers;
        run_packed(routing, rows, int8_activations, halves != nullptr,
                   {data<uint8_t>(gate_up), data<uint8_t>(*gate_up_scales), width / 8, hidden, powers.of}, gate_up_b,
                   {data<uint8_t>(down), data<uint8_t>(*down_scales), hidden / 16, width, powers.of}, down_b, count, top_k, a, l, result);
        continue;
      }
      const T *first = data<T>(gate_up), *second = data<T>(down);
      if (columns)
        run_experts(routing, rows, DenseColumns<T>{first, 2 * width, hidden}, gate_up_b, DenseColumns<T>{second, hidden, width}, down_b, count,
                    top_k, a, l, result);
      else
        run_experts(routing, rows, DenseRows<T>{first, 2 * width, hidden}, gate_up_b, DenseRows<T>{second, hidden, width}, down_b, count, top_k,
                    a, l, result);
    }
  });
  return out;
}

}  // namespace oxfuse

OXFUSE_OP(moe_dispatch,
          "(Tensor x, Tensor router_weight, Tensor router_bias, Tensor gate_up, Tensor? gate_up_scales, Tensor gate_up_bias, Tensor down, "
          "Tensor? down_scales, Tensor down_bias, int top_k, float alpha, float limit, bool int8_activations=False) -> Tensor")
