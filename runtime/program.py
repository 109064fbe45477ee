"""One compiled program: an unpacked AOTInductor library, run with weights that it borrows.

The only module that touches torch's private AOTInductor bindings (`torch._C._aoti`, the same from torch 2.11 to 2.13). Weights
enter as mapped tensors and stay the caller's: the library keeps their addresses, so a Program holds them for as long as it lives.
The library must agree with the manifest about every constant before it is run, because it dereferences a missing one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from oxfuse.runtime.errors import InternalError, UserError, shown
from oxfuse.runtime.manifest import OpsLibrary, ProgramSpec
from oxfuse.runtime.weights import damaged


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
            self._runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(path.resolve()), 1)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"{path} cannot be loaded: {reason}. Compile the checkpoint again on this machine.") from error
        self.name = spec.name
        self._inputs = len(spec.inputs)
        self._constants = self._bind(path, spec, weights)
        self._runner.update_constant_buffer(self._constants, False, True, user_managed=True)

    def _bind(self, path: Path, spec: ProgramSpec, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        dtypes = self._runner.get_constant_names_to_dtypes()
        bound = {}
        for name, qualified in self._runner.get_constant_names_to_original_fqns().items():
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

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """Run one step. Mutates the caches among `inputs`. Raises InternalError where the library fails."""
        if len(inputs) != self._inputs:
            raise InternalError(f"The program {self.name} takes {self._inputs} inputs and was given {len(inputs)}.")
        try:
            (output,) = self._runner.run(list(inputs))
        except RuntimeError as error:
            raise InternalError(f"The program {self.name} failed: {str(error).partition(chr(10))[0]}") from error
        return output


DTYPE_CODES = {
    torch.uint8: 0,
    torch.int8: 1,
    torch.int16: 2,
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.float32: 6,
    torch.float64: 7,
    torch.bool: 11,
    torch.bfloat16: 15,
}
"""c10::ScalarType, whose numbers are part of torch's serialised formats."""
