"""llama.cpp as a peer: the GGUF file holds the checkpoint's own numbers, and llama.cpp computes the reference's logits from it.

What runs llama.cpp is skipped where no interpreter has llama-cpp-python: OXFUSE_LLAMA names one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from oxfuse.compiler.bench import gguf_file, llama_worker, worker
from oxfuse.compiler.bench.contenders import of_llama
from oxfuse.compiler.bench.cost import Cost
from oxfuse.compiler.bench.engines import ENGINES, LLAMA_BF16, LLAMA_Q8, EngineSpec
from oxfuse.compiler.bench.gguf_file import BYTES_PER_VALUE, ggml_mxfp4, write_gguf
from oxfuse.compiler.bench.llama import build_llama, find_llama
from oxfuse.compiler.bench.llama_worker import tokens_for as tokens_of_llama
from oxfuse.compiler.bench.speed import correlation
from oxfuse.compiler.bench.worker import tokens_for
from oxfuse.compiler.bench.worker_process import Worker
from oxfuse.errors import UserError
from oxfuse.models import load_reference
from oxfuse.models.checkpoint import Checkpoint
from oxfuse.models.tensor_source import dequantise
from oxfuse.runtime.manifest import CacheGroup, CacheSpec
from tests.checkpoints import random_gpt_oss

# Every expert is chosen, so that no rounding of llama.cpp's sends a token elsewhere: what shows is a wrong weight. The ends of
# YaRN's ramp are rounded, as llama.cpp does whatever a file says.
SHAPE = dict(
    hidden_size=128,
    intermediate_size=128,
    head_dim=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
    num_experts_per_tok=4,
    sliding_window=128,
    vocab_size=512,
    rope_parameters={"truncate": True},
)
SPECS = {spec.key: spec for spec in ENGINES}
NOTHING = Cost(
    dense=1,
    head=1,
    experts=1,
    share=1.0,
    dense_bytes=1,
    experts_bytes=1,
    query_heads=1,
    cache=CacheSpec(block_size=16, dtype="bfloat16", kv_heads=(1,), head_dim=(2,), groups=(CacheGroup(window=0, layers=(0,)),)),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_gpt_oss(tmp_path_factory.mktemp("gguf") / "model", layout="mxfp4", dtype=torch.bfloat16, **SHAPE)


@pytest.fixture(scope="module")
def llama() -> Path:
    given = os.environ.get("OXFUSE_LLAMA")
    try:
        return find_llama(Path(given) if given else None)
    except UserError as error:
        pytest.skip(str(error))


def of_ggml(tensor: gguf.ReaderTensor) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))


def test_blocks_hold_the_same_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 5, 4, 16), generator=generator).to(torch.uint8)
    scales = torch.randint(100, 140, (3, 5, 4), generator=generator).to(torch.uint8)
    found = gguf.quants.dequantize(ggml_mxfp4(blocks, scales).flatten(-2).numpy(), gguf.GGMLQuantizationType.MXFP4)
    assert torch.equal(torch.from_numpy(found), dequantise(blocks, scales))


@pytest.mark.parametrize("dense", ["bf16", "q8_0"])
def test_file_holds_the_checkpoint(checkpoint: Path, tmp_path: Path, dense: gguf_file.Dense) -> None:
    reader = gguf.GGUFReader(write_gguf(checkpoint, tmp_path / "model.gguf", dense))
    found = {tensor.name: tensor for tensor in reader.tensors}
    source = Checkpoint.open(checkpoint)
    config = source.contract().parse_config(source.config)
    sources = source.contract().sources(source, config, source.contract().default_task)
    experts = "model.layers.1.mlp.experts"
    gate_up, down = sources[f"{experts}.gate_up_proj"].read(), sources[f"{experts}.down_proj"].read()  # [E, in, out]
    for name, right in (
        ("gate_exps.weight", gate_up[..., 0::2].transpose(1, 2)),
        ("up_exps.weight", gate_up[..., 1::2].transpose(1, 2)),
        ("down_exps.weight", down.transpose(1, 2)),
        ("gate_exps.bias", sources[f"{experts}.gate_up_proj_bias"].read()[:, 0::2].float()),
        ("up_exps.bias", sources[f"{experts}.gate_up_proj_bias"].read()[:, 1::2].float()),
    ):
        assert torch.equal(of_ggml(found[f"blk.1.ffn_{name}"]), right), name
    for name, ours in (("blk.1.attn_q.weight", "model.layers.1.self_attn.q_proj.weight"), ("output.weight", "lm_head.weight")):
        values, right = of_ggml(found[name]), sources[ours].read().float()
        assert found[name].n_bytes == BYTES_PER_VALUE[dense] * right.numel()
        assert torch.equal(values, right) if dense == "bf16" else (values - right).abs().max() < right.abs().max() / 127
    assert len(found) == 3 + config.num_hidden_layers * 19  # all that the architecture has
    number = {field.name: field.contents() for field in reader.fields.values()}
    assert number["gpt-oss.attention.sliding_window"] == 128 and number["gpt-oss.rope.scaling.factor"] == 8
    assert number["gpt-oss.vocab_size"] == 512 and number["gpt-oss.expert_used_count"] == 4


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    whole = random_gpt_oss(tmp_path / "whole", dtype=torch.bfloat16)
    with pytest.raises(UserError, match="not in MXFP4"):
        write_gguf(whole, tmp_path / "whole.gguf", "bf16")
    slides = random_gpt_oss(tmp_path / "slides", layout="mxfp4", layer_types=["full_attention"] * 3)
    with pytest.raises(UserError, match="layers that slide in turn"):
        write_gguf(slides, tmp_path / "slides.gguf", "bf16")
    assert not list(tmp_path.glob("*.gguf"))


def test_engines_are_given_the_same_tokens() -> None:
    assert tokens_of_llama(50, 1000) == tokens_for(50, 1000) and tokens_for(20, 1000) == tokens_for(50, 1000)[:20]


@pytest.mark.parametrize("module", [worker, llama_worker])
def test_slices_of_a_turn_continue_its_tokens(module: Any) -> None:
    engine = mock.Mock(vocab_size=1000)
    answer = module.answer if module is llama_worker else module._answer
    for first, count in ((0, 8), (8, 8), (16, 3)):
        assert len(answer(engine, {"do": "decode", "tokens": count, "first": first})["seconds"]) == count
    assert [call.args[0] for call in engine.decode.call_args_list] == tokens_for(19, 1000)


def test_interpreter_is_found_or_said_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="cannot be run"):
        find_llama(tmp_path / "python")
    monkeypatch.setattr("oxfuse.compiler.bench.llama.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--build-llama.*--llama PYTHON"):
        find_llama(home=tmp_path)
    monkeypatch.setattr("oxfuse.compiler.bench.llama.MODULE", "no_such_package")
    with pytest.raises(UserError, match=r"cannot import no_such_package.*ModuleNotFoundError"):
        find_llama(Path(sys.executable))
    monkeypatch.setattr("oxfuse.compiler.bench.llama.REQUIREMENT", str(tmp_path / "no-such-package"))
    with pytest.raises(UserError, match="could not be built"):
        build_llama(tmp_path / "built")


def test_an_environment_that_was_built_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setattr("oxfuse.compiler.bench.llama.MODULE", "json")
    monkeypatch.setattr("oxfuse.compiler.bench.llama.find_spec", lambda name: None)
    assert build_llama(tmp_path) == find_llama(home=tmp_path) == tmp_path / "bin" / "python"


def answers(worker: Worker, prompt: int) -> list[float]:
    logits: list[float] = worker.ask(do="prefill", tokens=prompt)["logits"]
    return logits


def agreement(checkpoint: Path, place: Path, spec: EngineSpec, llama: Path, prompt: int) -> list[tuple[float, bool]]:
    """Return for each attention of llama.cpp's how its last logits correlate with the reference's, and the same choice."""
    contender = of_llama(spec, checkpoint, place, llama, NOTHING, 512, lambda phase, done: None)
    with torch.no_grad():
        right = load_reference(checkpoint)(torch.tensor([tokens_for(prompt, SHAPE["vocab_size"])])).logits[0, -1].tolist()
    found = []
    with Worker.of(contender, 1) as worker:
        for implementation in worker.implementations:
            worker.ask(do="choose", implementation=implementation)
            logits = answers(worker, prompt)
            found.append((correlation(logits, right), int(np.argmax(logits)) == int(np.argmax(right))))
    return found


@pytest.mark.parametrize("engine", [LLAMA_BF16, LLAMA_Q8])
def test_llama_computes_the_reference(checkpoint: Path, tmp_path: Path, llama: Path, engine: str) -> None:
    found = [one for prompt in (40, 129, 300) for one in agreement(checkpoint, tmp_path, SPECS[engine], llama, prompt)]
    assert len(found) == 6 and min(alike for alike, _ in found) > 0.99
    assert sum(same for _, same in found) >= 5


@pytest.mark.parametrize("defect", ["nibbles as they were", "gate and up exchanged", "no window"])
def test_a_wrong_file_does_not_agree(
    checkpoint: Path, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, defect: str
) -> None:
    if defect == "nibbles as they were":
        monkeypatch.setattr(gguf_file, "ggml_mxfp4", lambda b, s: torch.cat((s.unsqueeze(-1), b), -1).contiguous())
    elif defect == "gate and up exchanged":
        experts = gguf_file._experts
        exchanged = {0: slice(1, None, 2), 1: slice(0, None, 2), None: slice(None)}
        monkeypatch.setattr(gguf_file, "_experts", lambda name, source, rows: experts(name, source, exchanged[rows.start]))
    else:
        monkeypatch.setattr(
            gguf.GGUFWriter,
            "add_sliding_window",
            lambda writer, size: writer.add_uint32("gpt-oss.attention.sliding_window", 4096),
        )
    assert max(alike for alike, _ in agreement(checkpoint, tmp_path, SPECS[LLAMA_BF16], llama, 300)) < 0.98


def test_llama_decodes_after_a_context_and_says_what_it_cannot(checkpoint: Path, tmp_path: Path, llama: Path) -> None:
    contender = of_llama(SPECS[LLAMA_BF16], checkpoint, tmp_path, llama, NOTHING, 64, lambda phase, done: None)
    assert contender.decode_bytes(0) == 2 * 2 + 17 / 32
    with Worker.of(contender, 1) as worker:
        assert worker.ask(do="context", tokens=30) == {}
        assert len(worker.ask(do="decode", tokens=3)["seconds"]) == 3 and worker.ask(do="loaded")["seconds"] > 0
        with pytest.raises(UserError, match="65 tokens are more than the 64"):
            worker.ask(do="prefill", tokens=65)
        assert len(answers(worker, 5)) == SHAPE["vocab_size"]
    script = Path(gguf_file.__file__).with_name("llama_worker.py")
    broken = subprocess.run(
        [llama, script, "llama", tmp_path / "no.gguf", "1", "8"], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert "does not load" in broken.stdout
