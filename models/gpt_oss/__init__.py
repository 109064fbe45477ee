"""GPT-OSS: configuration, reference classes, and the contract by which the compiler knows the model."""

from __future__ import annotations

import torch

from oxfuse.models.contract import ModelContract
from oxfuse.models.gpt_oss.checkpoint import tensor_sources
from oxfuse.models.gpt_oss.config import GptOssConfig, is_original
from oxfuse.models.gpt_oss.flavours import FLAVOURS
from oxfuse.models.gpt_oss.model import (
    GptOssForCausalLM,
    GptOssForSequenceClassification,
    GptOssForTokenClassification,
    GptOssModel,
)

CONTRACT = ModelContract(
    model_type="gpt_oss",
    parse_config=lambda config: GptOssConfig(**config),
    tasks={
        "text-generation": GptOssForCausalLM,
        "text-classification": GptOssForSequenceClassification,
        "token-classification": GptOssForTokenClassification,
        "feature-extraction": GptOssModel,
    },
    tensor_sources=tensor_sources,
    fusions=("sink_attention", "rotary_embedding", "moe_dispatch", "rms_norm"),
    recognises=is_original,
    refused_dtypes={torch.float16: "GPT-OSS activations reach about 45,000 and overflow float16 to inf, then NaN"},
    flavours=FLAVOURS,
    genai_type="gptoss",
)

__all__ = [
    "CONTRACT",
    "GptOssConfig",
    "GptOssForCausalLM",
    "GptOssForSequenceClassification",
    "GptOssForTokenClassification",
    "GptOssModel",
]
