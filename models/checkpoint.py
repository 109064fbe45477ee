"""Opens a checkpoint folder: its configuration, tokenizer files and tensors, which are mapped and not read.

In: a folder in the layout of Hugging Face (single or sharded safetensors) or OpenAI's `original/`. Out: a `Checkpoint`. Nothing
in the folder is executed, unpickled or written; what is damaged or leads out of the folder is refused with its name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oxfuse.errors import UserError, shown
from oxfuse.models.contract import ModelContract, contracts, lookup
from oxfuse.models.safetensors_file import SafetensorsFile
from oxfuse.models.tensor_source import FileTensor, MemoryTensor, TensorSource

__all__ = ["Checkpoint", "TensorSource", "tokenizer_files"]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_TOKENIZER = (
    "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a model is made from.

    `config` is the `config.json`, with `model_type` filled in where the layout has none. `tensors` are all that the checkpoint
    stores, by their names there. `folder` is None for a live module.
    """

    config: dict[str, Any]
    tensors: Mapping[str, TensorSource]
    generation_config: dict[str, Any] = field(default_factory=dict)
    tokenizer_files: tuple[Path, ...] = ()
    folder: Path | None = None

    @classmethod
    def open(cls, folder: Path | str) -> Checkpoint:
        """Open a folder. Raises UserError if it is not a whole checkpoint that oxfuse can read."""
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"{folder} {'is no folder' if folder.exists() else 'does not exist'}. Give a checkpoint's folder.")
        config = _read_json(folder / "config.json", required=True)
        texts = folder
        if not isinstance(config.get("model_type"), str):
            config = {**config, "model_type": _recognise(config, folder)}
            if not (folder / "tokenizer.json").exists():
                texts = folder.absolute().parent  # OpenAI's original/ has its tokenizer one level up
        return cls(
            config=config,
            tensors=_open_tensors(folder),
            generation_config=_read_json(texts / "generation_config.json"),
            tokenizer_files=tokenizer_files(texts),
            folder=folder,
        )

    @classmethod
    def of_tensors(
        cls,
        config: dict[str, Any],
        tensors: Mapping[str, Tensor],
        *,
        generation_config: dict[str, Any] | None = None,
    ) -> Checkpoint:
        """Return the checkpoint of a live module: its configuration's dict and its state dict."""
        sources = {
            name: MemoryTensor(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype, tensor=tensor)
            for name, tensor in tensors.items()
        }
        return cls(config=config, tensors=sources, generation_config=generation_config or {})

    def contract(self) -> ModelContract:
        """Return the contract of the checkpoint's model. Raises UserError if `model_type` is unknown."""
        return lookup(self.config["model_type"])

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of most of the unquantised tensors, counted in values; float32 if there is none."""
        counts: dict[torch.dtype, int] = {}
        for source in self.tensors.values():
            if source.dtype.is_floating_point:
                counts[source.dtype] = counts.get(source.dtype, 0) + torch.Size(source.shape).numel()
        return max(counts, key=lambda dtype: counts[dtype]) if counts else torch.float32


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """Return the files of `folder` that say how text becomes token ids: tokenizer, its configuration, chat template.

    Raises UserError where one of them is a link that leaves the folder: it would be copied into the artifact.
    """
    paths = [_inside(folder, name) for name in _TOKENIZER if (folder / name).is_file() or (folder / name).is_symlink()]
    if broken := [path for path in paths if not path.is_file()]:
        raise UserError(f"{broken[0]} links to {broken[0].resolve()}, which is not there. Get that file, or remove the link.")
    return tuple(paths)


def _recognise(config: Mapping[str, Any], folder: Path) -> str:
    for contract in contracts().values():
        if contract.recognises(config):
            return contract.model_type
    raise UserError(f"{folder / 'config.json'} names no model_type, and its keys are not those of a known model. Add model_type.")


def _read_json(path: Path, required: bool = False) -> dict[str, Any]:
    try:
        data = json.loads(_inside(path.parent, path.name).read_text("utf-8"))
    except FileNotFoundError:
        if not required:
            return {}
        raise UserError(
            f"{path.parent} has no {path.name}, so it is no checkpoint. Give a folder with config.json and safetensors."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}. Get the file again.") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} holds {type(data).__name__}, not an object. Get the file again.")
    return data


def _open_tensors(folder: Path) -> dict[str, TensorSource]:
    shards: dict[str, set[str] | None]
    if (folder / _SINGLE).exists():
        shards = {_SINGLE: None}
    elif (folder / _INDEX).exists():
        shards = _read_index(folder)
    else:
        shards = {path.name: None for path in sorted(folder.glob("*.safetensors"))}
    if not shards:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
        if pickles:
            raise UserError(
                f"{folder} holds pickles ({', '.join(pickles)}), which can run code when read; oxfuse reads safetensors only. "
                "Convert the checkpoint: model.save_pretrained(folder, safe_serialization=True)."
            )
        raise UserError(f"{folder} holds no safetensors. Give a folder with {_SINGLE} or {_INDEX}.")
    tensors: dict[str, TensorSource] = {}
    for name, wanted in shards.items():
        file = SafetensorsFile(_inside(folder, name))
        absent = sorted(wanted - file.entries.keys()) if wanted is not None else []
        if absent:
            raise UserError(f"{_INDEX} says that {shown(name)} holds {_some(absent)}; it does not. Get index and shards again.")
        for key in wanted if wanted is not None else file.entries:
            if key in tensors:
                raise UserError(
                    f"{folder}: {shown(key)} is stored in {name} and in another file. "
                    f"Remove what does not belong, or add {_INDEX}."
                )
            entry = file.entries[key]
            tensors[key] = FileTensor(name=key, shape=entry.shape, dtype=entry.dtype, file=file)
    return tensors


def _read_index(folder: Path) -> dict[str, set[str] | None]:
    path = folder / _INDEX
    names = _read_json(path).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(shard, str) for shard in names.values()):
        raise UserError(f"{path} has no weight_map from tensors to files. Get the file again.")
    shards: dict[str, set[str] | None] = {}
    for tensor, shard in names.items():
        held = shards.setdefault(shard, set())
        assert held is not None
        held.add(tensor)
    for shard in shards:
        if Path(shard).suffix in _PICKLES:
            raise UserError(
                f"{path} names {shown(shard)}, a pickle, which can run code when read; oxfuse reads safetensors only."
            )
    if absent := sorted(shard for shard in shards if not _inside(folder, shard).is_file()):
        raise UserError(
            f"{path} names {_some(absent)}, which {'is' if len(absent) == 1 else 'are'} not there. Get the missing files."
        )
    return shards


def _inside(folder: Path, name: str) -> Path:
    """Return the path of a file of the checkpoint. Raises UserError if it, or what it links to, lies elsewhere.

    A snapshot of the Hugging Face cache is made of links to that cache's stores; those count as inside.
    """
    root, path = folder.resolve(), folder / name
    try:
        target = path.resolve()
        target.is_file()
    except (OSError, RuntimeError) as error:  # Python up to 3.12 raises RuntimeError for links that lead in a circle
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{folder}: {shown(name)} cannot be followed: {reason!s:.200}. Copy the file into the folder.") from error
    except ValueError as error:  # a NUL, or no Unicode
        raise UserError(f"{folder}: {shown(name)} is no file name: {error!s:.200}. Get the index again.") from error
    homes = [root, *_stores(root)]
    if Path(name).is_absolute() or ".." in Path(name).parts or not any(target.is_relative_to(home) for home in homes):
        raise UserError(f"{folder}: {shown(name)} leads to {shown(str(target), 200)}, outside the folder. Copy the file into it.")
    return path


def _stores(root: Path) -> list[Path]:
    """Return where the Hugging Face cache keeps the files of a snapshot: REPOSITORY/blobs, and CACHE/blobs for all repositories.

    `root` is CACHE/models--ORG--NAME/snapshots/COMMIT or a folder in it. Since huggingface_hub 2 a repository's blob may itself
    be a link into the shared store.
    """
    for snapshot in (root, *root.parents):
        if snapshot.parent.name == "snapshots":
            repository = snapshot.parents[1]
            shared = [repository.parent / "blobs"] if repository.name.startswith("models--") else []
            return [repository / "blobs", *shared]
    return []


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(f"{name:.200}" for name in names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
