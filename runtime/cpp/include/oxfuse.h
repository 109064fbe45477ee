/* Runs oxfuse artifacts of text generation without Python: token ids enter, logits and token ids leave.

   An artifact is a folder that `oxfuse compile` wrote for a CPU or for CUDA. A model is a loaded artifact, with one pool of
   cache blocks that its sessions share. A session is one growing sequence of tokens, whose keys and values the pool keeps.
   Everything here means what the functions of the same names mean in Python (`oxfuse.load`, `model.session()`, ...).

   Status. Every function that can fail returns a status, OXFUSE_OK where it did what it says. On any other status nothing has
   changed, and `oxfuse_last_error` tells in one line what was found, what was expected and what to do next. Nothing here throws,
   prints, or ends the process. What a pointer to a result holds after a failure is unspecified, but for handles: those are NULL.

   Ownership. What a function opens, the caller closes, with the function of that name; closing takes the address of the handle
   and sets it to NULL, and to close NULL is allowed. A NULL handle anywhere else is OXFUSE_BAD_ARGUMENT, so that the use of what
   was closed is an error and no accident, as long as the handle was not copied. A model may be closed before its sessions, and a
   session before its generations: memory is freed when the last one that needs it is closed. Pointers that enter are read or
   written during the call only, unless it is said otherwise.

   Threads. All functions may be called from any thread at any time, but for the closing of a handle that another thread uses.
   Calls on one session wait for each other. Steps of the program run one at a time for each model, whatever the number of
   sessions; a long prefill lets others in between its chunks. A sampler is used by one thread at a time.

   Dtypes. Token ids are int64_t, logits float, one for each word of the vocabulary ([vocab_size], `oxfuse_model_get_info`).

   An artifact is a program: loading it runs machine code with your rights. Load only what you trust. */

#ifndef OXFUSE_H
#define OXFUSE_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define OXFUSE_API __attribute__((visibility("default")))
#else
#define OXFUSE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* What a call came to. The numbers stay as they are; new ones may follow. */
typedef enum oxfuse_status {
  OXFUSE_OK = 0,
  OXFUSE_BAD_ARGUMENT = 1,     /* the call is wrong: a NULL handle, a token outside the vocabulary, an option out of its range */
  OXFUSE_BAD_ARTIFACT = 2,     /* there is no artifact, or it is damaged or of another format version */
  OXFUSE_UNSUPPORTED = 3,      /* the artifact is whole, but not one that this library runs: an ONNX model, another task */
  OXFUSE_UNFIT_HOST = 4,       /* this machine lacks what the artifact needs: torch's version, instructions, a GPU */
  OXFUSE_OUT_OF_CACHE = 5,     /* open sessions hold all blocks: close some, or load with a larger cache_bytes */
  OXFUSE_CONTEXT_EXCEEDED = 6, /* the sequence would be longer than max_context */
  OXFUSE_OUT_OF_MEMORY = 7,    /* the system or the GPU refuses memory */
  OXFUSE_INTERNAL = 8          /* a fault of oxfuse or torch */
} oxfuse_status;

/* Return the last failure's message in this thread, "" where there was none: one line, UTF-8. It stays valid until the thread's
   next failing call. */
OXFUSE_API const char *oxfuse_last_error(void);

/* Return the name of a status, such as "bad artifact"; "unknown" for a number that is none. */
OXFUSE_API const char *oxfuse_status_name(oxfuse_status status);

typedef struct oxfuse_model oxfuse_model;
typedef struct oxfuse_session oxfuse_session;
typedef struct oxfuse_sampler oxfuse_sampler;
typedef struct oxfuse_generation oxfuse_generation;

/* ---- Models ---- */

typedef enum oxfuse_check {
  OXFUSE_CHECK_QUICK = 0, /* sizes, headers of weight files, hashes of programs, and this machine against the manifest */
  OXFUSE_CHECK_FULL = 1   /* also the hash of every weight, which reads them all */
} oxfuse_check;

/* Begin with `oxfuse_load_options_default()`, which sets `struct_size`, and change what is to differ. */
typedef struct oxfuse_load_options {
  size_t struct_size;
  const char *device;   /* NULL: what the artifact was compiled for. "cpu", "cuda" (the first GPU that fits), "cuda:1" */
  int32_t threads;      /* 0: torch's own setting. Threads inside an operator while a step runs, 1 to 1024 */
  uint64_t cache_bytes; /* 0: for max_batch sequences of max_context tokens. Most bytes of the KV cache */
  oxfuse_check check;
  int64_t prefix_cache_bytes; /* -1: 1 GiB, on a GPU all of the cache. Most bytes of the cache that stay when no session holds them,
                                 for sessions that begin with the same tokens and then need not run them. 0: none do */
} oxfuse_load_options;

OXFUSE_API oxfuse_load_options oxfuse_load_options_default(void);

/* Load the artifact in the folder `path`; `options` NULL means the defaults. On a CPU weights are mapped, read-only and shared
   with every other process that has the same artifact open, and never copied; caches are virtual memory that is committed as it
   is written. On a GPU weights are copied there and the caches claimed at once. The file of the weights must not be changed while
   the model is open. Fails with OXFUSE_BAD_ARTIFACT, OXFUSE_UNSUPPORTED, OXFUSE_UNFIT_HOST, OXFUSE_OUT_OF_MEMORY; with
   OXFUSE_BAD_ARGUMENT for options out of their range, or a cache_bytes that is too small for one prefill chunk. */
OXFUSE_API oxfuse_status oxfuse_load(const char *path, const oxfuse_load_options *options, oxfuse_model **model);

/* Close a model. Its sessions go on and keep what they need. */
OXFUSE_API void oxfuse_model_close(oxfuse_model **model);

/* Set `struct_size` to sizeof(oxfuse_model_info) before the call. Pointers belong to the model and stay valid while it is open. */
typedef struct oxfuse_model_info {
  size_t struct_size;
  const char *name;             /* the checkpoint's folder or hub id */
  const char *device;           /* "cpu" or "cuda:N" */
  int64_t vocab_size;
  int64_t max_context;          /* most tokens of a session */
  int64_t max_batch;            /* most sequences of a step; larger batches take several */
  int64_t prefill_chunk;        /* most tokens of a session in a step; longer prompts take several */
  int64_t block_size;           /* tokens of a block of the cache */
  uint64_t cache_bytes;         /* what the caches take when every block is written */
  uint64_t weight_bytes;        /* bytes of the weight files */
  int64_t used_blocks;          /* blocks that sessions hold now, over all groups of layers */
  int64_t steps;                /* steps of the program so far */
  const int64_t *eos_token_ids; /* [eos_token_count], those that end a text by the checkpoint's own files */
  size_t eos_token_count;
  int64_t reused_tokens;        /* tokens that did not run so far, since a session had begun with the same ones before */
} oxfuse_model_info;

OXFUSE_API oxfuse_status oxfuse_model_get_info(const oxfuse_model *model, oxfuse_model_info *info);

/* ---- Sessions ---- */

/* Open an empty session. It takes no blocks before its first token. */
OXFUSE_API oxfuse_status oxfuse_session_open(oxfuse_model *model, oxfuse_session **session);

/* Open a session with the same tokens that shares this one's blocks; who writes to a shared block copies it first. */
OXFUSE_API oxfuse_status oxfuse_session_fork(oxfuse_session *session, oxfuse_session **twin);

/* Close a session and give its blocks back. Generations that still run on it fail from then on. */
OXFUSE_API void oxfuse_session_close(oxfuse_session **session);

/* Append `count` tokens, one or more, and write the logits after the last to `logits` [vocab_size], unless that is NULL.
   Fails with OXFUSE_BAD_ARGUMENT for a token outside the vocabulary, OXFUSE_CONTEXT_EXCEEDED, OXFUSE_OUT_OF_CACHE; the session is
   then as before. */
OXFUSE_API oxfuse_status oxfuse_prefill(oxfuse_session *session, const int64_t *tokens, size_t count, float *logits);

/* Append one token and write the logits after it. As `oxfuse_prefill` with one token. */
OXFUSE_API oxfuse_status oxfuse_decode(oxfuse_session *session, int64_t token, float *logits);

/* Append `tokens[i]` to `sessions[i]`, for `count` different sessions of one model, and write the logits after them to
   `logits` [count, vocab_size], unless that is NULL. They share the steps of the program, so that a batch takes far less than as
   many calls. Fails as `oxfuse_prefill` does; all sessions are then as before. */
OXFUSE_API oxfuse_status oxfuse_decode_batch(oxfuse_session *const *sessions, const int64_t *tokens, size_t count, float *logits);

/* Keep the first `length` tokens and forget the rest. Further back than sliding layers remember is allowed as well: the next
   prefill or decode then runs the kept tokens again. Fails with OXFUSE_BAD_ARGUMENT unless 0 <= length <= the session's length. */
OXFUSE_API oxfuse_status oxfuse_rewind(oxfuse_session *session, int64_t length);

/* Write the number of the session's tokens. */
OXFUSE_API oxfuse_status oxfuse_session_length(oxfuse_session *session, int64_t *length);

/* Write the session's first tokens to `tokens` [capacity], as many as it has and as fit. */
OXFUSE_API oxfuse_status oxfuse_session_tokens(oxfuse_session *session, int64_t *tokens, size_t capacity);

/* ---- Sampling ---- */

/* As in Python's `generate`: temperature 0 takes the most likely token; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are
   off. Filters act in the order top_k, top_p, min_p, after the temperature. Begin with `oxfuse_sampling_options_default()`. */
typedef struct oxfuse_sampling_options {
  size_t struct_size;
  double temperature;        /* 0 or more */
  int64_t top_k;             /* 0 or more */
  double top_p;              /* 0 to 1 */
  double min_p;              /* 0 to 1 */
  double repetition_penalty; /* more than 0 */
  int64_t seed;              /* used where has_seed is not 0; else the seed is the operating system's */
  int32_t has_seed;
} oxfuse_sampling_options;

OXFUSE_API oxfuse_sampling_options oxfuse_sampling_options_default(void);

/* Open a sampler with a stream of random numbers of its own; `options` NULL is greedy. One number is drawn for a token. Greedy
   tokens are Python's. Sampled ones have Python's distribution; with the same seed and the same torch they have been seen to be
   Python's as well, since both draw from torch's generator, but do not count on it. */
OXFUSE_API oxfuse_status oxfuse_sampler_open(const oxfuse_sampling_options *options, oxfuse_sampler **sampler);

OXFUSE_API void oxfuse_sampler_close(oxfuse_sampler **sampler);

/* Write the next token for `logits` [vocab_size] after `tokens` [count], which matter for the repetition penalty alone.
   Fails with OXFUSE_INTERNAL where the logits are not finite. */
OXFUSE_API oxfuse_status oxfuse_sample(
    oxfuse_sampler *sampler, const float *logits, size_t vocab_size, const int64_t *tokens, size_t count, int64_t *token);

/* Write to `probabilities` [vocab_size] from which distribution `oxfuse_sample` would draw now: 0 for what the filters exclude,
   and 1 for the one token of a greedy sampler. Draws nothing. Fails as `oxfuse_sample` does. */
OXFUSE_API oxfuse_status oxfuse_sample_probabilities(
    oxfuse_sampler *sampler, const float *logits, size_t vocab_size, const int64_t *tokens, size_t count, double *probabilities);

/* ---- Generation ---- */

typedef enum oxfuse_finish {
  OXFUSE_FINISH_NONE = 0,  /* there may be more */
  OXFUSE_FINISH_STOP = 1,  /* the last token was one that ends a text */
  OXFUSE_FINISH_LENGTH = 2 /* max_new_tokens, or max_context, was reached */
} oxfuse_finish;

/* Begin with `oxfuse_generate_options_default()`. */
typedef struct oxfuse_generate_options {
  size_t struct_size;
  int64_t max_new_tokens;         /* 1 or more; by default 128 */
  const int64_t *stop_token_ids;  /* [stop_token_count]; copied */
  int64_t stop_token_count;       /* -1: the checkpoint's own; 0: none, so that nothing but length stops it */
  oxfuse_sampling_options sampling;
} oxfuse_generate_options;

OXFUSE_API oxfuse_generate_options oxfuse_generate_options_default(void);

/* Prepare to append `prompt` [count], one token or more, to the session and to continue it; `options` NULL means the defaults.
   Nothing runs yet. Fails with OXFUSE_CONTEXT_EXCEEDED where the prompt does not fit, OXFUSE_BAD_ARGUMENT for its tokens or
   options. */
OXFUSE_API oxfuse_status oxfuse_generation_open(
    oxfuse_session *session, const int64_t *prompt, size_t count, const oxfuse_generate_options *options,
    oxfuse_generation **generation);

OXFUSE_API void oxfuse_generation_close(oxfuse_generation **generation);

/* Run until there is a token and write it to `token`, and to `finish` whether it was the last, and why. `token` is -1 where there
   is none: the end was reached before. The session then holds the prompt and all tokens but the last, which no step has run yet:
   pass it on with what comes next. After a failure the call may be repeated. Fails as `oxfuse_prefill` and `oxfuse_sample` do, and
   with OXFUSE_BAD_ARGUMENT where the session was closed, or changed by somebody else since. */
OXFUSE_API oxfuse_status oxfuse_generation_next(oxfuse_generation *generation, int64_t *token, oxfuse_finish *finish);

/* Write the logits [vocab_size] from which the last token was taken. Fails with OXFUSE_BAD_ARGUMENT before the first one. */
OXFUSE_API oxfuse_status oxfuse_generation_logits(oxfuse_generation *generation, float *logits);

#ifdef __cplusplus
}
#endif

#endif
