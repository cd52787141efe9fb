"""Each mistake ends with one line that names it and says what to do, and leaves no export; the exit code is 1, or 2 for
an option that is wrong by itself."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from tests.conftest import QUICK, RESNET18, draw_collection

FIT = ["--weights", "none", "--epochs", 1]


@pytest.fixture
def refuse(run, refused):
    """Return a check that a fit is refused and leaves no files."""

    def refuse(data, *words, options=(), code=1):
        refused(run("fit", "--data", data, *QUICK, *FIT, *options), *words, code=code)
        assert not Path("exports").exists() or not list(Path("exports").iterdir())

    return refuse


def test_no_such_folder(refuse):
    refuse("nowhere", "--data nowhere", "no such folder")


def test_a_file_for_a_folder(refuse, tmp_path):
    (tmp_path / "file").write_text("")
    refuse(tmp_path / "file", "a file, not a folder")


def test_an_empty_folder(refuse, tmp_path):
    (tmp_path / "data").mkdir()
    refuse(tmp_path / "data", "the folder is empty")


def test_no_train(refuse, tmp_path):
    refuse(draw_collection(tmp_path, {"trains/A": 2, "val/A": 2}), "no train/", "trains, val")


def test_an_empty_class(refuse, collection):
    (collection / "train" / "COVID").mkdir()
    refuse(collection, "train/COVID: no image in it", ".jpeg")


def test_an_empty_class_of_val(refuse, collection):
    shutil.rmtree(collection / "val" / "NORMAL")
    (collection / "val" / "NORMAL").mkdir()
    refuse(collection, "val/NORMAL: no image in it")


def test_a_missing_class(refuse, collection):
    shutil.rmtree(collection / "val" / "NORMAL")
    refuse(collection, "val: no folder for class NORMAL")


def test_a_class_that_only_val_has(refuse, collection):
    shutil.copytree(collection / "val" / "NORMAL", collection / "val" / "COVID")
    refuse(collection, "val: holds class COVID", "the known classes are NORMAL, PNEUMONIA")


def test_one_class(refuse, collection):
    shutil.rmtree(collection / "train" / "NORMAL")
    refuse(collection, "train: one class only (PNEUMONIA)")


@pytest.mark.parametrize("content", [b"", b"text", "half"], ids=["empty", "text", "truncated"])
def test_an_unreadable_image(content, refuse, collection):
    image = sorted((collection / "train" / "NORMAL").iterdir())[3]
    image.write_bytes(image.read_bytes()[:400] if content == "half" else content)
    refuse(collection, image, "--skip-bad")


def test_valid_folder_without_val(refuse, collection):
    shutil.rmtree(collection / "val")
    refuse(collection, "val: no such folder", options=["--valid", "folder"])


def test_weights_file_missing(refuse, collection):
    refuse(collection, "--weights nowhere.pth: no such file", options=["--weights", "nowhere.pth"])


@pytest.mark.slow
def test_weights_of_another_network(refuse, collection, tmp_path):
    state = torchvision.models.resnet34(weights=None).state_dict()
    save_file(state, tmp_path / "other.safetensors")
    options = ["--arch", "resnet18", "--weights"]
    refuse(collection, "other.safetensors", "unknown: layer1.2", options=[*options, tmp_path / "other.safetensors"])
    state = torchvision.models.resnet18(weights=None).state_dict()
    state["conv1.weight"] = state["conv1.weight"][:, :2].contiguous()
    del state["layer1.0.bn1.bias"]
    save_file(state, tmp_path / "bent.safetensors")
    words = ["missing: layer1.0.bn1.bias", "of another shape: conv1.weight [64, 2, 7, 7] instead of [64, 3, 7, 7]"]
    refuse(collection, *words, options=[*options, tmp_path / "bent.safetensors"])


@pytest.mark.parametrize("name", ["text.pth", "text.safetensors"])
def test_weights_that_are_not_weights(name, refuse, collection, tmp_path):
    (tmp_path / name).write_text("hello")
    refuse(collection, name, options=["--weights", tmp_path / name])


def test_a_web_page_for_weights(refuse, collection, tmp_path):
    """torch looks its letters up as steps of a pickle."""
    for letter in "e}":
        (tmp_path / "page.pth").write_text(letter * 50)
        options = ["--weights", tmp_path / "page.pth"]
        refuse(collection, "page.pth: not a readable weights file", "get it again", options=options)
        refuse(collection, "(it is damaged, or holds something else)", options=options)


def test_a_folder_of_the_other_kind(run, refused, collection, export, an_image):
    refused(run("fit", export), f"--data {export}: an export, no images", "--weights")
    refused(run("predict", export, an_image), f"{export}: an export, no images", f"--model {export}")
    result = run("evaluate", export, collection)
    assert result.exit_code == 2 and f"did you mean --data {collection}?" in " ".join(result.stderr.split())


def test_a_class_in_other_letters(refuse, collection):
    refuse(collection, "--positive pneumonia", "did you mean PNEUMONIA?", options=["--positive", "pneumonia"])


def test_a_text_named_as_an_image(refuse, collection):
    next((collection / "train" / "NORMAL").iterdir()).write_text("hello")
    refuse(collection, "not an image: its content, whatever its name, is none of .jpeg")


def test_a_weights_file_that_contains_code(run, collection, tmp_path):
    trace = tmp_path / "trace"

    class Hostile:
        def __reduce__(self):
            return open, (str(trace), "w")

    torch.save({"conv1.weight": Hostile()}, tmp_path / "hostile.pth")
    result = run("fit", "--data", collection, *QUICK, *FIT, "--weights", tmp_path / "hostile.pth")
    first, *lines = result.stderr.strip().splitlines()
    assert (result.exit_code == 1 and not Path("exports").exists()) or not list(Path("exports").iterdir())
    assert "hostile.pth: holds io.open besides tensors, so that loading it could run code" in first
    assert len(lines) == 2 and "weights_only = False" in lines[0]
    assert not trace.exists()


def test_offline_and_not_cached(refuse, collection, monkeypatch):
    for proxy in ("http_proxy", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # no server listens on this port
    words = ["resnet18-f37072fd.pth", "https://", Path(torch.hub.get_dir()) / "checkpoints", "--weights FILE"]
    refuse(collection, *words, "--weights none", options=["--arch", "resnet18", "--weights", "imagenet"])


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("3", "1 numbers for 2 classes"),
        ("1,2,3", "NORMAL, PNEUMONIA"),
        ("1,0", "above 0"),
        ("1,-2", "above 0"),
        ("x", "NORMAL=3,PNEUMONIA=1"),
        ("NORMAL=3,FLU=1", "give one for each of NORMAL, PNEUMONIA"),
        ("NORMAL=3,NORMAL=1,PNEUMONIA=2", "give one for each of NORMAL, PNEUMONIA"),
    ],
)
def test_class_weights(weights, words, refuse, collection):
    code = 1 if "for" in words or "NORMAL, " in words else 2  # only the images tell the classes
    refuse(collection, f"--class-weights {weights}", words, options=["--class-weights", weights], code=code)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_missing(refuse, collection):
    refuse(collection, "--device cuda", "cpu", options=["--device", "cuda"])


def test_fp16_on_a_cpu(refuse, collection):
    refuse(collection, "--precision fp16", options=["--precision", "fp16"])


@pytest.mark.parametrize(
    "option",
    [
        ("--valid", "2"),
        ("--valid", "some"),
        ("--dropout", "1"),
        ("--lr", "0"),
        ("--patient-pattern", "("),
        ("--name", "../x"),
        ("--name", "con"),
        ("--name", "NUL.1"),
        ("--name", "dot."),
        ("--seed", "-1"),
    ],
)
def test_options_out_of_range(option, refuse, collection):
    refuse(collection, f"{option[0]} {option[1]}", options=option, code=2)


def test_a_class_that_is_not_in_the_data(refuse, collection):
    refuse(collection, "--positive FLU", options=["--positive", "FLU"])


@pytest.mark.parametrize("option", [("--epochs", "0"), ("--arch", "vgg16"), ("--precision", "fp8"), ("--size", "8")])
def test_a_wrong_command_line_is_2(option, run):
    result = run("fit", *option)
    assert result.exit_code == 2
    assert option[0] in result.stderr and "Traceback" not in result.output


def test_a_name_that_is_taken(run, refused, collection):
    (Path("exports") / "taken").mkdir(parents=True)
    (Path("exports") / "taken" / "mine").write_text("mine")
    refused(run("fit", "--data", collection, *QUICK, *FIT, "--name", "taken"), "--name taken", "give another name")
    assert (Path("exports") / "taken" / "mine").read_text() == "mine"


def test_a_name_that_another_fit_is_writing(run, refused, collection):
    (Path("exports") / ".both.partial").mkdir(parents=True)
    refused(run("fit", "--data", collection, *QUICK, *FIT, "--name", "both"), ".both.partial")
    assert (Path("exports") / ".both.partial").is_dir()


def test_exports_below_a_file(refuse, collection, tmp_path):
    (tmp_path / "file").write_text("")
    refuse(collection, "--exports", "cannot be made", options=["--exports", tmp_path / "file" / "exports"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to every folder")
def test_exports_without_permission(refuse, collection, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    refuse(collection, "cannot be written to", options=["--exports", tmp_path / "closed"])


@pytest.mark.slow
def test_a_disk_that_fills_up_before_an_epoch_is_kept(forked, collection):
    """A limit on the size of files acts as a full disk."""
    _, line = limited(1_000_000, forked, collection)
    assert "exports/.full.partial: a checkpoint could not be written (File too large); free space" in line
    assert not list(Path("exports").iterdir())


@pytest.mark.slow
def test_a_disk_that_fills_up_while_exporting(forked, collection):
    """There is space for the weights, but not for learner.pkl; the fit resumes when there is space again."""
    trained, line = limited(44_800_000, forked, collection)
    assert "exports/full: the export could not be written (a file could not be written completely); free" in line
    assert "resume it by 'xray-fastai fit --resume full', or delete exports/.full.partial" in line
    assert {path.name for path in Path("exports/.full.partial").iterdir()} == {"checkpoint", "fit.log"}
    result = forked(args=["fit", "--resume"])
    assert result["code"] == 0, result["output"]
    assert re.search(r"^resuming +full after the unfrozen phase$", result["output"], re.M)
    assert [line for line in trained if line.startswith("unfrozen ")] and "\nunfrozen   " not in result["output"]
    assert [path.name for path in Path("exports").iterdir()] == ["full"]


def limited(limit, forked, collection):
    """Run a fit that cannot write files larger than `limit` bytes; return what it prints, and its last line."""
    args = ["fit", "--data", collection, *RESNET18, *FIT, "--name", "full"]
    result = forked(args=list(map(str, args)), limit=limit)
    assert result["code"] == 1, result["output"]
    *lines, line = result["output"].strip().splitlines()
    return lines, line
