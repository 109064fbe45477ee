"""Old, new and original keys give the same configuration; what no model can have is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import GptOssConfig as TheirConfig

from oxfuse.errors import UserError
from oxfuse.models.gpt_oss import GptOssConfig

RELEASED = {
    "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
ORIGINAL_20B = {
    "num_hidden_layers": 24, "num_experts": 32, "experts_per_token": 4, "vocab_size": 201088, "hidden_size": 2880,
    "intermediate_size": 2880, "swiglu_limit": 7.0, "head_dim": 64, "num_attention_heads": 64, "num_key_value_heads": 8,
    "sliding_window": 128, "initial_context_length": 4096, "rope_theta": 150000, "rope_scaling_factor": 32.0, "rope_ntk_alpha": 1,
    "rope_ntk_beta": 32,
}  # fmt: skip


def test_defaults_are_those_of_transformers() -> None:
    ours, theirs = GptOssConfig().to_dict(), TheirConfig().to_dict()
    assert {k: v for k, v in ours["rope_parameters"].items() if k != "attention_factor"} == theirs.pop("rope_parameters")
    for name in ours.keys() & theirs.keys() - {"rope_parameters"}:
        assert ours[name] == theirs[name], name
    assert ours["layer_types"][:3] == ["sliding_attention", "full_attention", "sliding_attention"]


def test_three_kinds_of_keys_say_the_same() -> None:
    new = GptOssConfig(num_hidden_layers=24, num_local_experts=32, rope_parameters=RELEASED)
    scaling = {k: v for k, v in RELEASED.items() if k not in ("rope_theta", "rope_type")} | {"type": "yarn"}
    old = GptOssConfig(num_hidden_layers=24, num_experts=32, experts_per_token=4, rope_theta=150000.0, rope_scaling=scaling)
    original = GptOssConfig(**ORIGINAL_20B)
    assert new == old == original
    assert (original.max_position_embeddings, original.rms_norm_eps, original.num_experts) == (131072, 1e-5, 32)
    assert original.rope_parameters["attention_factor"] == pytest.approx(1.3465735902799727, rel=1e-15)


def test_ntk_alpha_is_beta_slow_and_ntk_beta_is_beta_fast() -> None:
    rope = GptOssConfig(**{**ORIGINAL_20B, "rope_ntk_alpha": 2, "rope_ntk_beta": 16}).rope_parameters
    assert (rope["beta_slow"], rope["beta_fast"], rope["truncate"]) == (2, 16, False)


@pytest.mark.parametrize(
    "values",
    [
        {"rope_scaling": None},
        {"rope_scaling": None, "rope_theta": 5000.0},
        {"rope_parameters": {}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}},
        {"rope_theta": 77.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "initial_context_length": 64},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 64},
        {"rope_scaling": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 0.5, "beta_fast": None, "original_max_position_embeddings": 64}},
        {"rope_parameters": RELEASED, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ],
    ids=str,
)
def test_rotation_is_resolved_as_in_transformers(values: dict[str, Any]) -> None:
    import torch
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

    from oxfuse.models.rotary import RotaryEmbedding

    values = {"max_position_embeddings": 1024, **values}
    theirs = GptOssRotaryEmbedding(TheirConfig(**json.loads(json.dumps(values))))
    ours = RotaryEmbedding(GptOssConfig(**values).rope_parameters, 64)
    assert torch.equal(ours.inv_freq, theirs.inv_freq) and ours.scale == pytest.approx(theirs.attention_scaling, rel=1e-15)


def test_to_dict_is_json_and_comes_back_equal() -> None:
    config = GptOssConfig(
        **ORIGINAL_20B, eos_token_id=[1, 2], transformers_version="4.56", quantization_config={"quant_method": "mxfp4"}
    )
    text = json.dumps(config.to_dict())
    assert GptOssConfig(**json.loads(text)) == config
    assert config.extra == {"transformers_version": "4.56", "quantization_config": {"quant_method": "mxfp4"}}
    assert config.to_dict()["eos_token_id"] == [1, 2]


def test_null_means_derived() -> None:
    config = GptOssConfig(head_dim=None, num_key_value_heads=None, layer_types=None, hidden_size=640, num_attention_heads=10)
    assert (config.head_dim, config.num_key_value_heads, len(config.layer_types)) == (64, 10, 36)
    free = GptOssConfig(sliding_window=None, layer_types=["full_attention"] * 36)
    assert free.sliding_window is None and free.window(0) is None and GptOssConfig().window(0) == 128


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "gpt_neox"}, "'gpt_neox', not 'gpt_oss'"),
        ({"hidden_size": 0}, "hidden_size is 0; it must be a positive whole number"),
        ({"hidden_size": "big"}, "hidden_size is 'big'"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"head_dim": 63}, "head_dim is 63; it must be even"),
        ({"num_key_value_heads": 7}, "a multiple of num_key_value_heads, 7"),
        ({"num_experts_per_tok": 129}, "at most num_local_experts, 128"),
        ({"num_experts": 4, "num_local_experts": 8}, "num_experts is 4 but num_local_experts is 8"),
        ({"experts_per_token": 2, "num_experts_per_tok": 4}, "experts_per_token is 2"),
        ({"layer_types": ["full_attention"]}, "one entry for each of the 36 layers"),
        ({"layer_types": ["full_attention"] * 35 + ["chunked"]}, "layer_types is"),
        ({"layer_types": 3}, "layer_types is 3"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"sliding_window": None}, "sliding_window is None"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"swiglu_limit": -1.0}, "swiglu_limit is -1.0"),
        ({"attention_dropout": 1.0}, "attention_dropout is 1.0; it must be below 1"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ({"pad_token_id": 201088}, "pad_token_id is 201088"),
        ({"rope_parameters": [1]}, "rope_parameters is"),
        ({"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}, "one object for all layers"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        ({"rope_scaling": {"type": "llama3"}}, "rope_type is 'llama3'"),
        ({"rope_theta": 1.0}, "rope_theta is 1.0"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor of rope_parameters is None"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": -2}}, "factor of rope_parameters is -2"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "truncate": "yes"}}, "truncate is 'yes'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "beta_fast": "x"}}, "beta_fast is 'x'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "attention_factor": 0}}, "attention_factor is 0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "mscale": "x", "mscale_all_dim": 1}}, "mscale is 'x'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 0}}, "original_max"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({**ORIGINAL_20B, "rope_scaling_factor": "x"}, "rope_scaling_factor is 'x'"),
        ({**ORIGINAL_20B, "initial_context_length": 0}, "initial_context_length is 0"),
    ],
)
def test_impossible_values_are_refused_by_name(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        GptOssConfig(**values)
    assert words in str(caught.value)
