"""What `predict` writes besides .csv and .jsonl (a workbook, a page, a log), and what it does not read."""

import base64
import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.data.dicom_files import picture, written
from tests.inference.test_append import place
from xray_fastai import DISCLAIMER
from xray_fastai.inference import report as report_module
from xray_fastai.inference.predict import predict
from xray_fastai.inference.report import MARK, Ranked

# what is said


def test_quiet_leaves_errors_and_the_last_line(says, files, export):
    Path("bad.jpeg").write_text("no image")
    result = says(*files[:2], "bad.jpeg", "--output", "out.csv", "--quiet")
    assert result.exit_code == 3
    (line,) = result.stdout.splitlines()
    assert re.fullmatch(rf"out.csv: 3 files by {export.resolve().name}: \d NORMAL, \d PNEUMONIA; errors: 1", line)
    assert result.stderr == "Error: 1 of 3 files could not be read; the column error of out.csv says why\n"
    assert says(*files[:2], "bad.jpeg", "--output", "out.csv", "--append", "--quiet").exit_code == 1


def test_quiet_needs_a_file(says, refused, files):
    refused(says(files[0], "--quiet"), "--quiet: prints no rows; give a file by --output", code=2)


def test_a_log_has_all_lines_with_times(says, files, export):
    Path("bad\x1b.jpeg").write_text("no image")
    Path("night.log").write_text("before\n")
    says(*files[:2], "bad\x1b.jpeg", "--output", "out.csv", "--quiet", "--log", "night.log")
    result = says(*files[:2], "--output", "out.csv", "--log", "night.log")
    assert result.exit_code == 1
    before, *lines = Path("night.log").read_text().splitlines()
    assert before == "before" and all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ \S", line) for line in lines)
    text = [line.partition(" ")[2] for line in lines]
    assert text[0] == DISCLAIMER and f"model         {export}" in text
    assert any(line.startswith("Error: bad\\x1b.jpeg: not an image") for line in text)
    assert "Error: 1 of 3 files could not be read; the column error of out.csv says why" in text
    assert text[-1].startswith("Error: --output out.csv: already exists")  # the second run


def test_a_log_that_cannot_be_written(says, refused, files):
    refused(says(files[0], "--log", "nowhere/night.log"), "--log nowhere/night.log: cannot be written to")


# what is read


def test_what_does_not_exist_is_said_at_once(run, refused):
    refused(run("predict", "nosuch.jpg", "b"), "nosuch.jpg: no such file or folder (and 1 more)")  # there is no export


def test_a_missing_inbox_is_no_success(says, refused, files):
    refused(says(files[0], "inbox", "--append", "--output", "o.csv"), "inbox: no such file or folder")
    assert not Path("o.csv").exists()


def test_its_own_files_are_not_read(says, files):
    place(files[0], "a.jpeg")
    own = ["--output", "inbox/o.csv", "--report", "inbox/r.html", "--log", "inbox/n.log"]
    for _ in range(2):
        names = sorted(map(str, Path("inbox").iterdir()))  # as the shell gives inbox/*
        result = says(*names, *own, "--append")
        assert result.exit_code == 0, result.output
    assert pd.read_csv("inbox/o.csv").path.tolist() == ["inbox/a.jpeg"]


# Excel


@pytest.mark.parametrize(("excel", "separator", "decimal"), [("point", ",", "."), ("comma", ";", ",")])
def test_a_csv_for_excel(excel, separator, decimal, says, refused, files, model):
    shutil.copy(files[3], "ä=1,5;.jpeg")
    inputs = [*files[:3], "ä=1,5;.jpeg"]
    assert says(*inputs[:2], "--output", "out.csv", "--excel", excel).exit_code == 0
    assert says(*inputs, "--output", "out.csv", "--excel", excel, "--resume").exit_code == 0
    assert Path("out.csv").read_bytes().startswith(b"\xef\xbb\xbfpath" + separator.encode() + b"prediction")
    table = pd.read_csv("out.csv", sep=separator, decimal=decimal, encoding="utf-8-sig")
    expected = predict(inputs, model)
    assert table.columns.tolist() == expected.columns.tolist()
    pd.testing.assert_frame_equal(
        table.drop(columns="error"), expected.drop(columns="error"), check_dtype=False, atol=1e-6
    )
    refused(says(*inputs, "--output", "out.csv", "--resume"), "it was written with another --excel; give the same")
    assert says(*inputs, "--output", "a.csv", "--append", "--excel", excel).exit_code == 0
    assert "known         4 files" in says(*inputs, "--output", "a.csv", "--append", "--excel", excel).stdout


def test_excel_is_for_csv(says, refused, files):
    result = says(files[0], "--output", "o.jsonl", "--excel", "comma")
    refused(result, "--excel comma: give a .csv file by --output", code=2)


def test_a_workbook(says, refused, files, model):
    openpyxl = pytest.importorskip("openpyxl")
    shutil.copy(files[3], "=1+1.jpeg")
    Path("bad.jpeg").write_text("no image")
    inputs = [*files[:3], "=1+1.jpeg", "bad.jpeg"]
    assert says(*inputs, "--output", "out.xlsx").exit_code == 3
    sheet = openpyxl.load_workbook("out.xlsx").active
    header, *rows = sheet.iter_rows()
    expected = predict(inputs, model)
    assert [cell.value for cell in header] == expected.columns.tolist()
    for cells, row in zip(rows, expected.itertuples(index=False), strict=True):
        for cell, value in zip(cells, row, strict=True):
            assert cell.value == (
                None if pd.isna(value) else value if isinstance(value, str) else pytest.approx(value, abs=1e-6)
            )
    assert rows[3][0].data_type == "s" and rows[0][2].number_format == "0.0000"
    refused(says(*inputs, "--output", "out.xlsx"), "--output out.xlsx: already exists")
    for option in ("--append", "--resume"):
        refused(says(files[0], "--output", "new.xlsx", option), f"{option}: an .xlsx file cannot be continued")
    assert sorted(p.name for p in Path().iterdir()) == ["=1+1.jpeg", "bad.jpeg", "out.xlsx"]


def test_a_workbook_without_openpyxl(says, refused, files, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    refused(says(files[0], "--output", "o.xlsx"), '--output: needs openpyxl: pip install "xray-fastai[excel]"')


# the page


def sections(page):
    return dict(re.findall(r'<h2 id="(\w+)">(.*?)</section>', page, re.DOTALL))


def test_the_page_of_a_night(says, files):
    Path("<b>bad.jpeg").write_text("no image")
    options = ["--threshold", 0.5, "--abstain", 0.05, "--output", "o.csv", "--report", "r.html"]
    result = says(*files, "<b>bad.jpeg", *options)
    assert result.exit_code == 3 and "report        r.html" in result.stdout
    page, rows = Path("r.html").read_text(), pd.read_csv("o.csv")
    assert DISCLAIMER in page and "<b>bad" not in page and "&lt;b&gt;bad.jpeg" in sections(page)["unreadable"]
    assert "<script" not in page and not re.search(r'(?:src|href)="(?!data:)', page)
    for part, its in (
        ("called", rows[rows.prediction.isin(["NORMAL", "PNEUMONIA"])]),
        ("uncertain", rows[rows.prediction == "uncertain"]),
    ):
        shown = re.findall(r"<b>([\d.]+)</b>", sections(page).get(part, ""))
        assert shown == [f"{p:.4f}" for p in sorted(its.p_PNEUMONIA, reverse=True)]
    uri = re.search(r'src="data:image/jpeg;base64,([^"]+)"', page)[1]
    picture = Image.open(io.BytesIO(base64.b64decode(uri)))
    assert picture.size == Image.open(files[0]).size  # smaller than SIDE: as it is
    before = page
    assert says(files[0], "--report", "r.html").exit_code == 0  # the page of the night before
    assert Path("r.html").read_text() != before


def test_many_images_make_no_large_page(says, files, monkeypatch):
    monkeypatch.setattr(report_module, "MAX_PICTURES", 5)
    monkeypatch.setattr(report_module, "MAX_LINES", 10)
    assert says(*files, "--threshold", 0, "--output", "o.csv", "--report", "r.html").exit_code == 0
    page = Path("r.html").read_text()
    assert page.count("data:image/jpeg") == 5 and "25 more are not on this page; o.csv has them" in page
    best = pd.read_csv("o.csv").sort_values("p_PNEUMONIA", ascending=False).path[5:15]
    assert re.findall(r'<td class="path">(.*?)</td>', page) == best.tolist()


def test_the_highest_are_kept():
    rng = np.random.default_rng(0)
    scores, ranked = rng.integers(0, 20, 200), Ranked(30)
    for number, score in enumerate(scores):
        ranked.add(score, number)
    assert ranked.items() == sorted(range(200), key=lambda n: -scores[n])[:30] and ranked.total == 200


def test_a_page_of_nothing_and_a_file_of_others(says, refused, files):
    Path("inbox").mkdir()
    options = ["--append", "--output", "o.csv", "--report"]
    assert says("inbox", *options, "r.html").exit_code == 0 and "Nothing new" in Path("r.html").read_text()
    Path("mine.html").write_text("<p>mine")
    refused(says(files[0], "--report", "mine.html"), "--report mine.html: already exists, and is no page of predict")
    refused(says(files[0], "--report", "nowhere/r.html"), "there is no folder nowhere")
    assert MARK in Path("r.html").read_text()


# DICOM


def test_identifiers_on_request(says, files, model, an_image):
    Path("a.dcm").write_bytes(
        written(picture(), StudyInstanceUID="1.2.3", SOPInstanceUID="1.2.4", AccessionNumber="=A1")
    )
    options = ["--identifiers", "--output"]
    for output in ("o.csv", "o.jsonl"):
        assert says("a.dcm", an_image, *options, output).exit_code == 0
    names = ["StudyInstanceUID", "SOPInstanceUID", "AccessionNumber"]
    rows = pd.read_csv("o.csv", dtype=str)
    assert rows.columns.tolist()[-3:] == names and rows.loc[1, names].isna().all()
    assert rows.loc[0, names].tolist() == ["1.2.3", "1.2.4", "'=A1"]
    assert json.loads(Path("o.jsonl").read_text().splitlines()[0])["AccessionNumber"] == "=A1"
    assert not set(names) & set(predict("a.dcm", model, provenance=True).columns)
