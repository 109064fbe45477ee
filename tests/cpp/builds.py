"""The C++ library, built and installed as another project would, and a process without Python that does what tests tell it.

Builds are one translation unit (CMAKE_UNITY_BUILD), since parsing torch's headers is most of the work.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import oxfuse

SOURCES = Path(oxfuse.__file__).parent / "runtime" / "cpp"
HERE = Path(__file__).parent
SUPPRESSIONS = HERE / "lsan.supp"
STATUS = (
    "ok", "bad argument", "bad artifact", "unsupported", "unfit host", "out of cache", "context exceeded", "out of memory",
    "internal",
)  # fmt: skip
FINISH = {1: "stop", 2: "length"}


def run(*command: object, **options: object) -> str:
    """Run a command and return what it prints. Raises AssertionError with its output where it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return str(done.stdout)


def configure(source: Path, build: Path, *options: str, prefix: Sequence[object] = ()) -> None:
    places = ";".join(map(str, (*prefix, torch.utils.cmake_prefix_path)))
    run("cmake", "-S", source, "-B", build, f"-DCMAKE_PREFIX_PATH={places}", *options)


@dataclass(frozen=True)
class Build:
    """`samples`: the folder of the sample programs; `driver`: the program of driver.cpp; both use the library in `installed`."""

    samples: Path
    driver: Path
    installed: Path


def build(place: Path, flags: str = "") -> Build:
    """Build and install the library in the folder `place`, and the tests' driver against what was installed."""
    common = ("-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_CXX_FLAGS_RELEASE=-O1 {flags}", f"-DCMAKE_C_FLAGS_RELEASE=-O1 {flags}")
    made = Build(samples=place / "library", driver=place / "driver" / "driver", installed=place / "installed")
    configure(SOURCES, made.samples, *common, "-DCMAKE_UNITY_BUILD=ON", "-DCMAKE_UNITY_BUILD_BATCH_SIZE=0")
    run("cmake", "--build", made.samples, "-j2")
    run("cmake", "--install", made.samples, "--prefix", made.installed)
    configure(HERE, made.driver.parent, *common, prefix=[made.installed])
    run("cmake", "--build", made.driver.parent)
    return made


class CallError(Exception):
    """What the library says of a call that failed."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status, self.message = status, message


def ids_text(ids: Iterable[int]) -> str:
    return " ".join(map(str, ids))


class Driver:
    """A process of driver.cpp. A call that the library refuses raises CallError; the process must live on."""

    def __init__(self, build: Build, env: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [build.driver],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.process.kill()
        code, errors = self.end()
        if kind is None:
            assert code == 0, errors

    def end(self) -> tuple[int, str]:
        """Let the process end by itself and return its exit code and what it wrote to stderr."""
        assert self.process.stdin is not None
        _, errors = self.process.communicate()
        return self.process.returncode, errors

    def call(self, *words: object, **options: object) -> list[str]:
        """Return the words of the answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        line = "\t".join([*map(str, words), *(f"{name}={value}" for name, value in options.items())])
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        answer = self.process.stdout.readline().rstrip("\n")
        assert answer, f"the process ended at {line[:200]!r}: {self.end()}"
        kind, *rest = answer.split("\t")
        if kind == "error":
            raise CallError(STATUS[int(rest[0])], "\t".join(rest[1:]))
        assert kind == "ok", f"{line[:200]}: {answer}"
        return rest

    def logits(self, *words: object) -> torch.Tensor:
        """Return the logits that a call answers with, float32 [V]."""
        return floats(self.call(*words)[0])

    def generate(self, session: str, ids: Iterable[int], **options: object) -> tuple[list[int], str, torch.Tensor]:
        """Return the tokens, the reason of the end, and the logits [n, V]."""
        text, finish, logits = self.call("generate", session, ids_text(ids), **options)
        tokens = [int(word) for word in text.split()]
        return tokens, FINISH[int(finish)], floats(logits).reshape(len(tokens), -1)

    def info(self, model: str = "m") -> dict[str, str]:
        return dict(word.partition("=")[::2] for word in self.call("info", model))


def floats(text: str) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(bytes.fromhex(text), np.float32).copy())


def doubles(text: str) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(bytes.fromhex(text), np.float64).copy())


def hex_text(logits: torch.Tensor) -> str:
    return logits.float().numpy().tobytes().hex()
