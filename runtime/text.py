"""Turns tokens into text as they come: never half a character, never a character that may belong to a stop string.

What all pieces of a request add up to is its text, for `generate` and `stream` alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

Decode = Callable[[Sequence[int]], str]
"""Turns token ids into text, special tokens into nothing."""

REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are no character, and for a character whose last bytes are not there yet."""

LONGEST_PARTIAL = 3
"""Bytes of an unfinished UTF-8 character, hence most replacement characters that a later token can still change."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Text that has become certain: the channel it was said in and whom it is addressed to, where the format has such things."""

    text: str = ""
    channel: str | None = None
    recipient: str | None = None


class Reader(Protocol):
    """Turns the tokens of one reply into its text, piece by piece."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come: there is no text after it."""

    def add(self, token: int) -> Piece:
        """Return what `token` makes certain."""

    def finish(self, end: int | None) -> Piece:
        """Return what was held back, as the reply is over: ended by the stop token `end`, or cut off where that is None."""


class Detokenizer:
    """Decodes token by token in time independent of the text's length.

    Only the tokens since the last clean boundary are decoded again, together with those before it that the decoder needs to see.
    """

    def __init__(self, decode: Decode, before: Sequence[int] = ()) -> None:
        """Decode with `decode`, which turns token ids into text; `before` are tokens before, whose text is not returned."""
        self._decode = decode
        self._context: list[int] = [*before]
        self._open: list[int] = []
        self._given = len(decode(self._context)) if before else 0
        """Characters of the decoded context and open tokens that were returned already."""

    def add(self, token: int) -> str:
        """Return the characters that `token` completes."""
        self._open.append(token)
        text = self._decode([*self._context, *self._open])
        kept = len(text) - len(text.rstrip(REPLACEMENT))
        piece = self._give(text, len(text) - min(kept, LONGEST_PARTIAL))
        if not kept and piece:
            self._context, self._open = self._open, []
            self._given = len(self._decode(self._context))
        return piece

    def finish(self) -> str:
        """Return what is left, an unfinished character as U+FFFD."""
        text = self._decode([*self._context, *self._open])
        return self._give(text, len(text))

    def _give(self, text: str, end: int) -> str:
        piece = text[self._given : end]
        self._given = max(self._given, end)
        return piece


class StopFilter:
    """Passes text through up to the first stop string, keeping back what may turn out to be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Look for `stops`, none of them empty."""
        self._stops = stops
        self._held = ""
        self.stopped = False

    def add(self, piece: str) -> str:
        """Return the text that is certain to come before any stop string. Nothing comes after `stopped`."""
        if self.stopped:
            return ""
        text = self._held + piece
        # of several, the one that is complete first wins: so the result does not depend on how the text is cut into pieces
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)[1]]
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        keep = next((n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in self._stops)), 0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Return what was kept back, since nothing follows that could complete a stop string."""
        held, self._held = self._held, ""
        return held


class PlainReader:
    """Reads a reply that is nothing but text."""

    def __init__(self, decode: Decode, stops: Sequence[str]) -> None:
        """Decode with `decode`, and end before any of `stops`."""
        self._detokenizer, self._filter = Detokenizer(decode), StopFilter(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._filter.stopped

    def add(self, token: int) -> Piece:
        """Return what `token` makes certain."""
        return Piece(text=self._filter.add(self._detokenizer.add(token)))

    def finish(self, end: int | None) -> Piece:
        """Return what was held back. A stop token is no text, whatever it is."""
        return Piece(text=self._filter.add(self._detokenizer.finish()) + self._filter.finish())
