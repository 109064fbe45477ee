"""The shapes of released GPT-NeoX models, by name: what stands in their config.json and differs from the class's defaults."""

from __future__ import annotations

from typing import Any


def _pythia(layers: int, hidden: int, heads: int, vocab: int = 50304) -> dict[str, Any]:
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "vocab_size": vocab,
        "hidden_act": "gelu",
        "eos_token_id": 0,
    }


FLAVOURS = {
    "gpt-neox-20b": {"architectures": ["GPTNeoXForCausalLM"], "hidden_act": "gelu_fast", "eos_token_id": 0},
    "pythia-14m": _pythia(6, 128, 4),
    "pythia-31m": _pythia(6, 256, 8),
    "pythia-70m": _pythia(6, 512, 8),
    "pythia-160m": _pythia(12, 768, 12),
    "pythia-410m": _pythia(24, 1024, 16),
    "pythia-1b": _pythia(16, 2048, 8),
    "pythia-1.4b": _pythia(24, 2048, 16),
    "pythia-2.8b": _pythia(32, 2560, 32),
    "pythia-6.9b": _pythia(32, 4096, 32, 50432),
    "pythia-12b": _pythia(36, 5120, 40, 50688),
}
