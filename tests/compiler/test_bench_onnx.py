"""The benchmark of ONNX packages: what it says of figures, and the package that differs from the builder's by its cores alone."""

from __future__ import annotations

import json
from pathlib import Path

from oxfuse.compiler.bench.onnx_peers import ALL_CORES, BUILDER, OWN, TRANSFORMERS, Figure, Package, Result, _with_all_cores

SECONDS = {"int4": 0.010, "int8": 0.012, BUILDER: 0.016, ALL_CORES: 0.008, OWN: 0.009, TRANSFORMERS: 0.050}


def result() -> Result:
    figures = [
        Figure(engine=engine, phase=phase, floor=seconds / 2, samples=[seconds, 9.0, seconds / 2, seconds, seconds])
        for phase in ("decode", "prefill")
        for engine, seconds in SECONDS.items()
    ]
    return Result(
        machine={"processor": "P", "cores": 2, "torch": "2", "system": "S"},
        options=dict(layers=2, vocabulary=1008, prompt=512, context=256, tokens=16, rounds=5, threads=2),
        bandwidth=3e10,
        peak=3e11,
        packages=[Package(name="int4", seconds=10, memory=1_100_000_000, bytes=1_200_000_000)],
        engines=dict.fromkeys(SECONDS, "E 1.0"),
        missing={},
        figures=figures,
    )


def test_what_is_told() -> None:
    told = result()
    assert told.ratio("int4", "decode", BUILDER) == 1.6 and told.ratio("int4", "decode", "nobody") is None
    text = told.to_markdown()
    assert "| int4 | 10.0 | 5.0 | 100 | 200 |" in text
    assert "| int4: decode over builder int4 | 1.5× | 1.60× |" in text
    assert "| int4: decode over builder int4, all cores | told | 0.80× |" in text
    assert "| int4 | 10 | 1.1 GB | 1.2 GB |" in text
    assert json.loads(told.to_json())["ratios"]["int8 decode over builder int4"] == 0.016 / 0.012


def test_all_cores_and_nothing_else(tmp_path: Path) -> None:
    built = tmp_path / "built"
    built.mkdir()
    config = {"model": {"decoder": {"session_options": {"log_id": "x"}}, "vocab_size": 3}}
    (built / "genai_config.json").write_text(json.dumps(config))
    (built / "model.onnx").write_bytes(b"model")
    place = _with_all_cores(built, tmp_path / "all")
    assert (place / "model.onnx").read_bytes() == b"model"
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = 0
    assert json.loads((place / "genai_config.json").read_text()) == config
    assert "intra_op" not in (built / "genai_config.json").read_text()
