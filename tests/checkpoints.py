"""Random GPT-OSS checkpoints for tests, and transformers' model of the same weights.

Nothing here uses oxfuse: what a checkpoint means is said a second time, by way of transformers, so that a mistake in the reader
shows. Weights are scaled so that logits have a standard deviation of about 2 and greedy text stays diverse.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Layout = Literal["hf", "mxfp4", "original", "original-dense"]

TINY: dict[str, Any] = {
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "num_hidden_layers": 3,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": 19,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "router_aux_loss_coef": 0.9,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 96,
    },
}
"""Three layers (sliding, full, sliding); a window of 19 and an original context of 96 tokens, so that short tests cross both."""

_E2M1_RMS = math.sqrt(sum(v * v for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)) / 8)
_GAIN = 1.5


def random_gpt_oss(
    folder: Path,
    *,
    layout: Layout = "hf",
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    old_keys: bool = False,
    **config: Any,
) -> Path:
    """Write a checkpoint and return its folder, which for the original layouts is `folder / "original"`.

    `config` overrides TINY, in transformers 5's keys; an override of `rope_parameters` replaces single entries. The same seed
    gives the same weights in "hf" and "original-dense", and in "mxfp4" and "original". `old_keys` writes transformers 4's
    config.json.
    """
    rope = {**TINY["rope_parameters"], **config.pop("rope_parameters", {})}
    full = {**TINY, **config, "rope_parameters": rope}
    tensors = _weights(full, layout in ("mxfp4", "original"), dtype, seed)
    if layout.startswith("original"):
        folder = folder / "original"
        tensors, full = _original_tensors(full, tensors), _original_config(full)
    else:
        if layout == "mxfp4":
            full["quantization_config"] = {
                "quant_method": "mxfp4",
                "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
            }
        if old_keys:
            rope = full.pop("rope_parameters")
            full |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "experts_per_token": full["num_experts_per_tok"]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(full, indent=2))
    save_tensors(folder, tensors, shards)
    return folder


def _weights(config: dict[str, Any], mxfp4: bool, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    heads, kv_heads = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
    out: dict[str, Tensor] = {}

    def normal(name: str, *shape: int, std: float, mean: float = 0.0) -> None:
        out[name] = (torch.randn(shape, generator=generator) * std + mean).to(dtype)

    def linear(name: str, rows: int, columns: int, bias: bool = True) -> None:
        normal(f"{name}.weight", rows, columns, std=_GAIN * columns**-0.5)
        if bias:
            normal(f"{name}.bias", rows, std=0.2)

    def matrices(name: str, rows: int, columns: int) -> None:
        std = _GAIN * rows**-0.5
        if not mxfp4:
            return normal(name, experts, rows, columns, std=std)
        groups = (experts, columns, rows // 32)
        exponent = round(math.log2(std / _E2M1_RMS)) + 127
        out[f"{name}_blocks"] = torch.randint(0, 256, (*groups, 16), generator=generator).to(torch.uint8)
        out[f"{name}_scales"] = torch.randint(exponent - 1, exponent + 2, groups, generator=generator).to(torch.uint8)
        return None

    tied = config["tie_word_embeddings"]
    normal("model.embed_tokens.weight", config["vocab_size"], hidden, std=2 * hidden**-0.5 if tied else 1.0)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        normal(f"{layer}.input_layernorm.weight", hidden, std=0.2, mean=1.0)
        normal(f"{layer}.post_attention_layernorm.weight", hidden, std=0.2, mean=1.0)
        normal(f"{layer}.self_attn.sinks", config["num_attention_heads"], std=1.0)
        bias = config.get("attention_bias", True)
        for p, rows, columns in (("q", heads, hidden), ("k", kv_heads, hidden), ("v", kv_heads, hidden), ("o", hidden, heads)):
            linear(f"{layer}.self_attn.{p}_proj", rows, columns, bias)
        linear(f"{layer}.mlp.router", experts, hidden)
        matrices(f"{layer}.mlp.experts.gate_up_proj", hidden, 2 * inner)
        normal(f"{layer}.mlp.experts.gate_up_proj_bias", experts, 2 * inner, std=0.2)
        matrices(f"{layer}.mlp.experts.down_proj", inner, hidden)
        normal(f"{layer}.mlp.experts.down_proj_bias", experts, hidden, std=0.2)
    normal("model.norm.weight", hidden, std=0.2, mean=1.0)
    if not tied:
        normal("lm_head.weight", config["vocab_size"], hidden, std=2 * hidden**-0.5)
    return out


def _original_tensors(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {
        "embedding.weight": tensors["model.embed_tokens.weight"],
        "norm.scale": tensors["model.norm.weight"],
        "unembedding.weight": tensors["lm_head.weight"],
    }
    for i in range(config["num_hidden_layers"]):
        old, new = f"model.layers.{i}", f"block.{i}"
        attention, mlp = f"{old}.self_attn", f"{old}.mlp"
        out[f"{new}.attn.norm.scale"] = tensors[f"{old}.input_layernorm.weight"]
        out[f"{new}.attn.sinks"] = tensors[f"{attention}.sinks"]
        out[f"{new}.mlp.norm.scale"] = tensors[f"{old}.post_attention_layernorm.weight"]
        for kind in ("weight", "bias"):
            out[f"{new}.attn.qkv.{kind}"] = torch.cat([tensors[f"{attention}.{p}_proj.{kind}"] for p in "qkv"])
            out[f"{new}.attn.out.{kind}"] = tensors[f"{attention}.o_proj.{kind}"]
            out[f"{new}.mlp.gate.{kind}"] = tensors[f"{mlp}.router.{kind}"]
        for number, name in ((1, "gate_up_proj"), (2, "down_proj")):
            stored = f"{mlp}.experts.{name}"
            out[f"{new}.mlp.mlp{number}_bias"] = tensors[f"{stored}_bias"]
            if stored in tensors:
                out[f"{new}.mlp.mlp{number}_weight"] = tensors[stored].transpose(1, 2)
            else:
                for part in ("blocks", "scales"):
                    out[f"{new}.mlp.mlp{number}_weight.{part}"] = tensors[f"{stored}_{part}"]
    return {name: tensor.contiguous() for name, tensor in out.items()}


def _original_config(config: dict[str, Any]) -> dict[str, Any]:
    rope = config["rope_parameters"]
    same = (
        "num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "head_dim", "num_attention_heads",
        "num_key_value_heads", "sliding_window",
    )  # fmt: skip
    return {
        **{name: config[name] for name in same},
        "num_experts": config["num_local_experts"],
        "experts_per_token": config["num_experts_per_tok"],
        "swiglu_limit": config.get("swiglu_limit", 7.0),
        "initial_context_length": rope["original_max_position_embeddings"],
        "rope_theta": rope["rope_theta"],
        "rope_scaling_factor": rope["factor"],
        "rope_ntk_alpha": rope["beta_slow"],
        "rope_ntk_beta": rope["beta_fast"],
    }


def save_tensors(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    """Write model.safetensors, or shards with their index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names, weight_map = sorted(tensors), {}
    for shard in range(shards):  # numbered from 0, as openai/gpt-oss-20b's are
        file = f"model-{shard:05}-of-{shards:05}.safetensors"
        own = names[shard::shards]
        save_file({name: tensors[name] for name in own}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def transformers_model(
    folder: Path, dtype: torch.dtype = torch.float32, experts: Literal["grouped_mm", "batched_mm", "eager"] = "eager"
) -> nn.Module:
    """Return transformers' GptOssForCausalLM of a checkpoint in a Hugging Face layout: eager attention, eval mode, in `dtype`.

    MXFP4 is dequantised by transformers' own function. Experts "eager" run everywhere but do not export; "grouped_mm" wants rows
    of whole 16 bytes.
    """
    from transformers import GptOssConfig, GptOssForCausalLM
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    values = json.loads((folder / "config.json").read_text())
    values.pop("quantization_config", None)
    config = GptOssConfig(**values)
    model = GptOssForCausalLM._from_config(config, attn_implementation="eager", experts_implementation=experts)
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    for name in [name for name in tensors if name.endswith("_blocks")]:
        base = name.removesuffix("_blocks")
        blocks, scales = tensors.pop(name), tensors.pop(f"{base}_scales")
        tensors[base] = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    result = model.load_state_dict(tensors, strict=False)
    assert not result.unexpected_keys and set(result.missing_keys) <= (
        {"lm_head.weight"} if values["tie_word_embeddings"] else set()
    ), result
    table = model.model.rotary_emb.inv_freq.clone()
    model = model.to(dtype).eval()
    model.model.rotary_emb.inv_freq = table  # as from_pretrained leaves it, whatever the dtype
    return model
