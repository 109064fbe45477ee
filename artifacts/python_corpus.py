"""The text that the bundled checkpoint learns: the Python standard library's own source, and chats made from its functions.

In: the running interpreter's library folder and a seed. Out: training and held-out files as text, and chat turns in the
markers of the bundled chat template. Nothing is downloaded; other Python versions give other text, so `training.json` records
which files were read.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import random
import sysconfig
import textwrap
import tokenize
from pathlib import Path

# Tests, tables and vendored packages: long, unlike ordinary library code, or not of the standard library.
LEFT_OUT = {
    *("test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "turtledemo", "site-packages", "__pycache__"),
    *("__phello__", "_bundled", "idle_test", "lib-dynload"),
}
HELD_OUT_SHARE = 0.04
LONGEST_ANSWER = 1200  # characters of a function that becomes a chat: a whole turn fits a training sequence
END_OF_TEXT, START, MESSAGE, END, RETURN, CHANNEL = SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|start|>", "<|message|>", "<|end|>", "<|return|>", "<|channel|>"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Texts by file name relative to the library's folder, in sorted order."""

    train: dict[str, str]
    held_out: dict[str, str]

    def digest(self) -> str:
        """Return the sha256 of the data list: a line `part name sha256-of-text` for every file."""
        lines = [
            f"{part} {name} {hashlib.sha256(text.encode()).hexdigest()}\n"
            for part, files in (("train", self.train), ("held-out", self.held_out))
            for name, text in files.items()
        ]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_corpus(seed: int) -> Corpus:
    """Read the running interpreter's standard library and split it by files with `seed`."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [str(path.relative_to(root).as_posix()) for path in root.rglob("*.py")]
    # _sysconfigdata and config-* are written by the build of one machine.
    names = sorted(n for n in names if not LEFT_OUT & set(n.split("/")) and not n.startswith(("_sysconfigdata", "config-")))
    files: dict[str, str] = {}
    for name in names:
        with tokenize.open(root / name) as file:  # honours coding lines
            text = file.read().strip()
        if text:
            files[name] = text + "\n"
    held_out = set(random.Random(seed).sample(sorted(files), max(1, round(HELD_OUT_SHARE * len(files)))))
    return Corpus(
        train={name: text for name, text in files.items() if name not in held_out},
        held_out={name: text for name, text in files.items() if name in held_out},
    )


def chat_turns(files: dict[str, str]) -> list[str]:
    """Turn every short function of `files` into a chat.

    Its signature is what the user asks for, its docstring's first line the analysis, its source the final answer.
    """
    turns = []
    for text in files.values():
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef):
                continue
            source = textwrap.dedent("\n".join(text.split("\n")[node.lineno - 1 : node.end_lineno]))
            if len(source) > LONGEST_ANSWER or len(node.body) < 2:
                continue
            turn = f"{START}user{MESSAGE}{request(node)}{END}"
            if summary := (ast.get_docstring(node) or "").split("\n")[0]:
                turn += f"{START}assistant{CHANNEL}analysis{MESSAGE}{summary}{END}"
            turns.append(f"{turn}{START}assistant{CHANNEL}final{MESSAGE}{source}{RETURN}")
    return turns


def request(node: ast.FunctionDef) -> str:
    """Return the words with which a user asks for this function."""
    return f"Write {node.name}({ast.unparse(node.args)})"
