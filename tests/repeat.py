"""Repetition of calls: every call of a public function by a test is made four times, and the results must agree.

The first call has other data of the same shapes, strides and dtypes, so that the plan was made for other values. Two
calls with the data of the test follow, and another after ``gpuconv.clear_cache()``, whose result is returned to the
test. The three results for the data of the test must agree bit for bit, and inputs must not change. With PyTorch's
autograd the gradients must agree, too.

A test whose calls cannot be repeated is marked ``@pytest.mark.called_once("reason")``.
"""

import contextlib
import functools
import inspect
import sys
import threading

import numpy as np

import gpuconv
from gpuconv.compat import cs231n, cupy_cudnn, nhwc
from gpuconv.geometry import DIRECTIONS, Geometry
from tests.tolerances import direct_bound

PUBLIC = ("conv", "conv_data_grad", "conv_weight_grad", "conv_backward", "conv_transpose", "conv_transpose_backward")
# The argument into which a function writes, if any.
OUTPUTS = {
    "conv": "out",
    "conv_data_grad": "out",
    "conv_weight_grad": "out",
    "conv_transpose": "out",
    "convolution_forward": "y",
    "convolution_backward_filter": "gW",
    "convolution_backward_data": "y",
}
ALIGNMENT = 64  # bytes; CuPy's memory begins at multiples of 512

_state = threading.local()  # is_inside: whether this thread is in a repeated call; nested calls are not repeated
_is_on, _adds_atomically = False, False


@contextlib.contextmanager
def repeating(adds_atomically):
    """Enter a context in which calls are repeated; ``adds_atomically``: whether scatter runs as kernels in it."""
    global _is_on, _adds_atomically
    before = _is_on, _adds_atomically
    _is_on, _adds_atomically = True, adds_atomically
    try:
        yield
    finally:
        _is_on, _adds_atomically = before


def install():
    """Replace the public functions by repeating ones, in every module that has them."""
    for name in PUBLIC:
        original = getattr(gpuconv, name)
        replacement = repeated(original)
        for module in [module for path, module in sys.modules.items() if path.partition(".")[0] == "gpuconv"]:
            if getattr(module, name, None) is original:
                setattr(module, name, replacement)
    for module, names in (
        (cs231n, ("conv_forward", "conv_backward")),
        (nhwc, ("conv_forward", "conv_backward")),
        (cupy_cudnn, ("convolution_forward", "convolution_backward_filter", "convolution_backward_data")),
    ):
        for name in names:
            setattr(module, name, repeated(getattr(module, name)))
    for name in ("conv_forward", "conv_backward"):
        for alias in (f"{name}_naive", f"{name}_fast"):
            setattr(cs231n, alias, getattr(cs231n, name))


def install_torch():
    """Do the same for gpuconv.torch, which imports PyTorch."""
    import gpuconv.torch

    for name in ("conv", "conv_transpose"):
        setattr(gpuconv.torch, name, repeated(getattr(gpuconv.torch, name), _TensorCalls))


def repeated(function, kind=None):
    """Return a function that repeats the calls of a function as described above."""

    @functools.wraps(function)
    def call(*arguments, **options):
        if not _is_on or getattr(_state, "is_inside", False):
            return function(*arguments, **options)
        _state.is_inside = True
        try:
            return (kind or _ArrayCalls)(function, arguments, options).repeat()
        finally:
            _state.is_inside = False

    return call


class _ArrayCalls:
    """The repeated calls of a function with the same arguments."""

    def __init__(self, function, arguments, options):
        self.function, self.arguments, self.options = function, arguments, options
        self.output = OUTPUTS.get(function.__name__)
        self.given = self._by_name()

    def _by_name(self):
        try:
            return dict(inspect.signature(self.function).bind(*self.arguments, **self.options).arguments)
        except TypeError:  # the call itself will raise it
            return {}

    def repeat(self):
        error = self._error_on_other_data()
        if error is not None:
            self.function(*self.arguments, **self.options)
            raise AssertionError("a call on other data of the same shapes was refused") from error
        inputs = [value for name, value in self.given.items() if name != self.output]
        before = snapshot(inputs)
        results = [self._on_own_data() for _ in range(2)]
        gpuconv.clear_cache()
        final = self.function(*self.arguments, **self.options)
        results.append(snapshot((final, self.given.get(self.output))))
        assert snapshot(inputs) == before, "a call changed an input"
        self._compare(results, ("the second call", "the third call", "the call after clear_cache()"))
        return final

    def _error_on_other_data(self):
        """Return the exception of a call with other data, which is expected for invalid arguments, or None."""
        if not self.given:
            return None
        try:
            self._called(mapped(self.given, twin))
        except Exception as error:
            return error
        return None

    def _on_own_data(self):
        given = dict(self.given)
        if self.output in given:
            given[self.output] = twin(given[self.output])
        return snapshot((self._called(given), given.get(self.output)))

    def _called(self, given):
        bound = inspect.signature(self.function).bind_partial()
        bound.arguments.update(given)
        return self.function(*bound.args, **bound.kwargs)

    def _compare(self, results, names):
        first, *others = results
        for name, other in zip(names[1:], others, strict=True):
            if other != first:
                assert self._may_differ(), f"{name} gave other bits than {names[0]}"
                self._assert_close(first, other)

    def _may_differ(self):
        """Return whether results may differ because atomic additions occur in any order."""
        return _adds_atomically and self.options.get("algorithm") in ("scatter", "scatter_plain")

    def _assert_close(self, first, other):
        """Assert agreement within twice the bound of direct sums; the magnitudes are those for absolute values."""
        terms = max(self._geometry().reduction_length(direction) for direction in DIRECTIONS)
        with np.errstate(all="ignore"):
            magnitudes = snapshot((self._called(mapped(self.given, absolute)), None))
        for (_, dtype, _), *of_all in zip(first, first, other, magnitudes, strict=False):
            wide = np.result_type(dtype, np.float64) if dtype.kind in "fc" else np.float64
            one, two, magnitude = (np.frombuffer(data, of).astype(wide) for data, of, _ in of_all)
            bound = 2 * direct_bound(two, np.abs(magnitude), terms, dtype)
            assert (np.abs(one - two) <= bound).all(), "atomic additions are out of bounds"

    def _geometry(self):
        infer = Geometry.infer_transposed if "transpose" in self.function.__name__ else Geometry.infer
        x, w = (self.given.get(f"{name}_shape") or self.given[name].shape for name in "xw")
        taken = inspect.signature(infer).parameters.keys() - {"x_shape", "w_shape"}
        return infer(x, w, **{name: value for name, value in self.given.items() if name in taken})


class _TensorCalls(_ArrayCalls):
    """The repeated calls of a function with tensors; gradients are compared too."""

    def repeat(self):
        error = self._error_on_other_data()
        if error is not None:
            self.function(*self.arguments, **self.options)
            raise AssertionError("a call on other data of the same shapes was refused") from error
        before = snapshot(self.given)
        results = [self._on_own_data() for _ in range(2)]
        gpuconv.clear_cache()
        results.append(self._on_own_data())
        final = self.function(*self.arguments, **self.options)
        assert snapshot(self.given) == before, "a call changed an input"
        self._compare(results, ("the second call", "the third call", "the call after clear_cache()"))
        assert snapshot(final) == results[0][:1], "the call that autograd sees gave other bits"
        return final

    def _on_own_data(self):
        return self._with_gradients(mapped(self.given, lambda value: _leaf(value) if _is_tensor(value) else value))

    def _called(self, given):
        return self._with_gradients(given)

    def _with_gradients(self, given):
        import torch

        y = super()._called(given)
        found = [y]
        wanted = [value for value in given.values() if _is_tensor(value) and value.requires_grad]
        if y.requires_grad:
            found += torch.autograd.grad(y, wanted, torch.ones_like(y), allow_unused=True)
        return snapshot(found)


def _is_tensor(value):
    """Return whether a value is a PyTorch tensor that gpuconv accepts: dense and on a device with memory."""
    torch = sys.modules.get("torch")
    is_tensor = torch is not None and isinstance(value, torch.Tensor)
    return is_tensor and value.layout is torch.strided and not value.is_meta


def _leaf(tensor):
    return tensor.detach().requires_grad_(tensor.requires_grad)


def mapped(tree, function):
    """Return a tree of tuples, lists and dicts with a function applied to its leaves."""
    if isinstance(tree, dict):
        return {name: mapped(value, function) for name, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        parts = [mapped(value, function) for value in tree]
        return tree._make(parts) if hasattr(tree, "_make") else type(tree)(parts)
    return function(tree)


def snapshot(tree):
    """Return the bytes, dtypes and shapes of all arrays in a tree."""
    found = []

    def note(value):
        array = _on_cpu(value)
        if array is not None:
            found.append((array.tobytes(), array.dtype, array.shape))
        return value

    mapped(tree, note)
    return found


def _on_cpu(value):
    """Return an array of any kind as a NumPy array; None if the value is not an array of numbers."""
    if _is_tensor(value):
        import torch

        value = value.detach().resolve_conj().resolve_neg()
        value = (value.view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy()
    elif _is_cupy(value):
        value = value.get()
    return value if isinstance(value, np.ndarray) and not value.dtype.hasobject else None


def _is_cupy(value):
    return type(value).__module__.startswith("cupy") and hasattr(value, "get")


def twin(value):
    """Return other data of the same shape, strides, dtype and alignment for an array; return other values unchanged."""
    if _is_tensor(value):
        return _twin_tensor(value)
    if type(value) in (np.ndarray, np.memmap) and _is_number(value.dtype):
        return _twin_array(value)
    if _is_cupy(value) and _is_number(value.dtype):
        return _twin_on_device(value)
    return value


def absolute(value):
    """Return the absolute values of an array; return other values unchanged."""
    return abs(value) if isinstance(value, np.ndarray) or _is_cupy(value) else value


def _is_number(dtype):
    return dtype.kind in "fc" or dtype.name == "bfloat16"


def _whole_numbers(shape):
    """Return small integers, whose sums are not rounded."""
    return np.resize(np.array([1, -2, 0, 2, -1, 1, 0], np.int8), shape)


def _span(array):
    """Return the bytes before the first element, and the bytes that the array spans."""
    steps = [step * (size - 1) for step, size in zip(array.strides, array.shape, strict=True)] if array.size else []
    before = -sum(step for step in steps if step < 0)
    return before, before + sum(step for step in steps if step > 0) + array.itemsize


def _twin_array(array):
    before, size = _span(array)
    buffer = np.zeros(size + 2 * ALIGNMENT, np.uint8)
    start = (array.__array_interface__["data"][0] - before - buffer.__array_interface__["data"][0]) % ALIGNMENT
    other = np.ndarray(array.shape, array.dtype, buffer, start + before, array.strides)
    other[...] = _whole_numbers(array.shape)
    other.flags.writeable = array.flags.writeable
    return other


def _twin_on_device(array):
    import cupy

    before, size = _span(array)
    start = (array.data.ptr - before) % 512
    memory = cupy.cuda.alloc(size + 1024)
    other = cupy.ndarray(array.shape, array.dtype, memory + start + before, array.strides)
    other[...] = cupy.asarray(_whole_numbers(array.shape))
    return other


def _twin_tensor(tensor):
    import torch

    size = 1 + sum(step * (extent - 1) for step, extent in zip(tensor.stride(), tensor.shape, strict=True))
    flat = torch.from_numpy(_whole_numbers((max(size, 1),))).to(tensor.dtype)
    return torch.as_strided(flat, tensor.shape, tensor.stride()).requires_grad_(tensor.requires_grad)
