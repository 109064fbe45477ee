"""The stopwatch: which seconds count as reading prompts and which as generating."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from oxfuse.runtime.speed import Speed, Stopwatch


def job(prompt: int) -> Any:
    return SimpleNamespace(sequence=SimpleNamespace(tokens=[0] * prompt, cached=0), new_tokens=0, done=False, reused=0)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_steps_are_told_apart() -> None:
    long, short, clock = job(10), job(2), Clock()
    watch = Stopwatch([long, short], clock)

    def step(seconds: float, **cached: int) -> None:
        clock.now += seconds
        long.sequence.cached, short.sequence.cached = cached["long"], cached["short"]
        watch.step()

    short.new_tokens = 1
    step(1.0, long=5, short=2)  # a chunk of the long prompt, and all of the short one
    long.new_tokens, short.new_tokens, short.done = 1, 2, True
    step(2.0, long=10, short=0)  # its rest, while the short one ends: still a prompt step
    assert watch.seconds == [None, 3.0]
    long.new_tokens = 2
    step(0.25, long=11, short=0)
    step(4.0, long=0, short=0)  # it lost its blocks: what it reads again is no new prompt
    long.new_tokens, long.done = 3, True
    step(0.75, long=12, short=0)
    assert watch.seconds == [8.0, 3.0]
    assert watch.speed == Speed(prompt_tokens=12, prompt_seconds=3.0, new_tokens=5, decode_tokens=2, decode_seconds=5.0)


def test_the_text_leaves_out_what_was_not_measured() -> None:
    nothing = dict(prompt_tokens=0, prompt_seconds=0.0, new_tokens=0, decode_tokens=0, decode_seconds=0.0)
    assert Speed(**nothing).text() == "prompt 0 tokens in 0.00 s; generated 0 tokens"
    one = nothing | dict(prompt_tokens=1, prompt_seconds=0.5, new_tokens=1)
    assert Speed(**one).text() == "prompt 1 token in 0.50 s (2 tokens/s); generated 1 token"
    again = one | dict(prompt_tokens=1000, reused_tokens=960)
    assert Speed(**again).text() == (
        "prompt 40 tokens in 0.50 s (80 tokens/s), 960 of 1,000 prompt tokens reused; generated 1 token"
    )
    many = one | dict(prompt_tokens=1000, new_tokens=51, decode_tokens=50, decode_seconds=4)
    assert Speed(**many).text() == "prompt 1,000 tokens in 0.50 s (2,000 tokens/s); generated 51 tokens in 4.00 s (12.5 tokens/s)"
