"""Reading checkpoints: three layouts, shards, tokenizer files, and a message for everything that can be wrong with a folder."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from oxfuse.errors import UserError
from oxfuse.models import load_reference, lookup, register
from oxfuse.models.checkpoint import Checkpoint
from oxfuse.models.contract import ModelContract
from oxfuse.models.gpt_oss import CONTRACT, GptOssConfig, GptOssForCausalLM, GptOssModel
from oxfuse.models.tensor_source import TensorSource
from tests.checkpoints import random_gpt_oss, transformers_model


def sources(folder: Path, task: str = "text-generation") -> dict[str, TensorSource]:
    checkpoint = Checkpoint.open(folder)
    contract = checkpoint.contract()
    return contract.sources(checkpoint, contract.parse_config(checkpoint.config), task)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """Change the tensors of a single-file checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def rewrite_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("layout", ["hf", "mxfp4"])
@pytest.mark.parametrize("shards", [1, 3])
def test_values_are_those_that_transformers_reads(tmp_path: Path, layout: Any, shards: int) -> None:
    folder = random_gpt_oss(tmp_path, layout=layout, shards=shards, dtype=torch.bfloat16)
    ours, theirs = load_reference(folder).state_dict(), transformers_model(folder).state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize(("original", "hf"), [("original", "mxfp4"), ("original-dense", "hf")])
@pytest.mark.parametrize("shards", [1, 2])
def test_original_layout_equals_the_hugging_face_layout(tmp_path: Path, original: Any, hf: Any, shards: int) -> None:
    a = load_reference(random_gpt_oss(tmp_path / "a", layout=original, shards=shards, dtype=torch.bfloat16))
    b = load_reference(random_gpt_oss(tmp_path / "b", layout=hf, dtype=torch.bfloat16))
    for name, tensor in b.state_dict().items():
        assert torch.equal(a.state_dict()[name], tensor), name
    same = ("rope_parameters", "num_local_experts", "num_experts_per_tok", "layer_types", "rms_norm_eps", "sliding_window")
    for name in same:
        assert getattr(a.config, name) == getattr(b.config, name), name


@pytest.mark.parametrize("layout", ["mxfp4", "original"])
def test_rows_and_parts(tmp_path: Path, layout: Any) -> None:
    """Rows are slices of the whole; parts are the stored bytes; nothing of the file is copied."""
    found = sources(random_gpt_oss(tmp_path, layout=layout, dtype=torch.bfloat16))
    assert {s.dtype for s in found.values()} == {torch.bfloat16}
    for name, source in found.items():
        whole = source.read()
        assert tuple(whole.shape) == source.shape, name
        assert torch.equal(source.read(slice(1, 3)), whole[1:3]), name
        assert source.read(slice(2, 1)).shape[0] == 0
        if source.encoding == "mxfp4":
            parts, (experts, rows, columns) = source.parts(), source.shape
            assert parts["blocks"].shape == (experts, columns, rows // 32, 16) and whole.dtype == torch.float32
            assert parts["scales"].shape == parts["scales"].read().shape == (experts, columns, rows // 32)
            assert parts["blocks"].dtype == parts["scales"].dtype == parts["blocks"].read().dtype == torch.uint8
        else:
            assert source.parts() == {} and source.read().data_ptr() == whole.data_ptr()
    assert {s.encoding for n, s in found.items() if n.endswith(("gate_up_proj", "down_proj"))} == {"mxfp4"}


def test_weights_are_mapped_and_writing_to_them_leaves_the_file_alone(tmp_path: Path) -> None:
    folder = random_gpt_oss(tmp_path)
    before = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").chmod(0o444)
    source = sources(folder)["model.norm.weight"]
    model = load_reference(folder)
    assert model.model.norm.weight.requires_grad
    with torch.no_grad():
        model.model.norm.weight.zero_()
    assert (folder / "model.safetensors").read_bytes() == before and source.read().any()


def test_misaligned_tensors_are_read(tmp_path: Path) -> None:
    """Other writers do not pad the header, and a uint8 tensor may stand before a float."""
    folder = random_gpt_oss(tmp_path)
    path = folder / "model.safetensors"
    expected, raw = {name: tensor.clone() for name, tensor in load_file(path).items()}, path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    path.write_bytes(struct.pack("<Q", length + 1) + raw[8 : 8 + length] + b" " + raw[8 + length :])
    for name, source in sources(folder).items():
        assert torch.equal(source.read(), expected[name])


def test_tied_checkpoints(tmp_path: Path) -> None:
    folder = random_gpt_oss(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in sources(folder)
    model = load_reference(folder, torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(folder, lambda t: t.update({"lm_head.weight": embedding.clone()}))
    assert "lm_head.weight" not in sources(folder)
    rewrite(folder, lambda t: t.pop("model.embed_tokens.weight"))
    assert torch.equal(sources(folder)["model.embed_tokens.weight"].read(), embedding)
    rewrite(folder, lambda t: t.update({"model.embed_tokens.weight": embedding + 1}))
    with pytest.raises(UserError, match=r"lm_head.weight differs from model.embed_tokens.weight, though tie_word_embeddings"):
        sources(folder)


def test_bare_checkpoints_have_no_prefix(tmp_path: Path) -> None:
    causal = random_gpt_oss(tmp_path / "causal")
    expected = load_reference(causal)
    bare = random_gpt_oss(tmp_path / "bare", architectures=["GptOssModel"])

    def strip(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensor = tensors.pop(name)
            if name.startswith("model."):
                tensors[name.removeprefix("model.")] = tensor

    model = load_reference(rewrite(bare, strip))
    assert isinstance(model, GptOssModel) and isinstance(expected, GptOssForCausalLM)
    from_causal = load_reference(causal, task="feature-extraction")
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor) and torch.equal(from_causal.state_dict()[name], tensor)
    with pytest.raises(UserError, match=r"Missing: lm_head.weight\."):
        load_reference(bare, task="text-generation")


def test_tokenizer_and_generation_files(tmp_path: Path) -> None:
    names = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    for folder in (random_gpt_oss(tmp_path / "hf"), random_gpt_oss(tmp_path / "o", layout="original")):
        texts = folder.parent if folder.name == "original" else folder
        assert Checkpoint.open(folder).tokenizer_files == () and Checkpoint.open(folder).generation_config == {}
        for name in (*names, "README.md"):
            (texts / name).write_text("{}")
        (texts / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
        checkpoint = Checkpoint.open(folder)
        assert [path.name for path in checkpoint.tokenizer_files] == names
        assert checkpoint.generation_config == {"eos_token_id": [5, 6]} and checkpoint.config["model_type"] == "gpt_oss"


def test_live_tensors(tmp_path: Path) -> None:
    model = transformers_model(random_gpt_oss(tmp_path))
    checkpoint = Checkpoint.of_tensors(model.config.to_dict(), model.state_dict())
    config = checkpoint.contract().parse_config(checkpoint.config)
    found = CONTRACT.sources(checkpoint, config, "text-generation")
    assert torch.equal(found["lm_head.weight"].read(slice(3, 7)), model.lm_head.weight[3:7])
    assert checkpoint.dtype == torch.float32 and checkpoint.folder is None
    with pytest.raises(UserError, match=r"The module: .*Missing: lm_head.weight"):
        state = {name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}
        CONTRACT.sources(Checkpoint.of_tensors({}, state), config, "text-generation")


def test_everything_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    folder = random_gpt_oss(tmp_path, layout="mxfp4")

    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.0.self_attn.sinks"], tensors["model.layers.2.mlp.experts.down_proj_scales"]
        tensors["model.layers.1.self_attn.rotary.inv_freq"] = torch.ones(8)
        tensors["model.norm.weight"] = torch.ones(65)
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64, dtype=torch.int64)
        tensors["model.layers.1.mlp.experts.gate_up_proj_blocks"] = torch.zeros(8, 192, 2, 16, dtype=torch.int8)

    with pytest.raises(UserError) as caught:
        sources(rewrite(folder, spoil))
    for words in (
        "Missing: model.layers.0.self_attn.sinks, model.layers.2.mlp.experts.down_proj_scales.",
        "Unexpected: model.layers.1.self_attn.rotary.inv_freq.",
        "model.norm.weight is float32 [65], expected floating-point [64]",
        "model.layers.0.self_attn.q_proj.bias is int64 [64], expected floating-point [64]",
        "model.layers.1.mlp.experts.gate_up_proj_blocks is int8 [8, 192, 2, 16], expected uint8 [8, 192, 2, 16]",
        str(folder),
    ):
        assert words in str(caught.value)


def test_original_names_in_messages(tmp_path: Path) -> None:
    folder = random_gpt_oss(tmp_path, layout="original")

    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["block.1.attn.qkv.weight"]
        tensors["block.0.attn.qkv.bias"] = tensors["block.0.attn.qkv.bias"][1:].clone()
        tensors["block.3.attn.sinks"] = torch.ones(4)

    with pytest.raises(UserError) as caught:
        sources(rewrite(folder, spoil))
    for words in (
        "Missing: block.1.attn.qkv.weight. ",
        "Unexpected: block.3.attn.sinks. ",
        "Misfits: block.0.attn.qkv.bias is float32 [127], expected floating-point [128]. ",
    ):
        assert words in str(caught.value)


def test_dense_and_mxfp4_of_one_matrix(tmp_path: Path) -> None:
    folder = random_gpt_oss(tmp_path, layout="mxfp4")
    name = "model.layers.0.mlp.experts.down_proj"
    rewrite(folder, lambda t: t.update({name: torch.zeros(8, 96, 64)}))
    with pytest.raises(UserError, match=f"Unexpected: {name}\\."):
        sources(folder)


def test_mxfp4_of_sizes_that_do_not_divide(tmp_path: Path) -> None:
    folder = random_gpt_oss(tmp_path, layout="mxfp4")
    rewrite_json(folder / "config.json", intermediate_size=90)
    with pytest.raises(UserError, match="down_proj is MXFP4, but its 90 inputs are no multiple of 32"):
        sources(folder)


def test_other_quantisations_are_refused(tmp_path: Path) -> None:
    folder = random_gpt_oss(tmp_path)
    rewrite_json(folder / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(UserError, match="quantised by 'bitsandbytes'"):
        sources(folder)


@pytest.mark.parametrize(
    "damage", ["cut header", "cut data", "not json", "short", "huge header", "list", "offsets", "bytes", "twice"]
)
def test_damaged_files(tmp_path: Path, damage: str) -> None:
    folder = random_gpt_oss(tmp_path)
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]

    def packed(text: bytes) -> bytes:
        return struct.pack("<Q", len(text)) + text + data

    first = next(name for name in header if name != "__metadata__")
    if damage == "offsets":
        header[first]["data_offsets"] = [0, "x"]
    elif damage == "bytes":
        header[first]["shape"] = [1, *header[first]["shape"], 7]
    path.write_bytes(
        {
            "cut header": raw[: length // 2],
            "cut data": raw[:-1],
            "not json": packed(b"{]"),
            "short": raw[:5],
            "huge header": struct.pack("<Q", 1 << 40) + raw[8:],
            "list": packed(b"[]"),
            "offsets": packed(json.dumps(header).encode()),
            "bytes": packed(json.dumps(header).encode()),
            "twice": packed(b'{"a": {}, "a": {}}'),
        }[damage]
    )
    with pytest.raises(UserError, match=r"model.safetensors is not a whole safetensors file: .* again\."):
        Checkpoint.open(folder)


def test_unknown_dtype(tmp_path: Path) -> None:
    folder = random_gpt_oss(tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F99"', 1))
    with pytest.raises(UserError, match="stored as 'F99'"):
        Checkpoint.open(folder)


def test_index_naming_an_absent_shard_or_tensor(tmp_path: Path) -> None:
    folder = random_gpt_oss(tmp_path, shards=3)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    (folder / "model-00001-of-00003.safetensors").rename(folder / "elsewhere")
    with pytest.raises(UserError, match=r"names model-00001-of-00003.safetensors, which is not there"):
        Checkpoint.open(folder)
    (folder / "elsewhere").rename(folder / "model-00001-of-00003.safetensors")
    rewrite_json(index, weight_map={**weight_map, "ghost": "model-00000-of-00003.safetensors"})
    with pytest.raises(UserError, match=r"says that .model-00000-of-00003.safetensors. holds ghost; it does not"):
        Checkpoint.open(folder)
    rewrite_json(index, weight_map=[1])
    with pytest.raises(UserError, match="has no weight_map"):
        Checkpoint.open(folder)


def test_the_index_is_trusted(tmp_path: Path) -> None:
    """A tensor that lies in a shard but not in the index is none of the checkpoint's; a file without an entry neither."""
    folder = random_gpt_oss(tmp_path, shards=2)
    save_file({"stray": torch.ones(1)}, folder / "model-00002-of-00002.safetensors")
    shard = folder / "model-00000-of-00002.safetensors"
    save_file({**load_file(shard), "stray": torch.ones(1)}, shard)
    assert "stray" not in Checkpoint.open(folder).tensors
    load_reference(folder)


def test_shards_without_index(tmp_path: Path) -> None:
    folder = random_gpt_oss(tmp_path, shards=2)
    (folder / "model.safetensors.index.json").unlink()
    load_reference(folder)
    save_file({"model.norm.weight": torch.ones(64)}, folder / "other.safetensors")
    with pytest.raises(UserError, match=r".model.norm.weight. is stored in .* and in another file"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "link.safetensors"])
def test_shards_outside_the_folder(tmp_path: Path, name: str) -> None:
    folder = random_gpt_oss(tmp_path / "inside", shards=2)
    save_file({"x": torch.ones(1)}, tmp_path / "outside.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    rewrite_json(folder / "model.safetensors.index.json", weight_map={"x": name})
    with pytest.raises(UserError, match="outside the folder"):
        Checkpoint.open(folder)


def test_snapshots_of_the_hub_cache_link_to_their_blobs(tmp_path: Path) -> None:
    snapshot = random_gpt_oss(tmp_path / "models--a--b" / "snapshots" / "abc")
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    (snapshot / "model.safetensors").rename(blobs / "0123")
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/0123"))
    load_reference(snapshot)
    (snapshot / "model.safetensors").unlink()
    (blobs / "0123").rename(blobs.parent / "0123")
    (snapshot / "model.safetensors").symlink_to(Path("../../0123"))
    with pytest.raises(UserError, match="outside the folder"):
        load_reference(snapshot)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickles_are_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = random_gpt_oss(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps({}))
    with pytest.raises(UserError, match=f"holds pickles \\({name}\\)"):
        Checkpoint.open(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(UserError, match=f"names '{name}', a pickle"):
        Checkpoint.open(folder)


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no config.json"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt_oss"}')
    with pytest.raises(UserError, match="is no folder"):
        Checkpoint.open(tmp_path / "config.json")
    with pytest.raises(UserError, match="holds no safetensors"):
        Checkpoint.open(tmp_path)
    for text, words in (("{", "cannot be read as JSON"), ("[]", "holds list, not an object"), ("{}", "names no model_type")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=words):
            Checkpoint.open(tmp_path)


def test_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oxfuse.models.contract._registered", {})
    with pytest.raises(UserError, match=r"model_type is 'llama'; oxfuse knows gpt_neox, gpt_oss"):
        lookup("llama")
    fields = {name: getattr(CONTRACT, name) for name in ("parse_config", "tasks", "architectures", "tensor_sources")}
    contract = ModelContract(model_type="mine", **fields)
    register("mine", contract)
    assert lookup("mine") is contract and lookup("gpt_oss") is CONTRACT
    folder = random_gpt_oss(tmp_path, architectures=["GptOssForTranslation"])
    with pytest.raises(UserError, match="names the architecture GptOssForTranslation; oxfuse has GptOssForCausalLM"):
        load_reference(folder)
    with pytest.raises(UserError, match="no task 'dreaming'; it has text-generation, text-classification"):
        load_reference(folder, task="dreaming")
    assert isinstance(load_reference(folder, task="text-generation").config, GptOssConfig)
    assert torch.float16 in CONTRACT.refused_dtypes


def test_download_patterns_leave_further_copies_of_the_weights_out() -> None:
    from fnmatch import fnmatch

    root = ["config.json", "generation_config.json", "model-00000-of-00002.safetensors", "model.safetensors.index.json",
            "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]  # fmt: skip
    other = ["original/model.safetensors", "original/config.json", "metal/model.bin", "README.md", "original/dtypes.json"]
    assert [name for name in root + other if any(fnmatch(name, pattern) for pattern in CONTRACT.source_files)] == root
