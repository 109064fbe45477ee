"""The model that `load` returns: the public face of the runtime. Prompts enter; text, logits, labels or hidden states leave."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from oxfuse.runtime.engine import Engine
from oxfuse.runtime.errors import UserError
from oxfuse.runtime.generate import (
    Chunk,
    Generation,
    GenerationJob,
    GenerationOptions,
    Prompt,
    Stream,
    generation_options,
    prompt_tokens,
    split_prompts,
    stream_in_thread,
)
from oxfuse.runtime.harmony import find_markers
from oxfuse.runtime.heads import (
    Answer,
    Classification,
    Embedding,
    Tagging,
    Text,
    classification,
    encode_texts,
    tagging,
    windows,
)
from oxfuse.runtime.heads import answer as find_answer
from oxfuse.runtime.inputs import Batch, BatchRow, TokenIds, batch_rows
from oxfuse.runtime.manifest import GenerationSpec, Manifest, ModelSpec
from oxfuse.runtime.scheduler import Job, Scheduler
from oxfuse.runtime.sequence import TokenSequence
from oxfuse.runtime.session import Session
from oxfuse.runtime.tokenizer import TextTokenizer


class _LogitsJob(Job):
    """Writes logits to their places in the result: `places` maps an index in the sequence to one in `out`."""

    def __init__(self, sequence: TokenSequence, row: BatchRow, places: Mapping[int, int], out: Tensor) -> None:
        super().__init__(sequence, rows="all" if len(places) == len(row.tokens) else frozenset(places))
        sequence.append(row.tokens, row.positions)
        self._places, self._out, self._last = places, out, max(places)

    def receive(self, indices: Sequence[int], logits: Tensor) -> None:
        self._out[[self._places[index] for index in indices]] = logits
        self.done = self._last in indices


class CompiledModel:
    """A model that is ready to run. Any number of threads may use it; their work shares the steps.

    `with oxfuse.load(path) as model:` closes it at the end; one that is dropped goes with its last user.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        vocab_size: int,
        width: int | None = None,
        generation: GenerationSpec | None = None,
        tokenizer: TextTokenizer | None = None,
        manifest: Manifest | None = None,
        report: dict[str, Any] | None = None,
    ) -> None:
        """Wrap an engine. `load` does this for an artifact; without a manifest any `step` callable can be run the same way.

        `width` is how many values the step gives for a token, `vocab_size` by default.
        """
        self.scheduler = Scheduler(engine)
        self.width = vocab_size if width is None else width
        self.vocab_size, self.tokenizer, self.report = vocab_size, tokenizer, report
        self._manifest = manifest
        self._pooled = manifest is not None and manifest.model.pooling == "rightmost"
        self._pad: int | None = manifest.model.config.get("pad_token_id") if manifest else None
        self._eos = frozenset(generation.eos_token_ids if generation else ())
        self._markers = find_markers(tokenizer) if tokenizer else None

    def close(self) -> None:
        """Give memory back: caches, program, mapped weights. What runs in other threads ends with a UserError.

        Closing twice is allowed; to generate, or to use a session, raises UserError afterwards.
        """
        self.scheduler.close()

    def __enter__(self) -> CompiledModel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def manifest(self) -> Manifest:
        """The artifact's manifest. Raises UserError for a model that was not loaded from an artifact."""
        if self._manifest is None:
            raise UserError("This model was not loaded from an artifact, so it has no manifest.")
        return self._manifest

    @property
    def config(self) -> dict[str, Any]:
        """The checkpoint's configuration as oxfuse understood it."""
        return self.manifest.model.config

    @property
    def reused_tokens(self) -> int:
        """Tokens that did not run, since the model was loaded, because another sequence began with the same ones.

        Their keys and values were found in the cache; see `prefix_cache_bytes` of `oxfuse.load`.
        """
        return self.scheduler.engine.reused_tokens

    @property
    def max_context(self) -> int:
        """Longest sequence, prompt and generated tokens together."""
        return self.scheduler.engine.limits.max_context

    def logits(
        self,
        input_ids: Batch,
        *,
        position_ids: Batch | None = None,
        attention_mask: Batch | None = None,
        on_step: Callable[[], object] | None = None,
    ) -> Tensor:
        """Return the logits of every token, float32 [B, S, vocab]; of a model with another head what that gives.

        Tags [B, S, labels], spans [B, S, 2] (start and end), bare models [B, S, hidden]; classifiers of sequences [B, labels],
        which is what they say about the rightmost token that is not the configuration's padding token, whatever the mask.

        `input_ids` is [B, S] of integers, or B lists of any lengths, padded on the right. Tokens outside the run of ones in a row
        of `attention_mask` [B, S] are not run, and their logits are 0. `position_ids` [B, S] or [1, S] default to arange(S), pads
        counted. `on_step` is called after every step, for progress. Raises UserError where something does not fit.
        """
        rows, length = batch_rows(input_ids, self.vocab_size, position_ids, attention_mask)
        if (longest := max(len(row.tokens) for row in rows)) > self.max_context:
            raise UserError(
                f"A row has {longest} tokens, max_context is {self.max_context}: shorten it, or compile with a larger one."
            )
        if self._pooled:
            out = torch.zeros(len(rows), 1, self.width)
            picks = [{self._pooled_index(input_ids[n], row, n): 0} for n, row in enumerate(rows)]
        else:
            out = torch.zeros(len(rows), length, self.width)
            picks = [{i: row.offset + i for i in range(len(row.tokens))} for row in rows]
        jobs = [
            _LogitsJob(self.scheduler.engine.sequence(), row, places, out[n])
            for n, (row, places) in enumerate(zip(rows, picks, strict=True))
        ]
        self.scheduler.run(jobs, on_step)
        return out[:, 0] if self._pooled else out

    def _pooled_index(self, padded: TokenIds, row: BatchRow, number: int) -> int:
        """Return which of the row's tokens a classifier of sequences looks at: the padded row's rightmost that is no padding."""
        ids = [int(token) for token in padded]
        last = next((i for i in reversed(range(len(ids))) if ids[i] != self._pad), 0) if self._pad is not None else len(ids) - 1
        if not 0 <= last - row.offset < len(row.tokens):
            if self._pad is None:
                what = "the model has no padding token, so it looks at the row's last token"
                remedy = "Give rows without padding: they may have any lengths"
            else:
                what = f"the rightmost token that is not padding ({self._pad})"
                remedy = f"Give a mask that shows it, or {self._pad} where the mask is 0"
            raise UserError(f"Row {number}: {what}, at index {last}, which attention_mask hides. {remedy}.")
        return last - row.offset

    def row_logits(
        self, tokens: TokenIds, positions: TokenIds, rows: Sequence[int], on_step: Callable[[], object] | None = None
    ) -> Tensor:
        """Run one sequence and return what it says about the tokens at the indices `rows` alone, float32 [len(rows), width].

        Saves the memory and the time of the head for the others. `rows` are distinct. Raises UserError as `logits` does.
        """
        ((row,), _) = batch_rows([tokens], self.vocab_size, [positions])
        if not rows or len(set(rows)) < len(rows) or not 0 <= min(rows) <= max(rows) < len(row.tokens) <= self.max_context:
            raise UserError(f"rows are not distinct indices into {len(row.tokens)} tokens, of at most {self.max_context}.")
        out = torch.empty(len(rows), self.width)
        places = {index: place for place, index in enumerate(rows)}
        self.scheduler.run([_LogitsJob(self.scheduler.engine.sequence(), row, places, out)], on_step)
        return out

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] | None = None,
        logprobs: bool = False,
    ) -> list[Generation]:
        """Continue each prompt and return one Generation per prompt, in order.

        A prompt is a text, token ids, or messages for the chat template; `prompts` is one or a list of them. `temperature` 0 is
        greedy. Every prompt samples from its own generator seeded with `seed`, so its tokens do not depend on the others; equal
        prompts with equal seeds are equal. `stop_token_ids` [] never stops, None means the checkpoint's own. The penalty, the
        temperature, top_k, top_p and min_p apply in this order, each as in transformers. Raises UserError for a prompt or an
        option that does not fit, before anything is run.
        """
        jobs = self.generation_jobs(
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            stop_token_ids=stop_token_ids,
            logprobs=logprobs,
        )
        self.scheduler.run([job for job in jobs if not job.done])
        return [job.result() for job in jobs]

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] | None = None,
        logprobs: bool = False,
    ) -> Iterator[Chunk]:
        """Continue one prompt and return its chunks as they come, one a token; the options are `generate`'s.

        The texts add up to the text of `generate`, and those of a channel to the text of that channel. Raises UserError at the
        call, not at the first chunk.
        """
        return self._stream(
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            stop_token_ids=stop_token_ids,
            logprobs=logprobs,
        )

    def astream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] | None = None,
        logprobs: bool = False,
    ) -> AsyncIterator[Chunk]:
        """Do what `stream` does for an event loop: steps run in a worker thread, and the loop goes on between them."""
        stream = self._stream(
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            stop_token_ids=stop_token_ids,
            logprobs=logprobs,
        )
        return stream_in_thread(stream)

    def classify(self, texts: Text | Sequence[Text]) -> list[Classification]:
        """Tell each text's label. `texts` is one text (or its token ids) or a list of them.

        Raises UserError unless the artifact was compiled for text-classification, and for a text that is empty or too long.
        """
        spec = self._spec("text-classification", "classify")
        encoded = encode_texts(texts, self.tokenizer, self.vocab_size, self.max_context)
        return [classification(values[0], spec) for values in self._values([entry.ids for entry in encoded])]

    def tag(self, texts: Text | Sequence[Text]) -> list[Tagging]:
        """Tell the label of each token of each text, and the entities that they make up. Arguments and errors as `classify`'s."""
        spec = self._spec("token-classification", "tag")
        encoded = encode_texts(texts, self.tokenizer, self.vocab_size, self.max_context)
        values = self._values([entry.ids for entry in encoded])
        return [tagging(entry, value, spec.labels) for entry, value in zip(encoded, values, strict=True)]

    def answer(self, question: str, context: str, *, max_answer_tokens: int = 30, top_k: int = 1) -> Answer:
        """Find the span of `context` that answers `question`, and `top_k` - 1 alternatives, best first.

        A context longer than `max_context` is read in overlapping windows. Raises UserError unless the artifact was compiled for
        question-answering, and for a text without tokens.
        """
        self._spec("question-answering", "answer")
        for name, number in (("max_answer_tokens", max_answer_tokens), ("top_k", top_k)):
            if type(number) is not int or number < 1:
                raise UserError(f"{name} is {number!r}: give a whole number >= 1.")
        parts = windows(question, context, self.tokenizer, self.vocab_size, self.max_context)
        values = self._values([part.ids for part in parts])
        return find_answer(context, parts, values, most_tokens=max_answer_tokens, top_k=top_k)

    def embed(self, texts: Text | Sequence[Text]) -> list[Embedding]:
        """Return the last hidden state of each text's tokens. Arguments and errors as `classify`'s."""
        self._spec("feature-extraction", "embed")
        encoded = encode_texts(texts, self.tokenizer, self.vocab_size, self.max_context)
        values = self._values([entry.ids for entry in encoded])
        return [
            Embedding(token_ids=entry.ids, offsets=entry.offsets, hidden=value)
            for entry, value in zip(encoded, values, strict=True)
        ]

    def _spec(self, task: str, what: str) -> ModelSpec:
        """Return the manifest's description. Raises UserError if the artifact is for another task than `task`."""
        spec = self.manifest.model
        if spec.task != task:
            raise UserError(f"The artifact is for {spec.task}, which cannot {what}: compile with --task {task}.")
        return spec

    def _values(self, sequences: Sequence[list[int]]) -> list[Tensor]:
        """Return what the model gives for each sequence, float32 [T, width]; [1, width] for a classifier of sequences."""
        outs: list[Tensor] = []
        jobs = []
        for ids in sequences:
            row = BatchRow(tokens=ids, positions=list(range(len(ids))), offset=0)
            places = {self._pooled_index(ids, row, len(outs)): 0} if self._pooled else {i: i for i in range(len(ids))}
            outs.append(torch.zeros(len(places), self.width))
            jobs.append(_LogitsJob(self.scheduler.engine.sequence(), row, places, outs[-1]))
        self.scheduler.run(jobs)
        return outs

    def session(self) -> Session:
        """Open a session: the caller feeds tokens and gets logits."""
        return Session(self.scheduler, self.vocab_size)

    def generation_jobs(self, prompts: Prompt | Sequence[Prompt], **options: Any) -> list[GenerationJob]:
        """Return one job per prompt for `scheduler.run`; `options` are all of `generate`'s, as are the errors."""
        chosen = self.generation_options(**options)
        tokens = [prompt_tokens(p, self.tokenizer, self.vocab_size, self.max_context) for p in split_prompts(prompts)]
        return [self.generation_job(prompt, chosen) for prompt in tokens]

    def generation_options(self, **options: Any) -> GenerationOptions:
        """Return the checked options, all of `generate`'s. Raises UserError naming the one that does not fit."""
        if self._manifest is not None:
            self._spec("text-generation", "generate")
        chosen = generation_options(vocab_size=self.vocab_size, **options)
        if chosen.stop and self.tokenizer is None:
            raise UserError("stop strings need a tokenizer, which this artifact lacks: use stop_token_ids.")
        return chosen

    def generation_job(
        self, prompt: list[int], options: GenerationOptions, *, sequence: TokenSequence | None = None, **extra: Any
    ) -> GenerationJob:
        """Return a job that continues checked tokens, in a new sequence or in one that holds the first of them already.

        `extra` goes to the job as it is.
        """
        return GenerationJob(
            self.scheduler.engine.sequence() if sequence is None else sequence,
            prompt,
            options,
            ends=self._eos if options.stop_token_ids is None else options.stop_token_ids,
            max_context=self.max_context,
            tokenizer=self.tokenizer,
            markers=self._markers,
            **extra,
        )

    def _stream(self, prompt: Prompt, **options: Any) -> Stream:
        jobs = self.generation_jobs(prompt, **options)
        if len(jobs) != 1:
            raise UserError(f"There are {len(jobs)} prompts: a stream takes one. Use generate for several.")
        return Stream(self.scheduler, jobs[0])
