"""Writes what the oracle says about a fixed text of random tokens; an artifact is measured against it wherever it runs.

In: a checkpoint's tensors. Out: `golden.safetensors` with token_ids [T], positions [T], rows [R] (indices into T), logits
[R, V] float32 (or what a head gives for these rows) and, where the model routes, router_indices [L, T, k]; own_logits [R, V] of
the artifact's own weights and activations where it rounds either. The oracle is the reference in float32, run in bounded memory.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from oxfuse.errors import UserError
from oxfuse.models.checkpoint import TensorSource
from oxfuse.models.contract import ModelContract
from oxfuse.models.streaming import stream_oracle
from oxfuse.passes import quantise

GOLDEN = "golden.safetensors"
TOKENS = 256  # longer than the window of every released GPT-OSS (128)
ROWS = 32
SEED = 0


def write_golden(
    path: Path,
    *,
    contract: ModelContract,
    config: Any,
    task: str,
    sources: Mapping[str, TensorSource],
    max_context: int,
    own: Mapping[str, TensorSource] | None = None,
    rounded: Collection[str] = (),
    seed: int = SEED,
) -> dict[str, Tensor]:
    """Run the oracle over min(256, `max_context`) seeded token ids, write its answers to `path`, return them.

    `own` are the weights that the artifact stores, where they are not those of `sources`; `rounded` names those that activations
    of 8 bits are multiplied with. The same checkpoint and seed give the same file. Raises UserError if the model answers with
    infinities or NaN: a checkpoint that is damaged, or not what its config says.
    """
    length = min(TOKENS, max_context)
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(0, config.vocab_size, (length,), generator=generator)
    positions = torch.arange(length)
    rows = spread_rows(length)
    top_k = getattr(config, "num_experts_per_tok", None)
    wanted: dict[str, Any] = {"output_router_logits": True} if top_k is not None else {}
    with torch.inference_mode():
        answer = stream_oracle(contract, config, task, sources, token_ids[None], positions[None], rows=rows, **wanted)
        stored = None
        if own is not None or rounded:
            weights, entering = own or sources, dict.fromkeys(rounded, lambda x: quantise.rounded(x, x.dtype))
            stored = stream_oracle(
                contract, config, task, weights, token_ids[None], positions[None], rows=rows, entering=entering
            )
    golden = {"token_ids": token_ids, "positions": positions, "rows": rows, "logits": answer.values[0].float()}
    if stored is not None:
        golden["own_logits"] = stored.values[0].float()
    if top_k is not None and answer.router_logits is not None:
        # Top-k on the logits in float32, as the model chooses.
        chosen = [logits.reshape(length, -1).float().topk(top_k, dim=-1).indices for logits in answer.router_logits]
        golden["router_indices"] = torch.stack(chosen)
    if not golden["logits"].isfinite().all():
        bad = int((~golden["logits"].isfinite()).sum())
        raise UserError(
            f"The checkpoint yields {bad} infinite or undefined values for {length} ordinary tokens: it is damaged, or its "
            "config.json does not describe it. Fetch it again."
        )
    golden = {name: tensor.clone().contiguous() for name, tensor in golden.items()}
    path.write_bytes(save(golden))  # save_file would keep it from other users
    return golden


def spread_rows(length: int, count: int = ROWS) -> Tensor:
    """Return up to `count` indices spread evenly over range(length), the first and the last among them; int64, ascending."""
    return torch.linspace(0, length - 1, min(count, length), dtype=torch.float64).round().long()
