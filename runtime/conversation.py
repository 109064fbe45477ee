"""Keeps the cache of a chat from turn to turn, so that a turn runs what is new in it and nothing else.

Each turn's prompt is the whole chat again. What it shares with the tokens of the turn before stays in the cache, up to the first
token that differs. Two sequences are kept, which share their blocks: the last prompt with its reply, and the prompt alone. Chat
templates that drop a reply's thoughts differ right after the prompt, and there a sliding group may have freed, while the reply
grew, what the next token sees; the prompt's own sequence still has it.
"""

from __future__ import annotations

from collections.abc import Sequence

from oxfuse.runtime.cache_size import sequence_blocks
from oxfuse.runtime.errors import UserError
from oxfuse.runtime.generate import GenerationOptions, Stream
from oxfuse.runtime.model import CompiledModel
from oxfuse.runtime.sequence import TokenSequence


class Conversation:
    """The sequences of one chat. One thread at a time may use it; it holds its blocks until `close`."""

    def __init__(self, model: CompiledModel) -> None:
        """Begin with an empty cache."""
        self._model, self._scheduler = model, model.scheduler
        self._last: TokenSequence | None = None
        self._prompt: TokenSequence | None = None
        self._stream: Stream | None = None

    @property
    def reused(self) -> int:
        """Tokens of the latest prompt that were in the cache, as far as it has been read."""
        return 0 if self._stream is None else self._stream.job.reused

    def stream(self, prompt: list[int], options: GenerationOptions) -> Stream:
        """Return the reply to the whole chat so far, checked token ids; an earlier stream ends.

        Raises UserError where the prompt leaves no room for a reply.
        """
        if len(prompt) >= (limit := self._model.max_context):
            raise UserError(
                f"The conversation has {len(prompt)} tokens, which fill the context of {limit}: "
                "begin a new one (in a chat: /reset), or compile with a larger --max-context."
            )
        if self._stream is not None:
            self._stream.close()
        with self._scheduler.lock:
            sequence, self._prompt = self._resume(prompt), None
        self._last = sequence
        end = min(limit, len(prompt) + options.max_new_tokens)

        def keep_prompt() -> None:  # under the scheduler's lock
            if self._has_room(end):
                self._prompt = self._scheduler.engine.fork(sequence)

        job = self._model.generation_job(prompt, options, sequence=sequence, keep=True, on_prompt=keep_prompt)
        self._stream = Stream(self._scheduler, job)
        return self._stream

    def close(self) -> None:
        """Give the blocks back; the conversation may begin again."""
        if self._stream is not None:
            self._stream.close()
        with self._scheduler.lock:
            for sequence in self._kept():
                self._scheduler.engine.release(sequence)
        self._last = self._prompt = self._stream = None

    def __del__(self) -> None:
        for sequence in self._kept():
            self._scheduler.abandon(sequence)

    def _kept(self) -> list[TokenSequence]:
        return [sequence for sequence in (self._last, self._prompt) if sequence is not None]

    def _resume(self, prompt: Sequence[int]) -> TokenSequence:
        """Return the sequence that saves most, cut back to what it shares with `prompt`, whose last token must run."""
        engine, most = self._scheduler.engine, 0
        best = engine.sequence()
        for sequence in self._kept():
            length = min(_shared(sequence.tokens, prompt), len(prompt) - 1, sequence.cached)
            if length > most and engine.remembers(sequence, length):
                best, most = sequence, length
        for sequence in self._kept():
            if sequence is not best:
                engine.release(sequence)
        engine.truncate(best, most)
        return best

    def _has_room(self, end: int) -> bool:
        """Tell whether the reply can grow to `end` tokens beside a copy of the prompt, whose blocks nobody can take away."""
        engine = self._scheduler.engine
        size, chunk, reserve = engine.cache.block_size, engine.chunk, engine.reserve
        return all(
            pool.free > sequence_blocks(group, end, block_size=size, chunk=chunk, reserve=reserve)
            for pool, group in zip(engine.pools, engine.cache.groups, strict=True)
        )


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    return next((index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
