"""The artifact's manifest: its schema, and the only code that reads or writes `manifest.json`.

It lives in the runtime because a machine that only runs artifacts must read it; the compiler fills it. Every field is plain
JSON. An unknown format version, a missing field or a value of the wrong type is a UserError that names the field.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from oxfuse.runtime.errors import UserError, shown

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
ONNX = "onnx"
"""The kind of programs that are ONNX models; the others are "aoti"."""
ONNX_CUDA = "onnx:cuda"
"""The target of ONNX models that onnxruntime's GPU kernels are to compute."""
MOST = 1 << 53
"""No number of an artifact is larger, and products of a few such numbers are still numbers that a float holds."""
TaskName = typing.Literal[
    "text-generation", "text-classification", "token-classification", "question-answering", "feature-extraction"
]


POOLING = ("none", "rightmost")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


def _require(where: str, least: int, **numbers: int) -> None:
    for name, value in numbers.items():
        if value < least:
            raise UserError(f"{where}.{name} is {value}, expected {least} or more: the manifest is damaged. Compile it again.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor input or output of a program. `shape` holds numbers and the names of dynamic dims."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DimRange:
    """Smallest and largest size of a dynamic dim, both included."""

    min: int
    max: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramSpec:
    """One compiled program. `constants` maps the program's own constant names to tensors of the weight file.

    `path` is its folder in the artifact; `library` and the names in `files`, which gives their sha256, are relative to it.
    """

    name: str
    target: str
    kind: str
    path: str
    library: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: dict[str, DimRange]
    constants: dict[str, str]
    files: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpsLibrary:
    """The C++ ops that programs call. `probe` is one qualified op name: where it is registered, the library is loaded already."""

    path: str
    probe: str
    sha256: str


def cache_shapes(kv_heads: int, head_dim: int, block_size: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return the shapes of a block of K, [kv_heads, head_dim, block_size], and of V, [kv_heads, block_size, head_dim].

    A head's part of a block lies in one piece, and K so that the products with a query run along the keys.
    """
    return (kv_heads, head_dim, block_size), (kv_heads, block_size, head_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheGroup:
    """Layers that share block tables. `window` 0 sees every earlier token."""

    window: int
    layers: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """The paged cache: per layer K and V of [blocks, *cache_shapes(...)]; `kv_heads` and `head_dim` are per layer."""

    block_size: int
    dtype: str
    kv_heads: tuple[int, ...]
    head_dim: tuple[int, ...]
    groups: tuple[CacheGroup, ...]

    def __post_init__(self) -> None:
        layers = sorted(layer for group in self.groups for layer in group.layers)
        if not layers or layers != list(range(len(self.kv_heads))) or len(self.head_dim) != len(self.kv_heads):
            raise UserError(
                f"The cache has {len(self.kv_heads)} kv_heads and {len(self.head_dim)} head_dim, and groups of the layers "
                f"{shown(layers)}, expected one each for every layer: the manifest is damaged. Compile the checkpoint again."
            )
        _require("cache", 1, block_size=self.block_size, kv_heads=min(self.kv_heads), head_dim=min(self.head_dim))
        _require("cache", 0, window=min(group.window for group in self.groups))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """`max_context`: tokens of one sequence; `max_batch`: sequences of one step; `max_step_tokens`: tokens of one step."""

    max_context: int
    max_batch: int
    max_step_tokens: int

    def __post_init__(self) -> None:
        _require("limits", 1, **dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """`config` is the checkpoint's configuration as oxfuse understood it.

    pooling: which tokens of a sequence the model answers for: "none", each; "rightmost", the last that is not padding.
    labels: what a classifier tells apart, by number; problem_type: whether by one of them ("single_label_classification"), any
    ("multi_label_classification") or as a number ("regression"); None follows from how many labels there are.
    """

    model_type: str
    task: str
    dtype: str
    vocab_size: int
    config: dict[str, Any]
    pooling: str = "none"
    labels: tuple[str, ...] = ()
    problem_type: str | None = None

    def __post_init__(self) -> None:
        known: dict[str, tuple[str | None, ...]] = {"pooling": POOLING, "problem_type": (None, *PROBLEM_TYPES)}
        for name, values in known.items():
            if (value := getattr(self, name)) not in values:
                raise UserError(
                    f"model.{name} is {shown(value)}, not one of {values}: the manifest is damaged. Compile it again."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationSpec:
    """What the checkpoint's own files say about the end of a text."""

    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    pad_token_id: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Requirements:
    """What the host must have. `torch` is `major.minor`; `cpu_features` are flags as /proc/cpuinfo spells them.

    An empty string asks for nothing: an ONNX model runs on any machine that has a runtime for it.
    `gpu_archs` are those that programs were compiled for ("sm_90"), of which the GPU must have one; none for a CPU's artifact.
    """

    torch: str
    platform: str
    machine: str
    cpu_isa: str
    cpu_features: tuple[str, ...]
    glibc: str
    gpu_archs: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightTensor:
    """One tensor of the weight file. `layout` tells what was done to the checkpoint's tensor `source`, step by step."""

    dtype: str
    shape: tuple[int, ...]
    source: str
    layout: tuple[str, ...]
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightFile:
    """A safetensors file; `header_sha256` covers its length prefix and header; `load` checks that, `verify` the tensors."""

    path: str
    bytes: int
    header_sha256: str
    tensors: dict[str, WeightTensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassRecord:
    """What one pass did: `count` rewrites, of `checked` structurally distinct kinds that were checked numerically."""

    name: str
    count: int
    checked: int
    max_error: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything the runtime knows about an artifact."""

    format_version: int
    name: str
    created_by: dict[str, str]
    source: dict[str, str]
    model: ModelSpec
    generation: GenerationSpec
    programs: tuple[ProgramSpec, ...]
    ops_library: OpsLibrary | None
    cache: CacheSpec
    limits: Limits
    requirements: Requirements
    weights: tuple[WeightFile, ...]
    passes: tuple[PassRecord, ...]
    numerics: dict[str, str]
    tokenizer_files: dict[str, str]
    golden: str | None

    def to_json(self) -> str:
        """Return the manifest as indented JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


T = TypeVar("T")


def _in_range(value: object) -> bool:
    return not isinstance(value, int) or abs(value) < MOST


def _is_text(value: str) -> bool:
    """Tell whether a string can be a file's name and be printed: no NUL, no half of a surrogate pair."""
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    for text in value if isinstance(value, dict) else [value]:
        if isinstance(text, str) and not _is_text(text):
            raise UserError(f"{where:.300} holds {shown(text)}, which is no text: the manifest is damaged. Compile it again.")
    if origin is types.UnionType or origin is typing.Union:
        for option in args:
            if option is type(None) and value is None:
                return None
            if isinstance(option, type) and option is not type(None) and not dataclasses.is_dataclass(option):
                if type(value) is option and _in_range(value):
                    return value
            elif option is not type(None) and value is not None:
                return _convert(option, value, where)
    elif origin is tuple:
        if isinstance(value, list):
            return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    elif origin is dict:
        if isinstance(value, dict):
            return {str(k): _convert(args[1], item, f"{where}.{k:.100}") for k, item in value.items()}
    elif dataclasses.is_dataclass(kind):
        if isinstance(value, dict):
            hints = typing.get_type_hints(kind)
            missing, unknown = hints.keys() - value.keys(), value.keys() - hints.keys()
            if missing or unknown:
                words = [f"lacks {shown(sorted(missing), 300)}"] * bool(missing)
                words += [f"has unknown {shown(sorted(unknown), 300)}"] * bool(unknown)
                raise UserError(f"{where} {' and '.join(words)}: the manifest is damaged. Compile the checkpoint again.")
            return typing.cast(Any, kind)(
                **{name: _convert(hint, value[name], f"{where}.{name}") for name, hint in hints.items()}
            )
    elif kind is float:
        if type(value) in (int, float):
            return float(value)
    elif isinstance(kind, type) and type(value) is kind and _in_range(value):
        return value
    raise UserError(
        f"{where:.300} is {shown(value)}, which is not {kind}: the manifest is damaged. Compile the checkpoint again."
    )


def parse_manifest(text: str, where: str = MANIFEST) -> Manifest:
    """Return the manifest in `text`.

    Raises UserError if it is not JSON, of another format version, or damaged; the message begins with `where`.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}): the manifest is damaged. Compile the checkpoint again.") from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{where} has format version {version!r}; this oxfuse reads version {FORMAT_VERSION}. "
            "Compile the checkpoint again, or install the oxfuse that made the artifact."
        )
    manifest = _convert(Manifest, data, where)
    assert isinstance(manifest, Manifest)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of the artifact in `folder`. Raises UserError where there is none or it does not fit."""
    path = folder / MANIFEST
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        what = "has no manifest.json" if folder.is_dir() else "does not exist"
        raise UserError(f"{folder} {what}, so it is not an oxfuse artifact. Make one with `oxfuse compile SRC -o DIR`.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    return parse_manifest(text, str(path))
