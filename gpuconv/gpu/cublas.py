"""Matrix products on a GPU by cuBLAS. Strided matrices are copied only if cuBLAS cannot read them.

CuPy's own matmul makes contiguous copies of stacks of matrices and of results, although cuBLAS accepts any matrix with
one contiguous axis. Moreover, the precision of CuPy's matmul is a setting of the whole process.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy

from gpuconv.arguments import Shape
from gpuconv.plan import Planner
from gpuconv.views import View

NAMES = ("tf32", "float32", "float64", "complex64", "complex128")

TF32_CAPABILITY = 80  # compute capability 8.0 is the first with TensorFloat-32

# Values of cudaDataType and cublasComputeType_t in NVIDIA's documentation.
_TYPES = {"f": 0, "d": 1, "F": 4, "D": 5}
_COMPUTE_TYPES = {"f": 68, "d": 70, "F": 68, "D": 70}
_COMPUTE_TF32 = 77
_AS_IT_LIES, _TRANSPOSED = 0, 1  # cublasOperation_t
_DEFAULT_ALGORITHM = -1


class Matrix(NamedTuple):
    """A matrix as cuBLAS reads it. cuBLAS is column-major, so it reads the transpose."""

    operation: int
    step: int  # leading dimension: elements from one column to the next


class Product(NamedTuple):
    """The parameters of a cuBLAS call."""

    rows: int
    columns: int
    terms: int
    left: Any  # Matrix
    right: Any  # Matrix
    result_step: int
    stack: int  # number of products
    apart: Shape  # batch strides of left matrix, right matrix and result, in elements
    type: int
    compute_type: int


def matmul(left: Any, right: Any, out: View, planner: Planner) -> None:
    """Plan the products of stacks of matrices, as numpy.matmul computes them; operands are views or arrays."""
    result = _matrix(out)
    if result is None:
        raise ValueError(f"no axis of {out} is contiguous, so cuBLAS cannot write it")
    if result.operation == _TRANSPOSED:
        left, right, out = right.swapaxes(-1, -2), left.swapaxes(-1, -2), out.swapaxes(-1, -2)
    stack = out.shape[:-2]
    left, right = (_readable(_stacked(operand, stack), planner) for operand in (left, right))
    first, count, apart = _together(stack, [_steps(operand)[:-2] for operand in (left, right, out)])
    numbers = Product(
        rows=out.shape[-2],
        columns=out.shape[-1],
        terms=left.shape[-1],
        left=_matrix(left),
        right=_matrix(right),
        result_step=result.step,
        stack=count,
        apart=apart,
        type=_TYPES[out.dtype.char],
        compute_type=_compute_type(out.dtype, planner),
    )
    for index in product(*map(range, stack[:first])):
        planner.call(partial(multiply, numbers), left[index], right[index], out=out[index])


def multiply(numbers: Product, left: Any, right: Any, out: Any) -> None:
    """Call cuBLAS for one product or a strided batch. It is column-major and computes ``result' = right' left'``."""
    from cupy.cuda import cublas, get_cublas_handle

    n, kind, (one, zero) = numbers, numbers.type, _ADDRESSES[numbers.type]
    shape = get_cublas_handle(), n.right.operation, n.left.operation, n.columns, n.rows, n.terms
    first, second, to = (right.data.ptr, kind, n.right.step), (left.data.ptr, kind, n.left.step), out.data.ptr
    how = n.compute_type, _DEFAULT_ALGORITHM
    if n.stack == 1:
        cublas.gemmEx(*shape, one, *first, *second, zero, to, kind, n.result_step, *how)
        return
    left_apart, right_apart, apart = n.apart
    operands = *first, right_apart, *second, left_apart
    cublas.gemmStridedBatchedEx(*shape, one, *operands, zero, to, kind, n.result_step, apart, n.stack, *how)


def of_squares(extent: int, name: str) -> Callable[..., None]:
    """Return ``f(left, right, out)`` for square C-contiguous matrices of a dtype, or of float32 by TF32 for "tf32"."""
    matrix = Matrix(_AS_IT_LIES, extent)
    dtype = numpy.dtype("float32" if name == "tf32" else name)
    compute_type = _COMPUTE_TF32 if name == "tf32" else _COMPUTE_TYPES[dtype.char]
    sizes = (extent, extent, extent, matrix, matrix, extent, 1, ())
    return partial(multiply, Product(*sizes, _TYPES[dtype.char], compute_type))


_SCALARS = {number: numpy.array([1, 0], kind) for kind, number in _TYPES.items()}
_ADDRESSES = {number: (two.ctypes.data, two.ctypes.data + two.itemsize) for number, two in _SCALARS.items()}


def _compute_type(dtype: numpy.dtype, planner: Planner) -> int:
    """Return the compute type: TF32 for float32 if the precision permits it and the device has it."""
    if planner.precision == "tf32" and dtype.char == "f" and planner.backend.device().capability >= TF32_CAPABILITY:
        return _COMPUTE_TF32
    return _COMPUTE_TYPES[dtype.char]


def _steps(operand: Any) -> Shape:
    """Return the strides in elements, 0 for axes of one element."""
    return tuple(
        0 if size == 1 else step // operand.dtype.itemsize
        for size, step in zip(operand.shape, operand.strides, strict=True)
    )


def _matrix(operand: Any) -> Matrix | None:
    """Return how cuBLAS reads the last two axes, or None if neither of them is contiguous."""
    (rows, columns), (down, along) = operand.shape[-2:], _steps(operand)[-2:]
    if along in (0, 1) and (along or columns == 1) and (rows == 1 or down >= columns):
        return Matrix(_AS_IT_LIES, max(down, columns))
    if down in (0, 1) and (down or rows == 1) and (columns == 1 or along >= rows):
        return Matrix(_TRANSPOSED, max(along, rows))
    return None


def _stacked(operand: Any, stack: Shape) -> Any:
    """Return the operand broadcast to the axes of the stack, with stride 0 where a matrix is repeated."""
    missing = len(stack) + 2 - len(operand.shape)
    shape, strides = (1,) * missing + operand.shape, (0,) * missing + operand.strides
    strides = tuple(0 if size == 1 else step for size, step in zip(shape, strides, strict=True))
    if isinstance(operand, View):
        return operand.strided((*stack, *shape[-2:]), strides)
    return type(operand)((*stack, *shape[-2:]), operand.dtype, operand.data, strides)


def _readable(operand: Any, planner: Planner) -> Any:
    """Return the operand, or a copy in the workspace if cuBLAS cannot read the operand."""
    if _matrix(operand) is not None:
        return operand
    steps = _steps(operand)
    own = tuple(1 if step == 0 else size for size, step in zip(operand.shape[:-2], steps, strict=False))
    (space,) = planner.workspace(math.prod((*own, *operand.shape[-2:])), dtype=operand.dtype)
    copy = space.shaped((*own, *operand.shape[-2:]))
    planner.copy(copy, operand[tuple(map(slice, own))])
    return _stacked(copy, operand.shape[:-2])


def _together(stack: Shape, steps: list[Shape]) -> tuple[int, int, Shape]:
    """Return the first axis such that one strided batched call covers it and all later axes of the stack.

    Also return the number of products of such a call and the batch stride of each operand.
    """
    count, apart = 1, (0,) * len(steps)
    for axis in reversed(range(len(stack))):
        here = tuple(step[axis] for step in steps)
        if count > 1 and stack[axis] > 1 and here != tuple(step * count for step in apart):
            return axis + 1, count, apart
        if count == 1:
            apart = here
        count *= stack[axis]
    return 0, count, apart
