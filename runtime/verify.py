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
from torch import Tensor

from oxfuse.runtime.artifact import check_files, load
from oxfuse.runtime.errors import UserError
from oxfuse.runtime.manifest import Manifest, read_manifest
from oxfuse.runtime.model import CompiledModel
from oxfuse.runtime.weights import damaged, damaged_weights, hash_weights, map_tensors

FLOAT32_TOLERANCE = 1e-4
"""Largest error of a float32 artifact, relative to the largest logit or 1: the bound of the parity tests."""

COARSE_TOLERANCE = 0.7
"""Largest RMS error in 16 bits, relative to the logits' RMS: unrelated logits have 1.4, zeros 1. It finds broken programs and
judges no rounding, since a router that flips between two near experts changes a whole row: random layers at the 20b shape were
seen at 0.03 to 0.32, where the same programs in float32 agreed to 2e-6."""


LOSSY_TOLERANCE = 0.35
"""Largest RMS error of an artifact that computes with rounded activations, relative to the RMS of what the reference makes of the
artifact's own weights."""


@dataclass(frozen=True, kw_only=True)
class RowsError:
    """An error over rows: of values, of which is largest (0 to 1), and the mean divergence of the rows' softmax from the
    reference's, KL in nats; `reference_rms` and `reference_max` are those of the reference's values.
    """

    rms_error: float
    max_error: float
    reference_rms: float
    reference_max: float
    top1_agreement: float
    kl: float


@dataclass(frozen=True, kw_only=True)
class GoldenError(RowsError):
    """The error over the golden rows.

    `own_weights` is that against what the reference makes of the artifact's weights as they are stored, where those are not the
    checkpoint's: what is left of the error without the loss in the weights.
    """

    tokens: int
    rows: int
    own_weights: RowsError | None = None

    def fits(self, dtype: str, lossy: bool) -> bool:
        """Tell whether the error is what an intact artifact of `dtype` may have; `lossy`: one whose numbers lost more."""
        if lossy:
            own = self.own_weights or self
            return own.rms_error <= LOSSY_TOLERANCE * own.reference_rms
        if dtype == "float32":
            return self.max_error <= FLOAT32_TOLERANCE * max(1.0, self.reference_max)
        return self.rms_error <= COARSE_TOLERANCE * self.reference_rms


def compare_golden(model: CompiledModel, path: Path, on_step: Callable[[], object] | None = None) -> GoldenError:
    """Run the golden tokens and compare the golden rows.

    The file at `path` holds token_ids [T], positions [T], rows [R], all int64, and logits float32 [R, what the model gives]; also
    own_logits, the same of the artifact's own weights, where these are not the checkpoint's. Raises UserError where it does not,
    or not for this model.
    """
    golden = map_tensors(path)
    try:
        tokens, positions, rows, expected = (golden[name] for name in ("token_ids", "positions", "rows", "logits"))
    except KeyError as error:
        raise damaged(path, f"lacks the tensor {error}") from None
    if expected.shape != (len(rows), model.width) or positions.shape != tokens.shape or not len(rows):
        raise damaged(path, f"has logits {list(expected.shape)} for {len(rows)} rows of {model.width} values")
    found = model.row_logits(tokens, positions, rows.tolist(), on_step)
    own = golden.get("own_logits")
    if own is not None and own.shape != expected.shape:
        raise damaged(path, f"has own logits {list(own.shape)} beside logits {list(expected.shape)}")
    return GoldenError(
        tokens=len(tokens),
        rows=len(rows),
        own_weights=None if own is None else rows_error(found, own),
        **asdict(rows_error(found, expected)),
    )


def rows_error(found: Tensor, expected: Tensor) -> RowsError:
    """Return the error of values [R, W] against those of the reference."""
    found, expected = found.double(), expected.double()
    difference, mine, theirs = found - expected, found.log_softmax(-1), expected.log_softmax(-1)
    return RowsError(
        rms_error=float(difference.square().mean().sqrt()),
        max_error=float(difference.abs().max()),
        reference_rms=float(expected.square().mean().sqrt()),
        reference_max=float(expected.abs().max()),
        top1_agreement=float((found.argmax(-1) == expected.argmax(-1)).double().mean()),
        kl=float((theirs.exp() * (theirs - mine)).sum(-1).mean()),
    )


def is_lossy(manifest: Manifest) -> bool:
    """Tell whether the artifact computes with numbers that were rounded beyond its dtype."""
    return any(not told.startswith("exact") for name, told in manifest.numerics.items() if name != "cache")


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
        if not golden.fits(manifest.model.dtype, is_lossy(manifest)):
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
