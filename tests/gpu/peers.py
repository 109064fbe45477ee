"""What oxfuse is compared with on the same GPU, turn by turn: transformers, and our reference in eager PyTorch.

Both hold the experts in bfloat16, 42 GB at the 20b shape: transformers' MXFP4 kernels come from the hub, which a machine without
a network does not reach. Weights are random; caches of a given length are made up.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .document import Row
from .lab import Lab, median, times
from .seeded import shape_20b
from .steps import LAYERS, Full, decode_step, full_model, prefill_once, release, with_context
from .worker import Found, Item, Note

DECODES = ((1, 128), (1, 4096), (8, 4096), (32, 128))
PREFILLS = (512, 4096)
TURNS, STEPS = 4, 4
"""Turns of each engine in a cell, and decodes in a turn."""


class Peer(ABC):
    """Another implementation with a model of the same shape."""

    name: str
    model: Any

    def __init__(self, lab: Lab) -> None:
        """Make the model on the GPU."""
        self.device = lab.device
        self.generator = torch.Generator(lab.device).manual_seed(0)

    @abstractmethod
    def cache(self, batch: int, context: int) -> Any:
        """Return a cache of made-up keys and values."""

    @abstractmethod
    def run(self, ids: Tensor, cache: Any) -> Tensor:
        """Run ids [B, S] behind the cache, which grows; return the last token's logits."""

    def keys(self, batch: int, context: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of one layer, [B, KV, context, D]."""
        shape = batch, 8, context, 64
        return tuple(torch.randn(shape, device=self.device, generator=self.generator).bfloat16() for _ in "kv")  # type: ignore[return-value]

    def ids(self, batch: int, length: int) -> Tensor:
        """Return random token ids."""
        return torch.randint(0, 200000, (batch, length), device=self.device, generator=self.generator)


def fill(model: nn.Module, device: torch.device) -> None:
    """Give a model's parameters on the GPU random values of a usual size."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(0.0, parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.02)


class Transformers(Peer):
    """transformers' GptOssForCausalLM in bfloat16: eager attention, for it has no other with sinks offline."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        from transformers import GptOssConfig, GptOssForCausalLM

        values = {name: value for name, value in shape_20b(LAYERS).items() if name not in ("quantization_config", "torch_dtype")}
        config = GptOssConfig(**values)
        self.name = f"transformers {importlib.metadata.version('transformers')}, bf16"
        with torch.device("meta"):
            self.model, experts = _first_that_works(
                [
                    (
                        partial(GptOssForCausalLM._from_config, config, attn_implementation="eager", experts_implementation=kind),
                        kind,
                    )
                    for kind in ("grouped_mm", "batched_mm")
                ]
                + [(partial(GptOssForCausalLM._from_config, config, attn_implementation="eager"), "eager")]
            )
        self.name += f", experts {experts}"
        self.model = self.model.to(torch.bfloat16).to_empty(device=lab.device).eval()
        rotary = self.model.model.rotary_emb
        self.model.model.rotary_emb = type(rotary)(config).to(lab.device)  # its frequencies were on no device
        fill(self.model, lab.device)

    def cache(self, batch: int, context: int) -> Any:
        """Fill a DynamicCache layer by layer."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        for layer in range(LAYERS if context else 0):
            cache.update(*self.keys(batch, context), layer)
        return cache

    def run(self, ids: Tensor, cache: Any) -> Tensor:
        """Run the model."""
        logits: Tensor = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits


class Reference(Peer):
    """Our reference, which runs every expert on every token."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        from oxfuse.models.contract import lookup
        from oxfuse.models.virtual import meta_model

        config = shape_20b(LAYERS)
        contract = lookup(config["model_type"])
        self.name = f"our reference, eager PyTorch {torch.__version__}, bf16, all experts"
        self.model = meta_model(contract, contract.parse_config(config), "text-generation", torch.bfloat16)
        self.model = self.model.to_empty(device=lab.device)
        fill(self.model, lab.device)

    def cache(self, batch: int, context: int) -> Any:
        """Fill the reference's cache."""
        from oxfuse.models.cache import KVCache

        cache = KVCache()
        for layer in range(LAYERS if context else 0):
            cache.update(*self.keys(batch, context), layer)
        return cache

    def run(self, ids: Tensor, cache: Any) -> Tensor:
        """Run the model."""
        logits: Tensor = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits


def _first_that_works(makers: list[tuple[Any, str]]) -> tuple[Any, str]:
    errors = []
    for make, name in makers:
        try:
            return make(), name
        except (TypeError, ValueError, ImportError, AttributeError) as error:
            errors.append(f"{name}: {error}")
    raise RuntimeError("; ".join(errors))


def items() -> list[Item]:
    """Return an item for each peer."""
    return [
        Item(name="against transformers", seconds=50, run=partial(compare, kind=Transformers)),
        Item(name="against our reference in eager PyTorch", seconds=40, run=partial(compare, kind=Reference)),
    ]


def compare(lab: Lab, kind: type[Peer]) -> Iterator[Found]:
    """Time a peer and oxfuse in turns, for each cell."""
    if kind is Transformers and importlib.util.find_spec("kernels") is None:
        yield Note(text="transformers runs with experts in bf16: its MXFP4 kernels need the package `kernels` and the hub.")
    full = full_model(lab)
    peer = kind(lab)
    for batch, context in DECODES:
        yield from _cell(lab, peer, "decode", batch, context, partial(_decode_turns, full, peer, batch, context))
    for tokens in PREFILLS:
        yield from _cell(lab, peer, "prefill", 1, tokens, partial(_prefill_turns, full, peer, tokens))


def _cell(lab: Lab, peer: Peer, phase: str, batch: int, length: int, turns: Any) -> Iterator[Found]:
    """Return a cell's row; where the peer runs out of memory or fails, a note says so, and the next cell is tried."""
    try:
        theirs, ours = turns()
    except (torch.OutOfMemoryError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        if not lab.healthy():
            raise
        yield Note(text=f"{peer.name}, {phase}, batch {batch}, {length} tokens: {type(error).__name__}: {str(error)[:200]}")
        lab.tidy()
        return
    count = batch if phase == "decode" else length
    cells = {
        "phase": phase,
        "batch": batch,
        "tokens before" if phase == "decode" else "tokens": length,
        "ms": 1e3 * theirs,
        "tok/s": count / theirs,
        "oxfuse ms": 1e3 * ours,
        "oxfuse tok/s": count / ours,
        "times as fast": theirs / ours,
    }
    yield Row(table=f"{phase}: {peer.name}", cells=cells)


def _decode_turns(full: Full, peer: Peer, batch: int, context: int) -> tuple[float, float]:
    cache, ids = peer.cache(batch, context), peer.ids(batch, 1)
    sequences = with_context(full, batch, context)
    theirs, ours = list[float](), list[float]()

    def step() -> None:
        peer.run(ids, cache).argmax(-1)

    try:
        for _ in range(3):
            step()
            decode_step(full, sequences)
        for _ in range(TURNS):
            theirs += times([step], rounds=STEPS, warm_ups=0)
            ours += [decode_step(full, sequences) for _ in range(STEPS)]
    finally:
        release(full, sequences)
    return median(theirs), median(ours)


def _prefill_turns(full: Full, peer: Peer, tokens: int) -> tuple[float, float]:
    ids = peer.ids(1, tokens)
    theirs, ours = list[float](), list[float]()
    for turn in range(TURNS):
        seconds = times([lambda: peer.run(ids, peer.cache(1, 0))], rounds=1, warm_ups=0)
        mine = prefill_once(full, tokens)
        if turn:
            theirs += seconds
            ours.append(mine)
    return median(theirs), median(ours)
