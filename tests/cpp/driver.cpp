// Does what it is told on standard input, a line for each call, its words parted by tabs; answers with a line that begins with
// "ok", or with "error", a tab, the status and the message. Logits cross as the hexadecimal digits of their bytes, so that not a
// bit is lost.

#include <oxfuse.hpp>

#include <cstring>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>
#include <thread>

namespace {

using Words = std::vector<std::string>;

std::map<std::string, std::unique_ptr<oxfuse::Model>> models;
std::map<std::string, std::unique_ptr<oxfuse::Session>> sessions;
std::map<std::string, std::unique_ptr<oxfuse::Sampler>> samplers;

Words split(const std::string& line, char between) {
  Words out;
  std::istringstream in(line);
  for (std::string word; std::getline(in, word, between);) {
    out.push_back(word);
  }
  return out;
}

oxfuse::Tokens tokens(const std::string& text) {
  oxfuse::Tokens out;
  std::istringstream in(text);
  for (std::int64_t id = 0; in >> id;) {
    out.push_back(id);
  }
  return out;
}

std::string text(const oxfuse::Tokens& ids) {
  std::string out;
  for (const std::int64_t id : ids) {
    out += (out.empty() ? "" : " ") + std::to_string(id);
  }
  return out;
}

template <typename T>
std::string hex(const std::vector<T>& values) {
  static const char digits[] = "0123456789abcdef";
  const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
  std::string out;
  for (std::size_t i = 0; i < values.size() * sizeof(T); ++i) {
    out += {digits[bytes[i] >> 4], digits[bytes[i] & 15]};
  }
  return out;
}

oxfuse::Logits floats(const std::string& text) {
  oxfuse::Logits out(text.size() / 8);
  auto* bytes = reinterpret_cast<unsigned char*>(out.data());
  for (std::size_t i = 0; i < out.size() * 4; ++i) {
    bytes[i] = static_cast<unsigned char>(std::stoi(text.substr(2 * i, 2), nullptr, 16));
  }
  return out;
}

// Return the value of NAME=VALUE among the words, "" without it.
std::string option(const Words& words, const std::string& name) {
  for (const std::string& word : words) {
    if (word.rfind(name + "=", 0) == 0) {
      return word.substr(name.size() + 1);
    }
  }
  return "";
}

oxfuse::SamplingOptions sampling(const Words& words) {
  oxfuse::SamplingOptions out;
  const auto read = [&](const char* name, auto set) {
    if (const std::string value = option(words, name); !value.empty()) {
      set(value);
    }
  };
  read("temperature", [&](const std::string& v) { out.temperature(std::stod(v)); });
  read("top_k", [&](const std::string& v) { out.top_k(std::stoll(v)); });
  read("top_p", [&](const std::string& v) { out.top_p(std::stod(v)); });
  read("min_p", [&](const std::string& v) { out.min_p(std::stod(v)); });
  read("repetition_penalty", [&](const std::string& v) { out.repetition_penalty(std::stod(v)); });
  read("seed", [&](const std::string& v) { out.seed(std::stoll(v)); });
  return out;
}

oxfuse::GenerateOptions generating(const Words& words) {
  oxfuse::GenerateOptions out;
  out.sampling(sampling(words));
  if (const std::string most = option(words, "max_new_tokens"); !most.empty()) {
    out.max_new_tokens(std::stoll(most));
  }
  if (const std::string stops = option(words, "stop_token_ids"); !stops.empty()) {
    out.stop_token_ids(stops == "none" ? oxfuse::Tokens{} : tokens(stops));
  }
  return out;
}

std::string load(const Words& words) {
  oxfuse_load_options options = oxfuse_load_options_default();
  const std::string device = option(words, "device"), threads = option(words, "threads"), bytes = option(words, "cache_bytes");
  options.device = device.empty() ? nullptr : device.c_str();
  options.threads = threads.empty() ? 0 : std::stoi(threads);
  options.cache_bytes = bytes.empty() ? 0 : std::stoull(bytes);
  const std::string kept = option(words, "prefix_cache_bytes");
  options.prefix_cache_bytes = kept.empty() ? options.prefix_cache_bytes : std::stoll(kept);
  options.check = option(words, "check") == "full" ? OXFUSE_CHECK_FULL : OXFUSE_CHECK_QUICK;
  models[words[1]] = std::make_unique<oxfuse::Model>(words[2], options);
  return "";
}

std::string info(const Words& words) {
  const oxfuse_model_info found = models.at(words[1])->info();
  std::ostringstream out;
  out << "name=" << found.name << "\tdevice=" << found.device << "\tvocab_size=" << found.vocab_size
      << "\tmax_context=" << found.max_context << "\tmax_batch=" << found.max_batch << "\tprefill_chunk=" << found.prefill_chunk
      << "\tblock_size=" << found.block_size << "\tcache_bytes=" << found.cache_bytes << "\tweight_bytes=" << found.weight_bytes
      << "\tused_blocks=" << found.used_blocks << "\tsteps=" << found.steps
      << "\treused_tokens=" << found.reused_tokens
      << "\teos=" << text({found.eos_token_ids, found.eos_token_ids + found.eos_token_count});
  return out.str();
}

std::string batch(const Words& words) {
  std::vector<oxfuse::Session*> members;
  for (const std::string& name : split(words[2], ' ')) {
    members.push_back(sessions.at(name).get());
  }
  std::string out;
  for (const oxfuse::Logits& row : models.at(words[1])->decode_batch(members, tokens(words[3]))) {
    out += hex(row);
  }
  return out;
}

// generate SESSION IDS [options]: the tokens, the reason of the end, and the logits of each.
std::string generate(const Words& words) {
  oxfuse::Generation generation = sessions.at(words[1])->generate(tokens(words[2]), generating(words));
  oxfuse::Tokens ids;
  std::string logits;
  for (const std::int64_t token : generation) {
    ids.push_back(token);
    logits += hex(generation.logits());
  }
  return text(ids) + "\t" + std::to_string(generation.finish()) + "\t" + logits;
}

// parallel MODEL THREADS IDS [options]: each thread opens a session of its own and generates; the tokens of each, and of failures
// the message.
std::string parallel(const Words& words) {
  const auto count = static_cast<std::size_t>(std::stoi(words[2]));
  std::vector<std::string> results(count);
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < count; ++i) {
    threads.emplace_back([&, i] {
      try {
        oxfuse::Session session = models.at(words[1])->session();
        oxfuse::Tokens prompt = tokens(words[3]), ids;
        prompt.resize(prompt.size() - i);  // of different lengths, so that one's blocks would not do for another
        for (const std::int64_t token : session.generate(prompt, generating(words))) {
          ids.push_back(token);
        }
        results[i] = text(ids);
      } catch (const std::exception& error) {
        results[i] = error.what();
      }
    });
  }
  std::string out;
  for (std::size_t i = 0; i < count; ++i) {
    threads[i].join();
    out += (i ? "\t" : "") + results[i];
  }
  return out;
}

// Call every function with NULL where a handle or an array belongs; the names of those that did not refuse.
std::string nulls(const Words& words) {
  oxfuse_model* model = nullptr;
  oxfuse_session* session = nullptr;
  oxfuse_sampler* sampler = nullptr;
  oxfuse_generation* generation = nullptr;
  oxfuse_model_info info{};
  std::int64_t id = 0;
  oxfuse_finish finish = OXFUSE_FINISH_NONE;
  float logit = 0;
  double probability = 0;
  oxfuse_session* open = sessions.at(words[1])->get();
  oxfuse::Sampler greedy;
  oxfuse_load_options loading{};  // struct_size 0
  oxfuse_generate_options generating{};
  const std::vector<std::pair<const char*, std::function<oxfuse_status()>>> calls = {
      {"load a NULL path", [&] { return oxfuse_load(nullptr, nullptr, &model); }},
      {"load into NULL", [&] { return oxfuse_load("x", nullptr, nullptr); }},
      {"load with options of no version", [&] { return oxfuse_load("x", &loading, &model); }},
      {"info", [&] { return oxfuse_model_get_info(nullptr, &info); }},
      {"open", [&] { return oxfuse_session_open(nullptr, &session); }},
      {"fork", [&] { return oxfuse_session_fork(nullptr, &session); }},
      {"fork into NULL", [&] { return oxfuse_session_fork(open, nullptr); }},
      {"prefill", [&] { return oxfuse_prefill(nullptr, &id, 1, &logit); }},
      {"prefill NULL tokens", [&] { return oxfuse_prefill(open, nullptr, 3, nullptr); }},
      {"prefill nothing", [&] { return oxfuse_prefill(open, &id, 0, nullptr); }},
      {"decode", [&] { return oxfuse_decode(nullptr, 1, nullptr); }},
      {"batch of NULL", [&] { return oxfuse_decode_batch(nullptr, &id, 1, nullptr); }},
      {"batch of a NULL session", [&] { return oxfuse_decode_batch(&session, &id, 1, nullptr); }},
      {"empty batch", [&] { return oxfuse_decode_batch(&open, &id, 0, nullptr); }},
      {"rewind", [&] { return oxfuse_rewind(nullptr, 0); }},
      {"length", [&] { return oxfuse_session_length(nullptr, &id); }},
      {"length into NULL", [&] { return oxfuse_session_length(open, nullptr); }},
      {"tokens", [&] { return oxfuse_session_tokens(nullptr, &id, 1); }},
      {"sampler into NULL", [&] { return oxfuse_sampler_open(nullptr, nullptr); }},
      {"sample", [&] { return oxfuse_sample(nullptr, &logit, 1, nullptr, 0, &id); }},
      {"probabilities", [&] { return oxfuse_sample_probabilities(nullptr, &logit, 1, nullptr, 0, &probability); }},
      {"generation", [&] { return oxfuse_generation_open(nullptr, &id, 1, nullptr, &generation); }},
      {"generation with options of no version", [&] { return oxfuse_generation_open(open, &id, 1, &generating, &generation); }},
      {"next", [&] { return oxfuse_generation_next(nullptr, &id, &finish); }},
      {"logits", [&] { return oxfuse_generation_logits(nullptr, &logit); }},
  };
  std::string out;
  for (const auto& [name, call] : calls) {
    if (call() != OXFUSE_BAD_ARGUMENT || std::strlen(oxfuse_last_error()) == 0) {
      out += std::string(out.empty() ? "" : "\t") + name;
    }
  }
  oxfuse_model_close(nullptr);
  oxfuse_model_close(&model);
  oxfuse_session_close(&session);
  oxfuse_session_close(nullptr);
  oxfuse_sampler_close(&sampler);
  oxfuse_generation_close(&generation);
  return out;
}

// Forget the handle of a session, which a leak checker must tell.
std::string leak(const Words& words) {
  auto* lost = new oxfuse::Session(models.at(words[1])->session());
  lost = nullptr;
  return lost == nullptr ? "" : "kept";
}

std::string answer(const Words& words) {
  static const std::map<std::string, std::function<std::string(const Words&)>> commands = {
      {"load", load},
      {"unload", [](const Words& w) { return std::to_string(models.erase(w[1])); }},
      {"info", info},
      {"open",
       [](const Words& w) {
         sessions[w[1]] = std::make_unique<oxfuse::Session>(models.at(w[2])->session());
         return std::string();
       }},
      {"fork",
       [](const Words& w) {
         sessions[w[1]] = std::make_unique<oxfuse::Session>(sessions.at(w[2])->fork());
         return std::string();
       }},
      {"close",
       [](const Words& w) {  // the object stays, so that its use can be tried
         sessions.at(w[1])->close();
         return std::string();
       }},
      {"prefill", [](const Words& w) { return hex(sessions.at(w[1])->prefill(tokens(w[2]))); }},
      {"decode", [](const Words& w) { return hex(sessions.at(w[1])->decode(std::stoll(w[2]))); }},
      {"rewind",
       [](const Words& w) {
         sessions.at(w[1])->rewind(std::stoll(w[2]));
         return std::string();
       }},
      {"tokens", [](const Words& w) { return text(sessions.at(w[1])->tokens()); }},
      {"batch", batch},
      {"generate", generate},
      {"parallel", parallel},
      {"sampler",
       [](const Words& w) {
         samplers[w[1]] = std::make_unique<oxfuse::Sampler>(sampling(w));
         return std::string();
       }},
      // sample SAMPLER LOGITS TOKENS COUNT: draws COUNT times
      {"sample",
       [](const Words& w) {
         oxfuse::Tokens out;
         for (int i = std::stoi(w[4]); i > 0; --i) {
           out.push_back(samplers.at(w[1])->sample(floats(w[2]), tokens(w[3])));
         }
         return text(out);
       }},
      {"probabilities", [](const Words& w) { return hex(samplers.at(w[1])->probabilities(floats(w[2]), tokens(w[3]))); }},
      {"nulls", nulls},
      {"leak", leak},
  };
  return commands.at(words.at(0))(words);
}

}  // namespace

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    try {
      const std::string result = answer(split(line, '\t'));
      std::cout << "ok\t" << result << std::endl;
    } catch (const oxfuse::Error& error) {
      std::cout << "error\t" << error.status() << "\t" << error.what() << std::endl;
    } catch (const std::exception& error) {
      std::cout << "fault\t" << error.what() << std::endl;
    }
  }
  sessions.clear();
  models.clear();
  samplers.clear();
  return 0;
}
