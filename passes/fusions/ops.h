// What the C++ ops need of torch: registration, checks, dtypes. torch's stable ABI: its headers cost 3 s to compile where the usual
// ones cost 12, and they are the same from torch 2.11 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "threads.h"
#include "vector.h"

// Registers `function` as oxfuse::<function>_<tag>. The tag is a hash of the sources: two artifacts in one process may bring ops of
// different versions, and a second definition of one name would abort it. oxfuse::<function>_<tag>_address returns where programs may call
// it without torch's dispatcher (`Direct`).
#define OXFUSE_OP(function, schema)                                                                \
  STABLE_TORCH_LIBRARY_FRAGMENT(oxfuse, m) {                                                       \
    m.def(#function "_" OXFUSE_TAG schema);                                                        \
    m.def(#function "_" OXFUSE_TAG "_address() -> int");                                           \
  }                                                                                                \
  STABLE_TORCH_LIBRARY_IMPL(oxfuse, CPU, m) {                                                      \
    m.impl(#function "_" OXFUSE_TAG, TORCH_BOX(&oxfuse::function));                                \
  }                                                                                                \
  STABLE_TORCH_LIBRARY_IMPL(oxfuse, CompositeExplicitAutograd, m) {                                \
    m.impl(#function "_" OXFUSE_TAG "_address", TORCH_BOX(&oxfuse::Direct<&oxfuse::function>::address)); \
  }

namespace oxfuse {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// An op as a C function: tensors are handles that stay the caller's, an optional one is a pointer to a handle or null, a bool is an int32_t, and
// after the arguments come pointers for the handles of one result or of two, which become the caller's. torch's way to an op of ours makes a
// box of each argument and of each result, which took a sixtieth of a token's time. What `function` throws, `call` throws.
template <class T>
struct Plain {
  using type = std::conditional_t<std::is_same_v<T, bool>, int32_t, T>;
  static T taken(type value) { return static_cast<T>(value); }
};
template <>
struct Plain<Tensor> {
  using type = AtenTensorHandle;
  static Tensor taken(type handle) {
    AtenTensorHandle another;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle, &another));
    return Tensor(another);
  }
};
template <>
struct Plain<std::optional<Tensor>> {
  using type = const AtenTensorHandle*;
  static std::optional<Tensor> taken(type handle) {
    if (!handle) return std::nullopt;
    return Plain<Tensor>::taken(*handle);
  }
};

inline void give(const Tensor& result, AtenTensorHandle* to) { TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(result.get(), to)); }

template <auto function>
struct Direct {  // with other results there is no such way, and programs take torch's
  static int64_t address() { return 0; }
};
template <class... Args, Tensor (*function)(Args...)>
struct Direct<function> {
  static AOTITorchError call(typename Plain<std::decay_t<Args>>::type... args, AtenTensorHandle* result) {
    give(function(Plain<std::decay_t<Args>>::taken(args)...), result);
    return AOTI_TORCH_SUCCESS;
  }
  static int64_t address() { return reinterpret_cast<int64_t>(&call); }
};
template <class... Args, std::tuple<Tensor, Tensor> (*function)(Args...)>
struct Direct<function> {
  static AOTITorchError call(typename Plain<std::decay_t<Args>>::type... args, AtenTensorHandle* first, AtenTensorHandle* second) {
    const auto results = function(Plain<std::decay_t<Args>>::taken(args)...);
    give(std::get<0>(results), first);
    give(std::get<1>(results), second);
    return AOTI_TORCH_SUCCESS;
  }
  static int64_t address() { return reinterpret_cast<int64_t>(&call); }
};

// Refuses what the caller passed. The message is an expression of strings that is evaluated where it is needed alone; torch's own
// macro would cost a stream for each.
#define OXFUSE_CHECK(condition, message) \
  if (!(condition)) throw std::runtime_error(std::string("oxfuse: ") + (message))

inline std::string text(int64_t value) { return std::to_string(value); }

using Shape = torch::headeronly::IntHeaderOnlyArrayRef;  // of somebody else's numbers

inline std::string text(Shape shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + text(shape[i]);
  return out + "]";
}

inline void check_shape(const char* name, const Tensor& x, Shape expected) {
  OXFUSE_CHECK(x.sizes() == expected, std::string(name) + " has shape " + text(x.sizes()) + ", expected " + text(expected));
}

// `x` in one piece. torch's function alone looks its operator up by name even where there is nothing to do, which a token met a hundred times.
inline Tensor in_one_piece(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// Memory that is not set, of the dtype of `x`; for the same reason not by torch::stable::new_empty.
inline Tensor uninitialized(const Tensor& x, Shape shape) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(shape.size(), shape.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), -1, &made));
  return Tensor(made);
}

inline std::string dtype_name(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Long: return "int64";
    case ScalarType::Byte: return "uint8";
    default: return "ScalarType " + text(static_cast<int64_t>(x.scalar_type()));
  }
}

inline void check_dtype(const char* name, const Tensor& x, const char* expected) {
  OXFUSE_CHECK(dtype_name(x) == expected, std::string(name) + " has dtype " + dtype_name(x) + ", expected " + expected);
}

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.data_ptr());
}

// Calls body(T{}) with the C++ type of a tensor of activations.
template <class Body>
void with_type(const char* name, const Tensor& x, Body&& body) {
  if (x.scalar_type() == ScalarType::Float) return body(float{});
  OXFUSE_CHECK(x.scalar_type() == ScalarType::BFloat16, std::string(name) + " has dtype " + dtype_name(x) + ", expected float32 or bfloat16");
  body(bfloat16{});
}

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

struct Free {
  int64_t mapped = 0;  // bytes; 0: allocated
  void operator()(void* memory) const {
#ifdef __linux__
    if (mapped) return static_cast<void>(munmap(memory, mapped));
#endif
    std::free(memory);
  }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

// Memory for `count` numbers, not set. Large pieces are mapped in large pages: what is allocated anew for every step costs a fault for each
// page of it, which was a seventh of a long prompt's time with pages of 4 KB; and among torch's tensors in the heap they would leave holes.
template <class T>
Buffer<T> buffer(int64_t count) {
  const int64_t bytes = std::max<int64_t>(count, 1) * sizeof(T);
#ifdef __linux__
  constexpr int64_t page = 2 << 20;
  if (bytes >= 2 * page) {
    const int64_t size = round_up(bytes, page);
    void* mapped = mmap(nullptr, size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    char* const first = static_cast<char*>(mapped);
    const int64_t at = reinterpret_cast<intptr_t>(first), before = round_up(at, page) - at;
    if (before) munmap(first, before);
    if (before < page) munmap(first + before + size, page - before);
    madvise(first + before, size, MADV_HUGEPAGE);  // advice: it may be refused
    return Buffer<T>(reinterpret_cast<T*>(first + before), Free{size});
  }
#endif
  void* memory;  // as large as asked for: a sanitizer sees what goes past the end
  if (posix_memalign(&memory, 64, bytes)) throw std::bad_alloc();
  return Buffer<T>(static_cast<T*>(memory));
}

// Reads single values of a small tensor as float32, whichever of the two dtypes it has: biases, sinks, frequencies.
class Values {
 public:
  Values(const char* name, const Tensor& x) : whole_(in_one_piece(x)), data_(whole_.data_ptr()) {
    with_type(name, whole_, [&](auto type) { half_ = std::is_same_v<decltype(type), bfloat16>; });
  }
  float operator[](int64_t i) const { return half_ ? widen(static_cast<const bfloat16*>(data_)[i]) : static_cast<const float*>(data_)[i]; }

 private:
  Tensor whole_;
  const void* data_;
  bool half_ = false;
};

}  // namespace oxfuse
