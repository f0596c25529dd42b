"""Geometry: the integers that describe a convolution.

Letters of the whole library: N batch, C input channels, F output channels (filters), D H W input extents, T R S kernel
extents, M P Q output extents, G groups; x input, w weight, b bias, y output, dy dx dw db gradients. The directions are
forward, data_grad and weight_grad.

A Geometry consists of ints and tuples, so it prints, compares and serves as a key. Nothing here accesses arrays. Every
error about a shape, a stride or a padding is raised here, before anything is computed.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from itertools import product
from threading import RLock
from typing import Any, NamedTuple, SupportsIndex, TypeAlias, get_args

from gpuconv.arguments import Pairs, Settings, Shape, are_plain, geometry_settings, per_axis, shape_of, with_axes
from gpuconv.types import Direction, Layout, PaddingMode

Slices: TypeAlias = tuple[slice, ...]  # one for each spatial axis

DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
MOST_ELEMENTS = sys.maxsize // 16  # of an array of complex128 that has an address
TRANSPOSED_PADDING_NAMES = ("valid", "same", "same_lower")


def extents_of(slices: Slices) -> Shape:
    """Return the number of elements of slices with a start and a stop."""
    return tuple(block.stop - block.start for block in slices)


class Phase(NamedTuple):
    """One phase of the stride: the inputs ``start + step * u`` of every axis, and the taps that reach them.

    ``inputs`` and ``taps`` are slices, one per spatial axis. ``geometry`` is the convolution of dy with stride 1, with
    these taps in reverse order and C and F exchanged, that gives ``dx[inputs]``; None if no tap reaches these inputs.
    """

    inputs: tuple[slice, ...]
    taps: tuple[slice, ...]
    geometry: Geometry | None


@dataclass(frozen=True)
class Geometry:
    """One convolution, made by :meth:`infer` or :meth:`infer_transposed`.

    A transposed convolution is described by the convolution that it transposes: its result has the shape of x.
    """

    batch: Shape  # leading axes of x and y, none included
    channels: int  # C
    filters: int  # F
    input: Shape  # D H W
    kernel: Shape  # T R S
    stride: Shape
    padding: Pairs  # (low, high) of every axis; negative crops
    dilation: Shape
    groups: int = 1
    layout: Layout = "channels_first"
    flip: bool = False
    padding_mode: PaddingMode = "zeros"  # also if nothing is padded

    @classmethod
    def infer(
        cls,
        x_shape: Sequence[SupportsIndex],
        w_shape: Sequence[SupportsIndex],
        stride: object = 1,
        padding: object = 0,
        dilation: object = 1,
        groups: object = 1,
        layout: object = "channels_first",
        flip: object = False,
        padding_mode: object = "zeros",
        *,
        x_name: str = "x",
        w_name: str = "w",
    ) -> Geometry:
        """Return the geometry of the convolution of x with w, called ``x_name`` and ``w_name`` in error messages.

        Raises ValueError for shapes and values, TypeError for kinds.

        >>> Geometry.infer((8, 3, 32, 32), (16, 3, 3, 3), stride=2, padding=1).y_shape
        (8, 16, 16, 16)
        """
        given = (x_name, w_name, x_shape, w_shape, stride, padding, dilation, groups, layout, flip, padding_mode)
        return (_of_arguments if are_plain(given) else _of_arguments.__wrapped__)(*given)

    @classmethod
    def infer_transposed(
        cls,
        x_shape: Sequence[SupportsIndex],
        w_shape: Sequence[SupportsIndex],
        stride: object = 1,
        padding: object = 0,
        dilation: object = 1,
        groups: object = 1,
        layout: object = "channels_first",
        flip: object = False,
        output_padding: object = 0,
        output_shape: object = None,
    ) -> Geometry:
        """Return the convolution whose transpose accepts x: its y_shape is x_shape, its x_shape is that of the result.

        >>> Geometry.infer_transposed((8, 16, 16, 16), (16, 3, 3, 3), stride=2, padding=1, output_padding=1).x_shape
        (8, 3, 32, 32)
        """
        given = (x_shape, w_shape, output_padding, output_shape, stride, padding, dilation, groups, layout, flip)
        return (_of_transposed if are_plain(given) else _of_transposed.__wrapped__)(*given)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # A Geometry is the key of several caches in every call; hashing its dozen fields once is enough.
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    @property
    def rank(self) -> int:
        """The number of spatial axes."""
        return len(self.kernel)

    @cached_property
    def window(self) -> Shape:
        """The extent of the input window of one output: dilation * (kernel - 1) + 1."""
        return tuple(d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True))

    @cached_property
    def output(self) -> Shape:
        """The output extents."""
        return tuple(
            (n + low + high - window) // s + 1
            for n, (low, high), window, s in zip(self.input, self.padding, self.window, self.stride, strict=True)
        )

    def position(self, axis: int, output: Any, tap: Any) -> Any:
        """Return the input that an output reads through a tap of an axis: ints, or arrays of them.

        It is negative, or not less than the input extent, if the output reads padding.
        """
        return output * self.stride[axis] + tap * self.dilation[axis] - self.padding[axis][0]

    def outputs_reading(self, axis: int, tap: int, outputs: slice, inputs: slice) -> range:
        """Return which outputs of a block read inputs of another block through a tap of an axis."""
        s, shift = self.stride[axis], self.position(axis, 0, tap)
        first = max(outputs.start, -((shift - inputs.start) // s))
        return range(first, max(first, min(outputs.stop, (inputs.stop - 1 - shift) // s + 1)))

    def inputs_in_windows(self, outputs: Slices) -> tuple[tuple[int, int], ...]:
        """Return the first input in the windows of a block of outputs on each axis, and the one after the last."""
        return tuple(
            (self.position(axis, block.start, 0), self.position(axis, block.stop - 1, taps - 1) + 1)
            for axis, (block, taps) in enumerate(zip(outputs, self.kernel, strict=True))
        )

    def outputs_of_windows(self, inputs: Slices) -> Slices:
        """Return the outputs whose windows meet a block of inputs."""
        outputs = []
        axes = zip(inputs, self.stride, self.window, self.padding, self.output, strict=True)
        for block, s, window, (low, _), m in axes:
            first = max(0, -(-(block.start + low - window + 1) // s))
            outputs.append(slice(first, max(first, min(m, (block.stop - 1 + low) // s + 1))))
        return tuple(outputs)

    @property
    def padded(self) -> Geometry:
        """The same convolution of the padded x, without padding."""
        extents = tuple(n + low + high for n, (low, high) in zip(self.input, self.padding, strict=True))
        return replace(self, input=extents, padding=((0, 0),) * self.rank, padding_mode="zeros")

    def part(self, batch: Shape, positions: Slices, outputs: Slices) -> Geometry:
        """Return the convolution of a block of the padded x that gives a block of outputs.

        Positions are counted from the first element of x: those before it are negative.
        """
        extents, padding = [], []
        for block, out, s, window, (low, _) in zip(
            positions, outputs, self.stride, self.window, self.padding, strict=True
        ):
            extent, span = block.stop - block.start, (out.stop - out.start - 1) * s + window
            before = low + block.start - out.start * s
            extents.append(extent)
            padding.append((before, span - before - extent))
        return replace(self, batch=batch, input=tuple(extents), padding=tuple(padding), padding_mode="zeros")

    @cached_property
    def reaches_beyond(self) -> bool:
        """Whether a window reaches beyond the input, at either end of some axis."""
        windows = self.inputs_in_windows(tuple(slice(0, m) for m in self.output))
        return any(start < 0 or stop > n for (start, stop), n in zip(windows, self.input, strict=True))

    @cached_property
    def is_pointwise(self) -> bool:
        """Whether every output depends only on the input at the same position."""
        return {*self.kernel, *self.stride} == {1} and not any(map(any, self.padding))

    @property
    def group_channels(self) -> int:
        """C / G."""
        return self.channels // self.groups

    @property
    def group_filters(self) -> int:
        """F / G."""
        return self.filters // self.groups

    @cached_property
    def taps(self) -> int:
        """T * R * S."""
        return math.prod(self.kernel)

    @cached_property
    def x_shape(self) -> Shape:
        return self._images(self.channels, self.input)

    @cached_property
    def y_shape(self) -> Shape:
        return self._images(self.filters, self.output)

    @cached_property
    def w_shape(self) -> Shape:
        if self.layout == "channels_last":
            return (*self.kernel, self.group_channels, self.filters)
        return (self.filters, self.group_channels, *self.kernel)

    def shape_of(self, role: str) -> Shape:
        """Return the shape of "x", "w" or "y"."""
        return {"x": self.x_shape, "w": self.w_shape, "y": self.y_shape}[role]

    def _images(self, channels: int, extent: Shape) -> Shape:
        if self.layout == "channels_last":
            return (*self.batch, *extent, channels)
        return (*self.batch, channels, *extent)

    def multiply_adds(self) -> int:
        """Return the number of products of an element of w with one of x, which is the same in every direction."""
        return math.prod(self.batch) * math.prod(self.output) * self.filters * self.group_channels * self.taps

    def flops(self, *, is_complex: bool = False) -> int:
        """Return the real operations of the direct algorithm: 2 for each multiply-add, 8 for complex numbers."""
        return self.multiply_adds() * (8 if is_complex else 2)

    def bytes(self, itemsize: int) -> int:
        """Return the bytes of x, w and y, each counted once."""
        return itemsize * (math.prod(self.x_shape) + math.prod(self.w_shape) + math.prod(self.y_shape))

    def reduction_length(self, direction: Direction) -> int:
        """Return the largest number of products in one element of the result."""
        if direction == "forward":
            return self.group_channels * self.taps
        if direction == "weight_grad":
            return math.prod(self.batch) * math.prod(self.output)
        reaching = (
            -(-k // (s // math.gcd(s, d))) for k, s, d in zip(self.kernel, self.stride, self.dilation, strict=True)
        )
        return self.group_filters * math.prod(reaching)

    @cached_property
    def largest_index(self) -> int:
        """An upper bound on the elements of x, w and y, and on every position that a tap or the padding reaches."""
        elements = (math.prod(shape) for shape in (self.x_shape, self.w_shape, self.y_shape))
        axes = zip(self.input, self.padding, self.kernel, self.dilation, self.stride, strict=True)
        return max(*elements, *(n + abs(low) + abs(high) + k * d + s for n, (low, high), k, d, s in axes))

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        """data_grad as forward convolutions of dy, one for each phase of the stride (polyphase decomposition).

        Tap t brings output o to input i if i = o * stride + t * dilation - low. For the inputs of one phase these taps
        are equally spaced, and so are the outputs: this is a convolution of dy with stride 1. The phases share no
        input, and no product is computed that scattering would not compute. (Sub-pixel convolution, Shi et al. 2016,
        arXiv:1609.07009, for any stride and dilation.)
        """
        parts = []
        for axes in product(*(self.axis_phases(axis) for axis in range(self.rank))):
            inputs = tuple(axis.inputs for axis in axes)
            taps = tuple(axis.taps for axis in axes)
            geometry = None
            if all(axis.reaching for axis in axes):
                geometry = replace(
                    self,
                    channels=self.filters,
                    filters=self.channels,
                    input=self.output,
                    kernel=tuple(axis.reaching for axis in axes),
                    stride=(1,) * self.rank,
                    padding=tuple(axis.padding for axis in axes),
                    dilation=tuple(axis.dilation for axis in axes),
                )
            parts.append(Phase(inputs, taps, geometry))
        return tuple(parts)

    @property
    def inverse(self) -> Geometry:
        """For stride 1, the forward convolution of dy that gives dx: w rotated by 180 degrees, C and F exchanged.

        If x is empty, this is the convolution itself, since nothing is computed.
        """
        return next((phase.geometry for phase in self.phases if phase.geometry is not None), self)

    def axis_phases(self, axis: int) -> list[AxisPhase]:
        """Return the phases of one axis, including those that no tap reaches."""
        n, k, s, d = self.input[axis], self.kernel[axis], self.stride[axis], self.dilation[axis]
        low, outputs = self.padding[axis][0], self.output[axis]
        common = math.gcd(s, d)
        apart = s // common  # the next tap that meets the same phase
        reach = d * apart // s  # how far the output moves from one such tap to the next
        phases = []
        for start in range(min(s, n)):
            # The first t with t * d = start + low modulo s.
            quotient, rest = divmod(start + low, common)
            first = k if rest else min(k, quotient * pow(d // common, -1, apart) % apart)
            count = len(range(first, k, apart))
            length = len(range(start, n, s))
            origin = (start + low - first * d) // s  # the output that the first tap brings to input `start`
            span = reach * (count - 1)
            padding = (span - origin, length - outputs + origin)
            phases.append(AxisPhase(slice(start, n, s), slice(first, k, apart), count, padding, reach))
        return phases


class AxisPhase(NamedTuple):
    """One phase of one axis, with the parameters of its convolution."""

    inputs: slice
    taps: slice
    reaching: int  # how many taps
    padding: tuple[int, int]
    dilation: int


def _split(x_shape: Shape, w_shape: Shape, layout: Layout, x_name: str, w_name: str) -> tuple[Shape, int, Shape, Shape]:
    """Return the batch axes, channels and extents of x, and the extents of the kernel."""
    rank = len(w_shape) - 2
    if len(x_shape) <= rank:
        hint = f"; an image of one channel is {with_axes(x_name, 1, layout)}" if len(x_shape) == rank else ""
        raise ValueError(
            f"{x_name} must have a channel axis and the {rank} spatial axes of {w_name}"
            f" ({x_name} {x_shape}, {w_name} {w_shape}){hint}"
        )
    axes = len(x_shape) - rank - 1
    if layout == "channels_last":
        return x_shape[:axes], x_shape[-1], x_shape[axes:-1], w_shape[:rank]
    return x_shape[:axes], x_shape[axes], x_shape[axes + 1 :], w_shape[2:]


def _layout_hint(x_shape: Shape, w_shape: Shape, layout: Layout, groups: int) -> str:
    """Return a hint for the error message if the shapes fit the other layout."""
    last = layout == "channels_first"
    channels = x_shape[-1] if last else x_shape[-len(w_shape) + 1]
    expected = groups * (w_shape[-2] if last else w_shape[1])
    return f"; they fit layout={'channels_last' if last else 'channels_first'!r}" if channels == expected else ""


def _depthwise_hint(w_name: str, w_shape: Shape, layout: Layout, groups: int) -> str:
    """Return a hint for the error message if the weight may be TensorFlow's for depthwise convolutions."""
    *kernel, channels, multiplier = w_shape
    if layout != "channels_last" or groups == 1 or channels != groups:
        return ""
    shape = ", ".join(map(str, (*kernel, 1, channels * multiplier)))
    return f"; if its last axes are channels and multiplier, pass {w_name.removesuffix('_shape')}.reshape({shape})"


def _check_kernel(kernel: Shape, w_shape: Shape, w_name: str) -> None:
    if min(kernel) < 1:
        raise ValueError(f"{w_name} must have a kernel extent of at least 1 on every axis ({w_name} {w_shape})")


def _check_padding_mode(geometry: Geometry, x_name: str) -> None:
    """Raise ValueError if the padding is longer than the elements that it may repeat."""
    mode = geometry.padding_mode
    if mode == "zeros":
        return
    for axis, (n, padding) in enumerate(zip(geometry.input, geometry.padding, strict=True)):
        if mode == "replicate":
            most, rule = (sys.maxsize if n else 0), "at most 0 for an extent of 0"
        elif mode == "reflect":
            most, rule = max(n - 1, 0), f"at most the extent of {x_name} - 1"
        else:
            most, rule = n, f"at most the extent of {x_name}"
        if max(padding) > most:
            raise ValueError(
                f"padding must be {rule} with padding_mode={mode!r}, but on spatial axis {axis} it is"
                f" {padding} and the extent is {n} ({x_name} {geometry.x_shape})"
            )


def _check_size(y_shape: Shape) -> None:
    if (elements := math.prod(y_shape)) > MOST_ELEMENTS:
        raise ValueError(f"y would have the shape {y_shape}, {elements:.2g} elements, more than memory can have")


# What callers write, as they write it: a repeated call finds its geometry in one step.


@lru_cache(maxsize=4096, typed=True)
def _of_arguments(x_name: str, w_name: str, x_shape: Any, w_shape: Any, *settings: Any) -> Geometry:
    shapes = shape_of(x_shape, x_name), shape_of(w_shape, w_name)
    return _infer(*shapes, geometry_settings(shapes[1], w_name, *settings), x_name, w_name)


@lru_cache(maxsize=4096, typed=True)
def _of_transposed(x_shape: Any, w_shape: Any, output_padding: Any, output_shape: Any, *settings: Any) -> Geometry:
    shapes = shape_of(x_shape, "x"), shape_of(w_shape, "w")
    checked, rank = geometry_settings(shapes[1], "w", *settings, "zeros"), len(shapes[1]) - 2
    extra = per_axis(output_padding, rank, "output_padding", minimum=0)
    if output_shape is None:
        return _infer_transposed(*shapes, checked, extra)
    if any(extra):
        raise ValueError(f"output_padding must be 0 beside output_shape, which takes its place; got {output_padding}")
    if isinstance(output_shape, (tuple, list)) and len(output_shape) == len(shapes[0]):
        raise ValueError(
            f"output_shape must have the {rank} spatial extents only, got {tuple(output_shape)};"
            " conv_data_grad(dy, w, x_shape) takes a whole shape"
        )
    return _infer_of_output(*shapes, checked, per_axis(output_shape, rank, "output_shape", minimum=1))


@lru_cache(maxsize=4096)
def _infer(x_shape: Shape, w_shape: Shape, settings: Settings, x_name: str, w_name: str) -> Geometry:
    stride, padding, dilation, groups, layout, flip, mode = settings
    batch, channels, extent, kernel = _split(x_shape, w_shape, layout, x_name, w_name)
    group_channels, filters = w_shape[-2:] if layout == "channels_last" else (w_shape[1], w_shape[0])
    shapes = f"({x_name} {x_shape}, {w_name} {w_shape}, groups={groups})"
    if channels % groups:
        raise ValueError(
            f"groups must divide the channels of {x_name}, but {groups} does not divide {channels} {shapes}"
        )
    if filters % groups:
        hint = _depthwise_hint(w_name, w_shape, layout, groups)
        raise ValueError(
            f"groups must divide the filters of {w_name}, but {groups} does not divide {filters} {shapes}{hint}"
        )
    if channels != group_channels * groups:
        hint = _layout_hint(x_shape, w_shape, layout, groups) or _depthwise_hint(w_name, w_shape, layout, groups)
        raise ValueError(
            f"{x_name} has {channels} channels but {w_name} expects {group_channels * groups} {shapes}{hint}"
        )
    _check_kernel(kernel, w_shape, w_name)
    pairs = padding if isinstance(padding, tuple) else _named_padding(padding, extent, kernel, stride, dilation)
    mode = mode if any(end > 0 for pair in pairs for end in pair) else "zeros"
    geometry = Geometry(batch, channels, filters, extent, kernel, stride, pairs, dilation, groups, layout, flip, mode)
    _check_padding_mode(geometry, x_name)
    for axis, size in enumerate(geometry.output):
        if size < 1:
            n, k, s, d, (low, high) = extent[axis], kernel[axis], stride[axis], dilation[axis], pairs[axis]
            raise ValueError(
                f"y would be empty on spatial axis {axis}:"
                f" ({n} + {low} + {high} - {d} * ({k} - 1) - 1) // {s} + 1 = {size},"
                f" from (input + low + high - dilation * (kernel - 1) - 1) // stride + 1 {shapes};"
                f" {w_name} spans {d * (k - 1) + 1} there, and the padded {x_name} {n + low + high}"
            )
    _check_size(geometry.y_shape)
    return geometry


def _named_padding(name: str, extent: Shape, kernel: Shape, stride: Shape, dilation: Shape) -> Pairs:
    if name == "causal" and len(extent) != 1:
        raise ValueError(f"padding='causal' is for one spatial axis, but w has {len(extent)}")
    pairs = []
    for n, k, s, d in zip(extent, kernel, stride, dilation, strict=True):
        reach = d * (k - 1)
        if name == "valid":
            pairs.append((0, 0))
        elif name == "full":
            pairs.append((reach, reach))
        elif name == "causal":
            pairs.append((reach, 0))
        else:
            pairs.append(_same_padding(name, n, s, reach))
    return tuple(pairs)


def _same_padding(name: str, n: int, s: int, reach: int) -> tuple[int, int]:
    """Return the (low, high) padding that gives an output of ceil(n / s); never negative."""
    total = max((-(-n // s) - 1) * s + reach + 1 - n, 0)
    low = total // 2 if name == "same" else -(-total // 2)
    return low, total - low


class _Transposed(NamedTuple):
    """The checked parts of a transposed convolution: of x, which is like the y of a convolution, and of w."""

    batch: Shape
    filters: int
    extent: Shape  # of x
    kernel: Shape
    channels: int  # of the result
    shapes: str  # for error messages


def _transposed(x_shape: Shape, w_shape: Shape, settings: Settings) -> _Transposed:
    padding, groups, layout = settings.padding, settings.groups, settings.layout
    batch, filters, extent, kernel = _split(x_shape, w_shape, layout, "x", "w")
    group_channels, expected = w_shape[-2:] if layout == "channels_last" else (w_shape[1], w_shape[0])
    shapes = f"(x {x_shape}, w {w_shape}, groups={groups})"
    if filters % groups:
        raise ValueError(f"groups must divide the channels of x, but {groups} does not divide {filters} {shapes}")
    if filters != expected:
        raise ValueError(f"x has {filters} channels but w expects {expected} {shapes}")
    _check_kernel(kernel, w_shape, "w")
    if isinstance(padding, str) and padding not in TRANSPOSED_PADDING_NAMES:
        raise ValueError(
            f"padding={padding!r} has no meaning for a transposed convolution;"
            f" the names are {', '.join(TRANSPOSED_PADDING_NAMES)}"
        )
    return _Transposed(batch, filters, extent, kernel, group_channels * groups, shapes)


@lru_cache(maxsize=4096)
def _infer_of_output(x_shape: Shape, w_shape: Shape, settings: Settings, output_shape: Shape) -> Geometry:
    """Return the convolution of an array with the extents ``output_shape``, whose result must be like x."""
    batch, _, extent, kernel, channels, shapes = _transposed(x_shape, w_shape, settings)
    padding = settings.padding
    for axis, (n, k, s, d) in enumerate(zip(extent, kernel, settings.stride, settings.dilation, strict=True)):
        low, high = padding[axis] if isinstance(padding, tuple) else (0, 0)
        reach = 0 if padding in ("same", "same_lower") else d * (k - 1)
        shortest = (n - 1) * s + reach + 1 - low - high
        first, last = max(1, shortest), shortest + s - 1
        if n < 1 or not first <= output_shape[axis] <= last:
            raise ValueError(
                f"output_shape must be {first} to {last} on spatial axis {axis}, of which conv makes {n};"
                f" got {output_shape[axis]} {shapes}"
            )
    is_last = settings.layout == "channels_last"
    shape = (*batch, *output_shape, channels) if is_last else (*batch, channels, *output_shape)
    return _infer(shape, w_shape, settings, "y", "w")


@lru_cache(maxsize=4096)
def _infer_transposed(x_shape: Shape, w_shape: Shape, settings: Settings, output_padding: Shape) -> Geometry:
    stride, padding, dilation, groups, layout, flip, _ = settings
    batch, filters, extent, kernel, channels, shapes = _transposed(x_shape, w_shape, settings)
    if isinstance(padding, str) and padding != "valid" and any(output_padding):
        raise ValueError(
            f"output_padding must be 0 beside padding={padding!r}, which sets the output itself, got {output_padding}"
        )
    pairs, result = [], []
    for axis, (n, k, s, d) in enumerate(zip(extent, kernel, stride, dilation, strict=True)):
        reach, extra = d * (k - 1), output_padding[axis]
        if extra and extra >= max(s, d):
            raise ValueError(
                f"output_padding must be less than max(stride, dilation) = {max(s, d)},"
                f" got {extra} on spatial axis {axis}"
            )
        if padding == "valid":
            low = high = 0
        elif isinstance(padding, str):
            low = _same_padding(padding, n * s, s, reach)[0]
            high = reach + 1 - s - low
        else:
            low, high = padding[axis]
        size = (n - 1) * s + reach + 1 - low - high + extra
        if n < 1 or size < 1:
            raise ValueError(
                f"y would be empty on spatial axis {axis}:"
                f" ({n} - 1) * {s} + {d} * ({k} - 1) + 1 - {low} - {high} + {extra} = {size},"
                f" from (input - 1) * stride + dilation * (kernel - 1) + 1 - low - high + output_padding {shapes}"
            )
        # What is added at the high end is padding that the convolution on the result does not see.
        pairs.append((low, high - extra))
        result.append(size)
    geometry = Geometry(
        batch, channels, filters, tuple(result), kernel, stride, tuple(pairs), dilation, groups, layout, flip
    )
    _check_size(geometry.x_shape)
    return geometry


def _renew_locks() -> None:
    """Replace locks in a forked child: before Python 3.12 cached properties have one, which another thread may hold."""
    for value in vars(Geometry).values():
        if hasattr(value, "lock"):
            value.lock = RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)
