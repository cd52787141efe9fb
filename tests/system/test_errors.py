"""An error names its option and value on the command line and in Python, and its message can be had without them."""

import pickle

from xray_fastai.system.errors import ImageError, UserError


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
