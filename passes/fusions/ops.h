// What the C++ ops need of torch: registration, checks, dtypes. torch's stable ABI: its headers cost 3 s to compile where the usual
// ones cost 12, and they are the same from torch 2.11 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "vector.h"

// Registers `function` as oxfuse::<function>_<tag>. The tag is a hash of the sources: two artifacts in one process may bring ops of
// different versions, and a second definition of one name would abort it.
#define OXFUSE_OP(function, schema)                                                       \
  STABLE_TORCH_LIBRARY_FRAGMENT(oxfuse, m) { m.def(#function "_" OXFUSE_TAG schema); }    \
  STABLE_TORCH_LIBRARY_IMPL(oxfuse, CPU, m) { m.impl(#function "_" OXFUSE_TAG, TORCH_BOX(&oxfuse::function)); }

namespace oxfuse {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::parallel_for;

inline std::vector<int64_t> sizes(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }

inline void check_shape(const char* name, const Tensor& x, const std::vector<int64_t>& expected) {
  if (sizes(x) == expected) return;
  std::ostringstream text;
  text << "oxfuse: " << name << " has shape [";
  for (int64_t size : sizes(x)) text << ' ' << size;
  text << " ], expected [";
  for (int64_t size : expected) text << ' ' << size;
  text << " ]";
  throw std::runtime_error(text.str());
}

inline void check_dtype(const char* name, const Tensor& x, ScalarType expected) {
  STD_TORCH_CHECK(x.scalar_type() == expected, "oxfuse: ", name, " has dtype ", static_cast<int>(x.scalar_type()), ", expected ",
                  static_cast<int>(expected), " (torch's ScalarType)");
}

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.data_ptr());
}

// Calls body(T{}) with the C++ type of a tensor of activations.
template <class Body>
auto with_type(const char* name, const Tensor& x, Body&& body) {
  if (x.scalar_type() == ScalarType::Float) return body(float{});
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, "oxfuse: ", name, " must be float32 or bfloat16, found ScalarType ",
                  static_cast<int>(x.scalar_type()));
  return body(bfloat16{});
}

// A contiguous copy in float32 of a small tensor: biases, sinks, frequencies.
inline std::vector<float> floats(const char* name, const Tensor& x) {
  const Tensor whole = torch::stable::contiguous(x);
  std::vector<float> out(whole.numel());
  with_type(name, whole, [&](auto type) {
    const auto* values = data<decltype(type)>(whole);
    for (size_t i = 0; i < out.size(); ++i) out[i] = widen(values[i]);
  });
  return out;
}

}  // namespace oxfuse
