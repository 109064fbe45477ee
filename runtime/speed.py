"""How fast prompts were read and tokens generated: the wall time of a run, told apart step by step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from oxfuse.runtime.units import count_text

if TYPE_CHECKING:
    from oxfuse.runtime.generate import GenerationJob


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens and seconds of a run. A step that read any prompt counts as prompt time, also where others generated in it.

    `reused_tokens` of the `prompt_tokens` were in the cache and did not run.
    """

    prompt_tokens: int
    prompt_seconds: float
    new_tokens: int
    decode_tokens: int
    decode_seconds: float
    reused_tokens: int = 0

    def text(self) -> str:
        """Return it as one line, the rates as far as there was something to measure."""
        run = self.prompt_tokens - self.reused_tokens
        prompt = f"prompt {count_text(run, 'token')} in {self.prompt_seconds:.2f} s"
        new = f"generated {count_text(self.new_tokens, 'token')}"
        if self.prompt_seconds:
            prompt += f" ({run / self.prompt_seconds:,.0f} tokens/s)"
        if self.reused_tokens:
            prompt += f", {self.reused_tokens:,} of {count_text(self.prompt_tokens, 'prompt token')} reused"
        if self.decode_tokens and self.decode_seconds:
            rate = self.decode_tokens / self.decode_seconds
            new += f" in {self.decode_seconds:.2f} s ({rate:,.{0 if rate >= 100 else 1}f} tokens/s)"
        return f"{prompt}; {new}"


class Stopwatch:
    """Measures jobs while they run: made when they are ready, then told of every step."""

    def __init__(self, jobs: Sequence[GenerationJob], clock: Callable[[], float] = time.perf_counter) -> None:
        """Begin to measure."""
        self._jobs, self._clock = jobs, clock
        self._lengths = [len(job.sequence.tokens) for job in jobs]
        self._read, self._new = [0] * len(jobs), 0
        self._began = self._last = clock()
        self._prompt_seconds = self._decode_seconds = 0.0
        self._decode_tokens = 0
        self.seconds: list[float | None] = [None] * len(jobs)
        """For each job the seconds until it was done, None as long as it is not."""

    def step(self) -> None:
        """Count the step that has just run."""
        now = self._clock()
        read = [
            length if job.done else min(length, max(before, job.sequence.cached))
            for job, length, before in zip(self._jobs, self._lengths, self._read, strict=True)
        ]
        new = sum(job.new_tokens for job in self._jobs)
        if read != self._read:
            self._prompt_seconds += now - self._last
        else:
            self._decode_seconds += now - self._last
            self._decode_tokens += new - self._new
        self.seconds = [
            now - self._began if job.done and before is None else before
            for job, before in zip(self._jobs, self.seconds, strict=True)
        ]
        self._last, self._read, self._new = now, read, new

    @property
    def speed(self) -> Speed:
        """What has been measured so far."""
        return Speed(
            prompt_tokens=sum(self._read),
            prompt_seconds=self._prompt_seconds,
            new_tokens=self._new,
            decode_tokens=self._decode_tokens,
            decode_seconds=self._decode_seconds,
            reused_tokens=sum(min(job.reused, read) for job, read in zip(self._jobs, self._read, strict=True)),
        )
