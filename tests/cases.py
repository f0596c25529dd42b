"""Named convolutions, small with unusual parameters, that every algorithm, dtype, layout and backend must compute."""

import functools
from typing import NamedTuple

import numpy as np

from gpuconv.arrays import NUMPY
from gpuconv.cpu import compiled
from gpuconv.geometry import Geometry
from gpuconv.gpu import kernels_folder
from gpuconv.request import Request
from gpuconv.select import ALGORITHMS, MODULES, TRANSFORMS
from tests.emulation.launcher import EMULATED

DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
LAYOUTS = ("channels_first", "channels_last", "channels_last_memory")
ORDINARY = Geometry.infer((2, 8, 12, 12), (8, 8, 3, 3), padding=1)
GROUPED = Geometry.infer((2, 8, 12, 12), (8, 1, 3, 3), padding=1, groups=8)


def accepts(algorithm, geometry):
    """Return whether an algorithm computes a float32 convolution where there are kernels."""
    return MODULES[algorithm].why_not(Request(geometry, np.dtype(np.float32), "forward", EMULATED)) is None


GENERAL_ALGORITHMS = tuple(name for name in ALGORITHMS if accepts(name, ORDINARY))
EXACT_ALGORITHMS = tuple(name for name in GENERAL_ALGORITHMS if name not in TRANSFORMS)  # on small integers
KERNELS = tuple(name for name in ALGORITHMS if (kernels_folder() / f"{name}.cu").exists())  # on a GPU
GENERAL_KERNELS = tuple(name for name in KERNELS if name != "depthwise")  # for any number of channels
NEED_KERNELS = ("implicit_gemm", *(("direct",) if compiled.missing() else ()))
NUMPY_ALGORITHMS = tuple(name for name in ALGORITHMS if name not in NEED_KERNELS)
DIRECTIONS = ("forward", "data_grad", "weight_grad")


class Case(NamedTuple):
    """One convolution in channels_first terms; padding is one (low, high) pair per axis."""

    name: str
    x: tuple
    w: tuple
    stride: tuple
    padding: tuple
    dilation: tuple
    groups: int = 1
    flip: bool = False

    @property
    def settings(self):
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "flip": self.flip,
        }

    def geometry(self, layout="channels_first"):
        """Return gpuconv's geometry of the case."""
        x, w = self.x, self.w
        if layout == "channels_last":
            x, w = (x[0], *x[2:], x[1]), (*w[2:], w[1], w[0])
        return Geometry.infer(x, w, **self.settings, layout=layout)


def case(name, x, w, stride=1, padding=0, dilation=1, groups=1, flip=False):
    rank = len(x) - 2

    def per_axis(value):
        return value if isinstance(value, tuple) else (value,) * rank

    pairs = tuple(p if isinstance(p, tuple) else (p, p) for p in per_axis(padding))
    return Case(name, x, w, per_axis(stride), pairs, per_axis(dilation), groups, flip)


CASES = (
    case("3x3", (2, 3, 7, 6), (4, 3, 3, 3), padding=1),
    case("3x3 valid", (2, 3, 7, 6), (4, 3, 3, 3)),
    case("1x1", (2, 5, 4, 6), (3, 5, 1, 1)),
    case("1x1 stride 2", (2, 5, 5, 6), (3, 5, 1, 1), stride=2),
    case("1x1 padded", (2, 2, 3, 3), (3, 2, 1, 1), padding=1),
    case("even kernel", (1, 2, 6, 6), (3, 2, 2, 4), padding=((0, 1), (1, 2))),
    case("stride 2", (2, 3, 9, 8), (4, 3, 3, 3), stride=2, padding=1),
    case("stride beyond kernel", (2, 2, 11, 10), (3, 2, 2, 2), stride=(3, 4)),
    case("stride per axis", (1, 2, 8, 9), (2, 2, 3, 3), stride=(1, 3), padding=1),
    case("patches", (2, 3, 8, 8), (5, 3, 4, 4), stride=4),
    case("dilation 2", (1, 2, 9, 9), (3, 2, 3, 3), padding=2, dilation=2),
    case("dilation with stride", (2, 2, 10, 11), (3, 2, 3, 2), stride=(2, 3), padding=(1, 2), dilation=(2, 3)),
    case("stride and dilation share 2", (1, 2, 12, 11), (2, 2, 3, 3), stride=4, padding=1, dilation=2),
    case("stride and dilation equal", (1, 2, 9, 9), (2, 2, 3, 3), stride=2, padding=1, dilation=2),
    case("kernel larger than input", (2, 2, 3, 2), (3, 2, 5, 4), padding=2),
    case("padding larger than kernel", (1, 2, 3, 3), (2, 2, 2, 2), padding=4),
    case("padding beyond stride", (1, 1, 4, 4), (1, 1, 2, 2), stride=3, padding=((3, 5), (4, 0))),
    case("crops", (2, 2, 9, 8), (3, 2, 3, 3), padding=((-1, -2), (-2, 0))),
    case("cropped patches", (2, 2, 9, 8), (3, 2, 2, 3), stride=(2, 3), padding=((-2, -1), (0, -1))),
    case("patches apart", (2, 3, 11, 8), (4, 3, 2, 1), stride=(5, 3)),
    case("far dilation", (1, 2, 24, 9), (3, 2, 2, 3), dilation=(20, 3), padding=((0, 2), (1, 0))),
    case("long kernel", (2, 2, 90), (2, 2, 81), padding=10),
    case("crop low, pad high", (1, 2, 7, 7), (2, 2, 3, 3), stride=2, padding=((-2, 3), (3, -1))),
    case("asymmetric padding", (2, 2, 6, 7), (3, 2, 3, 3), padding=((0, 2), (1, 0))),
    case("groups 2", (2, 4, 6, 5), (6, 2, 3, 3), padding=1, groups=2),
    case("groups 3, stride 2", (1, 6, 7, 7), (3, 2, 3, 3), stride=2, groups=3),
    case("depthwise", (2, 5, 6, 7), (5, 1, 3, 3), padding=1, groups=5),
    case("depthwise stride 2", (2, 4, 7, 6), (4, 1, 3, 3), stride=2, padding=1, groups=4),
    case("depthwise multiplier", (2, 3, 5, 5), (6, 1, 3, 3), padding=1, groups=3),
    case("many into one per group", (1, 6, 5, 5), (2, 3, 3, 3), groups=2),
    case("one channel", (3, 1, 6, 6), (2, 1, 3, 3)),
    case("one filter", (2, 3, 6, 6), (1, 3, 3, 3), padding=1),
    case("one output", (2, 3, 4, 5), (4, 3, 4, 5)),
    case("one pixel", (2, 3, 1, 1), (4, 3, 1, 1)),
    case("flipped", (2, 3, 6, 7), (4, 3, 3, 2), padding=((1, 0), (0, 1)), flip=True),
    case("flipped, dilated, strided", (1, 2, 9, 9), (2, 2, 3, 3), stride=2, padding=2, dilation=2, flip=True),
    case("more images than outputs", (7, 2, 3, 3), (3, 2, 2, 2)),
    case("1-D", (2, 3, 17), (4, 3, 5), padding=2),
    case("1-D causal dilated", (2, 2, 15), (3, 2, 3), padding=((8, 0),), dilation=4),
    case("1-D stride 3", (2, 2, 16), (3, 2, 4), stride=3, padding=1),
    case("1-D stride is kernel", (2, 2, 12), (3, 2, 3), stride=3),
    case("1-D depthwise", (2, 4, 11), (4, 1, 4), padding=((3, 0),), groups=4),
    case("3-D", (2, 2, 4, 5, 6), (3, 2, 2, 3, 2), padding=1),
    case("3-D strided", (1, 2, 5, 6, 7), (2, 2, 3, 2, 3), stride=(2, 1, 2), padding=(1, 0, 1), dilation=(1, 2, 1)),
    case("3-D dilated", (1, 2, 7, 4, 5), (2, 2, 3, 2, 2), padding=((1, 2), (0, 0), (2, 1)), dilation=(2, 1, 3)),
    case("3-D groups", (1, 4, 3, 4, 4), (4, 2, 3, 3, 3), padding=1, groups=2),
    case("many channels", (1, 20, 5, 6), (36, 20, 3, 2), padding=1),
    case("many channels, groups, stride 2", (1, 22, 6, 5), (26, 11, 3, 3), stride=2, padding=1, groups=2),
    case("several boxes", (1, 9, 9, 11), (9, 9, 3, 3), padding=1),
    case("several boxes in a row", (1, 1, 703), (1, 1, 3), stride=2, padding=1),
    case("several slices", (3, 2, 17, 13), (3, 2, 2, 2), padding=1),
    case("a slice of one output", (1, 1, 4163), (1, 1, 3)),
    case("taps further apart than a block reaches", (1, 1, 10010), (1, 1, 3), padding=((0, 2),), dilation=5000),
    case(
        "3-D taps further apart than a block reaches",
        (1, 1, 10010, 1, 1),
        (1, 1, 3, 1, 1),
        padding=((0, 2), 0, 0),
        dilation=(5000, 1, 1),
    ),
    case("4-D", (1, 2, 3, 3, 4, 3), (2, 2, 2, 2, 2, 2), padding=((0, 1),) * 4),
)


def named_dtype(name):
    if isinstance(name, str) and name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def wide(dtype):
    """Return the dtype in which the reference for a dtype is computed."""
    return np.complex128 if np.dtype(dtype).kind == "c" else np.float64


def draw(rng, shape, dtype, integers):
    """Return random data that the dtype represents exactly, in its wide dtype."""
    dtype = named_dtype(dtype)
    values = rng.integers(-3, 4, shape).astype(float) if integers else rng.standard_normal(shape)
    if dtype.kind == "c":
        values = values + 1j * (rng.integers(-3, 4, shape) if integers else rng.standard_normal(shape))
    return values.astype(dtype).astype(wide(dtype))


def laid_out(array, layout, role="x"):
    """Return a channels_first array as channels_last, or as channels_first with channels_last memory."""
    if layout == "channels_first":
        return np.ascontiguousarray(array)
    if role == "w":
        return np.ascontiguousarray(np.moveaxis(array, (0, 1), (-1, -2))) if layout == "channels_last" else array
    memory = np.ascontiguousarray(np.moveaxis(array, 1, -1))
    return memory if layout == "channels_last" else np.moveaxis(memory, -1, 1)


def channels_first(array, layout, role="x"):
    """Undo :func:`laid_out`."""
    if layout != "channels_last":
        return array
    return np.moveaxis(array, (-1, -2), (0, 1)) if role == "w" else np.moveaxis(array, -1, 1)


def is_on(arrays, algorithm, **_):
    """Return whether a backend has an algorithm; some consist of kernels only."""
    return arrays != "numpy" or algorithm not in NEED_KERNELS


def compiles_little(case, algorithm, arrays, **_):
    """Return whether a case needs few kernels, or is one of a few; these two have kernels for almost every call."""
    if algorithm == "depthwise":
        return case.name.startswith("depthwise")
    return algorithm != "implicit_gemm" or CASES.index(case) % (8 if arrays == "cupy" else 4) == 0


@functools.cache
def why_not(case, algorithm, direction="forward", dtype="float32", on_kernels=False):
    """Return why an algorithm refuses a case, on NumPy or with kernels, or None."""
    backend = EMULATED if on_kernels else NUMPY
    return MODULES[algorithm].why_not(Request(case.geometry(), named_dtype(dtype), direction, backend, False))


def is_taken(case, algorithm, arrays="numpy", direction="forward", dtype="float32", **_):
    """Return whether an algorithm computes a case on a backend."""
    return is_on(arrays, algorithm) and why_not(case, algorithm, direction, dtype, arrays != "numpy") is None
