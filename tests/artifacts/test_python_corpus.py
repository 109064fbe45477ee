"""What the bundled checkpoint learns from: ordinary library code, a fixed split, chats with the template's markers."""

import ast

import pytest

from oxfuse.artifacts.python_corpus import LEFT_OUT, SPECIAL_TOKENS, Corpus, chat_turns, read_corpus
from oxfuse.artifacts.python_tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return read_corpus(9)


def test_split_is_seeded_and_disjoint(corpus: Corpus) -> None:
    assert not corpus.train.keys() & corpus.held_out.keys()
    assert corpus.held_out and len(corpus.train) > 10 * len(corpus.held_out)
    assert read_corpus(9).digest() == corpus.digest() != read_corpus(10).digest()


def test_tests_and_tables_are_left_out(corpus: Corpus) -> None:
    names = [*corpus.train, *corpus.held_out]
    assert {"pathlib.py", "json/decoder.py"} <= {*names}
    assert not [name for name in names if LEFT_OUT & {*name.split("/")} or "sysconfigdata" in name]


def test_chat_answers_are_python(corpus: Corpus) -> None:
    turns = chat_turns({name: corpus.train[name] for name in ("shlex.py", "textwrap.py") if name in corpus.train})
    assert len(turns) > 10 and any("<|channel|>analysis" in turn for turn in turns)
    for turn in turns:
        assert turn.startswith("<|start|>user<|message|>Write ")
        answer = turn.split("<|channel|>final<|message|>")[1].removesuffix("<|return|>")
        assert isinstance(ast.parse(answer).body[0], ast.FunctionDef)


def test_tokenizer_training_is_repeatable_and_lossless(corpus: Corpus, tmp_path) -> None:
    text = corpus.train["shlex.py"]
    first, second = (train_tokenizer([text], tmp_path / name) for name in ("a.json", "b.json"))
    assert first.to_str() == second.to_str()
    assert first.decode(first.encode(text).ids, skip_special_tokens=False) == text
    assert [first.token_to_id(token) for token in SPECIAL_TOKENS] == [*range(len(SPECIAL_TOKENS))]
