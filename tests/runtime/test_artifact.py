"""A real library, mapped weights and a manifest, from `load` to the command line, and everything that must be noticed first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from oxfuse.errors import UserError
from oxfuse.runtime import load
from oxfuse.runtime.host import check_host, version_numbers
from oxfuse.runtime.machine import cpu_features
from oxfuse.runtime.manifest import read_manifest
from oxfuse.runtime.verify import verify_artifact

from .tiny_artifact import HIDDEN, VOCAB, eager_model


def edit(folder: Path, change: Callable[[dict], object]) -> Path:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def prompts() -> list[list[int]]:
    return [torch.randint(0, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 30, 9, 17)]


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_program_equals_the_eager_step(artifact: Path, threads: int | None) -> None:
    model, eager = load(artifact, threads=threads), eager_model()
    assert_close(model.logits(prompts()), eager.logits(prompts()), rtol=0, atol=1e-4)
    assert [g.token_ids for g in model.generate(prompts(), max_new_tokens=12)] == [
        g.token_ids for g in eager.generate(prompts(), max_new_tokens=12)
    ]
    assert model.scheduler.engine.used_blocks == 0
    assert model.config == {"hidden": HIDDEN} and model.report == {"parity": None} and model.manifest.name == "tiny"


def test_weights_are_mapped_not_copied(artifact: Path) -> None:
    """A second load, so that only what a load itself costs is counted; then every weight is read."""
    program = """
import sys, torch
from oxfuse.runtime import load
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
first = load(sys.argv[1])
before = status("RssAnon"), status("RssFile")
second = load(sys.argv[1], check=sys.argv[2])
loaded = status("RssAnon") - before[0]
generator = torch.Generator().manual_seed(0)
second.logits([[1, 2, 3]])
before_read = status("RssAnon")
for name, tensor in second.scheduler.engine.step._constants.items():
    tensor.sum()
print(loaded, status("RssAnon") - before_read, status("RssFile") - before[1])
"""
    weights = read_manifest(artifact).weights[0].bytes
    for check in ("quick", "full"):
        run = subprocess.run([sys.executable, "-c", program, str(artifact), check], capture_output=True, text=True, check=True)
        loaded, read, mapped = map(int, run.stdout.split())
        assert loaded < 0.05 * weights and read < 0.05 * weights, f"{loaded} and {read} of {weights} bytes"
        assert mapped > 0.9 * weights


def test_loading_imports_no_compiler(artifact: Path) -> None:
    program = """
import sys
import oxfuse
model = oxfuse.load(sys.argv[1])
model.generate("plain words", max_new_tokens=2)
loaded = [m for m in sys.modules if m.split(".")[:2] in (["oxfuse", "compiler"], ["oxfuse", "passes"], ["oxfuse", "models"])]
loaded += [m for m in ("transformers", "huggingface_hub", "torch._inductor.compile_fx", "triton") if m in sys.modules]
print(loaded)
"""
    run = subprocess.run([sys.executable, "-c", program, str(artifact)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_text_in_and_out(artifact: Path) -> None:
    model = load(artifact)
    (found,) = model.generate("plain words", max_new_tokens=5)
    assert model.tokenizer and found.prompt_token_ids == model.tokenizer.encode("plain words")
    assert (
        found.text
        == model.tokenizer.decode(found.token_ids)
        == "".join(c.text for c in model.stream("plain words", max_new_tokens=5))
    )


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def resize(path: Path, by: int) -> None:
    os.truncate(path, path.stat().st_size + by)


def test_full_check_and_verify_find_a_changed_weight(copy: Path) -> None:
    flip(copy / "weights.safetensors", -5)
    load(copy)  # quick looks at headers only
    with pytest.raises(UserError, match=r"has changed since it was compiled, in 1 tensors such as"):
        load(copy, check="full")
    result = verify_artifact(copy)
    assert len(result["weights"]["damaged"]) == 1 and not result["ok"] and result["golden"] is None


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda d: flip(next(d.glob("programs/step/*.so")), 5000), r"\.so has sha256"),
        (lambda d: next(d.glob("programs/step/*.json")).unlink(), r"\.json does not exist"),
        (lambda d: flip(d / "tokenizer.json", 30), r"tokenizer\.json has sha256"),
        (lambda d: flip(d / "weights.safetensors", 40), "weights.safetensors has"),
        (lambda d: resize(d / "weights.safetensors", -4), "outside its"),
        (
            lambda d: (d / "weights.safetensors").write_bytes((d / "weights.safetensors").read_bytes() + b"1234"),
            "the manifest says",
        ),
        (lambda d: (d / "weights.safetensors").write_bytes(b"1234"), "no safetensors header"),
        (lambda d: (d / "weights.safetensors").unlink(), "does not exist"),
        (lambda d: (d / "report.json").write_text("{"), r"report\.json cannot be read"),
        (lambda d: (d / "manifest.json").unlink(), "no manifest.json"),
        (lambda d: edit(d, lambda m: m["programs"][0].update(target="cuda:sm_90")), "its programs are for"),
        (lambda d: edit(d, lambda m: m["programs"][0]["constants"].pop("phase")), "constant phase"),
        (lambda d: edit(d, lambda m: m["programs"][0]["constants"].update(phase="gone")), "constant phase"),
        (lambda d: edit(d, lambda m: m["weights"][0]["tensors"]["phase"].update(shape=[2])), "phase as float32"),
        (lambda d: edit(d, lambda m: m["weights"][0]["tensors"].pop("phase")), "about tensor 'phase'"),
        (lambda d: edit(d, lambda m: m["cache"].update(dtype="float12")), "float12"),
    ],
)
def test_damage_is_refused_before_anything_runs(copy: Path, damage: Callable[[Path], object], reason: str) -> None:
    damage(copy)
    with pytest.raises(UserError, match=reason):
        load(copy)


@pytest.mark.parametrize(
    ("need", "reason"),
    [
        ({"torch": "2.3"}, r"torch is .* install torch==2\.3\.\*"),
        ({"platform": "darwin"}, "platform is"),
        ({"machine": "riscv64"}, "machine is"),
        ({"cpu_features": ["fpu", "amx_telepathy"]}, "lacks amx_telepathy"),
        ({"glibc": "9.1"}, "glibc 9.1 or later"),
    ],
)
def test_a_machine_that_does_not_fit(copy: Path, need: dict[str, object], reason: str) -> None:
    edit(copy, lambda m: m["requirements"].update(need))
    with pytest.raises(UserError, match=f"does not fit this machine.*{reason}"):
        load(copy)


def test_every_misfit_is_named_at_once(copy: Path) -> None:
    edit(copy, lambda m: m["requirements"].update(torch="1.0", glibc="9.1"))
    with pytest.raises(UserError, match=r"torch is .*glibc 9\.1"):
        check_host(read_manifest(copy).requirements)


def test_processor_flags(tmp_path: Path) -> None:
    (tmp_path / "x86").write_text("processor : 0\nflags\t\t: fpu avx2 avx512f\n\nprocessor : 1\nflags : other\n")
    (tmp_path / "arm").write_text("Features\t: fp asimd\n")
    assert cpu_features(tmp_path / "x86") == {"fpu", "avx2", "avx512f"}
    assert cpu_features(tmp_path / "arm") == {"fp", "asimd"} and cpu_features(tmp_path / "none") == frozenset()
    assert version_numbers("2.13.0+cpu") == (2, 13, 0) and version_numbers("2.36") < version_numbers("2.100")


@pytest.mark.parametrize(
    "options",
    [
        {"threads": 0},
        {"threads": 2.0},
        {"check": "slow"},
        {"cache_bytes": 0},
        {"cache_bytes": 10},
        {"prefix_cache_bytes": -1},
        {"prefix_cache_bytes": 1.5},
        {"device": "cuda"},
        {"device": "tpu9"},
    ],
)
def test_load_options_are_checked(artifact: Path, options: dict[str, object]) -> None:
    with pytest.raises(UserError, match=str(options.get("device", next(iter(options))))):
        load(artifact, **options)


def test_verify_compares_with_the_golden_logits(copy: Path) -> None:
    seen: list[tuple[str, float | None]] = []
    result = verify_artifact(copy, progress=lambda phase, done: seen.append((phase, done)))
    assert result["ok"] and result["golden"]["top1_agreement"] == 1 and result["golden"]["max_error"] < 1e-4
    assert result["golden"]["rows"] == 4 and result["golden"]["reference_rms"] > 1
    assert [phase for phase, done in seen if done is None] == ["check programs", "hash weights", "compare logits"]
    hashed = [done for phase, done in seen if phase == "hash weights" and done is not None]
    assert hashed == sorted(hashed) and len(hashed) > 20 and 0.99 < hashed[-1] <= 1
    changed = (copy / "weights.safetensors").read_bytes()
    flip(copy / "golden.safetensors", -2)  # an exponent bit of the last logit
    result = verify_artifact(copy)
    assert not result["ok"] and "differ from the reference" in result["problems"][0]
    assert (copy / "weights.safetensors").read_bytes() == changed


def test_a_golden_file_of_another_model(copy: Path) -> None:
    save_file({"token_ids": torch.zeros(3)}, copy / "golden.safetensors")
    with pytest.raises(UserError, match="lacks the tensor 'positions'"):
        verify_artifact(copy)
    one = torch.zeros(1, dtype=torch.long)
    save_file({"token_ids": one, "positions": one + 1, "rows": one + 2, "logits": torch.zeros(1, 7)}, copy / "golden.safetensors")
    with pytest.raises(UserError, match=r"logits \[1, 7\]"):
        verify_artifact(copy)
