"""Launching a kernel on CuPy's arrays, on the current device and its current stream."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

from gpuconv.cuda import compiler
from gpuconv.cuda.cache import cubin_path
from gpuconv.cuda.kernel import Kernel, Module, check_arguments, dump

MOST_BLOCKS = 2**31 - 1  # of a grid's first axis, the only one that is used
_loading = threading.RLock()  # of functions, which may be launched once their attributes are set
_GRANTED = 40 << 10  # bytes: static and dynamic memory beyond 48 KiB must be asked for, and tables are static


def prepared(
    kernel: Kernel, grid: int, block: int, arguments: Sequence[Any], shared_memory: int = 0
) -> Callable[..., None]:
    """A function that launches ``grid`` blocks of ``block`` threads on the current device, with arguments like these.

    Arrays, scalars of NumPy and structs are what kernels take. TypeError where the arguments are not what the kernel's
    source declares; views count as arrays.
    """
    check(kernel, grid, arguments)
    device = _device()
    with _loading:
        function = _function(kernel, device)
        if shared_memory > _GRANTED:
            _ask_for(shared_memory, kernel, device)
    return partial(_launch, function, (grid,), (block,), shared_memory)


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


@cache
def _function(kernel: Kernel, device: int) -> Any:
    return _module(kernel.module, device).get_function(kernel.name)


@cache
def _ask_for(shared_memory: int, kernel: Kernel, device: int) -> None:
    import cupy

    driver = cupy.cuda.driver
    function, most = _function(kernel, device).ptr, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    if driver.funcGetAttribute(most, function) < shared_memory:
        driver.funcSetAttribute(function, most, shared_memory)


@cache
def _module(module: Module, device: int) -> Any:
    import cupy

    architecture = compiler.architecture_for(cupy.cuda.Device(device).compute_capability)
    loaded = cupy.cuda.Module()  # RawModule would keep it for ever
    loaded.load_file(str(cubin_path(module, architecture)))
    return loaded
