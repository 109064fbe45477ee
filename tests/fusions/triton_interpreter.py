"""Kernels under Triton's interpreter: the same source, loaded a second time, runs on CPU tensors with numpy.

Triton decides when a kernel is decorated whether it will be interpreted, so a fusion's module is loaded anew for it and the one
that the process has stays a compiled one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from .triton_bfloat16 import real_bfloat16


@contextlib.contextmanager
def _as_it_was(*owners: Any) -> Iterator[None]:
    """Undo what is done to attributes of `owners`: the interpreter takes back its changes for a kernel, not for what it calls."""
    before = [(owner, name, value) for owner in owners for name, value in vars(owner).items()]
    try:
        yield
    finally:
        for owner, name, value in before:
            if vars(owner)[name] is not value:
                setattr(owner, name, value)


@contextlib.contextmanager
def _interpreting() -> Iterator[None]:
    before, library = triton.knobs.runtime.interpret, _library()
    triton.knobs.runtime.interpret = True
    for module, name, _, interpreted in library:
        setattr(module, name, interpreted)
    try:
        with _as_it_was(tl, tl.core, tl.math, tl.core.tensor, tl.core.tensor_descriptor_base), real_bfloat16():
            yield
    finally:
        triton.knobs.runtime.interpret = before
        for module, name, compiled, _ in library:
            setattr(module, name, compiled)


@functools.cache
def _library() -> list[tuple[ModuleType, str, Any, Any]]:
    """Return (module, name, compiled, interpreted) for what triton.language has in its own language, such as tl.sum."""
    compiled = {name: value for name, value in vars(tl.standard).items() if isinstance(value, triton.JITFunction)}
    interpreted = {name: InterpretedFunction(value.fn) for name, value in compiled.items()}
    return [
        (module, name, value, interpreted[name])
        for module in (tl, tl.standard)
        for name, value in compiled.items()
        if vars(module).get(name) is value
    ]


@functools.cache
def interpreted(name: str) -> ModuleType:
    """Return `oxfuse.passes.fusions.<name>` (such as "sink_attention.triton") with interpreted kernels, its imports included."""
    hidden = {module: sys.modules.pop(module) for module in _kernel_modules()}
    try:
        with _interpreting():
            return importlib.import_module(f"oxfuse.passes.fusions.{name}")
    finally:
        for loaded in _kernel_modules():
            del sys.modules[loaded]
            owner, _, attribute = loaded.rpartition(".")
            sys.modules[owner].__dict__.pop(attribute, None)
            if loaded in hidden:
                setattr(sys.modules[owner], attribute, hidden[loaded])
        sys.modules.update(hidden)


def _kernel_modules() -> list[str]:
    """Return the loaded modules that hold kernels: triton.py of a fusion's folder, and triton_*.py."""
    ours = [name for name in sys.modules if name.startswith("oxfuse.passes.fusions.")]
    return [name for name in ours if name.rpartition(".")[2].startswith("triton")]


def run(kernel: Any) -> Any:
    """Stand for `wrap_triton`: launch an interpreted kernel as it is."""

    class Launcher:
        def __getitem__(self, grid: Any) -> Any:
            def launch(*args: Any, **kwargs: Any) -> None:
                with _interpreting():
                    kernel[grid](*args, **kwargs)

            return launch

    return Launcher()
