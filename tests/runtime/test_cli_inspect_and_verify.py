"""`oxfuse inspect`: its figures, against the engine that they foretell. `oxfuse verify`: its exit codes and what they rest on."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from oxfuse.runtime import load, summary
from oxfuse.runtime.cache_size import PREFIX_CACHE_BYTES, block_bytes, sequence_blocks
from oxfuse.runtime.engine import Engine
from oxfuse.runtime.machine import Memory
from oxfuse.runtime.manifest import CacheGroup, CacheSpec, Limits, read_manifest
from oxfuse.runtime.model import CompiledModel
from oxfuse.runtime.summary import kind_of, summarize
from oxfuse.runtime.weights import read_header

from .commands import finish, run, spawn
from .tiny_artifact import HIDDEN, VOCAB

GB = 10**9


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)


def test_inspect_executes_nothing_and_imports_no_torch(copy: Path) -> None:
    next(copy.glob("programs/step/*.so")).write_bytes(b"not a library")
    shown = run("inspect", copy)
    assert shown.code == 0 and shown.err == ""
    for word in ("tiny", "vocabulary 4,096", "1 with full attention", "insert_cache", "glibc 2.17", "tokenizer.json", "33.6 MB"):
        assert word in shown.out
    program = "import sys; from oxfuse.__main__ import run; run(sys.argv[1:]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program, "inspect", str(copy)], capture_output=True, text=True, check=True)
    assert done.stdout == shown.out + "False\n"


def test_json_is_the_manifest_and_the_figures(copy: Path) -> None:
    found = json.loads(run("inspect", copy, "--json", "--context", "5", "--batch", "2").out)
    computed = found.pop("computed")
    assert found == json.loads((copy / "manifest.json").read_text())
    need, block = computed["memory"][0], 4 * 2 * HIDDEN * 4
    assert (need["context"], need["batch"], need["sequence"], need["cache"]) == (5, 2, 2 * block, 4 * block)
    assert need["total"] == need["cache"] + need["prefix_cache"] + computed["weight_bytes"]
    assert [(kind["kind"], kind["tensors"], kind["bytes"]) for kind in computed["weights"]] == [
        ("other", 2, VOCAB * HIDDEN * 4 + HIDDEN * 4),
        ("embedding", 1, VOCAB * HIDDEN * 4),
    ]
    assert computed["host"]["fits"] and computed["missing"] == []


def test_figures_of_a_compiled_model(compiled: Callable[..., tuple]) -> None:
    _, _, artifact = compiled("base")
    manifest = read_manifest(artifact)
    found = summarize(artifact, manifest)
    assert sum(kind.tensors for kind in found.weights) == sum(len(file.tensors) for file in manifest.weights)
    assert {"experts", "attention", "embedding", "head", "norms", "router"} <= {kind.kind for kind in found.weights}
    extents, _ = read_header(artifact / manifest.weights[0].path)
    assert sum(kind.bytes for kind in found.weights) == sum(at.end - at.begin for at in extents.values())
    assert found.layers == manifest.model.config["num_hidden_layers"] == sum(found.windows.values())
    assert set(found.windows) == {0, manifest.model.config["sliding_window"]}
    assert found.memory[-1].context == manifest.limits.max_context and found.program_bytes > 10_000
    shown = run("inspect", artifact).out
    assert f"{manifest.model.config['num_local_experts']} in a layer" in shown and "Runs on this machine" in shown


@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("tokens", [1, 16, 17, 63, 200])
def test_the_foretold_memory_is_what_a_sequence_takes(window: int, tokens: int) -> None:
    spec = CacheSpec(
        block_size=4, dtype="float32", kv_heads=(1,), head_dim=(2,), groups=(CacheGroup(window=window, layers=(0,)),)
    )
    limits = Limits(max_context=200, max_batch=2, max_step_tokens=16)
    used = []

    def step(inputs: list[torch.Tensor]) -> torch.Tensor:
        used.append(engine.pools[0].used)  # while the step runs: afterwards the old blocks of a window are free
        return torch.zeros(len(inputs[6]), 3)

    engine = Engine(step, spec, limits)
    session = CompiledModel(engine, vocab_size=3).session()
    session.prefill([0] * tokens)
    session.close()
    foretold = sequence_blocks(spec.groups[0], tokens, block_size=4, chunk=engine.chunk, reserve=engine.reserve)
    assert max(used) <= foretold <= max(used) + (1 if window else 0)
    assert block_bytes(spec, spec.groups[0]) * engine.size.blocks[0] == engine.size.bytes


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lm_head.weight", "head"),
        ("embed_out.weight", "head"),
        ("model.embed_tokens.weight", "embedding"),
        ("layers.0.mlp.experts.gate_up_proj_blocks", "experts"),
        ("layers.0.mlp.router.bias", "router"),
        ("layers.0.self_attn.sinks", "attention"),
        ("layers.0.attention.query_key_value.weight", "attention"),
        ("layers.0.post_attention_layernorm.weight", "norms"),
        ("layers.0.mlp.dense_h_to_4h.weight", "feed-forward"),
        ("extra", "other"),
    ],
)
def test_kinds_of_weights(name: str, kind: str) -> None:
    assert kind_of(name) == kind


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["cache"].update(block_size=0),
        lambda m: m["cache"].update(kv_heads=[]),
        lambda m: m["cache"].update(kv_heads=[], head_dim=[], groups=[]),
        lambda m: m["cache"].update(head_dim=[-1]),
        lambda m: m["cache"]["groups"][0].update(layers=[10**30]),
        lambda m: m["cache"]["groups"][0].update(layers=[0, 0]),
        lambda m: m["cache"]["groups"][0].update(window=-1),
        lambda m: m["cache"].update(dtype="float1"),
        lambda m: m["limits"].update(max_context=0),
        lambda m: m["weights"][0]["tensors"]["embedding"].update(dtype="float1"),
    ],
)
def test_a_manifest_that_makes_no_sense(copy: Path, change: Callable[[dict], object]) -> None:
    edit(copy, change)
    ran = run("inspect", copy)
    assert ran.code == 2 and "damaged" in ran.err and ran.err.count("\n") == 1


@pytest.mark.parametrize("args", [["--context", "0"], ["--context", "49"], ["--batch", "0"], ["--batch", "4"]])
def test_lengths_that_the_artifact_does_not_take(copy: Path, args: list[str]) -> None:
    ran = run("inspect", copy, *args)
    assert ran.code == 2 and args[1] in ran.err and ran.err.count("\n") == 1


def test_what_does_not_fit_is_said(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(copy, lambda m: m["requirements"].update(torch="1.0", glibc="9.1"))
    (copy / "weights.safetensors").unlink()
    shown = run("inspect", copy)
    assert shown.code == 0 and "Runs on this machine" not in shown.out
    for reason in ("Does not run here: torch is ", "glibc 9.1 or later", "weights.safetensors is missing"):
        assert reason in shown.out
    manifest = read_manifest(copy)
    for limit, reason in ((20_000_000, "read from disk again and again"), (34_000_000, "Run fewer or shorter ones"), (GB, None)):
        monkeypatch.setattr(summary, "memory", lambda limit=limit: Memory(total=64 * GB, available=GB, limit=limit))
        found = summarize(copy, manifest).host.short
        assert any(reason in line for line in found) if reason else not found


def test_inspect_without_torch(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oxfuse.runtime.host.torch_version", lambda: "")
    manifest = read_manifest(copy)
    assert "torch is not installed" in summarize(copy, manifest).host.misfits[0]


def test_verify_tells_by_its_exit_code(copy: Path) -> None:
    ran = run("verify", copy)
    assert ran.code == 0 and "intact" in ran.out and "top-1 agreement 100.0%" in ran.out
    assert json.loads((copy / "verify.json").read_text())["ok"]
    assert json.loads(run("verify", copy, "--json").out)["golden"]["rows"] == 4
    assert run("verify", copy, "--quiet") == dataclasses.replace(ran, out="", err="")
    flip(copy / "weights.safetensors", -5)
    damaged = max(read_header(copy / "weights.safetensors")[0].items(), key=lambda item: item[1].end)[0]
    bad = run("verify", copy)
    assert bad.code == 2 and f"the weight {damaged} has other values" in bad.err and bad.err.count("\n") == 1 and bad.out == ""
    assert json.loads((copy / "verify.json").read_text())["weights"]["damaged"] == [damaged]
    machine = run("verify", copy, "--json", "--quiet")
    assert machine.code == 2 and json.loads(machine.out)["ok"] is False and damaged in machine.err


def test_verify_names_the_wrong_tensor_of_a_model(compiled: Callable[..., tuple], tmp_path: Path) -> None:
    _, _, artifact = compiled("base")
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", artifact, copy], check=True)
    file = copy / read_manifest(copy).weights[0].path
    name = "model.layers.1.mlp.router.weight"
    flip(file, read_header(file)[0][name].begin)
    ran = run("verify", copy)
    assert ran.code == 2 and name in ran.err and ran.err.count("the weight") == 1


def test_verify_where_nothing_can_be_written(copy: Path) -> None:
    (copy / "verify.json").mkdir()  # tests may run as root, who may write anywhere but over a folder
    ran = run("verify", copy)
    assert ran.code == 0 and "verify.json was not written" in ran.err and "intact" in ran.out
    assert "not written" not in run("verify", copy, "-q").err


@pytest.mark.parametrize("command", ["verify", "inspect", "generate"])
def test_a_folder_that_is_no_artifact(tmp_path: Path, command: str) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        ran = run(command, folder, *(["-p", "x"] if command == "generate" else []))
        assert ran.code == 2 and "not an oxfuse artifact" in ran.err and ran.err.count("\n") == 1


def test_a_name_that_the_terminal_cannot_show(copy: Path) -> None:
    edit(copy, lambda m: m.update(name="a→b"))
    ran = finish(spawn("inspect", copy, environment={"PYTHONIOENCODING": "latin-1"}))
    assert ran.code == 0 and ran.out.startswith("a\\u2192b: ") and ran.err == ""


def test_a_full_disk_is_one_line(copy: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        ran = finish(spawn("inspect", copy, stdout=full))
    assert ran.code == 2 and "No space left" in ran.err and ran.err.count("\n") == 1


def test_a_closed_pipe_is_silent(copy: Path) -> None:
    process = spawn("inspect", copy)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 1


def test_load_uses_the_same_sizes(copy: Path) -> None:
    engine = load(copy).scheduler.engine
    most = summarize(copy, read_manifest(copy)).memory[-1]
    assert engine.prefixes.bound == min(engine.size.bytes, PREFIX_CACHE_BYTES)
    (one,) = summarize(copy, read_manifest(copy), contexts=[8], batch=1).memory
    assert one.prefix_cache == min(engine.prefixes.bound, engine.size.bytes - one.cache) > 0
    assert load(copy, prefix_cache_bytes=5000).scheduler.engine.prefixes.bound == 5000
    assert most.cache <= engine.size.bytes <= most.cache + 5 * block_bytes(engine.cache, engine.cache.groups[0])
