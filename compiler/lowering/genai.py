"""What onnxruntime-genai must be told about a model: its genai_config.json.

Keys as in onnxruntime-genai 0.18's documentation; one that it does not know is an error there.
"""

from __future__ import annotations

from typing import Any

from oxfuse.compiler.fuse import Fused
from oxfuse.compiler.lowering.onnx import IDS, MASK, MODEL
from oxfuse.compiler.plan import Plan
from oxfuse.runtime.manifest import GenerationSpec

CONFIG = "genai_config.json"
ALL_CORES = 0
"""Lets onnxruntime count the cores. onnxruntime-genai 0.18 takes fewer by itself: one of two, which doubles a token's time."""


def genai_config(plan: Plan, fused: Fused, generation: GenerationSpec) -> dict[str, Any]:
    """Return the configuration of a model whose attention extends its past in place."""
    config, ends = plan.config, list(generation.eos_token_ids)
    layers = {(layer.kv_heads, layer.head_dim) for layer in fused.cache.layers}
    ((kv_heads, head_dim),) = layers
    providers: list[dict[str, Any]] = [] if plan.options.provider == "cpu" else [{plan.options.provider: {}}]
    model: dict[str, Any] = {
        "type": plan.contract.genai_type,
        "context_length": plan.limits.max_context,
        "vocab_size": config.vocab_size,
        "decoder": {
            "session_options": {"log_id": "oxfuse", "provider_options": providers, "intra_op_num_threads": ALL_CORES},
            "filename": MODEL,
            "head_size": head_dim,
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": kv_heads,
            "num_hidden_layers": len(fused.cache.layers),
            "inputs": {
                "input_ids": IDS,
                "attention_mask": MASK,
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }
    if ends:  # without it nothing stops
        model["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    if generation.bos_token_id is not None:
        model["bos_token_id"] = generation.bos_token_id
    model["pad_token_id"] = generation.pad_token_id if generation.pad_token_id is not None else (ends or [0])[0]
    search = {"do_sample": False, "max_length": plan.limits.max_context, "past_present_share_buffer": True}
    return {"model": model, "search": search}
