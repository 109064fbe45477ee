"""The compiled artifact computes what transformers computes, with any number of threads and any mix of sequences."""

from __future__ import annotations

import json

import pytest
import torch

import oxfuse
from oxfuse.runtime.verify import verify_artifact

from ..parity.cases import assert_parity, random_ids

ALWAYS = ("base", "mxfp4")
PAIRWISE = ("one_kv_head", "tied", "window_1", "odd_sizes", "sixteen_experts", "original")
"""With ALWAYS: KV groups, tied or not, MXFP4 or dense, odd sizes, few and many experts, windows of 1 and 19, three layouts."""


@pytest.mark.parametrize("name", [*ALWAYS, *(pytest.param(name, marks=pytest.mark.slow) for name in PAIRWISE)])
def test_artifact_equals_transformers(compiled, name, tmp_path):
    case, folder, artifact = compiled(name)
    assert_parity(oxfuse.load(artifact), case.transformers(folder, tmp_path), case, folder)


@pytest.mark.parametrize("name", ALWAYS)
def test_verify_agrees_with_the_report(compiled, name):
    _, _, artifact = compiled(name)
    result = verify_artifact(artifact)
    report = json.loads((artifact / "report.json").read_text())
    assert result["ok"], result["problems"]
    assert result["golden"]["max_error"] == pytest.approx(report["parity"]["max"], rel=0.5, abs=1e-5)
    assert report["parity"]["top1"] >= 0.95
    assert report["sizes"]["programs"] < 20e6
    counts = {p["name"]: p["count"] for p in report["passes"]}
    assert (counts["sink_attention"], counts["rotary_embedding"], counts["moe_dispatch"], counts["rms_norm"]) == (3, 3, 3, 7)


def test_programs_call_the_ops_without_the_dispatcher(compiled):
    _, _, artifact = compiled("mxfp4")
    program = artifact / "programs/cpu/step/program.so"
    tag = json.loads((artifact / "manifest.json").read_text())["ops_library"]["probe"].rpartition("_")[2]
    for op in ("sink_attention", "rotary_embedding", "moe_dispatch"):
        assert f"oxfuse::{op}_{tag}_address".encode() in program.read_bytes()
    assert not program.with_suffix(".json").exists(), "calls that go through torch's boxes, a sixtieth of a token's time"


def test_any_number_of_threads_gives_the_same_tokens(compiled):
    case, _, artifact = compiled("base")
    prompt = random_ids(case, 130).tolist()
    results = {}
    for threads in (1, 2, 3, 4, 7, 16):
        model = oxfuse.load(artifact, threads=threads)
        results[threads] = model.generate(prompt, max_new_tokens=60, stop_token_ids=[])[0].token_ids
        ragged = model.logits([prompt, prompt[:7], [5]])
        assert torch.isfinite(ragged).all()
    assert len({tuple(tokens) for tokens in results.values()}) == 1, results


def test_prefill_beside_decodes_gives_the_tokens_of_separate_runs(compiled):
    """Sequences of very different lengths in one call: while the long one is prefilled, the short ones decode."""
    case, _, artifact = compiled("base")
    model = oxfuse.load(artifact)
    model.scheduler.engine.chunk = 32
    prompts = [random_ids(case, n, seed=n).tolist() for n in (4, 700, 55, 1, 260)]
    together = model.generate(prompts, max_new_tokens=80, stop_token_ids=[])
    for prompt, generation in zip(prompts, together, strict=True):
        alone = oxfuse.load(artifact).generate(prompt, max_new_tokens=80, stop_token_ids=[])[0]
        assert generation.token_ids == alone.token_ids
    assert model.scheduler.engine.used_blocks == 0


@pytest.mark.parametrize("options", [{}, {"target": "onnx"}], ids=["cpu", "onnx"])
def test_rewinds_and_shared_prefixes_give_the_tokens_of_separate_runs(compiled, options):
    case, _, artifact = compiled("base", **options)
    model = oxfuse.load(artifact)
    prompt, tail, other = (random_ids(case, n, seed=n).tolist() for n in (200, 9, 23))

    def alone(ids):
        return oxfuse.load(artifact).logits([ids])[0, -1]

    with model.session() as session:
        session.prefill(prompt)
        with session.fork() as twin:
            torch.testing.assert_close(twin.prefill(other), alone(prompt + other), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(session.prefill(tail), alone(prompt + tail), atol=1e-4, rtol=1e-4)
        session.rewind(150)
        assert session.length == 150
        torch.testing.assert_close(session.prefill(other), alone(prompt[:150] + other), atol=1e-4, rtol=1e-4)
        session.rewind(3)  # the window's blocks are long gone: what is missing is computed again
        torch.testing.assert_close(session.decode(7), alone([*prompt[:3], 7]), atol=1e-4, rtol=1e-4)
    assert model.scheduler.engine.used_blocks == 0


def test_two_models_in_one_process(compiled):
    (case, _, one), (_, _, two) = compiled("base"), compiled("mxfp4")
    ids = random_ids(case, 40).tolist()
    first, second = oxfuse.load(one), oxfuse.load(two)
    expected = [oxfuse.load(a).generate(ids, max_new_tokens=20)[0].token_ids for a in (one, two)]
    assert [m.generate(ids, max_new_tokens=20)[0].token_ids for m in (first, second)] == expected


def test_a_copied_artifact_loads_beside_the_original(compiled, tmp_path):
    """The copy's ops library registers the same ops: loading it again must not abort."""
    import shutil

    _, _, artifact = compiled("base")
    copy = shutil.copytree(artifact, tmp_path / "copy")
    assert oxfuse.load(artifact).generate([1, 2], max_new_tokens=3) == oxfuse.load(copy).generate([1, 2], max_new_tokens=3)
