"""Read the labels of a table: names of classes, 0 and 1, or lists of findings such as Effusion|Pneumonia."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from xray_fastai.data.classes import is_negative
from xray_fastai.system.errors import UserError
from xray_fastai.system.text import shown

TRUE, FALSE, UNSURE = {"1", "1.0", "true"}, {"0", "0.0", "false"}, {"-1", "-1.0"}
"""Labels of two values, in small letters. -1 is CheXpert's and MIMIC-CXR's mark of an uncertain finding."""
EMPTY, UNCERTAIN, UNKNOWN = "no label", "an uncertain label (-1)", "a label that the model does not know"
"""Why a row has no class."""
MOST_NUMBERS = 20
"""Different numbers that may be names of classes; a column of more, such as of ages, is no label."""


@dataclass(frozen=True)
class Naming:
    """Says what the classes are called."""

    positive: str | None = None  # the class to detect: what 1 means, or one of several findings
    classes: Sequence[str] | None = None  # those of a model; None: the table's own

    @property
    def other(self) -> str:
        """The class of the images without the finding: the model's, else "no FINDING", as they may show another one."""
        if self.classes is not None and self.positive in self.classes and len(self.classes) == 2:
            return next(name for name in self.classes if name != self.positive)
        return f"no {self.positive}"

    @property
    def of_one_finding(self) -> bool:
        """Whether every image without the finding is of the other class."""
        return self.classes is None or set(self.classes) == {self.positive, f"no {self.positive}"}


@dataclass(frozen=True)
class Labels:
    """The classes of the rows (N,); None where a row has none. `left_out` says why, by row: "" where it has one."""

    classes: pd.Series
    left_out: pd.Series
    note: str | None  # on how the labels were read


def is_yes_or_no(texts: pd.Series) -> bool:
    """Return whether all texts that are not empty are two values: 0 and 1, or true and false."""
    values = set(texts.str.lower().unique()) - {""}
    return bool(values) and values <= TRUE | FALSE | UNSURE


def read_labels(texts: pd.Series, header: str, naming: Naming) -> Labels:
    """Find the class of each row.

    Args:
        texts: the label column (N,), without spaces around the texts.
        header: its name.
        naming: what the classes are called.

    Raises:
        UserError: the labels are 0 and 1 or lists of findings, and no class to detect is given; or the column is none
            of labels: it has many numbers, or hardly a row has the label of another.
    """
    if is_yes_or_no(texts):
        return _of_two_values(texts, header, naming)
    findings = texts.map({text: findings_of(text) for text in texts.unique()})
    several = findings.map(len) > 1
    if several.any():
        return _of_findings(texts, findings, header, naming)
    _check_is_label(texts, header, naming)
    return _of_names(findings.map(lambda found: found[0] if found else ""), naming)


def _check_is_label(texts: pd.Series, header: str, naming: Naming) -> None:
    labels = texts[texts != ""].str.casefold()
    counts = labels.value_counts()
    if {name.casefold() for name in naming.classes or ()} & set(counts.index):
        return
    numbers = pd.to_numeric(counts.index.str.replace(",", "."), errors="coerce").notna()
    if numbers.all() and len(counts) > MOST_NUMBERS:
        problem = f"it has {len(counts):,} different numbers"
    elif naming.classes is None and naming.positive is None and len(counts) > max(2, len(labels) / 2):
        problem = f"it has {len(counts):,} different labels in {len(labels):,} rows"
    else:
        return
    examples = ", ".join(shown(text, 30) for text in texts[labels.index].unique()[:3])
    raise UserError(
        f"is this the right column? {problem}, such as {examples}; name another",
        option="column",
        value=f"label={header}",
    )


def findings_of(text: str) -> list[str]:
    """Return the findings in a label: of NIH's form A|B, of PadChest's ['a', 'b'], or one.

    >>> findings_of("Effusion|Pneumonia"), findings_of("['normal']"), findings_of("No Finding")
    (['Effusion', 'Pneumonia'], ['normal'], ['No Finding'])
    """
    if text.startswith("[") and text.endswith("]"):
        return [name.strip(" '\"") for name in text[1:-1].split(",") if name.strip(" '\"")]
    return [name for part in re.split(r"\|", text) if (name := part.strip())]


def _of_two_values(texts: pd.Series, header: str, naming: Naming) -> Labels:
    if naming.positive is None:
        message = f'the labels in column {shown(header)} are 0 and 1; say what 1 means, as in positive="PNEUMONIA"'
        raise UserError(message, option="positive")
    lower = texts.str.lower()
    classes = pd.Series(None, texts.index, dtype=object)
    classes[lower.isin(TRUE)], classes[lower.isin(FALSE)] = naming.positive, naming.other
    left_out = pd.Series("", texts.index).mask(lower.isin(UNSURE), UNCERTAIN).mask(lower == "", EMPTY)
    return Labels(classes, left_out, f"label 1 is {naming.positive}, 0 is {naming.other}")


def _of_findings(texts: pd.Series, findings: pd.Series, header: str, naming: Naming) -> Labels:
    """One finding against all others: an image may show several."""
    if naming.positive is None:
        example = shown(next(text for text, found in zip(texts, findings, strict=True) if len(found) > 1))
        raise UserError(
            f"column {shown(header)} has several findings in a row, such as {example}, and an image has one class "
            'here; name the one to detect, as in positive="Pneumonia": the others become "no Pneumonia"',
            option="positive",
        )
    wanted = naming.positive.casefold()

    def class_of(found: list[str]) -> str | None:
        if any(name.casefold() == wanted for name in found):
            return naming.positive
        return naming.other if naming.of_one_finding or all(map(is_negative, found)) else None

    classes = findings.map(lambda found: class_of(found) if found else None)
    left_out = pd.Series("", texts.index).mask(classes.isna(), UNKNOWN).mask(texts == "", EMPTY)
    note = f"{naming.positive} where it is among the findings of a row, else {naming.other}"
    return Labels(classes, left_out, note)


def _of_names(texts: pd.Series, naming: Naming) -> Labels:
    """One class a row; capitals do not count."""
    counts = texts[texts != ""].value_counts()
    spelled: dict[str, str] = {}
    for name in naming.classes or counts.index:  # the most frequent spelling counts
        spelled.setdefault(name.casefold(), name)
    names = {text: spelled.get(text.casefold()) for text in counts.index}
    if naming.classes is not None and naming.positive is not None and naming.of_one_finding:
        names = {text: name or naming.other for text, name in names.items()}
    classes = texts.map(names | {"": None})
    left_out = pd.Series("", texts.index).mask(classes.isna(), UNKNOWN).mask(texts == "", EMPTY)
    merged = [text for text, name in names.items() if name is not None and text != name]
    note = f"the same class in other capitals: {', '.join(map(shown, sorted(merged)[:3]))}" if merged else None
    return Labels(classes, left_out, None if naming.classes is not None else note)
