"""Checkpoints out of a seed, artifacts whose programs and weights come from different machines, calls of kernels, on paper."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import oxfuse
from oxfuse.compiler.fuse import Fused
from oxfuse.compiler.lowering.aoti import Lowered
from oxfuse.compiler.lowering.kernels import Launches
from oxfuse.compiler.plan import Plan
from oxfuse.compiler.programs import BuiltProgram, BuiltPrograms
from oxfuse.compiler.weight_file import write_weights
from oxfuse.errors import UserError
from oxfuse.passes.fusions import tuning as tables
from oxfuse.runtime.manifest import read_manifest
from oxfuse.runtime.sequence import TokenSequence
from oxfuse.runtime.weights import check_weight_file, map_tensors

from ..runtime.fake_accelerator import toy_device
from ..runtime.toy import VOCAB, ToyModel, toy_engine
from . import calls, capture, inputs, kernels, made, seeded, ship, steps, timing, tuning
from .inputs import Maker, Shape
from .made import Recipe, build, describe_weights, differences, fuse_plan, join, make_weights, weight_entries
from .seeded import SeededTensor, seeded_checkpoint, shape_20b

TINY = shape_20b(
    2,
    hidden_size=64,
    intermediate_size=32,
    head_dim=16,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
    num_experts_per_tok=2,
    vocab_size=211,
    sliding_window=19,
    max_position_embeddings=256,
)
RECIPE = Recipe(config=TINY, target="cpu", max_context=128, max_batch=2)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def test_the_same_seed_makes_the_same_bytes_everywhere() -> None:
    """The hashes are part of the test: another machine, torch or thread count must find them."""
    numbers = SeededTensor(name="a.weight", shape=(301, 33), dtype=torch.bfloat16, seed=3, scale=0.5, mean=1.0)
    blocks = SeededTensor(name="a_blocks", shape=(5, 7, 3), dtype=torch.uint8, seed=3)
    scales = SeededTensor(name="a_scales", shape=(500,), dtype=torch.uint8, seed=3, low=118, high=123)
    assert [digest(t.read()) for t in (numbers, blocks, scales)] == ["2b2d0c9aec794a84", "99bcf5d332386343", "8bf4e7bfdf3d8585"]
    assert digest(dataclasses.replace(blocks, seed=4).read()) != "99bcf5d332386343"
    values = numbers.read().double()
    assert abs(values.mean() - 1.0) < 0.02 and abs(values.std() - 0.5) < 0.01 and values.unique().numel() > 200
    assert scales.read().unique().tolist() == [118, 119, 120, 121, 122]
    assert blocks.read().double().std() > 60


def test_words_are_those_of_splitmix64() -> None:
    """Said once more, in Python's own numbers."""
    mask, stream = (1 << 64) - 1, seeded.stream_of(3, "a.weight")
    for number, word in enumerate(seeded.words(stream, 7, 5, torch.device("cpu")).tolist()):
        z = (stream + (7 + number + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        assert word & mask == z ^ (z >> 31)


def test_rows_can_be_made_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(seeded.PIECES, "cpu", 5)
    for shape, dtype in (((13, 3), torch.bfloat16), ((13, 7, 3), torch.uint8), ((9,), torch.bfloat16)):
        tensor = SeededTensor(name="x", shape=shape, dtype=dtype, seed=1)
        whole = tensor.read()
        for first, last in ((0, 1), (3, 9), (8, shape[0]), (4, 4)):
            assert torch.equal(tensor.read(slice(first, last)), whole[first:last])


def test_a_seeded_checkpoint_is_one_the_compiler_reads() -> None:
    plan, again = RECIPE.plan(), RECIPE.plan()
    assert plan.sources.keys() == again.sources.keys() and plan.dtype == torch.bfloat16
    name = "model.layers.1.mlp.experts.down_proj"
    assert plan.sources[name].encoding == "mxfp4" and plan.sources[name].read(slice(0, 1)).shape == (1, 32, 64)
    for name, source in plan.sources.items():
        assert torch.equal(source.read(), again.sources[name].read()), name
    assert seeded_checkpoint(TINY, 1).tensors["lm_head.weight"].read().ne(plan.sources["lm_head.weight"].read()).any()


def fake_programs(plan: Plan, fuse: Any, folder: Path, phases: Any, dumps: Any) -> Any:
    """Stand for the lowering: a program that wants every weight that the graph reads."""
    place, fused = folder / "cpu" / "step", fuse()
    place.mkdir(parents=True)
    (place / "program.so").write_bytes(b"no program")
    used = {node.target for node in fused.step.graph.nodes if node.op == "get_attr"}
    lowered = Lowered(folder=place, library="program.so", constants=tuple(sorted(map(str, used))))
    program = BuiltProgram(name="step", target="cpu", lowered=lowered, limits=plan.step_limits, calls={})
    return fused, BuiltPrograms(programs=(program,), ops=None)


def test_programs_and_weights_of_two_machines_make_an_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fused: Fused
) -> None:
    monkeypatch.setattr(made, "build_programs", fake_programs)
    monkeypatch.setattr(made, "fuse_plan", lambda plan: fused)  # an export takes seconds, and seeds do not change it
    whole = build(RECIPE, tmp_path / "whole")
    alone = build(RECIPE, tmp_path / "programs", weights=False)
    assert alone.weights == whole.weights, "described as it would be written: everything is small here"
    assert not (tmp_path / "programs" / made.WEIGHTS).exists() and len(whole.weights[0].tensors) > 30

    file = make_weights(RECIPE, alone, tmp_path / "weights")
    assert file.header_sha256 == alone.weights[0].header_sha256
    manifest = join(tmp_path / "programs", tmp_path / "weights", tmp_path / "joined")
    check_weight_file(tmp_path / "joined", manifest.weights[0])
    assert manifest == whole and (tmp_path / "joined" / "programs" / "cpu" / "step" / "program.so").exists()
    with pytest.raises(ValueError, match=r"is not the file of the manifest: .*stated"):
        make_weights(dataclasses.replace(RECIPE, seed=1), alone, tmp_path / "others")

    mapped = map_tensors(tmp_path / "joined" / made.WEIGHTS)
    with pytest.raises(ValueError, match="is made by packed in panels of 16"):
        steps.device_weights(manifest, torch.device("cpu"))
    plain = {name: tensor for name, tensor in manifest.weights[0].tensors.items() if not tensor.layout}
    as_on_gpus = dataclasses.replace(manifest, weights=(dataclasses.replace(manifest.weights[0], tensors=plain),))
    on_device = steps.device_weights(as_on_gpus, torch.device("cpu"))
    assert on_device.keys() == plain.keys() and len(plain) > 20
    assert all(torch.equal(on_device[name], mapped[name]) for name in plain)


@pytest.fixture(scope="module")
def fused() -> Fused:
    return fuse_plan(RECIPE.plan())


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "shape_20b", lambda layers: {**TINY, "num_hidden_layers": layers})


def test_differences_are_named(fused: Fused) -> None:
    plan = RECIPE.plan()
    names = ["model.norm.weight", "model.layers.0.self_attn.sinks"]
    entries = weight_entries(plan, fused, {name: fused.stored_name(name) for name in names})
    file = describe_weights(entries)
    first = dict(list(file.tensors.items())[:1])
    other = dataclasses.replace(file, header_sha256="0" * 64, tensors=first)
    assert differences(file, file) == [] and len(differences(file, other)) == 2
    changed = {name: dataclasses.replace(tensor, sha256="f" * 64) for name, tensor in file.tensors.items()}
    assert len(differences(file, dataclasses.replace(file, tensors=changed))) == 2
    unhashed = {name: dataclasses.replace(tensor, sha256="") for name, tensor in file.tensors.items()}
    assert differences(file, dataclasses.replace(file, tensors=unhashed)) == []


@pytest.mark.slow
def test_a_joined_artifact_runs(tmp_path: Path) -> None:
    build(RECIPE, tmp_path / "programs", weights=False)
    with pytest.raises(UserError, match="does not exist"):
        oxfuse.load(tmp_path / "programs")
    make_weights(RECIPE, read_manifest(tmp_path / "programs"), tmp_path / "weights")
    join(tmp_path / "programs", tmp_path / "weights", tmp_path / "joined")
    build(RECIPE, tmp_path / "whole")
    ids = torch.arange(40)[None]
    assert torch.equal(oxfuse.load(tmp_path / "joined", check="full").logits(ids), oxfuse.load(tmp_path / "whole").logits(ids))


@pytest.mark.parametrize("name", [ship.FEW, ship.FULL])
def test_what_is_shipped_is_whole(name: str) -> None:
    """Its files are those of its manifest; whether its kernels are this checkout's is told by the report."""
    about, folder = ship.origin(), ship.SHIPPED / name
    assert about is not None and about.torch == "2.11.0" and about.triton == "3.6.0"
    assert ship.folder_bytes(ship.SHIPPED) < ship.LARGEST
    manifest = read_manifest(folder)
    assert manifest.requirements.gpu_archs == (f"sm_{about.arch}",) and manifest.requirements.torch == "2.11"
    assert len(manifest.cache.kv_heads) == about.layers[name] and {p.name for p in manifest.programs} == {"step", "decode"}
    for program in manifest.programs:
        held = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / program.path).iterdir()}
        assert held == program.files


@pytest.mark.parametrize("section", ["kernels", "timing", "tuning"])
def test_every_call_launches_kernels_that_compile_for_its_arguments(section: str) -> None:
    """On tensors without values: launch functions and arguments fit each other, and no Python float reaches a kernel."""
    jobs = list(importlib.import_module(f"tests.gpu.{section}").jobs(90))
    for job in jobs:
        launches = Launches()
        job(launches.wrap, "meta")
        assert launches.made and not any("fp64" in launch.signature.values() for launch in launches.made)
    assert len(jobs) > 20


def test_items_have_names_of_their_own_and_fit_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    from . import memory, sections

    for module in (timing, memory):
        monkeypatch.setattr(module, "shipped_fits", lambda: True)
    total = 0.0
    for section in sections.SECTIONS:
        place, _, function = section.items.partition(":")
        items = getattr(importlib.import_module(place), function)()
        assert len({item.name for item in items}) == len(items) > 0, section.name
        total += sum(item.seconds for item in items if section.name != "tuning")
    assert total < 600


def small(dtype: torch.dtype = torch.bfloat16) -> Shape:
    return Shape(hidden=64, inner=32, heads=4, kv=2, dim=16, rotated=16, experts=4, top_k=2, window=7, vocab=50, dtype=dtype)


def small_calls(dtype: torch.dtype) -> list[calls.Call]:
    shape, mix = small(dtype), [(0, 1), (9, 3), (5, 1), (0, 20)]
    made = {
        "store": lambda m: inputs.stored(m, mix, shape),
        "rotary": lambda m: inputs.rotary(m, 5, shape, 1000),
        "rotary_store": lambda m: inputs.rotary_store(m, mix, shape),
        "attention": lambda m: inputs.attention(m, mix, shape, 7, False, block=16, padding=3),
        "linear_rows": lambda m: inputs.linear(m, 3, 64, 40, dtype=dtype),
        "qkv_rotary": lambda m: inputs.qkv(m, 3, shape),
        "norm_router": lambda m: inputs.norm_router(m, 3, shape),
        "moe_dispatch": lambda m: inputs.moe(m, 9, shape),
        "moe_experts": lambda m: inputs.moe(m, 3, shape, given=True),
        "masked_attention": lambda m: inputs.masked(m, 2, 3, 20, 9, shape, added=True),
        "causal_attention": lambda m: inputs.causal(m, 2, 9, shape, window=7),
    }
    assert made.keys() == calls.OPS.keys()
    return [calls.Call(op=op, name=op, args=args) for op, args in made.items()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_plain_ops_are_those_of_the_references_and_pass_as_kernels(dtype: torch.dtype) -> None:
    for call in small_calls(dtype):
        op, args = calls.OPS[call.op], call.args(Maker("cpu"))
        plain = op.plain(calls.copied(op, args))
        if op.torch_op:
            for mine, other in zip(plain, calls.called(op, args), strict=True):
                torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)
        row = kernels.compare(call, op, args, plain, True)
        assert row.passed, row
        wrong = [x.clone() for x in plain]
        place = tuple(plain[0].isfinite().nonzero()[0].tolist())
        wrong[0][place] += 3
        assert not kernels.compare(call, op, args, wrong, True).passed, call.op
        assert not kernels.compare(call, op, args, plain, False).passed
        wrong[0][place] = torch.nan
        assert not kernels.compare(call, op, args, wrong, True).passed, "a number that is none"


def test_padding_rows_of_a_decode() -> None:
    args = inputs.attention(Maker("cpu"), [(3, 1), (40, 1), (7, 1)], small(), 0, True, empty=(1,), block=16)
    assert args[5].tolist() == [4, 0, 8] and args[4].tolist() == [0, 1, 2, 3]
    (out,) = calls.OPS["attention"].plain(args)
    assert not out[1].any() and out[[0, 2]].isfinite().all() and out[0].any()


def test_costs() -> None:
    make = Maker("cpu")
    args = inputs.attention(make, [(0, 4), (10, 1)], small(), 0, False, block=16)
    bytes_, operations = timing._attention(args)
    assert operations == 4 * (10 + 11) * 4 * 16 and bytes_ == 2 * 15 * 2 * 16 * 2 + 2 * args[0].nbytes
    args = inputs.attention(make, [(0, 20)], small(), 7, False, block=16)
    assert timing._attention(args)[1] == 4 * (28 + 13 * 7) * 4 * 16
    experts = inputs.moe(make, 3, small(), given=True)
    bytes_, operations = timing._experts_read(experts)
    one = 64 * 64 // 2 + 64 * 64 // 32 + 64 * 32 // 2 + 64 * 32 // 32
    assert bytes_ in (2 * one, 3 * one, 4 * one) and operations == 2 * 3 * 2 * (64 * 64 + 32 * 64)
    assert timing._weights_read(inputs.linear(make, 3, 64, 40))[0] == 64 * 40 * 2


def test_a_rule_comes_before_the_one_it_replaces() -> None:
    for subject in tuning.SUBJECTS:
        seen: list[Any] = []
        for case in tuning._cases(subject):
            with tuning.changed(subject.kernel, subject.changes[0], seen):
                timing.launch(case, 90, Launches().wrap, "meta")
        folder, config, asked = seen[0]
        rule = tuning.rule(folder, subject.kernel, {**config, "num_stages": 7}, *asked)
        assert rule["arch"] == [90] and rule["config"]["num_stages"] == 7 and json.dumps(rule)
        assert all(
            tables.choose(folder, subject.kernel, asked[0], **asked[1]).keywords.keys() >= change.keys()
            for change in subject.changes
        )


def test_contexts_that_were_never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = ToyModel()
    engine = toy_engine(toy, max_batch=5, max_context=96, device=toy_device(toy, most=5))
    monkeypatch.setattr(capture, "LENGTHS", (1, 3, 4, 9, 30))
    for live in (1, 2, 5):
        sequences = capture.grown(engine, live, VOCAB)
        check = engine.device.check_replay(engine.caches)
        assert (check.rows, check.logits, check.caches, check.finite) == (live, True, True, True)
        assert [len(s.tokens) for s in sequences] == [1 + capture.STEPS + n for n in (1, 3, 4, 9, 30)[:live]]
        for sequence in sequences:
            engine.release(sequence)
    vocab = type("Spec", (), {"vocab_size": VOCAB})
    full = steps.Full(folder=Path(), manifest=type("M", (), {"model": vocab}), weights={}, engine=engine, cost=None)  # type: ignore[arg-type]
    sequences = steps.with_context(full, 3, 41)
    assert all(isinstance(s, TokenSequence) and s.pending == 1 and s.cached == 41 for s in sequences)
    for cache in engine.caches:
        cache.zero_()
    assert steps.decode_step(full, sequences) > 0 and all(len(s.tokens) == 43 for s in sequences)
    steps.release(full, sequences)
    assert engine.used_blocks == 0 and steps.prefill_once(full, 50) > 0 and math.isfinite(steps.prefill_once(full, 5))


def test_weights_are_written_as_they_are_described(tmp_path: Path, fused: Fused) -> None:
    plan = RECIPE.plan()
    names = [name for name in plan.sources if "layers.0" in name and "experts" not in name]
    entries = weight_entries(plan, fused, {name: fused.stored_name(name) for name in names})
    assert write_weights(tmp_path / made.WEIGHTS, entries) == describe_weights(entries)
