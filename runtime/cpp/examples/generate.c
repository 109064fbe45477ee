/* The same in C, greedy: prints each token id as it comes.

     oxfuse_generate_c ARTIFACT N ID ID ... */

#include <oxfuse.h>

#include <stdio.h>
#include <stdlib.h>

static int report(oxfuse_status status) {
  fprintf(stderr, "error (%s): %s\n", oxfuse_status_name(status), oxfuse_last_error());
  return status == OXFUSE_INTERNAL ? 70 : 2;
}

static oxfuse_status generate(oxfuse_model *model, const int64_t *prompt, size_t count, int64_t most) {
  oxfuse_generate_options options = oxfuse_generate_options_default();
  oxfuse_session *session = NULL;
  oxfuse_generation *generation = NULL;
  oxfuse_finish finish = OXFUSE_FINISH_NONE;
  int64_t token = -1;
  oxfuse_status status = oxfuse_session_open(model, &session);

  options.max_new_tokens = most;
  if (status == OXFUSE_OK) {
    status = oxfuse_generation_open(session, prompt, count, &options, &generation);
  }
  while (status == OXFUSE_OK && finish == OXFUSE_FINISH_NONE) {
    status = oxfuse_generation_next(generation, &token, &finish);
    if (status == OXFUSE_OK && token >= 0) {
      printf("%lld ", (long long)token);
      fflush(stdout);
    }
  }
  printf("\n");
  oxfuse_generation_close(&generation);
  oxfuse_session_close(&session);
  return status;
}

int main(int argc, char **argv) {
  oxfuse_model *model = NULL;
  oxfuse_status status;
  size_t count = argc > 3 ? (size_t)(argc - 3) : 0, i;
  int64_t *prompt;

  if (argc < 4) {
    fprintf(stderr, "usage: generate_c ARTIFACT N ID ID ...\n");
    return 2;
  }
  prompt = malloc(count * sizeof(*prompt));
  if (prompt == NULL) {
    return 70;
  }
  for (i = 0; i < count; ++i) {
    prompt[i] = strtoll(argv[i + 3], NULL, 10);
  }
  status = oxfuse_load(argv[1], NULL, &model);
  if (status == OXFUSE_OK) {
    status = generate(model, prompt, count, strtoll(argv[2], NULL, 10));
  }
  free(prompt);
  oxfuse_model_close(&model);
  return status == OXFUSE_OK ? 0 : report(status);
}
