"""GPT-NeoX (GPT-NeoX-20B, Pythia): configuration, reference classes, and the contract by which the compiler knows the model."""

from __future__ import annotations

from oxfuse.models.contract import ModelContract
from oxfuse.models.gpt_neox.checkpoint import tensor_sources
from oxfuse.models.gpt_neox.config import GPTNeoXConfig
from oxfuse.models.gpt_neox.flavours import FLAVOURS
from oxfuse.models.gpt_neox.model import (
    GPTNeoXForCausalLM,
    GPTNeoXForQuestionAnswering,
    GPTNeoXForSequenceClassification,
    GPTNeoXForTokenClassification,
    GPTNeoXModel,
)
from oxfuse.models.gpt_neox.tokenizer import GPTNeoXTokenizer, build_tokenizer

CONTRACT = ModelContract(
    model_type="gpt_neox",
    parse_config=lambda config: GPTNeoXConfig(**config),
    tasks={
        "text-generation": GPTNeoXForCausalLM,
        "text-classification": GPTNeoXForSequenceClassification,
        "token-classification": GPTNeoXForTokenClassification,
        "question-answering": GPTNeoXForQuestionAnswering,
        "feature-extraction": GPTNeoXModel,
    },
    tensor_sources=tensor_sources,
    fusions=("sink_attention", "rotary_embedding"),
    flavours=FLAVOURS,
    build_tokenizer=build_tokenizer,
)

__all__ = [
    "CONTRACT",
    "GPTNeoXConfig",
    "GPTNeoXForCausalLM",
    "GPTNeoXForQuestionAnswering",
    "GPTNeoXForSequenceClassification",
    "GPTNeoXForTokenClassification",
    "GPTNeoXModel",
    "GPTNeoXTokenizer",
]
