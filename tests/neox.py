"""Random GPT-NeoX checkpoints for tests, for every head, and transformers' model of the same weights.

Nothing here uses oxfuse: what a checkpoint means is said a second time, by way of transformers, so that a mistake in the reader
shows. Weights are scaled so that logits have a standard deviation of about 2 and greedy text stays diverse.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.checkpoints import save_tensors

TINY: dict[str, Any] = {
    "model_type": "gpt_neox",
    "num_hidden_layers": 3,
    "vocab_size": 211,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 112,
    "max_position_embeddings": 512,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "hidden_act": "gelu",
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
    "layer_norm_eps": 1e-5,
    "eos_token_id": 0,
    "bos_token_id": 0,
}
HEADS = {
    "text-generation": "GPTNeoXForCausalLM",
    "text-classification": "GPTNeoXForSequenceClassification",
    "token-classification": "GPTNeoXForTokenClassification",
    "question-answering": "GPTNeoXForQuestionAnswering",
    "feature-extraction": "GPTNeoXModel",
}
_GAIN = 3.0


def random_gpt_neox(
    folder: Path,
    *,
    task: str = "text-generation",
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    new_names: bool = False,
    old_buffers: bool = False,
    **config: Any,
) -> Path:
    """Write a checkpoint of the task's model and return its folder.

    `config` overrides TINY; None takes a key away. `new_names` calls the language model's head `lm_head`; `old_buffers` adds the
    masks and frequencies that old releases stored.
    """
    full = {name: value for name, value in {**TINY, **config}.items() if value is not None}
    full["architectures"] = [HEADS[task]]
    tensors = _weights(full, task, dtype, seed)
    if new_names and "embed_out.weight" in tensors:
        tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    if old_buffers:
        for i in range(full["num_hidden_layers"]):
            layer = f"{'' if task == 'feature-extraction' else 'gpt_neox.'}layers.{i}.attention"
            tensors[f"{layer}.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
            tensors[f"{layer}.masked_bias"] = torch.tensor(-1e9)
            tensors[f"{layer}.rotary_emb.inv_freq"] = torch.ones(2)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(full, indent=2))
    save_tensors(folder, tensors, shards)
    return folder


def _weights(config: dict[str, Any], task: str, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, labels = config["hidden_size"], config["intermediate_size"], len(config.get("id2label", "ab"))
    out: dict[str, Tensor] = {}

    def normal(name: str, *shape: int, std: float, mean: float = 0.0) -> None:
        out[name] = (torch.randn(shape, generator=generator) * std + mean).to(dtype)

    def linear(name: str, rows: int, columns: int, bias: bool = True, gain: float = _GAIN) -> None:
        normal(f"{name}.weight", rows, columns, std=gain * columns**-0.5)
        if bias:
            normal(f"{name}.bias", rows, std=0.2)

    def norm(name: str) -> None:
        normal(f"{name}.weight", hidden, std=0.2, mean=1.0)
        normal(f"{name}.bias", hidden, std=0.2)

    tied = config["tie_word_embeddings"]
    body = "" if task == "feature-extraction" else "gpt_neox."
    normal(f"{body}embed_in.weight", config["vocab_size"], hidden, std=2 * hidden**-0.5 if tied else 1.0)
    for i in range(config["num_hidden_layers"]):
        layer = f"{body}layers.{i}"
        norm(f"{layer}.input_layernorm")
        norm(f"{layer}.post_attention_layernorm")
        bias = config.get("attention_bias", True)
        linear(f"{layer}.attention.query_key_value", 3 * hidden, hidden, bias)
        linear(f"{layer}.attention.dense", hidden, hidden, bias)
        linear(f"{layer}.mlp.dense_h_to_4h", inner, hidden)
        linear(f"{layer}.mlp.dense_4h_to_h", hidden, inner)
    norm(f"{body}final_layer_norm")
    match task:
        case "text-generation" if not tied:
            linear("embed_out", config["vocab_size"], hidden, False, 2.0)
        case "text-classification":
            linear("score", labels, hidden, False, 2.0)
        case "token-classification":
            linear("classifier", labels, hidden, True, 2.0)
        case "question-answering":
            linear("qa_outputs", 2, hidden, True, 2.0)
    return out


def transformers_neox(
    folder: Path, dtype: torch.dtype = torch.float32, attention: str = "eager", task: str = "text-generation"
) -> nn.Module:
    """Return transformers' model of a checkpoint, in eval mode, in `dtype`."""
    import transformers

    values = json.loads((folder / "config.json").read_text())
    config = transformers.GPTNeoXConfig(**values)
    model = getattr(transformers, HEADS[task])._from_config(config, attn_implementation=attention)
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    named = {name.replace("embed_out.", "lm_head."): t for name, t in tensors.items() if ".attention.bias" not in name}
    named = {name: t for name, t in named.items() if not name.endswith(("masked_bias", "inv_freq"))}
    result = model.load_state_dict(named, strict=False)
    tied = {"lm_head.weight"} if values["tie_word_embeddings"] else set()
    assert not result.unexpected_keys and set(result.missing_keys) <= tied, result
    table = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model = model.to(dtype).eval()
    for name, buffer in table.items():  # as from_pretrained leaves them, whatever the dtype
        model.get_submodule(name.rpartition(".")[0])._buffers[name.rpartition(".")[2]] = buffer
    return model
