"""Names of libraries that begin with an underscore may change in any release: each stands in one known function.

The README of this folder lists them, together with the undocumented names that begin with a letter.
"""

import ast
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import pytest

import xray_fastai

ROOT = Path(xray_fastai.__file__).parent
ALLOWED = {
    ("inference.cpu_fusion", "Convolution.forward", "torch.ops.mkldnn._convolution_pointwise"),
}
"""Module, function and name."""


def is_private(name: str) -> bool:
    if name == "_asdict":  # of named tuples: Python documents it
        return False
    return name.startswith("_") and name.isidentifier() and name != "_" and not name.startswith("__")


def own_names(tree: ast.AST) -> set[str]:
    """What a module defines: functions, classes, arguments, variables, attributes."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


def foreign_names(node: ast.AST, own: set[str], scope: tuple[str, ...] = ()) -> set[tuple[str, str]]:
    """Private names that the package does not define, each with the function that has it.

    An attribute, an import, or a text that is such a name (`getattr(torch, "_name")`).
    """
    found = set()
    for child in ast.iter_child_nodes(node):
        inner = scope
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = (*scope, child.name)
        names = {}
        if isinstance(child, ast.Attribute):
            names = {child.attr: ast.unparse(child)}
        elif isinstance(child, ast.Constant) and isinstance(child.value, str):
            names = {child.value: child.value}
        elif isinstance(child, ast.Import | ast.ImportFrom):
            paths = [getattr(child, "module", None) or "", *(alias.name for alias in child.names)]
            names = {part: ast.unparse(child) for path in paths for part in path.split(".")}
        found |= {(".".join(inner), text) for name, text in names.items() if is_private(name) and name not in own}
        found |= foreign_names(child, own, inner)
    return found


def test_private_names_of_libraries_stand_where_the_list_says():
    trees = {path: ast.parse(path.read_text("utf-8")) for path in ROOT.rglob("*.py")}
    own = set().union(*map(own_names, trees.values()))
    found = {
        (".".join(path.relative_to(ROOT).with_suffix("").parts), *where)
        for path, tree in trees.items()
        for where in foreign_names(tree, own)
    }
    assert found == ALLOWED


@pytest.mark.slow
def test_no_class_overrides_a_private_name_of_a_library():
    for module in walk_packages([str(ROOT)], "xray_fastai."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    classes = {
        value
        for name, module in list(sys.modules.items())
        if name.startswith("xray_fastai.")
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == name
    }
    assert len(classes) > 50
    trees = (ast.parse(path.read_text("utf-8")) for path in ROOT.rglob("*.py"))
    own = set().union(*map(own_names, trees))
    overridden = [
        f"{kind.__module__}.{kind.__qualname__}.{name}, of {base.__module__}"
        for kind in classes
        for name in vars(kind)
        if is_private(name) and name in own
        for base in kind.__mro__[1:]
        if name in vars(base) and not base.__module__.startswith("xray_fastai")
    ]
    assert overridden == []


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    return torch._foreach_mul_",
        "def f():\n    return getattr(torch.cpu, '_is_avx2_supported')",
        "def f():\n    from torch._C import anything",
        "def f():\n    import torch._dynamo",
        "def f():\n    self._modules['layer']",
    ],
)
def test_the_search_finds(source):
    ((where, _),) = foreign_names(ast.parse(source), set())
    assert where == "f"


def test_the_search_passes_over_own_names():
    source = "def _f(x):\n    self._x = 1\n    return _f(self._x), __name__, '_a text'"
    assert foreign_names(ast.parse(source), own_names(ast.parse(source))) == set()
