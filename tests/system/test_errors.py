"""An error names its option and value on the command line and in Python, and its message can be had without them."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from xray_fastai.system.errors import ImageError, UserError, is_write_error, reason


def test_an_option_is_named_as_it_is_typed():
    error = UserError("give a probability", option="min_share", value=1.5)
    assert str(error) == "min_share 1.5: give a probability"
    assert error.on_command_line({"min_share": "--min-share"}) == "--min-share 1.5: give a probability"
    assert error.on_command_line({}) == "1.5: give a probability"
    assert error.message == "give a probability"


def test_an_image_error_holds_its_file():
    error = pickle.loads(pickle.dumps(ImageError("the file is empty", value="a: b.png")))  # noqa: S301
    assert str(error) == "a: b.png: the file is empty"
    assert error.message == "the file is empty" and error.value == "a: b.png"


def test_an_error_of_a_loading_process_is_one_line():
    text = (
        "Caught ImageError in DataLoader worker process 0.\nTraceback:\nxray_fastai.system.errors.ImageError: a.png: x"
    )
    assert str(ImageError(text)) == ImageError(text).message == "a.png: x"


FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device that is always full")
INCOMPLETE = "a file could not be written completely"


@pytest.mark.parametrize(
    ("write", "text"),
    [
        (lambda: Path("missing/file").write_text(""), "No such file or directory"),
        (lambda: save_file({"a": torch.ones(2)}, "missing/file"), "No such file or directory"),
        (lambda: torch.save(torch.ones(2), "missing/file"), "Parent directory missing does not exist."),
        pytest.param(lambda: torch.save(torch.ones(2), "/dev/full"), INCOMPLETE, marks=FULL),
        pytest.param(lambda: torch.save(torch.ones(2_000_000), "/dev/full"), INCOMPLETE, marks=FULL),
    ],
)
def test_an_error_of_writing_is_told_from_a_bug_and_has_a_reason(write, text):
    with pytest.raises(Exception) as caught:
        write()
    assert is_write_error(caught.value) and reason(caught.value) == text


@pytest.mark.parametrize(
    "write",
    [
        lambda: save_file({"a": torch.ones(2)[None].expand(2, 2)}, "file"),  # safetensors wants it contiguous
        lambda: torch.save(lambda: None, "file"),  # cannot be pickled
        lambda: torch.ones(2) @ torch.ones(3),
    ],
)
def test_a_bug_while_a_file_is_written_is_no_error_of_writing(write):
    with pytest.raises(Exception) as caught:
        write()
    assert not is_write_error(caught.value)
