"""The library and its sample programs under AddressSanitizer and LeakSanitizer: clean but for what torch itself leaks."""

from __future__ import annotations

import os
import subprocess

import pytest

from ..parity.cases import random_ids
from . import test_bad_artifacts as bad
from .builds import SUPPRESSIONS, Build, CallError, Driver, build, ids_text

pytestmark = pytest.mark.slow
# LeakSanitizer takes thread-local memory 16 bytes behind a page's start for glibc's, and reads its size from what
# AddressSanitizer keeps there: a crash ("Tracer caught signal 11") of one process in 85 or so, of `g_aoti_last_error` in
# program.so when it was seen. Behind red zones of 256 bytes all memory starts at multiples of 64.
ENVIRONMENT = {
    "LSAN_OPTIONS": f"suppressions={SUPPRESSIONS}:print_suppressions=0",
    "ASAN_OPTIONS": "detect_leaks=1:redzone=256",
}


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return build(tmp_path_factory.mktemp("asan"), "-g1 -fno-omit-frame-pointer -fsanitize=address")


@pytest.fixture
def copy(compiled, tmp_path):
    numbers = iter(range(10_000))
    return lambda: bad.Copy(compiled("base")[2], tmp_path / f"copy{next(numbers)}")


def test_the_suppressions_are_for_torch_alone():
    lines = [line for line in SUPPRESSIONS.read_text().splitlines() if line and not line.startswith("#")]
    assert lines == ["leak:aoti_torch_new_tensor_handle"]


@pytest.mark.parametrize(("name", "options"), [("base", {}), ("mxfp4", {"dtype": "bfloat16"}), ("neox", {})])
def test_the_sample_programs_are_clean(sanitized, compiled, name, options):
    case, _, artifact = compiled(name, **options)
    prompt = random_ids(case, 40).tolist()
    for command in (
        [sanitized.samples / "oxfuse_generate_c", artifact, 30, *prompt],
        [sanitized.samples / "oxfuse_generate", artifact, ids_text(prompt), "-n", 30, "--temperature", 1, "--top-p", 0.9],
        [sanitized.samples / "oxfuse_generate_c", "/nowhere", 30, *prompt],
    ):
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
        expected = 2 if "/nowhere" in command else 0
        assert done.returncode == expected and "Sanitizer" not in done.stderr, done.stderr[-4000:]


def test_all_calls_are_clean(sanitized, compiled, copy):
    case, _, artifact = compiled("base")
    with Driver(sanitized, ENVIRONMENT) as driver:
        driver.call("load", "m", artifact, threads=2)
        driver.call("open", "s", "m")
        assert driver.call("nulls", "s") == [""]
        driver.call("prefill", "s", ids_text(random_ids(case, 200).tolist()))
        driver.call("fork", "t", "s")
        driver.call("batch", "m", "s t", "1 2")
        for length in (190, 30, 0):
            driver.call("rewind", "s", length)
            driver.call("prefill", "s", "1 2 3")
        driver.generate("t", [4, 5], max_new_tokens=20, temperature=1.0, top_k=20, min_p=0.01, repetition_penalty=1.2)
        driver.call("parallel", "m", 4, ids_text(random_ids(case, 30).tolist()), max_new_tokens=10)
        for name, damage in bad.DAMAGES.items():
            one = copy()
            damage(one)
            with pytest.raises(CallError):
                driver.call("load", "bad", one.folder)
            assert driver.process.poll() is None, name
        for _ in range(3):  # loads and closes leave nothing behind either
            driver.call("load", "again", artifact)
            driver.call("unload", "again")
        driver.call("unload", "m")
        driver.call("close", "t")
    # the end of the block has looked at the exit code, which a leak would change


def test_a_leak_of_our_own_is_told(sanitized, compiled):
    driver = Driver(sanitized, ENVIRONMENT)
    driver.call("load", "m", compiled("base")[2])
    driver.call("leak", "m")
    code, errors = driver.end()
    assert code != 0 and "LeakSanitizer: detected memory leaks" in errors and "oxfuse_session_open" in errors
