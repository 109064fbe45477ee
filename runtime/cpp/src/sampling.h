// Picks the next token from logits as runtime/sampling.py does: with the same operations of torch in the same order, so that what
// the filters keep is the same to the last token.
#pragma once

#include "oxfuse.h"

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <mutex>
#include <vector>

namespace oxfuse::internal {

// Throw Failure naming the option that is out of its range.
void check_sampling(const oxfuse_sampling_options& options);

class Sampler {
 public:
  // Seed the generator, from the operating system where the options have no seed. Throws Failure for options out of range.
  explicit Sampler(const oxfuse_sampling_options& options);

  // Return the next token for float32 logits [V] after `tokens`. Throws Failure where they are not finite.
  int64_t pick(const at::Tensor& logits, const std::vector<int64_t>& tokens);

  // Return the distribution, float64 [V], that `pick` would draw from.
  at::Tensor probabilities(const at::Tensor& logits, const std::vector<int64_t>& tokens) const;

 private:
  at::Tensor penalised(const at::Tensor& logits, const std::vector<int64_t>& tokens) const;

  const oxfuse_sampling_options options_;
  at::Generator generator_;
};

}  // namespace oxfuse::internal
