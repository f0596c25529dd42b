"""Mutants of gpuconv's Python: edits by cosmic-ray inside functions, and execution of functions with an edited text."""

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
# Numba compiles the last two, from disk: edits of their functions in memory would have no effect.
LEFT_OUT = "benchmark", "cli.py", "__main__.py", "vectors.py", "vector_kernels.py"


class Mutant(NamedTuple):
    """One edit inside one function."""

    file: str
    line: int
    where: str  # the qualified name of the function
    rule: str  # cosmic-ray's operator
    before: str  # the lines that change, without indentation
    after: str
    text: str  # of the whole file
    identity: str  # a hash of the function before and after, independent of comments and position


def files():
    """Return the paths of the mutated files, relative to the root of the repository."""
    package = sorted((ROOT / "gpuconv").rglob("*.py"))
    found = (path.relative_to(ROOT) for path in package)
    return [str(path) for path in found if not set(path.parts) & set(LEFT_OUT)]


def drawn(number, seed, among=None):
    """Return mutants drawn at random, in proportion to the size of each file, at most one per place of the text.

    A change of the sources changes only a few of them.
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
    """Return the places that can be edited, in random order: for each an operator and the index among its edits.

    Order and operator are drawn by a hash of the seed and the line of the place, independently of other lines.
    """
    nodes = list(ast_nodes(get_ast(text)))
    edits, positions = collections.defaultdict(list), {}
    for name in _operators():
        # All replacements of an arithmetic operator apply to the same places.
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
    """Return where an operator can edit: the first and the last line and column, in the order of its edits."""
    operator = _operators()[name]
    return [position for node in nodes for position in operator.mutation_positions(node)]


def found(entry):
    """Return the mutant of an entry of the record, or None if its function has changed."""
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
    """Return the mutant of an edit, or None if it is invalid Python, changes nothing, or is outside functions."""
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
    """Return the code of a function without docstrings, including those of nested functions."""
    for node in ast.walk(function):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return ast.unparse(function)


def _difference(before, after):
    """Return the index of the first difference, and the lines that differ."""
    start = _same(before, after)
    end = _same(before[start:][::-1], after[start:][::-1])
    parts = (" ".join(line.strip() for line in lines[start : len(lines) - end]) for lines in (before, after))
    return start + 1, *parts


def _same(before, after):
    """Return how many lines two texts have in common before the first difference."""
    return next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )


def _around(tree, line):
    """Return the functions whose bodies contain a line, outermost first."""
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return sorted((f for f in functions if f.body[0].lineno <= line <= f.end_lineno), key=lambda f: f.lineno)


def _compiled(file, text):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about comparisons of literals by identity
        return compile(text, ROOT / file, "exec", dont_inherit=True)


def _pairs(old, new):
    """Yield the code objects of two texts that are at the same place, outer ones first."""
    yield old, new
    others = {(inner.co_name, inner.co_firstlineno): inner for inner in _nested(new)}
    for inner in _nested(old):
        if other := others.get((inner.co_name, inner.co_firstlineno)):  # the compiler omits unreachable code
            yield from _pairs(inner, other)


def _nested(code):
    return [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]


class Live:
    """The existing functions of the package, by their code, and their caches."""

    def __init__(self):
        self.functions = collections.defaultdict(list)
        self.caches = []
        for found in gc.get_objects():
            if type(found) is types.FunctionType and found.__code__.co_filename.startswith(str(ROOT / "gpuconv")):
                self.functions[found.__code__].append(found)
            elif type(found) is functools._lru_cache_wrapper and found.__module__.startswith(("gpuconv", "tests")):
                self.caches.append(found)

    def run(self, file, text):
        """Make every function of a file run an edited text; to be called in a separate process."""
        before = (ROOT / file).read_text()
        for old, new in _pairs(_compiled(file, before), _compiled(file, text)):
            for function in self.functions.get(old, ()):
                if function.__code__.co_filename == str(ROOT / file):
                    function.__code__ = new
        self.forget("gpuconv", "tests")

    def forget(self, *packages):
        """Clear the caches of the functions of packages."""
        for cache in self.caches:
            if cache.__module__.startswith(packages):
                cache.cache_clear()
