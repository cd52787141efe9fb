"""The examples in the docstrings of the public functions run, and give what they say."""

import contextlib
import doctest
import io
import os
import shutil

import pytest

import xray_fastai

FUNCTIONS = sorted(name for name in xray_fastai.__all__ if callable(getattr(xray_fastai, name)) and name != "FitConfig")


@pytest.fixture
def folder(export, an_image):
    """The working folder has what the examples name."""
    os.mkdir("exports")
    shutil.copytree(export, "exports/rehearsal")
    os.symlink(export.parent / "moved", "chest_xray")
    shutil.copy(an_image, "image.jpeg")


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_examples_run(name, folder):
    names = {public: getattr(xray_fastai, public) for public in xray_fastai.__all__}
    examples = doctest.DocTestParser().get_examples(names[name].__doc__)
    assert any(step.want for step in examples)
    for step in examples:
        with contextlib.redirect_stdout(io.StringIO()):  # what a function prints is no part of the example
            found = eval(step.source, names) if step.want else exec(step.source, names)
        assert not step.want or f"{found!r}\n" == step.want, step.source
