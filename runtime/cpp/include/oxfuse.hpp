// The C++ face of oxfuse.h: handles that close themselves, exceptions, and tokens in a range-for.
//
//   oxfuse::Model model("gpt-oss-20b-cpu");
//   oxfuse::Session session = model.session();
//   for (std::int64_t token : session.generate({1, 2, 3}, oxfuse::GenerateOptions().max_new_tokens(50))) std::cout << token << '
//   ';
//
// Header-only over the C interface, whose rules of ownership and threads hold here too. What fails throws oxfuse::Error. Objects
// move and do not copy; one that was moved from is closed, and whatever is asked of it throws.

#pragma once

#include "oxfuse.h"

#include <cstdint>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace oxfuse {

// A failed call: `what` is the message, `status` what kind of failure it is.
class Error : public std::runtime_error {
 public:
  Error(oxfuse_status status, const std::string& message) : std::runtime_error(message), status_(status) {}

  oxfuse_status status() const noexcept { return status_; }

 private:
  oxfuse_status status_;
};

using Tokens = std::vector<std::int64_t>;
using Logits = std::vector<float>;  // [vocab_size]

namespace detail {

inline void check(oxfuse_status status) {
  if (status != OXFUSE_OK) {
    throw Error(status, oxfuse_last_error());
  }
}

// Owns a handle of the C interface.
template <typename T, void (*close)(T**)>
class Handle {
 public:
  Handle() = default;
  Handle(Handle&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Handle& operator=(Handle&& other) noexcept {
    if (this != &other) {
      close(&handle_);
      handle_ = std::exchange(other.handle_, nullptr);
    }
    return *this;
  }
  ~Handle() { close(&handle_); }

  T* get() const noexcept { return handle_; }
  T** out() noexcept { return &handle_; }
  void reset() noexcept { close(&handle_); }

 private:
  T* handle_ = nullptr;
};

}  // namespace detail

// As `oxfuse_sampling_options`; calls chain: SamplingOptions().temperature(0.8).top_p(0.9).seed(1).
class SamplingOptions {
 public:
  SamplingOptions& temperature(double value) { return set(raw_.temperature, value); }
  SamplingOptions& top_k(std::int64_t value) { return set(raw_.top_k, value); }
  SamplingOptions& top_p(double value) { return set(raw_.top_p, value); }
  SamplingOptions& min_p(double value) { return set(raw_.min_p, value); }
  SamplingOptions& repetition_penalty(double value) { return set(raw_.repetition_penalty, value); }
  SamplingOptions& seed(std::int64_t value) { return set(raw_.has_seed, 1).set(raw_.seed, value); }

  const oxfuse_sampling_options& raw() const noexcept { return raw_; }

 private:
  template <typename T, typename V>
  SamplingOptions& set(T& field, V value) {
    field = static_cast<T>(value);
    return *this;
  }

  oxfuse_sampling_options raw_ = oxfuse_sampling_options_default();
};

// As `oxfuse_generate_options`.
class GenerateOptions {
 public:
  GenerateOptions& max_new_tokens(std::int64_t value) {
    raw_.max_new_tokens = value;
    return *this;
  }
  // Stop at these tokens, at none if the list is empty, instead of the checkpoint's own.
  GenerateOptions& stop_token_ids(Tokens value) {
    stops_ = std::move(value);
    return *this;
  }
  GenerateOptions& sampling(const SamplingOptions& value) {
    raw_.sampling = value.raw();
    return *this;
  }

  // Return the options as C has them; valid as long as this object.
  oxfuse_generate_options raw() const noexcept {
    oxfuse_generate_options out = raw_;
    out.stop_token_ids = stops_ ? stops_->data() : nullptr;
    out.stop_token_count = stops_ ? static_cast<std::int64_t>(stops_->size()) : -1;
    return out;
  }

 private:
  oxfuse_generate_options raw_ = oxfuse_generate_options_default();
  std::optional<Tokens> stops_;
};

// Picks tokens from logits.
class Sampler {
 public:
  explicit Sampler(const SamplingOptions& options = {}) { detail::check(oxfuse_sampler_open(&options.raw(), handle_.out())); }

  // Return the next token after `tokens`, which matter for a repetition penalty alone.
  std::int64_t sample(const Logits& logits, const Tokens& tokens = {}) {
    std::int64_t token = 0;
    detail::check(oxfuse_sample(handle_.get(), logits.data(), logits.size(), tokens.data(), tokens.size(), &token));
    return token;
  }

  // Return the distribution that `sample` would draw from.
  std::vector<double> probabilities(const Logits& logits, const Tokens& tokens = {}) {
    std::vector<double> out(logits.size());
    detail::check(
        oxfuse_sample_probabilities(handle_.get(), logits.data(), logits.size(), tokens.data(), tokens.size(), out.data())
    );
    return out;
  }

 private:
  detail::Handle<oxfuse_sampler, oxfuse_sampler_close> handle_;
};

// The tokens of one generation as they come, each computed when it is asked for; a range to run through once.
class Generation {
 public:
  // Return the next token, none at the end.
  std::optional<std::int64_t> next() {
    std::int64_t token = -1;
    detail::check(oxfuse_generation_next(handle_.get(), &token, &finish_));
    return token < 0 ? std::nullopt : std::optional(token);
  }

  // Return why the last token was the last; OXFUSE_FINISH_NONE while there may be more.
  oxfuse_finish finish() const noexcept { return finish_; }

  // Return the logits from which the last token was taken.
  Logits logits() const {
    Logits out(static_cast<std::size_t>(vocab_size_));
    detail::check(oxfuse_generation_logits(handle_.get(), out.data()));
    return out;
  }

  class Iterator {
   public:
    using iterator_category = std::input_iterator_tag;
    using value_type = std::int64_t;
    using difference_type = std::ptrdiff_t;
    using pointer = const std::int64_t*;
    using reference = const std::int64_t&;

    Iterator() = default;
    explicit Iterator(Generation* from) : from_(from) { ++*this; }
    reference operator*() const { return *token_; }
    Iterator& operator++() {
      token_ = from_->next();
      return *this;
    }
    void operator++(int) { ++*this; }
    bool operator==(const Iterator& other) const { return token_.has_value() == other.token_.has_value(); }
    bool operator!=(const Iterator& other) const { return !(*this == other); }

   private:
    Generation* from_ = nullptr;
    std::optional<std::int64_t> token_;
  };

  Iterator begin() { return Iterator(this); }
  Iterator end() { return {}; }

 private:
  friend class Session;
  explicit Generation(std::int64_t vocab_size) : vocab_size_(vocab_size) {}

  detail::Handle<oxfuse_generation, oxfuse_generation_close> handle_;
  std::int64_t vocab_size_;
  oxfuse_finish finish_ = OXFUSE_FINISH_NONE;
};

// One growing sequence. `Model::session` opens it.
class Session {
 public:
  // Append tokens and return the logits after the last.
  Logits prefill(const Tokens& tokens) {
    Logits out(static_cast<std::size_t>(vocab_size_));
    detail::check(oxfuse_prefill(handle_.get(), tokens.data(), tokens.size(), out.data()));
    return out;
  }

  // Append one token and return the logits after it.
  Logits decode(std::int64_t token) {
    Logits out(static_cast<std::size_t>(vocab_size_));
    detail::check(oxfuse_decode(handle_.get(), token, out.data()));
    return out;
  }

  // Keep the first `length` tokens.
  void rewind(std::int64_t length) { detail::check(oxfuse_rewind(handle_.get(), length)); }

  // Return a session with the same tokens that shares this one's blocks.
  Session fork() {
    Session out(vocab_size_);
    detail::check(oxfuse_session_fork(handle_.get(), out.handle_.out()));
    return out;
  }

  // Append a prompt and go on from there, token by token: for (auto token : session.generate(prompt)).
  Generation generate(const Tokens& prompt, const GenerateOptions& options = {}) {
    Generation out(vocab_size_);
    const oxfuse_generate_options raw = options.raw();
    detail::check(oxfuse_generation_open(handle_.get(), prompt.data(), prompt.size(), &raw, out.handle_.out()));
    return out;
  }

  std::int64_t length() const {
    std::int64_t out = 0;
    detail::check(oxfuse_session_length(handle_.get(), &out));
    return out;
  }

  Tokens tokens() const {
    Tokens out(static_cast<std::size_t>(length()));
    detail::check(oxfuse_session_tokens(handle_.get(), out.data(), out.size()));
    return out;
  }

  // Give the blocks back. Anything else after it throws.
  void close() noexcept { handle_.reset(); }

  oxfuse_session* get() const noexcept { return handle_.get(); }

 private:
  friend class Model;
  explicit Session(std::int64_t vocab_size) : vocab_size_(vocab_size) {}

  detail::Handle<oxfuse_session, oxfuse_session_close> handle_;
  std::int64_t vocab_size_;
};

// A loaded artifact.
class Model {
 public:
  explicit Model(const std::string& path, const oxfuse_load_options& options = oxfuse_load_options_default()) {
    detail::check(oxfuse_load(path.c_str(), &options, handle_.out()));
    vocab_size_ = info().vocab_size;
  }

  oxfuse_model_info info() const {
    oxfuse_model_info out{};
    out.struct_size = sizeof(out);
    detail::check(oxfuse_model_get_info(handle_.get(), &out));
    return out;
  }

  std::int64_t vocab_size() const noexcept { return vocab_size_; }

  Session session() {
    Session out(vocab_size_);
    detail::check(oxfuse_session_open(handle_.get(), out.handle_.out()));
    return out;
  }

  // Append tokens[i] to *sessions[i], all in one step where they fit, and return the logits after them.
  std::vector<Logits> decode_batch(const std::vector<Session*>& sessions, const Tokens& tokens) {
    if (sessions.size() != tokens.size()) {
      throw Error(OXFUSE_BAD_ARGUMENT, "The batch has other numbers of sessions and of tokens: give one token for each session.");
    }
    const auto width = static_cast<std::size_t>(vocab_size_);
    std::vector<oxfuse_session*> raw;
    for (const Session* session : sessions) {
      raw.push_back(session == nullptr ? nullptr : session->get());
    }
    std::vector<float> flat(width * sessions.size());
    detail::check(oxfuse_decode_batch(raw.data(), tokens.data(), raw.size(), flat.data()));
    std::vector<Logits> out;
    for (std::size_t i = 0; i < sessions.size(); ++i) {
      out.emplace_back(
          flat.begin() + static_cast<std::ptrdiff_t>(i * width), flat.begin() + static_cast<std::ptrdiff_t>((i + 1) * width)
      );
    }
    return out;
  }

  void close() noexcept { handle_.reset(); }

 private:
  detail::Handle<oxfuse_model, oxfuse_model_close> handle_;
  std::int64_t vocab_size_ = 0;
};

}  // namespace oxfuse
