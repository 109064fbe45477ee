"""Finds the parameters of a GPT-OSS model among a checkpoint's tensors, in each of the three layouts.

Hugging Face bf16 (the names are the reference's own), Hugging Face MXFP4 (experts as `_blocks` and `_scales`), and OpenAI's
`original/` (own names; q, k and v fused; experts' matrices stored a row per output). No values are read; all that does not fit
is listed in one error.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from oxfuse.errors import UserError, shown
from oxfuse.models.checkpoint import Checkpoint
from oxfuse.models.gpt_oss.config import GptOssConfig
from oxfuse.models.gpt_oss.model import GptOssModel
from oxfuse.models.tensor_finder import TensorFinder
from oxfuse.models.tensor_source import MXFP4_BLOCK, MatricesTransposed, Mxfp4Tensor, RowsOf, Scales, TensorSource

_HEAD, _EMBEDDING, _BODY = "lm_head.weight", "model.embed_tokens.weight", "model."
_HEADS = ("lm_head", "score", "unembedding")
_ORIGINAL = {_EMBEDDING: "embedding.weight", _HEAD: "unembedding.weight", "model.norm.weight": "norm.scale"}
_ORIGINAL_LAYER = {
    "input_layernorm.weight": "attn.norm.scale",
    "self_attn.sinks": "attn.sinks",
    "post_attention_layernorm.weight": "mlp.norm.scale",
    "mlp.experts.gate_up_proj": "mlp.mlp1_weight",
    "mlp.experts.gate_up_proj_bias": "mlp.mlp1_bias",
    "mlp.experts.down_proj": "mlp.mlp2_weight",
    "mlp.experts.down_proj_bias": "mlp.mlp2_bias",
    **{f"self_attn.{p}_proj.{kind}": f"attn.qkv.{kind}" for p in "qkv" for kind in ("weight", "bias")},
    **{f"self_attn.o_proj.{kind}": f"attn.out.{kind}" for kind in ("weight", "bias")},
    **{f"mlp.router.{kind}": f"mlp.gate.{kind}" for kind in ("weight", "bias")},
}


def tensor_sources(
    checkpoint: Checkpoint, config: GptOssConfig, model: nn.Module, new_head: Collection[str] = ()
) -> dict[str, TensorSource]:
    """Return the source of every parameter of `model`, a reference made from `config`, by the parameter's name.

    Tied embeddings have one entry, the embeddings'. Parameters of the attributes `new_head` may be absent. Raises UserError that
    lists every missing, unexpected or misshapen tensor, or names a quantisation other than MXFP4.
    """
    method = (config.extra.get("quantization_config") or {}).get("quant_method", "mxfp4")
    if method != "mxfp4":
        raise UserError(
            f"The checkpoint is quantised by {shown(method)}; oxfuse reads MXFP4 and unquantised GPT-OSS checkpoints. Use one."
        )
    finder = _Finder(checkpoint=checkpoint, config=config, body=_BODY, embedding=_EMBEDDING, head=_HEAD, heads=_HEADS)
    return finder.find_all(model, isinstance(model, GptOssModel), new_head)


@dataclass(kw_only=True)
class _Finder(TensorFinder):
    """Knows the three layouts' names, fused projections and MXFP4."""

    config: GptOssConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        self.original = any(name == "embedding.weight" or name.startswith("block.") for name in self.tensors)

    def stored_name(self, name: str) -> str:
        """Return what the checkpoint's layout calls the parameter."""
        if self.original:
            if name in _ORIGINAL:
                return _ORIGINAL[name]
            layer, _, rest = name.removeprefix("model.layers.").partition(".")
            return f"block.{layer}.{_ORIGINAL_LAYER[rest]}"
        return super().stored_name(name)

    def find(self, name: str, shape: tuple[int, ...]) -> TensorSource | None:
        """Return the source of a parameter, or None after noting why there is none."""
        stored = self.untied(name)
        matrices = name.endswith((".gate_up_proj", ".down_proj"))
        blocks, scales = (stored + (".", "_")[not self.original] + part for part in ("blocks", "scales"))
        if matrices and (blocks in self.tensors or scales in self.tensors):
            return self._mxfp4(stored, blocks, scales, shape)
        if self.original and matrices:
            experts, rows, columns = shape
            source = self.dense(stored, (experts, columns, rows))
            return source and MatricesTransposed(name=stored, shape=shape, dtype=source.dtype, stored=source)
        if self.original and ".qkv." in stored:
            return self._part_of_qkv(stored, name, shape)
        return self.dense(stored, shape)

    def _mxfp4(self, stored: str, blocks: str, scales: str, shape: tuple[int, ...]) -> TensorSource | None:
        experts, rows, columns = shape
        if rows % MXFP4_BLOCK:
            self.used |= {blocks, scales}
            self.unfit[f"{stored} is MXFP4, but its {rows} inputs are no multiple of {MXFP4_BLOCK}"] = None
            return None
        groups = (experts, columns, rows // MXFP4_BLOCK)
        found = self.dense(blocks, (*groups, MXFP4_BLOCK // 2), True), self.dense(scales, groups, True)
        if found[0] is None or found[1] is None:
            return None
        checked = Scales(name=scales, shape=groups, dtype=torch.uint8, stored=found[1])
        return Mxfp4Tensor(
            name=stored, shape=shape, dtype=self.checkpoint.dtype, encoding="mxfp4", blocks=found[0], scales=checked
        )

    def _part_of_qkv(self, stored: str, name: str, shape: tuple[int, ...]) -> TensorSource | None:
        heads, kv_heads = (n * self.config.head_dim for n in (self.config.num_attention_heads, self.config.num_key_value_heads))
        whole = self.dense(stored, (heads + 2 * kv_heads, *shape[1:]))
        start = {"q": 0, "k": heads, "v": heads + kv_heads}[name.split(".")[-2][0]]
        rows = f"{stored}, rows {start} to {start + shape[0]}"
        return whole and RowsOf(name=rows, shape=shape, dtype=whole.dtype, whole=whole, start=start)
