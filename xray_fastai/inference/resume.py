"""Continues an output file of `predict` whose run was interrupted, over the same inputs in the same order."""

from collections import Counter
from collections.abc import Iterator

from xray_fastai.config.class_names import UNCERTAIN
from xray_fastai.inference.row_file import Row, RowFile
from xray_fastai.inference.rows import RowBuilder, probability_column
from xray_fastai.inference.stream import Source, predict_batches
from xray_fastai.system.errors import UserError

SAME_MODEL = {"fp32": 1e-3, "bf16": 0.05}
"""By precision: the probabilities that one model gives for an image differ by less, on any device and in any batch."""


def skip_done(file: RowFile, sources: Iterator[Source], builder: RowBuilder) -> Counter:
    """Take the inputs off `sources` that have a row in `file`.

    Returns:
        The number of rows by predicted class; the errors are under None, and the uncertain ones under their reasons.

    Raises:
        UserError: the rows belong to other inputs, to another model, or other ones would be uncertain.
    """
    counts, last = Counter(), None
    for number, row in enumerate(file.done(), 1):
        source = next(sources, None)
        if source is None or not file.is_row_of(row, source):
            instead = "there are fewer inputs" if source is None else f"that input is {source}"
            raise UserError(
                f"row {number} of {file.path} is {row['path']}, but {instead}; give the same inputs", option="resume"
            )
        if row["threshold"] != builder.rule.threshold:
            raise UserError(
                f"the threshold in {file.path} is {row['threshold']}, here {builder.rule.threshold}; give the same "
                "model= and threshold=",
                option="resume",
            )
        if row.get("prevalence") != builder.model.prevalence:
            raise UserError(
                f"the prevalence in {file.path} is {row['prevalence']}, here {builder.model.prevalence}; give the same "
                "prevalence=",
                option="resume",
            )
        reason = builder.withheld(row)
        if (row["prediction"] == UNCERTAIN) != (reason is not None):
            raise UserError(
                f"row {number} of {file.path} is {row['prediction']}, and would not be now; give the same options "
                "(gate=False, abstain=)",
                option="resume",
            )
        counts[reason or row["prediction"]] += 1
        last = (source, row) if row["error"] is None else last
    if last is not None:
        _check_same_model(file, *last, builder)
    return counts


def _check_same_model(file: RowFile, source: Source, row: Row, builder: RowBuilder) -> None:
    """Predict the image of a row again and compare the probabilities.

    Raises:
        UserError: they differ by more than one model's probabilities can.
    """
    (batch,) = predict_batches(builder.model, [source], 1, builder.config.tta)
    (again,) = builder.rows(batch)
    if again["error"] is not None:
        return
    names = map(probability_column, builder.model.classes)
    if builder.model.prevalence is not None:  # of a small prevalence all probabilities are alike
        names = [probability_column(builder.model.positive)]
        again, row = ({**r, names[0]: builder.model.moved(r[names[0]], back=True)} for r in (again, row))
    if max(abs(again[name] - row[name]) for name in names) > SAME_MODEL[builder.model.precision]:
        raise UserError(
            f"the rows in {file.path} came from another model, precision= or tta=, or the images changed "
            f"(for {row['path']} the probabilities differ)",
            option="resume",
        )
