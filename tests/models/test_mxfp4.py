"""MXFP4: our values against transformers' own dequantisation, for every byte and every scale."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from oxfuse.errors import UserError
from oxfuse.models import load_reference
from oxfuse.models.checkpoint import Checkpoint
from oxfuse.models.tensor_source import dequantise
from tests.checkpoints import random_gpt_oss


def test_every_byte_under_every_scale() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 255, 16, 16).contiguous()
    scales = torch.arange(255, dtype=torch.uint8)[None, :, None].expand(1, 255, 16).contiguous()
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(dequantise(blocks, scales).transpose(1, 2), expected)


def test_low_nibble_comes_first() -> None:
    block = torch.tensor([[[[0x21, 0x87, 0xFC] + [0] * 13]]], dtype=torch.uint8)
    values = dequantise(block, torch.full((1, 1, 1), 128, dtype=torch.uint8))
    assert values[0, 0, :6].tolist() == [1.0, 2.0, 12.0, -0.0, -4.0, -12.0] and values.shape == (1, 1, 32)


def test_bfloat16_holds_the_values_exactly(tmp_path: Path) -> None:
    folder = random_gpt_oss(tmp_path, layout="mxfp4", dtype=torch.bfloat16)
    single, half = load_reference(folder), load_reference(folder, torch.bfloat16)
    for name, tensor in single.state_dict().items():
        assert torch.equal(half.state_dict()[name].float(), tensor), name


@pytest.mark.parametrize("layout", ["mxfp4", "original"])
def test_scale_of_255_is_refused_with_its_name(tmp_path: Path, layout: str) -> None:
    folder = random_gpt_oss(tmp_path, layout=layout)  # type: ignore[arg-type]
    name = {"mxfp4": "model.layers.1.mlp.experts.down_proj_scales", "original": "block.1.mlp.mlp2_weight.scales"}[layout]
    tensors = load_file(folder / "model.safetensors")
    tensors[name][6, 5, 1] = 255
    save_file(tensors, folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    contract = checkpoint.contract()
    source = contract.sources(checkpoint, contract.parse_config(checkpoint.config), "text-generation")[
        "model.layers.1.mlp.experts.down_proj"
    ]
    for read in (source.read, source.parts()["scales"].read, lambda: source.read(slice(6, 7))):
        with pytest.raises(UserError, match=f"^{name} holds a scale byte of 255"):
            read()
    assert source.read(slice(0, 6)).isfinite().all()
