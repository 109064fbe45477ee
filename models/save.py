"""`save_pretrained`: a reference model becomes a checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from oxfuse.errors import UserError
from oxfuse.models.reference import Reference


def save_reference(model: Reference, folder: Path) -> None:
    """Write config.json and model.safetensors; see `Reference.save_pretrained`. Each is whole or as it was before."""
    parameters = dict(model.named_parameters())  # tied ones once, under the name that checkpoints have
    dtype = str(next(iter(parameters.values())).dtype).removeprefix("torch.")
    config = {**model.config.to_dict(), "architectures": [type(model).__name__], "torch_dtype": dtype}
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / ".model.safetensors.partial"
        save_file(tensors, partial, {"format": "pt"})
        partial.replace(folder / "model.safetensors")
        partial = folder / ".config.json.partial"
        partial.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        partial.replace(folder / "config.json")
    except OSError as error:
        raise UserError(f"The model cannot be written to {folder}: {error}. Name a folder with enough room.") from error
