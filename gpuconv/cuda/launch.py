"""Launching a kernel on CuPy's arrays, on the current device and its current stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from gpuconv.cuda import compiler
from gpuconv.cuda.cache import cubin_path
from gpuconv.cuda.kernel import Kernel, Module, check_arguments, dump

MOST_BLOCKS = 2**31 - 1  # of a grid's first axis, the only one that is used
_GRANTED = 40 << 10  # bytes: static and dynamic memory beyond 48 KiB must be asked for, and tables are static


def launch_cuda(kernel: Kernel, grid: int, block: int, arguments: Sequence[Any], shared_memory: int = 0) -> None:
    """Runs ``grid`` blocks of ``block`` threads; arrays, scalars of NumPy and structs are what kernels take.

    A grid of no blocks is not launched. TypeError where the arguments are not what the kernel's source declares.
    """
    prepare(kernel, grid, arguments)
    if grid:
        device = _device()
        if shared_memory > _GRANTED:
            _ask_for(shared_memory, kernel, device)
        _function(kernel, device)((grid,), (block,), tuple(arguments), shared_mem=shared_memory)


def again(kernel: Kernel, grid: int, block: int, shared_memory: int) -> Callable[[Sequence[Any]], None]:
    """The same launch on the current device once more, for arguments like those that have been checked."""
    function = _function(kernel, _device())
    return lambda arguments: function((grid,), (block,), tuple(arguments), shared_mem=shared_memory)


def prepare(kernel: Kernel, grid: int, arguments: Sequence[Any]) -> None:
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
    function = _function(kernel, device)
    if function.max_dynamic_shared_size_bytes < shared_memory:
        function.max_dynamic_shared_size_bytes = shared_memory


@cache
def _module(module: Module, device: int) -> Any:
    import cupy

    architecture = compiler.architecture_for(cupy.cuda.Device(device).compute_capability)
    return cupy.RawModule(path=str(cubin_path(module, architecture)))


def clear() -> None:
    """Forgets the modules of this process; those on disk stay."""
    _ask_for.cache_clear()
    _function.cache_clear()
    _module.cache_clear()
