"""One call of a public function: its arrays checked, where and how it computes, and what it returns."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy

from gpuconv import activations, dtypes, replay, settings, tape, threads, workspace
from gpuconv.activations import Activation
from gpuconv.algorithms.blocks import Space, boxes, fitting_box, group_parts
from gpuconv.algorithms.matrices import BYTES
from gpuconv.arguments import Shape
from gpuconv.backend import (
    Array,
    Backend,
    Kind,
    address,
    addressable,
    backend_for,
    device_of,
    kind_of,
    matrix_products,
    module_of,
    moved,
)
from gpuconv.choose import LAUNCHES_ONLY, MODULES, ON_TAPE, check_name, choose, consent
from gpuconv.geometry import Direction, Geometry
from gpuconv.operands import Operand, Result, Role, canonical
from gpuconv.request import Request, workspace_of

NEEDS = ("dx", "dw", "db")


class Source(NamedTuple):
    """An array that a call reads, the role that it plays in the geometry, and what to make of its elements."""

    array: Array
    role: Role
    conjugate: bool = False
    y: Array | None = None
    activation: Activation | None = None

    def operand(self, geometry: Geometry, backend: Backend, dtype: numpy.dtype) -> Operand:
        return Operand(
            canonical(_within_reach(self.array, backend), self.role, geometry),
            self.conjugate and dtypes.is_complex(dtype),
            None if self.y is None else canonical(_within_reach(self.y, backend), self.role, geometry),
            self.activation,
        )


def _within_reach(array: Array, backend: Backend) -> Array:
    """The array where the backend computes; a copy of what kernels cannot address."""
    array = moved(array, backend.kind)
    if backend.launch is None or addressable(array):
        return array
    return array.astype(dtypes.native(array.dtype))


class Call:
    """One call of a public function: where and how it computes. Settings are read, and refused, here."""

    def __init__(
        self,
        geometry: Geometry,
        kind: Kind,
        dtype: numpy.dtype,
        algorithm: str,
        precision: str | None,
        deterministic: bool | None,
    ) -> None:
        self.geometry, self.kind, self.dtype = geometry, kind, dtype
        check_name(algorithm)
        self.algorithm = algorithm
        self.deterministic = consent(algorithm, deterministic)
        self.precision = settings.precision(precision)
        self.limit = settings.workspace_limit()
        self.threads = settings.num_threads()
        self.backend = backend_for(kind)
        self.sums = dtypes.accumulator(dtype)

    def check_out(self, out: Array | None, shape: Shape, **inputs: Array) -> None:
        """TypeError or ValueError unless out can take a result of this shape."""
        if out is None:
            return
        kind_of(**inputs, out=out)
        if out.dtype != self.dtype:
            raise TypeError(f"out must have the dtype of the result, {self.dtype.name}, not {out.dtype}")
        check_shape("out", out, shape)
        if self.kind == "numpy" and not out.flags.writeable:
            raise ValueError("out must be writeable, but it is read-only")
        if _overlaps_itself(out):
            raise ValueError(f"out must not overlap itself (shape {out.shape}, strides {out.strides})")
        for name, array in inputs.items():
            if _share_memory(self.kind, array, out):
                raise ValueError(f"out must not overlap {name} in memory")

    def compute(
        self,
        direction: Direction,
        first: Source,
        second: Source,
        role: Role,
        *,
        out: Array | None = None,
        bias: Array | None = None,
        activation: Activation | None = None,
    ) -> Array:
        """Runs one direction. first and second are what the algorithms take: x and w, dy and w, or dy and x."""
        backend = self.backend
        with device_of(first.array):
            if bias is not None:
                bias = backend.xp.ascontiguousarray(moved(bias, backend.kind), self.sums)
            key = None
            if backend.kind == self.kind:
                arrays = [first.array, first.y, second.array, second.y, bias, out]
                key = self._key(direction, first, second, role, activation, arrays)
                if replay.is_known(key):
                    if (result := self._again(key, arrays)) is not None:
                        return result
                    key = None
            return self._computed(direction, first, second, role, out, bias, activation, key)

    def _again(self, key: Hashable, arrays: list[Array | None]) -> Array | None:
        """The result by what was remembered of a call of this kind, None where that is nothing."""
        known = replay.known(key)
        if known is None:
            return None
        with self._blas():
            return known.run(self.backend.xp, arrays)

    def _blas(self) -> contextlib.AbstractContextManager[None]:
        if self.backend.name != "numpy":
            return contextlib.nullcontext()
        return threads.held_blas(self.threads, self.geometry.multiply_adds())

    def _key(
        self,
        direction: Direction,
        first: Source,
        second: Source,
        role: Role,
        activation: Activation | None,
        arrays: Sequence[Array | None],
    ) -> Hashable:
        """All that decides which launches there are."""
        chosen = self.algorithm, self.deterministic, self.precision, self.limit, self.threads
        dump = None if self.backend.launch is None else os.environ.get("GPUCONV_DUMP")
        how = direction, role, activation, first.conjugate, first.activation, second.conjugate, second.activation
        device = first.array.device.id if self.kind == "cupy" else None
        lying = _lying if self.backend.launch is None else _lying_for_kernels
        return (self.geometry, self.dtype, self.backend, device, dump, chosen, how, *map(lying, arrays))

    def _computed(
        self,
        direction: Direction,
        first: Source,
        second: Source,
        role: Role,
        out: Array | None,
        bias: Array | None,
        activation: Activation | None,
        key: Hashable,
    ) -> Array:
        """The long way, which is remembered by the key where its launches are all there is to it."""
        geometry, backend = self.geometry, self.backend
        request = Request(geometry, self.dtype, direction, backend, self.deterministic, self.limit)
        algorithm = choose(request, self.algorithm).algorithm
        shape = {"x": geometry.x_shape, "w": geometry.w_shape, "y": geometry.y_shape}[role]
        channels_last = role != "w" and has_channels_last_memory(first.array, geometry)
        empty = partial(_empty, backend.xp, shape, self.dtype, channels_last, geometry)
        target = out
        if out is None or backend.kind != self.kind or not (backend.launch is None or addressable(out)):
            target = empty()
        by_groups = None if bias is None else bias.reshape(geometry.groups, -1)
        result = Result(canonical(target, role, geometry), by_groups, activation)
        sources = (first, second)
        operands = [source.operand(geometry, backend, self.dtype) for source in sources]
        if not (all(operand.view.size for operand in operands) and result.view.size):
            result.fill(backend.xp)
            return self._returned(target, out, channels_last)
        limit = workspace_of(self.limit, backend)
        recorder: replay.Recorder | tape.Tape | None = None
        if key is not None and (out is None or out is target):
            arrays = first.array, first.y, second.array, second.y, bias, target
            if backend.launch is None and algorithm in ON_TAPE:
                recorder = tape.Tape(arrays, self.limit - limit)
                backend = backend._replace(xp=recorder)
            elif backend.launch is not None and direction in LAUNCHES_ONLY.get(algorithm, ()):
                recorder = replay.Recorder(backend, arrays)
        temporaries = result.temporaries + sum(operand.temporaries for operand in operands)
        arena = workspace.Arena(0 if temporaries else limit)  # those take their share of the limit elsewhere
        run = workspace.Run(backend, self.sums, limit, self.precision, self.threads, recorder, arena)
        with matrix_products(backend, self.precision), self._blas():
            self._run_by_groups(getattr(MODULES[algorithm], direction), operands, sources, result, role, run)
        if recorder is not None:
            replay.remember(key, recorder.replay(limit, self.sums, empty))
        return self._returned(target, out, channels_last)

    def _run_by_groups(
        self,
        algorithm: Callable[..., None],
        operands: Sequence[Operand],
        sources: Sequence[Source],
        result: Result,
        role: Role,
        run: workspace.Run,
    ) -> None:
        """All groups at once, or as many at a time as the workspace has room for."""
        parts = group_parts(self.geometry, run.budget)
        if len(parts) == 1:
            algorithm(*operands, result, self.geometry, run)
            return
        for groups, part in parts:
            read = (operand.of_groups(groups, source.role) for operand, source in zip(operands, sources, strict=True))
            algorithm(*read, result.of_groups(groups, role), part, run)

    def bias_grad(self, gradient: Source) -> Array:
        """db: the sum of the gradient over all but the channels."""
        xp = self.backend.xp
        # Long sums of like terms drift in float32; float64 costs little here.
        sums = dtypes.promoted(self.dtype, numpy.dtype(numpy.float64))
        with device_of(gradient.array):
            operand = gradient.operand(self.geometry, self.backend, self.dtype)
            view, positions = operand.view, tuple(range(operand.view.ndim - 2))
            if gradient.activation is None:
                total = xp.sum(view, axis=positions, dtype=sums)
            else:
                total = xp.zeros(view.shape[-2:], sums)
                run = workspace.Run(self.backend, self.sums, self.limit)
                channels = math.prod(view.shape[-2:])
                read = Space(temporaries=operand.temporaries)
                box, spaces = fitting_box(view.shape[:-2], run.budget, lambda box: [(channels * math.prod(box), read)])
                with run.workspace(*spaces) as (space,):
                    for index in boxes(view.shape[:-2], box):
                        block = workspace.shaped(space, view[index].shape)
                        operand.read(xp, index, block)
                        total += xp.sum(block, axis=positions, dtype=sums)
            return self._returned(total.reshape(-1).astype(self.dtype), None, False)

    def _returned(self, result: Array, out: Array | None, channels_last: bool) -> Array:
        """The result as the kind of array that came in, in out where there is one."""
        if result is out or (out is None and self.backend.kind == self.kind):
            return result
        if out is None:
            out = _empty(module_of(self.kind), result.shape, self.dtype, channels_last, self.geometry)
        out[...] = moved(result, self.kind)
        return out


def given(**arrays: Array | None) -> dict[str, Array]:
    """Those optional arrays that were given."""
    return {name: array for name, array in arrays.items() if array is not None}


def checked(**arrays: Array) -> tuple[Kind, numpy.dtype]:
    """The kind of these arrays and the dtype of the result, or an error that names the array that does not fit."""
    kind = kind_of(**arrays)
    for name, array in arrays.items():
        if not dtypes.supported(array.dtype):
            hint = f"; {name}.astype('float32') makes one of it" if array.dtype.kind in "iub" else ""
            raise TypeError(f"{name} must be one of {', '.join(dtypes.NAMES)}, not {array.dtype}{hint}")
    return kind, dtypes.promoted(*(array.dtype for array in arrays.values()))


def check_shape(name: str, array: Array, shape: Shape) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} must have the shape {shape}, but it has {array.shape}")


def check_gradient(dy: Array, shape: Shape, **shapes: Sequence[int]) -> None:
    """ValueError unless dy has this shape, which follows from the others, of arguments by name."""
    if dy.shape != shape:
        given = " and ".join(f"{name} {tuple(of)}" for name, of in shapes.items())
        raise ValueError(f"dy must have the shape {shape} that {given} give, but it has {dy.shape}")


def check_bias(b: Array | None, channels: int) -> None:
    if b is not None and b.shape != (channels,):
        raise ValueError(
            f"b must have one element for each of the {channels} output channels, shape ({channels},),"
            f" but it has {tuple(b.shape)}"
        )


def check_activation(activation: object, dtype: numpy.dtype) -> None:
    if activation is None:
        return
    if not isinstance(activation, str) or activation not in activations.NAMES:
        raise ValueError(f"activation must be None or one of {', '.join(activations.NAMES)}; got {activation!r}")
    if dtypes.is_complex(dtype):
        raise TypeError(f"activation={activation!r} needs a real dtype, but the result is {dtype.name}")


def check_backward(
    kind: Kind,
    dtype: numpy.dtype,
    dy: Array,
    shape: Shape,
    activation: Activation | None,
    y: Array | None,
    needs: str | Sequence[str],
    **shapes: Sequence[int],
) -> tuple[str, ...]:
    """What is needed, once dy, y and the activation have been found to fit."""
    check_gradient(dy, shape, **shapes)
    check_activation(activation, dtype)
    if y is not None:
        checked(dy=dy, y=y)
        check_shape("y", y, shape)
        if activation is not None and dtypes.is_complex(y.dtype):
            raise TypeError(f"activation={activation!r} needs a real y, not {y.dtype}")
    elif activation is not None:
        raise ValueError(
            f"activation={activation!r} needs y, the result of the forward call, to take its derivative from"
        )
    return _needed(needs)


def _needed(needs: str | Sequence[str]) -> tuple[str, ...]:
    try:
        names = (needs,) if isinstance(needs, str) else tuple(needs)
    except TypeError:
        raise TypeError(f"needs must be names out of {', '.join(NEEDS)}; got {needs!r}") from None
    for name in names:
        if name not in NEEDS:
            raise ValueError(f"needs must be names out of {', '.join(NEEDS)}; got {name!r}")
    return names


def has_channels_last_memory(array: Array, geometry: Geometry) -> bool:
    """Whether a channels_first array lies in memory as a contiguous channels_last one (and not as both)."""
    if geometry.layout == "channels_last" or array.flags.c_contiguous:
        return False
    channel = len(geometry.batch)
    return bool(array.transpose(*range(channel), *range(channel + 1, array.ndim), channel).flags.c_contiguous)


def _empty(xp: Any, shape: Shape, dtype: numpy.dtype, channels_last: bool, geometry: Geometry) -> Array:
    """A new array of this shape; with channels_last, a channels_first one with channels_last memory."""
    if not channels_last:
        return xp.empty(shape, dtype)
    channel = len(geometry.batch)
    memory = xp.empty((*shape[:channel], *shape[channel + 1 :], shape[channel]), dtype)
    return memory.transpose(*range(channel), len(shape) - 1, *range(channel, len(shape) - 1))


def _lying(array: Array | None) -> Hashable:
    """How an array lies in memory, as far as functions of numpy are chosen by it."""
    return None if array is None else (array.shape, array.strides, array.dtype, array.flags.aligned)


def _lying_for_kernels(array: Array | None) -> Hashable:
    """The same for kernels."""
    return None if array is None else (array.shape, array.strides, array.dtype, address(array) % BYTES)


def _overlaps_itself(array: Array) -> bool:
    """Whether two elements share memory: possible only where an axis steps into what the faster ones cover."""
    covered = array.itemsize
    for step, size in sorted((abs(step), size) for step, size in zip(array.strides, array.shape, strict=True)):
        if size > 1:
            if step < covered:
                return _shares_bytes(array)
            covered += step * (size - 1)
    return False


def _shares_bytes(array: Array) -> bool:
    """The same by looking at the place of every element."""
    places: Any = 0
    for axis, (step, size) in enumerate(zip(array.strides, array.shape, strict=True)):
        places = places + (numpy.arange(size) * step).reshape(-1, *(1,) * (array.ndim - axis - 1))
    return bool((numpy.diff(numpy.sort(places, axis=None)) < array.itemsize).any())


def _share_memory(kind: Kind, array: Array, out: Array) -> bool:
    if kind == "cupy":
        import cupy

        return bool(cupy.may_share_memory(array, out) and cupy.shares_memory(array, out))
    if not numpy.may_share_memory(array, out):
        return False
    try:
        return numpy.shares_memory(array, out, max_work=10**6)  # type: ignore[arg-type]
    except numpy.exceptions.TooHardError:
        return True
