"""The C++ ops under sanitizers: nothing outside of memory, undefined, read before it is written, or raced for by threads.

An instrumented library is built for each road through the code, and `sanitized.py` calls its ops in a process of its own, with
the sanitizer's runtime preloaded. Sources that are broken on purpose show that each of these would be reported.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from oxfuse.passes.fusions import build
from oxfuse.passes.fusions.build import OpsBuild, build_ops, cpu_kernels

pytestmark = pytest.mark.slow

BuildOps = Callable[..., OpsBuild]
PACKED = ("oxfuse::moe_dispatch", "oxfuse::linear_int8")
COMPILER = "g++"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sanitizer:
    """What the compiler takes, the runtimes that a process preloads, and the variables that they read."""

    flags: tuple[str, ...]
    runtimes: tuple[str, ...]
    environment: dict[str, str]

    def preloaded(self) -> str:
        """The runtimes' paths; skips where the compiler has none."""
        paths = [
            subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
            for name in self.runtimes
        ]
        missing = [path for path in paths if not Path(path).is_absolute()]
        if missing:
            pytest.skip(f"{COMPILER} has no {', '.join(missing)}")
        return ":".join(paths)


COMMON = ("-DOXFUSE_OWN_THREADS", "-fno-omit-frame-pointer", "-g1")
# The types of torch's objects are hidden, so `vptr` has nothing to compare. Without the C++ runtime the sanitizer does not find
# what throws exceptions. Memory is filled with bytes of NaN: results then hold it where something is read before it is written.
ADDRESS = Sanitizer(
    flags=(
        *COMMON,
        "-D_GLIBCXX_ASSERTIONS",
        *("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"),
    ),
    runtimes=("libasan.so", "libstdc++.so"),
    environment={
        "ASAN_OPTIONS": "detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1073741824",  # Python's leaks are its own
        "UBSAN_OPTIONS": "print_stacktrace=1",
    },
)
THREAD = Sanitizer(
    flags=(*COMMON, "-fsanitize=thread"),
    runtimes=("libtsan.so",),
    environment={"TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1"},
)


def call(made: OpsBuild, sanitizer: Sanitizer, folder: Path) -> subprocess.CompletedProcess[str]:
    """Call the ops of `made` in a process with the sanitizer's runtime."""
    (pickled := folder / "build.pickle").write_bytes(pickle.dumps(made))
    return subprocess.run(
        [sys.executable, Path(__file__).with_name("sanitized.py"), pickled],
        env={**os.environ, **sanitizer.environment, "LD_PRELOAD": sanitizer.preloaded()},
        capture_output=True,
        text=True,
        timeout=900,
    )


def assert_clean(made: OpsBuild, sanitizer: Sanitizer, folder: Path) -> None:
    done = call(made, sanitizer, folder)
    assert done.returncode == 0, f"{done.stdout[-300:]}\n{done.stderr[:6000]}"
    assert re.search(r"^[1-9]\d* calls$", done.stdout, re.M)


@pytest.mark.parametrize("isa", ["x86-64-v4", "x86-64-v3", "x86-64-v2"])
def test_memory(isa: str, build_with: BuildOps, tmp_path: Path) -> None:
    ADDRESS.preloaded()
    assert_clean(build_with(isa, *ADDRESS.flags), ADDRESS, tmp_path)


@pytest.mark.parametrize(
    "macros", [("-DOXFUSE_NO_VNNI", "-DOXFUSE_NO_BF16"), ("-DOXFUSE_EMULATE_BF16",)], ids=["without", "emulated"]
)
def test_memory_on_other_processors(macros: tuple[str, ...], build_with: BuildOps, tmp_path: Path) -> None:
    ADDRESS.preloaded()
    assert_clean(build_with("x86-64-v4", *ADDRESS.flags, *macros, ops=PACKED), ADDRESS, tmp_path)


@pytest.mark.parametrize("isa", ["x86-64-v4", "x86-64-v3"])
def test_races(isa: str, build_with: BuildOps, tmp_path: Path) -> None:
    THREAD.preloaded()
    assert_clean(build_with(isa, *THREAD.flags), THREAD, tmp_path)


SCRATCH = "    const std::unique_ptr<PanelScratch> scratch(new PanelScratch);\n"
TURNS = "      std::vector<float> cos(half), sin(half);\n"
READ = r"AddressSanitizer: .*\nREAD of size \d+"  # whose name for it differs with the size
BROKEN = {  # (sanitizer, file, what is replaced by what, what is reported)
    "read one value past the end": (
        ADDRESS,
        "rotary_embedding/rotary_embedding.cpp",
        [("i < half; ++i) {\n      const float first", "i <= half; ++i) {\n      const float first")],
        READ,
    ),
    "read a vector past the end": (
        ADDRESS,
        "activations.h",
        [("left >= LANES ? load(from) : left > 0 ? load(from, left) : Floats{}", "load(from)")],
        READ,
    ),
    "written past the end of own memory": (
        ADDRESS,
        "activations.h",
        [("buffer<float>(rows * places.blocks * BLOCK)", "buffer<float>(rows * places.blocks * BLOCK - 1)")],
        r"AddressSanitizer: .*\nWRITE of size \d+",
    ),
    "read before it is written": (
        ADDRESS,
        "activations.h",
        [("block, BLOCK * sizeof(float)); });", "block, (BLOCK - 1) * sizeof(float)); });")],
        r"AssertionError: off by nan",
    ),
    "overflow": (
        ADDRESS,
        "rotary_embedding/rotary_embedding.cpp",
        [("(data<int64_t>(index)[t])", "(data<int64_t>(index)[t] * INT64_MAX)")],
        r"runtime error: signed integer overflow",
    ),
    "past a vector's end": (
        ADDRESS,
        "rotary_embedding/rotary_embedding.cpp",
        [("cos(half), sin(half)", "cos(half), sin(half - 1)")],
        r"Assertion '__n < this->size\(\)' failed",
    ),
    "turns that threads share": (
        THREAD,
        "rotary_embedding/rotary_embedding.cpp",
        [(TURNS, ""), ("    parallel_for(0, tokens", TURNS + "    parallel_for(0, tokens")],
        r"ThreadSanitizer: data race",
    ),
    "panels that threads share": (
        THREAD,
        "panels.h",
        [(SCRATCH, ""), ("  share(tokens,", SCRATCH + "  share(tokens,")],
        r"ThreadSanitizer: data race",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_reported(name: str, tmp_path: Path) -> None:
    sanitizer, file, changes, report = BROKEN[name]
    sanitizer.preloaded()
    op = "oxfuse::linear_int8" if file.endswith(".h") else "oxfuse::rotary_embedding"
    (kernel,) = (kernel for kernel in cpu_kernels() if op in kernel.ops)
    root = tmp_path / "fusions"
    shutil.copytree(build.HERE, root, ignore=lambda folder, names: [n for n in names if Path(n).suffix not in ("", ".h", ".cpp")])
    text = (root / file).read_text("utf-8")
    for old, new in changes:
        assert text.count(old) == 1, f"{file} has changed: {old!r} is in it {text.count(old)} times"
        text = text.replace(old, new)
    (root / file).write_text(text, "utf-8")
    kernel = dataclasses.replace(kernel, source=root / kernel.source.relative_to(build.HERE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "FLAGS", (*build.FLAGS, *sanitizer.flags))
        made = build_ops([kernel], "native", tmp_path / "broken.so")
    done = call(made, sanitizer, tmp_path)
    assert done.returncode != 0 and re.search(report, done.stderr), f"{done.stdout[-300:]}\n{done.stderr[:6000]}"
