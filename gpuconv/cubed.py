"""Convolutions of Cubed arrays, whose chunks lie in storage: every task has a bound of its memory.

:func:`conv` and :func:`conv_data_grad` have the arguments of :mod:`gpuconv`. They are lazy, and each block of the
result is computed from exactly the part of the input that it depends on, as in :mod:`gpuconv.dask`. Before it computes,
Cubed checks that every task fits ``allowed_mem``.

Examples
--------
>>> import cubed
>>> x = cubed.from_array(numpy.arange(6.0)[None], chunks=(1, 3))
>>> conv(x, numpy.array([[[1.0, 1.0]]]), padding=((0, 1),)).compute()
array([[1., 3., 5., 7., 9., 5.]])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, SupportsIndex

import numpy

from gpuconv import chunked, settings
from gpuconv.arguments import Shape
from gpuconv.chunked import arranged, inputs_read
from gpuconv.geometry import Geometry, Slices, extents_of
from gpuconv.select import check_name
from gpuconv.types import Activation, Algorithm, Layout, Padding, PerAxis
from gpuconv.validate import check_activation, check_bias, check_gradient, checked, given

try:
    from cubed import Array
    from cubed.core.ops import map_selection
except ImportError:
    raise ImportError("gpuconv.cubed needs Cubed: pip install 'gpuconv[cubed]'") from None


def conv(
    x: Array,
    w: numpy.ndarray,
    b: numpy.ndarray | None = None,
    *,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
    layout: Layout = "channels_first",
    flip: bool = False,
    activation: Activation | None = None,
    algorithm: Algorithm = "auto",
) -> Array:
    """Convolve a Cubed array, as :func:`gpuconv.conv` does one of NumPy.

    Parameters
    ----------
    x : cubed.Array of shape ``(..., C, *spatial)``
        Input, with any chunks.
    w : numpy.ndarray of shape ``(F, C/G, *kernel)``
        Filters.
    b : numpy.ndarray of shape ``(F,)``, optional
        Bias.
    stride, padding, dilation, groups, layout, flip, activation, algorithm
        As in :func:`gpuconv.conv`.

    Returns
    -------
    cubed.Array of shape ``(..., F, *output)``
        `y`, not computed yet, with chunks of the extents of those of `x`, divided by the stride.

    Raises
    ------
    ValueError, TypeError
        As in :func:`gpuconv.conv`.

    Examples
    --------
    >>> import cubed
    >>> x = cubed.from_array(numpy.ones((1, 8, 8)), chunks=(1, 4, 4))
    >>> conv(x, numpy.ones((2, 1, 3, 3)), stride=2).compute().shape
    (2, 3, 3)
    """
    dtype = _checked(x, "x", w=w, **given(b=b))
    geometry = Geometry.infer(x.shape, w.shape, stride, padding, dilation, groups, layout, flip)
    check_bias(b, geometry.filters)
    check_activation(activation, dtype)
    check_name(algorithm)
    compute = partial(chunked.conv, w=w, b=b, dtype=dtype, how={"activation": activation, "algorithm": algorithm})
    axes = zip(_chunks(x, geometry), geometry.stride, geometry.output, strict=True)
    extents = (max(1, min(m, -(-chunk // s))) for chunk, s, m in axes)
    blocks = _Blocks(geometry, True, (*x.chunksize[: len(geometry.batch)], *extents), compute)
    return blocks.array(x, dtype, w.nbytes + (0 if b is None else b.nbytes))


def conv_data_grad(
    dy: Array,
    w: numpy.ndarray,
    x_shape: Sequence[SupportsIndex],
    *,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
    layout: Layout = "channels_first",
    flip: bool = False,
    algorithm: Algorithm = "auto",
) -> Array:
    """Compute dx of a Cubed array, as :func:`gpuconv.conv_data_grad` does.

    Parameters
    ----------
    dy : cubed.Array of the shape of y
        Gradient with respect to the result of :func:`conv`, with any chunks.
    w : numpy.ndarray of shape ``(F, C/G, *kernel)``
        Filters.
    x_shape : sequence of int
        Shape of `x`, batch axes included.
    stride, padding, dilation, groups, layout, flip, algorithm
        As in :func:`gpuconv.conv`.

    Returns
    -------
    cubed.Array of shape `x_shape`
        Gradient dx, not computed yet, with chunks of the extents of those of `dy`, multiplied by the stride.

    Raises
    ------
    ValueError, TypeError
        As in :func:`gpuconv.conv`.

    Examples
    --------
    >>> import cubed
    >>> dy = cubed.from_array(numpy.ones((1, 1, 4)), chunks=(1, 1, 2))
    >>> conv_data_grad(dy, numpy.ones((1, 1, 2)), (1, 1, 5)).compute()
    array([[[1., 2., 2., 2., 1.]]])
    """
    dtype = _checked(dy, "dy", w=w)
    geometry = Geometry.infer(x_shape, w.shape, stride, padding, dilation, groups, layout, flip, x_name="x_shape")
    check_gradient(dy, geometry.y_shape, x_shape=geometry.x_shape, w=w.shape)
    check_name(algorithm)
    compute = partial(chunked.conv_data_grad, w=w, dtype=dtype, how={"algorithm": algorithm})
    axes = zip(_chunks(dy, geometry), geometry.stride, geometry.input, strict=True)
    extents = (max(1, min(n, chunk * s)) for chunk, s, n in axes)
    blocks = _Blocks(geometry, False, (*dy.chunksize[: len(geometry.batch)], *extents), compute)
    return blocks.array(dy, dtype, w.nbytes)


def _checked(array: Any, name: str, **others: Any) -> numpy.dtype:
    """Return the dtype of the result; the error names the array that does not fit."""
    if not isinstance(array, Array):
        raise TypeError(f"{name} must be a Cubed array, not {type(array).__name__}; cubed.from_array makes one")
    return checked(**{name: numpy.empty(0, array.dtype)}, **others)[1]


def _chunks(array: Array, geometry: Geometry) -> Shape:
    """Return the extents of the chunks on the spatial axes."""
    first = len(geometry.batch) + (geometry.layout == "channels_first")
    chunks: Shape = array.chunksize[first : first + geometry.rank]
    return chunks


class _Blocks(NamedTuple):
    """The blocks of y or of dx, each of which Cubed computes from a part of x or of dy."""

    geometry: Geometry
    is_forward: bool
    extents: Shape  # of a block: images, then spatial axes
    compute: Callable[..., Any]  # of the convolution of a block, and what it reads

    def array(self, source: Array, dtype: numpy.dtype, weights: int) -> Array:
        """Return the array of all blocks; each task holds ``weights`` bytes beside its block."""
        geometry, batch = self.geometry, len(self.geometry.batch)
        shape, channels = geometry.x_shape, geometry.channels
        if self.is_forward:
            shape, channels = geometry.y_shape, geometry.filters
        extents = arranged(geometry, self.extents[:batch], channels, self.extents[batch:])
        chunks = tuple(_cut(n, size) for n, size in zip(shape, extents, strict=True))
        most = self._most_chunks(tuple(map(len, chunks)), source.chunksize)
        room = settings.workspace_limit() + weights
        return map_selection(
            partial(_computed, self), self.selection, source, shape, dtype, chunks, most, extra_projected_mem=room
        )

    def _most_chunks(self, blocks: Shape, chunks: Shape) -> int:
        """Return an upper bound of the number of chunks, of these extents, that a block reads."""
        most, first = 1, (0,) * len(blocks)
        for axis, (number, size) in enumerate(zip(blocks, chunks, strict=True)):
            reads = [self.part((*first[:axis], block, *first[axis + 1 :]))[1][axis] for block in range(number)]
            most *= max(1, *(-(-read.stop // max(1, size)) - read.start // max(1, size) for read in reads))
        return most

    def part(self, block: Shape) -> tuple[Geometry, Slices]:
        """Return the convolution of a block, and what it reads."""
        geometry, batch = self.geometry, len(self.geometry.batch)
        spatial = block[batch + 1 :] if geometry.layout == "channels_first" else block[batch:-1]
        lengths = (*geometry.batch, *(geometry.output if self.is_forward else geometry.input))
        axes = zip((*block[:batch], *spatial), self.extents, lengths, strict=True)
        places = tuple(slice(number * size, min(n, (number + 1) * size)) for number, size, n in axes)
        images, inside = places[:batch], places[batch:]
        if self.is_forward:
            read, channels = inputs_read(geometry, inside), geometry.channels
            part = geometry.part(extents_of(images), read, inside)
        else:
            read, channels = geometry.outputs_of_windows(inside), geometry.filters
            part = geometry.part(extents_of(images), inside, read)
        return part, arranged(geometry, images, slice(0, channels), read)

    def selection(self, key: Any) -> Slices:
        """Return what the block with a key reads."""
        return self.part(key.coords)[1]


def _computed(blocks: _Blocks, read: numpy.ndarray, block_id: Shape) -> numpy.ndarray:
    """Return a block."""
    result: numpy.ndarray = blocks.compute(blocks.part(block_id)[0], read)
    return result


def _cut(extent: int, size: int) -> Shape:
    """Return the extents of the chunks of an axis."""
    return tuple(min(size, extent - start) for start in range(0, extent, max(1, size))) or (0,)
