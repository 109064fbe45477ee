"""C++ and Python run the same program on the same inputs: tokens are equal, and logits to the last bit."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

import oxfuse
from oxfuse.errors import UserError

from ..parity.cases import random_ids
from .builds import CallError, Driver, ids_text, run

NEW = 200
CASES = [
    ("base", {}),
    ("neox", {}),
    *(
        pytest.param(name, options, marks=pytest.mark.slow)
        for name, options in (
            ("base", {"dtype": "bfloat16"}),
            ("mxfp4", {"dtype": "bfloat16"}),
            ("mxfp4", {}),
            ("neox", {"dtype": "bfloat16"}),
        )
    ),
]


def in_chunks(artifact: Path, place: Path, tokens: int = 32, **limits: int) -> Path:
    """Return a copy of an artifact whose steps take few tokens, so that prompts take several and windows are left behind."""
    shutil.copytree(artifact, place, copy_function=os.link)
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["limits"] |= {"max_step_tokens": tokens, **limits}
    (place / "manifest.json").unlink()
    (place / "manifest.json").write_text(json.dumps(manifest))
    return place


def python_greedy(model: oxfuse.CompiledModel, prompt: list[int], count: int) -> tuple[list[int], torch.Tensor]:
    with model.session() as session:
        rows, tokens = [session.prefill(prompt)], list[int]()
        while len(tokens) < count:
            tokens.append(int(rows[-1].argmax()))
            if len(tokens) < count:
                rows.append(session.decode(tokens[-1]))
    return tokens, torch.stack(rows)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_greedy_tokens_and_logits_are_those_of_python(loaded, name, options):
    """Prompts of one token, within the window, and across it."""
    case, artifact, driver = loaded(name, **options)
    model = oxfuse.load(artifact)
    for length in (1, 12, 25, 150):
        prompt = random_ids(case, length, seed=length).tolist()
        driver.call("open", "s", "m")
        tokens, finish, logits = driver.generate("s", prompt, max_new_tokens=NEW, stop_token_ids="none")
        expected, rows = python_greedy(model, prompt, NEW)
        assert tokens == expected and finish == "length"
        assert torch.equal(logits, rows), f"largest difference {(logits - rows).abs().max():.1e}"
        (generated,) = model.generate(prompt, max_new_tokens=NEW, stop_token_ids=[])
        assert generated.token_ids == tokens
    assert len({*tokens}) > 20


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))])
@pytest.mark.parametrize("name", ["base", pytest.param("neox", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("batch", "bound"), [(1, {}), (3, {}), (3, {"prefix_cache_bytes": 60_000})])
def test_any_calls_give_what_they_give_in_python(compiled, driver, tmp_path, name, seed, batch, bound):
    """Random calls on several sessions, in chunks, in a cache too small for all of them, or not.

    Logits are equal to the last bit, and so are refusals, blocks, steps, and the tokens that were found in the cache.
    """
    case, _, artifact = compiled(name)
    artifact = in_chunks(artifact, tmp_path / "chunked", tokens=32, max_context=400, max_batch=batch)
    model = oxfuse.load(artifact, **bound)
    driver.call("load", "m", artifact, **bound)
    chance = random.Random(seed)
    ours: dict[str, oxfuse.Session] = {}
    seen: dict[str, int] = {}

    def in_python(what: str, session: str, new: str, ids: list[int], to: int) -> torch.Tensor | None:
        match what:
            case "open":
                ours[session] = model.session()
            case "fork":
                ours[new] = ours[session].fork()
            case "close":
                ours.pop(session).close()
            case "rewind":
                ours[session].rewind(to)
            case _:
                return ours[session].prefill(ids if what == "prefill" else ids[:1])
        return None

    def in_cpp(what: str, session: str, new: str, ids: list[int], to: int) -> torch.Tensor | None:
        match what:
            case "open":
                driver.call("open", session, "m")
            case "fork":
                driver.call("fork", new, session)
            case "close":
                driver.call("close", session)
            case "rewind":
                driver.call("rewind", session, to)
            case _:
                return driver.logits(what, session, ids_text(ids if what == "prefill" else ids[:1]))
        return None

    text = random_ids(case, 400).tolist()
    for step in range(70):
        what = chance.choices(["prefill", "decode", "rewind", "fork", "open", "close"], [6, 6, 5, 1, 1, 0.5])[0]
        session = chance.choice([*ours]) if ours else ""
        if what == "open" or not ours:
            session, what = f"s{step}", "open"
        ids = [chance.randrange(case.vocabulary) for _ in range(chance.choice([2, 10, 40, 90, 200]))]
        length = ours[session].length if session in ours else 0
        if chance.random() < 0.9:  # goes on as others have gone on, if it has begun so
            ids = text[length : length + len(ids)] or ids
        to = chance.randint(0, length)
        results: list[torch.Tensor | str | None] = []
        for call, refusal in ((in_python, UserError), (in_cpp, CallError)):
            try:
                results.append(call(what, session, f"f{step}", ids, to))
            except refusal as error:
                results.append(str(error))
        expected, got = results
        if isinstance(expected, str):
            assert isinstance(got, str), f"step {step}: Python refuses: {expected}"
            kind = "context exceeded" if "max_context" in expected else "out of cache"
            assert got.startswith(kind), (got, expected)
            seen[kind] = seen.get(kind, 0) + 1
        elif isinstance(expected, torch.Tensor):
            assert isinstance(got, torch.Tensor), f"step {step}: only C++ refuses: {got}"
            assert torch.equal(got, expected), f"step {step}, {what}: largest difference {(got - expected).abs().max():.1e}"
        for one in ours:
            assert driver.call("tokens", one)[0] == ids_text(ours[one].token_ids)
        info = driver.info()
        engine = model.scheduler.engine
        found = [int(info[name]) for name in ("used_blocks", "steps", "reused_tokens")]
        assert found == [engine.used_blocks, engine.steps, engine.reused_tokens], f"step {step}, {what}"
        seen[what] = seen.get(what, 0) + 1
    assert seen.keys() >= {"prefill", "decode", "rewind", "fork", "open"} and (seed or batch > 1 or "out of cache" in seen), seen
    enough = 0 if bound or name == "neox" else 50  # without windows a rewind finds what it needs where it was
    assert model.reused_tokens > enough, "little was found, so little was compared"


def test_a_rewind_runs_again_what_the_window_forgot_and_nothing_else(compiled, driver, tmp_path):
    case, _, artifact = compiled("base")
    driver.call("load", "m", in_chunks(artifact, tmp_path / "chunked"), prefix_cache_bytes=0)
    prompt, tail = random_ids(case, 200).tolist(), random_ids(case, 9, seed=9).tolist()

    def alone(ids: list[int]) -> torch.Tensor:
        driver.call("open", "alone", "m")
        return driver.logits("prefill", "alone", ids_text(ids))

    def steps() -> int:
        return int(driver.info()["steps"])

    # Of 200 tokens the sliding layers keep the blocks of 16 from token 144 on: those that one of the window of 19 sees after a
    # rewind by a chunk of 32. Back to 175 needs no more than these; further back everything runs again, in chunks of 32.
    driver.call("open", "s", "m")
    for length, expected in ((190, 1), (175, 1), (160, 6), (100, 4), (3, 1)):
        driver.call("prefill", "s", ids_text(prompt))
        driver.call("rewind", "s", length)
        before = steps()
        got = driver.logits("prefill", "s", ids_text(tail))
        assert steps() - before == expected, length
        torch.testing.assert_close(got, alone(prompt[:length] + tail), atol=1e-4, rtol=1e-4)
        driver.call("rewind", "s", 0)


def test_sessions_side_by_side_give_what_they_give_alone(loaded):
    case, artifact, driver = loaded("base")
    prompts = [random_ids(case, n, seed=n).tolist() for n in (3, 40, 111)]
    model = oxfuse.load(artifact)
    expected = [python_greedy(model, prompt, 30) for prompt in prompts]
    last, found = [], [list[int]() for _ in prompts]
    for number, prompt in enumerate(prompts):
        driver.call("open", number, "m")
        last.append(driver.logits("prefill", number, ids_text(prompt)))
    for step in range(30):
        for number, (tokens, rows) in enumerate(expected):
            assert torch.equal(last[number], rows[step])
            found[number].append(int(last[number].argmax()))
            last[number] = driver.logits("decode", number, found[number][-1])
            assert found[number] == tokens[: step + 1]


def test_a_batch_of_sessions_shares_its_steps(loaded):
    case, _, driver = loaded("base")
    prompts = [random_ids(case, n, seed=n).tolist() for n in (1, 20, 57, 130, 4, 9, 33, 2, 70, 18)]
    names = [f"s{n}" for n in range(len(prompts))]
    for name, prompt in zip(names, prompts, strict=True):
        driver.call("open", name, "m")
        driver.call("prefill", name, ids_text(prompt))
        driver.call("fork", f"{name}-alone", name)
    before = int(driver.info()["steps"])
    width = int(driver.info()["vocab_size"])
    for token in (7, 100):
        rows = driver.logits("batch", "m", " ".join(names), ids_text([token] * len(names))).reshape(-1, width)
        assert len(rows) == len(names)
        for name, row in zip(names, rows, strict=True):
            torch.testing.assert_close(row, driver.logits("decode", f"{name}-alone", token), atol=1e-4, rtol=1e-4)
    steps = int(driver.info()["steps"]) - before
    assert steps == 2 * (len(names) + 2), "ten sessions take two steps, max_batch being 8"
    with pytest.raises(CallError, match="twice"):
        driver.call("batch", "m", "s0 s1 s0", "1 1 1")
    with pytest.raises(CallError, match="outside the vocabulary"):
        driver.call("batch", "m", "s0 s1", f"1 {width}")
    assert driver.call("tokens", "s0")[0] == ids_text([*prompts[0], 7, 100])


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_no_token(loaded, threads):
    """Threads inside operators, and threads that call: each with a session of its own."""
    case, artifact, driver = loaded("base", load={"threads": threads})
    prompt = random_ids(case, 60).tolist()
    model = oxfuse.load(artifact)
    lists = driver.call("parallel", "m", 4, ids_text(prompt), max_new_tokens=25, stop_token_ids="none")
    for number, text in enumerate(lists):
        assert text == ids_text(python_greedy(model, prompt[: len(prompt) - number], 25)[0])
    assert driver.info()["used_blocks"] == "0"


def test_few_tokens_go_to_threads_of_the_ops_own(loaded):
    """torch's run since the long prompt, so what four tokens add is not theirs; five add nothing."""
    case, _, driver = loaded("mxfp4", load={"threads": 3}, dtype="bfloat16")
    tasks = Path(f"/proc/{driver.process.pid}/task")
    driver.call("open", "s", "m")
    counts = []
    for length in (60, 5, 4, 4):
        driver.call("prefill", "s", ids_text(random_ids(case, length).tolist()))
        counts.append(len([*tasks.iterdir()]))
    assert counts[0] == counts[1] < counts[2] == counts[3]


def test_a_generation_ends_as_in_python(loaded, compiled):
    case, artifact, driver = loaded("neox")  # its text ends at token 0
    model = oxfuse.load(artifact)
    reasons = set()
    for seed in range(6):
        prompt = random_ids(case, 5, seed=seed).tolist()
        (expected,) = model.generate(prompt, max_new_tokens=60)
        driver.call("open", "s", "m")
        tokens, finish, _ = driver.generate("s", prompt, max_new_tokens=60)
        assert (tokens, finish) == (expected.token_ids, expected.finish_reason)
        reasons.add(finish)
        held = driver.call("tokens", "s")[0]
        assert held == ids_text(prompt + tokens[:-1])
    assert reasons == {"stop", "length"}
    prompt = random_ids(case, model.max_context - 3).tolist()  # room for three
    driver.call("open", "s", "m")
    tokens, finish, _ = driver.generate("s", prompt, max_new_tokens=60, stop_token_ids="none")
    assert (len(tokens), finish) == (3, "length")
    assert tokens == model.generate(prompt, max_new_tokens=60, stop_token_ids=[])[0].token_ids


def test_the_sample_programs_stream_the_tokens_of_python(library, compiled, tmp_path):
    case, _, artifact = compiled("base")
    prompt = random_ids(case, 30).tolist()
    expected, rows = python_greedy(oxfuse.load(artifact), prompt, 40)
    logits = tmp_path / "logits"
    printed = run(library.samples / "oxfuse_generate", artifact, ids_text(prompt), "-n", 40, "--logits", logits)
    assert printed.split() == [str(token) for token in expected]
    assert logits.read_bytes() == rows.numpy().tobytes()
    assert run(library.samples / "oxfuse_generate_c", artifact, 40, *prompt).split() == printed.split()


def test_there_is_no_python_in_the_process_and_weights_are_mapped(loaded):
    _, artifact, driver = loaded("base")
    driver.call("open", "s", "m")
    driver.call("prefill", "s", "1 2 3")
    maps = Path(f"/proc/{driver.process.pid}/maps").read_text()
    assert "libtorch_cpu" in maps and "libpython" not in maps and "libtorch_python" not in maps
    weights = [line for line in maps.splitlines() if str(artifact / "weights.safetensors") in line]
    assert len(weights) == 1 and "r--s" in weights[0], weights


def test_calls_that_do_not_fit_change_nothing(loaded, driver: Driver):
    _, _, driver = loaded("base")
    driver.call("open", "s", "m")
    driver.call("prefill", "s", "1 2 3")
    width, longest = int(driver.info()["vocab_size"]), int(driver.info()["max_context"])
    refused = [
        (("prefill", "s", f"1 {width}"), "bad argument", f"hold {width} at index 1"),
        (("prefill", "s", "-1"), "bad argument", "hold -1 at index 0"),
        (("prefill", "s", ids_text([1] * longest)), "context exceeded", "max_context"),
        (("rewind", "s", 4), "bad argument", "the session has 3 tokens"),
        (("rewind", "s", -1), "bad argument", "rewind to -1"),
        (("generate", "s", ids_text([1] * longest)), "context exceeded", "max_context"),
        (("generate", "s", "1", "max_new_tokens=0"), "bad argument", "max_new_tokens is 0"),
        (("generate", "s", "1", "top_p=2"), "bad argument", "top_p"),
        (("load", "other", "/nowhere"), "bad artifact", "does not exist"),
    ]
    for words, status, part in refused:
        with pytest.raises(CallError) as caught:
            driver.call(*words)
        assert caught.value.status == status and part in caught.value.message, words
    assert driver.call("tokens", "s")[0] == "1 2 3"
    assert driver.call("nulls", "s") == [""], "functions that take NULL"
    driver.call("close", "s")
    driver.call("close", "s")
    for words in (("decode", "s", 1), ("rewind", "s", 0), ("tokens", "s"), ("fork", "t", "s"), ("generate", "s", "1")):
        with pytest.raises(CallError, match="NULL"):
            driver.call(*words)


def test_a_session_outlives_its_model(loaded):
    case, artifact, driver = loaded("base")
    prompt = random_ids(case, 30).tolist()
    driver.call("open", "s", "m")
    driver.call("unload", "m")
    tokens, _, _ = driver.generate("s", prompt, max_new_tokens=5)
    assert tokens == python_greedy(oxfuse.load(artifact), prompt, 5)[0]


@pytest.mark.parametrize("bytes_left", [0, 1 << 20])
def test_cache_bytes_caps_the_cache_as_in_python(compiled, driver, tmp_path, bytes_left):
    _, _, artifact = compiled("base")
    artifact = in_chunks(artifact, tmp_path / "chunked")
    with pytest.raises(CallError) as caught:
        driver.call("load", "m", artifact, cache_bytes=1000)
    assert caught.value.status == "bad argument"
    least = int(caught.value.message.split(" takes ")[1].split()[0])
    with pytest.raises(UserError, match=f"takes {least} bytes"):
        oxfuse.load(artifact, cache_bytes=1000)
    driver.call("load", "m", artifact, cache_bytes=least + bytes_left)
    assert int(driver.info()["cache_bytes"]) == oxfuse.load(artifact, cache_bytes=least + bytes_left).scheduler.engine.size.bytes
