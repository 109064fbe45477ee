"""A model that oxfuse has never heard of: a folder of its own, registered from outside, compiles and runs."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import oxfuse
from oxfuse.models import load_reference, register
from tests.parity.cases import assert_close

FILES = {
    "config.py": """
from dataclasses import dataclass
from typing import ClassVar

from oxfuse.models.configuration import Configuration, check
from oxfuse.models.rope_parameters import resolve


@dataclass(frozen=True, kw_only=True, init=False)
class PlainConfig(Configuration):
    model_type: ClassVar[str] = "plain"
    positive: ClassVar[tuple[str, ...]] = ("norm_eps",)

    vocab_size: int = 100
    hidden_size: int = 48
    num_hidden_layers: int = 2
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    intermediate_size: int = 80
    max_position_embeddings: int = 512
    norm_eps: float = 1e-6

    def __init__(self, /, **values):
        super().__init__(**values)

    def _validate(self):
        super()._validate()
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        check("num_key_value_heads", groups, heads % groups == 0, "a divisor of num_attention_heads")

    def _rotation(self, **rope):
        given = rope["rope_parameters"] or {}
        return resolve(
            given, kinds=("default", "yarn"), theta=500.0, max_position_embeddings=self.max_position_embeddings, model="plain"
        )
""",
    "model.py": """
import torch
import torch.nn.functional as F
from torch import nn

from oxfuse.models.heads import CausalLM
from oxfuse.models.outputs import BodyOutput
from oxfuse.models.precision import widened
from oxfuse.models.reference import Reference, RowsOutput, body_inputs, chosen, visible_keys
from oxfuse.models.rotary import RotaryEmbedding, rotate


class Norm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.scale, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        wide = widened(x)
        return (self.scale * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps))).to(x.dtype)


class Layer(nn.Module):
    def __init__(self, config, number):
        super().__init__()
        self.number, self.dim = number, config.hidden_size // config.num_attention_heads
        self.groups = config.num_attention_heads // config.num_key_value_heads
        kv = config.num_key_value_heads * self.dim
        self.before, self.after = (Norm(config.hidden_size, config.norm_eps) for _ in "ab")
        self.q = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.kv = nn.Linear(config.hidden_size, 2 * kv, bias=False)
        self.o = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x, rotation, visible, cache):
        normed, split = self.before(x), (*x.shape[:2], -1, self.dim)
        k, v = self.kv(normed).chunk(2, -1)
        q, k, v = (part.view(split).transpose(1, 2) for part in (self.q(normed), k, v))
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None:
            k, v = cache.update(k, v, self.number)
        k, v = (widened(part).repeat_interleave(self.groups, 1) for part in (k, v))
        scores = torch.matmul(widened(q), k.transpose(2, 3)) * self.dim**-0.5
        out = torch.matmul(torch.where(visible, scores, -torch.inf).softmax(-1), v).to(x.dtype)
        x = x + self.o(out.transpose(1, 2).flatten(2))
        gate, up = self.up(self.after(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class PlainModel(Reference):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, n) for n in range(config.num_hidden_layers))
        self.last = Norm(config.hidden_size, config.norm_eps)
        self.rope = RotaryEmbedding(config.rope_parameters, config.hidden_size // config.num_attention_heads)

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **_):
        given = body_inputs(self.embed, input_ids, None, position_ids, past_key_values, chosen(use_cache, True))
        x, rotation = given.hidden, self.rope(given.position_ids)
        visible = visible_keys(given.past, x.shape[1], attention_mask, {"all": None}, x.device)["all"]
        for layer in self.layers:
            x = layer(x, rotation, visible, given.cache)
        return BodyOutput(last_hidden_state=self.last(x), past_key_values=given.cache)

    def rows(self, input_ids, position_ids, logits_to_keep, **wanted):
        body = self(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        return RowsOutput(values=body.last_hidden_state[:, logits_to_keep])


class PlainForCausalLM(CausalLM):
    body_name, heads = "plain", ("unembed",)

    def __init__(self, config):
        body = PlainModel(config)
        super().__init__(config, body, body.embed)

    def forward(self, input_ids=None, labels=None, logits_to_keep=0, **inputs):
        return self.generate_logits(self.body(input_ids=input_ids, **inputs), labels, logits_to_keep, None)
""",
    "__init__.py": """
from oxfuse.models.contract import ModelContract
from oxfuse.models.tensor_finder import TensorFinder

from .config import PlainConfig
from .model import PlainForCausalLM, PlainModel


def tensor_sources(checkpoint, config, model, new_head=()):
    names = dict(body="plain.", embedding="plain.embed.weight", head="unembed.weight", heads=("unembed",))
    finder = TensorFinder(checkpoint=checkpoint, config=config, **names)
    return finder.find_all(model, isinstance(model, PlainModel), new_head)


CONTRACT = ModelContract(
    model_type="plain",
    parse_config=lambda config: PlainConfig(**config),
    tasks={"text-generation": PlainForCausalLM, "feature-extraction": PlainModel},
    tensor_sources=tensor_sources,
    fusions=("sink_attention", "rotary_embedding", "rms_norm"),
)
""",
}


@torch.no_grad()
def test_a_registered_family_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "plain_family"
    package.mkdir()
    for name, text in FILES.items():
        (package / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("oxfuse.models.contract._registered", {})
    family = importlib.import_module("plain_family")
    monkeypatch.setitem(sys.modules, "plain_family", family)
    register("plain", family.CONTRACT)

    torch.manual_seed(0)
    model = family.PlainForCausalLM(family.PlainConfig())
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file(dict(model.named_parameters()), folder / "model.safetensors")
    config = {**model.config.to_dict(), "architectures": ["PlainForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))

    reference = load_reference(folder)
    artifact = oxfuse.load(oxfuse.compile(folder, tmp_path / "artifact"))
    counts = {record.name: record.count for record in artifact.manifest.passes}
    assert (counts["sink_attention"], counts["rotary_embedding"], counts["rms_norm"]) == (2, 2, 5)
    ids = torch.randint(0, 100, (2, 70))
    assert_close(artifact.logits(ids), reference(ids).logits, "the third family")
    prompt, tokens = ids[0].tolist(), artifact.generate(ids[0].tolist(), max_new_tokens=40, stop_token_ids=[])[0].token_ids
    whole = reference(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    assert whole.argmax(-1).tolist() == tokens
