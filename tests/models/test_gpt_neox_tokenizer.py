"""GPT-NeoX's tokenizer against transformers' GPTNeoXTokenizer, on a small vocabulary learnt here."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM
from transformers import GPTNeoXTokenizer as Oracle

from oxfuse.compiler.options import CompileOptions
from oxfuse.compiler.plan import make_plan
from oxfuse.errors import UserError
from oxfuse.models.checkpoint import Checkpoint, tokenizer_files
from oxfuse.models.gpt_neox import CONTRACT
from oxfuse.models.gpt_neox.tokenizer import GPTNeoXTokenizer, build_tokenizer
from oxfuse.runtime.tokenizer import TextTokenizer

END, PAD = "<|endoftext|>", "<|padding|>"
ALPHABET = [
    *"abcdeETtnis0189.,!'\"(){}<|>_-/\\", " ", " ", "  ", "   ", " " * 9, "\n", "\n\n", "\r\n",
    "\t", "\x00", "\x1b", "\x7f", "\x85", "\xa0", "\u2028", "\u3000", "\u200b", "\ufeff", "\ufffd",
    "the ", " return", "self", "'s", "'LL", "don't", "e\u0301", "\u00e9", "A\u030a", "\u212b",
    "q\u0307\u0323", "\u0323\u0307", "\u1100\u1161\u11a8", "\uac01", "\u0958", "\ufb01",
    "\u05d0\u05b8", "漢", "字", "カ\u3099", "ｶﾞ", "😀", "👩\u200d👩\u200d👧", "👍🏽", "🇩🇪", "𝔘", "𐍈",
    "\U0010ffff", "Ġ", "Ċ", "Ń", "¡", "\xad", END, PAD, "<|endoftext", "|endoftext|>",
    "<|ENDOFTEXT|>", " <|endoftext|> ", "<s>",
]  # fmt: skip


def strings(seed: int = 0, count: int = 1000) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(ALPHABET, k=rng.randrange(0, 30))) for _ in range(count)]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the released ones: tokenizer.json with runs of spaces as added tokens, and little configuration."""
    folder = tmp_path_factory.mktemp("released")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[END, PAD], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    sources = [Path(os.__file__).parent / f"{name}.py" for name in ("os", "ast", "copy", "json/decoder", "random")]
    tokenizer.train_from_iterator([path.read_text("utf-8") for path in sources], trainer)
    tokenizer.add_tokens([AddedToken(" " * count, normalized=True) for count in range(24, 1, -1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": END, "eos_token": END, "unk_token": END}
    write(folder / "tokenizer_config.json", {"add_prefix_space": False, "tokenizer_class": "GPTNeoXTokenizer", **named})
    write(folder / "special_tokens_map.json", named)
    write(folder / "config.json", {"model_type": "gpt_neox"})  # AutoTokenizer wants it
    return folder


@pytest.fixture(scope="module")
def plain(released: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same vocabulary as vocab.json and merges.txt."""
    folder = tmp_path_factory.mktemp("plain")
    Tokenizer.from_file(str(released / "tokenizer.json")).model.save(str(folder))
    write(folder / "config.json", {"model_type": "gpt_neox"})
    return folder


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), "utf-8")


def copy_of(folder: Path, place: Path, **files: object) -> Path:
    """A copy of `folder` with JSON files written anew; None leaves one out."""
    shutil.copytree(folder, place)
    for name, value in files.items():
        (place / f"{name}.json").unlink(missing_ok=True)
        if value is not None:
            write(place / f"{name}.json", value)
    return place


def assert_same(ours: GPTNeoXTokenizer, oracle: Any, texts: list[str], trim: bool = False) -> None:
    expected = oracle(texts, return_offsets_mapping=True)
    for i, text in enumerate(texts):
        ids, offsets = ours.encode_with_offsets(text, trim=trim)
        assert ids == expected["input_ids"][i], ascii(text)
        assert offsets == [tuple(offset) for offset in expected["offset_mapping"][i]], ascii(text)
    assert ours.encode_batch(texts[:99], add_special_tokens=False) == oracle(texts[:99], add_special_tokens=False)["input_ids"]
    assert (len(ours), ours.vocab_size, ours.get_vocab()) == (len(oracle), oracle.vocab_size, oracle.get_vocab())
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        assert getattr(ours, name) == getattr(oracle, name), name
        if getattr(ours, name) is not None:
            assert getattr(ours, f"{name}_id") == getattr(oracle, f"{name}_id"), name
    assert ours.padding_side == oracle.padding_side


SETTINGS = [  # every pair of values of any two options occurs
    dict(add_prefix_space=False, add_bos_token=False, add_eos_token=False, trim_offsets=True),
    dict(add_prefix_space=False, add_bos_token=True, add_eos_token=True, trim_offsets=False),
    dict(add_prefix_space=True, add_bos_token=False, add_eos_token=True, trim_offsets=True),
    dict(add_prefix_space=True, add_bos_token=True, add_eos_token=False, trim_offsets=False),
    dict(add_prefix_space=True, add_bos_token=False, add_eos_token=False, trim_offsets=False),
    dict(add_prefix_space=False, add_bos_token=True, add_eos_token=True, trim_offsets=True),
]  # fmt: skip


@pytest.mark.parametrize("options", SETTINGS, ids=lambda options: "".join("01"[value] for value in options.values()))
@pytest.mark.parametrize("kind", ["released", "plain"])
def test_ids_and_offsets_are_those_of_transformers(
    kind: str, options: dict[str, bool], released: Path, plain: Path, tmp_path: Path
) -> None:
    folder = {"released": released, "plain": plain}[kind]
    ours, oracle = GPTNeoXTokenizer.from_pretrained(folder, **options), Oracle.from_pretrained(folder, **options)
    texts = strings()
    assert_same(ours, oracle, texts)
    texts = texts[:150]
    assert [ours.tokenize(text) for text in texts] == [oracle.tokenize(text) for text in texts]
    ours.save_pretrained(tmp_path)
    ids = ours.encode_batch(texts)
    runtime = TextTokenizer.open(tokenizer_files(tmp_path))
    assert runtime is not None and [runtime.encode(text) for text in texts] == ids
    again = GPTNeoXTokenizer.from_pretrained(tmp_path)
    assert again.encode_batch(texts) == ids and again.to_json() == ours.to_json()
    assert {**vars(again), "_backend": None} == {**vars(ours), "_backend": None}
    assert AutoTokenizer.from_pretrained(tmp_path)(texts)["input_ids"] == ids
    reloaded = Oracle.from_pretrained(tmp_path)  # it drops what stands around a text, of its own files as well
    assert reloaded(texts)["input_ids"] == ours.encode_batch(texts, add_special_tokens=False)
    assert (reloaded.pad_token, reloaded.eos_token_id, len(reloaded)) == (PAD, 0, len(ours))


@pytest.mark.parametrize("prefix", [False, True])
def test_trimmed_offsets_leave_white_space_out(released: Path, prefix: bool) -> None:
    file = json.loads((released / "tokenizer.json").read_text())
    file["pre_tokenizer"]["add_prefix_space"] = file["post_processor"]["add_prefix_space"] = prefix
    trimming = Tokenizer.from_str(json.dumps(file))  # a released tokenizer.json by itself trims
    ours = GPTNeoXTokenizer.from_pretrained(released, add_prefix_space=prefix)
    for text in strings(1):
        expected = trimming.encode(text)
        assert ours.encode_with_offsets(text, trim=True) == (expected.ids, expected.offsets), ascii(text)
    assert ours.encode_with_offsets("a b", trim=True)[1][1] != ours.encode_with_offsets("a b")[1][1]


def test_files_memory_and_tokenizer_file_give_one_tokenizer(released: Path, plain: Path) -> None:
    vocab = json.loads((plain / "vocab.json").read_text())
    lines = (plain / "merges.txt").read_text().split("\n")[1:-1]
    made = [
        GPTNeoXTokenizer(plain / "vocab.json", plain / "merges.txt"),
        GPTNeoXTokenizer(str(plain / "vocab.json"), lines),
        GPTNeoXTokenizer(vocab, [tuple(line.split(" ")) for line in lines]),
        GPTNeoXTokenizer.from_pretrained(plain),
    ]
    assert len({tokenizer.to_json() for tokenizer in made}) == 1
    oracle = Oracle(str(plain / "vocab.json"), str(plain / "merges.txt"))
    assert_same(made[0], oracle, strings(6, 50))
    pipelines = [json.loads(text) for text in (made[0].to_json(), oracle.backend_tokenizer.to_str())]
    assert pipelines[0] == pipelines[1]
    whole = GPTNeoXTokenizer(tokenizer_file=released / "tokenizer.json")
    assert whole.to_json() == GPTNeoXTokenizer.from_pretrained(released).to_json()
    assert len(GPTNeoXTokenizer()) == len(Oracle()) == 2 and GPTNeoXTokenizer().encode(f"ab{PAD}") == [1]
    assert_same(GPTNeoXTokenizer(vocab), Oracle(vocab), strings(2, 50))


END_DICT = {"content": END, "single_word": False, "lstrip": False, "rstrip": True, "normalized": False, "special": True}
SPACES = {"content": "  ", "single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
OURS = {"tokenizer_class": "GPTNeoXTokenizer"}


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        ("released", dict(tokenizer_config=OURS | {"add_bos_token": True, "add_eos_token": True})),
        ("released", dict(tokenizer_config=OURS | {"add_prefix_space": True, "padding_side": "left"})),
        ("released", dict(tokenizer_config=None, special_tokens_map=None)),
        ("released", dict(tokenizer_config=OURS | {"eos_token": "the"}, special_tokens_map={"eos_token": "</s>"})),
        ("released", dict(tokenizer_config=OURS | {"eos_token": "the", "added_tokens_decoder": {}})),
        ("released", dict(tokenizer_config=OURS | {"additional_special_tokens": ["<s>"]})),
        ("released", dict(tokenizer_config=OURS | {"extra_special_tokens": {"image_token": "<s>"}})),
        ("released", dict(tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": True})),
        ("plain", dict(tokenizer_config=OURS | {"add_bos_token": True, "add_eos_token": True})),
        ("plain", dict(tokenizer_config=OURS | {"add_prefix_space": True, "clean_up_tokenization_spaces": True})),
        ("plain", dict(tokenizer_config=OURS | {"pad_token": None, "unk_token": None})),
        ("plain", dict(tokenizer_config=OURS | {"sep_token": "<s>", "mask_token": "Ġ", "img_token": "\x7f"})),
        ("plain", dict(special_tokens_map={"eos_token": END_DICT, "pad_token": "<s>"})),
        ("plain", dict(added_tokens={"  ": 600, "   ": 601, "<s>": 602}, special_tokens_map={"pad_token": "<s>"})),
        ("plain", dict(tokenizer_config=OURS | {"added_tokens_decoder": {"0": END_DICT, "600": SPACES}})),
        ("plain", dict(tokenizer_config=OURS | {"added_tokens_decoder": {"600": SPACES}, "eos_token": "  "})),
    ],
)
def test_files_of_a_checkpoint_count_as_in_transformers(
    kind: str, files: dict[str, Any], released: Path, plain: Path, tmp_path: Path
) -> None:
    folder = copy_of({"released": released, "plain": plain}[kind], tmp_path / "copy", **files)
    oracle = AutoTokenizer.from_pretrained(folder)
    generic = "PreTrainedTokenizerFast" in str(files)
    assert_same(GPTNeoXTokenizer.from_pretrained(folder), oracle, strings(3, 200), trim=generic)  # that file's own step trims
    built = build_tokenizer([folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json",
        "special_tokens_map.json", "added_tokens.json") if (folder / name).exists()])  # fmt: skip
    assert (built is None) == generic
    ids = list(range(len(oracle)))
    ours = GPTNeoXTokenizer.from_pretrained(folder)
    assert ours.decode(ids, skip_special_tokens=True) == oracle.decode(ids, skip_special_tokens=True)
    served = Tokenizer.from_str(built) if built is not None else Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = strings(4, 200)
    assert [served.encode(text).ids for text in texts] == oracle(texts)["input_ids"]


def test_an_artifact_gets_the_tokenizer_that_its_checkpoint_describes(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GPTNeoXConfig(
        vocab_size=608,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        architectures=["GPTNeoXForCausalLM"],
    )
    contract = dataclasses.replace(CONTRACT, build_tokenizer=build_tokenizer)
    monkeypatch.setattr("oxfuse.models.contract._registered", {"gpt_neox": contract})
    folder = copy_of(plain, tmp_path / "checkpoint", tokenizer_config=OURS | {"add_bos_token": True, "add_prefix_space": True})
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    plan = make_plan(Checkpoint.open(folder), CompileOptions(), {})
    assert [path.name for path in plan.tokenizer_files] == ["tokenizer.json", "tokenizer_config.json"]
    assert plan.tokenizer_json is not None
    texts, oracle = strings(7, 200), Oracle.from_pretrained(folder)
    served = Tokenizer.from_str(plan.tokenizer_json)
    assert [served.encode(text).ids for text in texts] == oracle(texts)["input_ids"] and served.encode("").ids == [0]
    (folder / "merges.txt").unlink()
    refused("holds vocab.json; GPT-NeoX needs", make_plan, Checkpoint.open(folder), CompileOptions(), {})
    (folder / "vocab.json").unlink()
    plan = make_plan(Checkpoint.open(folder), CompileOptions(), {})
    assert plan.tokenizer_json is None and [path.name for path in plan.tokenizer_files] == ["tokenizer_config.json"]
    (folder / "merges.txt").symlink_to(plain / "merges.txt")
    refused("outside the folder", Checkpoint.open, folder)


def test_text_in_nfc_comes_back_whole(released: Path, plain: Path) -> None:
    changed = 0
    for folder in (released, plain):
        tokenizer = GPTNeoXTokenizer.from_pretrained(folder)
        # Apart, since Python and tokenizers know different versions of Unicode, hence different orders of marks.
        everything = " ".join(map(chr, [*range(0x3100), *range(0x3100, 0xD800, 11), *range(0xE000, 0x30000, 11), 0x10FFFF]))
        for text in [*strings(5), everything]:
            wanted = unicodedata.normalize("NFC", text)
            assert tokenizer.decode(tokenizer.encode(text)) == wanted
            changed += wanted != text
    assert changed > 100


def test_decoding_is_that_of_transformers(released: Path) -> None:
    ours, oracle, rng = GPTNeoXTokenizer.from_pretrained(released), Oracle.from_pretrained(released), random.Random(0)
    for _ in range(1000):
        ids = [rng.randrange(0, 630) for _ in range(rng.randrange(0, 12))]
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == oracle.decode(ids, skip_special_tokens=skip), ids
            tokens = ours.convert_ids_to_tokens(ids, skip_special_tokens=skip)
            assert tokens == oracle.convert_ids_to_tokens(ids, skip_special_tokens=skip)
    assert ours.decode([0, 41, 1], skip_special_tokens=True) == "H" and ours.decode(41) == "H"
    assert ours.decode(torch.tensor([41, 41]), clean_up_tokenization_spaces=True) == "HH"
    tokens = ["H", PAD, "no such token", "  "]
    assert ours.convert_tokens_to_ids(tokens) == oracle.convert_tokens_to_ids(tokens) == [41, 1, 0, ours.encode("  ")[0]]
    assert ours.convert_tokens_to_ids(PAD) == 1 and ours.convert_ids_to_tokens(1) == PAD
    assert ours.all_special_ids == oracle.all_special_ids == [0, 1]


def test_bytes_that_are_no_text(released: Path) -> None:
    cut = GPTNeoXTokenizer.from_pretrained(released).encode("a漢")[:-1]
    assert GPTNeoXTokenizer.from_pretrained(released).decode(cut) == "a�"
    assert GPTNeoXTokenizer.from_pretrained(released, errors="ignore").decode(cut) == "a"
    with pytest.raises(UserError, match=r"no UTF-8: e6 bc at byte 1. Give ids of whole characters"):
        GPTNeoXTokenizer.from_pretrained(released, errors="strict").decode(cut)


def test_words(released: Path) -> None:
    ours, oracle = (cls.from_pretrained(released, add_prefix_space=True) for cls in (GPTNeoXTokenizer, Oracle))
    for seed in range(200):
        words = strings(seed, seed % 7)
        expected = oracle(words, is_split_into_words=True, return_offsets_mapping=True)
        assert ours.encode_with_offsets(words) == (expected["input_ids"], [tuple(o) for o in expected["offset_mapping"]])
        assert ours(words, is_split_into_words=True)["input_ids"] == expected["input_ids"]
    assert ours(["a b", "c"])["input_ids"] == oracle(["a b", "c"])["input_ids"]
    assert ours([["a", "b"], ["c"]], is_split_into_words=True)["input_ids"] == [ours.encode("a b"), ours.encode("c")]
    with pytest.raises(UserError, match=r"run together\. Make it with add_prefix_space=True"):
        GPTNeoXTokenizer.from_pretrained(released).encode(["a", "b"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(released: Path, side: str) -> None:
    ours, oracle = (cls.from_pretrained(released, padding_side=side) for cls in (GPTNeoXTokenizer, Oracle))
    texts = ["a", "", "the end of it all", END]
    for expected, found in (
        (oracle(texts, padding=True, return_tensors="pt"), ours(texts, tensors=True)),
        (oracle(texts, padding="max_length", max_length=20, return_tensors="pt"), ours.pad(ours.encode_batch(texts), length=20)),
        (
            oracle(texts, padding=True, pad_to_multiple_of=16, return_tensors="pt"),
            ours.pad(ours(texts)["input_ids"], multiple_of=16),
        ),
    ):
        for name in ("input_ids", "attention_mask"):
            assert torch.equal(found[name], expected[name]) and found[name].dtype == torch.int64
    other = {"left": "right", "right": "left"}[side]
    assert ours.pad([[5], [6, 7]], side=other)["input_ids"].tolist()[0] == ([5, 1] if other == "right" else [1, 5])
    assert ours("a b") == dict(oracle("a b"))


def refused(match: str, call: Any, *args: Any, **options: Any) -> None:
    with pytest.raises(UserError, match=match) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)


def test_impossible_arguments_are_refused(plain: Path) -> None:
    new, vocab, merges = GPTNeoXTokenizer, {"a": 0, "b": 1, "ab": 2}, [("a", "b")]
    assert new(vocab, merges).encode("ab") == [2]
    refused("cannot be read: .*No such file", new, plain / "no.json", merges)
    refused("no.txt cannot be read: .*No such file", new, vocab, "no.txt")
    refused("There are merges but no vocab", new, None, merges)
    refused("Give one of both", new, vocab, tokenizer_file=plain / "vocab.json")
    refused("'a' and 'b' the id 0; ids must differ", new, {"a": 0, "b": 0})
    for index in (-1, 2**32, "0", True, None, 1.0):
        refused("maps 'a' to .*; it must map tokens to ids", new, {"a": index})
    refused(r"a token holds '\\ud800' at index 1", new, {"a\ud800": 0})
    for merge in ("ab", "a b c", ("a",), ("a", 1), 5):
        refused("merge 0 is .*; it must be two tokens", new, vocab, [merge])
    refused("Merge 0 makes 'ba' of 'b' and 'a', but the vocabulary has no 'ba'", new, vocab, [("b", "a")])
    refused("vocabulary has no 'c'", new, vocab, ["c a"])
    refused("errors is 'surrogateescape'; it must be one of replace, strict, ignore", new, vocab, errors="surrogateescape")
    refused("add_prefix_space is 'yes'; it must be true or false", new, vocab, add_prefix_space="yes")
    refused("padding side is 'up'", new, vocab, padding_side="up")
    refused("eos_token is 5; a token must be a text", new, vocab, eos_token=5)
    refused("eos_token is ''", new, vocab, eos_token="")
    refused("eos_token holds", new, vocab, eos_token="\udfff")
    refused("of eos_token that is '</s>', which the vocabulary lacks", new, vocab, eos_token="</s>", add_eos_token=True)
    refused("of bos_token there is none", new, vocab, bos_token=None, add_bos_token=True)
    refused("no option max_len; it has bos_token", new.from_pretrained, plain, max_len=5)
    tokenizer = new(vocab, merges, pad_token=None, add_prefix_space=True)
    refused(r"The text holds '\\ud83d' at index 1", tokenizer.encode, "a\ud83d")
    refused(r"Word 1 holds '\\ud83d'", tokenizer.encode, ["a", "\ud83d"])
    refused("Word 0 is 5, not a text", tokenizer.encode, [5])
    refused(r"Text 1 holds '\\ud83d'", tokenizer.encode_batch, ["a", "\ud83d"])
    refused("a list of words, not bytes", tokenizer.encode, b"ab")
    refused("this is one text", tokenizer.encode_batch, "ab")
    for ids in ("ab", [1.5], [None]):
        refused("must be whole numbers", tokenizer.decode, ids)
    refused("-1 is no token id", tokenizer.decode, [0, -1])
    refused("no pad_token. Give it one", tokenizer.pad, [[0], [1, 2]])
    refused("nothing to pad", tokenizer.pad, [])
    refused("2 tokens, more than the length 1", tokenizer.pad, [[0, 1]], length=1)


def test_damaged_files_are_refused(released: Path, plain: Path, tmp_path: Path) -> None:
    load = GPTNeoXTokenizer.from_pretrained
    refused("is no folder", load, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("holds no tokenizer; GPT-NeoX needs tokenizer.json, or vocab.json and merges.txt", load, tmp_path / "empty")
    half = copy_of(plain, tmp_path / "half")
    (half / "merges.txt").unlink()
    refused("holds vocab.json; GPT-NeoX needs", load, half)
    (half / "merges.txt").write_text("#version: 0.2\nĠ t h\n")
    refused("merge 0 is 'Ġ t h'", load, half)
    (half / "merges.txt").write_bytes(b"\xff\xfe")
    refused("merges.txt cannot be read: .*utf-8", load, half)
    file = json.loads((released / "tokenizer.json").read_text())
    broken = copy_of(released, tmp_path / "broken")
    for text, words in (
        ("{", "cannot be read as JSON"),
        ("[]", "holds list, not an object"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("{}", "holds a model of type None; a GPT-NeoX tokenizer is a BPE"),
        (json.dumps({**file, "model": {"type": "Unigram", "vocab": [["a", 0.0]]}}), "a model of type 'Unigram'"),
        (json.dumps({**file, "model": {**file["model"], "merges": 5}}), "must be lists"),
        (json.dumps({**file, "model": {**file["model"], "vocab": {"a": "x"}}}), "tokenizer.json: .* maps 'a' to 'x'"),
        (json.dumps({**file, "added_tokens": [{"id": 600}]}), "added token 600 is .*; a token must be"),
        (json.dumps({**file, "added_tokens": [5]}), "the added token 5 has the id None"),
        (json.dumps({**file, "added_tokens": [{"id": 700, "content": "<s>"}]}), "'<s>' is listed with id 700, but .* is 600"),
    ):
        (broken / "tokenizer.json").write_text(text)
        refused(words, load, broken)
        refused(words, build_tokenizer, [broken / "tokenizer.json"])
    for number, (name, value, words) in enumerate(
        [
            ("tokenizer_config", [], "tokenizer_config.json holds list"),
            ("tokenizer_config", {"added_tokens_decoder": []}, r"added tokens are \[\], not an object"),
            ("tokenizer_config", {"added_tokens_decoder": {"x": END_DICT}}, "has the id 'x'"),
            ("tokenizer_config", {"eos_token": {"content": 5}}, "eos_token is"),
            ("tokenizer_config", {"extra_special_tokens": 5}, "extra_special_tokens is 5"),
            ("tokenizer_config", {"errors": 5}, "errors is 5"),
            ("special_tokens_map", {"eos_token": ["x"]}, "eos_token is"),
            ("added_tokens", {"x": "y"}, "maps 'x' to 'y'"),
        ]
    ):
        refused(words, load, copy_of(plain, tmp_path / f"plain{number}", **{name: value}))
    file["pre_tokenizer"] = {"type": "Whitespace"}
    other = {"tokenizer_class": "PreTrainedTokenizerFast"}
    refused(
        "'Whitespace'.* Load it with that class", load, copy_of(released, tmp_path / "o", tokenizer=file, tokenizer_config=other)
    )
    (tmp_path / "file").write_text("")
    refused("cannot be written to", load(released).save_pretrained, tmp_path / "file")
