"""Arrays of NumPy and CuPy, and the operations that the library needs from their modules.

CuPy is imported only if a caller passes its arrays or requests it by name, so ``import gpuconv`` costs nothing
on a machine without a GPU.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy

from gpuconv.dtypes import native
from gpuconv.gpu import device
from gpuconv.views import first_byte

Array: TypeAlias = Any  # numpy.ndarray or cupy.ndarray
Kind: TypeAlias = Literal["numpy", "cupy"]

INSTALL_HINT = "pip install 'gpuconv[cuda12]', or 'gpuconv[cuda13]' for a CUDA 13 driver"


class BackendError(RuntimeError):
    """Raised when the requested backend cannot be used on this machine."""


class _Span:
    """All bytes from the lowest to the highest address of a NumPy array, as an object that keeps the array alive."""

    def __init__(self, array: numpy.ndarray) -> None:
        place, is_read_only = array.__array_interface__["data"]
        size = array.itemsize + sum((n - 1) * abs(step) for n, step in zip(array.shape, array.strides, strict=True))
        place += first_byte(array.shape, array.strides)
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (size,), "data": (place, is_read_only)}
        self.array = array


def _numpy_memory(array: numpy.ndarray) -> Any:
    """Return the object from which numpy.ndarray makes parts of an array."""
    return array if array.flags.c_contiguous or not array.size else numpy.asarray(_Span(array))


class Backend(NamedTuple):
    """An array module, its device, and the functions with which plans launch kernels and access arrays.

    ``launch(kernel, grid, block, arguments, shared_memory)`` checks the arguments, which may be views, and returns a
    function that takes arrays in their place; it is None if there are no kernels. ``memory(array)`` returns the memory
    from which ``array(shape, dtype, memory, offset, strides)`` makes parts of an array, at an offset in bytes from the
    lowest address. ``matmul(left, right, out, planner)`` plans matrix products if those of the module are not used.
    """

    name: str
    xp: Any
    launch: Callable[..., Callable[..., None]] | None
    device: Callable[[], device.Device] = lambda: device.MODEL
    memory: Callable[[Array], Any] = _numpy_memory
    array: Callable[..., Array] = numpy.ndarray
    matmul: Callable[..., None] | None = None

    @property
    def kind(self) -> Kind:
        """The kind of its arrays."""
        return "cupy" if self.name == "cupy" else "numpy"

    def is_captured(self) -> bool:
        """Whether a CUDA graph captures the work of the current stream instead of executing it."""
        return self.name == "cupy" and self.xp.cuda.get_current_stream().is_capturing()


NUMPY = Backend("numpy", numpy, None)


def kind_of(**arrays: Array) -> Kind:
    """Return the kind of these arguments; raise TypeError or ValueError, by name, if they are not of one kind."""
    if set(map(type, arrays.values())) == {numpy.ndarray}:
        return "numpy"
    kinds = {name: _kind(name, array) for name, array in arrays.items()}
    (first, kind), *others = kinds.items()
    for name, other in others:
        if other != kind:
            raise TypeError(
                f"arrays of a call must be of one kind, but {first} is a {kind}.ndarray and {name} a {other}.ndarray"
            )
    if kind == "cupy":
        devices = [array.device.id for array in arrays.values()]
        for name, device in zip(kinds, devices, strict=True):
            if device != devices[0]:
                raise ValueError(
                    f"arrays of a call must be on one device, but {first} is on {devices[0]} and {name} on {device}"
                )
    return kind


def _kind(name: str, array: Array) -> Kind:
    if type(array) in (numpy.ndarray, numpy.memmap):
        return "numpy"
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, getattr(cupy, "ndarray", ())):
        return "cupy"
    found = f"{type(array).__module__}.{type(array).__qualname__}".removeprefix("builtins.")
    hint = f"numpy.asarray({name}) may convert it"
    if isinstance(array, numpy.ma.MaskedArray):
        hint = f"{name}.filled(0) is one, in which masked elements count as zeros"
    raise TypeError(f"{name} must be a numpy.ndarray or a cupy.ndarray, not {found}; {hint}")


def module_of(kind: Kind) -> Any:
    """Return the module of a kind; for "cupy", it must have been imported."""
    return numpy if kind == "numpy" else sys.modules["cupy"]


def moved(array: Array, kind: str) -> Array:
    """Return the array as one of NumPy or CuPy, unchanged if it already is."""
    if isinstance(array, numpy.ndarray):
        if kind == "numpy":
            return array
        import cupy

        return cupy.asarray(array.astype(array.dtype.newbyteorder("="), copy=False))
    return array if kind == "cupy" else array.get()


def address(array: Array) -> int:
    """Return the address of an array's first element."""
    return int(array.__array_interface__["data"][0] if isinstance(array, numpy.ndarray) else array.data.ptr)


def addressable(array: Array) -> Array:
    """Return the array, or a copy if it is not aligned and in native byte order, as kernels require.

    Kernels load and store complex numbers as a whole, whereas NumPy calls them aligned if their parts are.
    """
    is_aligned = address(array) % array.itemsize == 0
    if is_aligned and array.dtype.isnative and not any(s % array.itemsize for s in array.strides):
        return array
    return array.astype(native(array.dtype))


def device_of(array: Array) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which the array's device is the current one."""
    return contextlib.nullcontext() if isinstance(array, numpy.ndarray) else array.device  # type: ignore[no-any-return]
