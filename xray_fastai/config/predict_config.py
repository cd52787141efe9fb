"""Holds the options of `predict`, in Python and on the command line."""

from dataclasses import dataclass

from xray_fastai.config.choices import DEVICES, INFERENCE_PRECISIONS
from xray_fastai.config.setting import check_fields, setting
from xray_fastai.system.errors import OptionError


@dataclass(frozen=True)
class PredictConfig:
    """Holds the options of `predict`, in Python and on the command line.

    Raises:
        OptionError: a value is not allowed, `append` or `resume` lacks `output`, or options exclude each other; the
            error names its option.
    """

    output: str | None = setting(
        None, "Write the rows to this new .csv, .jsonl or .xlsx file.", metavar="FILE", panel="Output"
    )
    append: bool = setting(
        False,
        "Add to output= the files that have no row in it, by path and content; files with an error again.",
        panel="Output",
    )
    provenance: bool = setting(
        False,
        "Columns: sha256 of the file, the model and its sha256, the options, the time. append= has them.",
        panel="Output",
    )
    identifiers: bool = setting(
        False,
        "Columns with StudyInstanceUID, SOPInstanceUID and AccessionNumber of DICOM files: patient data.",
        panel="Output",
    )
    excel: str | None = setting(
        None,
        "Write a .csv file that Excel opens rightly, where its language has a decimal point, or a decimal comma.",
        choices=("point", "comma"),
        panel="Output",
    )
    report: str | None = setting(
        None,
        "Write a page with the pictures by their probability, and those to look at.",
        metavar="FILE.html",
        panel="Output",
    )
    quiet: bool = setting(False, "Print errors and the last line only.", panel="Output")
    log: str | None = setting(None, "Add what is printed to this file, with times.", metavar="FILE", panel="Output")
    resume: bool = setting(
        False, "Continue an interrupted output= over the same inputs in the same order.", panel="Output"
    )
    heatmaps: str | None = setting(
        None, "Write pictures of the heat maps (Grad-CAM) into this folder.", metavar="DIR", panel="Output"
    )
    recursive: bool = setting(False, "Search the subfolders, too.", panel="Images")
    threshold: float | None = setting(
        None, "Decision threshold, a probability. [default: the one that fit chose]", min=0, max=1, panel="Decision"
    )
    gate: bool = setting(True, "Call an image uncertain if it is unlike the training images.", panel="Decision")
    abstain: float = setting(
        0.0,
        "Call an image uncertain if its probability as it is written (with prevalence=, the moved one) is within this "
        "distance of the threshold; for two classes.",
        metavar="WIDTH",
        min=0,
        below=0.5,
        panel="Decision",
    )
    uncalibrated: bool = setting(
        False, "Give the softmax of the network's outputs, without fit's calibration=.", panel="Decision"
    )
    prevalence: float | None = setting(
        None,
        "Share of the class to detect where the images come from, such as 0.03: the probabilities are moved to it. "
        "[default: the one that the export's are set for]",
        metavar="P",
        above=0,
        below=1,
        panel="Decision",
    )
    tta: bool = setting(False, "Test-time augmentation: the mean over five views of an image.", panel="Images")
    batch_size: int = setting(32, "Batch size.", min=1, panel="Machine")
    device: str = setting("auto", f"Device: {', '.join(DEVICES)}.", choices=DEVICES, panel="Machine")
    precision: str = setting(
        "auto",
        f"Precision: {', '.join(INFERENCE_PRECISIONS)}. auto is bf16 if the model was trained in it.",
        choices=INFERENCE_PRECISIONS,
        panel="Machine",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        for option in ("append", "resume"):
            if getattr(self, option) and self.output is None:
                raise OptionError("give the file to continue by output=", option=option)
        if self.append and self.resume:
            raise OptionError("append= continues an interrupted file, too; leave this out", option="resume")
        if self.excel is not None and not (self.output or "").lower().endswith(".csv"):
            raise OptionError("give a .csv file by output=", option="excel", value=self.excel)
        if self.quiet and self.output is None and self.report is None:
            raise OptionError("prints no rows; give a file by output=", option="quiet")
        if self.prevalence is not None and self.uncalibrated:
            raise OptionError(
                "moves the export's probabilities, which uncalibrated= leaves out; leave out one of them",
                option="prevalence",
                value=f"{self.prevalence:g}",
            )
