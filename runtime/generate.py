"""Generation: a request becomes a job that samples, decodes and decides when to stop; results come whole or as a stream.

Both ways run the same job, so the pieces of a stream add up to the text of `generate`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from oxfuse.runtime.engine import TokenSequence
from oxfuse.runtime.errors import UserError
from oxfuse.runtime.inputs import TokenIds, token_list
from oxfuse.runtime.sampling import Sampler, SamplingOptions, log_probability
from oxfuse.runtime.scheduler import Job, Scheduler
from oxfuse.runtime.text import Detokenizer, StopFilter
from oxfuse.runtime.tokenizer import TextTokenizer

FinishReason = Literal["stop", "length"]
Message = Mapping[str, Any]
Prompt = str | TokenIds | Sequence[Message]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What one prompt led to.

    `token_ids` ends with the stop token, if one was reached; `text` leaves it out, like special tokens and everything from a stop
    string on, and is empty without a tokenizer. `logprobs` are the model's own, natural logarithms, one a token, if asked for.
    `channels` is for chat formats that have them.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    channels: dict[str, str] | None
    finish_reason: FinishReason
    logprobs: list[float] | None


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One generated token and the text that became certain with it, which is often empty and may span earlier tokens."""

    text: str
    token_id: int


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """When to stop and what to keep; `sampling` says how to choose. `stop_token_ids` None means the checkpoint's own."""

    max_new_tokens: int
    sampling: SamplingOptions
    stop: tuple[str, ...]
    stop_token_ids: frozenset[int] | None
    logprobs: bool


def generation_options(
    *,
    max_new_tokens: int,
    stop: str | Sequence[str],
    stop_token_ids: Sequence[int] | None,
    logprobs: bool,
    vocab_size: int,
    **sampling: Any,
) -> GenerationOptions:
    """Return the checked options. Raises UserError naming the one that does not fit."""
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens!r}: give a whole number >= 1.")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(s, str) and s for s in stops):
        raise UserError(f"stop is {stop!r}: give a string or strings, none of them empty.")
    ends = None
    if stop_token_ids is not None:
        ends = frozenset(token_list(stop_token_ids, vocab_size, "stop_token_ids") if len(stop_token_ids) else ())
    return GenerationOptions(
        max_new_tokens=max_new_tokens,
        sampling=SamplingOptions(**sampling),
        stop=stops,
        stop_token_ids=ends,
        logprobs=bool(logprobs),
    )


class GenerationJob(Job):
    """One prompt on its way."""

    def __init__(
        self,
        sequence: TokenSequence,
        prompt: list[int],
        options: GenerationOptions,
        *,
        ends: AbstractSet[int],
        max_context: int,
        tokenizer: TextTokenizer | None,
    ) -> None:
        """Prepare to continue `prompt`, ending at a token of `ends` or at `max_context` tokens, prompt included."""
        super().__init__(sequence)
        sequence.append(prompt)
        self.chunks: deque[Chunk] = deque()
        self._prompt, self._options, self._ends = prompt, options, ends
        self._limit = min(options.max_new_tokens, max_context - len(prompt))
        self._sampler = Sampler(options.sampling)
        self._detokenizer = Detokenizer(tokenizer.decode) if tokenizer else None
        self._filter = StopFilter(options.stop)
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._text: list[str] = []
        self._reason: FinishReason = "length"
        self.done = self._limit == 0

    def receive(self, indices: Sequence[int], logits: Tensor) -> None:
        """Sample the next token from the last row of `logits`."""
        token = self._sampler.pick(logits[-1], self.sequence.tokens)
        self._tokens.append(token)
        if self._options.logprobs:
            self._logprobs.append(log_probability(logits[-1], token))
        piece = ""
        if token in self._ends:
            self._reason, self.done = "stop", True
        elif self._detokenizer:
            piece = self._filter.add(self._detokenizer.add(token))
        self.done = self.done or self._filter.stopped or len(self._tokens) == self._limit
        if self.done and self._detokenizer:
            piece += self._filter.add(self._detokenizer.finish()) + self._filter.finish()
        if self._filter.stopped:
            self._reason = "stop"
        self._text.append(piece)
        self.chunks.append(Chunk(text=piece, token_id=token))
        if not self.done:
            self.sequence.append([token])

    def result(self) -> Generation:
        """Return what has been generated."""
        return Generation(
            prompt_token_ids=self._prompt,
            token_ids=self._tokens,
            text="".join(self._text),
            channels=None,
            finish_reason=self._reason,
            logprobs=self._logprobs if self._options.logprobs else None,
        )


class Stream(Iterator[Chunk]):
    """The chunks of one job as they come. The job runs from the first `next` to its end, to `close`, or until this is dropped."""

    def __init__(self, scheduler: Scheduler, job: GenerationJob) -> None:
        """Prepare to run `job`."""
        self._scheduler, self._job, self._started = scheduler, job, False

    def __next__(self) -> Chunk:
        """Run steps until there is a chunk and return it. Raises the job's error, StopIteration at the end."""
        job = self._job
        if not self._started:
            self._started = True
            if not job.done:
                self._scheduler.submit(job)
        while not job.chunks and self._scheduler.advance(lambda: job.done or bool(job.chunks)):
            pass
        if job.chunks:
            return job.chunks.popleft()
        if job.error is not None:
            error, job.error = job.error, None
            raise error
        raise StopIteration

    def close(self) -> None:
        """Stop generating and give the blocks back."""
        self._started = True
        self._job.chunks.clear()
        self._scheduler.cancel([self._job])

    def __del__(self) -> None:
        job = getattr(self, "_job", None)
        if job is not None and not job.done:
            self._scheduler.abandon(job)


async def stream_in_thread(stream: Stream) -> AsyncIterator[Chunk]:
    """Yield the chunks of `stream`, running its steps in a worker thread so that the event loop goes on between them."""
    try:
        while (chunk := await asyncio.to_thread(next, stream, None)) is not None:
            yield chunk
    finally:
        await asyncio.shield(asyncio.to_thread(stream.close))


def split_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts one by one: a string, ids (ints or a tensor [n]) or messages (a list of dicts) is one prompt."""
    if isinstance(prompts, str) or (isinstance(prompts, Tensor) and prompts.dim() == 1):
        return [prompts]
    if isinstance(prompts, Tensor):
        return [*prompts]
    if isinstance(prompts, Mapping):
        raise UserError("The prompt is one message: give a list of messages, as in [{'role': 'user', 'content': 'Hello'}].")
    many: list[Any] = list(prompts)
    if not many:
        raise UserError("There is no prompt: give a text, token ids or messages, or a list of them.")
    one_token = many[0].dim() == 0 if isinstance(many[0], Tensor) else hasattr(many[0], "__index__")
    if one_token or isinstance(many[0], Mapping):
        return [many]
    return many


def prompt_tokens(prompt: Prompt, tokenizer: TextTokenizer | None, vocab_size: int, max_context: int) -> list[int]:
    """Return the token ids of one prompt.

    Raises UserError where text comes without a tokenizer, the prompt is empty, or longer than `max_context`.
    """
    if isinstance(prompt, str) or (isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping)):
        if tokenizer is None:
            raise UserError("This artifact has no tokenizer: give token ids, or compile with --tokenizer.")
        ids: TokenIds = tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.chat(prompt)  # type: ignore[arg-type]
        if not ids:
            raise UserError("The prompt has no tokens: give a text that is not empty.")
    else:
        ids = prompt  # type: ignore[assignment]
    tokens = token_list(ids, vocab_size)
    if len(tokens) > max_context:
        raise UserError(
            f"The prompt has {len(tokens)} tokens, max_context is {max_context}: shorten it, or compile with a larger one."
        )
    return tokens
