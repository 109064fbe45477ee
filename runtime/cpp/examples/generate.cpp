// Generates from token ids and prints each id as it comes.
//
//   oxfuse_generate ARTIFACT 'ID ID ...' [-n N] [--temperature T] [--top-k K] [--top-p P] [--min-p P] [--seed S] [--threads N]
//                   [--ignore-eos] [--logits FILE]
//
// --logits writes the logits from which each token was taken: float32, [tokens, vocabulary], without a header. Exit code: 0, 2
// where the arguments or the artifact do not fit, 70 for a fault of the library.

#include <oxfuse.hpp>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <sstream>

namespace {

constexpr const char* usage =
    "usage: generate ARTIFACT 'ID ID ...' [-n N] [--temperature T] [--top-k K] [--top-p P] [--min-p P] [--seed S] [--threads N] "
    "[--ignore-eos] [--logits FILE]";

struct Arguments {
  std::string artifact;
  oxfuse::Tokens prompt;
  oxfuse::GenerateOptions options;
  oxfuse_load_options load = oxfuse_load_options_default();
  std::string logits;
};

template <typename T>
T number(const std::string& text) {
  std::istringstream in(text);
  T value;
  if (!(in >> value) || in.peek() != std::istringstream::traits_type::eof()) {
    throw std::invalid_argument("'" + text + "' is not a number. " + usage);
  }
  return value;
}

Arguments parse(const std::vector<std::string>& words) {
  if (words.size() < 2) {
    throw std::invalid_argument(usage);
  }
  Arguments out;
  oxfuse::SamplingOptions sampling;
  out.artifact = words[0];
  std::istringstream ids(words[1]);
  for (std::string id; ids >> id;) {
    out.prompt.push_back(number<std::int64_t>(id));
  }
  for (std::size_t at = 2; at < words.size(); ++at) {
    const std::string& name = words[at];
    if (name == "--ignore-eos") {
      out.options.stop_token_ids({});
      continue;
    }
    if (at + 1 == words.size()) {
      throw std::invalid_argument(name + " lacks its value, or is unknown. " + usage);
    }
    const std::string& value = words[++at];
    if (name == "-n") {
      out.options.max_new_tokens(number<std::int64_t>(value));
    } else if (name == "--temperature") {
      sampling.temperature(number<double>(value));
    } else if (name == "--top-k") {
      sampling.top_k(number<std::int64_t>(value));
    } else if (name == "--top-p") {
      sampling.top_p(number<double>(value));
    } else if (name == "--min-p") {
      sampling.min_p(number<double>(value));
    } else if (name == "--seed") {
      sampling.seed(number<std::int64_t>(value));
    } else if (name == "--threads") {
      out.load.threads = number<std::int32_t>(value);
    } else if (name == "--logits") {
      out.logits = value;
    } else {
      throw std::invalid_argument(name + " is unknown. " + usage);
    }
  }
  out.options.sampling(sampling);
  return out;
}

void run(const Arguments& arguments) {
  oxfuse::Model model(arguments.artifact, arguments.load);
  oxfuse::Session session = model.session();
  std::ofstream logits;
  if (!arguments.logits.empty()) {
    logits.open(arguments.logits, std::ios::binary);
  }
  oxfuse::Generation generation = session.generate(arguments.prompt, arguments.options);
  const char* between = "";
  for (const std::int64_t token : generation) {
    std::cout << between << token << std::flush;
    between = " ";
    if (logits.is_open()) {
      const oxfuse::Logits row = generation.logits();
      logits.write(reinterpret_cast<const char*>(row.data()), static_cast<std::streamsize>(row.size() * sizeof(float)));
    }
  }
  std::cout << '\n';
  logits.close();
  if (!arguments.logits.empty() && !logits) {
    throw std::invalid_argument(arguments.logits + " cannot be written.");
  }
}

}  // namespace

int main(int count, char** words) {
  try {
    run(parse({words + 1, words + count}));
    return 0;
  } catch (const oxfuse::Error& error) {
    std::cerr << "error (" << oxfuse_status_name(error.status()) << "): " << error.what() << '\n';
    return error.status() == OXFUSE_INTERNAL ? 70 : 2;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 2;
  }
}
