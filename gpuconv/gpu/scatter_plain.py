"""The reference kernel of scatter: one atomic addition for every product. It is simple to read and to compare with.

It is not an algorithm that a caller may name. Tests and the benchmark add it to the algorithms.
"""

from __future__ import annotations

from gpuconv.blocking import channels_innermost
from gpuconv.geometry import Geometry
from gpuconv.gpu import params, scatter
from gpuconv.gpu.kernel import Kernel
from gpuconv.gpu.launch import blocks
from gpuconv.gpu.scatter import THREADS
from gpuconv.operands import Operand, Result
from gpuconv.plan import Planner
from gpuconv.request import Request
from gpuconv.views import View


def why_not(request: Request) -> str | None:
    """Return a reason on NumPy, for the forward direction, and if scatter has one; else None."""
    if request.backend.launch is None or request.direction == "forward":
        return "it is a CUDA kernel that computes gradients"
    return scatter.why_not(request)


def data_grad(dy: Operand, w: Operand, dx: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute dx with one atomic addition for each product of dy and w."""
    scatter.add_to_images(_launch_data_grad, dy, w, dx, geometry, planner)


def weight_grad(dy: Operand, x: Operand, dw: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute dw with one atomic addition for each product of dy and x."""
    scatter.add_to_weights(_launch_weight_grad, dy, x, dw, geometry, planner)


def _launch_data_grad(dy: Operand, w: Operand, sums: View, geometry: Geometry, planner: Planner) -> None:
    arrays = dy.view, dy.y, w.view, sums
    _launch("scatter_data_grad_plain", arrays, (dy, w), (dy.view, sums, w.view), geometry, planner)


def _launch_weight_grad(dy: Operand, x: Operand, sums: View, geometry: Geometry, planner: Planner) -> None:
    arrays = dy.view, dy.y, x.view, x.y, sums
    _launch("scatter_weight_grad_plain", arrays, (dy, x), (dy.view, x.view, sums), geometry, planner)


def _launch(
    name: str,
    arrays: tuple[View | None, ...],
    operands: tuple[Operand, Operand],
    y_x_w: tuple[View, View, View],
    geometry: Geometry,
    planner: Planner,
) -> None:
    """Plan a launch with one thread for each element of dy."""
    dy, second = operands
    wide = params.is_wide(geometry, *y_x_w)
    options = params.options(dy, second, channels_innermost(dy.view))
    dtypes = dy.view.dtype, second.view.dtype, planner.dtype, planner.dtype
    module = params.module("scatter", dtypes, wide, **scatter.ONE._asdict())
    planner.launch(
        Kernel(module, name),
        blocks(dy.view.size, THREADS),
        THREADS,
        (
            *arrays,
            *params.described(geometry, *y_x_w, wide),
            options.struct(wide),
        ),
    )
