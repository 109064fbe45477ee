"""ONNX artifacts: the parity suite of every target, the same model in runtimes that nobody here wrote, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import oxfuse
from oxfuse.errors import UserError
from oxfuse.runtime.verify import verify_artifact

from ..parity.cases import CASES, NEOX_CASES, assert_logits, assert_parity, random_ids

ALWAYS = [("base", "onnx"), ("mxfp4", "onnx-portable"), ("neox", "onnx"), ("sequential", "onnx-portable")]
ODD_HEADS = ("odd_sizes", "odd_part_turns", "one_head")
"""Sizes that are no multiples of 8, which GroupQueryAttention does not take."""
ALL = [(case.name, "onnx") for case in [*CASES, *NEOX_CASES] if case.name not in ODD_HEADS]
ALL += [(case.name, "onnx-portable") for case in [*CASES, *NEOX_CASES]]
TARGETS = [pytest.param(*key, marks=() if key in ALWAYS else pytest.mark.slow, id="-".join(key)) for key in ALL]


@pytest.mark.parametrize(("name", "target"), TARGETS)
def test_artifact_equals_transformers(compiled, name: str, target: str, tmp_path: Path) -> None:
    case, folder, artifact = compiled(name, target=target)
    assert_parity(oxfuse.load(artifact), case.transformers(folder, tmp_path), case, folder, jumps=False)


@pytest.mark.parametrize(("name", "target"), ALWAYS)
def test_the_model_is_small_and_valid_and_its_weights_are_the_artifact_s(compiled, name: str, target: str) -> None:
    _, _, artifact = compiled(name, target=target)
    path = artifact / "model.onnx"
    onnx.checker.check_model(str(path))
    model = onnx.load(path, load_external_data=False)
    assert path.stat().st_size < 100_000
    kept = {entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"}
    assert kept == {"weights.safetensors"}
    assert not [tensor.name for tensor in model.graph.initializer if not tensor.external_data and len(tensor.raw_data) > 64]
    domains = {node.domain for node in model.graph.node}
    assert domains == ({""} if target == "onnx-portable" else {"", "com.microsoft"})
    assert {p.name for p in artifact.iterdir()} >= {"manifest.json", "report.md", "model.onnx", "weights.safetensors"}
    assert (artifact / "genai_config.json").exists() == (target == "onnx")
    assert verify_artifact(artifact)["ok"]


def inputs_of(path: Path, mask: torch.Tensor) -> dict[str, np.ndarray]:
    """Return an empty past and a mask as inputs."""
    feeds: dict[str, np.ndarray] = {"attention_mask": mask.numpy()}
    for value in onnx.load(path, load_external_data=False).graph.input:
        if value.name.startswith("past_key_values"):
            _, heads, _, dim = (size.dim_value for size in value.type.tensor_type.shape.dim)
            feeds[value.name] = np.zeros((len(mask), heads, 0, dim), np.float32)
    return feeds


def in_onnxruntime(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds), strict=True))


def in_onnx(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    evaluator = ReferenceEvaluator(str(path))
    return dict(zip(evaluator.output_names, evaluator.run(None, {"first_logit": np.array([0]), **feeds}), strict=True))


def in_openvino(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    openvino = pytest.importorskip("openvino")
    model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    given = {port.any_name: feeds[port.any_name] for port in model.inputs if port.any_name in feeds}
    result = model(given)
    expected = {output.name for output in onnx.load(path, load_external_data=False).graph.output}
    return {name: result[port] for port in model.outputs for name in port.names & expected}


RUNTIMES: dict[str, Callable[[Path, dict[str, np.ndarray]], dict[str, np.ndarray]]] = {
    "onnxruntime": in_onnxruntime,
    "onnx": in_onnx,
    "openvino": in_openvino,
}


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", ["mxfp4", "sequential"])
def test_portable_models_run_elsewhere(compiled, name: str, runtime: str, tmp_path: Path) -> None:
    """A padded prompt that crosses the window, then three tokens of each row, on what the run before returned."""
    case, folder, artifact = compiled(name, target="onnx-portable")
    path, run, theirs = artifact / "model.onnx", RUNTIMES[runtime], case.transformers(folder, tmp_path)
    lengths, ids = (40, 23), random_ids(case, 2, 43)
    mask = torch.arange(40) < torch.tensor(lengths)[:, None]
    feeds = inputs_of(path, mask.long()) | {"input_ids": ids[:, :40].numpy()}
    found = run(path, feeds)
    with torch.no_grad():
        rows = [torch.cat([ids[n, :length], ids[n, 40:]]) for n, length in enumerate(lengths)]
        expected = [theirs(input_ids=row[None]).logits[0] for row in rows]
    for n, length in enumerate(lengths):
        _close(found["logits"][n, :length], expected[n][:length], f"prompt {n}")
    for step in range(3):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.bool)], 1)
        feeds = {"input_ids": ids[:, 40 + step, None].numpy(), "attention_mask": mask.long().numpy()}
        feeds |= {name.replace("present", "past_key_values"): value for name, value in found.items() if name != "logits"}
        found = run(path, feeds)
        for n, length in enumerate(lengths):
            _close(found["logits"][n, 0], expected[n][length + step], f"row {n}, step {step}")


def _close(got: np.ndarray, expected: torch.Tensor, what: str) -> None:
    error, bound = float(np.abs(got - expected.numpy()).max()), 1e-4 * max(1.0, float(expected.abs().max()))
    assert error <= bound, f"{what}: {error:.1e}"


@pytest.mark.parametrize("first", [0, 11, -1, -4])
def test_logits_may_begin_at_any_token(compiled, first: int) -> None:
    case, _, artifact = compiled("base", target="onnx")
    path, ids = artifact / "model.onnx", random_ids(case, 2, 20)
    feeds = inputs_of(path, torch.ones_like(ids)) | {"input_ids": ids.numpy()}
    whole, part = in_onnxruntime(path, feeds), in_onnxruntime(path, feeds | {"first_logit": np.array([first])})
    assert np.allclose(part["logits"], whole["logits"][:, first:], atol=1e-5)
    assert part["logits"].shape[1] == (20 - first if first >= 0 else -first)


Change = Callable[[onnx.GraphProto], None]


def drop_sinks(graph: onnx.GraphProto) -> None:
    for node in calls(graph, "GroupQueryAttention"):
        del node.input[11:]


def widen_window(graph: onnx.GraphProto) -> None:
    shift_windows(graph, 1)


def narrow_window(graph: onnx.GraphProto) -> None:
    shift_windows(graph, -1)


def shift_windows(graph: onnx.GraphProto, by: int) -> None:
    for node in calls(graph, "GroupQueryAttention"):
        for attribute in node.attribute:
            if attribute.name == "local_window_size" and attribute.i > 0:
                attribute.i += by


def no_beta(graph: onnx.GraphProto) -> None:
    set_float(graph, "MoE", "activation_beta", 0.0)


def no_limit(graph: onnx.GraphProto) -> None:
    set_float(graph, "MoE", "swiglu_limit", 1.0)


def weights_not_normalised(graph: onnx.GraphProto) -> None:
    for node in calls(graph, "MoE"):
        next(a for a in node.attribute if a.name == "normalize_routing_weights").i = 0


def tables_unscaled(graph: onnx.GraphProto) -> None:
    """Divide cos and sin by what YaRN multiplies them with."""
    tables = {name for node in calls(graph, "GroupQueryAttention") for name in node.input[7:9]}
    graph.initializer.append(numpy_helper.from_array(np.array(0.1 * np.log(8.0) + 1, np.float32), "attention_factor"))
    for node in calls(graph, "GroupQueryAttention"):
        for i in (7, 8):
            node.input[i] += "_unscaled"
    for table in sorted(tables):
        graph.node.insert(0, helper.make_node("Div", [table, "attention_factor"], [f"{table}_unscaled"]))


def calls(graph: onnx.GraphProto, kind: str) -> list[onnx.NodeProto]:
    found = [node for node in graph.node if node.op_type == kind]
    assert found, f"there is no {kind}"
    return found


def set_float(graph: onnx.GraphProto, kind: str, name: str, value: float) -> None:
    for node in calls(graph, kind):
        next(attribute for attribute in node.attribute if attribute.name == name).f = value


def unchanged(graph: onnx.GraphProto) -> None:
    pass


def altered(artifact: Path, place: Path, change: Change) -> Path:
    """Return a copy of the artifact whose model is changed, and whose manifest knows nothing of it."""
    shutil.copytree(artifact, place)
    model = onnx.load(place / "model.onnx", load_external_data=False)
    change(model.graph)
    (place / "model.onnx").write_bytes(model.SerializeToString())
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["programs"][0]["files"]["model.onnx"] = hashlib.sha256((place / "model.onnx").read_bytes()).hexdigest()
    (place / "manifest.json").write_text(json.dumps(manifest))
    return place


DEFECTS = [drop_sinks, widen_window, narrow_window, no_beta, no_limit, weights_not_normalised, tables_unscaled]


@pytest.mark.parametrize("change", [unchanged, *DEFECTS], ids=lambda change: change.__name__)
def test_defects_fail(compiled, change: Change, tmp_path: Path) -> None:
    """Wrong attributes run without a word: only the logits tell."""
    case, folder, artifact = compiled("base", target="onnx")
    model, theirs = oxfuse.load(altered(artifact, tmp_path / "altered", change)), case.transformers(folder, tmp_path)
    if change is unchanged:
        return assert_logits(model, theirs, case, jumps=False)
    with pytest.raises(AssertionError, match="is allowed"):
        assert_logits(model, theirs, case, jumps=False)
    return None


GREEDY = dict(
    temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seed=None, stop=(), stop_token_ids=[], logprobs=False
)


@pytest.mark.parametrize("target", ["onnx", "onnx-portable"])
def test_any_company_gives_the_tokens_of_separate_runs(compiled, target: str) -> None:
    """Sequences come and go, so that those left lie apart from each other; prefills beside decodes."""
    case, _, artifact = compiled("base" if target == "onnx" else "mxfp4", target=target)
    model = oxfuse.load(artifact)
    model.scheduler.engine.chunk = 32
    wanted = [(random_ids(case, n, seed=n).tolist(), new) for n, new in ((4, 50), (200, 9), (55, 20), (1, 31), (90, 40))]
    jobs = [model.generation_jobs(ids, **{**GREEDY, "max_new_tokens": new})[0] for ids, new in wanted]
    model.scheduler.run(jobs)
    for (ids, new), job in zip(wanted, jobs, strict=True):
        expected = oxfuse.load(artifact).generate(ids, max_new_tokens=new, stop_token_ids=[])[0]
        assert job.result().token_ids == expected.token_ids


def test_positions_that_jump_are_refused(compiled) -> None:
    case, _, artifact = compiled("base", target="onnx")
    with pytest.raises(UserError, match="counts positions itself"):
        oxfuse.load(artifact).logits(random_ids(case, 1, 5), position_ids=torch.tensor([[0, 1, 5, 6, 7]]))


REFUSED: list[tuple[dict[str, Any], str]] = [
    (dict(dtype="bfloat16"), "dtype bfloat16 is not supported by target onnx; choose float32"),
    (dict(dtype="float16"), "dtype float16 is not supported by target onnx; choose float32"),
    (dict(experts="int3"), "experts is 'int3'"),
    (dict(provider="rocm"), "provider is 'rocm'"),
    (dict(target="onnx-portable", experts="int8"), "experts='int8' is not available for target onnx-portable"),
    (dict(activations="int8"), "activations='int8' is not available"),
    (dict(target="onnx-mobile"), "'onnx-mobile' is not a target"),
    (
        dict(provider="cuda", dtype="float32"),
        "dtype float32 is not supported by target onnx with provider cuda; choose bfloat16 or",
    ),
    (dict(provider="cuda", dtype="float16"), "gpt_oss cannot run in torch.float16"),
    (dict(provider="cuda", target="onnx-portable"), "provider 'cuda' belongs to target onnx; target onnx-portable takes none"),
    (dict(provider="cuda", target="cpu"), "provider 'cuda' belongs to target onnx; target cpu takes none"),
    (dict(provider="cuda", experts="int8"), "experts='int8' is not available for target onnx with provider cuda"),
    (dict(provider="cuda", dense="int8"), "dense='int8' is not available for target onnx with provider cuda"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_made_is_refused_before_a_file_is_written(
    compiled, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    _, folder, _ = compiled("base", target="onnx")
    with pytest.raises(UserError, match=message):
        oxfuse.compile(folder, tmp_path / "artifact", **{"target": "onnx", **options})
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ODD_HEADS)
def test_heads_that_onnxruntime_does_not_take_are_refused(name: str, tmp_path: Path) -> None:
    folder = next(case for case in [*CASES, *NEOX_CASES] if case.name == name).write(tmp_path / "checkpoint")
    with pytest.raises(UserError, match=r"heads whose size is a multiple of 8, .* use target onnx-portable"):
        oxfuse.compile(folder, tmp_path / "artifact", target="onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_device_that_it_is_not_for(compiled) -> None:
    _, _, artifact = compiled("base", target="onnx")
    with pytest.raises(UserError, match=r"ONNX model for the CPU, not .cuda.: for a GPU, compile with --provider cuda"):
        oxfuse.load(artifact, device="cuda")


def test_a_damaged_model_is_told(compiled, tmp_path: Path) -> None:
    _, _, artifact = compiled("base", target="onnx")
    place = altered(artifact, tmp_path / "altered", lambda graph: graph.node.pop())
    with pytest.raises(UserError, match="cannot be loaded by onnxruntime"):
        oxfuse.load(place)
