// A loaded artifact, its sessions, and generations on them: what the C interface hands out.
#pragma once

#include "engine.h"
#include "oxfuse.h"
#include "sampling.h"

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace oxfuse::internal {

// Programs keep the addresses of weights, so these are declared first and go last.
struct Model {
  Manifest manifest;
  std::string device;
  int64_t weight_bytes = 0;
  std::vector<std::unique_ptr<WeightMap>> maps;
  std::map<std::string, at::Tensor> weights;
  std::unique_ptr<Engine> engine;
};

// Check the artifact in the folder `path` against its manifest and this machine, and load it. Throws Failure.
std::shared_ptr<Model> load_model(const std::string& path, const oxfuse_load_options& options);

// A growing sequence. The lock is taken for whole calls, so that calls of several threads wait for each other.
class Session {
 public:
  explicit Session(std::shared_ptr<Model> model);
  Session(std::shared_ptr<Model> model, TokenSequence sequence);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // Return another session with the same tokens that shares this one's blocks.
  std::shared_ptr<Session> fork();

  // Append tokens and return the logits after the last, float32 [V]. Throws Failure; the session is then as before. With
  // `version` the session must still be at that one, which becomes the new one.
  at::Tensor prefill(const std::vector<int64_t>& tokens, uint64_t* version = nullptr);

  void rewind(int64_t length);

  // Give the blocks back; any other call throws Failure from then on.
  void close();

  std::vector<int64_t> tokens();

  // Return a number that grows whenever tokens come or go.
  uint64_t version();

  const std::shared_ptr<Model>& model() const { return model_; }

  // Append tokens[i] to sessions[i] and return the logits after them, float32 [n, V]. Throws Failure; all are then as before.
  static at::Tensor decode_batch(const std::vector<std::shared_ptr<Session>>& sessions, const std::vector<int64_t>& tokens);

  // Throw Failure unless there are tokens, and all are in the vocabulary.
  static void check_tokens(const std::vector<int64_t>& tokens, int64_t vocab_size);

  // Throw Failure unless `more` tokens fit after `length`.
  static void check_room(int64_t length, int64_t more, int64_t max_context);

 private:
  void check_open() const;

  std::shared_ptr<Model> model_;
  std::mutex lock_;
  TokenSequence sequence_;
  uint64_t version_ = 0;
  bool closed_ = false;
};

// A prompt that is continued token by token.
class Generation {
 public:
  Generation(std::shared_ptr<Session> session, std::vector<int64_t> prompt, const oxfuse_generate_options& options);

  // Run until there is a token and return it, -1 after the end. `finish` tells whether it was the last.
  int64_t next(oxfuse_finish& finish);

  // Return the logits from which the last token was taken. Throws Failure before the first.
  at::Tensor logits();

 private:
  const std::shared_ptr<Session> session_;
  const bool penalises_;
  std::mutex lock_;
  Sampler sampler_;
  std::vector<int64_t> stops_;
  std::vector<int64_t> pending_;  // what the session gets next: the prompt, then the token sampled last
  uint64_t version_;              // the session's, after the last step
  at::Tensor logits_;
  bool sampled_ = true;  // whether a token was taken from `logits_`
  int64_t left_ = 0;
  oxfuse_finish finish_ = OXFUSE_FINISH_NONE;
};

}  // namespace oxfuse::internal
