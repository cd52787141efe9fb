"""The package in Python: every public name exists and has types, and its results are those of the commands."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import xray_fastai
from tests.conftest import draw_collection
from xray_fastai.system.device import choose_precision


@pytest.mark.parametrize("name", xray_fastai.__all__)
def test_every_public_name_exists(name):
    assert getattr(xray_fastai, name)


def test_the_public_names_are_listed():
    """For `dir`, for editors and type checkers, and for the import at first use: three lists of the same names."""
    importlib.import_module("xray_fastai.data.audit.check")  # makes `data` an attribute of the package
    assert dir(xray_fastai) == sorted(xray_fastai.__all__)
    tree = ast.parse(Path(xray_fastai.__file__).read_text(encoding="utf-8"))
    (checking,) = (node for node in tree.body if isinstance(node, ast.If))  # if TYPE_CHECKING
    imports = [node for node in checking.body if isinstance(node, ast.ImportFrom)]
    modules = {name.name: node.module.removeprefix("xray_fastai.") for node in imports for name in node.names}
    assert modules == xray_fastai._MODULES
    assert {*modules, "__version__"} == set(xray_fastai.__all__)
    assert Path(xray_fastai.__file__).with_name("py.typed").is_file()


def test_importing_the_package_loads_no_framework():
    code = "import sys, xray_fastai; sys.exit(' '.join({'torch', 'fastai', 'matplotlib'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == ""


@pytest.mark.parametrize("jedi", [False, True])
def test_tab_offers_the_public_names_only(jedi):
    pytest.importorskip("IPython")
    from IPython.core.completer import IPCompleter, provisionalcompleter

    completer = IPCompleter(namespace={"xray_fastai": xray_fastai}, use_jedi=jedi)
    with provisionalcompleter():
        offered = {found.text.lstrip(".") for found in completer.completions("xray_fastai.", len("xray_fastai."))}
    assert offered == set(xray_fastai.__all__) - {"__version__"}


def test_our_names_and_fastais_in_both_orders():
    """fastai has a `load_learner`, too: whichever import is the last one has the name, and `open_learner` is ours."""
    imports = ["from xray_fastai import *", "from fastai.vision.all import *"]
    for order in (imports, imports[::-1]):
        names: dict = {}
        exec("\n".join(order), names)
        replaced = [name for name in xray_fastai.__all__ if names[name] is not getattr(xray_fastai, name)]
        assert replaced == (["load_learner"] if order == imports else [])
        assert names["open_learner"] is xray_fastai.load_learner


def test_importing_fastai_warns_of_nothing_and_leaves_the_users_warnings():
    code = """
import warnings
warnings.simplefilter("error", FutureWarning)
import xray_fastai
xray_fastai.load_learner
import fastai.layers
assert not [f for f in warnings.filters if f[1] is not None and "jit" in f[1].pattern], warnings.filters
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize("name", sorted(xray_fastai._MODULES))
def test_a_public_function_is_fully_typed(name):
    signature = inspect.signature(getattr(xray_fastai, name))
    assert all(p.annotation is not p.empty for p in signature.parameters.values())
    assert signature.return_annotation is not signature.empty


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        xray_fastai.train  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_evaluate_interpret_and_predict_agree(precision, export, tmp_path):
    """The three functions give the same probabilities for the same images and precision."""
    data = draw_collection(tmp_path / "data", {"test/NORMAL": 6, "test/PNEUMONIA": 6})
    evaluated = xray_fastai.evaluate(export, data, output=tmp_path, precision=precision).predictions.set_index("path")
    result = xray_fastai.interpret(export, data, "test", top=2, output=tmp_path, precision=precision)
    assert f"precision {choose_precision(precision, torch.device('cpu'))}\n" in str(result)
    interpreted = result.table.set_index("path")
    predicted = xray_fastai.predict(list(evaluated.index), export, precision=precision).set_index("path")
    for table in (interpreted.loc[evaluated.index], predicted):
        assert (table.prediction == evaluated.prediction).all()
        assert table.p_PNEUMONIA.tolist() == pytest.approx(evaluated.p_PNEUMONIA.tolist(), abs=1e-5)
    assert interpreted.loss.loc[evaluated.index].tolist() == pytest.approx(evaluated.loss.tolist(), rel=1e-3)
    assert (tmp_path / "report.html").is_file()
