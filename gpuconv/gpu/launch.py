"""Kernel launches on CuPy arrays, on the current device and its current stream."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

from gpuconv.gpu import compiler
from gpuconv.gpu.cache import cubin_path
from gpuconv.gpu.kernel import Kernel, Module, check_arguments, dump

UNASKED = 48 << 10  # bytes of shared memory, static and dynamic, of a block without opt-in
MOST_BLOCKS = 2**31 - 1  # of the first axis of a grid, the only one that is used
_loading = threading.RLock()  # held until a function is loaded and configured: no thread may launch it before


def prepared(
    kernel: Kernel, grid: int, block: int, arguments: Sequence[Any], shared_memory: int = 0
) -> Callable[..., None]:
    """Return a function that launches ``grid`` blocks of ``block`` threads on the current device.

    The function takes arguments of the same types as these: arrays, NumPy scalars and structs. Raises TypeError if they
    do not match the declaration in the kernel's source; views count as arrays.
    """
    check(kernel, grid, arguments)
    with _loading:
        loaded = _loaded(kernel, _device())
        loaded.grant(shared_memory)
    return partial(_launch, loaded.function, (grid,), (block,), shared_memory)


def _launch(function: Any, grid: tuple[int], block: tuple[int], shared_memory: int, *arguments: Any) -> None:
    function(grid, block, arguments, shared_mem=shared_memory)


def check(kernel: Kernel, grid: int, arguments: Sequence[Any]) -> None:
    """Raise TypeError or ValueError if a launch would fail; write the source if GPUCONV_DUMP is set."""
    check_arguments(kernel, arguments)
    if grid > MOST_BLOCKS:
        raise ValueError(f"{kernel.name} needs {grid} thread blocks, but a grid has at most {MOST_BLOCKS}")
    dump(kernel.module)


def blocks(count: int, per_block: int) -> int:
    """Return the number of blocks: ``count / per_block``, rounded up."""
    return -(-count // per_block)


def _device() -> int:
    import cupy

    return int(cupy.cuda.Device().id)


class _Loaded:
    """A kernel loaded on a device, and the dynamic shared memory that its launches may use."""

    def __init__(self, function: Any) -> None:
        self.function, self._granted = function, 0

    def grant(self, size: int) -> None:
        """Permit this many bytes of dynamic shared memory; beyond the default limit the driver requires an opt-in."""
        if size <= self._granted:
            return
        import cupy

        driver, function = cupy.cuda.driver, self.function.ptr
        static = driver.funcGetAttribute(driver.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function)
        if static + size > UNASKED:
            driver.funcSetAttribute(function, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, size)
        self._granted = size


@cache
def _loaded(kernel: Kernel, device: int) -> _Loaded:
    return _Loaded(_module(kernel.module, device).get_function(kernel.name))


@cache
def _module(module: Module, device: int) -> Any:
    import cupy

    architecture = compiler.architecture_for(cupy.cuda.Device(device).compute_capability)
    loaded = cupy.cuda.Module()  # RawModule would keep it loaded forever
    loaded.load_file(str(cubin_path(module, architecture)))
    return loaded
