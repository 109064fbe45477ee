"""GPT-OSS with other heads against transformers' classes in float32: values, losses and gradients, over many configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from oxfuse.models.gpt_oss import GptOssForSequenceClassification, GptOssForTokenClassification
from tests.checkpoints import random_gpt_oss
from tests.models.test_parity import CONFIGS, close, ids

LABELS = {"id2label": {"0": "O", "1": "B-PER", "2": "I-PER"}}
SOME = [name for name in CONFIGS if name != "truncate missing"]
CLASSES = [GptOssForSequenceClassification, GptOssForTokenClassification]


def pair(model: type[Any], folder: Path, **config: Any) -> tuple[nn.Module, nn.Module]:
    """Return our model with a random head, and transformers' of the same weights."""
    random_gpt_oss(folder, pad_token_id=3, **LABELS, **config)
    with pytest.warns(UserWarning, match="has no score"):
        ours = model.from_pretrained(folder)
    torch.manual_seed(0)
    for parameter in ours.score.parameters():
        nn.init.normal_(parameter, std=0.3)
    values = transformers.GptOssConfig(**json.loads((folder / "config.json").read_text()))
    theirs = getattr(transformers, model.__name__)._from_config(
        values, attn_implementation="eager", experts_implementation="eager"
    )
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs.eval()


@pytest.mark.parametrize("model", CLASSES)
@pytest.mark.parametrize("name", SOME)
def test_values_losses_and_gradients(name: str, model: type[Any], tmp_path: Path) -> None:
    """Rows padded on either side; the gradients of every parameter."""
    ours, theirs = pair(model, tmp_path, seed=len(name), **CONFIGS[name])
    tokens, mask = ids(3, 40), torch.ones(3, 40, dtype=torch.long)
    tokens[0, 30:], mask[0, 30:], tokens[1, :7], mask[1, :7] = 3, 0, 3, 0
    labels = torch.tensor([2, 0, 1]) if model is CLASSES[0] else tokens.masked_fill(mask == 0, -100).clamp(max=2)
    a, b = (each(tokens, attention_mask=mask, labels=labels) for each in (ours, theirs))
    shown = slice(None) if model is CLASSES[0] else mask.bool()
    close(a.logits[shown], b.logits[shown])
    assert abs(float(a.loss.detach() - b.loss.detach())) <= 1e-5 * max(1.0, float(b.loss.detach()))
    a.loss.backward()
    b.loss.backward()
    expected = dict(theirs.named_parameters())
    for parameter_name, parameter in ours.named_parameters():
        scale = max(1e-3, float(expected[parameter_name].grad.abs().max()))
        close(parameter.grad / scale, expected[parameter_name].grad / scale)


@pytest.mark.parametrize("model", CLASSES)
@torch.no_grad()
def test_outputs(model: type[Any], tmp_path: Path) -> None:
    ours, theirs = pair(model, tmp_path)
    tokens = ids(2, 25)
    out = ours(tokens, output_hidden_states=True, output_attentions=True)
    other = theirs(tokens, output_hidden_states=True, output_attentions=True)
    for kind in ("hidden_states", "attentions"):
        for x, y in zip(getattr(out, kind), getattr(other, kind), strict=True):
            close(x, y)
    assert (out.keys()[:2] == ["logits", "past_key_values"]) == (model is CLASSES[0])
    assert torch.equal(ours(tokens, return_dict=False)[0], out.logits)
    ours.save_pretrained(tmp_path / "saved")
    assert torch.equal(model.from_pretrained(tmp_path / "saved")(tokens).logits, out.logits)


def test_dropout_before_the_classifier_of_tokens(tmp_path: Path) -> None:
    """As transformers' generic head: classifier_dropout, else hidden_dropout, else 0.1; in training only."""
    for number, (config, expected) in enumerate([({}, 0.1), ({"classifier_dropout": 0.3}, 0.3), ({"hidden_dropout": 0.2}, 0.2)]):
        ours, theirs = pair(GptOssForTokenClassification, tmp_path / str(number), **config)
        assert ours.dropout.p == theirs.dropout.p == expected
