// The C interface: turns handles into objects, arrays into vectors, and whatever is thrown into a status and a message.

#include "failure.h"
#include "model.h"
#include "oxfuse.h"

#include <ATen/ops/from_blob.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <string>

using namespace oxfuse::internal;

struct oxfuse_model {
  std::shared_ptr<Model> held;
};

struct oxfuse_session {
  std::shared_ptr<Session> held;
};

struct oxfuse_sampler {
  Sampler held;
  std::mutex lock;
};

struct oxfuse_generation {
  Generation held;
};

namespace {

thread_local std::string last_error;

oxfuse_status failed(oxfuse_status status, const char* message) noexcept {
  try {
    last_error.assign(message);
    std::replace_if(last_error.begin(), last_error.end(), [](unsigned char byte) { return byte < 0x20 || byte == 0x7F; }, ' ');
  } catch (...) {
    last_error.clear();  // no memory for the message
  }
  return status;
}

// Run what a function of the interface does. Nothing is thrown beyond it.
template <typename Body>
oxfuse_status guarded(Body&& body) noexcept {
  try {
    body();
    return OXFUSE_OK;
  } catch (const Failure& failure) {
    return failed(failure.status, failure.what());
  } catch (const c10::OutOfMemoryError& error) {
    return failed(OXFUSE_OUT_OF_MEMORY, error.what_without_backtrace());
  } catch (const std::bad_alloc&) {
    return failed(OXFUSE_OUT_OF_MEMORY, "The system refuses memory. Close sessions, or end what else uses it.");
  } catch (const c10::Error& error) {
    return failed(OXFUSE_INTERNAL, error.what_without_backtrace());
  } catch (const std::exception& error) {
    return failed(OXFUSE_INTERNAL, error.what());
  } catch (...) {
    return failed(OXFUSE_INTERNAL, "Something was thrown that is no exception.");
  }
}

template <typename T>
T& given(T* pointer, const char* what) {
  if (pointer == nullptr) {
    throw Failure(OXFUSE_BAD_ARGUMENT, std::string(what) + " is NULL: it was closed, or never opened.");
  }
  return *pointer;
}

template <typename T>
T* array(T* pointer, size_t count, const char* what) {
  if (pointer == nullptr && count) {
    throw Failure(OXFUSE_BAD_ARGUMENT, std::string(what) + " is NULL: give an array.");
  }
  return pointer;
}

std::vector<int64_t> tokens_of(const int64_t* tokens, size_t count) {
  array(tokens, count, "tokens");
  return count ? std::vector<int64_t>(tokens, tokens + count) : std::vector<int64_t>();
}

// Return the options given, or the defaults. Throws Failure where they are of another version of the header.
template <typename Options>
Options options_of(const Options* options, Options (*defaults)()) {
  if (options == nullptr) {
    return defaults();
  }
  if (options->struct_size != sizeof(Options)) {
    throw Failure(
        OXFUSE_BAD_ARGUMENT, "The options have struct_size " + std::to_string(options->struct_size) + ", expected " +
                                 std::to_string(sizeof(Options)) + ": begin with the function that returns the defaults, and " +
                                 "build with the header of this library."
    );
  }
  return *options;
}

void write(const at::Tensor& logits, float* to) {
  if (to != nullptr) {
    const at::Tensor flat = logits.contiguous();
    std::memcpy(to, flat.const_data_ptr<float>(), flat.nbytes());
  }
}

// Return logits of the caller's as a tensor that borrows them.
at::Tensor borrowed(const float* logits, size_t vocab_size) {
  array(logits, 1, "logits");
  if (vocab_size == 0 || vocab_size > INT32_MAX) {
    throw Failure(OXFUSE_BAD_ARGUMENT, "vocab_size is " + std::to_string(vocab_size) + ": give the number of logits.");
  }
  return at::from_blob(const_cast<float*>(logits), {static_cast<int64_t>(vocab_size)}, at::kFloat);
}

std::vector<int64_t> earlier_of(const int64_t* tokens, size_t count, size_t vocab_size) {
  std::vector<int64_t> out = tokens_of(tokens, count);
  if (count) {
    Session::check_tokens(out, static_cast<int64_t>(vocab_size));
  }
  return out;
}

template <typename Handle>
void close(Handle** handle) noexcept {
  if (handle != nullptr) {
    delete *handle;
    *handle = nullptr;
  }
}

}  // namespace

extern "C" {

const char* oxfuse_last_error(void) {
  return last_error.c_str();
}

const char* oxfuse_status_name(oxfuse_status status) {
  switch (status) {
    case OXFUSE_OK:
      return "ok";
    case OXFUSE_BAD_ARGUMENT:
      return "bad argument";
    case OXFUSE_BAD_ARTIFACT:
      return "bad artifact";
    case OXFUSE_UNSUPPORTED:
      return "unsupported";
    case OXFUSE_UNFIT_HOST:
      return "unfit host";
    case OXFUSE_OUT_OF_CACHE:
      return "out of cache";
    case OXFUSE_CONTEXT_EXCEEDED:
      return "context exceeded";
    case OXFUSE_OUT_OF_MEMORY:
      return "out of memory";
    case OXFUSE_INTERNAL:
      return "internal";
  }
  return "unknown";
}

oxfuse_load_options oxfuse_load_options_default(void) {
  return {sizeof(oxfuse_load_options), nullptr, 0, 0, OXFUSE_CHECK_QUICK, -1};
}

oxfuse_sampling_options oxfuse_sampling_options_default(void) {
  return {sizeof(oxfuse_sampling_options), 0, 0, 1, 0, 1, 0, 0};
}

oxfuse_generate_options oxfuse_generate_options_default(void) {
  return {sizeof(oxfuse_generate_options), 128, nullptr, -1, oxfuse_sampling_options_default()};
}

oxfuse_status oxfuse_load(const char* path, const oxfuse_load_options* options, oxfuse_model** model) {
  return guarded([&] {
    given(model, "model") = nullptr;
    *model = new oxfuse_model{load_model(array(path, 1, "path"), options_of(options, oxfuse_load_options_default))};
  });
}

void oxfuse_model_close(oxfuse_model** model) {
  close(model);
}

oxfuse_status oxfuse_model_get_info(const oxfuse_model* model, oxfuse_model_info* info) {
  return guarded([&] {
    const Model& held = *given(model, "model").held;
    if (given(info, "info").struct_size != sizeof(oxfuse_model_info)) {
      throw Failure(OXFUSE_BAD_ARGUMENT, "info has another struct_size than this library's oxfuse_model_info: set it to sizeof.");
    }
    const Engine& engine = *held.engine;
    *info = {
        sizeof(oxfuse_model_info),
        held.manifest.name.c_str(),
        held.device.c_str(),
        engine.vocab_size,
        engine.limits.max_context,
        engine.limits.max_batch,
        engine.chunk,
        engine.cache.block_size,
        static_cast<uint64_t>(engine.size.bytes),
        static_cast<uint64_t>(held.weight_bytes),
        engine.used_blocks(),
        engine.steps(),
        held.manifest.eos_token_ids.data(),
        held.manifest.eos_token_ids.size(),
        engine.reused_tokens()
    };
  });
}

oxfuse_status oxfuse_session_open(oxfuse_model* model, oxfuse_session** session) {
  return guarded([&] {
    given(session, "session") = nullptr;
    *session = new oxfuse_session{std::make_shared<Session>(given(model, "model").held)};
  });
}

oxfuse_status oxfuse_session_fork(oxfuse_session* session, oxfuse_session** twin) {
  return guarded([&] {
    given(twin, "twin") = nullptr;
    *twin = new oxfuse_session{given(session, "session").held->fork()};
  });
}

void oxfuse_session_close(oxfuse_session** session) {
  if (session != nullptr && *session != nullptr) {
    guarded([&] { (*session)->held->close(); });
  }
  close(session);
}

oxfuse_status oxfuse_prefill(oxfuse_session* session, const int64_t* tokens, size_t count, float* logits) {
  return guarded([&] { write(given(session, "session").held->prefill(tokens_of(tokens, count)), logits); });
}

oxfuse_status oxfuse_decode(oxfuse_session* session, int64_t token, float* logits) {
  return oxfuse_prefill(session, &token, 1, logits);
}

oxfuse_status oxfuse_decode_batch(oxfuse_session* const* sessions, const int64_t* tokens, size_t count, float* logits) {
  return guarded([&] {
    array(sessions, count, "sessions");
    const std::vector<int64_t> added = tokens_of(tokens, count);
    if (count == 0) {
      throw Failure(OXFUSE_BAD_ARGUMENT, "There are no sessions in the batch: give at least one.");
    }
    std::vector<std::shared_ptr<Session>> held;
    for (size_t i = 0; i < count; ++i) {
      held.push_back(given(sessions[i], "a session of the batch").held);
    }
    write(Session::decode_batch(held, added), logits);
  });
}

oxfuse_status oxfuse_rewind(oxfuse_session* session, int64_t length) {
  return guarded([&] { given(session, "session").held->rewind(length); });
}

oxfuse_status oxfuse_session_length(oxfuse_session* session, int64_t* length) {
  return guarded([&] {
    const size_t count = given(session, "session").held->tokens().size();
    given(length, "length") = static_cast<int64_t>(count);
  });
}

oxfuse_status oxfuse_session_tokens(oxfuse_session* session, int64_t* tokens, size_t capacity) {
  return guarded([&] {
    const std::vector<int64_t> held = given(session, "session").held->tokens();
    std::copy_n(held.begin(), std::min(capacity, held.size()), array(tokens, capacity, "tokens"));
  });
}

oxfuse_status oxfuse_sampler_open(const oxfuse_sampling_options* options, oxfuse_sampler** sampler) {
  return guarded([&] {
    given(sampler, "sampler") = nullptr;
    *sampler = new oxfuse_sampler{Sampler(options_of(options, oxfuse_sampling_options_default)), {}};
  });
}

void oxfuse_sampler_close(oxfuse_sampler** sampler) {
  close(sampler);
}

oxfuse_status oxfuse_sample(
    oxfuse_sampler* sampler, const float* logits, size_t vocab_size, const int64_t* tokens, size_t count, int64_t* token
) {
  return guarded([&] {
    oxfuse_sampler& one = given(sampler, "sampler");
    const at::Tensor row = borrowed(logits, vocab_size);
    const std::vector<int64_t> earlier = earlier_of(tokens, count, vocab_size);
    int64_t& into = given(token, "token");
    const std::lock_guard guard(one.lock);
    into = one.held.pick(row, earlier);
  });
}

oxfuse_status oxfuse_sample_probabilities(
    oxfuse_sampler* sampler, const float* logits, size_t vocab_size, const int64_t* tokens, size_t count, double* probabilities
) {
  return guarded([&] {
    oxfuse_sampler& one = given(sampler, "sampler");
    const at::Tensor row = borrowed(logits, vocab_size);
    const std::vector<int64_t> earlier = earlier_of(tokens, count, vocab_size);
    array(probabilities, vocab_size, "probabilities");
    const at::Tensor found = one.held.probabilities(row, earlier).contiguous();
    std::memcpy(probabilities, found.const_data_ptr<double>(), found.nbytes());
  });
}

oxfuse_status oxfuse_generation_open(
    oxfuse_session* session, const int64_t* prompt, size_t count, const oxfuse_generate_options* options,
    oxfuse_generation** generation
) {
  return guarded([&] {
    given(generation, "generation") = nullptr;
    const oxfuse_generate_options chosen = options_of(options, oxfuse_generate_options_default);
    options_of(&chosen.sampling, oxfuse_sampling_options_default);
    *generation = new oxfuse_generation{{given(session, "session").held, tokens_of(prompt, count), chosen}};
  });
}

void oxfuse_generation_close(oxfuse_generation** generation) {
  close(generation);
}

oxfuse_status oxfuse_generation_next(oxfuse_generation* generation, int64_t* token, oxfuse_finish* finish) {
  return guarded([&] {
    Generation& held = given(generation, "generation").held;
    oxfuse_finish& ended = given(finish, "finish");
    given(token, "token") = held.next(ended);
  });
}

oxfuse_status oxfuse_generation_logits(oxfuse_generation* generation, float* logits) {
  return guarded([&] { write(given(generation, "generation").held.logits(), array(logits, 1, "logits")); });
}

}  // extern "C"
