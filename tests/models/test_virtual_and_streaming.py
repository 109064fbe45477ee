"""Models without memory: the one that the compiler exports, and the oracle that runs a module at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim, export

from oxfuse.models import load_reference, streaming
from oxfuse.models.checkpoint import Checkpoint
from oxfuse.models.contract import ModelContract, lookup
from oxfuse.models.streaming import stream_oracle
from oxfuse.models.tensor_source import TensorSource
from oxfuse.models.virtual import virtual_model
from tests.checkpoints import TINY, random_gpt_oss

BIG = {"num_hidden_layers": 4, "hidden_size": 8192, "intermediate_size": 8192, "num_local_experts": 128, "vocab_size": 201088}


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))


def parts(folder: Path, task: str = "text-generation") -> tuple[ModelContract, Any, dict[str, TensorSource]]:
    checkpoint = Checkpoint.open(folder)
    contract = checkpoint.contract()
    config = contract.parse_config(checkpoint.config)
    return contract, config, contract.sources(checkpoint, config, task)


def test_a_virtual_model_costs_nothing() -> None:
    """105 GB of parameters, one of them larger than most machines."""
    contract = lookup("gpt_oss")
    before = resident_bytes()
    model = virtual_model(contract, contract.parse_config({**TINY, **BIG}), "text-generation", torch.bfloat16)
    assert sum(p.nbytes for p in model.parameters()) > 100e9 and resident_bytes() - before < 50e6
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not any(p.requires_grad for p in model.parameters())
    assert not model.training and {p.device.type for p in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("task", ["text-generation", "feature-extraction"])
def test_virtual_models_have_real_buffers_and_stay_tied(tmp_path: Path, task: str) -> None:
    folder = random_gpt_oss(tmp_path, tie_word_embeddings=True)
    contract, config, found = parts(folder, task)
    model, real = virtual_model(contract, config, task, torch.float64), load_reference(folder, task=task)
    for (name, buffer), (_, expected) in zip(model.named_buffers(), real.named_buffers(), strict=True):
        assert torch.equal(buffer, expected) and buffer.dtype == torch.float32, name
    assert found.keys() == dict(model.named_parameters()).keys() == dict(real.named_parameters()).keys()
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {name: s.shape for name, s in found.items()}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
def test_export_has_no_guards_on_sizes(tmp_path: Path, dtype: torch.dtype, batch: int) -> None:
    """The exported graph, with real weights put in, gives the reference's logits at every length from 1 on."""
    folder = random_gpt_oss(tmp_path)
    contract, config, _ = parts(folder)
    blank = virtual_model(contract, config, "text-generation", dtype)
    ids = torch.zeros(batch, 5, dtype=torch.long)
    inputs = {"input_ids": ids, "position_ids": ids.clone(), "use_cache": False, "return_dict": False}
    dims: dict[str, Any] = {"use_cache": None, "return_dict": None}
    length = Dim("S", min=1, max=4096)
    if batch == 1:
        inputs["logits_to_keep"] = torch.zeros(2, dtype=torch.long)
        dims |= {"input_ids": {1: length}, "position_ids": {1: length}, "logits_to_keep": {0: Dim("R", min=1, max=4096)}}
    else:
        both = {0: Dim("B", min=1, max=64), 1: length}
        dims |= {"input_ids": both, "position_ids": both}
    program = export(blank, (), inputs, dynamic_shapes=dims, strict=False)
    assert not any(
        str(node.target).startswith(("aten.item", "aten._local_scalar", "aten._assert_s")) for node in program.graph.nodes
    )
    module, real = program.module(), load_reference(folder, dtype)
    module.load_state_dict(real.state_dict(), strict=False)
    for size in (1, 2, 19, 20, 130):
        rows = batch if batch == 1 else size % 4 + 1
        call = {"input_ids": torch.randint(0, 211, (rows, size)), "position_ids": torch.arange(size).expand(rows, -1) + 3}
        if batch == 1:
            call["logits_to_keep"] = torch.tensor([size - 1, 0, 0])
        (ours,) = module(**call, use_cache=False, return_dict=False)
        torch.testing.assert_close(ours, real(**call).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["hf", "mxfp4", "original"])
@pytest.mark.parametrize("small_slices", [False, True])
@torch.no_grad()
def test_the_oracle_is_the_reference(tmp_path: Path, layout: Any, small_slices: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if small_slices:
        monkeypatch.setattr(streaming, "SLICE_BYTES", 1000)
    folder = random_gpt_oss(tmp_path, layout=layout, dtype=torch.bfloat16)
    contract, config, found = parts(folder)
    ids, positions, rows = torch.randint(0, 211, (1, 130)), torch.arange(130)[None] + 7, torch.tensor([0, 64, 129])
    out = stream_oracle(
        contract,
        config,
        "text-generation",
        found,
        ids,
        positions,
        rows=rows,
        output_router_logits=True,
    )
    expected = load_reference(folder)(ids, position_ids=positions, output_router_logits=True)
    torch.testing.assert_close(out.values, expected.logits[:, rows], rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(out.router_logits, expected.router_logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_the_oracle_in_float64_and_without_a_head(tmp_path: Path, tied: bool) -> None:
    folder = random_gpt_oss(tmp_path, tie_word_embeddings=tied)
    ids, positions = torch.randint(0, 211, (1, 40)), torch.arange(40)[None]
    contract, config, found = parts(folder)
    exact = stream_oracle(contract, config, "text-generation", found, ids, positions, dtype=torch.float64).values
    torch.testing.assert_close(exact, load_reference(folder, torch.float64)(ids).logits, rtol=1e-9, atol=1e-9)
    contract, config, found = parts(folder, "feature-extraction")
    bare = stream_oracle(contract, config, "feature-extraction", found, ids, positions, rows=torch.tensor([1]))
    torch.testing.assert_close(bare.values, load_reference(folder).model(ids).last_hidden_state[:, [1]], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_oracle_reads_little_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only chosen experts are read, one at a time; large matrices never as a whole; no parameter outlives its module's turn."""
    monkeypatch.setattr(streaming, "SLICE_BYTES", 4096)
    contract, config, found = parts(random_gpt_oss(tmp_path, layout="mxfp4"))
    reads: list[tuple[str, int]] = []

    class Watched:
        def __init__(self, name: str) -> None:
            self.name = name

        def read(self, rows: slice | None = None) -> torch.Tensor:
            tensor = found[self.name].read(rows)
            reads.append((self.name, tensor.nbytes))
            return tensor

    watched: Any = {name: Watched(name) for name in found}
    ids = torch.tensor([[5, 9]])
    stream_oracle(contract, config, "text-generation", watched, ids, torch.arange(2)[None])
    one_expert = 64 * 192 * 4
    assert max(size for name, size in reads if ".experts." in name) == one_expert
    assert max(size for name, size in reads if ".experts." not in name) <= 4096
    per_layer = [name for name, _ in reads if name == "model.layers.0.mlp.experts.gate_up_proj"]
    assert 2 <= len(per_layer) <= 4 and reads.count(("model.embed_tokens.weight", 64 * 4)) == 2


def test_parameters_are_dropped_when_a_module_fails(tmp_path: Path) -> None:
    module = nn.Linear(2, 2, device="meta")

    def fail(*args: Any) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        streaming._run_whole(module, lambda leaf, rows: torch.zeros(2), fail)
    assert module.weight.is_meta and module.bias.is_meta
