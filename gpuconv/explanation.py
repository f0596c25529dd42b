"""Explanation of the algorithm that computes a convolution: ``gpuconv.explain``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import SupportsIndex

from gpuconv import dtypes, padding_modes, settings
from gpuconv.arrays import NUMPY
from gpuconv.backends import backend_named
from gpuconv.cpu import depthwise, im2col
from gpuconv.execute import Call, contiguous_plan
from gpuconv.geometry import DIRECTIONS, Geometry
from gpuconv.plan import Plan
from gpuconv.request import Request
from gpuconv.select import MODULES, check_name, choose, consent, estimate, refused
from gpuconv.types import Algorithm, BackendName, Direction, DtypeLike, Layout, Padding, PaddingMode, PerAxis, Precision


@dataclass(frozen=True)
class Explanation:
    """The algorithm that computes a convolution, and the reasons; ``str()`` gives a short report.

    Attributes
    ----------
    algorithm, reason : str
        The algorithm that is used, and the reason.
    refused : tuple of (str, str)
        The other algorithms, each with the reason against it.
    direction : str
        ``"forward"``, ``"data_grad"`` or ``"weight_grad"``.
    backend, dtype : str
        Names of the backend and of the dtype.
    geometry : Geometry
        The convolution.
    candidates : tuple of str
        Variants of the algorithm, such as tile sizes; the first one is used.
    """

    algorithm: str
    reason: str
    refused: tuple[tuple[str, str], ...]  # (algorithm, reason) of all that are not used
    direction: Direction
    backend: str
    dtype: str
    geometry: Geometry
    candidates: tuple[str, ...]  # variants of the algorithm; the first one is used
    call: Call = field(repr=False)

    @property
    def plan(self) -> Plan:
        """The plan of a call with C-contiguous arrays; ``str()`` lists its steps.

        On a GPU the kernels are compiled for it.

        Examples
        --------
        >>> print(explain((1, 8, 16, 16), (8, 8, 3, 3), padding=1, backend="numpy").plan)
        im2col, 4 steps, 84096 bytes of workspace
          copyto(workspace@0 (1, 18, 18, 1, 8), 0, unsafe)
          copyto(workspace@76 (1, 16, 16, 1, 8), x@0 (1, 16, 16, 1, 8), unsafe)
          copyto(workspace@10368 (1, 16, 16, 3, 3, 1, 8), workspace@0 (1, 16, 16, 3, 3, 1, 8), unsafe)
          matmul(w@0 (1, 8, 72), workspace@10368 (1, 1, 72, 256), out=y@0 (1, 1, 8, 256))
        """
        return contiguous_plan(self.call, self.direction)

    def __str__(self) -> str:
        g = self.geometry
        gflop = g.flops(is_complex=self.dtype.startswith("complex")) / 1e9
        mode = "" if g.padding_mode == "zeros" else f" {g.padding_mode}"
        lines = [
            f"{self.direction} of x {g.x_shape}, w {g.w_shape} -> y {g.y_shape}, {self.dtype} on {self.backend}",
            f"  stride {g.stride}, padding {g.padding}{mode}, dilation {g.dilation}, groups {g.groups}, {g.layout}",
            f"  {gflop:.3g} GFLOP in sums of {g.reduction_length(self.direction)} products",
            f"uses {self.algorithm}: {self.reason}",
            *(f"  {'by' if number == 0 else 'or'} {candidate}" for number, candidate in enumerate(self.candidates)),
            *(f"not {name}: {reason}" for name, reason in self.refused),
        ]
        return "\n".join(lines)


def explain(
    x_shape: Sequence[SupportsIndex],
    w_shape: Sequence[SupportsIndex],
    *,
    stride: PerAxis = 1,
    padding: Padding = 0,
    padding_mode: PaddingMode = "zeros",
    dilation: PerAxis = 1,
    groups: int = 1,
    layout: Layout = "channels_first",
    flip: bool = False,
    dtype: DtypeLike = "float32",
    direction: Direction = "forward",
    backend: BackendName | None = None,
    algorithm: Algorithm = "auto",
    precision: Precision | None = None,
    deterministic: bool | None = None,
) -> Explanation:
    """Return the algorithm that would compute a convolution, and the reason against each other one.

    Parameters
    ----------
    x_shape, w_shape : sequence of int
        Shapes of x and w.
    stride, padding, padding_mode, dilation, groups, layout, flip
        As in :func:`gpuconv.conv`.
    dtype : dtype or str, default "float32"
        Dtype of all arrays.
    direction : {"forward", "data_grad", "weight_grad"}, default "forward"
        Direction of the convolution.
    backend : {None, "auto", "numpy", "cupy"}, default None
        Where to compute. None selects the backend in force.
    algorithm, precision, deterministic
        As in :func:`gpuconv.conv`.

    Returns
    -------
    Explanation
        The choice and its reasons.

    Raises
    ------
    ValueError
        If shapes do not fit, a value is not permitted, or the named algorithm does not apply.
    TypeError
        If dtype or another argument is of the wrong kind.
    BackendError
        If the backend cannot be used.

    Examples
    --------
    >>> explanation = explain((8, 64, 56, 56), (64, 64, 3, 3), padding=1, backend="numpy")
    >>> explanation.algorithm
    'winograd'
    >>> "ms on one core (estimate), the smallest" in explanation.reason
    True
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}; got {direction!r}")
    kind = dtypes.named(dtype)
    geometry = Geometry.infer(
        x_shape,
        w_shape,
        stride,
        padding,
        dilation,
        groups,
        layout,
        flip,
        padding_mode,
        x_name="x_shape",
        w_name="w_shape",
    )
    check_name(algorithm)
    permitted, limit, threads = settings.precision(precision), settings.workspace_limit(), settings.num_threads()
    where, order = backend_named(backend), consent(algorithm, deterministic)
    request = padding_modes.request_of_blocks(Request(geometry, kind, direction, where, order, limit))
    choice = choose(request, algorithm)
    plans = getattr(MODULES[choice.algorithm], "plans", None)
    conditions = kind, direction, where.device(), permitted, request.limit - request.reserved
    found = plans(request.geometry, *conditions) if plans is not None else ()
    notes: list[str | None] = [choice.reason]
    if choice.algorithm == "im2col":
        notes.append(im2col.exceeds(request))
    if where is NUMPY:
        notes.append(depthwise.advice(request, estimate(choice.algorithm, request)))
    return Explanation(
        choice.algorithm,
        "; ".join(filter(None, notes)),
        refused=tuple(refused(request, choice.algorithm)),
        direction=direction,
        backend=where.name,
        dtype=kind.name,
        geometry=geometry,
        candidates=tuple(str(plan.choice) for plan in found),
        call=Call(geometry, where.kind, kind, where, algorithm, order, permitted, limit, threads),
    )
