"""Reads replies in the harmony format while they come: which channel a piece of text belongs to, and what is a call of a tool.

A reply is messages. A header names the role, a channel, maybe a recipient and the type of what follows:

    <|start|>assistant<|channel|>analysis<|message|>I need the weather.<|end|>
    <|start|>assistant to=functions.weather<|channel|>commentary <|constrain|>json<|message|>{"place": "Ulm"}<|call|>

In: the ids of the markers, found in the checkpoint's tokenizer, and a reply's tokens one by one. Out: pieces of text with their
channel, finished tool calls, and notes about what was not as it should be. A model may write anything, so nothing here raises:
what fits no rule is text, and no text is lost. The format is described in docs/format.md of github.com/openai/harmony. Its own
package, openai-harmony, knows one vocabulary, which it downloads, and refuses malformed replies; tests compare with its answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from oxfuse.runtime.text import REPLACEMENT, Decode, Detokenizer, Piece, StopFilter
from oxfuse.runtime.tokenizer import TextTokenizer

FINAL = "final"
CHANNELS = ("analysis", "commentary", FINAL)
ASSISTANT = "assistant"
ROLES = (ASSISTANT, "user", "system", "developer", "tool")
LONGEST_HEADER = 200
"""Characters in a part of a header. What is longer is no header but text whose markers the model forgot."""
MOST_NOTES = 20


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A finished call of a tool: the recipient as the model wrote it, and the arguments, as a rule JSON, unchecked."""

    recipient: str
    arguments: str
    channel: str | None
    content_type: str | None

    @property
    def name(self) -> str:
        """The function's name, without the namespace that functions of the caller stand in."""
        return self.recipient.removeprefix("functions.")


@dataclass(frozen=True, kw_only=True)
class Markers:
    """The ids of the tokens that structure a reply; a tokenizer may lack the last three."""

    start: int
    channel: int
    message: int
    end: int
    constrain: int | None
    call: int | None
    return_: int | None

    @property
    def ends(self) -> frozenset[int]:
        """Markers that end a message."""
        return frozenset({self.end, self.call, self.return_} - {None})  # type: ignore[arg-type]

    @property
    def stops(self) -> frozenset[int]:
        """Markers after which it is somebody else's turn, so that generation stops."""
        return self.ends - {self.end}


def find_markers(tokenizer: TextTokenizer) -> Markers | None:
    """Return the markers where the checkpoint speaks harmony: its tokenizer has them and its chat template writes them."""
    needed = ["<|start|>", "<|channel|>", "<|message|>"]
    start, channel, message, end, constrain, call, return_ = map(
        tokenizer.token_id, [*needed, "<|end|>", "<|constrain|>", "<|call|>", "<|return|>"]
    )
    if start is None or channel is None or message is None or end is None:
        return None
    if not all(marker in (tokenizer.template or "") for marker in needed):
        return None
    return Markers(start=start, channel=channel, message=message, end=end, constrain=constrain, call=call, return_=return_)


def opened_message(prompt: Sequence[int], markers: Markers, decode: Decode) -> list[int] | None:
    """Return the tokens after the last <|start|> where `prompt` leaves the assistant's message open for the model, else None."""
    if markers.start not in prompt:
        return None
    opening = [*prompt[len(prompt) - [*reversed(prompt)].index(markers.start) :]]
    role = decode(opening[: _before(opening, {markers.channel, markers.message, markers.constrain})]).split()
    return opening if role[:1] == [ASSISTANT] and markers.ends.isdisjoint(opening) else None


def _before(tokens: Sequence[int], markers: set[int | None]) -> int:
    return next((index for index, token in enumerate(tokens) if token in markers), len(tokens))


@dataclass(kw_only=True)
class _Header:
    """A header as far as it has come: the role where it is known before, and tokens, the first `given` of them the prompt's."""

    role: str | None
    words: list[str] = field(default_factory=list)  # what the prompt says after the role, such as a recipient
    tokens: list[int] = field(default_factory=list)
    given: int = 0


@dataclass(kw_only=True)
class _Message:
    """A message whose text is coming."""

    channel: str | None
    recipient: str | None
    content_type: str | None
    tagged: bool
    text: Detokenizer
    stop: StopFilter
    arguments: list[str] = field(default_factory=list)


class HarmonyReader:
    """Reads one reply. `add` and `finish` return at most one message's text each."""

    def __init__(self, markers: Markers, decode: Decode, stops: Sequence[str], opening: Sequence[int]) -> None:
        """Continue the message that `opening` begins, see `opened_message`. A stop string counts inside a message only."""
        self._markers, self._decode, self._stops = markers, decode, stops
        self._notes: dict[str, None] = {}
        self._message: _Message | None = None
        self._stopped = False
        self.tool_calls: list[ToolCall] = []
        content = _before(opening, {markers.message})
        role_end = _before(opening[:content], {markers.channel, markers.constrain})
        role, *words = decode(opening[:role_end]).split() or [ASSISTANT]
        given = [*opening[role_end:content]]
        self._header: _Header | None = _Header(role=role, words=words, tokens=given, given=len(given))
        if content < len(opening):
            begun = opening[content + 1 :]
            self._begin()
            assert self._message is not None
            self._message.text = Detokenizer(decode, begun)
            self._message.arguments.append(decode(begun))
            self._notes.clear()

    @property
    def notes(self) -> tuple[str, ...]:
        """What was wrong with the reply, each thing once."""
        return tuple(self._notes)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stopped

    def add(self, token: int) -> Piece:
        """Return the text that `token` makes certain, with its channel."""
        markers = self._markers
        if token in markers.ends:
            return self._end()
        if token == markers.start:
            piece = self._interrupt("<|start|>")
            self._header = _Header(role=None)
            return piece
        if token == markers.channel:
            return self._add_channel(token)
        if token == markers.message:
            return self._add_message()
        if self._header is not None:
            self._header.tokens.append(token)
            return Piece() if self._plausible(self._header) else self._give_up("text where a header should be")
        if token == markers.constrain:
            return self._stray("<|constrain|>")
        if self._message is None:
            if not self._decode([token]):  # another special token
                return Piece()
            self._note("text outside of a message")
            self._message = self._untagged()
        return self._say(self._message, self._message.text.add(token))

    def finish(self, end: int | None) -> Piece:
        """Return what was held back. A reply that ends with the stop token `end` is complete, one cut off (None) is not."""
        if end in self._markers.ends:
            return self._end()
        if self._header is not None:
            where = "cut off" if end is None else "ended"
            return self._leave(self._give_up(f"{where} inside a header"), complete=False)
        if self._message is not None and self._message.recipient and end is None:
            self._note(f"the call of {self._message.recipient} was cut off")
        return self._leave(Piece(), complete=end is not None)

    def _add_channel(self, token: int) -> Piece:
        piece = Piece()
        if self._header is None:
            self._note("<|channel|> without <|start|>")
            piece = self._interrupt(None)
            self._header = _Header(role=ASSISTANT)
        self._header.tokens.append(token)
        return piece

    def _add_message(self) -> Piece:
        if self._header is not None:
            return self._begin()
        if self._message is not None:
            return self._stray("<|message|>")
        self._note("<|message|> without a header")
        self._message = self._untagged()
        return Piece()

    def _end(self) -> Piece:
        if self._header is not None:
            return self._leave(self._give_up("a header without <|message|>"), complete=True)
        if self._message is None:
            return self._stray("the end of a message")
        return self._leave(Piece(), complete=True)

    def _interrupt(self, by: str | None) -> Piece:
        """Leave whatever is open, since a new header begins."""
        if self._header is not None:
            return self._leave(self._give_up("a header without <|message|>"), complete=False)
        if self._message is not None and self._message.tagged and by:
            self._note(f"{by} inside a message")
        return self._leave(Piece(), complete=False)

    def _stray(self, marker: str) -> Piece:
        message = self._message
        self._note(f"{marker} {'inside' if message else 'outside of'} a message")
        return Piece(channel=message.channel, recipient=message.recipient) if message else Piece()

    def _begin(self) -> Piece:
        """Understand the header, now that it is whole, and begin its message."""
        assert self._header is not None
        header, self._header = self._header, None
        said, *parts = self._parts(header)
        words = said[1].split()
        role = header.role if header.role is not None else (words.pop(0) if words else "")
        if header.role is not None and words[:1] == [role]:  # said again, after the prompt
            del words[0]
        words = [*header.words, *words]
        channel = content_type = None
        for marker, text in parts:
            first, *rest = text.split() or [""]
            if marker == self._markers.channel:
                if channel is not None:
                    self._note(f"two channels in one header: {channel!r} and {first!r}")
                channel = first or channel
            else:
                content_type = first or content_type
            words += rest
        recipients = [word.removeprefix("to=") for word in words if word.startswith("to=")]
        others = [word for word in words if not word.startswith("to=")]
        if not recipients and len(others) == 1 and "." in others[0] and channel != FINAL:  # a function without its `to=`
            recipients, others = others, []
        if others and content_type is None:
            content_type = others.pop()
        if others or len(recipients) > 1 or "" in recipients:
            self._note(f"a header that is not understood: {self._shown(header)}")
        recipient = next((word for word in recipients if word not in ("", "all", *ROLES)), None)
        if role != ASSISTANT:
            self._note(f"a message of {role!r}, not of {ASSISTANT!r}")
            channel = recipient = None
        elif channel is None:
            self._note("a message without a channel")
        elif channel not in CHANNELS:
            self._note(f"a channel that is not known: {channel!r:.60}")
        self._message = _Message(
            channel=channel,
            recipient=recipient,
            content_type=content_type,
            tagged=True,
            text=Detokenizer(self._decode),
            stop=StopFilter(self._stops),
        )
        return Piece(channel=channel, recipient=recipient)

    def _give_up(self, why: str) -> Piece:
        """Take what was no header for a message, and return its text, without the role and the channel where they are known."""
        assert self._header is not None
        header, self._header = self._header, None
        self._note(f"{why}: {self._shown(header)}" if header.tokens[header.given :] else why)
        channel, role, kept = None, header.role, []
        for marker, text in self._parts(header, generated=True):
            first = (text.split() or [""])[0]
            if marker is None:
                known = first in (ROLES if role is None else [role])
                role = first if known else role
            else:
                known = marker == self._markers.channel and first in CHANNELS
                channel = first if known else channel
            kept.append(text.lstrip().removeprefix(first).lstrip() if known else text)
        self._message = self._untagged(channel if role in (None, ASSISTANT) else None, header.tokens)
        return self._say(self._message, "".join(kept))

    def _untagged(self, channel: str | None = None, before: Sequence[int] = ()) -> _Message:
        return _Message(
            channel=channel,
            recipient=None,
            content_type=None,
            tagged=False,
            text=Detokenizer(self._decode, before),
            stop=StopFilter(self._stops),
        )

    def _say(self, message: _Message, text: str) -> Piece:
        text = message.stop.add(text)
        message.arguments.append(text)
        self._stopped = message.stop.stopped
        return Piece(text=text, channel=message.channel, recipient=message.recipient)

    def _leave(self, said: Piece, *, complete: bool) -> Piece:
        """End the message, if there is one; return what it still holds back after `said`."""
        message, self._message = self._message, None
        if message is None:
            return said
        text = self._say(message, message.text.finish()).text
        held = message.stop.finish()
        message.arguments.append(held)
        if message.recipient and complete and not self._stopped:
            self.tool_calls.append(
                ToolCall(
                    recipient=message.recipient,
                    arguments="".join(message.arguments),
                    channel=message.channel,
                    content_type=message.content_type,
                )
            )
        if not message.tagged and not (said.text or text or held):
            return Piece()  # a header that said nothing
        return Piece(text=said.text + text + held, channel=message.channel, recipient=message.recipient)

    def _parts(self, header: _Header, *, generated: bool = False) -> list[tuple[int | None, str]]:
        """Return the header's text as parts, each with the marker before it, the first (the role's) with None."""
        parts: list[tuple[int | None, list[int]]] = [(None, [])]
        for index, token in enumerate(header.tokens):
            if token in (self._markers.channel, self._markers.constrain):
                parts.append((token, []))
            elif not generated or index >= header.given:
                parts[-1][1].append(token)
        return [(marker, self._decode(tokens)) for marker, tokens in parts]

    def _plausible(self, header: _Header) -> bool:
        """Tell whether the header may still become one: waiting for <|message|> holds back text that has lost its header."""
        marker, text = self._parts(header)[-1]
        if len(text) > LONGEST_HEADER:
            return False
        if text.endswith(REPLACEMENT):  # half a character
            return True
        words = text.split()
        if marker is None and header.role is not None:
            if header.role.startswith(text.strip()):
                return True
            if not text[:1].isspace() and words.pop(0) != header.role:
                return False
        elif words:  # the role, the channel's name or the type
            del words[0]
        if marker == self._markers.constrain:
            return not words
        if words and "to=".startswith(words[-1]) and not text[-1].isspace():
            words[-1] = "to="
        recipients = sum(word.startswith("to=") for word in words)
        types = len(words) - recipients
        return recipients <= 1 and types <= (1 if recipients or marker is not None else 0)

    def _shown(self, header: _Header) -> str:
        names = {self._markers.channel: "<|channel|>", self._markers.constrain: "<|constrain|>"}
        parts = self._parts(header)
        return repr(parts[0][1] + "".join(names[marker] + text for marker, text in parts[1:] if marker is not None))[:100]

    def _note(self, text: str) -> None:
        if len(self._notes) < MOST_NOTES:
            self._notes[text] = None
