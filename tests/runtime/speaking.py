"""Tokenizer and chat template of a checkpoint that speaks harmony, and jobs that are told what their model says."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from oxfuse.runtime.generate import Generation, GenerationJob, generation_options
from oxfuse.runtime.harmony import find_markers
from oxfuse.runtime.sequence import TokenSequence
from oxfuse.runtime.tokenizer import TextTokenizer

from .test_text import byte_level

MARKERS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>", "<|endoftext|>")

TEMPLATE = """
{%- macro turn(head, text, end="<|end|>") -%}<|start|>{{ head }}<|message|>{{ text }}{{ end }}{%- endmacro -%}
{{- turn("system", "Reasoning: " + (reasoning_effort or "medium") + "\\nValid channels: analysis, commentary, final.") -}}
{%- set history = messages -%}
{%- if messages[0].role in ("system", "developer") -%}
    {{- turn("developer", messages[0].content) -}}
    {%- set history = messages[1:] -%}
{%- endif -%}
{%- set ns = namespace(last_final=-1, tool=none) -%}
{%- for message in history -%}
    {%- if message.role == "assistant" and not message.tool_calls -%}{%- set ns.last_final = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in history -%}
    {%- if message.role == "user" -%}
        {{- turn("user", message.content) -}}
    {%- elif message.role == "tool" -%}
        {%- if ns.tool is none -%}{{- raise_exception("A tool answers that was not called.") -}}{%- endif -%}
        {{- turn("functions." + ns.tool + " to=assistant<|channel|>commentary", message.content | tojson) -}}
    {%- elif message.tool_calls -%}
        {%- if message.content and message.thinking -%}{{- raise_exception("Both content and thinking.") -}}{%- endif -%}
        {%- if message.thinking and loop.index0 > ns.last_final -%}
            {{- turn("assistant<|channel|>analysis", message.thinking) -}}
        {%- endif -%}
        {%- set call = message.tool_calls[0].function -%}
        {{- turn("assistant to=functions." + call.name + "<|channel|>commentary json", call.arguments | tojson, "<|call|>") -}}
        {%- set ns.tool = call.name -%}
    {%- else -%}
        {%- if "<|channel|>" in message.content -%}{{- raise_exception("Markers in the content.") -}}{%- endif -%}
        {{- turn("assistant<|channel|>final", message.content) -}}
        {%- set ns.tool = none -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}
"""
"""Like that of the released checkpoints: earlier thoughts are dropped, except those that led to a call still being answered."""


def harmony_tokenizer(markers: Sequence[str] = MARKERS, template: str | None = TEMPLATE) -> TextTokenizer:
    tokenizer = byte_level(320)
    tokenizer.add_special_tokens([*markers])
    return TextTokenizer(tokenizer, template=template)


def run_job(
    tokenizer: TextTokenizer, prompt: list[int], said: Sequence[int], *, ends: Sequence[int] = (), **options: object
) -> tuple[Generation, GenerationJob]:
    """Let a job receive logits that say the tokens `said`, until it is done or they are at their end."""
    chosen = {"max_new_tokens": 1 << 20, "stop": (), "stop_token_ids": None, "logprobs": False, **options}
    job = GenerationJob(
        TokenSequence(1),
        prompt,
        generation_options(vocab_size=tokenizer.vocab_size, **chosen),  # type: ignore[arg-type]
        ends=frozenset(ends if chosen["stop_token_ids"] is None else chosen["stop_token_ids"]),
        max_context=1 << 30,
        tokenizer=tokenizer,
        markers=find_markers(tokenizer),
    )
    for token in said:
        if job.done:
            break
        logits = torch.zeros(1, tokenizer.vocab_size)
        logits[0, token] = 1
        job.receive([0], logits)
    return job.result(), job
