"""Harmony replies: channels and tool calls as openai-harmony reads them, and whatever a model may say instead."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from oxfuse.runtime.generate import Generation
from oxfuse.runtime.harmony import HarmonyReader, ToolCall, find_markers
from oxfuse.runtime.tokenizer import TextTokenizer

from .speaking import MARKERS, TEMPLATE, harmony_tokenizer, run_job

TOKENIZER = harmony_tokenizer()
OPEN = "<|start|>user<|message|>Hello<|end|><|start|>assistant"
ORACLE = json.loads((Path(__file__).parent / "harmony_oracle.json").read_text("utf-8"))


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def reply(said: str, *, prompt: str = OPEN, cut: bool = False, **options: object) -> Generation:
    """What is generated where the model says `said` and is then cut off, or as it stops by itself."""
    tokens = encode(said)
    generation, _ = run_job(TOKENIZER, encode(prompt), tokens, max_new_tokens=len(tokens) + (not cut), **options)
    return generation


def test_replies_are_read_as_openai_harmony_reads_them() -> None:
    """240 recorded ones, complete and cut off anywhere; `record_harmony_oracle.py` made them."""
    cut = 0
    for said, done, coming in ORACLE:
        channels: dict[str, str] = {}
        for channel, _, _, text in [*done, *([coming] if coming else [])]:
            channels[channel] = channels.get(channel, "") + text
        calls = [
            ToolCall(recipient=to, arguments=text, channel=channel, content_type=kind and kind.removeprefix("<|constrain|>"))
            for channel, to, kind, text in done
            if to
        ]
        found = reply(said, stop_token_ids=[])
        assert found.channels == channels and [*found.tool_calls] == calls and not found.notes, said
        assert found.text == "".join(text for *_, text in [*done, *([coming] if coming else [])])
        cut += coming is not None
    assert cut > 50 and len(ORACLE) == 240


def test_a_whole_reply() -> None:
    said = "<|channel|>analysis<|message|>Think, 世界.<|end|><|start|>assistant<|channel|>final<|message|>Grüße!<|return|>"
    tokens = encode(f"{said}more")
    found, job = run_job(TOKENIZER, encode(OPEN), tokens)
    assert found.channels == {"analysis": "Think, 世界.", "final": "Grüße!"} and found.answer == "Grüße!"
    assert found.text == "Think, 世界.Grüße!" and found.finish_reason == "stop" and not found.notes and not found.tool_calls
    assert TOKENIZER.decode(found.token_ids[-1:], skip_special_tokens=False) == "<|return|>"
    spoken = [(chunk.channel, chunk.text) for chunk in job.chunks if chunk.text]
    assert spoken[0] == ("analysis", "T") and spoken[-1] == ("final", "!") and len(spoken) > 10


CALL = '<|channel|>commentary <|constrain|>json<|message|>{"x": "é"}<|call|>'


@pytest.mark.parametrize("said", [f" to=functions.weather{CALL}", CALL.replace("commentary", "commentary to=functions.weather")])
def test_a_tool_call_ends_the_reply(said: str) -> None:
    tokens = encode(said + "more")
    found, job = run_job(TOKENIZER, encode(OPEN), tokens)
    (call,) = found.tool_calls
    assert (call.name, call.recipient, call.arguments) == ("weather", "functions.weather", '{"x": "é"}')
    assert (call.channel, call.content_type, found.finish_reason) == ("commentary", "json", "stop")
    assert found.channels == {"commentary": call.arguments} and found.answer == "" and not found.notes
    assert {chunk.recipient for chunk in job.chunks if chunk.text} == {"functions.weather"}


def test_the_checkpoints_own_stop_tokens_are_kept_and_may_be_replaced() -> None:
    said = "<|channel|>final<|message|>One<|endoftext|>two<|call|>three<|return|>"
    (end,) = encode("<|endoftext|>")
    stopped, _ = run_job(TOKENIZER, encode(OPEN), encode(said), ends=[end])
    assert stopped.text == "One" and stopped.finish_reason == "stop" and not stopped.notes
    everything, _ = run_job(TOKENIZER, encode(OPEN), encode(said), ends=[end], stop_token_ids=[])
    assert everything.text == "Onetwothree" and everything.channels == {"final": "Onetwo"}
    word = encode("two")[0]
    by_word, _ = run_job(TOKENIZER, encode(OPEN), encode("<|channel|>final<|message|>One two"), stop_token_ids=[word])
    assert by_word.token_ids[-1] == word and by_word.text in ("One ", "One")


MALFORMED = {
    "no markers": ("The answer is 4.", {}, "The answer is 4.", "where a header should be"),
    "no channel": ("<|message|>4", {}, "4", "without a channel"),
    "unknown channel": ("<|channel|>poetry<|message|>Rose<|return|>", {"poetry": "Rose"}, "Rose", "not known: 'poetry'"),
    "empty channel": ("<|channel|><|message|>4", {}, "4", "without a channel"),
    "two channels": ("<|channel|>commentary<|channel|>final<|message|>4", {"final": "4"}, "4", "two channels"),
    "channel in the content": (
        "<|channel|>analysis<|message|>2+2<|channel|>final<|message|>4",
        {"analysis": "2+2", "final": "4"},
        "2+24",
        "<|channel|> without <|start|>",
    ),
    "start in the content": (
        "<|channel|>analysis<|message|>2+2<|start|>assistant<|channel|>final<|message|>4",
        {"analysis": "2+2", "final": "4"},
        "2+24",
        "<|start|> inside a message",
    ),
    "start in a header": (
        "<|channel|>analysis<|start|>assistant<|channel|>final<|message|>4",
        {"final": "4"},
        "4",
        "without <|message|>",
    ),
    "message twice": ("<|channel|>final<|message|>2<|message|>2", {"final": "22"}, "22", "<|message|> inside a message"),
    "constrain in the content": ("<|channel|>final<|message|>2<|constrain|>2", {"final": "22"}, "22", "<|constrain|> inside"),
    "no message marker": (
        "<|channel|>analysis The user wants a sum.<|end|><|start|>assistant<|channel|>final<|message|>4",
        {"analysis": "The user wants a sum.", "final": "4"},
        "The user wants a sum.4",
        "where a header should be",
    ),
    "text between messages": (
        "<|channel|>final<|message|>4<|end|>and more<|start|>assistant<|channel|>final<|message|>!",
        {"final": "4!"},
        "4and more!",
        "text outside of a message",
    ),
    "message between messages": ("<|channel|>final<|message|>4<|end|><|message|>5", {"final": "4"}, "45", "without a header"),
    "another role": (
        "<|channel|>final<|message|>4<|end|><|start|>user<|channel|>final<|message|>Thanks",
        {"final": "4"},
        "4Thanks",
        "of 'user'",
    ),
    "ends twice": ("<|channel|>final<|message|>4<|end|><|end|>", {"final": "4"}, "4", "the end of a message outside"),
    "nothing but an end": ("<|end|>", {}, "", "a header without"),
    "words in a header": ("<|channel|>final one<|constrain|>json<|message|>4", {"final": "4"}, "4", "not understood"),
    "a long header": ("<|channel|>" + "x" * 300, {}, "x" * 300, "where a header should be"),
    "role said again": ("assistant<|channel|>final<|message|>4", {"final": "4"}, "4", ""),
    "answer to nobody": (" to=<|channel|>final<|message|>4", {"final": "4"}, "4", "not understood"),
}


@pytest.mark.parametrize(("said", "channels", "text", "note"), MALFORMED.values(), ids=MALFORMED)
def test_what_breaks_the_format_is_text_with_a_note(said: str, channels: dict[str, str], text: str, note: str) -> None:
    found = reply(said, stop_token_ids=[])
    assert (found.channels, found.text) == (channels, text)
    assert re.search(re.escape(note), " ".join(found.notes)) and bool(note) == bool(found.notes)
    assert not found.tool_calls


def test_an_answer_without_markers_streams_at_once() -> None:
    _, job = run_job(TOKENIZER, encode(OPEN), encode("The answer is long."))
    pieces = [chunk.text for chunk in job.chunks]
    assert "".join(pieces[:6]) and all(pieces[6:-1])
    assert job.result().answer == "The answer is long."


def test_a_reply_that_is_cut_off() -> None:
    for said, channels, text, note in [
        ("<|channel|>comm", {}, "comm", "inside a header"),
        ("<|channel|>commentary", {}, "", "inside a header"),
        ("<|channel|>analysis<|message|>Thi", {"analysis": "Thi"}, "Thi", None),
        (" to=functions.f<|channel|>commentary<|message|>{", {"commentary": "{"}, "{", "call of functions.f was cut off"),
    ]:
        found = reply(said, cut=True)
        assert (found.channels, found.text, found.finish_reason) == (channels, text, "length") and not found.tool_calls
        assert note is None if not found.notes else note in found.notes[0]


def test_half_a_character_at_the_end_of_a_message() -> None:
    half = encode("日")[:1]
    tokens = [*encode("<|channel|>final<|message|>a"), *half, *encode("<|end|><|start|>assistant<|channel|>analysis<|message|>b")]
    found, job = run_job(TOKENIZER, encode(OPEN), [*tokens, *half], max_new_tokens=len(tokens) + 1)
    assert found.channels == {"final": "a\ufffd", "analysis": "b\ufffd"}
    assert [chunk.text for chunk in job.chunks if chunk.text][:2] == ["a", "\ufffd"]


@pytest.mark.parametrize("marker", ["<|start|>assistant<|channel|>", "<|channel|>", "<|return|>"])
def test_what_was_held_back_comes_with_the_marker_that_ends_the_message(marker: str) -> None:
    """A possible stop string and half a character, wherever the message ends."""
    tokens = [*encode("<|channel|>final<|message|>one EN"), *encode("日")[:1], *encode(f"{marker}analysis<|message|>D")]
    found, _ = run_job(TOKENIZER, encode(OPEN), tokens, stop="END", max_new_tokens=len(tokens))
    assert found.channels and found.channels["final"] == "one EN\ufffd"
    held, _ = run_job(TOKENIZER, encode(OPEN), encode(f"<|channel|>final<|message|>one EN{marker}"), stop="END")
    assert held.channels == {"final": "one EN"}


def test_who_is_no_tool() -> None:
    for header in (
        " to=all<|channel|>commentary",
        " to=user<|channel|>final",
        "<|channel|>final v1.0",
        "<|channel|>commentary json",
    ):
        found = reply(f"{header}<|message|>{{}}<|call|>")
        assert not found.tool_calls and found.text == "{}" and not found.notes
    lone = reply("<|channel|>commentary functions.f<|message|>{}<|call|>")
    assert lone.tool_calls[0].recipient == "functions.f"


def test_a_stop_string_counts_inside_a_message() -> None:
    said = "<|channel|>analysis<|message|>one EN<|end|><|start|>assistant<|channel|>final<|message|>D two END three<|return|>"
    found = reply(said, stop="END")
    assert found.channels == {"analysis": "one EN", "final": "D two "} and found.finish_reason == "stop"
    call = reply(' to=functions.f<|channel|>commentary<|message|>{"x": END}<|call|>', stop=["END"])
    assert not call.tool_calls and call.channels == {"commentary": '{"x": '}
    half = [*encode(' to=functions.f<|channel|>commentary<|message|>{"x": '), *encode("日")[:1], *encode("<|call|>")]
    broken, _ = run_job(TOKENIZER, encode(OPEN), half, stop=["\ufffd"])  # it comes with the marker that ends the call
    assert not broken.tool_calls and broken.text == '{"x": '
    lost = reply("Without header END", stop=["END"])
    assert lost.text == "Without header " and lost.finish_reason == "stop"


def test_the_prompt_may_begin_the_message() -> None:
    begun = reply("is 4.<|return|>", prompt=f"{OPEN}<|channel|>final<|message|>The sum ")
    assert begun.channels == {"final": "is 4."} and begun.text == "is 4." and not begun.notes
    header = reply("<|message|>{}<|call|>", prompt=f"{OPEN} to=functions.f<|channel|>commentary")
    assert header.tool_calls[0].recipient == "functions.f" and not header.notes
    call = reply("2}<|call|>", prompt=f'{OPEN} to=functions.f<|channel|>commentary<|message|>{{"x": ')
    assert call.tool_calls[0].arguments == '{"x": 2}' and call.channels == {"commentary": "2}"}


@pytest.mark.parametrize("prompt", ["Once upon", "<|start|>", "<|start|>user<|message|>Hello", f"{OPEN}<|message|>done<|end|>"])
def test_other_prompts_are_continued_as_text(prompt: str) -> None:
    said = "<|channel|>analysis<|message|>Think<|end|> on"
    found = reply(said, prompt=prompt)
    assert found.channels is None and found.text == found.answer == "analysisThink on" == TOKENIZER.decode(encode(said))
    assert not found.notes


def test_the_format_is_that_of_tokenizer_and_template() -> None:
    assert find_markers(TOKENIZER) is not None
    assert find_markers(harmony_tokenizer(template=None)) is None
    assert find_markers(harmony_tokenizer(template="{{ messages[0].content }}")) is None
    assert find_markers(harmony_tokenizer(markers=[m for m in MARKERS if m != "<|channel|>"])) is None
    few = find_markers(harmony_tokenizer(markers=MARKERS[:4]))
    assert few is not None and few.stops == frozenset() and few.ends == {few.end}


LONE = [encode(words) for words in ("α β γ", "δ ε ζ", "η θ ι")]
"""No header holds three words, so these come out wherever they stand."""
HEADS = [encode(w) for w in ("assistant", "user", " to=", "functions.f", "analysis", "final", "commentary", " json", "\n", "é")]
MARKS = [encode(marker) for marker in MARKERS]
GOOD = [
    encode(f"<|start|>assistant{header}<|message|>")
    for header in ("<|channel|>final", " to=functions.f<|channel|>commentary", "<|channel|>analysis to=python code")
]
HALVES = [encode("日")[:1], encode("🚀")[:2]]


def anything(choose: random.Random) -> list[int]:
    kinds = choose.choices(
        [LONE, HEADS, MARKS, GOOD, HALVES], [4, 4, 4, *choose.choice([(0, 0), (2, 1)])], k=choose.randint(1, 20)
    )
    return [token for kind in kinds for token in choose.choice(kind)]


def greek(text: str) -> str:
    return "".join(re.findall("[α-ι]", text))


@pytest.mark.parametrize("count", [5_000, pytest.param(30_000, marks=pytest.mark.slow)])
def test_anything_can_be_said(count: int) -> None:
    """Seeded random tokens: nothing raises, and no text is lost or changes its order."""
    choose, markers = random.Random(count), find_markers(TOKENIZER)
    assert markers
    calls = notes = 0
    for _ in range(count):
        said, reader = anything(choose), HarmonyReader(markers, TOKENIZER.decode, (), encode("assistant"))
        text = "".join(reader.add(token).text for token in said) + reader.finish(choose.choice([None, markers.call])).text
        assert greek(text) == greek(TOKENIZER.decode(said)), TOKENIZER.decode(said, skip_special_tokens=False)
        calls, notes = calls + len(reader.tool_calls), notes + bool(reader.notes)
    assert calls > 200 and notes > count / 2


def test_chunks_add_up_to_channels() -> None:
    choose, ends = random.Random(8), 0
    for _ in range(1_000):
        said = anything(choose)
        options = {"stop": choose.choice([(), (), "ε", ["γδ", "f"]]), "stop_token_ids": choose.choice([[], None])}
        found, job = run_job(TOKENIZER, encode(OPEN), said, max_new_tokens=choose.randint(1, len(said) + 1), **options)
        channels: dict[str, str] = {}
        for chunk in job.chunks:
            if chunk.channel is not None:
                channels[chunk.channel] = channels.get(chunk.channel, "") + chunk.text
        assert found.channels == channels and found.text == "".join(chunk.text for chunk in job.chunks)
        assert [chunk.token_id for chunk in job.chunks] == found.token_ids
        ends += found.finish_reason == "stop"
    assert 200 < ends < 800


def test_templates_take_back_what_was_read() -> None:
    """A reply, put into the next turn's messages, is rendered with the same markers; earlier thoughts are not."""
    first = reply("<|channel|>analysis<|message|>Think<|end|><|start|>assistant<|channel|>final<|message|>Answer<|return|>")
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first.answer, "thinking": first.channels["analysis"]},  # type: ignore[index]
        {"role": "user", "content": "More"},
    ]
    text = TextTokenizer(harmony_tokenizer()._tokenizer, template=TEMPLATE).render(messages)
    assert "<|channel|>final<|message|>Answer<|end|>" in text and "Think" not in text and text.endswith("<|start|>assistant")
