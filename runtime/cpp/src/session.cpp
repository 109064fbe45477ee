// Sessions and generations: the rules of runtime/session.py and of the job in runtime/generate.py, on token ids.

#include "failure.h"
#include "model.h"

#include <algorithm>

namespace oxfuse::internal {

Session::Session(std::shared_ptr<Model> model) : model_(std::move(model)), sequence_(model_->engine->sequence()) {}

Session::Session(std::shared_ptr<Model> model, TokenSequence sequence)
    : model_(std::move(model)), sequence_(std::move(sequence)) {}

Session::~Session() {
  close();
}

void Session::close() {
  const std::lock_guard guard(lock_);
  if (!closed_) {
    closed_ = true;
    model_->engine->release(sequence_);
  }
}

void Session::check_open() const {
  if (closed_) {
    throw Failure(OXFUSE_BAD_ARGUMENT, "The session is closed. Open another with oxfuse_session_open.");
  }
}

std::shared_ptr<Session> Session::fork() {
  const std::lock_guard guard(lock_);
  check_open();
  return std::make_shared<Session>(model_, model_->engine->fork(sequence_));
}

void Session::check_tokens(const std::vector<int64_t>& tokens, int64_t vocab_size) {
  if (tokens.empty()) {
    throw Failure(OXFUSE_BAD_ARGUMENT, "There are no token ids: give at least one.");
  }
  for (size_t index = 0; index < tokens.size(); ++index) {
    if (tokens[index] < 0 || tokens[index] >= vocab_size) {
      throw Failure(
          OXFUSE_BAD_ARGUMENT, "The token ids hold " + std::to_string(tokens[index]) + " at index " + std::to_string(index) +
                                   ", outside the vocabulary: ids go from 0 to " + std::to_string(vocab_size - 1) + "."
      );
    }
  }
}

void Session::check_room(int64_t length, int64_t more, int64_t max_context) {
  if (more > max_context - length) {
    throw Failure(
        OXFUSE_CONTEXT_EXCEEDED, "The session has " + std::to_string(length) + " tokens and " + std::to_string(more) +
                                     " more exceed max_context " + std::to_string(max_context) +
                                     ". Rewind it, or compile with a larger max_context."
    );
  }
}

at::Tensor Session::prefill(const std::vector<int64_t>& tokens, uint64_t* version) {
  const std::lock_guard guard(lock_);
  check_open();
  if (version != nullptr && *version != version_) {
    throw Failure(
        OXFUSE_BAD_ARGUMENT, "The session was changed since the generation's last token: open another generation to go on."
    );
  }
  Engine& engine = *model_->engine;
  check_tokens(tokens, engine.vocab_size);
  const int64_t before = sequence_.length();
  check_room(before, static_cast<int64_t>(tokens.size()), engine.limits.max_context);
  sequence_.tokens.insert(sequence_.tokens.end(), tokens.begin(), tokens.end());
  at::Tensor logits;
  try {
    logits = engine.advance({&sequence_}).select(0, 0);
  } catch (...) {
    engine.truncate(sequence_, before);
    throw;
  }
  ++version_;
  if (version != nullptr) {
    *version = version_;
  }
  return logits;
}

at::Tensor Session::decode_batch(const std::vector<std::shared_ptr<Session>>& sessions, const std::vector<int64_t>& tokens) {
  std::vector<Session*> ordered;
  for (const auto& session : sessions) {
    ordered.push_back(session.get());
  }
  std::sort(ordered.begin(), ordered.end());  // who takes several locks takes them in this order
  if (std::adjacent_find(ordered.begin(), ordered.end()) != ordered.end()) {
    throw Failure(OXFUSE_BAD_ARGUMENT, "A session comes twice in the batch: give each one token, and once.");
  }
  std::vector<std::unique_lock<std::mutex>> locks;
  for (Session* session : ordered) {
    locks.emplace_back(session->lock_);
  }
  Engine& engine = *sessions.front()->model_->engine;
  check_tokens(tokens, engine.vocab_size);
  for (const auto& session : sessions) {
    session->check_open();
    if (session->model_ != sessions.front()->model_) {
      throw Failure(OXFUSE_BAD_ARGUMENT, "The sessions of the batch are of different models: give those of one.");
    }
    check_room(session->sequence_.length(), 1, engine.limits.max_context);
  }
  std::vector<TokenSequence*> sequences;
  for (size_t i = 0; i < sessions.size(); ++i) {
    sequences.push_back(&sessions[i]->sequence_);
    sequences.back()->tokens.push_back(tokens[i]);
  }
  at::Tensor logits;
  try {
    logits = engine.advance(sequences);
  } catch (...) {
    for (TokenSequence* sequence : sequences) {
      engine.truncate(*sequence, sequence->length() - 1);
    }
    throw;
  }
  for (const auto& session : sessions) {
    ++session->version_;
  }
  return logits;
}

void Session::rewind(int64_t length) {
  const std::lock_guard guard(lock_);
  check_open();
  if (length < 0 || length > sequence_.length()) {
    throw Failure(
        OXFUSE_BAD_ARGUMENT, "rewind to " + std::to_string(length) + ": the session has " + std::to_string(sequence_.length()) +
                                 " tokens, so give a number from 0 to that."
    );
  }
  model_->engine->truncate(sequence_, length);
  ++version_;
}

std::vector<int64_t> Session::tokens() {
  const std::lock_guard guard(lock_);
  check_open();
  return sequence_.tokens;
}

uint64_t Session::version() {
  const std::lock_guard guard(lock_);
  check_open();
  return version_;
}

Generation::Generation(std::shared_ptr<Session> session, std::vector<int64_t> prompt, const oxfuse_generate_options& options)
    : session_(std::move(session)),
      penalises_(options.sampling.repetition_penalty != 1),
      sampler_(options.sampling),
      pending_(std::move(prompt)),
      version_(session_->version()) {
  const Model& model = *session_->model();
  const int64_t length = static_cast<int64_t>(session_->tokens().size()), max_context = model.engine->limits.max_context;
  const auto count = static_cast<int64_t>(pending_.size());
  Session::check_tokens(pending_, model.engine->vocab_size);
  Session::check_room(length, count, max_context);
  if (options.max_new_tokens < 1) {
    throw Failure(
        OXFUSE_BAD_ARGUMENT, "max_new_tokens is " + std::to_string(options.max_new_tokens) + ": give a whole number >= 1."
    );
  }
  if (options.stop_token_count < -1 || (options.stop_token_count > 0 && options.stop_token_ids == nullptr)) {
    throw Failure(
        OXFUSE_BAD_ARGUMENT, "stop_token_count is " + std::to_string(options.stop_token_count) +
                                 ": give -1 for the checkpoint's own, or the number of stop_token_ids."
    );
  }
  if (options.stop_token_count < 0) {
    stops_ = model.manifest.eos_token_ids;
  } else {
    stops_.assign(options.stop_token_ids, options.stop_token_ids + options.stop_token_count);
  }
  left_ = std::min(options.max_new_tokens, max_context - length - count);
}

int64_t Generation::next(oxfuse_finish& finish) {
  const std::lock_guard guard(lock_);
  if (finish_ == OXFUSE_FINISH_NONE && left_ == 0) {
    finish_ = OXFUSE_FINISH_LENGTH;
  }
  if (finish_ != OXFUSE_FINISH_NONE) {
    finish = finish_;
    return -1;
  }
  if (sampled_) {
    logits_ = session_->prefill(pending_, &version_);
    sampled_ = false;
  }
  const int64_t token = sampler_.pick(logits_, penalises_ ? session_->tokens() : std::vector<int64_t>{});
  sampled_ = true;
  pending_ = {token};
  --left_;
  if (std::find(stops_.begin(), stops_.end(), token) != stops_.end()) {
    finish_ = OXFUSE_FINISH_STOP;
  } else if (left_ == 0) {
    finish_ = OXFUSE_FINISH_LENGTH;
  }
  finish = finish_;
  return token;
}

at::Tensor Generation::logits() {
  const std::lock_guard guard(lock_);
  if (!logits_.defined()) {
    throw Failure(OXFUSE_BAD_ARGUMENT, "There are no logits yet: call oxfuse_generation_next first.");
  }
  return logits_;
}

}  // namespace oxfuse::internal
