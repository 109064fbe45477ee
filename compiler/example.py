"""The folder that `--emit-example cpp` adds to an artifact: a C++ program that runs it, ready to build wherever libtorch is.

In: the runtime's C++ sources, which are part of the package. Out: `example-cpp/` inside the artifact, so that it appears and is
replaced with it. The manifest does not name it: nothing that runs the artifact reads it, and it may be changed or deleted.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from oxfuse.compiler.choices import EXAMPLES
from oxfuse.compiler.options import CompileOptions
from oxfuse.errors import UserError

SOURCES = Path(__file__).parent.parent / "runtime" / "cpp"
FOLDER = "example-cpp"
PARTS = ("CMakeLists.txt", "cmake", "include", "src")
"""What of SOURCES makes the library; its sample programs are the example itself."""

CMAKE = """\
cmake_minimum_required(VERSION 3.18)
project(example LANGUAGES C CXX)

add_subdirectory(oxfuse)  # the library's sources, as oxfuse ships them; needs libtorch

add_executable(example main.cpp)
target_link_libraries(example PRIVATE oxfuse::oxfuse)
"""

README = """\
# A C++ program that runs this artifact

`main.cpp` generates from token ids and prints each as it comes. It needs CMake, a C++20 compiler and libtorch {torch}, which the
pip package of torch has inside; Python is asked for its place and is not in the program.

```bash
cmake -S . -B build -DCMAKE_PREFIX_PATH="$(python3 -c 'import torch; print(torch.utils.cmake_prefix_path)')"
cmake --build build -j
build/example .. '1 2 3' -n 20
```

The artifact is the folder above this one. `oxfuse/include/oxfuse.h` says what a program in C may call, `oxfuse.hpp` is the same
for C++. With `cmake --install build --prefix PLACE` other projects find the library by `find_package(oxfuse)`.
"""


def check_example(kind: str | None, options: CompileOptions, task: str | None) -> None:
    """Raise UserError unless an example of this kind can run what `options` compile; `task` None is not known yet."""
    if kind is None:
        return
    if kind not in EXAMPLES:
        raise UserError(f"emit_example is {kind!r}; expected {' or '.join(EXAMPLES)}.")
    if options.device == "onnx":
        raise UserError(f"There is no {kind} example for target {options.target}: it runs artifacts for cpu and cuda alone.")
    if task not in (None, "text-generation"):
        raise UserError(f"There is no {kind} example for {task}: it runs text-generation alone.")


def write_example(artifact: Path, torch_version: str) -> Path:
    """Write the folder into `artifact` and return it; `torch_version` is the major.minor that the artifact needs."""
    folder = artifact / FOLDER
    folder.mkdir()
    for part in PARTS:
        source, place = SOURCES / part, folder / "oxfuse" / part
        if source.is_dir():
            shutil.copytree(source, place)
        else:
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, place)
    shutil.copyfile(SOURCES / "examples" / "generate.cpp", folder / "main.cpp")
    (folder / "CMakeLists.txt").write_text(CMAKE, "utf-8")
    (folder / "README.md").write_text(README.format(torch=torch_version), "utf-8")
    return folder
