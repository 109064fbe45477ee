// oxfuse::moe_dispatch on the CPU: router, experts (float32, bfloat16 or MXFP4) and combination; its meaning is in reference.py.
//
// Tokens are grouped by expert. Of dense experts threads share the rows of the weights, so skewed routing costs nothing, and a register
// tile of rows that serves more tokens than fit the registers is decoded to float32 once for up to BATCH of them; packed ones (MXFP4) are
// handed out in parts (panels.h).
// Activations are float32 from the input to the one rounding at the end; but of a bfloat16 model, packed experts are multiplied in 16 bits,
// bfloat16 or whole numbers, where the processor is faster at them (packed.h), and with --activations int8 in 8 bits.
#include "columns.h"
#include "packed.h"

namespace oxfuse {

constexpr int64_t PAIRS_OF_FEW = 4;       // pairs of panels that a thread takes at a time for a few tokens
constexpr int64_t STEP_BYTES = 48 << 20;  // bound of what is held at once of tokens and their routed rows

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
  std::vector<float> logits(tokens * experts);
  const DenseRows<T> rows{router, experts, hidden};
  const int64_t tiles = (experts + NR - 1) / NR, batches = (tokens + BATCH - 1) / BATCH;
  const Reading reading{router, tiles, NR * hidden * int64_t{sizeof(T)}};
  share(tokens, batches * tiles, tiles, tokens * experts * hidden, reading, [&](const auto& next) {  // experts too: one token's would take one thread longer
    Scratch scratch;
    for (Range part = next(); part.begin < part.end; part = next())
      for (int64_t item = part.begin; item < part.end; ++item) {
        const int64_t t = item / tiles * BATCH, e = item % tiles * NR;
        const int some = static_cast<int>(std::min<int64_t>(BATCH, tokens - t));
        product(rows.tile(0, e), x + t, some, hidden, scratch);
        for (int i = 0; i < some; ++i)
          for (int64_t r = 0; r < NR && e + r < experts; ++r) logits[(t + i) * experts + e + r] = scratch.tile[i * NR + r] + bias[e + r];
      }
  });
  parallel_for(0, tokens, 1 + GRAIN / (experts * k), [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) choose(&logits[t * experts], experts, k, &chosen[t * k], &out.weight[t * k]);
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
static void for_each_product(const DenseColumns<T>& weights, const Routing& routing, const Rows& x, int64_t tokens, Out&& out) {
  const int64_t experts = routing.begin.size() - 1, panels = round_up(weights.rows, PANEL) / PANEL;
  const int64_t cost = routing.begin[experts] * PANEL * weights.length;
  parallel_for_rows(tokens, panels, 1 + GRAIN / (cost + 1), [&](int64_t first, int64_t last) {
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
static void for_each_product(const W& weights, const Routing& routing, const Rows& x, int64_t tokens, Out&& out) {
  const int64_t experts = routing.begin.size() - 1, tiles = round_up(weights.rows, NR) / NR;
  const int64_t cost = routing.begin[experts] * NR * weights.length;
  parallel_for_rows(tokens, tiles, 1 + GRAIN / (cost + 1), [&](int64_t first, int64_t last) {
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

  for_each_product(gate_up, routing, sources, tokens, [&](int64_t e, int64_t m, int count, int64_t first, int64_t some, float* tile, int64_t apart) {
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
  for_each_product(down, routing, inners, tokens, [&](int64_t e, int64_t m, int count, int64_t first, int64_t some, float* tile, int64_t apart) {
    for (int i = 0; i < count; ++i)
      for (int64_t r = 0; r < some; ++r) outer[(m + i) * hidden + first + r] = tile[i * apart + r] + down_bias[e * hidden + first + r];
  });
  combine(routing, outer.get(), tokens, k, hidden, out);
}

// The form in which packed experts are multiplied with rows: float32, bfloat16, or whole numbers.
enum class Form { WIDE, HALF, WORDS, BYTES };

static Form form_of(bool bfloat16_model, bool int8_activations) {
  if (int8_activations) return Form::BYTES;
  if (!bfloat16_model) return Form::WIDE;
  return multiplies_bfloat16() ? Form::HALF : multiplies_words() ? Form::WORDS : Form::WIDE;
}

// Bytes of a block of 32 values.
static int64_t block_bytes(Form form) {
  switch (form) {
    case Form::WIDE: return BLOCK * 4;
    case Form::HALF: return BLOCK * 2;
    case Form::WORDS: return BLOCK * 2 + 8;
    default: return BLOCK + 8;
  }
}

// Rows of activations in one of the forms, to be filled block by block.
class Blocks {
 public:
  Blocks(Form form, int64_t count) {
    if (form == Form::WIDE) wide_ = buffer<float>(count * BLOCK);
    if (form == Form::HALF) half_ = buffer<bfloat16>(count * BLOCK);
    if (form == Form::WORDS) words_.emplace(count);
    if (form == Form::BYTES) bytes_.emplace(count);
  }
  void put(int64_t place, const float* values) {
    if (words_) words_->round(place, values, 0);
    if (bytes_) bytes_->round(place, values, start_factor<Mxfp4>());
    if (wide_) std::memcpy(&wide_[place * BLOCK], values, BLOCK * sizeof(float));
    if (half_)
      for (int k = 0; k < BLOCK; k += LANES) store_narrow(&half_[place * BLOCK + k], load(values + k));
  }
  void copy(int64_t place, int64_t from) {
    if (words_) words_->copy(place, from);
    if (bytes_) bytes_->copy(place, from);
    if (wide_) std::memcpy(&wide_[place * BLOCK], &wide_[from * BLOCK], BLOCK * sizeof(float));
    if (half_) std::memcpy(&half_[place * BLOCK], &half_[from * BLOCK], BLOCK * sizeof(bfloat16));
  }
  Activations all() const {
    return {wide_.get(), half_.get(), bytes_ ? bytes_->numbers() : Numbers<int8_t>{}, words_ ? words_->numbers() : Numbers<int16_t>{}};
  }

 private:
  Buffer<float> wide_;
  Buffer<bfloat16> half_;
  std::optional<RoundedBlocks<int8_t>> bytes_;
  std::optional<RoundedBlocks<int16_t>> words_;
};

// out[t] = the weighted sum of the routed rows x of token t, multiplied with the packed panels of their experts. A thread sums some columns of all
// tokens, over the experts in their order, so that no routed row's outputs are held.
template <class T>
static void combine_packed(const Routing& routing, const Places& places, const Activations& x, const Mxfp4& down, const Values& bias, int64_t tokens,
                           int64_t k, int64_t hidden, T* out) {
  std::vector<float> weight(tokens * k);  // of each sorted row
  for (int64_t i = 0; i < tokens * k; ++i) weight[routing.row[i]] = routing.weight[i];
  const int64_t pairs = hidden / WIDTH, most = tokens > STREAMED_ROWS ? 1 : PAIRS_OF_FEW;
  share(tokens, pairs, most, tokens * k * hidden * down.length, down.reading(pairs, PAIR), [&](const auto& next) {
    const std::unique_ptr<PanelScratch> scratch(new PanelScratch);
    const Buffer<float> sums = buffer<float>(tokens * most * WIDTH);
    for (Range part = next(); part.begin < part.end; part = next()) {
      const int64_t first = part.begin, some = part.end - first, columns = some * WIDTH;
      std::fill_n(sums.get(), tokens * columns, 0.f);
      for (const Group& group : places.groups) {
        const Activations own = x.at(group.first * places.blocks, group.count);
        for (int64_t pair = 0; pair < some; ++pair) {
          const PanelPair now{group.expert, (first + pair) * PAIR};
          const PanelPair then = pair + 1 < some                   ? PanelPair{now.expert, now.panel + PAIR}
                                 : &group != &places.groups.back() ? PanelPair{(&group)[1].expert, first * PAIR}
                                                                   : now;
          multiply_panels(down, now, then, own, static_cast<int>(group.count), *scratch);
          float added[WIDTH];
          for (int r = 0; r < WIDTH; ++r) added[r] = bias[group.expert * hidden + (first + pair) * WIDTH + r];
          for (int64_t i = 0; i < group.count; ++i) {
            float* sum = &sums[routing.token[group.first + i] * columns + pair * WIDTH];
            const float factor = weight[group.first + i];
            for (int v = 0; v < WIDTH; v += LANES)
              store(sum + v, load(sum + v) + (load(scratch->out + i * WIDTH + v) + load(added + v)) * factor);
          }
        }
      }
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t c = 0; c < columns; c += LANES) store(out + t * hidden + first * WIDTH + c, load(&sums[t * columns + c]));
    }
  });
}

// The same for experts in the packed layout; rows of x, end to end, are padded to blocks.
template <class T>
static void run_packed(const Routing& routing, Buffer<float> x, Form form, const Mxfp4& gate_up, const Values& gate_up_bias, const Mxfp4& down,
                       const Values& down_bias, int64_t tokens, int64_t k, float alpha, float limit, T* out) {
  const int64_t rows = tokens * k, hidden = gate_up.length, width = down.length, blocks = hidden / BLOCK;
  const Places sorted_places(routing.begin, blocks), inner_places(routing.begin, width / BLOCK);
  std::optional<Blocks> sorted(std::in_place, form, rows * blocks);
  parallel_for(0, tokens, 1 + GRAIN / (k * hidden), [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t place = sorted_places.of(routing.row[t * k], b);
        sorted->put(place, &x[(t * blocks + b) * BLOCK]);
        for (int64_t j = 1; j < k; ++j) sorted->copy(sorted_places.of(routing.row[t * k + j], b), place);
      }
  });
  x.reset();
  Blocks inner(form, rows * width / BLOCK);
  for_each_panel_pair(gate_up, sorted_places, sorted->all(), tokens, [&](const Group& group, int64_t panel, PanelScratch& scratch) {
    float gate_bias[PANEL_ROWS], up_bias[PANEL_ROWS];
    const int64_t first = panel / 2 * PANEL_ROWS, half = first % BLOCK;
    for (int r = 0; r < PANEL_ROWS; ++r) {
      gate_bias[r] = gate_up_bias[group.expert * 2 * width + 2 * (first + r)];
      up_bias[r] = gate_up_bias[group.expert * 2 * width + 2 * (first + r) + 1];
    }
    for (int64_t i = 0; i < group.count; ++i) {
      for (int v = 0; v < PANEL_ROWS; v += LANES) {
        const float* from = scratch.out + i * WIDTH + v;
        store(scratch.kept + i * BLOCK + half + v,
              swiglu(load(from) + load(gate_bias + v), load(from + PANEL_ROWS) + load(up_bias + v), alpha, limit));
      }
      if (half) inner.put(inner_places.of(group.first + i, first / BLOCK), scratch.kept + i * BLOCK);
    }
  });
  sorted.reset();
  combine_packed(routing, inner_places, inner.all(), down, down_bias, tokens, k, hidden, out);
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

  const Tensor x_in = in_one_piece(x), out = uninitialized(x, x.sizes());
  const Values router_b("router_bias", router_bias), gate_up_b("gate_up_bias", gate_up_bias), down_b("down_bias", down_bias);
  const int64_t tokens = hidden ? x.numel() / hidden : 0, stride = round_up(hidden, 32);
  with_type("x", x, [&](auto type) {
    using T = decltype(type);
    constexpr bool bfloat16_model = std::is_same_v<T, bfloat16>;
    const Form form = gate_up_scales ? form_of(bfloat16_model, int8_activations) : Form::WIDE;
    // Steps as alike as can be: experts are read in each of them, and a short one would gain little of it.
    const int64_t most = std::max<int64_t>(1, STEP_BYTES / (4 * hidden + top_k * (width + hidden) * block_bytes(form) / BLOCK));
    const int64_t steps = std::max<int64_t>(1, (tokens + most - 1) / most), step = std::max<int64_t>(1, (tokens + steps - 1) / steps);
    const T* router = data<T>(router_weight);
    for (int64_t begin = 0; begin < tokens; begin += step) {
      const int64_t count = std::min(step, tokens - begin);
      Buffer<float> wide = buffer<float>(count * stride);
      Buffer<bfloat16> halves;
      if (bfloat16_model && !gate_up_scales && !columns && multiplies_bfloat16()) halves = buffer<bfloat16>(count * stride);
      Rows rows;
      for (int64_t t = 0; t < count; ++t) {
        rows.wide.push_back(&wide[t * stride]);
        if (halves) rows.half.push_back(&halves[t * stride]);
      }
      parallel_for(0, count, 1 + GRAIN / (stride + 1), [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; ++t) {
          float* row = &wide[t * stride];
          const T* source = data<T>(x_in) + (begin + t) * hidden;
          for (int64_t i = 0; i < hidden; ++i) row[i] = widen(source[i]);
          std::fill(row + hidden, row + stride, 0.f);
          if (halves)
            for (int64_t i = 0; i < stride; ++i) halves[t * stride + i] = narrow<bfloat16>(row[i]);
        }
      });
      const Routing routing = route(rows.wide.data(), count, router, router_b, experts, hidden, top_k);
      T* result = static_cast<T*>(out.data_ptr()) + begin * hidden;
      const float a = static_cast<float>(alpha), l = static_cast<float>(limit);
      if (gate_up_scales) {
        static const Powers powers;
        run_packed(routing, std::move(wide), form, {data<uint8_t>(gate_up), data<uint8_t>(*gate_up_scales), width / 8, hidden, powers.of}, gate_up_b,
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
