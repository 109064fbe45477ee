"""Writes a GPT-OSS checkpoint as the GGUF file that llama.cpp runs, so that peers compute the same model.

In: a checkpoint with MXFP4 experts. Out: a GGUF file with the same bytes of experts in ggml's order, matrices that every token
meets in bfloat16 or q8_0, and the rest in float32, as llama.cpp's own converter keeps them. One tensor at a time is in memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from oxfuse.compiler.bench.engines import Dense
from oxfuse.errors import UserError
from oxfuse.models.checkpoint import Checkpoint
from oxfuse.models.gpt_oss.config import FULL, SLIDING, GptOssConfig
from oxfuse.models.tensor_source import MXFP4_BLOCK, TensorSource

BYTES_PER_VALUE: dict[str, float] = {"bf16": 2.0, "q8_0": 34 / 32, "mxfp4": 17 / 32}
"""Of ggml's types: a q8_0 block is a float16 scale and 32 bytes, an MXFP4 block a scale byte and 16."""
ARCHITECTURE = "gpt-oss"
WHOLE = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight"}
MATRICES = {f"self_attn.{p}_proj.weight": f"attn_{n}.weight" for p, n in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output"))}
PLAIN = {
    **{name.replace("weight", "bias"): ggml.replace("weight", "bias") for name, ggml in MATRICES.items()},
    "self_attn.sinks": "attn_sinks.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "mlp.router.weight": "ffn_gate_inp.weight",
    "mlp.router.bias": "ffn_gate_inp.bias",
    "mlp.experts.down_proj_bias": "ffn_down_exps.bias",
}
"""What is float32 in the file."""

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A tensor of the file: its name, values by dimension, ggml's type, and what makes its bytes."""

    name: str
    shape: tuple[int, ...]
    kind: str
    make: Callable[[], Array]


def write_gguf(folder: Path, path: Path, dense: Dense) -> Path:
    """Write the checkpoint in `folder` to `path`, which is replaced, and return it; `dense` is the type of the dense matrices.

    Raises UserError where the package gguf is missing, and for a model that this writer does not know: not GPT-OSS, experts not
    in MXFP4, layers that do not alternate as llama.cpp expects.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError("Writing a GGUF file needs the package gguf: install oxfuse[bench].") from error
    checkpoint = Checkpoint.open(folder)
    config = checkpoint.contract().parse_config(checkpoint.config)
    if not isinstance(config, GptOssConfig):
        raise UserError(f"{folder} is a {checkpoint.config['model_type']} model; only gpt_oss is written as GGUF here.")
    contract = checkpoint.contract()
    sources = contract.sources(checkpoint, config, contract.default_task)
    alternating = tuple((SLIDING, FULL)[i % 2] for i in range(config.num_hidden_layers))
    if config.layer_types != alternating or config.rope_parameters["rope_type"] != "yarn":
        raise UserError(f"{folder}: llama.cpp takes layers that slide in turn, and YaRN; this model has others.")
    entries = list(_entries(config, sources, dense))
    partial = path.with_name(f".{path.name}.partial")
    writer = gguf.GGUFWriter(partial, ARCHITECTURE)
    _describe(writer, config, gguf.LlamaFileType.MOSTLY_BF16 if dense == "bf16" else gguf.LlamaFileType.MOSTLY_MXFP4_MOE)
    for entry in entries:
        kind = gguf.GGMLQuantizationType[entry.kind.upper()]
        values, bytes_of_block = gguf.GGML_QUANT_SIZES[kind]
        # With a dtype that is not uint8 the writer takes the shape as values, whatever the bytes are.
        writer.add_tensor_info(
            entry.name, entry.shape, np.dtype(np.float32), math.prod(entry.shape) // values * bytes_of_block, raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        writer.write_tensor_data(entry.make())
    writer.close()
    partial.replace(path)
    return path


def _describe(writer: Any, config: GptOssConfig, file_type: int) -> None:
    import gguf

    rope = config.rope_parameters
    writer.add_file_type(file_type)
    writer.add_name(f"{config.num_hidden_layers} layers")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_sliding_window(config.sliding_window)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
    writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    writer.add_tokenizer_model("no_vocab")  # the engine is given ids and gives logits: no text is needed
    writer.add_vocab_size(config.vocab_size)


def _entries(config: GptOssConfig, sources: dict[str, TensorSource], dense: Dense) -> Iterator[_Entry]:
    for name, ggml in WHOLE.items():
        if name in sources:
            yield _matrix(ggml, sources[name], dense)
    yield _plain("output_norm.weight", sources["model.norm.weight"])
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        for name, ggml in MATRICES.items():
            yield _matrix(f"{theirs}.{ggml}", sources[f"{ours}.{name}"], dense)
        for name, ggml in PLAIN.items():
            if f"{ours}.{name}" in sources:  # projections may have no bias
                yield _plain(f"{theirs}.{ggml}", sources[f"{ours}.{name}"])
        experts = f"{ours}.mlp.experts"
        yield _experts(f"{theirs}.ffn_down_exps.weight", sources[f"{experts}.down_proj"], slice(None))
        # Rows of gate and up alternate in the checkpoint; ggml has a tensor for each.
        for half, rows in (("gate", slice(0, None, 2)), ("up", slice(1, None, 2))):
            yield _experts(f"{theirs}.ffn_{half}_exps.weight", sources[f"{experts}.gate_up_proj"], rows)
            yield _plain(f"{theirs}.ffn_{half}_exps.bias", sources[f"{experts}.gate_up_proj_bias"], rows)


def _plain(name: str, source: TensorSource, columns: slice = slice(None)) -> _Entry:
    shape = (*source.shape[:-1], len(range(*columns.indices(source.shape[-1]))))
    return _Entry(name=name, shape=shape, kind="f32", make=lambda: source.read()[..., columns].float().contiguous().numpy())


def _matrix(name: str, source: TensorSource, dense: Dense) -> _Entry:
    make = functools.partial(_bfloat16 if dense == "bf16" else _q8_0, source)
    return _Entry(name=name, shape=source.shape, kind=dense, make=make)


def _bfloat16(source: TensorSource) -> Array:
    """Return the bits of [N, K] in bfloat16, uint16."""
    return source.read().to(torch.bfloat16).contiguous().view(torch.uint16).numpy()


def _q8_0(source: TensorSource) -> Array:
    """Return [N, K] quantised to blocks of 32 values, uint8 [N, K / 32 * 34], by ggml's own rule in the package gguf."""
    import gguf

    quantised: Array = gguf.quants.quantize(source.read().float().contiguous().numpy(), gguf.GGMLQuantizationType.Q8_0)
    return quantised


def _experts(name: str, source: TensorSource, rows: slice) -> _Entry:
    parts = source.parts()
    if not parts:
        raise UserError(f"{source.name} is not in MXFP4: the comparison with llama.cpp is one of MXFP4 experts.")
    experts, columns, groups = parts["scales"].shape

    def make() -> Array:
        return ggml_mxfp4(parts["blocks"].read()[:, rows], parts["scales"].read()[:, rows]).numpy()

    height = len(range(*rows.indices(columns)))
    return _Entry(name=name, shape=(experts, height, groups * MXFP4_BLOCK), kind="mxfp4", make=make)


def ggml_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return ggml's blocks uint8 [..., K / 32, 17] of a checkpoint's, uint8 [..., K / 32, 16] and scales uint8 [..., K / 32].

    A checkpoint's byte j holds values 2j (low nibble) and 2j + 1; ggml's holds values j (low nibble) and j + 16, after the scale.
    """
    values = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)  # [..., K / 32, 32]
    low, high = values[..., : MXFP4_BLOCK // 2], values[..., MXFP4_BLOCK // 2 :]
    return torch.cat((scales.unsqueeze(-1), low | high << 4), dim=-1).contiguous()
