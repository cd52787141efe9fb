"""The example notebook runs in a kernel as it is shipped."""

import json
from importlib.resources import files

import nbformat
import pytest
from nbclient import NotebookClient


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    text = files("xray_fastai").joinpath("examples/second_hospital.ipynb").read_text("utf-8")
    notebook = nbformat.reads(text, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # as it is shipped
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert "\\u001b" not in json.dumps(outputs) and "\\r" not in json.dumps(outputs)  # no terminal's codes
    kinds = [kind for output in outputs for kind in output.get("data", {})]
    assert kinds.count("image/png") == 3
    model = json.loads((tmp_path / "exports" / "b" / "model.json").read_text("utf-8"))
    assert [parent["name"] for parent in model["lineage"]] == ["a"]
