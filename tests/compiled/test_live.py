"""Modules that live in memory: the same artifact as from their checkpoint, unless their own forward says something else."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oxfuse
from oxfuse.errors import UserError
from oxfuse.models import load_reference

from .. import neox
from ..checkpoints import random_gpt_oss, transformers_model
from ..parity.cases import random_ids

FAST = {"target": "onnx-portable"}
BUNDLED = Path(__file__).parents[2] / "artifacts" / "tiny-gpt-oss"


def weights_of(artifact: Path) -> Any:
    return json.loads((artifact / "manifest.json").read_text())["weights"]


@pytest.mark.parametrize("target", ["onnx-portable", pytest.param("cpu", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["base", "neox"])
def test_transformers_module(compiled, name: str, target: str, tmp_path: Path) -> None:
    case, folder, artifact = compiled(name, target=target)
    theirs = case.transformers(folder, tmp_path).train()
    next(theirs.children()).eval()  # a frozen body
    before = {key: value.clone() for key, value in theirs.state_dict().items()}
    made = oxfuse.compile(theirs, tmp_path / "made", target=target)
    assert weights_of(made) == weights_of(artifact)
    assert torch.equal(oxfuse.load(made).logits(random_ids(case, 2, 50)), oxfuse.load(artifact).logits(random_ids(case, 2, 50)))
    source = json.loads((made / "manifest.json").read_text())["source"]
    assert (source["kind"], source["name"]) == ("module", type(theirs).__name__) and len(source["config_sha256"]) == 64
    assert theirs.training and not any(part.training for part in next(theirs.children()).modules())
    assert all(torch.equal(value, before[key]) for key, value in theirs.state_dict().items())


SELDOM = [
    pytest.param(task, marks=pytest.mark.slow) for task in ("text-generation", "token-classification", "feature-extraction")
]


@pytest.mark.parametrize("task", ["text-classification", "question-answering", *SELDOM])
def test_reference_with_any_head(task: str, tmp_path: Path) -> None:
    """The task is that of the class."""
    folder = neox.random_gpt_neox(tmp_path / "checkpoint", task=task)
    made = oxfuse.compile(load_reference(folder, task=task), tmp_path / "made", **FAST)
    assert weights_of(made) == weights_of(oxfuse.compile(folder, tmp_path / "same", task=task, **FAST))
    assert json.loads((made / "manifest.json").read_text())["model"]["task"] == task


def test_a_subclass_and_its_dtype(tmp_path: Path) -> None:
    model = transformers_model(random_gpt_oss(tmp_path / "checkpoint"), torch.bfloat16)

    class Mine(type(model)):  # type: ignore[misc]
        pass

    model.__class__ = Mine
    made = oxfuse.compile(model, tmp_path / "made", target="onnx", provider="cuda")
    manifest = json.loads((made / "manifest.json").read_text())
    assert (manifest["model"]["dtype"], manifest["source"]["name"]) == ("bfloat16", "Mine")


def changed(model: nn.Module, change: str) -> nn.Module:
    """Return the module with something else in its forward than its config says."""
    if change == "logits":
        model.lm_head.register_forward_hook(lambda module, inputs, out: out * 1.01)
    elif change == "rotation":
        model.model.rotary_emb.attention_scaling = 1.0
    return model


@pytest.mark.parametrize("change", ["logits", "rotation"])
def test_a_forward_that_says_something_else(change: str, tmp_path: Path) -> None:
    model = changed(transformers_model(random_gpt_oss(tmp_path / "checkpoint")), change)
    with pytest.raises(UserError, match=r"GptOssForCausalLM itself differs from the reference of gpt_oss with its weights by \d"):
        oxfuse.compile(model, tmp_path / "made", **FAST)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


class Told:
    def __init__(self, **told: Any) -> None:
        self.told = told

    def to_dict(self) -> dict[str, Any]:
        return self.told


def with_config(module: nn.Module, config: object) -> nn.Module:
    module.config = config  # type: ignore[assignment]
    return module


def on_meta(tmp_path: Path) -> nn.Module:
    return transformers_model(random_gpt_oss(tmp_path / "checkpoint")).to("meta")


def with_more(tmp_path: Path) -> nn.Module:
    model = transformers_model(random_gpt_oss(tmp_path / "checkpoint"))
    model.model.layers[0].self_attn.lora_a = nn.Linear(2, 2)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: nn.Linear(1, 1), "Linear has no config with a model_type"),
        (lambda _: with_config(nn.Linear(1, 1), SimpleNamespace(model_type="gpt_oss")), "Linear has no config"),
        (lambda _: with_config(nn.Linear(1, 1), Told(model_type="gpt2")), "gpt2"),
        (lambda _: with_config(nn.Linear(1, 1), Told(model_type="gpt_oss")), "config.json names the architecture Linear"),
        (on_meta, "GptOssForCausalLM holds no values for"),
        (with_more, r"The module.*lora_a"),
    ],
)
def test_modules_that_are_none(make: Any, message: str, tmp_path: Path) -> None:
    module = make(tmp_path)
    with pytest.raises(UserError, match=message):
        oxfuse.compile(module, tmp_path / "made", **FAST)
    assert not (tmp_path / "made").exists() and not (tmp_path / ".made.partial").exists()


class Speller:
    """A tokenizer that lives in memory."""

    def save_pretrained(self, folder: str) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (Path(folder) / name).write_bytes((BUNDLED / name).read_bytes())


@pytest.mark.parametrize("tokenizer", [pytest.param(BUNDLED, marks=pytest.mark.slow), Speller()], ids=["folder", "object"])
def test_the_tokenizer(tokenizer: Path | Speller, tmp_path: Path) -> None:
    made = oxfuse.compile(load_reference(BUNDLED), tmp_path / "made", tokenizer=tokenizer, **FAST)
    (found,) = oxfuse.load(made).generate("import", max_new_tokens=3)
    assert found.text and (made / "tokenizer.json").read_bytes() == (BUNDLED / "tokenizer.json").read_bytes()
    with pytest.raises(UserError, match="The tokenizer is a int: give its folder, or one that has save_pretrained"):
        oxfuse.compile(load_reference(BUNDLED), tmp_path / "other", tokenizer=3, **FAST)


def test_a_module_without_a_tokenizer_takes_ids(tmp_path: Path) -> None:
    ids: Tensor = torch.tensor([[1, 2, 3]])
    made = oxfuse.compile(load_reference(BUNDLED), tmp_path / "made", **FAST)
    assert (oxfuse.load(made).logits(ids) - load_reference(BUNDLED)(ids).logits).abs().max() < 1e-3
