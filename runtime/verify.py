"""Checks an artifact on the machine at hand: every weight's hash, and the logits that compile stored from the reference.

The golden file was written by the streamed float32 reference, so its difference from what this machine computes is the artifact's
whole error: fusions, kernels, dtype and hardware.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from oxfuse.runtime.artifact import check_files, load
from oxfuse.runtime.errors import UserError
from oxfuse.runtime.manifest import read_manifest
from oxfuse.runtime.model import CompiledModel
from oxfuse.runtime.weights import damaged, damaged_weights, hash_weights, map_tensors

FLOAT32_TOLERANCE = 1e-4
"""Largest error of a float32 artifact, relative to the largest logit or 1: the bound of the parity tests."""

COARSE_TOLERANCE = 0.7
"""Largest RMS error in 16 bits, relative to the logits' RMS: unrelated logits have 1.4, zeros 1. It finds broken programs and
judges no rounding, since a router that flips between two near experts changes a whole row: random layers at the 20b shape were
seen at 0.03 to 0.32, where the same programs in float32 agreed to 2e-6."""


@dataclass(frozen=True, kw_only=True)
class GoldenError:
    """The error over the golden rows; `reference_rms` and `reference_max` are those of the golden logits."""

    tokens: int
    rows: int
    rms_error: float
    max_error: float
    reference_rms: float
    reference_max: float
    top1_agreement: float

    def fits(self, dtype: str) -> bool:
        """Tell whether the error is what an intact artifact of `dtype` may have."""
        if dtype == "float32":
            return self.max_error <= FLOAT32_TOLERANCE * max(1.0, self.reference_max)
        return self.rms_error <= COARSE_TOLERANCE * self.reference_rms


def compare_golden(model: CompiledModel, path: Path, on_step: Callable[[], object] | None = None) -> GoldenError:
    """Run the golden tokens and compare the golden rows.

    The file at `path` holds token_ids [T], positions [T], rows [R], all int64, and logits float32 [R, what the model gives].
    Raises UserError where it does not, or not for this model.
    """
    golden = map_tensors(path)
    try:
        tokens, positions, rows, expected = (golden[name] for name in ("token_ids", "positions", "rows", "logits"))
    except KeyError as error:
        raise damaged(path, f"lacks the tensor {error}") from None
    if expected.shape != (len(rows), model.width) or positions.shape != tokens.shape or not len(rows):
        raise damaged(path, f"has logits {list(expected.shape)} for {len(rows)} rows of {model.width} values")
    found = model.row_logits(tokens, positions, rows.tolist(), on_step)
    difference = found.double() - expected.double()
    return GoldenError(
        tokens=len(tokens),
        rows=len(rows),
        rms_error=float(difference.square().mean().sqrt()),
        max_error=float(difference.abs().max()),
        reference_rms=float(expected.double().square().mean().sqrt()),
        reference_max=float(expected.abs().max()),
        top1_agreement=float((found.argmax(-1) == expected.argmax(-1)).double().mean()),
    )


def verify_artifact(
    path: str | Path, *, threads: int | None = None, progress: Callable[[str, float | None], object] | None = None
) -> dict[str, Any]:
    """Check all hashes, run the golden tokens and return what was found, as plain JSON.

    Keys: `artifact`; `ok`; `weights` with `tensors`, `bytes` and the names in `damaged`; `golden`, the fields of GoldenError or
    None without a golden file or with damaged weights; `problems`, one line each; `torch` and `threads`. `progress` gets the
    name of a phase, with None when it begins and the part done (0 to 1) where that is known. Raises UserError where the artifact
    cannot be loaded at all.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    report = progress or (lambda phase, done: None)
    total, hashed = max(1, sum(file.bytes for file in manifest.weights)), 0

    def on_hashed(count: int) -> None:
        nonlocal hashed
        hashed += count
        report("hash weights", min(1.0, hashed / total))

    report("check programs", None)
    check_files(folder, manifest)
    report("hash weights", None)
    wrong = [name for file in manifest.weights for name in damaged_weights(file, hash_weights(folder, file, on_hashed))]
    problems = [f"the weight {name} has other values than were compiled: copy the artifact again" for name in wrong]
    golden = None
    if manifest.golden and not wrong:
        report("compare logits", None)
        model = load(folder, threads=threads)
        golden = compare_golden(model, folder / manifest.golden)
        if not golden.fits(manifest.model.dtype):
            problems.append(
                f"the logits differ from the reference by {golden.max_error:.2e} at most and {golden.rms_error:.2e} in the mean "
                f"(reference {golden.reference_max:.2e}, {golden.reference_rms:.2e}), more than {manifest.model.dtype} explains: "
                "compile the checkpoint again on this machine, and report the fault if it stays"
            )
    return {
        "artifact": str(folder),
        "ok": not problems,
        "weights": {
            "tensors": sum(len(file.tensors) for file in manifest.weights),
            "bytes": sum(file.bytes for file in manifest.weights),
            "damaged": wrong,
        },
        "golden": asdict(golden) if golden else None,
        "problems": problems,
        "torch": torch.__version__,
        "threads": threads or torch.get_num_threads(),
    }


def require_ok(result: dict[str, Any]) -> None:
    """Raise UserError with the problems that `verify_artifact` found, if any."""
    if result["problems"]:
        raise UserError(f"{result['artifact']} did not pass: {'; '.join(result['problems'][:3])}.")
