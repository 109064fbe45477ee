"""An AOTInductor library through its C interface: what torch's Python class for it does not offer.

A GPU's program must be run by `AOTInductorModelContainerRunSingleThreaded`. The other way, which is all that
`torch._C._aoti.AOTIModelContainerRunnerCuda` can take (its constructors lack the C++ class's `run_single_threaded`, in torch
2.11 to 2.13), records an event after each run and asks for it before the next: an event that was recorded into a CUDA graph
must not be asked for, so no run after a capture would succeed. The interface is plain C
(`torch/csrc/inductor/aoti_runtime/interface.h`), its functions are compiled into every program, and what tensors look like in
it is told by torch's C shim (`torch/csrc/inductor/aoti_torch/c/shim.h`). Nothing in here depends on the kind of device.

Weights are handed over as tensors that do not own their memory. The library keeps a handle of each that it never deletes
(`MaybeOwningAtenTensorHandle`, user-managed), so an owner among them would never be freed.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from ctypes import POINTER, byref, c_bool, c_char_p, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oxfuse.runtime.errors import InternalError

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

DEVICE_CODES = {"cpu": 0, "cuda": 1}
"""c10::DeviceType."""

PREFIX = "AOTInductorModelContainer"
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "CreateWithDevice": (POINTER(c_void_p), c_size_t, c_char_p, c_char_p),
    "Delete": (c_void_p,),
    "GetNumInputs": (c_void_p, POINTER(c_size_t)),
    "GetNumOutputs": (c_void_p, POINTER(c_size_t)),
    "GetNumConstants": (c_void_p, POINTER(c_size_t)),
    "GetConstantName": (c_void_p, c_size_t, POINTER(c_char_p)),
    "GetConstantOriginalFQN": (c_void_p, c_size_t, POINTER(c_char_p)),
    "GetConstantDtype": (c_void_p, c_size_t, POINTER(c_int32)),
    "GetConstantFromFolded": (c_void_p, c_size_t, POINTER(c_bool)),
    "UpdateUserManagedConstantBufferPairs": (c_void_p, c_void_p, c_size_t, c_bool, c_bool),
    "RunSingleThreaded": (c_void_p, c_void_p, c_size_t, c_void_p, c_size_t, c_void_p, c_void_p),
}


class _Entry(ctypes.Structure):
    """AOTInductorConstantMapEntry."""

    _fields_ = (("name", c_char_p), ("handle", c_void_p))


class Library:
    """A loaded program. One call at a time; a call lets other Python threads run."""

    def __init__(self, path: Path, device: torch.device) -> None:
        """Open the library at `path` for `device`; files that it needs lie beside it.

        Raises OSError where it cannot be opened, RuntimeError where it refuses the device, InternalError where it is of a kind
        that this class does not run.
        """
        _check_no_proxy(path)
        self._library = ctypes.CDLL(loadable_path(path))
        self._functions = {name: _function(self._library, PREFIX + name, *types) for name, types in _FUNCTIONS.items()}
        self._last_error = getattr(self._library, "AOTInductorGetLastError", None)
        self._device, self._tensors = device, dict[str, Tensor]()
        container = c_void_p()
        self._call("CreateWithDevice", byref(container), 1, str(device).encode(), str(path.parent.resolve()).encode())
        self._container = container
        self._close = weakref.finalize(self, self._functions["Delete"], container)
        self._close.atexit = False  # the system frees all, in an order that is nobody's concern
        self.inputs, self.outputs = self._count("GetNumInputs"), self._count("GetNumOutputs")

    def constants(self) -> tuple[dict[str, str], dict[str, int]]:
        """Return the original name and the dtype's code of each constant that the library wants, by the name that it uses."""
        names, dtypes = dict[str, str](), dict[str, int]()
        for index in range(self._count("GetNumConstants")):
            name, original, code, folded = c_char_p(), c_char_p(), c_int32(), c_bool()
            self._call("GetConstantFromFolded", self._container, index, byref(folded))
            if folded.value:
                continue
            self._call("GetConstantName", self._container, index, byref(name))
            self._call("GetConstantOriginalFQN", self._container, index, byref(original))
            self._call("GetConstantDtype", self._container, index, byref(code))
            key = (name.value or b"").decode()
            names[key], dtypes[key] = (original.value or b"").decode(), code.value
        return names, dtypes

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        """Let the library use `tensors`, by the names that it uses, for its constants; they are kept, and not copied.

        Raises RuntimeError where one is missing or on another device.
        """
        handles = {name.encode(): _borrowed(tensor) for name, tensor in tensors.items()}
        entries = (_Entry * len(handles))(*(_Entry(name, handle) for name, handle in handles.items()))
        try:
            self._call("UpdateUserManagedConstantBufferPairs", self._container, entries, len(handles), False, True)
        finally:
            for handle in handles.values():
                _shim("aoti_torch_delete_tensor_object", c_void_p)(handle)
        self._tensors = dict(tensors)

    def run(self, inputs: Sequence[Tensor], stream: int) -> list[Tensor]:
        """Queue a run on `stream` and return its outputs, which the allocator that is current there has made.

        Raises RuntimeError where it fails.
        """
        if len(inputs) != self.inputs:
            raise RuntimeError(f"{len(inputs)} inputs were given, {self.inputs} are expected")
        capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(list(inputs))
        given = (c_void_p * len(capsules))(*(_capsule_pointer(capsule, None) for capsule in capsules))
        taken = (c_void_p * self.outputs)()
        self._call("RunSingleThreaded", self._container, given, len(given), taken, len(taken), stream, None)
        made: list[Tensor] = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs([_capsule(p, None, None) for p in taken])
        return made

    def _count(self, function: str) -> int:
        count = c_size_t()
        self._call(function, self._container, byref(count))
        return count.value

    def _call(self, function: str, *args: Any) -> None:
        if self._functions[function](*args):
            text = c_char_p()
            if self._last_error is not None:
                self._last_error(byref(text))
            raise RuntimeError((text.value or b"").decode(errors="replace") or f"{PREFIX}{function} failed")


def _check_no_proxy(path: Path) -> None:
    """Raise InternalError where the program calls operators by name, as ops registered in C++: nobody here does that for it."""
    try:
        nodes = json.loads(path.with_suffix(".json").read_text("utf-8")).get("nodes")
    except (OSError, ValueError, AttributeError):
        return
    if nodes:
        raise InternalError(f"{path} calls {len(nodes)} operators by name, which only a program for a CPU can.")


def loadable_path(path: Path) -> str:
    """Return a spelling of `path` that belongs to the file that is there now.

    The system's loader takes a library that it has by the same name for the same library, and never forgets one with C++
    statics. An artifact that was compiled again into its folder would so be run with the programs of the old one. It compares
    names as they are spelled, and then files: so this one spells who the file is, in `/` and `/./`.
    """
    path = path.resolve()
    found = path.stat()
    identity = hashlib.sha256(f"{found.st_dev} {found.st_ino} {found.st_mtime_ns} {found.st_size}".encode()).digest()[:16]
    bits = "".join(f"{byte:08b}" for byte in identity)
    return f"{path.parent}{bits.translate({ord('0'): '/', ord('1'): '/.'})}/{path.name}"


def _function(library: ctypes.CDLL, name: str, *types: Any) -> Callable[..., int]:
    function = library[name]  # unlike an attribute, one that nobody else gives other types
    function.argtypes, function.restype = types, c_int32
    made: Callable[..., int] = function
    return made


def _shim(name: str, *types: Any) -> Callable[..., int]:
    return _function(ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libtorch_cpu.so")), name, *types)


_capsule_pointer = ctypes.PYFUNCTYPE(c_void_p, ctypes.py_object, c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))
_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, c_void_p, c_char_p, c_void_p)(("PyCapsule_New", ctypes.pythonapi))


def borrow(tensor: Tensor) -> Tensor:
    """Return a tensor on the same memory, which it does not own: whoever uses it keeps the other one."""
    handle = _borrowed(tensor).value
    (borrowed,) = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs([_capsule(handle, None, None)])
    assert isinstance(borrowed, Tensor)
    return borrowed


def _borrowed(tensor: Tensor) -> c_void_p:
    """Return a handle of a tensor on the same memory, which it does not own."""
    handle, dims = c_void_p(), tensor.dim()
    create = _shim(
        "aoti_torch_create_tensor_from_blob",
        c_void_p,
        c_int64,
        POINTER(c_int64),
        POINTER(c_int64),
        c_int64,
        c_int32,
        c_int32,
        c_int32,
        POINTER(c_void_p),
    )
    failed = create(
        tensor.data_ptr(),
        dims,
        (c_int64 * dims)(*tensor.shape),
        (c_int64 * dims)(*tensor.stride()),
        0,
        DTYPE_CODES[tensor.dtype],
        DEVICE_CODES[tensor.device.type],
        tensor.device.index or 0,
        byref(handle),
    )
    if failed:
        raise InternalError(f"torch makes no tensor of {tensor.dtype} {list(tensor.shape)} on {tensor.device}.")
    return handle
