"""`torch.compile(module, backend="oxfuse")` for modules on a GPU, as far as no GPU is needed: what is fused, what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from oxfuse.compiler import backend
from oxfuse.compiler.lowering.kernels import Launches
from oxfuse.passes.manager import PassResult, run_passes

from ..passes.graphs import transformers_gpt_neox, transformers_gpt_oss

IDS = torch.randint(1, 200, (1, 25), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def moved(x: Tensor, device: str) -> Tensor:
    """Return a fake tensor like x on another device, which this torch need not have."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)


def passes_on(device: str, model: nn.Module, **given: Any) -> tuple[fx.GraphModule, dict[str, PassResult]]:
    """Return the model's graph, and what the passes did, as if everything lay on `device`; the call itself runs on the CPU."""
    found: list[tuple[fx.GraphModule, list[PassResult]]] = []

    def compile_graph(module: fx.GraphModule, inputs: list[Any]) -> Any:
        mode = torch._guards.TracingContext.get().fake_mode
        assert mode is not None
        traced, weights, _ = backend.trace(module, inputs)
        move = lambda x: torch.device(device) if isinstance(x, torch.device) else x  # noqa: E731
        for node in traced.graph.nodes:  # not traced there: Python's own indexing wants a torch that has the device
            node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), move)
            if isinstance(node.meta.get("val"), Tensor):
                with mode:
                    node.meta["val"] = moved(node.meta["val"], device)
        found.append((traced, run_passes(traced, weights, policy="best_effort")))
        return module.forward

    with torch.no_grad():
        torch.compile(model, backend=compile_graph, dynamic=True)(**given)
    ((traced, results),) = found
    return traced, {result.name: result for result in results}


def ragged() -> dict[str, Tensor]:
    """Return two sequences of unlike lengths, with a mask that tells."""
    mask = torch.ones(2, 25, dtype=torch.long)
    mask[0, :4] = 0
    return {"input_ids": IDS.expand(2, 25), "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        pytest.param("oss", "sink_attention", marks=pytest.mark.slow),
        ("oss", "masked_attention"),
        pytest.param("neox", "sink_attention", marks=pytest.mark.slow),
        pytest.param("neox", "masked_attention", marks=pytest.mark.slow),
    ],
)
def test_every_layer_is_fused(family: str, attention: str) -> None:
    model = transformers_gpt_oss() if family == "oss" else transformers_gpt_neox("sdpa")
    given = ragged() if attention == "masked_attention" else {"input_ids": IDS}
    _, results = passes_on("cuda", model, **given)
    layers = model.config.num_hidden_layers
    wanted = {attention: layers, "rotary_embedding": layers}
    if family == "oss":
        wanted |= {"moe_dispatch": layers, "rms_norm": 2 * layers + 1}
    refused = [one.reason for result in results.values() for one in result.refused]
    assert {name: results[name].count for name in wanted} == wanted and not refused, refused


def test_what_is_fused_launches_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bodies run on the graph's own fake tensors, whose lengths are symbols: no kernel may be one of a single length."""
    launches = Launches()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    traced, _ = passes_on("cuda", transformers_gpt_oss(num_hidden_layers=1), input_ids=IDS)
    monkeypatch.setattr(torch.library, "wrap_triton", launches.wrap)
    from oxfuse.passes.fusions.moe_dispatch import reference as moe
    from oxfuse.passes.fusions.sink_attention import reference as attention

    bodies = {"sink_attention_dense": attention.sink_attention_dense, "moe_dispatch": moe.moe_dispatch}
    for node in traced.graph.nodes:
        body = bodies.get(getattr(node.target, "_opname", ""))
        if body is not None:
            args = fx.node.map_arg(node.args, lambda n: n.meta["val"])
            with args[0].fake_mode:
                assert body(*args).shape == args[0].shape
    made = {launch.name: launch for launch in launches.made}
    assert {"attention_kernel", "gate_up_kernel", "down_kernel"} <= made.keys()
    assert made["gate_up_kernel"].constants["COLUMNS"] and made["down_kernel"].constants["COLUMNS"]
    for launch in launches.made:
        constants = [value for value in launch.constants.values() if isinstance(value, torch.SymInt)]
        assert not constants, launch.name


@pytest.mark.slow
def test_other_devices_are_refused() -> None:
    _, results = passes_on("xpu", transformers_gpt_oss(num_hidden_layers=1), input_ids=IDS)
    for name in ("sink_attention", "moe_dispatch"):
        assert results[name].count == 0 and "there is no kernel for xpu" in results[name].refused[0].reason
