"""The structure of the package: no import cycles, unambiguous names, and functions of limited complexity."""

import ast
import collections
import graphlib
import importlib
from pathlib import Path
from typing import get_args

import pytest

import gpuconv
from gpuconv import types

PACKAGE = Path(gpuconv.__file__).parent
FILES = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
TREES = {name.removesuffix(".__init__"): ast.parse(path.read_text()) for name, path in FILES.items()}
BLOCKS = ast.For | ast.While | ast.If | ast.With | ast.Try | ast.FunctionDef


def nodes(kind):
    """Yield (module, node) for every node of a kind."""
    return [(module, node) for module, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, kind)]


def test_no_module_imports_one_that_imports_it():
    """Imports inside functions and for type checkers are included."""
    imports = collections.defaultdict(set)
    for module, node in nodes(ast.ImportFrom):
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            imports[module].add(whole if whole in TREES else node.module)
    for module, node in nodes(ast.Import):
        imports[module].update(alias.name for alias in node.names)
    assert sum(map(len, imports.values())) > 200
    graphlib.TopologicalSorter(imports).prepare()  # CycleError names the modules


def test_no_public_name_is_that_of_a_module():
    for name in gpuconv.__all__:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(f"gpuconv.{name}")


def test_no_two_classes_have_one_name():
    names = collections.Counter(node.name for _, node in nodes(ast.ClassDef))
    assert [name for name, number in names.items() if number > 1] == []


def depth(node, outer=0):
    inner = [
        depth(child, outer + (isinstance(child, BLOCKS) and not (isinstance(node, ast.If) and node.orelse == [child])))
        for child in ast.iter_child_nodes(node)
    ]
    return max(inner, default=outer)


def test_functions_are_nested_at_most_four_deep_and_have_at_most_six_parameters():
    """Functions with the settings of a convolution as separate parameters, as in the public API, are excepted."""
    for module, function in nodes(ast.FunctionDef):
        arguments = function.args
        names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        assert "stride" in names or len(names) - (names[:1] in (["self"], ["cls"])) <= 6, (module, function.name)
        assert depth(function) <= 4, (module, function.name)


def test_types_have_the_names_that_are_accepted():
    assert get_args(types.Algorithm) == ("auto", *gpuconv.ALGORITHMS)
