"""One conversation with the model, token by token: the caller feeds tokens and gets logits, and may go back or branch off.

A session owns its blocks from the first token to `close`. Several sessions, and generations beside them, share the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from torch import Tensor

from oxfuse.runtime.errors import UserError
from oxfuse.runtime.inputs import token_list
from oxfuse.runtime.scheduler import Job, Scheduler
from oxfuse.runtime.sequence import TokenSequence


class _LastRow(Job):
    """Runs what is pending and keeps the last token's logits."""

    logits: Tensor

    def receive(self, indices: Sequence[int], logits: Tensor) -> None:
        shared = len(indices) > 1 or logits._is_view()  # the row would keep others in memory
        self.logits, self.done = logits[-1].clone() if shared else logits[-1], True


class Session:
    """A growing sequence. One thread at a time may use a session; different sessions run side by side."""

    def __init__(self, scheduler: Scheduler, vocab_size: int, sequence: TokenSequence | None = None) -> None:
        """Open a session; `CompiledModel.session` does this."""
        self._scheduler, self._vocab_size, self._closed = scheduler, vocab_size, False
        self._sequence = sequence or scheduler.engine.sequence()

    @property
    def length(self) -> int:
        """Tokens in the session."""
        return len(self._sequence.tokens)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The session's tokens."""
        return tuple(self._sequence.tokens)

    def prefill(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Append one or more tokens and return the logits after the last, float32 [V].

        Raises UserError where a token is outside the vocabulary, the session would exceed `max_context`, is closed, or the cache
        is full; the session is then as before.
        """
        self._open()
        tokens, before = token_list(ids, self._vocab_size), self.length
        if before + len(tokens) > (limit := self._scheduler.engine.limits.max_context):
            raise UserError(
                f"The session has {before} tokens and {len(tokens)} more exceed max_context {limit}. Rewind it, or compile with "
                "a larger max_context."
            )
        with self._scheduler.lock:
            self._sequence.append(tokens)
        job = _LastRow(self._sequence, keep=True)
        try:
            self._scheduler.run([job])
        except BaseException:
            self._truncate(before)
            raise
        return job.logits

    def decode(self, token_id: int) -> Tensor:
        """Append one token and return the logits after it, float32 [V]. Raises as `prefill` does."""
        return self.prefill([token_id])

    def rewind(self, length: int) -> None:
        """Keep the first `length` tokens and forget the rest.

        A rewind further back than sliding layers remember is allowed: the next `prefill` or `decode` then runs the kept tokens
        again. Raises UserError unless 0 <= length <= the session's length.
        """
        self._open()
        if type(length) is not int or not 0 <= length <= self.length:
            raise UserError(
                f"rewind to {length!r}: the session has {self.length} tokens, so give a number from 0 to {self.length}."
            )
        self._truncate(length)

    def fork(self) -> Session:
        """Return a session with the same tokens that shares this one's blocks; who writes to a shared block copies it first."""
        self._open()
        with self._scheduler.lock:
            return Session(self._scheduler, self._vocab_size, self._scheduler.engine.fork(self._sequence))

    def close(self) -> None:
        """Give the blocks back. Closing twice is allowed; anything else after it raises UserError."""
        if not self._closed:
            self._closed = True
            with self._scheduler.lock:
                self._scheduler.engine.release(self._sequence)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self._closed = True
            self._scheduler.abandon(self._sequence)

    def _open(self) -> None:
        if self._closed:
            raise UserError("The session is closed. Open another with model.session().")

    def _truncate(self, length: int) -> None:
        with self._scheduler.lock:
            self._scheduler.engine.truncate(self._sequence, length)
