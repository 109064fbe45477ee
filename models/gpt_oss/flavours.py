"""The shapes of the released GPT-OSS models, by name: what stands in their config.json and differs from the class's defaults."""

from __future__ import annotations

from typing import Any


def _gpt_oss(layers: int, experts: int) -> dict[str, Any]:
    return {
        "architectures": ["GptOssForCausalLM"],
        "num_hidden_layers": layers,
        "num_local_experts": experts,
        "eos_token_id": 200002,
        "pad_token_id": 199999,
    }


FLAVOURS = {"gpt-oss-20b": _gpt_oss(24, 32), "gpt-oss-120b": _gpt_oss(36, 128)}
