"""ONNX models for onnxruntime's GPU kernels, as far as a machine without a GPU can tell.

float16 runs on onnxruntime's CPU kernels. For bfloat16, which they do not know, and for MXFP4 as it is, the model is rewritten
here: every bfloat16 tensor becomes float32, MXFP4 experts what onnxruntime's documentation says that they mean. So all that is
left unseen is the GPU's own arithmetic.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import oxfuse
from oxfuse.errors import UserError
from oxfuse.passes.quantise import Mxfp4Columns
from oxfuse.runtime import onnx as runtime_onnx
from oxfuse.runtime.gpus import Gpu, Gpus
from oxfuse.runtime.verify import verify_artifact

from .. import neox
from ..conftest import BY_NAME
from ..parity.cases import Case, random_ids

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
Made = Callable[[str], tuple[Case, Path, Path, Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Return (case, bfloat16 checkpoint, artifact for a GPU, artifact for the CPU) of a configuration."""
    known: dict[str, tuple[Case, Path, Path, Path]] = {}

    def get(name: str) -> tuple[Case, Path, Path, Path]:
        if name not in known:
            place, case = tmp_path_factory.mktemp(name), BY_NAME[name]
            folder = case.write(place / "checkpoint", torch.bfloat16)
            gpu = oxfuse.compile(folder, place / "gpu", target="onnx", provider="cuda")
            known[name] = case, folder, gpu, oxfuse.compile(folder, place / "cpu", target="onnx")
        return known[name]

    return get


def test_packing_is_onnxruntime_s_own() -> None:
    """Checked with the function that onnxruntime has for it."""
    packer = pytest.importorskip("onnxruntime.capi._pybind_state").pack_fp4_weights_for_cuda_moe_gemm
    rows, blocks = 34, 3
    weights = torch.randint(0, 256, (2, rows, blocks, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours = Mxfp4Columns().apply(weights)
    assert tuple(ours.shape) == Mxfp4Columns().shape(tuple(weights.shape)) == (2, 32 * blocks, rows // 2)
    for expert, packed in zip(weights, ours, strict=True):
        assert np.array_equal(packer(expert.flatten(1).numpy(), rows, 32 * blocks).ravel(), packed.numpy().ravel())


def in_float32(artifact: Path, exact: Path) -> onnx.ModelProto:
    """Return the model with float32 in place of bfloat16, and MoE of what the experts are worth in place of QMoE.

    Tables of angles, which it rounds, are taken from the artifact `exact`.
    """
    model, tables = onnx.load(artifact / "model.onnx"), onnx.load(exact / "model.onnx")
    arrays = {tensor.name: tensor for tensor in model.graph.initializer}
    for tensor in tables.graph.initializer:
        if tensor.name.endswith(("_cos", "_sin")):
            close = numpy_helper.to_array(arrays[tensor.name]).astype(np.float32) - numpy_helper.to_array(tensor)
            assert np.abs(close).max() < 2.0**-7
            arrays[tensor.name].CopyFrom(tensor)
    for name, tensor in arrays.items():
        if tensor.data_type == TensorProto.BFLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), name))
    for value in [*model.graph.input, *model.graph.output]:
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in model.graph.node:
        if node.op_type == "Cast" and node.attribute[0].i == TensorProto.BFLOAT16:
            node.attribute[0].i = TensorProto.FLOAT
        if node.op_type == "QMoE":
            model.graph.initializer.extend(without_mxfp4(node, arrays))
    return model


def without_mxfp4(node: onnx.NodeProto, arrays: dict[str, onnx.TensorProto]) -> list[onnx.TensorProto]:
    """Make a QMoE node a MoE node; return its weights."""
    told = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert (told.pop("quant_type"), told.pop("expert_weight_bits"), told.pop("block_size")) == (b"fp4", 4, 32)
    assert len(node.input) == 17 and not any(node.input[8:15])
    assert all((numpy_helper.to_array(arrays[name]) == 1).all() for name in node.input[15:])
    banks = []
    for weight, scale in (node.input[2:4], node.input[5:7]):
        packed, powers = numpy_helper.to_array(arrays[weight]), arrays[scale]
        assert powers.data_type == TensorProto.FLOAT8E8M0
        exponents = np.frombuffer(powers.raw_data, np.uint8).reshape(tuple(powers.dims)).astype(np.int32) - 127
        values = np.stack([E2M1[packed & 15], E2M1[packed >> 4]], -1).reshape(*packed.shape[:2], -1)  # [E, K, N]
        dense = np.ldexp(values.transpose(0, 2, 1).reshape(*exponents.shape, 32), exponents[..., None])
        banks.append(numpy_helper.from_array(dense.reshape(*exponents.shape[:2], -1).astype(np.float32), f"{weight}_dense"))
    inputs = [*node.input[:2], banks[0].name, node.input[4], banks[1].name, node.input[7]]
    node.CopyFrom(helper.make_node("MoE", inputs, node.output, domain=node.domain, **told))
    return banks


@pytest.mark.parametrize("name", ["mxfp4", "base", "neox", "whole_heads_turn"])
def test_the_model_computes_what_the_reference_computes(made: Made, name: str, tmp_path: Path) -> None:
    """Two prompts of different length that cross the window, and a token more of each, on what the run before returned."""
    import onnxruntime

    case, folder, artifact, exact = made(name)
    theirs = case.transformers(folder, tmp_path)
    model = in_float32(artifact, exact)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    lengths, ids = (40, 23), random_ids(case, 2, 41)
    mask = (torch.arange(40) < torch.tensor(lengths)[:, None]).long()
    feeds: dict[str, Any] = {"input_ids": ids[:, :40].numpy(), "attention_mask": mask.numpy()}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            feeds[value.name] = np.zeros((2, value.shape[1], 0, value.shape[3]), np.float32)
    names = [value.name for value in session.get_outputs()]
    prompt = dict(zip(names, session.run(None, feeds), strict=True))
    feeds = {name.replace("present", "past_key_values"): value for name, value in prompt.items() if name != "logits"}
    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
    feeds |= {"input_ids": ids[:, 40:].numpy(), "attention_mask": mask.numpy()}
    after = session.run(["logits"], feeds)[0]
    for row, length in enumerate(lengths):
        with torch.no_grad():
            expected = theirs(input_ids=torch.cat([ids[row, :length], ids[row, 40:]])[None]).logits[0].numpy()
        bound = 1e-4 * max(1.0, float(np.abs(expected).max()))
        assert np.abs(prompt["logits"][row, :length] - expected[:length]).max() <= bound
        assert np.abs(after[row, 0] - expected[length]).max() <= bound


def test_what_a_gpu_is_given(made: Made) -> None:
    _, _, artifact, exact = made("mxfp4")
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    assert {node.op_type for node in model.graph.node} >= {"QMoE", "GroupQueryAttention", "SkipSimplifiedLayerNormalization"}
    types = {value.name: value.type.tensor_type.elem_type for value in [*model.graph.input, *model.graph.output]}
    assert types["logits"] == types["past_key_values.0.key"] == TensorProto.BFLOAT16 and model.ir_version == 12
    config = json.loads((artifact / "genai_config.json").read_text())
    assert config["model"]["decoder"]["session_options"]["provider_options"] == [{"cuda": {}}]
    manifest, report = (json.loads((artifact / name).read_text()) for name in ("manifest.json", "report.json"))
    assert manifest["programs"][0]["target"] == "onnx:cuda" and manifest["cache"]["dtype"] == "bfloat16"
    assert report["parity"]["rms"] is None and "compile it without --provider cuda" in report["parity"]["reason"]
    assert "an NVIDIA GPU, with onnxruntime-gpu" in (artifact / "report.md").read_text()
    sizes = [(place / "weights.safetensors").stat().st_size for place in (artifact, exact)]
    assert sizes[0] < 0.45 * sizes[1]  # 4 bits in place of 32 for the experts, 16 for the rest


def test_float16_runs_where_there_is_no_gpu(compiled, caplog: pytest.LogCaptureFixture) -> None:
    """The kernels of the CPU know it, all but those of experts: same dtype, other processor, and a word about it."""
    case, folder, artifact = compiled("neox", target="onnx", provider="cuda")
    with caplog.at_level(logging.WARNING, "oxfuse"):
        model = oxfuse.load(artifact)
    assert "was compiled for a GPU, but" in caplog.text and "the CPU computes" in caplog.text
    ids, theirs = random_ids(case, 2, 60), case.transformers(folder, artifact)
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
    error = (model.logits(ids) - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 1e-5 < error < 0.01
    assert len(model.generate(ids[0].tolist(), max_new_tokens=30, stop_token_ids=[])[0].token_ids) == 30
    assert json.loads((artifact / "report.json").read_text())["parity"]["rms"] is not None


def test_a_device_that_is_not_there(made: Made, compiled) -> None:
    _, _, artifact = compiled("neox", target="onnx", provider="cuda")
    oxfuse.load(artifact, device="cpu")
    with pytest.raises(UserError, match=r"cannot run on cuda: there is no NVIDIA driver here|CPU build|this machine has"):
        oxfuse.load(artifact, device="cuda")
    with pytest.raises(UserError, match="ONNX model for a GPU, not 'tpu'"):
        oxfuse.load(artifact, device="tpu")
    with pytest.raises(UserError, match=r"cannot be loaded by onnxruntime .* compile it without --provider cuda"):
        oxfuse.load(made("mxfp4")[2])


@pytest.mark.parametrize(
    ("device", "cuda", "providers", "expected"),
    [
        (None, "13.0", [runtime_onnx.CUDA], (0, "")),
        ("cuda:1", "13.0", [runtime_onnx.CUDA], (1, "")),
        ("cuda:2", "13.0", [runtime_onnx.CUDA], (None, "this machine has cuda:0, A, sm_80; cuda:1, B, sm_90")),
        ("cuda", None, [runtime_onnx.CUDA], (None, "torch, which keeps the caches, is its CPU build")),
        ("cuda", "13.0", ["CPUExecutionProvider"], (None, "onnxruntime 1.0 is its CPU build: install onnxruntime-gpu")),
    ],
)
def test_which_gpu(
    monkeypatch: pytest.MonkeyPatch, device: str | None, cuda: str | None, providers: list[str], expected: tuple[int | None, str]
) -> None:
    gpus = Gpus(found=(Gpu(index=0, name="A", arch="sm_80"), Gpu(index=1, name="B", arch="sm_90")), driver=(13, 0))
    monkeypatch.setattr(runtime_onnx, "find_gpus", lambda: gpus)
    monkeypatch.setattr(torch.version, "cuda", cuda)

    class Ort:
        __version__ = "1.0"

        @staticmethod
        def get_available_providers() -> list[str]:
            return providers

    assert runtime_onnx._gpu(device, Ort) == expected


@pytest.mark.parametrize("task", ["text-classification", "feature-extraction"])
def test_models_without_a_cache(task: str, tmp_path: Path) -> None:
    """In float16, which the CPU's kernels know: attention of standard operators, in float32 between the casts."""
    folder = neox.random_gpt_neox(tmp_path / "checkpoint", task=task)
    artifact = oxfuse.compile(folder, tmp_path / "artifact", target="onnx", provider="cuda", task=task)
    golden = verify_artifact(artifact)["golden"]
    assert 1e-5 * golden["reference_rms"] < golden["rms_error"] < 0.02 * golden["reference_rms"]
    assert json.loads((artifact / "manifest.json").read_text())["model"]["dtype"] == "float16"
