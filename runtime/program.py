"""One compiled program: an unpacked AOTInductor library, run with weights that it borrows.

Only this module and `library` touch torch's private AOTInductor bindings (`torch._C._aoti`, the same from torch 2.11 to 2.13).
Weights enter as mapped tensors, or as tensors on the device, and stay the caller's: the library keeps their addresses, so a
program holds them for as long as it lives. The library must agree with the manifest about every constant before it is run,
because it dereferences a missing one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from oxfuse.runtime.accelerator import Accelerator
from oxfuse.runtime.errors import InternalError, UserError, shown
from oxfuse.runtime.library import DTYPE_CODES, Library, borrow, loadable_path
from oxfuse.runtime.manifest import OpsLibrary, ProgramSpec
from oxfuse.runtime.weights import damaged

TeamSwitch = Callable[[int, int], None]


def has_op(qualified: str) -> bool:
    """Tell whether an op such as `oxfuse::sink_attention_1f2e` is registered in this process."""
    return bool(torch._C._dispatch_has_kernel(qualified))


def load_ops_library(folder: Path, spec: OpsLibrary) -> None:
    """Load the C++ ops that programs call, unless their op `spec.probe` is registered already, by whatever copy of the library.

    Raises UserError where the library cannot be loaded or does not register the op.
    """
    if has_op(spec.probe):
        return
    path = folder / spec.path
    try:
        load: Callable[[str], None] = torch.ops.load_library
        load(str(path.resolve()))
    except OSError as error:
        raise UserError(f"{path} cannot be loaded: {error}. Compile the checkpoint again on this machine.") from error
    if not has_op(spec.probe):
        raise damaged(path, f"does not register the op {spec.probe}")


TEAM_ROWS = 4
"""Tokens of a step that the C++ ops' own threads share; passes/fusions/threads.h has the same number."""


def team_switch(probe: str) -> TeamSwitch | None:
    """Return the function of the loaded C++ ops, `probe` among them, that has threads of their own share steps of few tokens.

    It is called as `switch(threads, regions)` on the thread that runs the step: with the number of threads and 1 before it, with
    0 and torch's number of threads after it. None where the ops are of an older version, without threads of their own.
    """
    name = f"few_{probe.rpartition('_')[2]}_address"
    if not has_op(f"oxfuse::{name}"):
        return None
    kind = ctypes.PYFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)  # it keeps the global lock: it takes 50 ns
    return kind(getattr(torch.ops.oxfuse, name)())


class Program:
    """A loaded program. Call it with the step's inputs in their order; it returns its only output.

    Calls hold Python's global lock, as torch's binding does. One call at a time.
    """

    def __init__(self, folder: Path, spec: ProgramSpec, weights: Mapping[str, Tensor]) -> None:
        """Load the library of `spec` from the artifact in `folder` and give it its constants from `weights`, uncopied.

        Raises UserError where the library cannot be loaded, or wants a constant that the manifest or the weight file lacks or
        has with another dtype.
        """
        path = folder / spec.path / spec.library
        try:
            self._runner = torch._C._aoti.AOTIModelContainerRunnerCpu(loadable_path(path), 1)
        except (OSError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"{path} cannot be loaded: {reason}. Compile the checkpoint again on this machine.") from error
        self.name = spec.name
        self._inputs = len(spec.inputs)
        names, dtypes = self._runner.get_constant_names_to_original_fqns(), self._runner.get_constant_names_to_dtypes()
        self._constants = _constants(path, spec, weights, names, dtypes)
        lent = {name: borrow(tensor) for name, tensor in self._constants.items()}  # the library never lets go of what it is given
        self._runner.update_constant_buffer(lent, False, True, user_managed=True)

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """Run one step. Mutates the caches among `inputs`. Raises InternalError where the library fails."""
        if len(inputs) != self._inputs:
            raise InternalError(f"The program {self.name} takes {self._inputs} inputs and was given {len(inputs)}.")
        try:
            (output,) = self._runner.run(list(inputs))
        except RuntimeError as error:
            raise InternalError(f"The program {self.name} failed: {str(error).partition(chr(10))[0]}") from error
        return output


class DeviceProgram:
    """A loaded program for an accelerator. Call it like `Program`, inside `accelerator.active()`; it queues the run only."""

    def __init__(self, folder: Path, spec: ProgramSpec, weights: Mapping[str, Tensor], accelerator: Accelerator) -> None:
        """Load the library of `spec` and give it its constants from `weights`, which are there. Raises as `Program` does."""
        path = folder / spec.path / spec.library
        try:
            with accelerator.active():  # the library makes its device the current one, and leaves it so
                self._library = Library(path, accelerator.device)
            names, dtypes = self._library.constants()
            self._library.bind(_constants(path, spec, weights, names, dtypes))
        except (OSError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"{path} cannot be loaded: {reason}. Compile the checkpoint again for this GPU and torch.") from error
        self.name, self._accelerator = spec.name, accelerator
        if (self._library.inputs, self._library.outputs) != (len(spec.inputs), 1):
            raise damaged(
                path,
                f"takes {self._library.inputs} inputs and gives {self._library.outputs} outputs, the manifest says "
                f"{len(spec.inputs)} and 1",
            )

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """Queue one step. Mutates the caches among `inputs`. Raises InternalError where the library fails."""
        try:
            (output,) = self._library.run(inputs, self._accelerator.stream())
        except RuntimeError as error:
            raise InternalError(f"The program {self.name} failed: {str(error).partition(chr(10))[0]}") from error
        return output


def _constants(
    path: Path, spec: ProgramSpec, weights: Mapping[str, Tensor], names: Mapping[str, str], dtypes: Mapping[str, int]
) -> dict[str, Tensor]:
    """Return the weights by the names of the library's constants. Raises UserError where the manifest or the file lacks one."""
    bound = {}
    for name, qualified in names.items():
        stored = spec.constants.get(name, spec.constants.get(qualified, ""))
        if stored not in weights:
            raise damaged(
                path, f"wants the constant {qualified}, which the manifest maps to {shown(stored) if stored else 'nothing'}"
            )
        tensor = weights[stored]
        if dtypes[name] != DTYPE_CODES.get(tensor.dtype):
            raise damaged(path, f"wants the constant {qualified} with dtype code {dtypes[name]}, {stored} is {tensor.dtype}")
        bound[name] = tensor
    return bound
