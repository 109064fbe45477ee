"""Measure a finished artifact against the oracle, where this machine can run it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from oxfuse.compiler.golden import GOLDEN
from oxfuse.compiler.report import Parity
from oxfuse.errors import InternalError, UserError
from oxfuse.runtime.artifact import load
from oxfuse.runtime.host import misfits
from oxfuse.runtime.manifest import ONNX, ONNX_CUDA, read_manifest
from oxfuse.runtime.verify import compare_golden, is_lossy

COPIED = 500_000_000
"""Bytes of weights, of which onnxruntime may make copies while an artifact is measured."""
NOT_ROUNDED = (
    "Measured without onnxruntime's copies of the weights, to save memory: what weights of a few bits are multiplied with was "
    "not rounded here. `oxfuse verify` measures with it."
)


def measure(folder: Path) -> Parity:
    """Run the golden tokens through the artifact in `folder` and return its error.

    Raises InternalError if the error is more than the artifact's dtype explains: such an artifact must not be shipped.
    """
    manifest = read_manifest(folder)
    if wrong := misfits(manifest.requirements):
        return Parity(rows=0, reason=f"it does not run here: {'; '.join(wrong)}.")
    if all(program.kind == ONNX for program in manifest.programs) and find_spec("onnxruntime") is None:
        return Parity(rows=0, reason="onnxruntime is not installed here.")
    # A compile holds no copy of large weights; but without one onnxruntime does not round what it multiplies with weights of a
    # few bits, as it does for everybody else.
    lossy, small = is_lossy(manifest), sum(file.bytes for file in manifest.weights) <= COPIED
    try:
        model = load(folder, prepack=lossy and small)
    except UserError as error:
        if all(program.target == ONNX_CUDA for program in manifest.programs):  # a CPU computes some of them, too
            reason = str(error).replace(f"{folder}/", "").rstrip(".")
            return Parity(rows=0, reason=f"it does not run here: {reason}.")
        raise
    found = compare_golden(model, folder / GOLDEN)
    if not found.fits(manifest.model.dtype, lossy):
        raise InternalError(
            f"The artifact's logits differ from the float32 reference by {found.max_error:.2e} at most and {found.rms_error:.2e} "
            f"in the mean, where the reference reaches {found.reference_max:.2e}: more than {manifest.model.dtype} explains. "
            "Please report this with the checkpoint's config.json."
        )
    return Parity(
        rows=found.rows,
        rms=found.rms_error,
        max=found.max_error,
        top1=found.top1_agreement,
        reference_rms=found.reference_rms,
        reference_max=found.reference_max,
        kl=found.kl if manifest.model.task == "text-generation" else None,
        own_rms=None if found.own_weights is None else found.own_weights.rms_error,
        own_max=None if found.own_weights is None else found.own_weights.max_error,
        note=NOT_ROUNDED if lossy and not small else None,
    )
