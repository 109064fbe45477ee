"""Artifacts that are damaged, or made for something else, are refused with a status and a line; the process lives on.

Where a file's hash would tell at once, the manifest gets the new one as well, so that the checks behind it are reached.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import oxfuse

from .builds import CallError, Driver

Manifest = dict[str, Any]


class Copy:
    """A copy of an artifact, its files linked until they are changed."""

    def __init__(self, artifact: Path, place: Path) -> None:
        self.folder = Path(shutil.copytree(artifact, place, copy_function=os.link))
        self.manifest: Manifest = json.loads((artifact / "manifest.json").read_text())

    def write(self, name: str, data: bytes) -> None:
        (self.folder / name).unlink(missing_ok=True)
        (self.folder / name).write_bytes(data)

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def save(self) -> None:
        self.write("manifest.json", json.dumps(self.manifest).encode())

    def header(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Change the header of the weight file, keep its data where it is, and tell the manifest."""
        data = self.read("weights.safetensors")
        length = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + length])
        change(entries)
        text = json.dumps(entries).encode()
        text = text.ljust(-(-(8 + len(text)) // 64) * 64 - 8)  # where data begins, tensors' alignment counts from
        self.write("weights.safetensors", len(text).to_bytes(8, "little") + text + data[8 + length :])
        self.manifest["weights"][0]["header_sha256"] = hashlib.sha256(len(text).to_bytes(8, "little") + text).hexdigest()
        self.manifest["weights"][0]["bytes"] = len(text) + 8 + len(data) - 8 - length
        self.save()

    def replace(self, name: str, data: bytes) -> None:
        """Write a program's file, or that of the C++ ops, and its hash."""
        self.write(name, data)
        digest = hashlib.sha256(data).hexdigest()
        if name == self.manifest["ops_library"]["path"]:
            self.manifest["ops_library"]["sha256"] = digest
            self.manifest["ops_library"]["probe"] = "oxfuse::another"  # or a copy that is loaded already would do
        else:
            self.manifest["programs"][0]["files"][Path(name).name] = digest
        self.save()


@pytest.fixture
def copy(compiled, tmp_path) -> Callable[[], Copy]:
    _, _, artifact = compiled("base")
    numbers = iter(range(10_000))
    return lambda: Copy(artifact, tmp_path / f"copy{next(numbers)}")


def refusal(driver: Driver, folder: Path, what: str = "") -> CallError:
    try:
        driver.call("load", "bad", folder)
    except CallError as error:
        assert error.message.strip() and "\n" not in error.message
        return error
    raise AssertionError(f"{what or folder} was loaded")


def assert_lives(driver: Driver, artifact: Path) -> None:
    driver.call("load", "m", artifact)
    driver.call("open", "s", "m")
    assert len(driver.generate("s", [1, 2, 3], max_new_tokens=3)[0]) == 3


PROGRAM, OPS, WEIGHTS = "programs/cpu/step/program.so", "programs/cpu/oxfuse_ops.so", "weights.safetensors"


def set_entry(name: str, field: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(entries: dict[str, Any]) -> None:
        key = name or next(key for key in entries if key != "__metadata__")
        entries[key][field] = value

    return change


def both(field: str, value: object) -> Callable[[Copy], None]:
    """Change a tensor in header and manifest alike, so that the program is what tells."""

    def change(copy: Copy) -> None:
        name = "model.norm.weight"
        copy.manifest["weights"][0]["tensors"][name][field] = value
        stored = {"float16": "F16", "int32": "I32"}.get(str(value), value)
        copy.header(set_entry(name, field, stored))

    return change


DAMAGES: dict[str, Callable[[Copy], object]] = {
    "no manifest": lambda c: (c.folder / "manifest.json").unlink(),
    "manifest is a folder": lambda c: ((c.folder / "manifest.json").unlink(), (c.folder / "manifest.json").mkdir()),
    "manifest empty": lambda c: c.write("manifest.json", b""),
    "manifest is a list": lambda c: c.write("manifest.json", b"[]"),
    "manifest nested deeply": lambda c: c.write("manifest.json", b"[" * 100_000),
    "manifest not utf-8": lambda c: c.write("manifest.json", b'{"format_version": 3, "name": "\xff"}'),
    "manifest with half a surrogate": lambda c: c.write("manifest.json", b'{"format_version": 3, "name": "\\ud800"}'),
    "manifest with a name twice": lambda c: c.write("manifest.json", b'{"format_version": 3, ' + c.read("manifest.json")[1:]),
    "manifest followed by more": lambda c: c.write("manifest.json", c.read("manifest.json") + b"{}"),
    "another version": lambda c: (c.manifest.update(format_version=2), c.save()),
    "version is a text": lambda c: (c.manifest.update(format_version="3"), c.save()),
    "unknown field": lambda c: (c.manifest.update(more=1), c.save()),
    "zero byte in a name": lambda c: (c.manifest["programs"][0].update(path="a\0b"), c.save()),
    "no program": lambda c: (c.manifest.update(programs=[]), c.save()),
    "program without a hash": lambda c: (c.manifest["programs"][0]["files"].pop("program.so"), c.save()),
    "an input less": lambda c: (c.manifest["programs"][0]["inputs"].pop(), c.save()),
    "inputs in another order": lambda c: (c.manifest["programs"][0]["inputs"].reverse(), c.save()),
    "another vocabulary": lambda c: (c.manifest["model"].update(vocab_size=999), c.save()),
    "a constant is missing": lambda c: (c.manifest["programs"][0]["constants"].clear(), c.save()),
    "a constant of another weight": lambda c: (
        c.manifest["programs"][0]["constants"].update({"model.norm.weight": "model.embed_tokens.weight"}), c.save()),
    "block size 0": lambda c: (c.manifest["cache"].update(block_size=0), c.save()),
    "block size 17": lambda c: (c.manifest["cache"].update(block_size=17), c.save()),
    "cache of an unknown dtype": lambda c: (c.manifest["cache"].update(dtype="float7"), c.save()),
    "a layer in two groups": lambda c: (c.manifest["cache"]["groups"][0]["layers"].append(0), c.save()),
    "a layer less": lambda c: (c.manifest["cache"]["kv_heads"].pop(), c.save()),
    "no group": lambda c: (c.manifest["cache"].update(groups=[]), c.save()),
    "window below 0": lambda c: (c.manifest["cache"]["groups"][1].update(window=-1), c.save()),
    "sizes that overflow": lambda c: (c.manifest["limits"].update(max_context=2**52, max_batch=2**52), c.save()),
    "sizes beyond all numbers": lambda c: (c.manifest["limits"].update(max_context=2**60), c.save()),
    "sizes beyond 64 bits": lambda c: (c.manifest["limits"].update(max_batch=2**90), c.save()),
    "no weights": lambda c: (c.folder / WEIGHTS).unlink(),
    "weights are a pipe": lambda c: ((c.folder / WEIGHTS).unlink(), os.mkfifo(c.folder / WEIGHTS)),
    "no program file": lambda c: (c.folder / PROGRAM).unlink(),
    "no ops library": lambda c: (c.folder / OPS).unlink(),
    "program changed": lambda c: c.write(PROGRAM, c.read(PROGRAM) + b"x"),
    "garbage program": lambda c: c.replace(PROGRAM, b"garbage" * 1000),
    "empty program": lambda c: c.replace(PROGRAM, b""),
    "program cut short": lambda c: c.replace(PROGRAM, c.read(PROGRAM)[:5000]),
    "program is the ops library": lambda c: c.replace(PROGRAM, c.read(OPS)),
    "garbage ops library": lambda c: c.replace(OPS, b"garbage" * 1000),
    "program.json is none": lambda c: c.replace("programs/cpu/step/program.json", b"{"),
    "ops library without the op": lambda c: (c.manifest["ops_library"].update(probe="oxfuse::another"), c.save()),
    "header's length beyond the file": lambda c: c.write(WEIGHTS, b"\xff" * 8 + c.read(WEIGHTS)[8:]),
    "header is no JSON": lambda c: c.write(WEIGHTS, c.read(WEIGHTS)[:8] + b"x" + c.read(WEIGHTS)[9:]),
    "header has another dtype": lambda c: c.header(set_entry("", "dtype", "F16")),
    "header has no dtype": lambda c: c.header(set_entry("", "dtype", 3)),
    "header has an unknown dtype": lambda c: c.header(set_entry("", "dtype", "F7")),
    "header has another shape": lambda c: c.header(set_entry("", "shape", [1, 2, 3])),
    "header has a negative shape": lambda c: c.header(set_entry("", "shape", [-1, -2])),
    "header has a shape that overflows": lambda c: c.header(set_entry("", "shape", [2**40, 2**40])),
    "header has offsets beyond the file": lambda c: c.header(set_entry("", "data_offsets", [2**40, 2**40 + 4])),
    "a tensor lies behind the file's end": lambda c: c.header(
        lambda e: e["model.norm.weight"].update(data_offsets=[at + 2**40 for at in e["model.norm.weight"]["data_offsets"]])),
    "header has offsets that overflow": lambda c: c.header(set_entry("", "data_offsets", [2**63 - 2, 2**63 - 1])),
    "header has one offset": lambda c: c.header(set_entry("", "data_offsets", [0])),
    "header has offsets backwards": lambda c: c.header(set_entry("", "data_offsets", [64, 0])),
    "header has a text as tensor": lambda c: c.header(lambda e: e.update({"model.norm.weight": "text"})),
    "header lacks a tensor": lambda c: c.header(lambda e: e.pop(sorted(e)[-1])),
    "header has a tensor more": lambda c: c.header(lambda e: e.update(x={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]})),
    "another dtype everywhere": both("dtype", "int32"),
    "another size everywhere": lambda c: (
        c.manifest["weights"][0]["tensors"]["model.norm.weight"].update(shape=[2]),
        c.header(lambda e: e["model.norm.weight"].update(
            shape=[2], data_offsets=[e["model.norm.weight"]["data_offsets"][0], e["model.norm.weight"]["data_offsets"][0] + 8]))),
}  # fmt: skip
MISFITS: dict[str, Manifest] = {
    "another torch": {"torch": "2.1"},
    "another platform": {"platform": "plan9"},
    "another machine": {"machine": "riscv64"},
    "features that no processor has": {"cpu_features": ["avx2", "avx9000"]},
    "a newer C library": {"glibc": "9.9"},
}


def test_damaged_artifacts_are_refused(driver: Driver, copy):
    for name, damage in DAMAGES.items():
        one = copy()
        damage(one)
        error = refusal(driver, one.folder, name)
        assert error.status == "bad artifact", (name, str(error))
    for part in range(12):
        one = copy()
        text = one.read("manifest.json")
        one.write("manifest.json", text[: len(text) * part // 12])
        assert refusal(driver, one.folder).status == "bad artifact", f"manifest cut at {part}/12"
        one = copy()
        data = one.read(WEIGHTS)
        one.write(WEIGHTS, data[: len(data) * part // 12])
        assert refusal(driver, one.folder).status == "bad artifact", f"weights cut at {part}/12"
    one = copy()
    one.header(lambda entries: None)
    one.replace(PROGRAM, one.read(PROGRAM))
    assert_lives(driver, one.folder)  # so it was the damage that was refused


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value of the manifest whose type is told by the schema."""
    if path[:2] == ("model", "config"):
        return
    if path:
        yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from leaves(item, (*path, key))


def test_values_of_another_type_are_refused(driver: Driver, copy):
    """Every field of the manifest in turn, lists and tables by one of their items; and every field missing."""
    one = copy()
    whole = json.dumps(one.manifest)
    kinds, chosen = set(), []
    for path in leaves(one.manifest):
        kind = tuple("*" if isinstance(key, int) or (path[i - 1] in ("tensors", "files", "constants", "dims")) else key
                     for i, key in enumerate(path))  # fmt: skip
        if kind not in kinds:
            kinds.add(kind)
            chosen.append(path)
    assert len(chosen) > 80
    for path in chosen:
        for missing in (False, True):
            manifest = one.manifest = json.loads(whole)
            for key in path[:-1]:
                manifest = manifest[key]
            fields = isinstance(path[-1], str) and not (len(path) > 1 and path[-2] in FREE)
            if missing and not fields:
                continue
            if missing:
                del manifest[path[-1]]
            else:
                manifest[path[-1]] = True  # no field is one
            one.save()
            error = refusal(driver, one.folder)
            assert error.status == "bad artifact", (path, str(error))
    assert_lives(driver, copy().folder)


FREE = ("tensors", "files", "constants", "dims", "created_by", "source", "numerics", "tokenizer_files")
"""Tables whose names the schema does not tell."""


@pytest.mark.parametrize("count", [25, pytest.param(600, marks=pytest.mark.slow)])
def test_whatever_bytes_change_the_process_lives(driver: Driver, copy, count):
    """Random bytes of the manifest and of the header: an error, or an artifact that still runs."""
    chance = random.Random(5)
    statuses = set()
    for _ in range(count):
        one = copy()
        if chance.random() < 0.3:
            data = bytearray(one.read(WEIGHTS))
            data[chance.randrange(8 + int.from_bytes(data[:8], "little"))] = chance.randrange(256)
            one.write(WEIGHTS, bytes(data))
        else:
            data = bytearray(one.read("manifest.json"))
            for _ in range(chance.choice([1, 1, 4])):
                data[chance.randrange(len(data))] = chance.choice([chance.randrange(256), *b'0123456789"{}[],:-'])
            one.write("manifest.json", bytes(data))
        try:
            driver.call("load", "any", one.folder)
            statuses.add("ok")
            driver.call("unload", "any")
        except CallError as error:
            statuses.add(error.status)
        shutil.rmtree(one.folder)
    assert "bad artifact" in statuses and statuses <= {"ok", "bad artifact", "unfit host", "unsupported", "out of memory"}, (
        statuses
    )
    assert_lives(driver, copy().folder)


def test_hosts_that_do_not_fit_are_told(driver: Driver, copy):
    for name, need in MISFITS.items():
        one = copy()
        one.manifest["requirements"] |= need
        one.save()
        error = refusal(driver, one.folder)
        assert error.status == "unfit host" and "compile" in error.message, (name, str(error))
    one = copy()
    one.manifest["requirements"] |= {key: value for need in MISFITS.values() for key, value in need.items()}
    one.save()
    assert all(part in refusal(driver, one.folder).message for part in ("libtorch", "plan9", "riscv64", "9.9"))
    one = copy()
    one.manifest["requirements"]["gpu_archs"] = ["sm_90"]
    one.manifest["programs"][0]["target"] = "cuda:sm_90"
    one.save()
    error = refusal(driver, one.folder)
    assert error.status == "unfit host" and "sm_90" in error.message


def test_artifacts_of_another_kind_are_told(driver: Driver, copy):
    one = copy()
    one.manifest["programs"][0] |= {"kind": "onnx", "target": "onnx"}
    one.save()
    error = refusal(driver, one.folder)
    assert error.status == "unsupported" and "onnx" in error.message
    one = copy()
    one.manifest["model"]["task"] = "text-classification"
    one.save()
    error = refusal(driver, one.folder)
    assert error.status == "unsupported" and "text-classification" in error.message
    for device in ("cuda", "cuda:0", "tpu", "cpux"):
        with pytest.raises(CallError, match="no program for device"):
            driver.call("load", "bad", copy().folder, device=device)
    driver.call("load", "m", copy().folder, device="cpu")


def test_a_full_check_hashes_the_weights(driver: Driver, copy):
    one = copy()
    data = bytearray(one.read(WEIGHTS))
    data[-3] ^= 1
    one.write(WEIGHTS, bytes(data))
    driver.call("load", "m", one.folder)  # a quick one reads no weights
    with pytest.raises(CallError, match=r"bad artifact: .* has changed since it was compiled"):
        driver.call("load", "bad", one.folder, check="full")
    driver.call("load", "m", copy().folder, check="full")


def test_an_artifact_compiled_again_into_its_folder_is_the_new_one(driver: Driver, compiled, tmp_path):
    """The system's loader would take a library of the same name for the one that it has."""
    place = tmp_path / "artifact"
    for name in ("base", "neox"):
        _, _, artifact = compiled(name)
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(artifact, place)
        driver.call("load", "m", place)
        driver.call("open", "s", "m")
        tokens, _, _ = driver.generate("s", [5, 6, 7], max_new_tokens=8, stop_token_ids="none")
        (expected,) = oxfuse.load(artifact).generate([5, 6, 7], max_new_tokens=8, stop_token_ids=[])
        assert tokens == expected.token_ids
