"""Weights and activations of 8 bits on the CPU: what they lose, and that nothing else is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import oxfuse
from oxfuse.errors import UserError
from oxfuse.models import load_reference
from oxfuse.runtime.verify import verify_artifact

from .. import neox
from ..checkpoints import random_gpt_oss
from .held_out import held_out

BUNDLED = Path(__file__).parents[2] / "artifacts" / "tiny-gpt-oss"
ROUNDING = 0.1
"""Of the whole error: what may be left against the oracle with the same weights and rounded activations. The arithmetic differs
in the last bits alone, but now and then that moves a value over the edge between two of its 255 steps."""


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("mxfp4", {"activations": "int8", "dense": "int8"}),
        pytest.param("mxfp4", {"activations": "int8"}, marks=pytest.mark.slow),
        pytest.param("mxfp4", {"dense": "int8"}, marks=pytest.mark.slow),
        pytest.param("hf", {"dense": "int8"}, marks=pytest.mark.slow),
        pytest.param("neox", {"activations": "int8", "dense": "int8"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_is_lost_and_nothing_else(tmp_path: Path, layout: str, options: dict[str, str]) -> None:
    folder = tmp_path / "checkpoint"
    if layout == "neox":  # sizes that no block of 32 divides
        neox.random_gpt_neox(folder, hidden_size=48, intermediate_size=104, num_attention_heads=4)
    else:
        random_gpt_oss(folder, layout=layout)
    artifact = oxfuse.compile(folder, tmp_path / "artifact", dtype="float32", **options)
    manifest, report = (json.loads((artifact / name).read_text()) for name in ("manifest.json", "report.json"))
    for name in ("activations", "dense"):
        assert manifest["numerics"][name].startswith(f"{options.get(name, 'exact')}: ")
    found = verify_artifact(artifact)["golden"]
    own = found["own_weights"]
    lost, other = (error["rms_error"] / found["reference_rms"] for error in (found, own))
    print(f"{options}: {lost:.2%} lost, {other:.4%} else")
    assert 1e-4 < lost < 0.3 and other < ROUNDING * lost
    assert report["parity"]["own_rms"] is not None
    dense = [weight for weight in manifest["weights"][0]["tensors"].values() if any("int8" in step for step in weight["layout"])]
    assert bool(dense) == ("dense" in options)
    if dense:
        with safe_open(artifact / "weights.safetensors", "pt") as file:
            names = set(file.keys())
        replaced = {name.removesuffix("_int8") for name in names if name.endswith("_int8")}
        assert len(replaced) > 4 and not replaced & names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "kl"),
    [
        ({"activations": "int8", "dense": "int8"}, 0.01),
        ({"activations": "int8"}, 0.01),
        ({"dense": "int8"}, 0.01),
    ],
    ids=str,
)
@torch.no_grad()
def test_loss_on_held_out_text(tmp_path: Path, options: dict[str, str], kl: float) -> None:
    """In nats a token, against the float32 reference; README has the figures."""
    model = oxfuse.load(oxfuse.compile(BUNDLED, tmp_path / "artifact", dtype="float32", **options))
    ids = held_out(model)
    found, expected = (logits.double().log_softmax(-1) for logits in (model.logits(ids), load_reference(BUNDLED)(ids).logits))
    divergence = float((expected.exp() * (expected - found)).sum(-1).mean())
    losses = [float(-x[:, :-1].gather(-1, ids[:, 1:, None]).mean()) for x in (found, expected)]
    print(f"{options}: loss {losses[0]:.4f} nats a token, reference {losses[1]:.4f}, KL {divergence:.5f}")
    assert 1e-7 < divergence < kl and abs(losses[0] - losses[1]) < kl


def test_a_tied_head_stays_what_the_embedding_is(tmp_path: Path) -> None:
    """One weight of the checkpoint has one value, in the artifact and for the oracle that it is measured against."""
    folder = random_gpt_oss(tmp_path / "checkpoint", tie_word_embeddings=True, num_hidden_layers=1)
    artifact = oxfuse.compile(folder, tmp_path / "artifact", dtype="float32", dense="int8")
    found = verify_artifact(artifact)["golden"]
    assert found["own_weights"]["rms_error"] < ROUNDING * found["rms_error"]
    tensors = json.loads((artifact / "manifest.json").read_text())["weights"][0]["tensors"]
    assert "model.embed_tokens.weight" in tensors and not any(name.startswith("lm_head") for name in tensors)


def test_activations_need_weights_of_few_bits(tmp_path: Path) -> None:
    folder = random_gpt_oss(tmp_path / "checkpoint")
    with pytest.raises(UserError, match=r"activations is 'int8', but the model has no weights of 8 bits or fewer"):
        oxfuse.compile(folder, tmp_path / "artifact", activations="int8")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
