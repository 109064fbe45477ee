"""What is mutated, and what is then done with it: everything that oxfuse would do, up to where it becomes slow.

A subject is a kind of file. `prepare` writes the healthy folders once; `stage` puts a mutant of one file into a copy of its
folder; `run` does the work. A fault is any exception but UserError; the worker sees to crashes, time and memory.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

from oxfuse.errors import UserError

from ..checkpoints import random_gpt_oss
from .mutations import mutate, mutate_header

SUBJECTS = ("config", "index", "header", "tokenizer", "manifest")
TINY = dict(
    num_hidden_layers=2, num_local_experts=4, hidden_size=32, intermediate_size=32, vocab_size=64, max_position_embeddings=64
)
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('none') }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message.content | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}{% for tool in tools or [] %}{{ tool | tojson(indent=2) }}{% endfor %}"
)
MESSAGES = [
    {"role": "user", "content": " Grüße, 世界 👋 "},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "1"},
]
MOST_CHARACTERS = 2000
"""Longest message of an error that a person still reads."""


def prepare(base: Path, artifact: Path | None) -> None:
    """Write the healthy folders of all subjects into `base`."""
    random_gpt_oss(base / "config-hf", **TINY)
    random_gpt_oss(base / "config-old", **TINY, old_keys=True, tie_word_embeddings=True)
    random_gpt_oss(base / "config-mxfp4", layout="mxfp4", **TINY)
    shutil.move(random_gpt_oss(base / "written", layout="original", **TINY), base / "config-original")
    for name in ("hf", "mxfp4"):
        folder = random_gpt_oss(base / f"index-{name}", layout=name, shards=2, **TINY)
        shutil.copytree(folder, base / f"header-{name}")
    folder = random_gpt_oss(base / "tokenizer", **TINY)
    _write_tokenizer(folder)
    if artifact is not None:
        shutil.copytree(artifact, base / "manifest")


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("\u00a0", " ")])
    words = pre_tokenizers.Split(Regex(r"[^\s\p{L}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special)
    tokenizer.train_from_iterator(["Grüße, 世界! naïve café, plain words and more plain words. " * 3], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": {"content": "<s>", "special": True},
        "eos_token": "</s>",
        "chat_template": TEMPLATE,
        "model_max_length": 64,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "</s>", "bos_token": "<s>"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3], "bos_token_id": 0, "pad_token_id": 1}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def subject_of(seed: int) -> str:
    """Return which kind of file the mutant of this number is."""
    return SUBJECTS[seed % len(SUBJECTS)]


def stage(seed: int, base: Path, work: Path) -> Path:
    """Write the mutant with this number under `work` and return its folder; whatever was there goes."""
    rng, subject = random.Random(seed), subject_of(seed)
    source = rng.choice(sorted(path for path in base.iterdir() if path.name.split("-")[0] == subject))
    patterns = {"config": "config.json", "index": "*.index.json", "header": "*.safetensors", "manifest": "manifest.json"}
    if subject == "tokenizer":
        names = ["tokenizer.json"] * 5 + ["tokenizer_config.json"] * 2 + ["chat_template.jinja"] * 2
        name = rng.choice([*names, "special_tokens_map.json", "generation_config.json", "generation_config.json"])
    else:
        name = rng.choice(sorted(path.name for path in source.glob(patterns[subject])))
    data = (source / name).read_bytes()
    mutant = (mutate_header if subject == "header" else mutate)(data, rng)
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(source, work, copy_function=os.link)  # one inode for all copies: a program is opened once
    (work / name).unlink()
    (work / name).write_bytes(mutant)
    if name == "tokenizer_config.json":
        (work / "chat_template.jinja").unlink()  # else the template in the configuration is not read
    return work


def run(seed: int, folder: Path) -> str:
    """Do with the mutant what oxfuse does; return "fine", or the UserError's message after "refused: "."""
    try:
        {"tokenizer": _use_tokenizer, "manifest": _use_artifact}.get(subject_of(seed), _use_checkpoint)(folder)
    except UserError as error:
        text = str(error)
        assert len(" ".join(text.split())) <= MOST_CHARACTERS, f"a message of {len(text)} characters: {text:.200}"
        return f"refused: {text}"
    return "fine"


def _use_checkpoint(folder: Path) -> None:
    from oxfuse.compiler import golden
    from oxfuse.compiler.options import CompileOptions
    from oxfuse.compiler.plan import make_plan
    from oxfuse.compiler.source import open_source
    from oxfuse.models.virtual import virtual_model

    golden.TOKENS = 24
    checkpoint, fingerprint = open_source(folder)
    plan = make_plan(checkpoint, CompileOptions(), fingerprint)
    assert 0 < plan.expected_bytes() < 1 << 50 and plan.step_limits.table < 1 << 40
    virtual_model(plan.contract, plan.config, plan.task, plan.dtype)
    for source in plan.sources.values():
        source.read(slice(0, 1))
        for part in source.parts().values():
            part.read()
    with scratch(folder) as place:
        golden.write_golden(
            place / "golden", contract=plan.contract, config=plan.config, task=plan.task, sources=plan.sources,
            max_context=plan.limits.max_context,
        )  # fmt: skip


def _use_tokenizer(folder: Path) -> None:
    from oxfuse.compiler.options import CompileOptions
    from oxfuse.compiler.plan import make_plan
    from oxfuse.compiler.source import open_source
    from oxfuse.runtime.tokenizer import TextTokenizer

    checkpoint, fingerprint = open_source(folder)
    plan = make_plan(checkpoint, CompileOptions(), fingerprint)
    tokenizer = TextTokenizer.open(plan.tokenizer_files)
    if tokenizer is None:
        return
    ids = tokenizer.encode("<s> Grüße, 世界! plain words\n\n 1234 \0 \u00a0</s>")
    tokenizer.decode(ids)
    tokenizer.decode([*range(300), 10**9], skip_special_tokens=False)
    for token in range(0, 290, 30):
        tokenizer.decode([token])
    tokenizer.token_id("</s>")
    if tokenizer.has_chat_template:
        tokenizer.chat(MESSAGES)


def _use_artifact(folder: Path) -> None:
    from oxfuse.__main__ import run as run_command
    from oxfuse.runtime.artifact import load

    for options in ([], ["--json"]):
        with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")):
            code = run_command(["inspect", str(folder), *options])
        assert code in (0, 2), f"inspect ends with {code}"
    model = load(folder)
    assert model.manifest and model.config is not None
    model.generate([[1, 2, 3]], max_new_tokens=2)


@contextlib.contextmanager
def scratch(folder: Path) -> Any:
    """A folder beside the mutant's; afterwards nothing has been added to the mutant's own."""
    before = sorted(folder.iterdir())
    place = folder.parent / "scratch"
    place.mkdir(exist_ok=True)
    yield place
    shutil.rmtree(place)
    assert sorted(folder.iterdir()) == before
