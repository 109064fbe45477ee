"""Finds the parameters of a GPT-NeoX model among a checkpoint's tensors.

Names are the reference's own; the language model's head may be called `lm_head`, as in transformers 5's memory. Buffers that old
releases stored (masks, frequencies) follow from the configuration and are passed over by name.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace

from torch import nn

from oxfuse.models.checkpoint import Checkpoint, TensorSource
from oxfuse.models.gpt_neox.config import GPTNeoXConfig
from oxfuse.models.gpt_neox.model import GPTNeoXModel
from oxfuse.models.tensor_finder import TensorFinder

_HEAD, _EMBEDDING, _BODY = "embed_out.weight", "gpt_neox.embed_in.weight", "gpt_neox."
_OTHER_HEAD = "lm_head.weight"
_HEADS = ("embed_out", "lm_head", "score", "classifier", "qa_outputs")
_OLD_BUFFER = re.compile(r"(gpt_neox\.)?layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)")


def tensor_sources(
    checkpoint: Checkpoint, config: GPTNeoXConfig, model: nn.Module, new_head: Collection[str] = ()
) -> dict[str, TensorSource]:
    """Return the source of every parameter of `model`, a reference made from `config`, by the parameter's name.

    Tied embeddings have one entry, the embeddings'. Parameters of the attributes `new_head` may be absent. Raises UserError that
    lists every missing, unexpected or misshapen tensor.
    """
    tensors = {name: source for name, source in checkpoint.tensors.items() if not _OLD_BUFFER.fullmatch(name)}
    finder = _Finder(
        checkpoint=replace(checkpoint, tensors=tensors),
        config=config,
        body=_BODY,
        embedding=_EMBEDDING,
        head=_HEAD,
        heads=_HEADS,
    )
    return finder.find_all(model, isinstance(model, GPTNeoXModel), new_head)


class _Finder(TensorFinder):
    """Knows the other name of the language model's head."""

    def stored_name(self, name: str) -> str:
        """Return what the checkpoint calls the parameter."""
        if name == _HEAD and _HEAD not in self.tensors and _OTHER_HEAD in self.tensors:
            return _OTHER_HEAD
        return super().stored_name(name)
