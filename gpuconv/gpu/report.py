"""Resource usage of the compiled kernels for any architecture, without a GPU: ``gpuconv kernels``.

The modules are those that the algorithms launch for a list of convolutions, with every dtype and with 32-bit and
64-bit indices; of depthwise and implicit_gemm a selection. To find them, the host code runs with a backend that records
launches instead of executing them.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, get_args

import numpy

from gpuconv import dtypes, settings
from gpuconv.arguments import Shape
from gpuconv.arrays import Backend
from gpuconv.geometry import DIRECTIONS, Geometry
from gpuconv.gpu import (
    bias_grad,
    compiler,
    depthwise,
    direct,
    gemm_plan,
    implicit_gemm,
    occupancy,
    sass,
    scatter,
    scatter_plain,
    split_sum,
)
from gpuconv.gpu.device import MODEL, Device
from gpuconv.gpu.gemm_tiles import STAGES, GemmTile
from gpuconv.gpu.kernel import Kernel, Module
from gpuconv.operands import ROLES, Operand, Result, contiguous
from gpuconv.plan import RESULT, WORKSPACE, Planner, Scope
from gpuconv.types import Direction, Layout
from gpuconv.views import View, contiguous_strides

# Real layers that cover all tiles, one to three axes, and the largest regions of shared memory: x, w, settings.
CONVOLUTIONS: tuple[tuple[Shape, Shape, dict[str, Any]], ...] = (
    ((1, 3, 224, 224), (64, 3, 7, 7), {"stride": 2, "padding": 3}),
    ((1, 64, 56, 56), (64, 64, 3, 3), {"padding": 1}),
    ((1, 128, 56, 56), (128, 128, 3, 3), {"padding": 1, "stride": 2}),
    ((1, 512, 7, 7), (512, 512, 3, 3), {"padding": 1}),
    ((1, 256, 56, 56), (64, 256, 1, 1), {}),
    ((1, 64, 28, 28), (64, 64, 3, 3), {"padding": 4, "dilation": 4}),
    ((1, 32, 56, 56), (32, 4, 3, 3), {"padding": 1, "groups": 8}),
    ((1, 144, 56, 56), (144, 1, 3, 3), {"padding": 1, "groups": 144}),
    ((1, 96, 56, 56), (96, 1, 7, 7), {"padding": 3, "groups": 96}),
    ((1, 64, 3199), (64, 64, 3), {"stride": 2}),
    ((1, 16, 16, 28, 28), (16, 16, 3, 3, 3), {"padding": 1}),
)
# In addition, for depthwise: rows and channels that are no vectors, two filters per channel, and phases of the stride.
UNALIGNED = ((1, 33, 55, 55), (66, 1, 3, 3), {"padding": 1, "stride": 2, "groups": 33})
FAR = 2**30  # padding on one side and cropping on the other, which makes positions too large for 32 bits

_GRADIENTS: tuple[Direction, ...] = ("data_grad", "weight_grad")
# The algorithms whose kernels are found by launching them, with the directions that have a kernel.
_LAUNCHED: dict[ModuleType, tuple[Direction, ...]] = {
    direct: DIRECTIONS,
    scatter: _GRADIENTS,
    scatter_plain: _GRADIENTS,
    implicit_gemm: DIRECTIONS,
    depthwise: DIRECTIONS,
}
MOST_STEPS = 1 << 12  # of a plan: more than any of these plans has
EVERY_TILE = ("float16", "ieee"), ("float32", "ieee"), ("float32", "tf32x3")  # of which every tile is compiled
EXAMPLE = GemmTile(128, 64, 64, 32)  # the tile whose instructions kernels/README.md lists
_TURING = Device(75, 72)  # half precision and float64 are multiplied without tensor cores


class CompiledKernel(NamedTuple):
    """A kernel compiled for one architecture with one set of constants."""

    kernel: str
    arch: str
    dtype: str
    index_bits: int
    tile: dict[str, int]
    threads: int  # of a block
    registers: int  # of a thread
    spill_stores: int  # bytes
    spill_loads: int
    shared_bytes: int  # of a block: static, plus the largest dynamic size of a launch
    static_shared_bytes: int
    dynamic_shared_bytes: int
    occupancy: float  # the fraction of a multiprocessor's threads that fit at a time
    compile_seconds: float  # of the module, which contains several kernels
    nvrtc: str
    sass: dict[str, int] | None = None  # static counts of instructions (gpuconv/gpu/sass.py), if they were requested

    @property
    def variant(self) -> tuple[Any, ...]:
        """The fields that distinguish it from other rows."""
        return self.kernel, self.arch, self.dtype, self.index_bits, *self.tile.values()


@cache
def modules() -> dict[Module, dict[str, int]]:
    """Return the modules to compile, in the form of :func:`launched`: all that CONVOLUTIONS launch with every dtype.

    implicit_gemm has too many modules; a selection of them covers every tile and every way to load, multiply and store.
    """
    convolutions = []
    for dtype in dtypes.available():
        for x, w, options in CONVOLUTIONS:
            near = Geometry.infer(x, w, **options)
            far = tuple((low + FAR, high - FAR) for low, high in near.padding)
            convolutions += [(near, dtype), (Geometry.infer(x, w, **{**options, "padding": far}), dtype)]
    found = launched(convolutions, (direct, scatter, scatter_plain))
    for module, kernels in (_bias_grads() | _split_sums()).items():
        found |= {module: kernels, module._replace(wide=True): kernels}
    for module, kernels in launched(_depthwise(), [depthwise]).items():
        found[module] = kernels
        if dict(module.types)["First"] == "float32":
            found[module._replace(wide=True)] = kernels
    for plan in _gemm_plans():
        found[plan.module] = plan.kernels
    return found


def _bias_grads() -> dict[Module, dict[str, int]]:
    """Return the modules that db launches for both layouts of a convolution."""
    found: dict[Module, dict[str, int]] = {}
    backend, (x, w, options) = recording(Backend("recorded", numpy, None), found), CONVOLUTIONS[1]
    for dtype, layout in product(dtypes.available(), get_args(Layout)):
        geometry = Geometry.infer(*_laid_out(x, w, layout), **options, layout=layout)
        db = View(RESULT, 0, (geometry.filters,), (dtype.itemsize,), dtype)
        bias_grad.bias_grad(Operand(contiguous("y", dtype, geometry)), db, geometry, _planner(dtype, backend))
    return found


def _split_sums() -> dict[Module, dict[str, int]]:
    """Return the modules that add the splits of an implicit GEMM, with an epilogue."""
    found: dict[Module, dict[str, int]] = {}
    backend, (x, w, options) = recording(Backend("recorded", numpy, None), found), CONVOLUTIONS[1]
    geometry = Geometry.infer(x, w, **options)
    for dtype in dtypes.available():
        sums, y = dtypes.accumulator(dtype), contiguous("y", dtype, geometry)
        bias = View(RESULT, 0, y.shape[-2:], contiguous_strides(y.shape[-2:], sums), sums)
        result = Result(y, bias, None if dtypes.is_complex(dtype) else "sigmoid")
        partial = View(WORKSPACE, 0, (2 * y.size,), (sums.itemsize,), sums)
        split_sum.add_splits(partial, result, split_sum.memory_order(y), _planner(dtype, backend))
    return found


def _depthwise() -> Iterator[tuple[Geometry, numpy.dtype]]:
    """Yield one layer with every dtype, and others with two dtypes, in both layouts."""
    small, *others = CONVOLUTIONS[7], CONVOLUTIONS[8], UNALIGNED
    for dtype, layout in product(dtypes.available(), get_args(Layout)):
        for x, w, options in (small, *others) if dtype.name in ("float16", "float32") else (small,):
            yield Geometry.infer(*_laid_out(x, w, layout), **options, layout=layout), dtype


def _gemm_plans() -> Iterator[gemm_plan.GemmPlan]:
    available = {dtype.name: dtype for dtype in dtypes.available()}
    layer, deep, stem = (
        {layout: Geometry.infer(*_laid_out(x, w, layout), **options, layout=layout) for layout in get_args(Layout)}
        for x, w, options in (CONVOLUTIONS[1], CONVOLUTIONS[3], CONVOLUTIONS[0])
    )
    for name, dtype in available.items():
        precisions = settings.PRECISIONS if name == "float32" else ("ieee",)
        devices = (MODEL, _TURING) if name in ("float16", "float32", "float64") else (MODEL,)
        for precision, device in product(precisions, devices):

            def best(geometry: Geometry, direction: Direction) -> gemm_plan.GemmPlan:
                return gemm_plan.plans(geometry, dtype, direction, device, precision)[0]  # noqa: B023

            if (name, precision) in EVERY_TILE and device == MODEL:
                yield from gemm_plan.plans(layer["channels_last"], dtype, "forward", device, precision)
            if name == "float16" and device == MODEL:
                for direction in ("data_grad", "weight_grad"):
                    plans = gemm_plan.plans(layer["channels_last"], dtype, direction, device)
                    yield from (plan for plan in plans if plan.choice.tile == EXAMPLE)
            if name in ("float16", "float32") and precision == "ieee" and device == MODEL:
                for plan in (best(layer["channels_first"], direction) for direction in DIRECTIONS):
                    yield plan._replace(module=plan.module._replace(wide=True))
                yield best(stem["channels_last"], "forward")
                yield best(stem["channels_first"], "weight_grad")
            yield from (best(geometry, "forward") for geometry in layer.values())
            yield best(layer["channels_first"], "weight_grad")
            if name != "bfloat16" and precision != "tf32x3":
                yield best(layer["channels_first"], "data_grad")
                yield best(layer["channels_last"], "weight_grad")
                yield best(deep["channels_last"], "forward")


def _laid_out(x: Shape, w: Shape, layout: Layout) -> tuple[Shape, Shape]:
    if layout == "channels_first":
        return x, w
    return (x[0], *x[2:], x[1]), (*w[2:], w[1], w[0])


def launched(
    convolutions: Iterable[tuple[Geometry, numpy.dtype]], algorithms: Iterable[ModuleType] = tuple(_LAUNCHED)
) -> dict[Module, dict[str, int]]:
    """Return the modules that the algorithms launch, with the largest dynamic shared memory of each kernel in bytes."""
    found: dict[Module, dict[str, int]] = {}
    backend = recording(Backend("recorded", numpy, None), found)
    for geometry, dtype in convolutions:
        for algorithm in algorithms:
            _launch(algorithm, geometry, dtype, backend)
    return found


def recording(backend: Backend, found: dict[Module, dict[str, int]]) -> Backend:
    """Return a backend that only records launches in ``found``: modules in order, with shared memory of each kernel."""

    def remember(
        kernel: Kernel, grid: int, block: int, arguments: Sequence[Any], shared_memory: int = 0
    ) -> Callable[..., None]:
        kernels = found.setdefault(kernel.module, {})
        kernels[kernel.name] = max(shared_memory, kernels.get(kernel.name, 0))
        return lambda *_: None

    return backend._replace(launch=remember)


def _launch(algorithm: ModuleType, geometry: Geometry, dtype: numpy.dtype, backend: Backend) -> None:
    for direction in _LAUNCHED[algorithm]:
        planner = _planner(dtype, backend)
        first, second, result = (contiguous(role, dtype, geometry) for role in ROLES[direction])
        getattr(algorithm, direction)(Operand(first), Operand(second), Result(result), geometry, planner)


def _planner(dtype: numpy.dtype, backend: Backend) -> Planner:
    scope, limit = Scope(WORKSPACE, MOST_STEPS), settings.workspace_limit()
    return Planner(backend, dtypes.accumulator(dtype), limit, scope, MOST_STEPS)


def known(asked: Sequence[str] | None) -> list[str]:
    """Return the architectures to compile for, by default all known ones that NVRTC supports; ValueError for others."""
    numbers = {str(number) for number in compiler.nvrtc().getSupportedArchs()}
    possible = [name for name in occupancy.ARCHITECTURES if re.sub(r"\D", "", name) in numbers]
    for name in asked or ():
        if name not in possible:
            raise ValueError(f"--arch must be one of {', '.join(possible)}; got {name!r}")
    return possible if asked is None else list(asked)


def rows(
    architecture: str, chosen: Iterable[Module] | None = None, *, with_sass: bool = False
) -> Iterator[CompiledKernel | compiler.CompileError]:
    """Yield a row for each kernel of each module, or the error of a module that does not compile."""
    every = modules()
    chosen = [module for module in (every if chosen is None else chosen) if is_meant_for(module, architecture)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for found in pool.map(lambda module: _rows_of(module, architecture, every[module], with_sass), chosen):
            yield from found


def is_meant_for(module: Module, architecture: str) -> bool:
    """Whether an architecture has the instructions of a module. If not, calls on it use another module."""
    constants = dict(module.constants)
    return architecture != "sm_75" or not (constants.get("TENSOR_PRODUCTS") or constants.get("STAGES", 0) > STAGES)


def _rows_of(
    module: Module, architecture: str, dynamic: dict[str, int], with_sass: bool = False
) -> list[CompiledKernel] | list[compiler.CompileError]:
    start = time.perf_counter()
    try:
        cubin, log = compiler.compiled(module, architecture)
    except compiler.CompileError as error:
        return [error]
    seconds = round(time.perf_counter() - start, 3)
    counts = sass.counted(cubin) if with_sass else {}
    tile = dict(module.constants)
    threads = tile.pop("THREADS")
    found = []
    for name, used in parsed(log).items():
        if name not in dynamic:  # no algorithm launches it with these constants
            continue
        shared = used["static"] + dynamic[name]
        found.append(
            CompiledKernel(
                kernel=name,
                arch=architecture,
                dtype=dict(module.types)["First"],
                index_bits=64 if module.wide else 32,
                tile=tile,
                threads=threads,
                registers=used["registers"],
                spill_stores=used["spill_stores"],
                spill_loads=used["spill_loads"],
                shared_bytes=shared,
                static_shared_bytes=used["static"],
                dynamic_shared_bytes=dynamic[name],
                occupancy=occupancy.occupancy(architecture, used["registers"], threads, shared),
                compile_seconds=seconds,
                nvrtc=".".join(map(str, compiler.version())),
                sass=counts[name]._asdict() if name in counts else None,
            )
        )
    return found


_ENTRY = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?",
    re.DOTALL,
)


def parsed(log: str) -> dict[str, dict[str, int]]:
    """Return the resource usage of each kernel by name, parsed from the log of ptxas with ``-v``."""
    entries = {}
    for match in _ENTRY.finditer(log):
        name, *numbers = match.groups()
        stores, loads, registers, static = (int(number or 0) for number in numbers)
        entries[name] = {"spill_stores": stores, "spill_loads": loads, "registers": registers, "static": static}
    if len(entries) != log.count("Compiling entry function"):
        raise RuntimeError(f"cannot read ptxas' report of a kernel:\n{log}")
    return entries


HEADER = (
    f"{'kernel':<26} {'arch':<8} {'variants':>8} {'registers':>9} {'spills':>6} {'shared KiB':>11} {'occupancy':>10}"
    f" {'compiled in':>11}"
)


def lines(rows: Iterable[CompiledKernel]) -> Iterator[str]:
    """Yield a line for each kernel and architecture, with the ranges over dtypes, tiles and index widths."""
    groups: dict[tuple[str, str], list[CompiledKernel]] = {}
    for row in rows:
        groups.setdefault((row.kernel, row.arch), []).append(row)
    for (kernel, arch), group in groups.items():
        spills = sum(row.spill_stores + row.spill_loads for row in group)
        registers = _range([str(row.registers) for row in sorted(group, key=lambda row: row.registers)])
        shared = _range([f"{row.shared_bytes / 1024:.1f}" for row in sorted(group, key=lambda row: row.shared_bytes)])
        busy = _range([f"{100 * row.occupancy:.0f}" for row in sorted(group, key=lambda row: row.occupancy)]) + " %"
        seconds = max(row.compile_seconds for row in group)
        yield (
            f"{kernel:<26} {arch:<8} {len(group):>8} {registers:>9} {spills:>6} {shared:>11} {busy:>10}"
            f" {f'<= {seconds:.1f} s':>11}"
        )


def sass_lines(rows: Iterable[CompiledKernel]) -> Iterator[str]:
    """Yield a line for each kernel, architecture and dtype: ranges of the counts over tiles and index widths."""
    groups: dict[tuple[str, str, str], list[dict[str, int]]] = {}
    for row in rows:
        if row.sass is not None:
            groups.setdefault((row.kernel, row.arch, row.dtype), []).append(row.sass)
    for names, group in groups.items():
        counts = (f"{part} {_range([str(n) for n in sorted(one[part] for one in group)])}" for part in group[0])
        yield f"{' '.join(names)}: {', '.join(counts)}"


def _range(ordered: Sequence[str]) -> str:
    return ordered[0] if ordered[0] == ordered[-1] else f"{ordered[0]}-{ordered[-1]}"


def write_json(path: Path, rows: Iterable[CompiledKernel]) -> None:
    """Write a JSON list with an object for each row, one per line."""
    path.write_text("[\n" + ",\n".join(json.dumps(row._asdict()) for row in rows) + "\n]\n")
