"""Launching a kernel on CuPy's arrays, on the current device and its current stream."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

from gpuconv.gpu import compiler
from gpuconv.gpu.cache import cubin_path
from gpuconv.gpu.kernel import Kernel, Module, check_arguments, dump

UNASKED = 48 << 10  # bytes of shared memory, static and dynamic, that a block has without asking
MOST_BLOCKS = 2**31 - 1  # of a grid's first axis, the only one that is used
_loading = threading.RLock()  # held while a function is loaded and configured: no thread may launch it before


def prepared(
    kernel: Kernel, grid: int, block: int, arguments: Sequence[Any], shared_memory: int = 0
) -> Callable[..., None]:
    """A function that launches ``grid`` blocks of ``block`` threads on the current device, with arguments like these.

    Arrays, scalars of NumPy and structs are what kernels take. TypeError where the arguments are not what the kernel's
    source declares; views count as arrays.
    """
    check(kernel, grid, arguments)
    with _loading:
        loaded = _loaded(kernel, _device())
        loaded.grant(shared_memory)
    return partial(_launch, loaded.function, (grid,), (block,), shared_memory)


def _launch(function: Any, grid: tuple[int], block: tuple[int], shared_memory: int, *arguments: Any) -> None:
    function(grid, block, arguments, shared_mem=shared_memory)


def check(kernel: Kernel, grid: int, arguments: Sequence[Any]) -> None:
    """TypeError or ValueError where a launch would go wrong; writes the source where GPUCONV_DUMP asks for it."""
    check_arguments(kernel, arguments)
    if grid > MOST_BLOCKS:
        raise ValueError(f"{kernel.name} would need {grid} blocks, and a grid has at most {MOST_BLOCKS}")
    dump(kernel.module)


def blocks(count: int, per_block: int) -> int:
    """How many blocks it takes."""
    return -(-count // per_block)


def _device() -> int:
    import cupy

    return int(cupy.cuda.Device().id)


class _Loaded:
    """A kernel on a device, and the dynamic shared memory that its launches may have."""

    def __init__(self, function: Any) -> None:
        self.function, self._granted = function, 0

    def grant(self, size: int) -> None:
        """Asks the driver for so many bytes where it does not grant them by itself."""
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
    loaded = cupy.cuda.Module()  # RawModule would keep it for ever
    loaded.load_file(str(cubin_path(module, architecture)))
    return loaded
