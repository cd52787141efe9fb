"""Broken and hostile exports are refused in one line, by `verify` and by the commands that load an export."""

import contextlib
import json
import os
import pickle
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save

from tests.conftest import draw_collection, settings_of
from xray_fastai import load_learner, verify
from xray_fastai.config.choices import MAX_MEMBERS
from xray_fastai.config.class_names import class_fault
from xray_fastai.config.fit_config import FitConfig
from xray_fastai.system.errors import UserError
from xray_fastai.system.files import sha256

SETTINGS, WEIGHTS = "model.json", "model.safetensors"
NAME = "0.0.weight"  # the first convolution, (8, 3, 7, 7)


@pytest.fixture
def copy(export, tmp_path):
    """Copy the two files that a model needs, as others would send them."""
    folder = tmp_path / "sent"
    folder.mkdir()
    shutil.copy(export / SETTINGS, folder)
    os.link(export / WEIGHTS, folder / WEIGHTS)
    return folder


@pytest.fixture
def refuse(copy, run, refused, an_image):
    """Check that `verify` and `predict` refuse the copy, and `load_learner` too."""

    def refuse(*words):
        refused(run("verify", copy), *words)
        refused(run("predict", an_image, "--model", copy), *words)
        with pytest.raises(UserError):
            load_learner(copy)

    return refuse


def put_weights(folder, content, hashed=True):
    """Replace the weights, and by default the hash in `model.json` too."""
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).write_bytes(content)
    if hashed:
        change(folder, lambda model: model["weights"].update(sha256=sha256(folder / WEIGHTS)))


def change(folder, edit):
    model = settings_of(folder)
    edit(model)
    (folder / SETTINGS).write_text(json.dumps(model))


def put_header(folder, edit):
    """Change the header of the weights, and keep the bytes of the tensors."""
    content = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    text = edit(header)
    text = (json.dumps(header) if text is None else text).encode()
    put_weights(folder, struct.pack("<Q", len(text)) + text + content[8 + size :])


def put_tensors(folder, edit):
    tensors = load((folder / WEIGHTS).read_bytes())
    edit(tensors)
    put_weights(folder, save(tensors))


def test_a_good_export_is_verified(export, run):
    result = run("verify", export)
    assert result.exit_code == 0 and not result.stderr
    lines = {line.split()[0]: line for line in result.output.splitlines()}
    assert "ok: small_resnet, 32 x 32 px, 2 classes (NORMAL, PNEUMONIA), complete" in lines["model.json"]
    assert "ok: 74 tensors, 0.3 MB" in lines["model.safetensors"] and "ok: 2 epochs" in lines["history.csv"]
    assert "UNSAFE" in lines["learner.pkl"] and "verdict             good" in result.output
    assert verify(export).ok


def test_two_files_are_enough(copy, run):
    result = run("verify", copy)
    assert result.exit_code == 0 and "verdict             good" in result.output
    assert "UNSAFE" not in result.output


WEIGHTS_FAULTS = {
    "truncated": (lambda f: put_weights(f, (f / WEIGHTS).read_bytes()[:-1000]), ["incomplete, or not the weights of"]),
    "nearly nothing": (lambda f: put_weights(f, b"1234567"), ["header is incomplete"]),
    "empty": (lambda f: put_weights(f, b""), ["header is incomplete"]),
    "a bit flipped": (
        lambda f: put_weights(f, (f / WEIGHTS).read_bytes()[:-1] + b"\x01", hashed=False),
        ["its SHA-256 is not the one in model.json"],
    ),
    "another hash": (lambda f: change(f, lambda m: m["weights"].update(sha256="0" * 64)), ["its SHA-256"]),
    "shapes swapped": (
        lambda f: put_header(f, lambda h: h[NAME].update(shape=[3, 8, 7, 7])),
        [f"{NAME} is F32 [3, 8, 7, 7] instead of F32 [8, 3, 7, 7]"],
    ),
    "a tensor missing": (lambda f: put_tensors(f, lambda t: t.pop(NAME)), ["not the weights of small_resnet"]),
    "a tensor of another name": (
        lambda f: put_header(f, lambda h: h.update({"other": h.pop(NAME)})),
        [f"1 missing tensor: {NAME}"],
    ),
    "a tensor too many": (
        lambda f: put_tensors(f, lambda t: t.update(evil=torch.zeros(0))),
        ["1 unknown tensor: evil"],
    ),
    "a large tensor too many": (
        lambda f: put_tensors(f, lambda t: t.update(evil=torch.zeros(9999))),
        ["not the weights of small_resnet"],
    ),
    "another type": (lambda f: put_header(f, lambda h: h[NAME].update(dtype="I32")), [f"{NAME} is I32"]),
    "a type of no kind": (lambda f: put_header(f, lambda h: h[NAME].update(dtype=["F32"])), [f"{NAME} is ['F32']"]),
    "half precision": (
        lambda f: put_tensors(f, lambda t: t.update({NAME: t[NAME].half()})),
        ["not the weights of small_resnet"],
    ),
    "a header longer than the file": (
        lambda f: put_weights(f, struct.pack("<Q", 2**63) + (f / WEIGHTS).read_bytes()[8:]),
        ["header is incomplete, or longer"],
    ),
    "a header of no JSON": (lambda f: put_header(f, lambda h: "{" * 9999), ["its header is damaged"]),
    "a header nested deeply": (lambda f: put_header(f, lambda h: "[" * 9999 + "]" * 9999), ["header is damaged"]),
    "a header of many lists": (
        lambda f: put_header(f, lambda h: '{"a": [' + "[]," * 300_000 + "[]]}"),
        ["its header is damaged (more lists and objects than its tensors have)"],
    ),
    "a header of a list": (lambda f: put_header(f, lambda h: "[1, 2]"), ["its header is damaged"]),
    "offsets beyond the file": (
        lambda f: put_header(f, lambda h: h[NAME].update(data_offsets=[2**40, 2**40 + 4704])),
        ["damaged: Error while deserializing"],
    ),
    "negative offsets": (lambda f: put_header(f, lambda h: h[NAME].update(data_offsets=[-4, 8])), ["damaged:"]),
    "overlapping tensors": (
        lambda f: put_header(f, lambda h: h["0.1.bias"].update(data_offsets=h["0.1.weight"]["data_offsets"])),
        ["damaged: Error while deserializing"],
    ),
    "not a number": (lambda f: put_tensors(f, lambda t: t[NAME][5, 1].fill_(np.nan)), [f"{NAME} holds values"]),
    "infinite": (
        lambda f: put_tensors(f, lambda t: t["1.3.bias"].copy_(torch.tensor([1, -np.inf]))),
        ["1.3.bias holds"],
    ),
}


@pytest.mark.parametrize(("spoil", "words"), WEIGHTS_FAULTS.values(), ids=WEIGHTS_FAULTS)
def test_weights_that_are_none(spoil, words, copy, refuse):
    spoil(copy)
    refuse(copy / WEIGHTS, *words)


BOMB = b'{"format": 1, "bomb": [' + b"[]," * 2_600_000 + b"[]]}"
RAW_FAULTS = {
    "empty": (b"", "Expecting value"),
    "a list": (b"[]", "damaged: should be an object"),
    "too large": (b" " * 9_000_000, "bytes, more than the 8,000,000"),
    "a bomb of lists": (BOMB, "objects and lists, more than 10,000"),
    "nested too deeply": (b'{"a":' * 5000 + b"1" + b"}" * 5000, "damaged"),  # Python 3.13 reads it
    "nested deeply": (b'{"a":' * 300 + b"1" + b"}" * 300, "damaged"),
    "not UTF-8": (b'{"format": "\xff"}', "can't decode byte 0xff"),
    "UTF-16": ('{"format": 1}'.encode("utf-16"), "can't decode"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "BOM"),
    "zero bytes": (b"\0" * 100, "Expecting value"),
    "NaN": (b'{"format": 1, "temperature": NaN}', "NaN is not JSON"),
    "Infinity": (b'{"format": 1, "temperature": -Infinity}', "-Infinity is not JSON"),
    "a key twice": (b'{"format": 1, "format": 1}', "the key format appears twice"),
    "a number of 5,000 digits": (b'{"format": ' + b"9" * 5000 + b"}", "damaged"),
    "a newer version": (b'{"format": 2}', "written by a newer version (format 2); update xray-fastai"),
}


@pytest.mark.parametrize(("content", "words"), RAW_FAULTS.values(), ids=RAW_FAULTS)
def test_a_model_json_that_is_none(content, words, copy, refuse):
    (copy / SETTINGS).write_bytes(content)
    refuse(copy / SETTINGS, words)


MEMBER = {
    "member": 1, "seed": 42, "train": 30, "valid": 10, "seconds": 1.0, "phases": [],
    "best": {"phase": "frozen", "epoch": 1, "train_loss": 0.5, "valid_loss": 0.5, "accuracy": 0.9, "roc_auc": 0.9,
             "lr": 0.001},
    "roc_auc": [0.9, None, None], "balanced_accuracy": [0.9, None, None],
}  # fmt: skip
VALUE_FAULTS = {  # by JSON path: a value, and what is said of it
    "format": [(0, "greater than or equal to 1"), (True, "valid integer"), ("1", "valid integer")],
    "created": [("yesterday", "Invalid isoformat")],
    "status": [("sound", "complete")],
    "architecture": [
        ("vit_b_16", "resnet18"),
        (["resnet18"], "resnet18"),
        ("timm/hf-hub:someone/model", "is none of"),
        ("timm/resnet10t", "backbone: missing"),
    ],
    "backbone": [
        ({"features": 64, "tensors": {"0.0.a": [1]}}, "whose tensors are known"),
        ({"features": 64, "tensors": {"0.0.a": [0]}}, "greater than or equal to 1"),
        ({"features": 64, "tensors": {f"{i}": [1] for i in range(5001)}}, "5,001 entries, more than 5,000"),
    ],
    "classes": [
        (["A"], "at least 2 items"),
        (["NORMAL", "NORMAL"], "appears twice"),
        (["NORMAL", ""], "is empty"),
        (["NORMAL", "a/b"], "slash"),
        (["NORMAL", "\x1b[2J"], "unprintable character '\\x1b'"),
        (["NORMAL", "\ud800"], ""),
        (["NORMAL", "x" * 300], "300 characters"),
        ([f"c{i}" for i in range(2000)], "at most 1000 items"),
        ({"NORMAL": 1}, "should be a list"),
    ],
    "positive": [
        ("COVID", "COVID is none of the classes"),
        (None, "two classes need the class to detect"),
        (1, "valid string"),
    ],
    "dropout": [(1, "less than 1"), (-0.5, "greater than or equal to 0")],
    "class_weights": [([1.0], "1 for 2 classes"), ([1.0, -1.0], "greater than 0"), ([10**400, 1], "")],
    "preprocessing.size": [(10**6, "less than or equal to 4096"), (8, "equal to 32"), (64.5, "integer")],
    "preprocessing.channels": [("rgb", "grey")],
    "temperature": [(0, "greater than or equal to 0.001"), (-1, "greater"), ("1", "number"), (10**400, "")],
    "threshold": [(2, "less than or equal to 1"), (None, "two classes need"), (True, "number")],
    "calibration": [(None, "string"), ("two\nlines", "unprintable character '\\n'"), ("x" * 5000, "5,000 characters")],
    "data": [([], "an object")],
    "data.name": [("x\u202ey", "unprintable"), (3, "string")],
    "data.rehearsal": [("no", "boolean"), (None, "boolean")],
    "data.train": [({"COVID": 3}, "none of the classes"), ({f"c{i}": 1 for i in range(2000)}, "2,000 entries")],
    "data.valid.NORMAL": [(-1, "equal to 0"), (1.5, "integer")],
    "data.valid_files": [([["a"]], "string"), (["../../etc/pas"], "pattern"), (None, "should be a list")],
    "data.contents": [({}, "data.contents.salt: field required"), ("x", "an object")],
    "data.contents.salt": [("xyz", "pattern"), ("00" * 8000, "pattern")],
    "data.contents.train": [("AAAA", "pattern"), ("AAAAAAA=", "pattern"), (["AAAAAAAA"], "string")],
    "settings.data": [(None, "which is for a rehearsal only"), ("a\0b", "unprintable"), (["a"], "string")],
    "settings.patient_pattern": [(3, "string"), ("x" * 5000, "5,000 characters")],
    "settings.lr": [(-1, "settings: lr -1: ")],
    "settings.epochs": [("all", "integer")],
    "training.phases": [([{}], "training.phases[0].name: field required"), (["a"], "object")],
    "training.seconds": [(-1, "equal to 0")],
    "calibrated": [("yes", "boolean"), (1, "boolean")],
    "calibration_kind": [
        ("best", "'cautious', 'validation', 'local', 'matched', 'earlier' or 'none'"),
        (1, "'cautious'"),
    ],
    "intercepts": [([1.0], "1 for 2 classes"), ([0.5, "1"], "number"), ([1e4, 0.0], "1000"), ({"NORMAL": 1}, "a list")],
    "augmentation": [([15], "an object"), ({"max_rotate": "15"}, "number"), ({"max_rotate": 10**400}, "")],
    "best.valid_loss": [("low", "number")],
    "versions": [({"torch": 2}, "versions.torch"), ({f"v{i}": "1" for i in range(2000)}, "2,000 entries")],
    "ensemble": [
        ([], "an object"),
        ({"outputs": "all"}, "ensemble.outputs: input should be 'out of fold' or"),
        ({"outputs": "validation", "planned": MAX_MEMBERS + 1}, "ensemble.planned: input should be less than or equal"),
        ({"outputs": "validation", "planned": 1}, "ensemble.planned: input should be greater than or equal to 2"),
    ],
    "training.members": [
        ([{}], "training.members[0].member: field"),
        ([{"member": 21}], "equal to 20"),
        ([MEMBER] * (MAX_MEMBERS + 1), "training.members: list should have at most 20 items"),
    ],
    "weights.file": [("../sent/model.safetensors", "'model.safetensors'"), ("/etc/passwd", "'model.safetensors'")],
    "scores": [
        ({"NORMAL": [0.0] * 101}, "not of two classes"),
        ({"NORMAL": [0.0], "PNEUMONIA": [0.0]}, "at least 101"),
    ],
    "scores.PNEUMONIA": [([float(-i) for i in range(101)], "quantiles that fall"), ([0.0] * 102, "at most 101")],
    "weights.sha256": [("0", "pattern"), (None, "string")],
}


def set_at(model, path, value):
    *parents, last = path.split(".")
    for name in parents:
        model = model[name]
    model[last] = value


@pytest.mark.parametrize("path", VALUE_FAULTS)
def test_a_value_that_can_not_be(path, copy, run, refused, refuse):
    good = (copy / SETTINGS).read_text()
    for value, words in VALUE_FAULTS[path]:
        (copy / SETTINGS).write_text(good)
        change(copy, lambda model, value=value: set_at(model, path, value))
        refused(run("verify", copy), copy / SETTINGS, "damaged: ", words)
    refuse(copy / SETTINGS, words)


def test_each_key_is_needed(copy, run, refused):
    """Except those that exports of earlier versions lack."""
    model = settings_of(copy)
    later = [("preprocessing", "contrast"), ("worst_group",), ("calibrated",), ("augmentation",)]
    tables = ("settings", "versions", "train", "valid", "augmentation", "called", "scores", "known_by")
    later += [
        ("data", "patients", "images_without"),
        ("data", "patients", "known_by"),
        ("data", "contents"),
        ("called",),
        ("scores",),
    ]
    later += [("intercepts",), ("prior",), ("calibration_kind",), ("lineage",), ("by_hand",), ("gate",), ("backbone",)]
    later += [("worst_group", "groups"), ("worst_group", "expected")]

    def paths(node, above=()):
        for key, value in node.items():
            if (*above, key) not in later:
                yield (*above, key)
            if isinstance(value, dict) and key not in tables:
                yield from paths(value, (*above, key))

    for *parents, last in paths(model):
        lacking = json.loads(json.dumps(model))
        node = lacking
        for name in parents:
            node = node[name]
        del node[last]
        (copy / SETTINGS).write_text(json.dumps(lacking))
        refused(run("verify", copy), f"{'.'.join([*parents, last])}: field required")


def test_an_earlier_version_had_fewer_settings(copy, run):
    change(copy, lambda model: model.update(settings={"data": "x", "patient_pattern": None}))
    assert run("verify", copy).exit_code == 0


def test_keys_of_a_newer_version_are_told_of_once(copy, run, an_image):
    def newer(model):
        model["\x1b[2Jsafety"] = {"deep": [1, 2]}
        model["data"]["hospital"] = "St. Elsewhere"
        model["training"]["phases"][0]["energy"] = 3
        model["settings"]["optimiser"] = "lion"

    change(copy, newer)
    result = run("predict", an_image, "--model", copy)
    assert result.exit_code == 0
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"Warning: {copy / SETTINGS}: \\x1b[2Jsafety, data.hospital, settings.optimiser, ...")
    result = run("verify", copy)
    assert result.exit_code == 0 and "ignored: \\x1b[2Jsafety, data.hospital" in result.output


def test_what_a_fit_writes_has_no_unknown_keys(export, run, an_image):
    assert not run("predict", an_image, "--model", export).stderr


@pytest.mark.slow
def test_memory_is_bounded_before_it_is_taken():
    """8 MB of the JSON that grows most are parsed in 250 MB more than the module itself takes."""
    resource = pytest.importorskip("resource")
    if not hasattr(resource, "RLIMIT_AS") or not Path("/proc/self/statm").exists():
        pytest.skip("the limit on memory is Linux's")
    script = """
import resource, sys
from pathlib import Path
from xray_fastai.system.errors import UserError
from xray_fastai.export.model_json import LIMIT, parse

held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 250_000_000,) * 2)
for start, item, end in [
    ('{"a": [', "[],", "0]}"), ('{"a": [', "{},", "0]}"), ('{"a": [', "1.5,", "0]}"), ('{"a": [', '"ab",', "0]}"),
    ('{"data": {"valid_files": [', '"a",', "0]}}"), ('{"classes": [', '"a",', "0]}"), ('{"a": "', "x", '"}'),
]:
    text = start + item * ((LIMIT - 50) // len(item)) + end
    try:
        parse(text.encode(), Path("model.json"))
    except UserError as error:
        print(str(error)[:80])
text = "{" + ",".join(f'"{i}":0' for i in range(700_000)) + "}"
for text in (text, '{"data": {"train": ' + text + "}}"):
    try:
        parse(text.encode(), Path("model.json"))
    except UserError as error:
        print(str(error)[:80])
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 9


def test_links_and_pipes_are_not_followed(copy, refuse, tmp_path):
    (tmp_path / "elsewhere").write_bytes((copy / SETTINGS).read_bytes())
    (copy / SETTINGS).unlink()
    (copy / SETTINGS).symlink_to(tmp_path / "elsewhere")
    refuse(copy / SETTINGS, "a link to outside of")
    (copy / SETTINGS).unlink()
    os.mkfifo(copy / SETTINGS)
    refuse(copy / SETTINGS, "not a plain file")
    (copy / SETTINGS).unlink()
    (copy / SETTINGS).mkdir()
    refuse(copy / SETTINGS, "not a plain file")


def test_weights_elsewhere_are_not_followed(copy, refuse):
    (copy / WEIGHTS).unlink()
    (copy / WEIGHTS).symlink_to("/dev/zero")
    refuse(copy / WEIGHTS, "a link to outside of")
    (copy / WEIGHTS).unlink()
    os.mkfifo(copy / WEIGHTS)
    refuse(copy / WEIGHTS, "not a plain file")


def test_a_link_within_the_export_is_one(copy, run):
    (copy / WEIGHTS).rename(copy / "of-epoch-3.safetensors")
    (copy / WEIGHTS).symlink_to("of-epoch-3.safetensors")
    assert run("verify", copy).exit_code == 0


def test_other_files_are_looked_at(copy, run, refused):
    (copy / "history.csv").write_text("phase,epoch\nfrozen,1\n")
    refused(run("verify", copy), "history.csv: line 2 has no train_loss")
    (copy / "history.csv").write_text("phase,epoch,train_loss,valid_loss,accuracy,roc_auc,lr\nfrozen,1,,low,1,1,1\n")
    refused(run("verify", copy), "history.csv: damaged: could not convert string to float: 'low'")
    (copy / "history.csv").write_bytes(b"\xff\xfe")
    refused(run("verify", copy), "history.csv: damaged")
    (copy / "history.csv").unlink()
    (copy / "batch.png").symlink_to("/etc/hostname")
    refused(run("verify", copy), "batch.png: a link to outside of the export")
    (copy / "batch.png").unlink()
    os.mkfifo(copy / "batch.png")
    refused(run("verify", copy), "batch.png: neither a file nor a folder")


@pytest.mark.parametrize("what", ["nothing", "an empty folder", "no weights", "a text"])
def test_no_export(what, run, refused, tmp_path):
    path = tmp_path / "x"
    if what == "a text":
        path.write_text("hello")
        return refused(run("verify", path), "not a .zip archive")
    if what != "nothing":
        path.mkdir()
    if what == "no weights":
        (path / SETTINGS).write_text("{}")
    refused(run("verify", path), "no such file" if what == "nothing" else ": missing; get the export again", path)


OPENED: list[str] = []
"""The files that were opened while `watched`; an audit hook cannot be removed."""
_watching = False


@contextlib.contextmanager
def watched():
    global _watching
    OPENED.clear()
    _watching = True
    try:
        yield OPENED
    finally:
        _watching = False


def _hook(event, args):
    if _watching and event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
        OPENED.append(os.fsdecode(args[0]))


sys.addaudithook(_hook)


@pytest.mark.slow
def test_no_command_opens_a_pickle_and_each_reads_the_weights_once(copy, run, an_image, tmp_path):
    mark = tmp_path / "mark"

    class Hostile:
        def __reduce__(self):
            return open, (str(mark), "w")

    (copy / "learner.pkl").write_bytes(pickle.dumps(Hostile()))
    data = draw_collection(tmp_path / "data", {"test/NORMAL": 2, "test/PNEUMONIA": 2})
    commands = [
        ("verify", copy),
        ("predict", an_image, "--model", copy),
        ("evaluate", "--model", copy, "--data", data),
        ("interpret", "--model", copy, "--data", data, "--split", "test"),
    ]
    for command in commands:
        with watched() as opened:
            result = run(*command)
        assert result.exit_code == 0, result.output
        assert not [path for path in opened if path.endswith(".pkl")]
        assert len([path for path in opened if path.endswith(WEIGHTS)]) == 1, command
    with watched() as opened:
        load_learner(copy)
    assert len([path for path in opened if path.endswith(WEIGHTS)]) == 1
    assert not mark.exists()
    pickle.loads((copy / "learner.pkl").read_bytes())  # noqa: S301  (it would have run)
    assert mark.exists()


@pytest.fixture
def archive(copy, tmp_path, monkeypatch):
    """Make a changed .zip of the copy; files are unpacked into a temporary folder, which is empty at the end."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))

    def archive(edit=lambda opened: None, inside="sent/", **kwargs):
        path = tmp_path / "sent.zip"
        with zipfile.ZipFile(path, "w", **kwargs) as opened:
            for file in sorted(copy.iterdir()):
                opened.write(file, f"{inside}{file.name}")
            edit(opened)
        return path

    yield archive
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("inside", "method"),
    [("", zipfile.ZIP_STORED), ("sent/", zipfile.ZIP_DEFLATED), ("exports/sent/", zipfile.ZIP_STORED)],
)
def test_an_archive_is_verified(inside, method, archive, copy, run):
    (copy / "learner.pkl").write_bytes(b"")
    path = archive(inside=inside, compression=method, compresslevel=1)
    with watched() as opened:
        result = run("verify", path)
    assert result.exit_code == 0, result.output
    assert "learner.pkl         UNSAFE" in result.output and "verdict             good" in result.output
    assert not [name for name in opened if name.endswith(".pkl")]


def test_a_broken_export_in_an_archive_is_refused(archive, copy, run, refused):
    change(copy, lambda model: model.update(temperature=0))
    refused(run("verify", archive()), "sent.zip:sent/model.json: damaged: temperature")


def test_an_archive_is_not_loaded(archive, run, refused, an_image):
    path = archive()
    refused(run("predict", an_image, "--model", path), "an archive", f"xray-fastai verify {path}", "unpack it")


def entry(name, content=b"evil", mode=0, flags=0):
    def add(opened):
        info = zipfile.ZipInfo("x")
        info.filename, info.external_attr = name, mode << 16
        opened.writestr(info, content)

    return add


ARCHIVE_FAULTS = {
    "a name that climbs": (entry("../evil"), "a name that leaves the folder"),
    "a name that climbs later": (entry("sent/a/../../../evil"), "a name that leaves the folder"),
    "an absolute name": (entry("/tmp/evil"), "a name that leaves the folder"),
    "a drive": (entry("C:evil"), "a name that leaves the folder"),
    "backslashes": (entry("..\\evil"), "a name that leaves the folder"),
    "a zero byte": (entry("sent/history.csv\0.png"), "an unprintable name"),
    "an escape": (entry("sent/\x1b[2J"), "an unprintable name"),
    "a link": (entry("sent/history.csv", b"/etc/passwd", stat.S_IFLNK | 0o777), "a link or a device"),
    "one name twice": (entry("sent/MODEL.json"), "two files of one name"),
    "two exports": (entry("other/model.json"), "2 exports in it"),
    "a bomb": (lambda o: o.writestr("sent/a", bytes(200_000_000), zipfile.ZIP_DEFLATED, 9), "a bomb"),
    "another method": (lambda o: o.writestr("sent/a", b"a", zipfile.ZIP_LZMA), "packed by method 14"),
    "many files": (lambda o: [o.writestr(f"sent/{i}", b"") for i in range(20_000)], "more files than"),
    "very many files": (lambda o: [o.writestr(f"{i}", b"") for i in range(66_000)], "more files than"),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(("edit", "words"), ARCHIVE_FAULTS.values(), ids=ARCHIVE_FAULTS)
def test_an_archive_that_would_do_harm(edit, words, archive, run, refused, tmp_path):
    path = archive(edit)
    before = sorted(tmp_path.rglob("*"))
    refused(run("verify", path), "sent.zip: ", words)
    assert sorted(tmp_path.rglob("*")) == before and not Path("/tmp/evil").exists()


def test_an_archive_that_lies_of_its_sizes(archive, run, refused):
    path = archive(lambda opened: opened.writestr("sent/history.csv", b"x" * 5000, zipfile.ZIP_DEFLATED))
    content = path.read_bytes()
    path.write_bytes(content.replace(struct.pack("<I", 5000), struct.pack("<I", 50)))
    refused(run("verify", path), "a damaged archive", "CRC")
    path.write_bytes(content.replace(struct.pack("<I", 5000), struct.pack("<I", 2_000_000_000)))
    refused(run("verify", path), "a bomb")
    path.write_bytes(content[:-30])
    refused(run("verify", path), "not a .zip archive, or truncated")
    path.write_bytes(content[:100] + content[2000:])
    refused(run("verify", path), "sent.zip: ")


def test_an_archive_with_a_password(archive, run, refused):
    path = archive()
    content = bytearray(path.read_bytes())
    at = content.rfind(b"PK\1\2")
    content[at + 8] |= 1
    path.write_bytes(content)
    refused(run("verify", path), "encrypted")


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["(a+)+!", "(", "a{9999999999999}", "(" * 2000])
def test_a_pattern_that_would_never_end(pattern, copy, run, refused, monkeypatch, tmp_path):
    monkeypatch.setattr("xray_fastai.data.patients.SECONDS", 1)
    data = draw_collection(tmp_path / "data", {"test/NORMAL": 1, "test/PNEUMONIA": 1})
    image = next((data / "test" / "NORMAL").iterdir())
    image.rename(image.with_name("a" * 60 + ".jpeg"))
    change(copy, lambda model: model["settings"].update(patient_pattern=pattern))
    refused(run("evaluate", "--model", copy, "--data", data), "patient pattern (" if pattern[0] == "(" else "a{9999")
    assert not list(copy.glob("evaluation-*"))


@pytest.mark.parametrize("data", ["x" * 300, "/proc/1/root", "/dev/null", "\\\\host\\share", "nowhere"])
def test_a_data_folder_of_others(data, copy, run, refused):
    """The folder that `model.json` names is read, but does no harm."""
    change(copy, lambda model: model["settings"].update(data=data))
    refused(run("evaluate", "--model", copy), "--data")


def test_weights_whose_outputs_are_no_numbers(copy, run, refused, tmp_path):
    put_tensors(copy, lambda tensors: [t.fill_(3e38) for t in tensors.values() if t.is_floating_point()])
    data = draw_collection(tmp_path / "data", {"test/NORMAL": 1, "test/PNEUMONIA": 1})
    assert verify(copy).ok
    refused(run("evaluate", "--model", copy, "--data", data), copy, "the network's output is not a number")


@pytest.mark.slow
def test_a_report_of_others_files_ends(copy, run, tmp_path):
    """`evaluate` writes a report from all files of the export."""
    data = draw_collection(tmp_path / "data", {"test/NORMAL": 2, "test/PNEUMONIA": 2})
    os.mkfifo(copy / "history.csv")
    (copy / "evaluation-valid").mkdir()
    os.mkfifo(copy / "evaluation-valid" / "metrics.json")
    (copy / "interpretation-valid").mkdir()
    (copy / "interpretation-valid" / "summary.json").write_text("[" * 100_000)
    (copy / "batch.png").symlink_to("/dev/zero")
    result = run("evaluate", "--model", copy, "--data", data)
    assert result.exit_code == 0, result.output
    assert "history.csv: not readable" in (copy / "report.html").read_text()


def test_an_image_that_would_do_harm(run, export, tmp_path):
    """A pipe, PostScript under another name, and a few bytes that become gigabytes give rows with an error."""
    folder = tmp_path / "images"
    folder.mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    Image.new("1", (10_000, 5_000)).save(folder / "bomb.png")
    assert (folder / "bomb.png").stat().st_size < 20_000
    with (folder / "sparse.png").open("wb") as stream:
        stream.truncate(600_000_000)
    started = time.perf_counter()
    result = run("predict", folder, "--model", export, "--output", tmp_path / "rows.csv")
    assert result.exit_code == 3 and time.perf_counter() - started < 30
    errors = {Path(row.path).name: row.error for row in pd.read_csv(tmp_path / "rows.csv").itertuples()}
    assert "a pipe or a device" in errors["pipe.png"] and "not an image" in errors["script.png"]
    assert "10000 x 5000 pixels" in errors["bomb.png"] and "600,000,000 bytes" in errors["sparse.png"]


def test_settings_from_python_are_as_json_has_them():
    """The settings that a fit writes at its end must be readable again."""
    config = FitConfig(data=Path("x"), epochs=np.int64(3), patience=5.0, lr=1)
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    assert [config.data, config.epochs, config.patience, config.lr] == ["x", 3, 5, 1.0]
    assert type(config.epochs) is int and type(config.patience) is int
    for wrong in ({"epochs": 2.5}, {"data": 3}, {"skip_bad": 1}, {"size": "64"}, {"size": 5000}, {"data": "a\x1b"}):
        with pytest.raises(UserError, match=f"^{next(iter(wrong))} "):
            FitConfig(**wrong)


def test_a_class_that_no_export_can_hold(run, refused, tmp_path):
    draw_collection(tmp_path, {"train/NORMAL": 2, "train/\x1b[2Jx": 2})
    refused(run("fit", "--data", tmp_path), "the class folder \\x1b[2Jx holds the unprintable character")


@pytest.mark.parametrize("edit", ["classes", "size", "contrast"])
def test_settings_of_another_model_are_refused(copy, refuse, edit):
    """Each is a valid `model.json`, which would turn NORMAL into PNEUMONIA."""
    model = settings_of(copy)
    if edit == "classes":
        model["classes"].reverse()
    else:
        value = {"size": 64, "contrast": "none"}[edit]
        model["preprocessing"][edit] = model["settings"][edit] = value
    (copy / SETTINGS).write_text(json.dumps(model))
    refuse("model.safetensors: trained for another architecture, other classes or another preprocessing")


@pytest.mark.parametrize(
    ("name", "value"), [("size", 64), ("contrast", "none"), ("dropout", 0.1), ("arch", "resnet34")]
)
def test_settings_that_contradict_the_rest_are_refused(copy, refuse, name, value):
    model = settings_of(copy)
    model["settings"][name] = value
    (copy / SETTINGS).write_text(json.dumps(model))
    refuse(f"settings.{name}: {value} contradicts")


def test_the_threshold_may_be_chosen_again(copy, run, an_image):
    model = settings_of(copy)
    model["threshold"] = 0.123
    (copy / SETTINGS).write_text(json.dumps(model))
    assert run("verify", copy).exit_code == 0
    assert "from a probability of 0.123" in run("predict", an_image, "--model", copy).output


@pytest.mark.parametrize("name", ["NORMAL\u200b", "\ufeffNORMAL", "NOR\u00adMAL", "NORMAL\u200d"])
def test_an_invisible_character_in_a_class(name, tmp_path, run, refused):
    assert class_fault(name).startswith("holds the invisible character '\\")
    assert class_fault("\u0646\u200c\u0627") is None  # Persian
    root = draw_collection(tmp_path / "data", {"train/NORMAL": 2, f"train/{name}": 2})
    refused(run("fit", "--data", root), "holds the invisible character", "rename it")
