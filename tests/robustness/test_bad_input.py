"""Everything that a user may hand in and that cannot work: one line with the remedy, exit code 2, and nothing left behind."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from oxfuse.runtime.manifest import MANIFEST, read_manifest

from ..checkpoints import random_gpt_oss
from ..runtime.commands import Ran, run

Damage = Callable[[Path], object]


def listing(folder: Path) -> dict[str, str]:
    """Return every file and link under `folder` with what it holds."""
    return {
        path.relative_to(folder).as_posix(): str(path.readlink())
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    } | {path.relative_to(folder).as_posix(): "folder" for path in folder.rglob("*") if path.is_dir()}


def refused(ran: Ran, *words: str) -> None:
    assert ran.code == 2 and ran.out == "", ran
    assert ran.err.startswith("oxfuse: error: ") and ran.err.count("\n") == 1 and ran.err.endswith("\n"), ran.err
    assert len(ran.err) < 600, ran.err
    for word in words:
        assert word in ran.err, ran.err


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text("utf-8"))
    change(data)
    path.write_text(json.dumps(data), "utf-8")


def config(**values: Any) -> Damage:
    return lambda folder: edit_json(folder / "config.json", lambda data: data.update(values))


def index(change: Callable[[dict[str, str]], object]) -> Damage:
    return lambda folder: edit_json(folder / "model.safetensors.index.json", lambda data: change(data["weight_map"]))


def first_tensor(change: Callable[[Tensor], Tensor]) -> Damage:
    def damage(folder: Path) -> None:
        path = sorted(folder.glob("*.safetensors"))[0]
        held = load_file(path)
        name = min(held)
        save_file({**held, name: change(held[name])}, path)

    return damage


def overwrite(pattern: str, at: int, data: bytes) -> Damage:
    def damage(folder: Path) -> None:
        with sorted(folder.glob(pattern))[0].open("r+b") as file:
            file.seek(at)
            file.write(data)

    return damage


def cut(pattern: str, keep: float) -> Damage:
    def damage(folder: Path) -> None:
        path = sorted(folder.glob(pattern))[0]
        os.truncate(path, int(path.stat().st_size * keep))

    return damage


def link_outside(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    shutil.move(shard, outside := folder.parent / "outside.safetensors")
    shard.symlink_to(outside)


NORM = "model.norm.weight"


def named_in(shard: str) -> Damage:
    return index(lambda files: files.update({NORM: shard}))


CHECKPOINTS: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), ("config.json",)),
    "a config that is no JSON": (lambda folder: (folder / "config.json").write_text("{,"), ("config.json",)),
    "a config that is no object": (lambda folder: (folder / "config.json").write_text("[1]"), ("config.json",)),
    "a config that is no text": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe{}"), ("config.json",)),
    "an unknown model_type": (config(model_type="mamba"), ("'mamba'", "gpt_oss")),
    "a model_type that is a number": (config(model_type=7), ("model_type",)),
    "another architecture": (config(architectures=["GptOssForChess"]), ("GptOssForChess",)),
    "hidden_size 0": (config(hidden_size=0), ("hidden_size", "0")),
    "hidden_size below 0": (config(hidden_size=-64), ("hidden_size", "-64")),
    "hidden_size that is no whole number": (config(hidden_size=64.5), ("hidden_size", "64.5")),
    "hidden_size as a text": (config(hidden_size="64"), ("hidden_size", "'64'")),
    "hidden_size nobody has": (config(hidden_size=1 << 40), ("hidden_size",)),
    "layers nobody has": (config(num_hidden_layers=10**9), ("num_hidden_layers",)),
    "heads that KV heads do not divide": (config(num_key_value_heads=3), ("num_key_value_heads", "3")),
    "more experts a token than there are": (config(num_experts_per_tok=99), ("num_experts_per_tok", "99")),
    "an odd head_dim": (config(head_dim=15), ("head_dim", "15")),
    "a window below 0": (config(sliding_window=-1), ("sliding_window", "-1")),
    "an unknown layer type": (config(layer_types=["full_attention", "none", "none"]), ("layer_types", "none")),
    "too few layer types": (config(layer_types=["full_attention"]), ("layer_types",)),
    "an epsilon that is not a number": (config(rms_norm_eps=float("nan")), ("rms_norm_eps",)),
    "a context of nothing": (config(max_position_embeddings=0), ("max_position_embeddings", "0")),
    "a rope factor of 0": (config(rope_parameters={"rope_type": "yarn", "factor": 0, "rope_theta": 1e4}), ("factor", "0")),
    "an unknown rope type": (config(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}), ("spiral",)),
    "no weights": (lambda folder: [path.unlink() for path in folder.glob("*.safetensors*")], ("safetensors",)),
    "an empty weight file": (cut("*.safetensors", 0), (".safetensors",)),
    "a truncated weight file": (cut("*.safetensors", 0.7), (".safetensors", "ends at byte")),
    "a header longer than the file": (overwrite("*.safetensors", 0, b"\xff" * 8), (".safetensors", "header")),
    "a header that is no JSON": (overwrite("*.safetensors", 8, b"}{"), (".safetensors", "header")),
    "a tensor missing": (index(lambda files: files.pop(NORM)), (NORM, "Missing")),
    "an index that names an absent shard": (named_in("absent.safetensors"), ("absent.safetensors",)),
    "an index that names another shard": (
        index(lambda files: files.update({NORM: next(f for f in files.values() if f != files[NORM])})), (NORM,),
    ),
    "a shard path that leaves the folder": (named_in("../outside.safetensors"), ("../outside.safetensors",)),
    "a shard path from the root": (named_in("/etc/passwd"), ("/etc/passwd",)),
    "a link that leaves the folder": (link_outside, ("outside",)),
    "a tensor of another shape": (first_tensor(lambda value: value.flatten()[:3].clone()), ("[3], expected",)),
    "a tensor of integers": (first_tensor(lambda value: value.int()), ("int32",)),
    "a tensor that nothing uses": (
        index(lambda files: files.update({"model.more.weight": files[NORM]})), ("model.more.weight",),
    ),
    "a pickle alone": (
        lambda folder: [p.rename(folder / "pytorch_model.bin") for p in [*folder.glob("*.safetensors")][:1]]
        + [p.unlink() for p in folder.glob("*.safetensors*")],
        ("pytorch_model.bin",),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_gpt_oss(tmp_path_factory.mktemp("healthy") / "checkpoint", shards=2)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(name: str, healthy: Path, tmp_path: Path) -> None:
    damage, words = CHECKPOINTS[name]
    shutil.copytree(healthy, folder := tmp_path / "checkpoint")
    damage(folder)
    before = listing(tmp_path)
    refused(run("compile", folder, "-o", tmp_path / "artifact"), *words)
    assert listing(tmp_path) == before


def test_folders_and_places(healthy: Path, tmp_path: Path) -> None:
    (full := tmp_path / "full").mkdir()
    (full / "mine.txt").write_text("do not lose this")
    (tmp_path / "file").write_text("")
    before = [listing(tmp_path), listing(healthy)]
    refused(run("compile", tmp_path / "nowhere", "-o", tmp_path / "a"), "no folder", "nowhere")
    refused(run("compile", tmp_path / "file", "-o", tmp_path / "a"), "is a file")
    refused(run("compile", full, "-o", tmp_path / "a"), "config.json")
    refused(run("compile", healthy, "-o", full), "not empty", "--force")
    refused(run("compile", healthy, "-o", full, "--force"), "is not an oxfuse artifact")
    refused(run("compile", healthy, "-o", tmp_path / "file"), "is a file")
    refused(run("compile", healthy, "-o", tmp_path / "file" / "a"), "cannot be written")
    refused(run("compile", healthy, "-o", healthy / "a"), "lies in the checkpoint")
    refused(run("compile", healthy, "-o", healthy.parent, "--force"), "holds the checkpoint")
    refused(run("compile", healthy, "-o", tmp_path / "a", "--max-context", "0"), "max_context is 0")
    refused(run("compile", healthy, "-o", tmp_path / "a", "--max-context", "99999999"), "99999999")
    refused(run("compile", healthy, "-o", tmp_path / "a", "--tokenizer", full), "tokenizer")
    refused(run("compile", healthy, "-o", tmp_path / "a", "--target", "cuda:sm_70"), "cuda:sm_70", "cuda:sm_80")
    refused(run("compile", healthy, "-o", tmp_path / "a", "--task", "chess"), "chess")
    assert [listing(tmp_path), listing(healthy)] == before


def manifest(change: Callable[[dict[str, Any]], object]) -> Damage:
    return lambda folder: edit_json(folder / MANIFEST, change)


def weight_byte(folder: Path) -> None:
    """Change one byte of a tensor that is not one of the last: sizes and header stay."""
    path = folder / read_manifest(folder).weights[0].path
    begin = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    overwrite(path.name, begin + 100, bytes([path.read_bytes()[begin + 100] ^ 1]))(folder)


ARTIFACTS: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), (MANIFEST,)),
    "a manifest that is no JSON": (lambda folder: (folder / MANIFEST).write_text("{"), (MANIFEST,)),
    "another format version": (manifest(lambda data: data.update(format_version=99)), ("99", "Compile")),
    "another torch": (manifest(lambda data: data["requirements"].update(torch="1.0")), ("torch is", "1.0", "install torch==1.0")),
    "another processor": (
        manifest(lambda data: data["requirements"].update(cpu_features=["avx9000"])),
        ("the processor lacks avx9000", "--cpu-isa"),
    ),
    "another platform": (manifest(lambda data: data["requirements"].update(platform="Plan9")), ("Plan9", "compile")),
    "a newer C library": (manifest(lambda data: data["requirements"].update(glibc="99.0")), ("glibc 99.0",)),
    "a shorter weight file": (cut("weights.safetensors", 0.9), ("weights.safetensors", "bytes")),
    "another header": (overwrite("weights.safetensors", 20, b"!"), ("weights.safetensors", "header")),
    "no weight file": (lambda folder: (folder / "weights.safetensors").unlink(), ("weights.safetensors",)),
    "another program": (overwrite("programs/cpu/step/*.so", 5000, b"?!"), (".so", "sha256")),
    # What byte-level mutations have found.
    "a number beyond any": (manifest(lambda data: data["cache"].update(block_size=10**310)), ("block_size", "damaged")),
    "heads that the program has not": (manifest(lambda data: data["cache"]["kv_heads"].__setitem__(0, 7)), ("caches of shape",)),
    "a NUL in a path": (manifest(lambda data: data["programs"][0].update(path="a\0b")), ("no text",)),
    "half a character": (manifest(lambda data: data["ops_library"].update(probe="\ud800")), ("no text",)),
    "a library's endless name": (manifest(lambda data: data["ops_library"].update(path="x" * 9000)), ("cannot be read",)),
    "an endless feature": (manifest(lambda data: data["requirements"].update(cpu_features=["y" * 9000])), ("lacks yyy",)),
    "no ops library": (lambda folder: next(folder.glob("programs/cpu/*.so")).unlink(), ("oxfuse_ops.so", "does not exist")),
}  # fmt: skip


@pytest.fixture(scope="module")
def artifact(compiled: Callable[..., tuple[Any, Path, Path]]) -> Path:
    return compiled("mxfp4")[2]


@pytest.mark.parametrize("name", ARTIFACTS)
def test_artifacts(name: str, artifact: Path, tmp_path: Path) -> None:
    damage, words = ARTIFACTS[name]
    shutil.copytree(artifact, copy := tmp_path / "artifact")
    damage(copy)
    before = listing(tmp_path)
    refused(run("generate", copy, "-p", "x"), *words)
    refused(run("verify", copy), *words)
    assert listing(tmp_path) == before


def test_a_changed_weight_is_found_by_verify(artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact, copy := tmp_path / "artifact")
    weight_byte(copy)
    refused(run("verify", copy), "other values than were compiled", "copy the artifact again")


WITH_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
TEMPLATES = {
    "a class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a global": "{{ cycler.__init__.__globals__['os'].popen('touch ESCAPED').read() }}",
    "a format": "{{ '{0.__class__.__init__}'.format(messages) }}{{ messages.append.__self__.__class__ }}",
    "an attribute by filter": "{{ messages | attr('__class__') | attr('__base__') }}{{ (messages | attr('__class__')).x }}",
    "an import": "{% import os %}",
    "changing its input": "{{ messages.append(1) }}",
    "endless": "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "large": "{{ 'x' * 10**12 }}",
    "larger": "{{ '%1000000000000d' % 1 }}",
}


@pytest.fixture(scope="module")
def speaking(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact with the bundled tokenizer: its vocabulary is larger than the model's, so that some texts do not fit."""
    shutil.copytree(artifact, copy := tmp_path_factory.mktemp("speaking") / "artifact")
    bundled = Path(__file__).parents[2] / "artifacts" / "tiny-gpt-oss"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        add_file(copy, name, (bundled / name).read_bytes())
    return copy


def add_file(folder: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    edit_json(folder / MANIFEST, lambda told: told["tokenizer_files"].update({name: digest}))


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates(name: str, speaking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(speaking, copy := tmp_path / "artifact")
    add_file(copy, "chat_template.jinja", TEMPLATES[name].encode())
    before = listing(tmp_path)
    refused(run("generate", copy, "--chat", "-p", "x"), "chat template")
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "stdin", "words"),
    [
        (["-p", ""], "", ("has no tokens",)),
        (["-"], b"", ("has no tokens",)),
        (["-"], b"caf\xe9", ("UTF-8",)),
        (["-p", "x" * 20_000], "", ("tokens", "max_context")),
        (["-p", "x", "--temperature", "-1"], "", ("temperature is -1",)),
        (["-p", "x", "--temperature", "nan"], "", ("temperature is nan",)),
        (["-p", "x", "--top-p", "1.5"], "", ("top_p is 1.5",)),
        (["-p", "x", "--top-k", "-1"], "", ("top_k is -1",)),
        (["-p", "x", "--min-p", "2"], "", ("min_p is 2",)),
        (["-p", "x", "--repetition-penalty", "0"], "", ("repetition_penalty is 0",)),
        (["-p", "x", "--seed", str(1 << 70)], "", ("seed",)),
        (["-p", "x", "-n", "0"], "", ("max_new_tokens is 0",)),
        (["-p", "x", "--stop", ""], "", ("stop",)),
        (["-p", "x", "--stop-token", "100000"], "", ("100000", "vocabulary")),
        (["-p", "x", "--threads", "0"], "", ("threads is 0",)),
        (["-p", "x", "--chat"], "", ("chat template",)),
        (["-p", "def f(x): return numpy.zeros(x)"], "", ("vocabulary",)),
        (["-f", "no-such-file"], "", ("no-such-file",)),
    ],
)  # fmt: skip
def test_prompts(arguments: list[str], stdin: str | bytes, words: tuple[str, ...], speaking: Path) -> None:
    refused(run("generate", speaking, *arguments, stdin=stdin), *words)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A disk of so many bytes, where this process may mount one."""
    mounted: list[Path] = []

    def mount(size: int) -> Path:
        (place := tmp_path / "disk").mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True)
        if done.returncode:
            pytest.skip("mounting needs root")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", place], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("room", [64 << 10, 1 << 20], ids=["no room for the ops", "none for the program"])
def test_a_disk_that_fills_up(room: int, healthy: Path, small_disk: Callable[[int], Path]) -> None:
    weights = sum(path.stat().st_size for path in healthy.glob("*.safetensors"))
    disk = small_disk(weights + room)
    command = [sys.executable, "-m", "oxfuse", "compile", str(healthy), "-o", str(disk / "artifact")]
    done = subprocess.run(command, capture_output=True, text=True)
    refused(Ran(done.returncode, done.stdout, done.stderr), "disk", "free")
    assert list(disk.iterdir()) == []
