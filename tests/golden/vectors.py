"""The inputs of the kernels of primitives.cu; running them, and storing and comparing their results.

A golden vector is the result of one of these kernels on a GPU. make_golden.py writes a file for each device to this
folder, and the tests compare the emulator with all of them. float16 and bfloat16 are stored as integers, bit by bit.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpuconv.gpu import kernels_folder

FOLDER = Path(__file__).parent


class Vector(NamedTuple):
    """One kernel: the functions that it tests, its inputs, and the array that it writes or adds to."""

    kernel: str
    functions: tuple[str, ...]  # as primitives.cuh declares them, without the names of parameters
    inputs: Callable[[], list[np.ndarray]]
    result: Callable[[], np.ndarray]  # before the launch
    counted: bool = False  # whether the kernel also takes the length of x
    floats: str | None = None  # the format of which the results are the bits; all NaN compare equal


def rng():
    return np.random.default_rng(20)


def floats_of_all_kinds():
    """Return every exponent with mantissas at, below and above the ties of all conversions, both signs, Inf and NaN."""
    mantissas = [0, 1]
    for cut in (13, 16):  # of float16 and TF32, and of bfloat16
        tie = 1 << (cut - 1)
        mantissas += [tie - 1, tie, tie + 1, 3 * tie - 1, 3 * tie, 3 * tie + 1]
    mantissas += [0x7FFFFE, 0x7FEFFF, 0x7FF000, 0x7F7FFF, 0x7F8000]
    exponents = np.arange(256, dtype=np.uint32) << 23
    positive = (exponents[:, None] | np.array(mantissas, np.uint32)).reshape(-1)
    return np.concatenate([positive, positive | 0x80000000]).view(np.float32)


def all_halves():
    return np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)


def integers(count, dtype, most=8):
    return rng().integers(-most, most + 1, count).astype(dtype)


def half_bits(values):
    return values.astype(np.float16).view(np.uint16)


def bfloat16_bits(values):
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)  # exact for small integers


def packed(count, to_bits):
    """Return registers with two small integers each."""
    return to_bits(integers(2 * count, np.float32, 4)).view(np.uint32)


def rows_of_matrices():
    """Return matrices whose element (row, column) is 256 row + column."""
    return (256 * np.arange(32)[:, None] + np.arange(8)).astype(np.uint16).reshape(-1)


KINDS = floats_of_all_kinds()
ADDRESS = "shared_address(const void*)"
COPY = ("copy_async(void*, const void*, int)", "copy_async_commit()", "copy_async_wait()", ADDRESS)
LOAD = "(unsigned (&)[4], const void*)"
REGISTERS = "float (&)[4], const unsigned (&)[4], const unsigned (&)[2]"


def zeros(count, dtype):
    return lambda: np.zeros(count, dtype)


VECTORS = (
    Vector("half_to_float", ("to_float(half)",), lambda: [all_halves()], zeros(1 << 16, np.uint32), True, "float32"),
    Vector("float_to_half", ("to_half(float)",), lambda: [KINDS], zeros(KINDS.size, np.uint16), True, "float16"),
    Vector("bfloat16_to_float", ("to_float(bfloat16)",), lambda: [all_halves()], zeros(1 << 16, np.uint32), True,
           "float32"),
    Vector("float_to_bfloat16", ("to_bfloat16(float)",), lambda: [KINDS], zeros(KINDS.size, np.uint16), True,
           "bfloat16"),
    Vector("float_to_tf32", ("to_tf32(float)",), lambda: [KINDS], zeros(KINDS.size, np.uint32), True, "float32"),
    Vector("atomic_add_float", ("atomic_add(float*, float)",), lambda: [integers(32, np.float32)],
           lambda: np.arange(33, dtype=np.float32)),
    Vector("atomic_add_double", ("atomic_add(double*, double)",), lambda: [integers(32, np.float64)],
           lambda: np.arange(33, dtype=np.float64)),
    Vector("atomic_add_float2", ("atomic_add(float*, float2)",), lambda: [integers(64, np.float32)],
           lambda: np.arange(66, dtype=np.float32)),
    Vector("atomic_add_float4", ("atomic_add(float*, float4)",), lambda: [integers(128, np.float32)],
           lambda: np.arange(132, dtype=np.float32)),
    Vector("copy_async_4", COPY, lambda: [np.arange(1, 129).astype(np.uint8)], zeros(128, np.uint8)),
    Vector("copy_async_8", COPY, lambda: [np.arange(1, 257).astype(np.uint8)], zeros(256, np.uint8)),
    Vector("copy_async_16", COPY, lambda: [np.arange(1, 513).astype(np.uint8)], zeros(512, np.uint8)),
    Vector("load_matrices_from_rows", (f"load_matrices{LOAD}", ADDRESS), lambda: [rows_of_matrices()],
           zeros(128, np.uint32)),
    Vector("load_matrices_from_columns", (f"load_matrices_transposed{LOAD}", ADDRESS), lambda: [rows_of_matrices()],
           zeros(128, np.uint32)),
    Vector("multiply_half_k16", (f"multiply_16x8x16({REGISTERS}, half)",),
           lambda: [packed(128, half_bits), packed(64, half_bits)], lambda: integers(128, np.float32)),
    Vector("multiply_bfloat16_k16", (f"multiply_16x8x16({REGISTERS}, bfloat16)",),
           lambda: [packed(128, bfloat16_bits), packed(64, bfloat16_bits)], lambda: integers(128, np.float32)),
    Vector("multiply_tf32_k8", (f"multiply_16x8x8_tf32({REGISTERS})",),
           lambda: [integers(128, np.float32).view(np.uint32), integers(64, np.float32).view(np.uint32)],
           lambda: integers(128, np.float32)),
    Vector("multiply_double_k4", ("multiply_8x8x4(double (&)[2], double, double)",),
           lambda: [integers(32, np.float64), integers(32, np.float64)], lambda: integers(64, np.float64)),
)  # fmt: skip


def computed(vector, inputs, launch):
    """Return the result of a kernel; ``launch(kernel, arguments)`` runs one warp and changes arrays in place."""
    result = vector.result()
    launch(vector.kernel, [*inputs, result, *([np.int32(inputs[0].size)] if vector.counted else [])])
    return result


def write(path, results, about):
    """Write results, given as {kernel: (inputs, result)}."""
    arrays = {"about": np.array(json.dumps(about))}
    for kernel, (inputs, result) in results.items():
        arrays |= {f"{kernel}.{i}": array for i, array in enumerate((*inputs, result))}
    np.savez_compressed(path, **arrays)


def read(path):
    """Return results as they were written, and the facts about their device."""
    with np.load(path) as content:
        arrays = {name: content[name] for name in content.files}
    about = json.loads(str(arrays.pop("about")))
    results = {}
    for name, array in arrays.items():
        results.setdefault(name.rpartition(".")[0], []).append(array)
    return {kernel: (inputs, result) for kernel, (*inputs, result) in results.items()}, about


def files():
    """Return the files of golden vectors of all devices."""
    return sorted(FOLDER.glob("*.npz"))


def differences(vector, found, golden):
    """Return where two results differ in any bit; if the bits represent floats, all NaN are equal."""
    assert (found.dtype, found.shape) == (golden.dtype, golden.shape)
    found, golden = (array.view(f"u{array.dtype.itemsize}") for array in (found, golden))
    differ = found != golden
    if vector.floats:
        differ &= ~(_is_nan(found, vector.floats) & _is_nan(golden, vector.floats))
    return np.flatnonzero(differ)


def _is_nan(bits, floats):
    infinity = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}[floats]
    sign = 1 << (8 * bits.dtype.itemsize - 1)
    return (bits & bits.dtype.type(sign - 1)) > infinity


def unconfirmed():
    """Return the functions of primitives.cuh that no golden vector tests."""
    kernels = {kernel for path in files() for kernel in read(path)[0]}
    confirmed = {name for vector in VECTORS if vector.kernel in kernels for name in vector.functions}
    return [name for name in declared() if name not in confirmed]


def declared():
    """Return the names and parameter types of the device functions of primitives.cuh that execute an instruction."""
    text = (kernels_folder() / "primitives.cuh").read_text()
    found = {}
    declaration = r'^(?:template <.*> )?DEVICE \w+ (\w+)\((.*)\) \{(?! asm volatile\("" )'
    for name, parameters in re.findall(declaration, text, re.MULTILINE):
        types = [re.sub(r"\s*=.*", "", parameter) for parameter in parameters.split(", ") if parameter]
        types = [re.sub(r"^((?:const )?\w+\*?) \w+$", r"\1", re.sub(r"\(&\w+\)", "(&)", one)) for one in types]
        found[f"{name}({', '.join(types)})"] = None
    return list(found)
