"""A model that says what it is told to: for a user's message, the reply that a script has for it.

It knows nothing but the paged caches: each step writes its tokens there, and the whole chat is read back from there, so a wrong
block or a token that should have been run again gives a wrong reply.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from oxfuse.runtime.engine import Engine
from oxfuse.runtime.manifest import CacheGroup, CacheSpec, GenerationSpec, Limits
from oxfuse.runtime.model import CompiledModel
from oxfuse.runtime.tokenizer import TextTokenizer

from .speaking import harmony_tokenizer

WINDOW, BLOCK = 6, 4
THOUGHT = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>"


class Script:
    """The step of a model that answers from `replies`, a text with markers for each user's message."""

    def __init__(self, replies: Mapping[str, str], tokenizer: TextTokenizer, *, delay: float = 0.0) -> None:
        self.tokenizer, self.delay = tokenizer, delay
        self.replies = {said: self.encode(reply) for said, reply in replies.items()}
        self.user, self.turn = self.encode("<|start|>user<|message|>"), self.encode("<|end|><|start|>assistant")
        self.ran = 0
        """Tokens that steps have run."""

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def step(self, inputs: list[Tensor]) -> Tensor:
        (tokens, _, query_start, kv_lens, slots, tables, rows), caches = inputs[:7], inputs[7:]
        time.sleep(self.delay)
        self.ran += len(tokens)
        for group in range(2):
            caches[2 * group].view(-1)[slots[group]] = tokens.float()
        logits = torch.zeros(len(rows), self.tokenizer.vocab_size)
        for n, length in enumerate(kv_lens.tolist()):
            whole, recent = (caches[2 * g][tables[g, n]].flatten()[:length].int().tolist() for g in (0, 1))
            assert recent[-WINDOW:] == whole[-WINDOW:], "the sliding group has lost what its window shows"
            for row in (rows == query_start[n + 1] - 1).nonzero():
                logits[row, self.next(whole)] = 1
        return logits

    def next(self, chat: list[int]) -> int:
        """The token that follows `chat`: what comes next in the reply to its last user's message."""
        begin = last(chat, self.user) + len(self.user)
        end = begin + last(chat[begin:], self.turn, first=True)
        reply = self.replies[self.tokenizer.decode(chat[begin:end])]
        said = chat[end + len(self.turn) :]
        assert said == reply[: len(said)], "the cache holds another reply"
        return reply[len(said)]


def last(tokens: list[int], part: list[int], *, first: bool = False) -> int:
    found = [i for i in range(len(tokens)) if tokens[i : i + len(part)] == part]
    assert found, "the chat is not what the template writes"
    return found[0 if first else -1]


def scripted(
    replies: Mapping[str, str],
    *,
    tokenizer: TextTokenizer | None = None,
    max_context: int = 400,
    max_batch: int = 4,
    delay: float = 0.0,
    reserve: int = 8,
) -> tuple[CompiledModel, Script]:
    """The model behind the public surface, and its step, which counts."""
    script = Script(replies, tokenizer or harmony_tokenizer(), delay=delay)
    groups = CacheGroup(window=0, layers=(0,)), CacheGroup(window=WINDOW, layers=(1,))
    cache = CacheSpec(block_size=BLOCK, dtype="float32", kv_heads=(1, 1), head_dim=(1, 1), groups=groups)
    limits = Limits(max_context=max_context, max_batch=max_batch, max_step_tokens=512)
    ends = tuple(script.encode("<|return|><|call|>"))
    model = CompiledModel(
        Engine(script.step, cache, limits, chunk=16, reserve=reserve),
        vocab_size=script.tokenizer.vocab_size,
        generation=GenerationSpec(eos_token_ids=ends, bos_token_id=None, pad_token_id=None),
        tokenizer=script.tokenizer,
        manifest=SimpleNamespace(  # type: ignore[arg-type]
            name="scripted",
            generation=SimpleNamespace(eos_token_ids=ends),
            model=SimpleNamespace(task="text-generation", pooling="none", config={}),
        ),
    )
    return model, script


SLOW = {
    "Hello \nagain": THOUGHT.format("Again.", "Two lines."),
    "Hello": THOUGHT.format("They greet.", "Good day to you!"),
    "Count": THOUGHT.format("Numbers.", " ".join(map(str, range(60)))),
}


def main() -> None:
    """`oxfuse chat` with a slow scripted model, for tests at a terminal."""
    import oxfuse.__main__
    import oxfuse.runtime.artifact
    import oxfuse.runtime.chat

    oxfuse.runtime.chat.read_manifest = lambda folder: None  # type: ignore[assignment]
    oxfuse.runtime.artifact.load = lambda folder, **options: scripted(SLOW, delay=0.02)[0]  # type: ignore[assignment]
    sys.argv = ["oxfuse", "chat", str(Path("nowhere")), *sys.argv[1:]]
    oxfuse.__main__.main()


if __name__ == "__main__":
    main()
