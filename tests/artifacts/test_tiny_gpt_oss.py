"""The bundled checkpoint is what training.json says it is: a small real GPT-OSS that has learnt Python."""

from __future__ import annotations

import io
import json
import tokenize
from pathlib import Path

import jinja2
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from oxfuse.artifacts import train_tiny_gpt_oss
from oxfuse.artifacts.python_corpus import CHANNEL, END, END_OF_TEXT, MESSAGE, RETURN, SPECIAL_TOKENS, START, read_corpus
from oxfuse.artifacts.train_tiny_gpt_oss import mean_loss, model_config
from oxfuse.models import load_reference
from oxfuse.models.gpt_oss import GptOssConfig
from tests.checkpoints import transformers_model

FOLDER = Path(train_tiny_gpt_oss.__file__).parent / "tiny-gpt-oss"
RECORD = json.loads((FOLDER / "training.json").read_text())
PROMPTS = ("def read_file(path):", "class Parser:\n    def __init__(self", "    for name in names:\n        if")


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return load_reference(FOLDER).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@torch.no_grad()
def continuation(model: torch.nn.Module, tokenizer: Tokenizer, prompt: str, tokens: int) -> str:
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    for _ in range(tokens):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return tokenizer.decode(ids[0].tolist(), skip_special_tokens=False)


def test_folder_is_complete_and_small() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.jinja", "training.json", "README.md"),
    }
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8_000_000


def test_config_is_the_scripts_and_short_tests_cross_window_and_original_context(tokenizer: Tokenizer) -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert config == model_config(tokenizer)
    parsed = GptOssConfig(**config)
    assert parsed.sliding_window == 32 and list(parsed.layer_types) == ["sliding_attention", "full_attention"] * 2
    assert config["rope_scaling"]["original_max_position_embeddings"] == 128
    assert config["max_position_embeddings"] == 8 * 128
    generation = json.loads((FOLDER / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [tokenizer.token_to_id(RETURN), tokenizer.token_to_id(END_OF_TEXT)]


def test_tensors_are_mxfp4_experts_and_bf16() -> None:
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    for name, tensor in tensors.items():
        packed = name.endswith(("_blocks", "_scales"))
        assert tensor.dtype == (torch.uint8 if packed else torch.bfloat16), name
        if name.endswith("_scales"):
            assert int(tensor.min()) >= 2 and int(tensor.max()) <= 127, name
        if name.endswith("_blocks"):
            assert len(torch.cat([tensor & 15, tensor >> 4]).unique()) >= 15, f"{name} does not use the format's codes"
        if name.endswith("sinks"):
            assert float(tensor.float().abs().max()) > 0.05, f"{name} was not learnt"
    assert sum(name.endswith("_blocks") for name in tensors) == 2 * 4


@pytest.mark.parametrize(
    "text", ["", " ", "\n", "\t x\r\n  ", "a  b\n\n\n        c  # é漢字🙂\x00", "def f(x=1):\n\treturn __x__[-1]\n"]
)
def test_tokenizer_round_trips(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_tokenizer_knows_python_and_its_markers(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 2048
    for marker in SPECIAL_TOKENS:
        assert len(tokenizer.encode(marker).ids) == 1
    code = "def __init__(self, name):\n        self.name = name\n        return None\n"
    assert len(tokenizer.encode(code).ids) < len(code) / 3
    assert tokenizer.decode(tokenizer.encode(f"{START}x{END}").ids, skip_special_tokens=True) == "x"


def test_chat_template_renders_what_the_model_was_trained_on() -> None:
    source = (FOLDER / "chat_template.jinja").read_text()
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(source)
    asked = [{"role": "user", "content": "Write close(self)"}]
    prompt = f"{START}user{MESSAGE}Write close(self){END}{START}assistant"
    assert template.render(messages=asked, add_generation_prompt=True) == prompt
    answered = [*asked, {"role": "assistant", "thinking": "Close it.", "content": "def close(self): pass"}]
    assert template.render(messages=answered, add_generation_prompt=False) == (
        f"{prompt}{CHANNEL}analysis{MESSAGE}Close it.{END}{START}assistant{CHANNEL}final{MESSAGE}def close(self): pass{RETURN}"
    )


def test_transformers_reads_the_folder(model: torch.nn.Module, tokenizer: Tokenizer) -> None:
    theirs = transformers_model(FOLDER)
    ids = torch.tensor([RECORD["slice"]["token_ids"]])
    with torch.no_grad():
        expected, got = theirs(input_ids=ids).logits, model(input_ids=ids).logits
    assert float((expected - got).abs().max()) <= 1e-4 * max(1.0, float(expected.abs().max()))
    rendered = AutoTokenizer.from_pretrained(FOLDER).apply_chat_template(
        [{"role": "user", "content": "Write f()"}], add_generation_prompt=True, tokenize=False
    )
    assert rendered == f"{START}user{MESSAGE}Write f(){END}{START}assistant"


def test_recorded_loss_of_a_held_out_slice(model: torch.nn.Module, tokenizer: Tokenizer) -> None:
    ids = torch.tensor(RECORD["slice"]["token_ids"])
    assert tokenizer.decode(ids.tolist()) == RECORD["slice"]["text"]
    assert mean_loss(model, ids, len(ids)) == pytest.approx(RECORD["slice"]["loss"], abs=2e-4)


def test_export_lost_nothing_and_the_model_learnt() -> None:
    held_out = RECORD["held_out"]
    assert held_out["loss"] == pytest.approx(held_out["loss_in_training"], abs=1e-4)
    assert held_out["bits_per_byte"] < 2.0


@pytest.mark.slow
def test_held_out_loss_of_this_interpreters_library(model: torch.nn.Module, tokenizer: Tokenizer) -> None:
    corpus = read_corpus(RECORD["recipe"]["seed"])
    if corpus.digest() != RECORD["data"]["sha256"]:
        pytest.skip("the checkpoint was trained on another version of the standard library")
    ids = torch.tensor(tokenizer.encode(END_OF_TEXT.join(["", *corpus.held_out.values()])).ids)
    loss = mean_loss(model, ids, RECORD["recipe"]["length"])
    assert loss == pytest.approx(RECORD["held_out"]["loss"], abs=2e-4)


@torch.no_grad()
def test_experts_are_used(model: torch.nn.Module, tokenizer: Tokenizer) -> None:
    ids = torch.tensor([tokenizer.encode(Path(train_tiny_gpt_oss.__file__).read_text()).ids[:1024]])
    router_logits = model(input_ids=ids, output_router_logits=True).router_logits
    counts = torch.stack([torch.bincount(logits.topk(2).indices.flatten(), minlength=8) for logits in router_logits])
    assert int((counts > 0).sum()) >= 30, counts  # the card tells of two that training left idle
    assert float(counts.max() / counts.sum(-1).min()) < 0.45, counts  # half would be a token's first choice always


@pytest.mark.parametrize("prompt", [PROMPTS[0], *(pytest.param(prompt, marks=pytest.mark.slow) for prompt in PROMPTS[1:])])
def test_continuation_reads_as_python(model: torch.nn.Module, tokenizer: Tokenizer, prompt: str) -> None:
    text = continuation(model, tokenizer, prompt, 64)
    lines = text[: text.rindex("\n")].split("\n")  # whole lines only
    assert len(lines) > 2, text
    try:
        words = [token.string for token in tokenize.generate_tokens(io.StringIO("\n".join(lines)).readline)]
    except tokenize.TokenError as error:  # an open bracket or string at the end is no fault
        assert "EOF in multi-line" in str(error), text
        words = text.replace("(", " ").split()
    assert {"def", "return", "if", "import", "self", "raise", "for", "class"} & {*words}, text
