"""How a GPU's memory is shared out before anything lies there: weights, caches, what a step needs besides, and a reserve.

In: numbers of the manifest and of the device. Out: bytes for the caches, or a refusal that prints the bytes. Everything that
will be allocated is counted:

- weights: one allocation that holds those of the programs in use, each tensor on its own boundary (`upload.WeightLayout`);
- caches: one allocation for each K and V, for `max_batch` sequences of `max_context` tokens by default. That is a batch; a single
  sequence of 32k tokens takes what `inspect` prints for it;
- workspace: what a step allocates while it runs. It grows with its tokens and with its rows (a row of logits of 201,088 words is
  0.8 MB in float32), so both are bounded: STEP_TOKENS and MOST_ROWS. At the 20b shape that is some 200 MB;
- reserve: what is not ours to count, as kernels' code, the driver's own memory, and the memory of captured graphs: these share
  one pool, whose size is that of the largest batch, since they never run at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass

from oxfuse.runtime.cache_size import least_cache, prefill_chunk, size_cache
from oxfuse.runtime.errors import UserError
from oxfuse.runtime.manifest import CacheSpec, Limits, ProgramSpec
from oxfuse.runtime.units import item_bytes, size_text

STEP_TOKENS = 2048
"""Most tokens of a step on a GPU: two prefill chunks fill it (256 rows for each of 32 experts, of which a token takes 4), and
four times as many would need four times the workspace."""

MOST_ROWS = 128
"""Most rows of logits of a step on a GPU, 154 MB in bfloat16 and float32 together; where more are wanted, the engine runs smaller
steps."""

RESERVE = 512 << 20
"""Bytes that stay free."""

TOKEN_BYTES = 256 << 10
"""Workspace of a token: several times what the experts of the 20b shape take, 4 rows of 5,760 in float32, or a 20b GPT-NeoX. A
larger model fails in the trial step that ends a load, not later."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """A device's memory in bytes, and what the device is called in messages."""

    device: str
    free: int
    total: int


def step_limits(limits: Limits) -> Limits:
    """Return the limits of steps on a GPU, where no more tokens are allowed than can come together."""
    most = limits.max_batch * prefill_chunk(limits)
    tokens = min(limits.max_step_tokens, max(STEP_TOKENS, limits.max_batch), most)
    return Limits(max_context=limits.max_context, max_batch=limits.max_batch, max_step_tokens=tokens)


def workspace_bytes(program: ProgramSpec, limits: Limits, rows: int = MOST_ROWS) -> int:
    """Return the most bytes that a step allocates besides weights and caches, its logits in float32 included."""
    width = program.outputs[0].shape[-1]
    logits = rows * width * (item_bytes(program.outputs[0].dtype) + 4) if isinstance(width, int) else 0
    return logits + limits.max_step_tokens * TOKEN_BYTES


def plan_caches(
    spec: CacheSpec,
    limits: Limits,
    *,
    chunk: int,
    reserve: int,
    weights: int,
    workspace: int,
    room: Room,
    cache_bytes: int | None = None,
) -> int:
    """Return the bytes that the caches may take: for the whole batch if they fit, else what is left; `cache_bytes` caps them.

    `chunk` and `reserve` are tokens, as in `size_cache`. Raises UserError with all numbers where the smallest cache does not
    fit, or where `cache_bytes` is given and does not.
    """
    left = room.free - weights - workspace - RESERVE
    least = least_cache(spec, limits, chunk=chunk, reserve=reserve).bytes
    if least > left:
        caches = f"the smallest cache, for one prefill chunk of {chunk} tokens, {least:,}"
        raise _too_small(room, weights, workspace, least, caches, "compile with a smaller max_context")
    wanted = size_cache(spec, limits, chunk=chunk, reserve=reserve, cache_bytes=cache_bytes).bytes
    if cache_bytes is not None and wanted > left:
        remedy = f"give a cache_bytes of {left} or less"
        raise _too_small(room, weights, workspace, wanted, f"the caches that cache_bytes {cache_bytes} allows {wanted:,}", remedy)
    return min(wanted, left)


def _too_small(room: Room, weights: int, workspace: int, caches: int, told: str, remedy: str) -> UserError:
    needed = weights + caches + workspace + RESERVE
    return UserError(
        f"{room.device} has {room.free:,} bytes free of {room.total:,} ({size_text(room.free)}), the artifact needs {needed:,} "
        f"({size_text(needed)}): weights {weights:,}, {told}, workspace of a step {workspace:,}, reserve {RESERVE:,}. End what "
        f"else uses its memory, choose another with device='cuda:N', or {remedy}."
    )
