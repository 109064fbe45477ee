#include "sampling.h"

#include "failure.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>
#include <limits>
#include <set>

namespace oxfuse::internal {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

void require(bool fits, const char* name, double value, const char* want) {
  if (!fits) {
    throw Failure(OXFUSE_BAD_ARGUMENT, std::string(name) + " is " + std::to_string(value) + ": give " + want + ".");
  }
}

at::Tensor scaled_by(const at::Tensor& scores, double penalty) {
  return at::where(scores.lt(0), scores.mul(penalty), scores.div(penalty));
}

// Divide the positive logits [V] of `tokens` by `penalty`, multiply the negative ones (Keskar et al. 2019, section 4.1). Each
// counts once, however often it occurs. A logit that would overflow becomes the largest number there is.
at::Tensor penalise_repetition(const at::Tensor& logits, const std::vector<int64_t>& tokens, double penalty) {
  const std::set<int64_t> once(tokens.begin(), tokens.end());
  const std::vector<int64_t> sorted(once.begin(), once.end());
  const at::Tensor seen = at::tensor(sorted, at::kLong);
  const at::Tensor scores = logits.index_select(0, seen);
  at::Tensor penalised = scaled_by(scores, penalty);
  const at::Tensor finite = scores.isfinite();
  if (!penalised.masked_select(finite).isfinite().all().item<bool>()) {  // float64: the penalty may be beyond float32
    constexpr double most = std::numeric_limits<float>::max();
    penalised = at::where(finite, scaled_by(scores.to(at::kDouble), penalty).clamp(-most, most).to(at::kFloat), scores);
  }
  return logits.scatter(0, seen, penalised);
}

// Return logits [V] with temperature applied and all that top_k, top_p and min_p exclude set to -inf, in this order. The largest
// is finite and stays. Ties with the last of the top_k stay too; of equals at the edge of top_p the later ones stay. Where a
// temperature is so low that the quotient overflows, the largest becomes 0, and the others what their distance from it says.
at::Tensor filter_logits(const at::Tensor& raw, const oxfuse_sampling_options& options) {
  at::Tensor logits = raw.div(options.temperature);
  if (!std::isfinite(logits.max().item<float>())) {
    logits = raw.to(at::kDouble).sub(raw.max()).div(options.temperature).to(at::kFloat);
  }
  if (options.top_k) {
    const at::Tensor kept = std::get<0>(logits.topk(std::min(options.top_k, logits.size(0))));
    logits = logits.masked_fill(logits.lt(kept.select(0, -1)), -infinity);
  }
  if (options.top_p < 1) {
    const auto [ascending, order] = logits.sort(/*stable=*/true, /*dim=*/-1, /*descending=*/false);
    const at::Tensor excluded = ascending.softmax(-1).cumsum(-1).le(1 - options.top_p);
    excluded.select(0, -1).fill_(false);
    logits = logits.masked_fill(at::zeros_like(excluded).scatter(0, order, excluded), -infinity);
  }
  if (options.min_p) {
    const at::Tensor probabilities = logits.softmax(-1);
    const at::Tensor excluded = probabilities.lt(probabilities.max().mul(options.min_p));
    excluded.select(0, probabilities.argmax().item<int64_t>()).fill_(false);
    logits = logits.masked_fill(excluded, -infinity);
  }
  return logits;
}

}  // namespace

void check_sampling(const oxfuse_sampling_options& options) {
  const auto number = [](double value) {
    return std::isfinite(value);
  };
  require(number(options.temperature) && options.temperature >= 0, "temperature", options.temperature, "a number >= 0");
  require(options.top_k >= 0, "top_k", static_cast<double>(options.top_k), "a whole number >= 0");
  require(options.top_p >= 0 && options.top_p <= 1, "top_p", options.top_p, "a number from 0 to 1");
  require(options.min_p >= 0 && options.min_p <= 1, "min_p", options.min_p, "a number from 0 to 1");
  const double penalty = options.repetition_penalty;
  require(number(penalty) && penalty > 0, "repetition_penalty", penalty, "a number > 0");
}

Sampler::Sampler(const oxfuse_sampling_options& options) : options_(options) {
  check_sampling(options);
  generator_ = at::make_generator<at::CPUGeneratorImpl>();
  if (options.has_seed) {
    generator_.set_current_seed(static_cast<uint64_t>(options.seed));
  } else {
    generator_.seed();
  }
}

at::Tensor Sampler::penalised(const at::Tensor& logits, const std::vector<int64_t>& tokens) const {
  const double largest = logits.max().item<float>();  // NaN where one of them is
  if (!std::isfinite(largest)) {
    throw Failure(
        OXFUSE_INTERNAL, "The model's logits are not finite (maximum " + std::to_string(largest) + "): run `oxfuse verify`."
    );
  }
  return options_.repetition_penalty == 1 ? logits : penalise_repetition(logits, tokens, options_.repetition_penalty);
}

int64_t Sampler::pick(const at::Tensor& logits, const std::vector<int64_t>& tokens) {
  const at::Tensor scores = penalised(logits, tokens);
  if (options_.temperature == 0) {
    return scores.argmax().item<int64_t>();
  }
  // the inverse of the cumulative distribution, in float64: one number a token whatever the vocabulary, and a last bit's
  // difference in the logits changes the token only where the number falls on a boundary
  const at::Tensor cumulative = filter_logits(scores, options_).to(at::kDouble).softmax(-1).cumsum(-1);
  const at::Tensor drawn = at::rand({}, generator_, at::kDouble).mul(cumulative.select(0, -1));
  return at::searchsorted(cumulative, drawn, /*out_int32=*/false, /*right=*/true).item<int64_t>();
}

at::Tensor Sampler::probabilities(const at::Tensor& logits, const std::vector<int64_t>& tokens) const {
  const at::Tensor scores = penalised(logits, tokens);
  if (options_.temperature == 0) {
    at::Tensor one = at::zeros({logits.size(0)}, at::kDouble);
    one.select(0, scores.argmax().item<int64_t>()).fill_(1);
    return one;
  }
  return filter_logits(scores, options_).to(at::kDouble).softmax(-1);
}

}  // namespace oxfuse::internal
