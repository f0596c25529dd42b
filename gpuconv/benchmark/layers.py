"""Layers: those of real networks, by name, from layers.ini; any other, by the words that cutlass_profiler uses."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from configparser import ConfigParser
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from gpuconv.arguments import PADDING_NAMES, Pairs, Shape
from gpuconv.geometry import Geometry
from gpuconv.types import Layout

EXTENTS, KERNELS, OUTPUTS = ("d", "h", "w"), ("t", "r", "s"), ("z", "p", "q")
COUNTS = ("n", "c", "k", "groups", "transposed")
PER_AXIS = ("stride", "pad", "dilation", "output_padding")
WORDS = (*COUNTS, *EXTENTS, *KERNELS, *OUTPUTS, *PER_AXIS, *(f"{word}_{a}" for word in PER_AXIS for a in EXTENTS))


@dataclass(frozen=True)
class Case:
    """One layer, without its batch size.

    For a transposed layer ``channels`` is the number of input channels and ``filters`` that of output channels. Its
    padding is that of the convolution that it transposes.
    """

    name: str
    channels: int
    filters: int
    input: Shape
    kernel: Shape
    stride: Shape
    padding: Pairs | str
    dilation: Shape
    groups: int = 1
    transposed: bool = False
    output_padding: Shape = ()
    batches: tuple[int, int] = (8, 32)  # on a CPU, on a GPU
    dtype: str = "float32"
    source: str = "given on the command line"
    suites: tuple[str, ...] = ()

    def x_shape(self, batch: int, layout: Layout = "channels_first") -> Shape:
        """Return the shape of the input."""
        return (batch, *self.input, self.channels) if layout == "channels_last" else (batch, self.channels, *self.input)

    def w_shape(self, layout: Layout = "channels_first") -> Shape:
        """Return the shape of the weight, as gpuconv.conv or gpuconv.conv_transpose expects it."""
        outer, inner = (self.channels, self.filters) if self.transposed else (self.filters, self.channels)
        if layout == "channels_last":
            return (*self.kernel, inner // self.groups, outer)
        return (outer, inner // self.groups, *self.kernel)

    def settings(self) -> dict[str, Any]:
        """Return the options of gpuconv.conv or gpuconv.conv_transpose."""
        settings = {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }
        return {**settings, "output_padding": self.output_padding} if self.transposed else settings

    def geometry(self, batch: int, layout: Layout = "channels_first") -> Geometry:
        """Return the convolution, or for a transposed layer the convolution that it transposes."""
        infer = Geometry.infer_transposed if self.transposed else Geometry.infer
        return infer(self.x_shape(batch, layout), self.w_shape(layout), layout=layout, **self.settings())

    def text(self, batch: int) -> str:
        """Return the specification of this layer that ``--case`` accepts.

        >>> parsed("c=3 h=32 w=32 k=16 r=3 s=3 pad=1 stride=2").text(8)
        'n=8 c=3 h=32 w=32 k=16 r=3 s=3 stride=2 pad=1'
        """
        rank = len(self.kernel)
        axes = zip((*EXTENTS[-rank:], "k", *KERNELS[-rank:]), (*self.input, self.filters, *self.kernel), strict=True)
        words = [f"n={batch} c={self.channels}", *(f"{word}={value}" for word, value in axes)]
        words += [f"{word}={_joined(values)}" for word, values, default in self._options() if values != default]
        return " ".join(words)

    def _options(self) -> list[tuple[str, Any, Any]]:
        ones, zeros = (1,) * len(self.kernel), (0,) * len(self.kernel)
        return [
            ("stride", self.stride, ones),
            ("pad", self.padding, tuple((0, 0) for _ in self.kernel)),
            ("dilation", self.dilation, ones),
            ("groups", self.groups, 1),
            ("transposed", int(self.transposed), 0),
            ("output_padding", self.output_padding if self.transposed else zeros, zeros),
        ]


def _joined(value: Any) -> str:
    """Return one word if the values of all axes are equal, otherwise one word per axis, separated by commas."""
    if not isinstance(value, tuple):
        return str(value)
    words = [f"{v[0]}:{v[1]}" if isinstance(v, tuple) and v[0] != v[1] else str(v[0] if isinstance(v, tuple) else v)
             for v in value]  # fmt: skip
    return words[0] if len(set(words)) == 1 else ",".join(words)


def nearest(name: str, names: Iterable[str]) -> str:
    """Return a hint with the nearest valid names, for error messages."""
    names = list(names)
    close = get_close_matches(name, names, 3, 0.5) or names[:12]
    return f"nearest: {', '.join(close)}"


def parsed(text: str, name: str = "") -> Case:
    """Return the layer that words such as "n=32 c=64 h=56 w=56 k=64 r=3 s=3 pad=1" specify.

    n is the batch size, c the input channels, k the filters; w, h w or d h w the input extents; s, r s or t r s the
    kernel extents. stride, pad, dilation and output_padding are one int, or one int per axis separated by commas, or
    are given by axis as in stride_h; pad may also be LOW:HIGH or a name. groups and transposed=1 are optional, and so
    are the output extents q, p q or z p q, which must be correct if they are given.

    Raises ValueError with the word that is invalid.
    """
    words: dict[str, str] = {}
    for word in text.split():
        key, equals, value = word.partition("=")
        if key not in WORDS:
            raise ValueError(f"a case must not have {key!r} ({nearest(key, WORDS)}), in {text!r}")
        if not equals or not value:
            raise ValueError(f"a case must consist of NAME=VALUE words, not {word!r}, in {text!r}")
        if key in words:
            raise ValueError(f"a case must give {key!r} only once, in {text!r}")
        words[key] = value
    rank = sum(key in words for key in KERNELS)
    needed = ("c", "k", *EXTENTS[-rank:], *KERNELS[-rank:]) if rank else ("c", "k", "w", "s")
    if missing := [key for key in needed if key not in words]:
        raise ValueError(f"a case needs {', '.join(missing)} too, in {text!r}")
    if extra := [key for key in (*EXTENTS[:-rank], *KERNELS[:-rank]) if key in words]:
        raise ValueError(f"a case of {rank} axes has no {', '.join(extra)}, in {text!r}")

    def number(key: str, default: int = 1, minimum: int = 1) -> int:
        value = words.get(key, str(default))
        if not value.isdecimal() or int(value) < minimum:
            raise ValueError(f"{key} must be an int of at least {minimum}, got {value!r}, in {text!r}")
        return int(value)

    transposed = number("transposed", 0, 0) == 1
    if words.get("transposed", "0") not in ("0", "1"):
        raise ValueError(f"transposed must be 0 or 1, got {words['transposed']!r}, in {text!r}")
    if "output_padding" in words and not transposed:
        raise ValueError(f"output_padding is for transposed=1, in {text!r}")
    case = Case(
        name or text,
        number("c"),
        number("k"),
        tuple(number(key) for key in EXTENTS[-rank:]),
        tuple(number(key) for key in KERNELS[-rank:]),
        tuple(low for low, _ in _per_axis(words, "stride", 1, rank, text)),
        words["pad"] if words.get("pad") in PADDING_NAMES else _per_axis(words, "pad", 0, rank, text),
        tuple(low for low, _ in _per_axis(words, "dilation", 1, rank, text)),
        number("groups"),
        transposed,
        tuple(low for low, _ in _per_axis(words, "output_padding", 0, rank, text)) if transposed else (),
        (number("n"),) * 2 if "n" in words else Case.batches,
    )
    try:
        geometry = case.geometry(1)
    except ValueError as error:
        raise ValueError(f"{error}, in {text!r}") from None
    output = geometry.input if transposed else geometry.output
    for key, size in zip(OUTPUTS[-rank:], output, strict=True):
        if key in words and words[key] != str(size):
            raise ValueError(f"{key} must be {size} according to the other words, not {words[key]}, in {text!r}")
    return case


def _per_axis(words: dict[str, str], key: str, default: int, rank: int, text: str) -> Pairs:
    """Return a pair (low, high) per axis; the two ints can differ only for pad."""
    given = words.get(key, str(default)).split(",")
    if len(given) not in (1, rank):
        raise ValueError(f"{key} must have one int, or one for each of {rank} axes, got {words[key]!r}, in {text!r}")
    given = given * rank if len(given) == 1 else given
    given = [words.get(f"{key}_{axis}", value) for axis, value in zip(EXTENTS[-rank:], given, strict=True)]
    pattern = r"-?\d+(:-?\d+)?" if key == "pad" else r"\d+"
    if not all(re.fullmatch(pattern, value) for value in given):
        kind = "ints, LOW:HIGH or one of " + ", ".join(PADDING_NAMES) if key == "pad" else "ints"
        raise ValueError(f"{key} must be {kind}, got {','.join(given)!r}, in {text!r}")
    ends = [[int(end) for end in value.split(":")] for value in given]
    return tuple((low[0], low[-1]) for low in ends)


@cache
def suites() -> dict[str, tuple[Case, ...]]:
    """Return the layers of every suite of layers.ini, in the order of the file."""
    file = ConfigParser(delimiters=("=",), comment_prefixes=("#",), inline_comment_prefixes=None, interpolation=None)
    file.optionxform = str  # type: ignore[assignment, method-assign]
    file.read_string((Path(__file__).parent / "layers.ini").read_text(encoding="utf-8"))
    networks = {name: _network(name, dict(file[name])) for name in file.sections() if name != "suites"}
    found: dict[str, tuple[Case, ...]] = {}
    for suite, members in file["suites"].items():
        cases: list[Case] = []
        for member in (part.strip() for part in members.split(",")):
            network, _, layer = member.partition("/")
            cases += [case for name, case in networks[network].items() if layer in ("", name)]
        found[suite] = tuple(cases)
    return found


def _network(name: str, lines: dict[str, str]) -> dict[str, Case]:
    source, dtype = lines.pop("source"), lines.pop("dtype", "float32")
    cpu, gpu = map(int, lines.pop("batch").split())
    cases = {}
    for layer, text in lines.items():
        case = replace(parsed(text, f"{name} {layer}"), source=" ".join(source.split()), dtype=dtype)
        own = any(word.startswith("n=") for word in text.split())
        cases[layer] = case if own else replace(case, batches=(cpu, gpu))
    return cases


def selected(names: Sequence[str], asked: Sequence[str]) -> list[Case]:
    """Return the layers of suites whose names contain a word of ``asked``, and the layers that ``asked`` specifies.

    An item of ``asked`` that contains "=" specifies a layer; other items are words. "all" selects every suite, and so
    does an empty ``names`` if there are words. If ``asked`` is empty, all layers of the suites are returned. Each layer
    of a suite is returned once, with the selected suites that contain it.

    Raises ValueError with the nearest valid names.
    """
    if "" in asked:
        raise ValueError("a case must be part of a layer's name, or NAME=VALUE words; got ''")
    known = suites()
    names = list(known) if "all" in names else names
    for name in names:
        if name not in known:
            raise ValueError(f"there is no suite {name!r} ({nearest(name, known)}); gpuconv bench --list shows all")
    spelt = [text for text in asked if "=" in text]
    words = [text for text in asked if "=" not in text]
    found: dict[Case, tuple[str, ...]] = {}
    for suite in names or (known if words else ()):
        for case in known[suite]:
            if not asked or any(word in case.name for word in words):
                found[case] = (*found.get(case, ()), suite)
    for word in words:
        if not any(word in case.name for case in found):
            where = f"of {', '.join(names)} " if names else ""
            every = dict.fromkeys(case.name for suite in names or known for case in known[suite])
            raise ValueError(f"no layer {where}has {word!r} in its name ({nearest(word, every)})")
    return [*(replace(case, suites=inside) for case, inside in found.items()), *map(parsed, spelt)]
