"""Every key of a GPT-NeoX config.json, old and new, against transformers' reading of it; each value that is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers

from oxfuse.errors import UserError
from oxfuse.models.contract import contracts, flavour
from oxfuse.models.gpt_neox import GPTNeoXConfig
from oxfuse.models.rotary import inverse_frequencies

ROPES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "old keys": {"rotary_pct": 0.5, "rotary_emb_base": 500},
    "new keys": {"rope_parameters": {"rope_type": "default", "rope_theta": 700.0, "partial_rotary_factor": 0.75}},
    "both": {"rotary_pct": 0.5, "rope_parameters": {"rope_type": "default", "rope_theta": 700.0}},
    "ignored keys": {"rope_theta": 123.0, "partial_rotary_factor": 1.0},
    "linear": {"rope_scaling": {"type": "linear", "factor": 3.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rotary_pct": 1.0},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, "rotary_pct": 0.5},
    "yarn without factor": {"rope_scaling": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 512}},
    "odd": {"hidden_size": 80, "num_attention_heads": 4},
}


@pytest.mark.parametrize("name", ROPES)
def test_the_rotation_is_transformers(name: str) -> None:
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding

    values = {"hidden_size": 128, "num_attention_heads": 4, **ROPES[name]}
    theirs = GPTNeoXRotaryEmbedding(transformers.GPTNeoXConfig(**json.loads(json.dumps(values))))
    config = GPTNeoXConfig(**json.loads(json.dumps(values)))
    table, scale = inverse_frequencies(config.rope_parameters, config.rotary_dim)
    assert torch.equal(table, theirs.inv_freq) and scale == theirs.attention_scaling
    assert GPTNeoXConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_defaults_are_transformers() -> None:
    ours, theirs = GPTNeoXConfig().to_dict(), transformers.GPTNeoXConfig().to_dict()
    ours.pop("attn_implementation")
    known = {name: value for name, value in ours.items() if name in theirs}
    assert known == {name: theirs[name] for name in known} and len(known) > 20


def test_labels() -> None:
    assert GPTNeoXConfig().id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert GPTNeoXConfig(num_labels=3).num_labels == 3
    assert GPTNeoXConfig(label2id={"b": 1, "a": 0}).id2label == {0: "a", 1: "b"}
    named = GPTNeoXConfig(id2label={"1": "b", "0": "a"}, num_labels=7)
    assert named.id2label == {0: "a", 1: "b"} and GPTNeoXConfig(**named.to_dict()) == named


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hidden_size": 65}, "hidden_size is 65; it must be a multiple of num_attention_heads, 4"),
        ({"hidden_act": "swish2"}, "hidden_act is 'swish2'; it must be one of gelu, gelu_fast"),
        ({"layer_norm_eps": 0}, "layer_norm_eps is 0"),
        ({"hidden_dropout": 1.0}, "hidden_dropout is 1.0; it must be below 1"),
        ({"rotary_pct": 1.5}, "rotary_pct is 1.5; it must be a part of the 16 dims"),
        ({"rotary_pct": 0.01}, "rotary_pct is 0.01"),
        ({"rotary_pct": "a"}, "rotary_pct is 'a'"),
        ({"rotary_emb_base": 1}, "rope_theta is 1; it must be a number above 1"),
        (
            {"rope_scaling": {"type": "llama3"}},
            "rope_type is 'llama3'; GPT-NeoX models turn by 'default', 'linear', 'dynamic' or",
        ),
        ({"rope_scaling": {"type": "linear"}}, "factor of rope_parameters is None"),
        ({"rope_scaling": {"type": "dynamic", "factor": 0.5}}, "factor of rope_parameters is 0.5; it must be at least 1"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}, "hidden_size": 80}, "an even number of dims under YaRN"),
        ({"rope_parameters": [1]}, "rope_parameters is \\[1\\]"),
        ({"num_labels": 0}, "num_labels is 0"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label .* numbered from 0"),
        ({"id2label": []}, "id2label is \\[\\]"),
        ({"problem_type": "guessing"}, "problem_type is 'guessing'"),
        ({"num_labels": 1, "problem_type": "single_label_classification"}, "problem_type .* only one label"),
        (
            {"attn_implementation": "flash_attention_2"},
            "attn_implementation is 'flash_attention_2'; it must be one of eager, sdpa",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"use_parallel_residual": 1}, "use_parallel_residual is 1; it must be true or false"),
        ({"model_type": "llama"}, "model_type is 'llama', not 'gpt_neox'"),
        ({"head_dim": 32}, "head_dim is 32"),
        ({"vocab_size": 0}, "vocab_size is 0"),
    ],
)
def test_impossible_values(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        GPTNeoXConfig(**{"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, **values})


def test_flavours() -> None:
    """Every released model by its name; parameter counts as their cards tell them."""
    counts = {"pythia-70m": 70_426_624, "pythia-410m": 405_334_016, "pythia-12b": 11_846_072_320, "gpt-neox-20b": 20_554_567_680}
    names = {name: contract for contract in contracts().values() for name in contract.flavours}
    assert {
        "gpt-oss-20b",
        "gpt-oss-120b",
        "gpt-neox-20b",
        *(f"pythia-{n}" for n in ["14m", "31m", "70m", "160m", "410m", "1b", "1.4b"]),
    } <= set(names)
    for name, contract in names.items():
        values = flavour(name)
        config = contract.parse_config(dict(values))
        with torch.device("meta"):
            model = contract.tasks[contract.task_of(values)](config)
        total = sum(p.numel() for p in model.parameters())
        assert counts.get(name, total) == total, (name, total)
        if name == "gpt-oss-20b":
            assert 20.9e9 < total < 20.92e9
        if name == "gpt-oss-120b":
            assert 116.8e9 < total < 116.9e9
    with pytest.raises(UserError, match="no model called 'pythia-3b' here; oxfuse has the shapes of gpt-neox-20b"):
        flavour("pythia-3b")
