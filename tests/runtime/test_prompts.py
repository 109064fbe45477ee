"""What callers pass in: prompts in every form, batches, masks; and what is refused, with words that help."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from oxfuse.runtime.errors import UserError
from oxfuse.runtime.generate import split_prompts
from oxfuse.runtime.inputs import batch_rows
from oxfuse.runtime.model import CompiledModel
from oxfuse.runtime.tokenizer import TextTokenizer

from .test_text import byte_level
from .toy import VOCAB, ToyModel, tokens, toy_engine

TEMPLATE = """{%- macro say(role, text) -%}
<s>{{ role }}: {{ text | trim }}</s>
{%- endmacro -%}
{{ bos_token }}{%- set ns = namespace(last='') -%}
{%- for message in messages %}
    {%- if message.role == 'nobody' %}{{ raise_exception('Nobody may not speak.') }}{% endif %}
    {%- if loop.index > 9 %}{% break %}{% endif %}
    {%- set ns.last = message.role %}
    {%- if message.role == 'assistant' %}{% generation %}{{ say('A', message.content) }}{% endgeneration %}
    {%- else %}{{ say('U', message.content) }}{% endif %}
{%- endfor %}
{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{{ strftime_now('%Y') | length }} {{ messages[0] | tojson }}
{% if add_generation_prompt and ns.last != 'assistant' %}A:{% endif %}
"""
MESSAGES = [
    {"role": "user", "content": " Grüße <b>&</b> 👋 "},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "more"},
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level().save(str(folder / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>", "special": True}, "eos_token": "</s>", "chat_template": "old"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return [*folder.iterdir()]


def test_chat_template_renders_as_in_transformers(files: list[Path]) -> None:
    ours = TextTokenizer.open(files)
    theirs = PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>")
    tools = [{"name": "täg", "arguments": {"x": 1}}]
    for variables in ({}, {"tools": tools}, {"add_generation_prompt": False}):
        wanted = {"add_generation_prompt": True, **variables}
        expected = theirs.apply_chat_template(MESSAGES, chat_template=TEMPLATE, tokenize=False, **wanted)
        assert ours and ours.render(MESSAGES, **variables) == expected
    assert ours.chat(MESSAGES) == theirs.encode(ours.render(MESSAGES), add_special_tokens=False)


def test_templates_by_place(files: list[Path], tmp_path: Path) -> None:
    by_name = {path.name: path for path in files}
    plain = TextTokenizer.open([by_name["tokenizer.json"]])
    assert plain and not plain.has_chat_template
    with pytest.raises(UserError, match="no chat template"):
        plain.chat(MESSAGES)
    named = tmp_path / "tokenizer_config.json"
    named.write_text(json.dumps({"chat_template": [{"name": "x", "template": "1"}, {"name": "default", "template": "2"}]}))
    chosen = TextTokenizer.open([by_name["tokenizer.json"], named])
    assert chosen and chosen.render(MESSAGES) == "2"
    assert TextTokenizer.open([named]) is None
    broken = tmp_path / "tokenizer.json"
    broken.write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read"):
        TextTokenizer.open([broken])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('Nobody may not speak.') }}", "Nobody may not speak"),
        ("{{ messages[7].role }}", "undefined|no element"),
        ("{{ ''.__class__.__mro__ }}", "'__class__' of 'str'.*unsafe"),
        ("{{ ''.__class__ }}", "unsafe"),
        ("{% if messages.__class__ %}{% endif %}", "unsafe"),
        ("{{ messages | attr('__class__') }}", "unsafe"),
        ("{{ raise_exception.__globals__ }}", "unsafe"),
        ("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "unsafe"),
        ("{{ self._TemplateReference__context }}", "unsafe"),
        ("{% for x in messages %}{% set _ = x.update(a=1) %}{% endfor %}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% for x in range(1000000) %}{% endfor %}", "too big"),
        ("{% for x in range(99999) %}{% for y in range(99999) %}{% endfor %}{% endfor %}", "1,000,000 rounds"),
        ("{{ 'a' * 100000000000000 }}", "MemoryError"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{% if %}", "Expected an expression"),
        ("{{ 1 // 0 }}", "division"),
    ],
)
def test_templates_that_refuse_or_misbehave(template: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"chat template refuses the messages.*({reason})"):
        TextTokenizer(byte_level(), template=template).render(MESSAGES)


def test_every_form_of_prompt(toy: ToyModel, files: list[Path]) -> None:
    tokenizer = TextTokenizer.open(files)
    model = CompiledModel(toy_engine(toy, max_context=500), vocab_size=300, tokenizer=tokenizer)
    assert tokenizer
    encoded, chat = tokenizer.encode("words"), tokenizer.chat(MESSAGES)
    cases = [
        ("words", [encoded]),
        (["words", "words"], [encoded] * 2),
        ([1, 2], [[1, 2]]),
        ((1, 2), [[1, 2]]),
        (torch.tensor([1, 2]), [[1, 2]]),
        ([*torch.tensor([1, 2])], [[1, 2]]),
        (torch.tensor([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (numpy.array([1, 2]), [[1, 2]]),
        (numpy.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        ([numpy.array([1, 2]), [3]], [[1, 2], [3]]),
        (range(1, 3), [[1, 2]]),
        ([[1], torch.tensor([3, 4]), "words", MESSAGES], [[1], [3, 4], encoded, chat]),
        (MESSAGES, [chat]),
        ([MESSAGES], [chat]),
    ]
    for prompts, expected in cases:
        assert [job.result().prompt_token_ids for job in model.generation_jobs(prompts, **DEFAULTS)] == expected, prompts


DEFAULTS = {"max_new_tokens": 1, "stop": (), "stop_token_ids": None, "logprobs": False}


@pytest.mark.parametrize(
    ("prompts", "reason"),
    [
        ([], "no prompt"),
        ([[]], "no token ids"),
        ("text", "no tokenizer"),
        (MESSAGES, "no tokenizer"),
        (MESSAGES[0], "list of messages"),
        ([61], "outside the vocabulary.*0 to 60"),
        ([[-1]], "outside the vocabulary"),
        ([1.5], "1.5"),
        ([[1, "a"]], "'a'"),
        (torch.zeros(3), "give integers"),
        ([*torch.zeros(3)], "give integers"),
        (torch.tensor(3), "give a text, token ids or messages"),
        (None, "The prompt is None"),
        (5, "The prompt is 5"),
        (b"abc", "The prompt is b'abc'"),
        ([b"abc"], r"bytes.*decode\(\)"),
        ([True, False], "hold True"),
        ({1, 2}, "give a text, token ids or messages"),
        ([None], "None"),
        (numpy.array([1.5]), "1.5"),
    ],
)
def test_prompts_that_are_refused(model: CompiledModel, prompts: object, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        model.generate(prompts)  # type: ignore[arg-type]


def test_text_that_is_no_text(toy: ToyModel, files: list[Path]) -> None:
    """Python keeps bytes that it cannot decode as lone surrogates, in arguments, file names and lax readers."""
    model = CompiledModel(toy_engine(toy, max_context=500), vocab_size=300, tokenizer=TextTokenizer.open(files))
    stray = b"caf\xe9".decode("utf-8", "surrogateescape")
    for prompt in (stray, ["fine", stray], [{"role": "user", "content": stray}]):
        with pytest.raises(UserError, match=r"'.udce9' at index \d+, which is no character.*UTF-8"):
            model.generate(prompt)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="has no tokens"):
        model.generate("")
    with pytest.raises(UserError, match="tokens, max_context is 500"):
        model.generate("a" * 501)
    assert not toy.steps


def test_a_template_that_is_no_text(files: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "chat_template.jinja"
    broken.write_bytes(b"{{ '\xff' }}")
    with pytest.raises(UserError, match=r"chat_template\.jinja cannot be read"):
        TextTokenizer.open([path for path in files if path.suffix == ".json"] + [broken])


def test_a_stream_takes_one_prompt(model: CompiledModel) -> None:
    with pytest.raises(UserError, match="2 prompts"):
        model.stream([tokens(2), tokens(3)])  # type: ignore[arg-type]
    assert len(split_prompts([tokens(2), tokens(3)])) == 2


def test_batches_that_are_refused(model: CompiledModel) -> None:
    row = torch.tensor([[1, 2, 3, 4]])
    ones = torch.ones(1, 4, dtype=torch.long)
    for mask in ([[1, 0, 1, 1]], [[0, 0, 0, 0]], [[1, 2, 1, 1]], [[1, 1, 1]], [[1] * 4] * 2, [[0.5, 1, 1, 1]]):
        with pytest.raises(UserError, match="attention_mask"):
            model.logits(row, attention_mask=torch.tensor(mask))
    for ids in ([], [[]], [[1], []], [1, 2], torch.tensor([1, 2]), torch.ones(1, 4), "ab", torch.zeros(0, 3, dtype=torch.long)):
        with pytest.raises(UserError, match="input_ids"):
            model.logits(ids)  # type: ignore[arg-type]
    for ids in ([[VOCAB]], [[-1]]):
        with pytest.raises(UserError, match="outside the vocabulary"):
            model.logits(ids)
    for places in ([[1, 2]], [[1, 2, 3, -4]], torch.ones(2, 4, dtype=torch.long), torch.ones(1, 4)):
        with pytest.raises(UserError, match="position_ids"):
            model.logits(row, position_ids=places, attention_mask=ones)
    with pytest.raises(UserError, match="attention_mask"):
        model.logits([[1, 2], [3]], attention_mask=torch.ones(2, 2, dtype=torch.long))


def test_rows_without_padding() -> None:
    rows, length = batch_rows(torch.tensor([[9, 1, 2, 9], [3, 4, 5, 6]]), 7, attention_mask=torch.tensor([[0, 1, 1, 0], [1] * 4]))
    assert length == 4
    assert [(row.tokens, row.positions, row.offset) for row in rows] == [
        ([1, 2], [1, 2], 1),
        ([3, 4, 5, 6], [0, 1, 2, 3], 0),
    ]
