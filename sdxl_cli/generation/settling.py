"""What a model's U-Net predicts, and at which noise levels: what its file says, unless the user knows better."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from sdxl_cli.checkpoint.files import ModelFiles
from sdxl_cli.checkpoint.identify import Prediction
from sdxl_cli.errors import UsageError

if TYPE_CHECKING:
    from sdxl_cli.generation.pipeline import Reporter


def settled(
    files: ModelFiles,
    report: Reporter,
    *,
    prediction: Literal["auto", "eps", "v", "x0"] = "auto",
    usual: Prediction | None = None,
    zero_terminal_snr: bool | None = None,
) -> ModelFiles:
    """The same files, with the prediction type and the terminal SNR that will be used.

    As in ComfyUI, the mark for zero terminal SNR counts only where the noise is not what is predicted.

    Args:
        files: what is known of the model.
        report: is told when either is not SDXL's own.
        prediction: what the user says; ``auto`` follows the file.
        usual: what such a model predicts, where the file says nothing that is not SDXL's own.
        zero_terminal_snr: what the user says; None follows the file.

    Raises:
        UsageError: zero terminal SNR was asked of a model that predicts the noise.
    """
    stated = files.identity
    known = usual if usual is not None and stated.prediction == "eps" else stated.prediction
    said = known if prediction == "auto" else prediction
    zero = zero_terminal_snr
    if zero and said == "eps":
        raise UsageError(
            f"--zero-terminal-snr: {files.name} predicts the noise, which says nothing about the picture where all "
            "is noise; give --prediction v if that is wrong"
        )
    if zero is None:
        zero = stated.zero_terminal_snr and said != "eps"
        if stated.zero_terminal_snr and not zero:
            report.warn(
                f"{files.name} is marked as trained down to pure noise, but predicts the noise; the mark is not "
                "followed (give --prediction v if it is a v model)"
            )
    if (said, zero) != ("eps", False):
        report.note(
            f"{files.name} predicts {said}{', down to pure noise (zero terminal SNR)' if zero else ''}"
        )
    return replace(files, identity=replace(stated, prediction=said, zero_terminal_snr=zero))
