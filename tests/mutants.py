"""Mutants of the kernels: every edit of every rule, at every place where it applies, one at a time."""

import hashlib
import re
from typing import NamedTuple

from gpuconv.gpu import kernels_folder
from tests.emulation import loader

# The files, and the kernels that test their mutants; everything in common.cuh is used by direct and scatter.
# primitives.cuh is excluded, because the CPU runs other code instead; it is tested by golden vectors.
TRIED_BY = {
    "common.cuh": ("direct", "scatter"),
    "direct.cu": ("direct",),
    "scatter.cu": ("scatter",),
    "tiles.cuh": ("implicit_gemm",),
    "products.cuh": ("implicit_gemm",),
    "implicit_gemm.cu": ("implicit_gemm",),
    "split_sum.cu": ("implicit_gemm", "depthwise"),
    "depthwise.cu": ("depthwise",),
    "bias_grad.cu": ("bias_grad",),
}
FILES = tuple(TRIED_BY)

# The name of each rule, and its edits: patterns and their replacements.
RULES = {
    "barrier dropped": [(r"__syncthreads\(\);", "")],
    "atomic addition made plain": [
        (r"atomic_add\(to, four\);", "to[0] += four.x, to[1] += four.y, to[2] += four.z, to[3] += four.w;"),
        (r"atomic_add\(&to->real, make_float2\(v.real, v.imag\)\);", "to->real += v.real, to->imag += v.imag;"),
        (r"atomic_add\(&([\w>-]+), (v\.\w+)\);", r"\1 += \2;"),
        (r"atomic_add\((\w+) \+ (.+), ([\w.\[\]]+)\);", r"add(\1[\2], \3);"),
    ],
    "bound off by one": [
        (r" < ", " <= "),
        (r" < ([\w.\[\]]+)", r" < \1 - 1"),
        (r" >= ", " > "),
        (r" > ", " >= "),
        (r" <= ", " < "),
    ],
    "test dropped": [
        (r"if \(.*\) (continue|return);", ""),
        (r"if \((?:[^()]|\([^()]*\))*\) (?!continue|return|\{)", ""),
        (r" \? ", " || true ? "),
        (r" \? ", " && false ? "),
        (r" && ", " || "),
        (r" == ", " != "),
        (r" != ", " == "),
        (r"!(?=\w)", ""),
    ],
    "term dropped": [
        (r" \* [\w.]+(\[\w+\])?", ""),
        (r" [+-] \w[\w.]*(\[\w+\])?(\([\w, ]*\))?(?= [-+<]|[;,)\]]|$)", ""),
    ],
    "sign changed": [
        (r" \+ ", " - "),
        (r" - ", " + "),
        (r" \+= ", " -= "),
        (r" -= ", " += "),
        (r"(?<=[ (])-(?=[vz])", ""),
    ],
    "division exchanged": [(r" % ", " / "), (r" / ", " % ")],
    "sum not cleared": [(r" = (Sum)?\{\};", ";"), (r"\S+ = Sum\{\};", ";"), (r" = \{\}(?=[;,])", "")],
    "update dropped": [
        (r"\b\S+ [-+/]= [^;]+;", ";"),
        (r"(\+\+|--)[\w.\[\]]+;", ";"),
        (r"\b\S+ = exists && ", ""),
        (r" \+= ", " = "),
        (r"\badd(_product|_to_row)?\(.*\);", ";"),
    ],
    "index exchanged": [
        (r"\[0\]", "[1]"),
        (r"\[1\]", "[2]"),
        (r"\[2\]", "[1]"),
        (r"\[axis\]", "[0]"),
        (r"\[(\w+)\]\[(\w+)\]", r"[\2][\1]"),
    ],
    "field exchanged": [
        (r"\bconv\.input\b", "conv.output"),
        (r"\bconv\.output\b", "conv.input"),
        (r"\bconv\.C\b", "conv.F"),
        (r"\bconv\.F\b", "conv.C"),
        (r"\bdx_at\b", "dy_at"),
        (r"\bx_at\b", "dy_at"),
        (r"\bx_at\b", "y_at"),
        (r"\bdy_at\b", "dx_at"),
        (r"\bdy_at\b", "x_at"),
        (r"\by_at\b", "x_at"),
        (r"\.channel\b(?! \*| =)", ".group"),
        (r"\.filter\b", ".channel"),
        (r"\breal\b", "imag"),
        (r"\bimag\b", "real"),
        (r"\bfirst_(?=conjugated|derivative)", "second_"),
        (r"\bsecond_(?=conjugated|derivative)", "first_"),
    ],
}


class Mutant(NamedTuple):
    """One edit of one line."""

    file: str
    line: int
    where: str  # the kernel, or the file
    rule: str
    before: str  # the line, without indentation
    after: str
    text: str  # of the whole file
    identity: str  # a hash of the edited definition without comments; a change of the definition makes another mutant


def read(file):
    return (kernels_folder() / file).read_text()


def hashes():
    """Return the hashes of the sources without comments, by file."""
    return {file: hashlib.sha256(_code(read(file)).encode()).hexdigest() for file in FILES}


def _code(text):
    lines = (re.sub(r"//.*", "", line).rstrip() for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def mutants():
    """Return all mutants, in the order of the sources."""
    found = {}
    for file in FILES:
        lines = read(file).splitlines(keepends=True)
        definitions = _definitions(lines)
        for number, (line, kernel) in enumerate(zip(lines, _kernels_by_line(lines), strict=True)):
            for rule, after in _edits(line):
                text = "".join((*lines[:number], after, *lines[number + 1 :]))
                first, end = definitions[number]
                edited = _code("".join((*lines[first:number], after, *lines[number + 1 : end])))
                identity = hashlib.sha256(f"{file}\0{edited}".encode()).hexdigest()[:16]
                mutant = Mutant(file, number + 1, kernel or file, rule, line.strip(), after.strip(), text, identity)
                found.setdefault(identity, mutant)  # two rules may make the same edit
    return list(found.values())


def _definitions(lines):
    """Return the range of lines of the definition that each line is in.

    A definition is a function, a struct, or other lines between two empty lines. An empty line that is followed by an
    indented one lies within a definition.
    """
    starts = [0]
    for number in range(1, len(lines)):
        if not lines[number - 1].strip() and lines[number][:1] not in (" ", "\n", "}"):
            starts.append(number)
    ranges = []
    for first, end in zip(starts, (*starts[1:], len(lines)), strict=True):
        ranges += [(first, end)] * (end - first)
    return ranges


def _kernels_by_line(lines):
    """Return the kernel that contains each line, or None; a kernel extends from its name to its closing brace."""
    names = {f"{name}(": name for name in loader.kernel_names("".join(lines))}
    kernels, kernel = [], None
    for line in lines:
        kernel = next((name for start, name in names.items() if line.startswith(start)), kernel)
        kernels.append(kernel)
        if line.startswith("}"):
            kernel = None
    return kernels


def _edits(line):
    """Yield the rules that apply to the code of a line, and the edited lines."""
    code = line.partition("//")[0]
    if code.lstrip().startswith(("#", "static_assert")):
        return
    for rule, edits in RULES.items():
        for pattern, replacement in edits:
            for match in re.finditer(pattern, code):
                yield rule, code[: match.start()] + match.expand(replacement) + line[match.end() :]
