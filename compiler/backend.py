"""`torch.compile(module, backend="oxfuse")`: the passes on the graphs that Dynamo captures of a model in memory.

A captured graph is traced again to pre-dispatch ATen, its parameters become weights that passes may look at but not rearrange,
and what the passes make of it goes through Inductor with our C++ ops. Nothing of the model is copied or changed: the compiled
graph is called with the module's own parameters, as Dynamo hands them over, and its caches are the caller's.

Uses private parts of torch: the metadata of Dynamo's graphs, `compile_fx` and the directory of Inductor's cache.
"""

from __future__ import annotations

import functools
import logging
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import StatefulSymbolicContext

from oxfuse.compiler.explain import explanation_of
from oxfuse.compiler.lowering.aoti import use_ops
from oxfuse.errors import UserError
from oxfuse.passes.fusions.build import OpsBuild, cached_ops, cpu_kernels, load_ops
from oxfuse.passes.graph import mark_chosen
from oxfuse.passes.manager import PassResult, run_passes
from oxfuse.passes.weights import Weight, WeightTable

log = logging.getLogger("oxfuse")


def compile_graph(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph that Dynamo captured; what torch calls for `backend="oxfuse"`.

    `mode` and `options` are Inductor's. How often each fusion was made is added to `torch._dynamo.utils.counters["oxfuse"]`, and
    told at level INFO of the logger `oxfuse`; what was left alone, with the reasons, at WARNING. A graph in which nothing was
    fused goes to Inductor as it came, with a UserWarning. Raises UserError where gradients are required.
    """
    if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in example_inputs):
        raise UserError(
            'backend="oxfuse" computes no gradients, and this call requires them: call the module under torch.no_grad() or '
            "torch.inference_mode(), or train it with another backend."
        )
    traced, weights, places = trace(module, example_inputs)
    results = run_passes(traced, weights, policy="best_effort")
    if not any(result.count for result in results if result.name != "drop_noops"):
        warnings.warn(f"{_nothing_found(results)} The graph runs through Inductor as it is.", stacklevel=2)
        return _through_inductor(module, example_inputs, mode, options)
    explanation = explanation_of("graph", results)
    if any(isinstance(value, Tensor) and value.device.type == "cpu" for value in example_inputs):
        use_ops(traced, cpu_ops())
    compiled = _through_inductor(_with_inputs(traced, places), example_inputs, mode, options)
    # Only now: Inductor may ask Dynamo to begin again.
    for name, count in explanation.counts.items():
        torch._dynamo.utils.counters["oxfuse"][name] += count
    log.info("torch.compile: %s", explanation)
    if explanation.left:
        log.warning(
            "torch.compile left %s", "; ".join(f"{left.layer}, not {left.fusion}: {left.reason}" for left in explanation.left)
        )
    return compiled


def trace(module: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[fx.GraphModule, WeightTable, dict[str, str]]:
    """Return Dynamo's graph as pre-dispatch ATen, the table of its weights, and the input that each weight came as.

    Parameters and buffers, which Dynamo makes inputs, are read as attributes, by their names in the module; the inputs stay.
    Other inputs are marked as chosen by the caller, but for sizes of tensors.
    """
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    mode = torch._guards.TracingContext.get().fake_mode
    assert mode is not None
    values = [_fake(mode, value) for value in example_inputs]

    def run(*args: Any) -> Any:
        with fx.traceback.preserve_node_meta():
            return fx.Interpreter(module).run(*args)

    with torch.no_grad(), mode, enable_python_dispatcher():
        traced = make_fx(run, pre_dispatch=True)(*values)
    table, places = WeightTable(), dict[str, str]()
    graph = traced.graph
    for old, new, value in zip(inputs, [node for node in graph.nodes if node.op == "placeholder"], values, strict=True):
        new._dynamo_source = getattr(old, "_dynamo_source", None)
        name = _weight_name(old)
        if name is None:
            if not re.search(r"\.size\(\)\[\d+\]$", _source_name(old)):
                mark_chosen(new)
            continue
        while name in table:  # of another module in the same graph
            name += "_"
        owner, _, leaf = name.rpartition(".")
        traced.add_submodule(owner, torch.nn.Module()) if owner and not _has(traced, owner) else None
        traced.get_submodule(owner).register_buffer(leaf, value)
        with graph.inserting_before(new.next):
            read = graph.get_attr(name)
        read.meta["val"] = value
        new.replace_all_uses_with(read)
        computed = "._buffers[" in _source_name(old)
        table[name] = Weight(shape=tuple(value.shape), dtype=value.dtype, source=name, computed=computed, fixed=True)
        places[name] = new.name
    for node in list(graph.nodes):
        if node.target is torch._C._set_grad_enabled:  # no gradient is computed, so nothing depends on whether one might be
            graph.erase_node(node)
        elif isinstance(node.meta.get("val"), torch.SymFloat):
            # With dynamic=True every float of a module is an input. Scales and slopes are constants of a fused op: to ask for
            # the value tells Dynamo to compile again where it changes.
            node.replace_all_uses_with(float(node.meta["val"]))
    traced.recompile()
    return traced, table, places


def _fake(mode: FakeTensorMode, value: Any) -> Any:
    """Return an input as Dynamo's compilers see it, its dynamic sizes the symbols that Dynamo gave them."""
    if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
        return value
    context = torch._guards.TracingContext.get().tensor_to_context.get(value)
    source = context.tensor_source if isinstance(context, StatefulSymbolicContext) else None
    return mode.from_tensor(value, static_shapes=context is None, symbolic_context=context, source=source)


def _weight_name(node: fx.Node) -> str | None:
    """Return the name in the module of a parameter or buffer that came as an input; None for other inputs."""
    source = _source_name(node)
    path = re.findall(r"\._(?:modules|parameters|buffers)\['([^']+)'\]", source)
    return ".".join(path) if re.search(r"\._(?:parameters|buffers)\['[^']+'\]$", source) else None


def _source_name(node: fx.Node) -> str:
    """Return where Dynamo found an input, as a Python expression; "" where it made the input up."""
    argument = node.meta.get("grapharg")
    name: Any = "" if argument is None else argument.source.name
    return str(name() if callable(name) else name)  # a method up to some torch, a property from then on


def _has(module: fx.GraphModule, name: str) -> bool:
    return name in dict(module.named_modules())


def _with_inputs(module: fx.GraphModule, places: Mapping[str, str]) -> fx.GraphModule:
    """Return the module with its weights as the inputs that they came as."""
    graph = module.graph
    inputs = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    for node in list(graph.nodes):
        if node.op == "get_attr" and str(node.target) in places:
            node.replace_all_uses_with(inputs[places[str(node.target)]])
            graph.erase_node(node)
    graph.lint()
    return fx.GraphModule(module, graph)


@functools.cache
def cpu_ops() -> OpsBuild:
    """Return the C++ ops for this machine, loaded; they are compiled once and lie in Inductor's cache."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    ops = cached_ops(cpu_kernels(live=True), "native", Path(cache_dir()) / "oxfuse")
    load_ops(ops)
    return ops


def _through_inductor(
    module: fx.GraphModule, example_inputs: Sequence[Any], mode: str | None, options: Mapping[str, Any] | None
) -> Callable[..., Any]:
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode and mode != "default" else {}), **(options or {})}
    return cast(Callable[..., Any], compile_fx(module, example_inputs, config_patches=patches))


def _nothing_found(results: Sequence[PassResult]) -> str:
    refused = [f"{one.layer}, not {result.name}: {one.reason}" for result in results for one in result.refused]
    return 'backend="oxfuse" found nothing to fuse' + (f" ({'; '.join(refused)})." if refused else ".")
