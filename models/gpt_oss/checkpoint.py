"""Finds the parameters of a GPT-OSS model among a checkpoint's tensors, in each of the three layouts.

Hugging Face bf16 (the names are the reference's own), Hugging Face MXFP4 (experts as `_blocks` and `_scales`), and OpenAI's
`original/` (own names; q, k and v fused; experts' matrices stored a row per output). No values are read; all that does not fit
is listed in one error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from oxfuse.errors import UserError, shown
from oxfuse.models.checkpoint import Checkpoint
from oxfuse.models.gpt_oss.config import GptOssConfig
from oxfuse.models.gpt_oss.model import GptOssForCausalLM, GptOssModel
from oxfuse.models.tensor_source import MXFP4_BLOCK, MatricesTransposed, Mxfp4Tensor, RowsOf, Scales, TensorSource

_MOST_NAMED = 8
_HEAD, _EMBEDDING, _BODY = "lm_head.weight", "model.embed_tokens.weight", "model."
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


def tensor_sources(checkpoint: Checkpoint, config: GptOssConfig, task: str) -> dict[str, TensorSource]:
    """Return the source of every parameter of the task's reference, by the parameter's name.

    Tied embeddings have one entry, the embeddings'. Raises UserError that lists every missing, unexpected or misshapen tensor,
    or names a quantisation other than MXFP4.
    """
    where = checkpoint.folder or "The module"
    if config.num_hidden_layers > len(checkpoint.tensors):
        raise UserError(
            f"{where}: config.json says num_hidden_layers is {config.num_hidden_layers}, but there are only "
            f"{len(checkpoint.tensors)} tensors. Correct config.json, or get the files again."
        )
    method = (config.extra.get("quantization_config") or {}).get("quant_method", "mxfp4")
    if method != "mxfp4":
        raise UserError(
            f"The checkpoint is quantised by {shown(method)}; oxfuse reads MXFP4 and unquantised GPT-OSS checkpoints. Use one."
        )
    with torch.device("meta"):
        bare = task == "feature-extraction"
        model = GptOssModel(config) if bare else GptOssForCausalLM(config)
    finder = _Finder(checkpoint=checkpoint, config=config)
    sources = {}
    for name, parameter in model.named_parameters():
        source = finder.find(f"{_BODY}{name}" if bare else name, tuple(parameter.shape))
        if source is not None:
            sources[name] = source
    finder.pass_over_head(bare)
    finder.insist()
    return sources


@dataclass(kw_only=True)
class _Finder:
    """Looks tensors up by the reference's names and remembers what did not fit. Its lists hold the checkpoint's own names."""

    checkpoint: Checkpoint
    config: GptOssConfig
    used: set[str] = field(default_factory=set)
    missing: dict[str, None] = field(default_factory=dict)
    unfit: dict[str, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tensors: Mapping[str, TensorSource] = self.checkpoint.tensors
        self.original = any(name == "embedding.weight" or name.startswith("block.") for name in self.tensors)
        self.without_prefix = _EMBEDDING not in self.tensors and _EMBEDDING.removeprefix(_BODY) in self.tensors

    def stored_name(self, name: str) -> str:
        """Return what the checkpoint's layout calls the parameter."""
        if self.original:
            if name in _ORIGINAL:
                return _ORIGINAL[name]
            layer, _, rest = name.removeprefix("model.layers.").partition(".")
            return f"block.{layer}.{_ORIGINAL_LAYER[rest]}"
        return name.removeprefix(_BODY) if self.without_prefix else name

    def find(self, name: str, shape: tuple[int, ...]) -> TensorSource | None:
        """Return the source of a parameter, or None after noting why there is none."""
        stored = self.stored_name(name)
        if name == _EMBEDDING and self.config.tie_word_embeddings and stored not in self.tensors:
            head = self.stored_name(_HEAD)  # one of the two is on disk, whichever the writer met first
            stored = head if head in self.tensors else stored
        matrices = name.endswith((".gate_up_proj", ".down_proj"))
        blocks, scales = (stored + (".", "_")[not self.original] + part for part in ("blocks", "scales"))
        if matrices and (blocks in self.tensors or scales in self.tensors):
            return self._mxfp4(stored, blocks, scales, shape)
        if self.original and matrices:
            experts, rows, columns = shape
            source = self._dense(stored, (experts, columns, rows))
            return source and MatricesTransposed(name=stored, shape=shape, dtype=source.dtype, stored=source)
        if self.original and ".qkv." in stored:
            return self._part_of_qkv(stored, name, shape)
        return self._dense(stored, shape)

    def _dense(self, stored: str, shape: tuple[int, ...], bytes_wanted: bool = False) -> TensorSource | None:
        source = self.tensors.get(stored)
        if source is None:
            self.missing[stored] = None
            return None
        self.used.add(stored)
        kind = "uint8" if bytes_wanted else "floating-point"
        right_kind = source.dtype == torch.uint8 if bytes_wanted else source.dtype.is_floating_point
        if source.shape != shape or not right_kind:
            found = f"{str(source.dtype).removeprefix('torch.')} {list(source.shape)}"
            self.unfit[f"{stored} is {found}, expected {kind} {list(shape)}"] = None
            return None
        return source

    def _mxfp4(self, stored: str, blocks: str, scales: str, shape: tuple[int, ...]) -> TensorSource | None:
        experts, rows, columns = shape
        if rows % MXFP4_BLOCK:
            self.used |= {blocks, scales}
            self.unfit[f"{stored} is MXFP4, but its {rows} inputs are no multiple of {MXFP4_BLOCK}"] = None
            return None
        groups = (experts, columns, rows // MXFP4_BLOCK)
        found = self._dense(blocks, (*groups, MXFP4_BLOCK // 2), True), self._dense(scales, groups, True)
        if found[0] is None or found[1] is None:
            return None
        checked = Scales(name=scales, shape=groups, dtype=torch.uint8, stored=found[1])
        return Mxfp4Tensor(
            name=stored, shape=shape, dtype=self.checkpoint.dtype, encoding="mxfp4", blocks=found[0], scales=checked
        )

    def _part_of_qkv(self, stored: str, name: str, shape: tuple[int, ...]) -> TensorSource | None:
        heads, kv_heads = (n * self.config.head_dim for n in (self.config.num_attention_heads, self.config.num_key_value_heads))
        whole = self._dense(stored, (heads + 2 * kv_heads, *shape[1:]))
        start = {"q": 0, "k": heads, "v": heads + kv_heads}[name.split(".")[-2][0]]
        rows = f"{stored}, rows {start} to {start + shape[0]}"
        return whole and RowsOf(name=rows, shape=shape, dtype=whole.dtype, whole=whole, start=start)

    def pass_over_head(self, bare: bool) -> None:
        """Accept a head that the reference does not have: a bare model needs none, a tied one must be the embeddings."""
        head, embedding = (self.tensors.get(self.stored_name(name)) for name in (_HEAD, _EMBEDDING))
        if head is None or head.name in self.used or not (bare or self.config.tie_word_embeddings):
            return
        self.used.add(head.name)
        if not bare and embedding is not None and not _same_values(head, embedding):
            self.unfit[f"{head.name} differs from {embedding.name}, though tie_word_embeddings is true"] = None

    def insist(self) -> None:
        """Raise UserError if anything did not fit. A long list is cut: it means that config.json is another model's."""
        unexpected = sorted(self.tensors.keys() - self.used)
        parts = [
            f"{title}: {mark.join(f'{name:.200}' for name in names[:_MOST_NAMED])}"
            + (f" and {len(names) - _MOST_NAMED} more." if len(names) > _MOST_NAMED else ".")
            for title, names, mark in (
                ("Missing", list(self.missing), ", "),
                ("Unexpected", unexpected, ", "),
                ("Misfits", list(self.unfit), "; "),
            )
            if names
        ]
        if parts:
            where = self.checkpoint.folder or "The module"
            raise UserError(
                f"{where}: the tensors do not fit config.json. {' '.join(parts)} Correct config.json, or get the files again."
            )


def _same_values(a: TensorSource, b: TensorSource, rows: int = 4096) -> bool:
    if a.shape != b.shape:
        return False
    slices = (slice(start, start + rows) for start in range(0, a.shape[0], rows))
    return all(torch.equal(a.read(part), b.read(part)) for part in slices)
