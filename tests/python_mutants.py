"""Mutants of gpuconv's Python: what cosmic-ray edits inside functions, and functions that run an edited text."""

import ast
import collections
import functools
import gc
import hashlib
import itertools
import math
import types
import warnings
from pathlib import Path
from typing import NamedTuple

import cosmic_ray.plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

import gpuconv

ROOT = Path(gpuconv.__file__).parents[1]
LEFT_OUT = "benchmark", "cli.py", "__main__.py"


class Mutant(NamedTuple):
    """One edit inside one function."""

    file: str
    line: int
    where: str  # the function, with the names of what it is in
    rule: str  # cosmic-ray's operator
    before: str  # the lines that change, without indentation
    after: str
    text: str  # of the whole file
    identity: str  # a hash of the function before and after, without comments and the place of it


def files():
    """The files that are mutated, by their paths from the root of the repository."""
    package = sorted((ROOT / "gpuconv").rglob("*.py"))
    found = (path.relative_to(ROOT) for path in package)
    return [str(path) for path in found if not set(path.parts) & set(LEFT_OUT)]


def drawn(number, seed, among=None):
    """Mutants drawn at random: of each file as many as its size asks for, at most one at a place of the text.

    A change of the sources changes few of them.
    """
    places = {file: _places((ROOT / file).read_text(), seed) for file in among or files()}
    total = sum(map(len, places.values()))
    for file, edits in places.items():
        wanted = math.ceil(number * len(edits) / total)
        found = (mutant for edit in edits if (mutant := _mutant(file, *edit)) is not None)
        yield from itertools.islice(found, wanted)


@functools.cache
def _operators():
    classes = {name: cosmic_ray.plugins.get_operator(name) for name in cosmic_ray.plugins.operator_names()}
    return {name.partition("/")[2]: operator() for name, operator in classes.items() if not operator.arguments()}


def _places(text, seed):
    """The places that may be edited, in random order: of each an operator, and the number of the edit among its edits.

    Order and operator are drawn by a hash of the seed and of the place's line, so that other lines do not matter.
    """
    nodes = list(ast_nodes(get_ast(text)))
    edits, positions = collections.defaultdict(list), {}
    for name in _operators():
        # An arithmetic operator is replaced by any other one at the same places.
        replaced = name.rpartition("_")[0] if name.startswith("ReplaceBinaryOperator") else name
        if replaced not in positions:
            positions[replaced] = _positions(name, nodes)
        for occurrence, position in enumerate(positions[replaced]):
            edits[position].append((name, occurrence))
    lines, equal, chosen = text.splitlines(), collections.Counter(), {}
    for ((first, start), (last, end)), found in sorted(edits.items()):
        line = lines[first - 1]
        indentation = len(line) - len(line.lstrip())
        place = line.strip(), start - indentation, last - first, end - indentation
        equal[place] += 1
        rank = _hash(seed, *place, equal[place])
        chosen[rank] = found[int(rank, 16) % len(found)]
    return [chosen[rank] for rank in sorted(chosen)]


def _hash(*parts):
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


def _positions(name, nodes):
    """Where an operator may edit: the first and the last line and column, in the order of its edits."""
    operator = _operators()[name]
    return [position for node in nodes for position in operator.mutation_positions(node)]


def found(entry):
    """The mutant of an entry of the record, or None, if its function is another one now."""
    path = ROOT / entry["file"]
    if not path.exists():
        return None
    text = path.read_text()
    lines = text.splitlines()
    for occurrence, ((line, _), _) in enumerate(_positions(entry["rule"], list(ast_nodes(get_ast(text))))):
        if entry["before"].startswith(lines[line - 1].strip()):
            mutant = _mutant(entry["file"], entry["rule"], occurrence)
            if mutant and mutant.identity == entry["id"]:
                return mutant
    return None


def _mutant(file, name, occurrence):
    """The mutant of an edit, or None, if it is no Python, changes nothing, or is not inside a function."""
    before = (ROOT / file).read_text()
    after = mutate_code(before, _operators()[name], occurrence)
    try:
        if ast.dump(ast.parse(after)) == ast.dump(ast.parse(before)):
            return None
        _compiled(file, after)
    except SyntaxError:
        return None
    line, old, new = _difference(before.splitlines(), after.splitlines())
    functions = _around(ast.parse(before), line)
    if not functions:
        return None
    where = ".".join(function.name for function in functions)
    edited = _around(ast.parse(after), line)[0]
    return Mutant(file, line, where, name, old, new, after, _hash(where, _code(functions[0]), _code(edited)))


def _code(function):
    """What a function does, without its docstring and those of the functions in it."""
    for node in ast.walk(function):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return ast.unparse(function)


def _difference(before, after):
    """Where lines begin to differ, and the lines up to where they are the same again."""
    start = _same(before, after)
    end = _same(before[start:][::-1], after[start:][::-1])
    parts = (" ".join(line.strip() for line in lines[start : len(lines) - end]) for lines in (before, after))
    return start + 1, *parts


def _same(before, after):
    """How many lines two texts have in common before they differ."""
    return next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )


def _around(tree, line):
    """The functions whose bodies a line is in, from the outermost on."""
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return sorted((f for f in functions if f.body[0].lineno <= line <= f.end_lineno), key=lambda f: f.lineno)


def _compiled(file, text):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of comparisons of literals by identity
        return compile(text, ROOT / file, "exec", dont_inherit=True)


def _pairs(old, new):
    """Code objects of two texts that are at the same place; outer ones first."""
    yield old, new
    others = {(inner.co_name, inner.co_firstlineno): inner for inner in _nested(new)}
    for inner in _nested(old):
        if other := others.get((inner.co_name, inner.co_firstlineno)):  # the compiler leaves out what cannot be reached
            yield from _pairs(inner, other)


def _nested(code):
    return [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]


class Live:
    """The functions of the package that exist, by the code that they run, and what they remember."""

    def __init__(self):
        self.functions = collections.defaultdict(list)
        self.caches = []
        for found in gc.get_objects():
            if type(found) is types.FunctionType and found.__code__.co_filename.startswith(str(ROOT / "gpuconv")):
                self.functions[found.__code__].append(found)
            elif type(found) is functools._lru_cache_wrapper and found.__module__.startswith(("gpuconv", "tests")):
                self.caches.append(found)

    def run(self, file, text):
        """Has every function of a file run an edited text: to be called in a process of its own."""
        before = (ROOT / file).read_text()
        for old, new in _pairs(_compiled(file, before), _compiled(file, text)):
            for function in self.functions.get(old, ()):
                if function.__code__.co_filename == str(ROOT / file):
                    function.__code__ = new
        self.forget("gpuconv", "tests")

    def forget(self, *packages):
        """Clears what functions of these packages remember."""
        for cache in self.caches:
            if cache.__module__.startswith(packages):
                cache.cache_clear()
