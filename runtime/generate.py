"""Generation: a request becomes a job that samples, decodes and decides when to stop; results come whole or as a stream.

Both ways run the same job, so the pieces of a stream add up to the text of `generate`, and those of a channel to that channel.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence, Sized
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from oxfuse.runtime.device import Best
from oxfuse.runtime.errors import UserError
from oxfuse.runtime.harmony import CHANNELS, FINAL, HarmonyReader, Markers, ToolCall, opened_message
from oxfuse.runtime.inputs import TokenIds, token_list
from oxfuse.runtime.sampling import Sampler, SamplingOptions, check_finite, log_probability
from oxfuse.runtime.scheduler import Job, Scheduler
from oxfuse.runtime.sequence import TokenSequence
from oxfuse.runtime.text import Piece, PlainReader, Reader
from oxfuse.runtime.tokenizer import TextTokenizer

FinishReason = Literal["stop", "length"]
Message = Mapping[str, Any]
Prompt = str | TokenIds | Sequence[Message]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What one prompt led to.

    `token_ids` ends with the stop token, if one was reached. `text` is all that was said: without that token, special tokens and
    everything from a stop string on; it is empty without a tokenizer. `logprobs`, if asked for, are natural logarithms of the
    probabilities that the model itself gave the tokens, one a token: the softmax of its logits before penalty, temperature and
    filters, so of what transformers calls `logits` and not of its `scores`.

    Where the checkpoint speaks in channels (harmony) and the prompt leaves the assistant's turn open, as chat messages do,
    `channels` holds the text of each channel by its name, and `text` that of all of them in the order in which they came,
    without the headers; `answer` is the part for the reader. `tool_calls` are those that came to their end; their arguments
    stand in their channel as well. What breaks the format is kept as text, outside of any channel if need be, and `notes` say
    what it was. Otherwise `channels` is None.

    `reused_tokens` of the prompt did not run, since their keys and values were in the cache: from this conversation's last turn,
    or from another sequence that began with the same tokens.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    channels: dict[str, str] | None
    finish_reason: FinishReason
    logprobs: list[float] | None
    tool_calls: tuple[ToolCall, ...] = ()
    notes: tuple[str, ...] = ()
    reused_tokens: int = field(default=0, compare=False)

    @property
    def answer(self) -> str:
        """What is meant for the reader: the final channel; all of the text where there are no channels."""
        if self.channels is None or self.channels.keys().isdisjoint(CHANNELS):
            return self.text
        return self.channels.get(FINAL, "")


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One generated token and the text that became certain with it, which is often empty and may span earlier tokens.

    `channel` is the one that the text belongs to, `recipient` the tool that is called with it; `logprob` is the token's, if asked
    for.
    """

    text: str
    token_id: int
    channel: str | None = None
    recipient: str | None = None
    logprob: float | None = None

    @property
    def thinking(self) -> bool:
        """Whether the text belongs to a channel that is not for the reader: thoughts, or a call of a tool."""
        return self.channel in CHANNELS and self.channel != FINAL


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
    stops = (stop,) if isinstance(stop, str) or not isinstance(stop, Iterable) else tuple(stop)
    if not all(isinstance(s, str) and s for s in stops):
        raise UserError(f"stop is {stop!r}: give a string or strings, none of them empty.")
    ends = None
    if stop_token_ids is not None:
        none = isinstance(stop_token_ids, Sized) and not len(stop_token_ids)
        ends = frozenset(() if none else token_list(stop_token_ids, vocab_size, "stop_token_ids"))
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
        markers: Markers | None = None,
        keep: bool = False,
        on_prompt: Callable[[], object] | None = None,
    ) -> None:
        """Prepare to continue `prompt`, ending at a token of `ends` or at `max_context` tokens, prompt included.

        `sequence` is empty, or holds the first tokens of `prompt`, not all, which need not run again; `keep` leaves it its blocks
        at the end. `markers` are those of a checkpoint that speaks harmony. `on_prompt` is called, under the scheduler's lock,
        when the prompt is read and nothing follows it yet.
        """
        super().__init__(sequence, keep=keep)
        self.reused = sequence.cached
        assert len(sequence.tokens) < len(prompt) and prompt[: len(sequence.tokens)] == sequence.tokens
        sequence.append(prompt[len(sequence.tokens) :])
        self.chunks: deque[Chunk] = deque()
        self._prompt, self._options, self._ends, self._on_prompt = prompt, options, ends, on_prompt
        self._limit = min(options.max_new_tokens, max_context - len(prompt))
        self._sampler = Sampler(options.sampling)
        self.greedy = options.sampling.greedy and not options.logprobs
        self._reader: Reader | None = PlainReader(tokenizer.decode, options.stop) if tokenizer else None
        self._harmony: HarmonyReader | None = None
        if tokenizer and markers and (opening := opened_message(prompt, markers, tokenizer.decode)) is not None:
            self._reader = self._harmony = HarmonyReader(markers, tokenizer.decode, options.stop, opening)
            if options.stop_token_ids is None:
                self._ends = ends | markers.stops
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._text: list[str] = []
        self._channels: dict[str, list[str]] = {}
        self._reason: FinishReason = "length"
        self.done = self._limit == 0

    @property
    def new_tokens(self) -> int:
        """How many tokens have been generated."""
        return len(self._tokens)

    def receive(self, indices: Sequence[int], logits: Tensor) -> None:
        """Sample the next token from the last row of `logits`."""
        self._prompt_is_read()
        token = self._sampler.pick(logits[-1], self.sequence.tokens)
        self._take(token, log_probability(logits[-1], token) if self._options.logprobs else None)

    def receive_best(self, indices: Sequence[int], best: Sequence[Best]) -> None:
        """Take the most likely token, which is what sampling comes to here."""
        self._prompt_is_read()
        check_finite(best[-1].logit)
        self._take(best[-1].token, None)

    def _prompt_is_read(self) -> None:
        if self._on_prompt and not self._tokens:
            self._on_prompt()

    def _take(self, token: int, logprob: float | None) -> None:
        self._tokens.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)
        piece = self._read(token)
        self._text.append(piece.text)
        if piece.channel is not None:
            self._channels.setdefault(piece.channel, []).append(piece.text)
        self.chunks.append(
            Chunk(text=piece.text, token_id=token, channel=piece.channel, recipient=piece.recipient, logprob=logprob)
        )
        if not self.done:
            self.sequence.append([token])

    def _read(self, token: int) -> Piece:
        """Return the text that `token` makes certain, and set `done` if it is the last."""
        reader, ended = self._reader, token in self._ends
        self.done = ended or len(self._tokens) == self._limit
        if ended:
            self._reason = "stop"
        if reader is None:
            return Piece()
        if ended:
            return reader.finish(token)
        piece = reader.add(token)
        self.done = self.done or reader.stopped
        if self.done:
            rest = reader.finish(None)
            piece = replace(rest, text=piece.text + rest.text) if rest.text else piece
            if reader.stopped:
                self._reason = "stop"
        return piece

    def result(self) -> Generation:
        """Return what has been generated."""
        return Generation(
            prompt_token_ids=self._prompt,
            token_ids=self._tokens,
            text="".join(self._text),
            channels={name: "".join(said) for name, said in self._channels.items()} if self._harmony else None,
            finish_reason=self._reason,
            logprobs=self._logprobs if self._options.logprobs else None,
            tool_calls=tuple(self._harmony.tool_calls) if self._harmony else (),
            notes=self._harmony.notes if self._harmony else (),
            reused_tokens=self.reused,
        )


class Stream(Iterator[Chunk]):
    """The chunks of one job as they come. The job runs from the first `next` to its end, to `close`, or until this is dropped."""

    def __init__(self, scheduler: Scheduler, job: GenerationJob) -> None:
        """Prepare to run `job`."""
        self._scheduler, self.job, self._started = scheduler, job, False

    def __next__(self) -> Chunk:
        """Run steps until there is a chunk and return it. Raises the job's error, StopIteration at the end."""
        job = self.job
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
        self._scheduler.cancel([self.job])
        self.job.chunks.clear()  # not before: another thread's step may add one

    def abandon(self) -> None:
        """Do `close` without waiting for a step that runs, from a signal handler as well; chunks that are there still come."""
        self._started = True
        if not self.job.done:
            self._scheduler.abandon(self.job)

    def __del__(self) -> None:
        if getattr(self, "job", None) is not None:
            self.abandon()


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
    if isinstance(prompts, Tensor) and prompts.dim() > 1:
        return [*prompts]
    if isinstance(prompts, Mapping):
        raise UserError("The prompt is one message: give a list of messages, as in [{'role': 'user', 'content': 'Hello'}].")
    if not isinstance(prompts, Iterable) or isinstance(prompts, (bytes, bytearray, AbstractSet)) or _is_scalar(prompts):
        raise UserError(f"The prompt is {prompts!r:.60}: give a text, token ids or messages, or a list of them.")
    many: list[Any] = list(prompts)
    if not many:
        raise UserError("There is no prompt: give a text, token ids or messages, or a list of them.")
    if _is_scalar(many[0]) or isinstance(many[0], Mapping):
        return [many]
    return many


def _is_scalar(value: Any) -> bool:
    return hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0  # arrays have the method, whatever their shape


def prompt_tokens(prompt: Prompt, tokenizer: TextTokenizer | None, vocab_size: int, max_context: int) -> list[int]:
    """Return the token ids of one prompt.

    Raises UserError where text comes without a tokenizer, the prompt is empty, or longer than `max_context`.
    """
    if isinstance(prompt, (str, bytes)) or (isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping)):
        if isinstance(prompt, bytes):
            raise UserError(f"The prompt is bytes, {prompt!r:.60}: give a text, as prompt.decode() returns it.")
        if tokenizer is None:
            raise UserError("This artifact has no tokenizer: give token ids, or compile with --tokenizer.")
        ids: TokenIds = tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.chat(prompt)  # type: ignore[arg-type]
        if not ids:
            raise UserError("The prompt has no tokens: give a text that is not empty.")
    else:
        ids = prompt  # type: ignore[assignment]
    return checked_prompt(token_list(ids, vocab_size), max_context)


def checked_prompt(tokens: list[int], max_context: int) -> list[int]:
    """Return `tokens`. Raises UserError where they are more than `max_context`."""
    if len(tokens) > max_context:
        raise UserError(
            f"The prompt has {len(tokens)} tokens, max_context is {max_context}: shorten it, or compile with a larger one."
        )
    return tokens
