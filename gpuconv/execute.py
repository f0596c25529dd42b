"""The execution of every call: its description, the lookup or making of its plan, and the execution of the plan.

Call.compute    performs these stages for a call
Description     the cache key: everything that affects the steps of a call, such as the memory layout of its arrays
plan_for        makes and caches the plan of a description
execute         executes the steps of a plan on the arrays of a call
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy

from gpuconv import dtypes, padding_modes, settings, threads, workspace
from gpuconv.arguments import Shape
from gpuconv.arrays import Array, Backend, Kind, address, addressable, device_of, module_of, moved
from gpuconv.backends import backend_for
from gpuconv.blocking import group_parts
from gpuconv.cpu import bias_grad as by_array_module
from gpuconv.geometry import Geometry
from gpuconv.gpu import bias_grad
from gpuconv.operands import ARRAYS, ROLES, Operand, Result, Role, canonical, has_channels_last_memory
from gpuconv.plan import BIAS, RESULT, WORKSPACE, Branch, Deferred, Loop, NewArray, Plan, Planner, Scope, Step, Steps
from gpuconv.request import Request, workspace_of
from gpuconv.select import MODULES, TRANSFORMS, check_name, choose, consent
from gpuconv.types import Activation, Direction
from gpuconv.views import View, contiguous_strides, first_byte

# Host memory of plans: a step takes less than STEP_BYTES. A plan has at most MOST_STEPS steps; longer loops are planned
# again in every call. All cached plans together have at most MOST_KEPT steps, where each plan counts OF_A_PLAN more.
STEP_BYTES = 5 << 8
MOST_STEPS, MOST_KEPT, OF_A_PLAN = 1 << 13, 1 << 16, 8

# Memory layout of an array: shape, strides, dtype, address modulo 16.
MemoryLayout: TypeAlias = tuple[Shape, Shape, numpy.dtype, int]
Asked: TypeAlias = Direction | Literal["bias_grad"]

_plans: dict[Description, Plan] = {}


class Source(NamedTuple):
    """An array that a call reads, and the transforms of its elements."""

    array: Array
    conjugate: bool = False
    y: Array | None = None
    activation: Activation | None = None  # its derivative, computed from y, multiplies the elements


NOTHING = Source(None)


class Call(NamedTuple):
    """A call of a public function: geometry, dtype, backend and settings."""

    geometry: Geometry
    kind: Kind
    dtype: numpy.dtype  # of the result
    backend: Backend
    algorithm: str
    deterministic: bool
    precision: str
    limit: int  # bytes
    threads: int | None

    @classmethod
    def of(
        cls,
        geometry: Geometry,
        kind: Kind,
        dtype: numpy.dtype,
        algorithm: str,
        precision: str | None,
        deterministic: bool | None,
    ) -> Call:
        """Return the call with these arguments. Settings are read and validated here."""
        check_name(algorithm)
        order, products = consent(algorithm, deterministic), settings.precision(precision)
        limit, limit_of_threads = settings.workspace_limit(), settings.num_threads()
        return cls(geometry, kind, dtype, backend_for(kind), algorithm, order, products, limit, limit_of_threads)

    def compute(
        self,
        direction: Asked,
        first: Source,
        second: Source = NOTHING,
        *,
        out: Array | None = None,
        bias: Array | None = None,
        activation: Activation | None = None,
    ) -> Array:
        """Return the result of forward (of x and w), data_grad (dy and w), weight_grad (dy and x) or bias_grad (dy)."""
        backend = self.backend
        with device_of(first.array):
            arrays = [first.array, first.y, second.array, second.y, bias, out]
            plan, arrays = self._planned(direction, first, second, activation, arrays)
            result = arrays[RESULT]
            if result is None:
                result = arrays[RESULT] = plan.result.empty(backend.xp)
            memories = [None if array is None else backend.memory(array) for array in arrays]
            most = plan.space if plan.has_temporaries else self.limit
            memories.append(workspace.take(backend, plan.space, most) if plan.space else None)
            errors = numpy.geterr() if plan.is_silent else None
            with self._surroundings(plan):
                execute([_Memory(backend, memories, errors)], [plan.steps])
            if backend.is_captured():
                workspace.keep_for_graphs(memories)
            elif plan.space:
                workspace.give_back(backend, memories[WORKSPACE])
        if result is out or (out is None and backend.kind == self.kind):
            return result
        if out is None:
            out = plan.result.empty(module_of(self.kind))
        out[...] = moved(result, self.kind)
        return out

    def _planned(
        self, direction: Asked, first: Source, second: Source, activation: Activation | None, arrays: list[Array]
    ) -> tuple[Plan, list[Array]]:
        """Return the plan and its arrays, which are copies if the backend cannot access those of the caller."""
        if self.backend.kind != self.kind:
            arrays = [array if array is None else moved(array, self.backend.kind) for array in arrays[:RESULT]] + [None]
        description = self._description(direction, first, second, activation, arrays)
        plan = _plans.get(description)
        if plan is None and self.backend.launch is not None:
            *inputs, result = arrays
            arrays = [array if array is None else addressable(array) for array in inputs]
            arrays.append(result if result is None or addressable(result) is result else None)
            description = self._description(direction, first, second, activation, arrays)
            plan = _plans.get(description)
        return plan or plan_for(description), arrays

    def _description(
        self, direction: Asked, first: Source, second: Source, activation: Activation | None, arrays: list[Array]
    ) -> Description:
        has_kernels = self.backend.launch is not None
        return Description(
            self,
            direction,
            (first.conjugate, first.activation),
            (second.conjugate, second.activation),
            activation,
            tuple(map(_layout_for_kernels if has_kernels else _layout, arrays)),
            (first.array.shape, first.array.strides),
            None if isinstance(arrays[0], numpy.ndarray) else arrays[0].device.id,
            settings.dump_folder() if has_kernels else None,
        )

    def _surroundings(self, plan: Plan) -> contextlib.ExitStack:
        """Return the context in which the steps of a plan are executed."""
        stack = contextlib.ExitStack()
        if self.backend.name == "numpy" and (plan.holds_blas or self.threads is not None):
            stack.enter_context(threads.held_blas())
        if plan.is_silent:  # it checks for non-finite values itself
            stack.enter_context(numpy.errstate(over="ignore", invalid="ignore"))
        return stack


class Description(NamedTuple):
    """Cache key: everything that affects the steps of a call. A plan is made from its description alone."""

    call: Call
    direction: Any  # Asked
    first: tuple[bool, Activation | None]  # whether it is conjugated, and the activation whose derivative multiplies it
    second: tuple[bool, Activation | None]
    activation: Activation | None
    layouts: tuple[MemoryLayout | None, ...]  # of the arrays that are read, and of the result if the caller passes it
    like: tuple[Shape, Shape]  # shape and strides of the caller's first array, whose memory order the result has
    device: int | None
    dump: Path | None  # folder to which the sources of kernels are written

    def operand(self, number: int) -> Operand:
        """Return the first (0) or second (1) operand."""
        conjugate, activation = self.second if number else self.first
        view, y = (self.view(memory, ROLES[self.direction][number]) for memory in (2 * number, 2 * number + 1))
        return Operand(view, conjugate and dtypes.is_complex(self.call.dtype), y, activation)

    def view(self, memory: int, role: Role) -> Any:
        """Return the canonical view of an array, or None if the call does not have the array."""
        layout = self.layouts[memory]
        if layout is None:
            return None
        shape, strides, dtype, place = layout
        start = first_byte(shape, strides)
        return canonical(View(memory, -start, shape, strides, dtype, (place + start) % 16), role, self.call.geometry)


def _layout(array: Array | None) -> MemoryLayout | None:
    """Return the memory layout of an array. In place of the address it has 0 if the array is aligned, else 1."""
    return None if array is None else (array.shape, array.strides, array.dtype, 1 - array.flags.aligned)


def _layout_for_kernels(array: Array | None) -> MemoryLayout | None:
    """Return the memory layout of an array for kernels, for which the address modulo 16 matters."""
    return None if array is None else (array.shape, array.strides, array.dtype, address(array) % 16)


# ------------------------------------------------------------------------------------------- making plans


def plan_for(description: Description) -> Plan:
    """Make and cache the plan of a call; evict the oldest plans if the cache is full."""
    plan = _made(description)
    room = MOST_KEPT - plan.size - OF_A_PLAN
    for older, kept in reversed(tuple(_plans.items())):
        room -= kept.size + OF_A_PLAN
        if room < 0:
            _plans.pop(older, None)
    _plans[description] = plan
    return plan


def contiguous_plan(call: Call, direction: Direction) -> Plan:
    """Return the plan of a call with C-contiguous arrays."""
    shapes = map(call.geometry.shape_of, ROLES[direction][:2])
    first, second = ((shape, contiguous_strides(shape, call.dtype), call.dtype, 0) for shape in shapes)
    device = call.backend.xp.cuda.Device().id if call.backend.name == "cupy" else None
    flags, layouts = ((False, None), (direction != "forward", None)), (first, None, second, None, None, None)
    return _made(Description(call, direction, *flags, None, layouts, first[:2], device, None))


def clear() -> None:
    """Remove all plans from the cache."""
    _plans.clear()


def _made(description: Description) -> Plan:
    """Return the plan of a description. On NumPy, its steps and its workspace together fit the limit."""
    call = description.call
    if call.backend.launch is not None:
        return _plan_within(MOST_STEPS, description)
    plan = _plan_within(min(MOST_STEPS, call.limit // STEP_BYTES), description)
    room = (call.limit - plan.space) // STEP_BYTES
    return plan if plan.size <= room else _plan_within(max(0, room), description)


def _plan_within(room: int, description: Description) -> Plan:
    """Return the plan of a description with at most ``room`` steps."""
    call, direction = description[:2]
    limit, scope = workspace_of(call.limit, call.backend), Scope(WORKSPACE, room)
    share = room if call.backend.launch is not None else (call.limit - limit) // STEP_BYTES
    workers = threads.most(call.threads) if call.backend.name == "numpy" else 1
    sums = dtypes.accumulator(call.dtype)
    planner = Planner(call.backend, sums, limit, scope, share, call.precision, workers)
    algorithm, new, temporaries = (_bias_grad if direction == "bias_grad" else _convolution)(description, planner)
    first, second, result = ARRAYS[direction]
    made = algorithm, (first, "y", second, "y", "b", result), tuple(scope.steps), scope.count, scope.most, new
    few = threads.FEW_COMPLEX if dtypes.is_complex(call.dtype) else threads.FEW
    return Plan(*made, call.geometry.multiply_adds() > few, algorithm in TRANSFORMS, temporaries > 0)


def _bias_grad(description: Description, planner: Planner) -> tuple[str, NewArray, int]:
    """Plan bias_grad; return its name, the new result and the number of temporaries."""
    dy = description.operand(0)
    new = NewArray((math.prod(dy.view.shape[-2:]),), description.call.dtype)
    if description.call.backend.launch is None:
        by_array_module.bias_grad(dy, new.view, planner)
    else:
        bias_grad.bias_grad(dy, new.view, description.call.geometry, planner)
    return "bias_grad", new, dy.temporaries


def _convolution(description: Description, planner: Planner) -> tuple[str, NewArray, int]:
    """Plan the algorithm selected for a direction; return its name, the new result and the number of temporaries."""
    call, direction = description[:2]
    first, second, roles = description.operand(0), description.operand(1), ROLES[direction]
    geometry, view = call.geometry, description.view(RESULT, roles[2])
    is_channels_last = roles[2] != "w" and has_channels_last_memory(*description.like, first.view.itemsize, geometry)
    new = _new_array(geometry.shape_of(roles[2]), call.dtype, len(geometry.batch) if is_channels_last else None)
    if view is None:
        view = canonical(new.view, roles[2], geometry)
    result = Result(view, description.view(BIAS, "b"), description.activation).with_plain_bias(planner)
    request = Request(geometry, call.dtype, direction, call.backend, call.deterministic, call.limit)
    algorithm = choose(padding_modes.request_of_blocks(request), call.algorithm).algorithm
    compute = getattr(MODULES[algorithm], direction)
    if geometry.padding_mode != "zeros":
        compute = partial(getattr(padding_modes, direction), compute)

    def some_groups(part: tuple[slice, Geometry], planner: Planner) -> None:
        groups, geometry = part
        operands = first.of_groups(groups, roles[0]), second.of_groups(groups, roles[1])
        compute(*operands, result.of_groups(groups, roles[2]), geometry, planner)

    if first.view.size and second.view.size and view.size:
        planner.loop(group_parts(geometry, planner.budget), some_groups)
    else:
        result.fill(planner)
    return algorithm, new, first.temporaries + second.temporaries + result.temporaries


def _new_array(shape: Shape, dtype: numpy.dtype, channel: int | None) -> NewArray:
    """Return a new array; if an axis of channels is given, it is the innermost one in memory."""
    if channel is None:
        return NewArray(shape, dtype)
    before, behind, last = shape[:channel], shape[channel + 1 :], len(shape) - 1
    return NewArray((*before, *behind, shape[channel]), dtype, (*range(channel), last, *range(channel, last)))


# ------------------------------------------------------------------------------------------ running plans


class _Memory:
    """The memories of a plan in one of its threads."""

    def __init__(self, backend: Backend, memories: list[Any], errors: Any) -> None:
        self.backend, self.memories = backend, memories
        self.errors = errors  # the caller's error settings, for fallbacks of a plan that suppresses warnings
        self._sizes: dict[int, int] = {}  # of memories for deferred steps

    def of_worker(self, loop: Loop, number: int) -> _Memory:
        """Return the memories of a worker of a loop, whose last one is the worker's own workspace."""
        start = loop.start + number * loop.size
        part = self.memories[loop.memory][start : start + loop.size] if loop.size else None
        return _Memory(self.backend, [*self.memories[: loop.memory + 1], part], self.errors)

    def array(self, view: View) -> Array:
        """Return the array that a view represents."""
        return self.backend.array(view.shape, view.dtype, self.memories[view.memory], view.offset, view.strides)

    def steps(self, steps: Steps) -> Iterator[Step | Loop | Branch]:
        """Yield the steps, including those of loops with one worker, of branches taken, and of deferred steps.

        Loops with several workers, and branches whose predicate is false, are yielded themselves.
        """
        for step in steps:
            if isinstance(step, Step) or (isinstance(step, Loop) and step.workers > 1):
                yield step
            elif isinstance(step, Loop):
                for part in step.parts:
                    yield from self.steps(part)
            elif isinstance(step, Deferred):
                yield from self.steps(self.planned(step))
            elif step.question(self.array(step.view)):
                yield from self.steps(step.yes)
            else:
                yield step

    def planned(self, deferred: Deferred) -> Steps:
        """Plan deferred steps, allocate their memory, and return them.

        The limit is for all memories together. Those of steps that these steps defer are allocated anew, and what these
        steps do not need is left to them.
        """
        scope = deferred.planned()
        self.memories += [None] * (scope.memory + 1 - len(self.memories))
        for number in range(scope.memory + 1, len(self.memories)):
            self._free(number)
        kept = self._sizes.get(scope.memory, 0)
        if scope.most > kept or (scope.has_deferred and scope.most < kept):
            self._free(scope.memory)
            self.memories[scope.memory] = workspace.new(self.backend, scope.most)
            self._sizes[scope.memory] = scope.most
        return scope.steps

    def _free(self, number: int) -> None:
        """Free a memory of deferred steps, unless a CUDA graph uses it."""
        if self.backend.is_captured():
            workspace.keep_for_graphs([self.memories[number]])
        self.memories[number] = None
        self._sizes.pop(number, None)


def execute(memories: list[_Memory], parts: Iterable[Steps]) -> None:
    """Execute parts of a plan in order, on one of the memories. Threads that share the parts take one memory each."""
    memory = memories.pop()
    array, places = memory.backend.array, memory.memories
    for part in parts:
        for step in memory.steps(part):
            if isinstance(step, Step):
                out = step.out
                result = None
                if out is not None:
                    result = array(out.shape, out.dtype, places[out.memory], out.offset, out.strides)
                inputs = [
                    result
                    if v is out
                    else array(v.shape, v.dtype, places[v.memory], v.offset, v.strides)
                    if type(v) is View
                    else v
                    for v in step.inputs
                ]
                if out is None:
                    step.function(*inputs)
                else:
                    step.function(*inputs, out=result)
            elif isinstance(step, Loop):
                own = [memory.of_worker(step, number) for number in range(step.workers)]
                threads.spread(step.parts, partial(execute, own), step.workers)
            else:
                with contextlib.nullcontext() if memory.errors is None else numpy.errstate(**memory.errors):
                    execute([memory], [memory.planned(step.no)])
