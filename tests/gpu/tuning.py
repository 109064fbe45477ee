"""Configurations of the tuning tables, timed at the 20b shape: one change at a time to what the table says, then the best two.

What comes out is a rule that can be put before the one that was in use. A configuration that does not fit the GPU, or gives other
numbers, is told and left out.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from oxfuse.passes.fusions import tuning

from . import timing
from .calls import OPS
from .document import Row
from .inputs import Maker
from .lab import Lab, captured_times, copies_for, median, same
from .precompile import Job
from .timing import Case
from .worker import Found, Item, Note

Change = Mapping[str, int]
SAME_NUMBERS = 0.02
"""Largest relative RMS difference from what the table's configuration gives: sums in another order, rounded to bfloat16."""
GAIN = 0.98
"""A change counts where it takes no more than this part of the time."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One kernel of a table: where it is timed, cases by op and name, and what is changed, one at a time."""

    kernel: str
    cases: tuple[tuple[str, str], ...]
    changes: tuple[Change, ...]
    seconds: float = 10.0


def _stages(*counts: int) -> tuple[Change, ...]:
    return tuple({"num_stages": count} for count in counts)


def _each(name: str, *values: int) -> tuple[Change, ...]:
    return tuple({name: value} for value in values)


def _split(*counts: int) -> tuple[Change, ...]:
    return tuple({"SPLIT": count, "num_warps": count} for count in counts)  # a warp for each piece


ROWS_OF_PRODUCTS = (*_each("ROWS", 16, 32, 64), *_split(2, 8), *_each("DEPTH", 32, 128), *_stages(3, 4, 5, 8))
SUBJECTS = (
    Subject(
        kernel="few_gate_up",
        cases=(("moe_experts", "1 rows"), ("moe_experts", "8 rows")),
        changes=(*_each("ROWS", 16, 64), *_each("TOKENS", 16), *_each("num_warps", 2, 8), *_stages(1, 2, 4, 5)),
    ),
    Subject(
        kernel="few_down",
        cases=(("moe_experts", "1 rows"), ("moe_experts", "8 rows")),
        changes=(*_each("ROWS", 32, 64), *_each("num_warps", 2, 8), *_stages(1, 2, 4, 5)),
    ),
    Subject(kernel="qkv_rotary", cases=(("qkv_rotary", "1 rows"), ("qkv_rotary", "8 rows")), changes=ROWS_OF_PRODUCTS),
    Subject(
        kernel="linear_rows",
        cases=(("linear_rows", "output, 1 rows"), ("linear_rows", "output, 8 rows")),
        changes=ROWS_OF_PRODUCTS,
    ),
    Subject(kernel="linear_rows", cases=(("linear_rows", "head, 1 rows"),), changes=ROWS_OF_PRODUCTS),
    Subject(
        kernel="decode",
        cases=(("attention", "decode, 1 rows, 32768 keys"), ("attention", "decode, 8 rows, 4096 keys")),
        changes=(
            *_each("SPLITS", 8, 16, 64),
            *_each("CHUNK", 128, 512),
            *_each("KEYS", 32),
            *_each("num_warps", 2, 8),
            *_stages(2, 3, 5),
        ),
    ),
    Subject(
        kernel="decode",
        cases=(("attention", "decode, 1 rows, 4096 keys, window 128"),),
        changes=(*_each("KEYS", 16, 32), *_each("num_warps", 2, 8), *_stages(2, 3)),
    ),
    Subject(
        kernel="norm_router",
        cases=(("norm_router", "1 rows"), ("norm_router", "32 rows")),
        changes=(*_each("EXPERTS", 1, 4, 8), *_each("num_warps", 4, 16)),
    ),
    Subject(
        kernel="prefill",
        cases=(("attention", "prefill, 4096 tokens"),),
        changes=(*_each("ROWS", 64), *_each("KEYS", 32), *_each("num_warps", 4), *_stages(2, 4), {"ROWS": 64, "num_warps": 4}),
        seconds=14.0,
    ),
    Subject(
        kernel="gate_up",
        cases=(("moe_dispatch", "1024 tokens"), ("moe_dispatch", "2048 tokens")),
        changes=(*_each("PAIRS", 64, 256), *_each("ROWS", 64, 256), *_each("num_warps", 4), *_stages(2, 4)),
        seconds=16.0,
    ),
    Subject(
        kernel="down",
        cases=(("moe_dispatch", "1024 tokens"), ("moe_dispatch", "2048 tokens")),
        changes=(*_each("PAIRS", 32, 128), *_each("ROWS", 64, 256), *_each("num_warps", 4), *_stages(2, 4)),
        seconds=16.0,
    ),
    Subject(
        kernel="router",
        cases=(("moe_dispatch", "1024 tokens"),),
        changes=(*_each("TOKENS", 32, 64), *_each("SPLITS", 1, 2, 8), *_each("num_warps", 2, 8)),
    ),
    Subject(
        kernel="rotary_store",
        cases=(("rotary_store", "1024 tokens"),),
        changes=(*_each("TOKENS", 4, 8, 32), *_each("HEADS", 2, 8), *_each("num_warps", 2, 8)),
    ),
)


def items() -> Sequence[Item]:
    """Return an item for each kernel and shape class."""
    return [Item(name=_title(subject), seconds=subject.seconds, run=partial(tune, subject=subject)) for subject in SUBJECTS]


def jobs(arch: int) -> Iterator[Job]:
    """Yield what launches each configuration, for `precompile`."""
    for subject in SUBJECTS:
        for change in subject.changes:
            for case in _cases(subject):
                yield partial(_launch_changed, case, subject.kernel, change, arch)


def _launch_changed(case: Case, kernel: str, change: Change, arch: int, wrap: Callable[[Any], Any], device: str) -> None:
    with changed(kernel, change):
        timing.launch(case, arch, wrap, device)


def _title(subject: Subject) -> str:
    return f"{subject.kernel}, {subject.cases[0][1]}"


def _cases(subject: Subject) -> list[Case]:
    """Return the subject's cases. Raises LookupError where the table of timed cases has none of that name."""
    found = []
    for op, name in subject.cases:
        fitting = [case for case in timing.cases() if case.op == op and case.name == name]
        if not fitting:
            raise LookupError(f"There is no timed case {op}: {name}.")
        found.append(fitting[0])
    return found


@contextlib.contextmanager
def changed(
    kernel: str, change: Change, seen: list[tuple[Path, dict[str, Any], tuple[Any, ...]]] | None = None
) -> Iterator[None]:
    """Change what the table says of one kernel while the context is open; note what is asked of the table in `seen`."""
    choose = tuning.choose

    def other(folder: Path, name: str, arch: int, **shape: Any) -> tuning.Config:
        config = choose(folder, name, arch, **shape)
        if name != kernel:
            return config
        if seen is not None:
            seen.append((folder, {**config.keywords}, (arch, shape)))
        keywords = {**config.keywords, **change}
        blocks = {key: value for key, value in keywords.items() if key not in tuning.OPTIONS}
        return tuning.Config(num_warps=keywords["num_warps"], num_stages=keywords["num_stages"], blocks=blocks)

    tuning.choose = other
    try:
        yield
    finally:
        tuning.choose = choose


def tune(lab: Lab, subject: Subject) -> Iterator[Found]:
    """Time the table's configuration and the changes; yield a row for each, and the best as a rule."""
    seen: list[tuple[Path, dict[str, Any], tuple[Any, ...]]] = []
    variants = {case: _variants(lab, case) for case in _cases(subject)}
    with changed(subject.kernel, {}, seen):
        expected = {case: _result(lab, case, args[0]) for case, args in variants.items()}
    if not seen:
        raise LookupError(f"No case of {_title(subject)} asks the table for {subject.kernel}.")
    folder, table_config, asked = seen[0]
    base = _seconds(lab, subject.kernel, {}, variants)
    yield _row(subject, "the table's", table_config, base, base)
    rated: list[tuple[float, Change]] = []
    for change in subject.changes:
        if not change.items() <= table_config.items():
            share = yield from _try(lab, subject, change, table_config, variants, expected, base)
            rated += [(share, change)] if share is not None else []
    better = sorted((pair for pair in rated if pair[0] < GAIN), key=lambda pair: pair[0])
    if len(better) > 1:
        both = {**better[1][1], **better[0][1]}
        share = yield from _try(lab, subject, both, table_config, variants, expected, base)
        better = sorted([*better, *([(share, both)] if share is not None else [])], key=lambda pair: pair[0])
    best = {**table_config, **better[0][1]} if better else table_config
    text = json.dumps(rule(folder, subject.kernel, best, *asked))
    gain = f"{better[0][0]:.1%} of the time" if better else "nothing was faster"
    yield Note(text=f"{folder.name}, {_title(subject)}: {gain}. `{text}`")


def _try(
    lab: Lab,
    subject: Subject,
    change: Change,
    table_config: Mapping[str, Any],
    variants: Mapping[Case, Sequence[Any]],
    expected: Mapping[Case, Sequence[torch.Tensor]],
    base: Mapping[Case, float],
) -> Generator[Found, None, float | None]:
    """Yield the row of one change and return its time as a part of the table's, None where it does not work."""
    told = ", ".join(f"{name} {value}" for name, value in change.items())
    try:
        with changed(subject.kernel, change):
            found = {case: _result(lab, case, args[0]) for case, args in variants.items()}
        wrong = [case for case in variants if not _close(found[case], expected[case])]
        seconds = _seconds(lab, subject.kernel, change, variants)
    except Exception as error:
        if not lab.healthy():
            raise
        yield Row(table=_title(subject), cells={"change": told, "remark": f"{type(error).__name__}: {str(error)[:80]}"})
        return None
    yield _row(subject, told, {**table_config, **change}, seconds, base, "other numbers" if wrong else "")
    return None if wrong else _share(seconds, base)


def _variants(lab: Lab, case: Case) -> list[Any]:
    first = case.args(Maker(lab.device))
    return [first, *(case.args(Maker(lab.device, seed)) for seed in range(1, copies_for(case.cost(first)[0])))]


def _result(lab: Lab, case: Case, args: Any) -> list[torch.Tensor]:
    found = [tensor.clone() for tensor in OPS[case.op].launch(same, args, lab.arch)[:1]]
    torch.cuda.synchronize()
    return found


def _close(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    for one, other in zip(found, expected, strict=True):
        error = (one.double() - other.double()).square().mean().sqrt().item()
        if not error <= SAME_NUMBERS * other.double().square().mean().sqrt().item():
            return False
    return True


def _seconds(lab: Lab, kernel: str, change: Change, variants: Mapping[Case, Sequence[Any]]) -> dict[Case, float]:
    with changed(kernel, change):
        return {
            case: median(captured_times([partial(OPS[case.op].launch, same, a, lab.arch) for a in args], rounds=8)[0])
            for case, args in variants.items()
        }


def _share(seconds: Mapping[Case, float], base: Mapping[Case, float]) -> float:
    """Return the geometric mean of the cases' times as parts of the table's."""
    return math.exp(sum(math.log(seconds[case] / base[case]) for case in base) / len(base))


def _row(
    subject: Subject,
    told: str,
    config: Mapping[str, Any],
    seconds: Mapping[Case, float],
    base: Mapping[Case, float],
    remark: str = "",
) -> Row:
    cells: dict[str, Any] = {"change": told, **{f"{case.name}, µs": 1e6 * value for case, value in seconds.items()}}
    cells["of the table's time"] = _share(seconds, base)
    cells["configuration"] = " ".join(f"{name}={value}" for name, value in config.items())
    return Row(table=_title(subject), cells={**cells, **({"remark": remark} if remark else {})})


def rule(folder: Path, kernel: str, config: Mapping[str, Any], arch: int, shape: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rule to put before the one of the table that decides for this shape: as it, for this arch, with `config`."""
    table = json.loads((folder / tuning.TABLE).read_text("utf-8"))[kernel]
    for old in table:
        where = old.get("where", {})
        if arch in old.get("arch", (arch,)) and all(shape[name] in values for name, values in where.items()):
            return {"arch": [arch], **({"where": where} if where else {}), "config": dict(config)}
    raise LookupError(f"{folder.name} has no rule for {kernel} on sm_{arch} with {shape}.")
