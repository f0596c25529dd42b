"""The emulator itself: what its instructions compute, and that it says what is wrong with a kernel, and where."""

import concurrent.futures
import functools

import numpy as np
import pytest

from gpuconv.cuda import kernels_folder

from emulation import launcher, loader
from emulation.loader import EmulationError, Library

pytestmark = pytest.mark.emulated

BOTH_MODES = pytest.mark.parametrize("mode", ["fast", "checked"])
ORDERS = pytest.mark.parametrize("order", launcher.ORDERS)


@functools.cache
def library(body, mode):
    primitives = (loader.FOLDER / "primitives.hpp").read_text()
    return Library(f'#line 1 "primitives.hpp"\n{primitives}\n#line 1 "planted.cu"\n{body}', mode)


def launch(body, arguments, grid=1, block=32, mode="fast", shared_memory=0, **how):
    """Runs the kernel of a source of one kernel."""
    compiled = library(body, mode)
    (name,) = loader.kernel_names(body)
    declared = body[body.index(name) :].partition("(")[2].partition(")")[0].split(",")
    names = [(one.split()[-1].strip("* "), one.strip().startswith("const")) for one in declared]
    with launcher.using(mode=mode, **{"order": "natural", **how}):
        launcher.run(compiled, name, grid, block, arguments, shared_memory, names)


def kernel(parameters, body):
    """A kernel's source; the body begins in line 2."""
    return f'extern "C" __global__ void planted({parameters}) {{\n{body}\n}}'


# ------------------------------------------------------------------------------------------------- what it computes


@BOTH_MODES
@ORDERS
def test_threads_blocks_barriers_and_shared_memory(mode, order):
    body = kernel(
        "const float* x, float* y, int n",
        """__shared__ float tile[64];
        const int i = blockIdx.x * blockDim.x + threadIdx.x;
        tile[threadIdx.x] = i < n ? x[i] : 0;
        __syncthreads();
        const int count = __syncthreads_count(i < n);
        if (i < n) y[i] = tile[blockDim.x - 1 - threadIdx.x] + 1000 * count;""",
    )
    x = np.arange(100, dtype=np.float32)
    y = np.empty(100, np.float32)
    launch(body, (x, y, np.int32(100)), grid=2, block=64, mode=mode, order=order)
    padded = np.concatenate([x, np.zeros(28, np.float32)]).reshape(2, 64)
    expected = padded[:, ::-1] + 1000 * np.array([[64], [36]])
    np.testing.assert_array_equal(y, expected.reshape(-1)[:100])


@BOTH_MODES
@ORDERS
def test_dynamic_shared_memory_and_atomics(mode, order):
    body = kernel(
        "const int* x, int* histogram, float* sum, int* largest",
        """DYNAMIC_SHARED(int, bins);
        if (threadIdx.x < 8) bins[threadIdx.x] = 0;
        __syncthreads();
        atomicAdd(&bins[x[threadIdx.x] & 7], 1);
        atomicMax(largest, x[threadIdx.x]);
        atomic_add(sum + 4 * (threadIdx.x & 1), make_float4(1, 2, 3, 4));
        __syncthreads();
        if (threadIdx.x < 8) atomicAdd(&histogram[threadIdx.x], bins[threadIdx.x]);""",
    )
    x = np.arange(96, dtype=np.int32) * 7 % 31
    histogram, total, largest = np.zeros(8, np.int32), np.zeros(8, np.float32), np.zeros(1, np.int32)
    with launcher.using() as launches:
        launch(body, (x, histogram, total, largest), block=96, mode=mode, order=order, shared_memory=32)
        assert not launches
    np.testing.assert_array_equal(histogram, np.bincount(x & 7, minlength=8))
    np.testing.assert_array_equal(total, np.tile([48, 96, 144, 192], 2))
    assert largest[0] == x.max()


def test_global_atomics_are_counted_by_element_and_shared_ones_are_not():
    body = kernel(
        "float* y",
        """__shared__ float here;
        if (threadIdx.x == 0) here = 0;
        __syncthreads();
        atomic_add(&here, 1.0f);
        atomic_add(y, 1.0f);
        atomic_add(y, make_float2(1, 1));
        atomic_add(y, make_float4(1, 1, 1, 1));""",
    )
    y = np.zeros(4, np.float32)
    with launcher.using(order="natural") as launches:
        launcher.run(library(body, "fast"), "planted", 2, 32, (y,))
        assert [launch.global_atomics for launch in launches] == [2 * 32 * 7]
    np.testing.assert_array_equal(y, [192, 128, 64, 64])


@BOTH_MODES
def test_shuffles_and_votes(mode):
    body = kernel(
        "int* y",
        """const int lane = threadIdx.x, all = ~0u;
        y[lane] = __shfl_sync(~0u, lane, 5);
        y[32 + lane] = __shfl_up_sync(~0u, lane, 3);
        y[64 + lane] = __shfl_down_sync(~0u, lane, 3, 8);
        y[96 + lane] = __shfl_xor_sync(~0u, lane, 9);
        y[128 + lane] = int(__ballot_sync(~0u, lane % 3 == 0));
        y[160 + lane] = __any_sync(~0u, lane == 7) + 2 * __all_sync(~0u, lane >= 0) + 4 * (all == -1);""",
    )
    y = np.empty(192, np.int32)
    launch(body, (y,), mode=mode)
    lane = np.arange(32)
    votes = sum(1 << int(i) for i in lane if i % 3 == 0)
    expected = (
        np.full(32, 5),
        np.where(lane >= 3, lane - 3, lane),
        np.where(lane % 8 + 3 < 8, lane + 3, lane),
        lane ^ 9,
        np.full(32, votes).astype(np.uint32).view(np.int32)[:32] if votes < 2**31 else np.full(32, votes - 2**32),
        np.full(32, 7),
    )
    np.testing.assert_array_equal(y.reshape(6, 32), np.stack(expected))


def test_half_precision_conversions_round_to_nearest_even():
    import ml_dtypes

    body = kernel(
        "const float* x, half* h, bfloat16* b, float* back, float* tf32",
        """const int i = blockIdx.x * 32 + threadIdx.x;
        h[i] = to_half(x[i]);
        b[i] = to_bfloat16(x[i]);
        back[i] = to_float(h[i]) + to_float(b[i]);
        tf32[i] = __uint_as_float(to_tf32(x[i]));""",
    )
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal(30), [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 65519, 65520, 1e-7, np.inf, 0]])
    x = np.concatenate([x, -x, [np.nan] * 20]).astype(np.float32)[:96]
    h, b = np.empty(96, np.float16), np.empty(96, ml_dtypes.bfloat16)
    back, tf32 = np.empty(96, np.float32), np.empty(96, np.float32)
    launch(body, (x, h, b, back, tf32), grid=3)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(h, x.astype(np.float16))
    np.testing.assert_array_equal(b.astype(np.float32), x.astype(ml_dtypes.bfloat16).astype(np.float32))
    np.testing.assert_array_equal(back, h.astype(np.float32) + b.astype(np.float32))
    finite = np.isfinite(x)
    assert (tf32.view(np.uint32) & 0x1FFF == 0).all()
    assert (abs(tf32[finite] - x[finite]) <= 2.0**-11 * abs(x[finite])).all()
    np.testing.assert_array_equal(tf32[~finite], x[~finite])


def test_bfloat16_is_rounded_in_integers_where_the_instruction_is_missing():
    """The function that sm_75 gets, taken from primitives.cuh."""
    import ml_dtypes

    text = (kernels_folder() / "primitives.cuh").read_text()
    function = text.split("#else\n// To the nearest, ties to even")[1].partition("\n")[2].partition("#endif")[0]
    function = function.replace("to_bfloat16", "rounded_in_integers").replace("DEVICE", "inline")
    body = function + kernel(
        "const float* x, bfloat16* b",
        "const int i = blockIdx.x * 32 + threadIdx.x;\nb[i] = rounded_in_integers(x[i]);",
    )
    bits = np.arange(2**32 - 2**16, step=2**16 + 12345, dtype=np.uint64).astype(np.uint32)
    ties = np.arange(0x3F800000, 0x3F900000, 0x8000, dtype=np.uint32)
    x = np.concatenate([bits, ties])[: (bits.size + ties.size) // 32 * 32].view(np.float32)
    b = np.empty(x.size, ml_dtypes.bfloat16)
    launch(body, (x, b), grid=x.size // 32)
    with np.errstate(invalid="ignore"):  # some are signalling NaN
        np.testing.assert_array_equal(b.astype(np.float32), x.astype(ml_dtypes.bfloat16).astype(np.float32))


@BOTH_MODES
def test_half_precision_atomics(mode):
    import ml_dtypes

    body = kernel(
        "half2* h, bfloat162* b",
        """atomic_add(h, half2{to_half(1.0f), to_half(0.5f)});
        atomic_add(b, bfloat162{to_bfloat16(2.0f), to_bfloat16(0.25f)});""",
    )
    h, b = np.zeros(2, np.float16), np.zeros(2, ml_dtypes.bfloat16)
    launch(body, (h, b), mode=mode)
    np.testing.assert_array_equal(h, [32, 16])
    np.testing.assert_array_equal(b.astype(float), [64, 8])


COPY = """__shared__ __align__(16) float tile[128];
        copy_async<16>(&tile[4 * threadIdx.x], &x[4 * threadIdx.x], threadIdx.x < 20 ? 16 : 4);
        copy_async_commit();
        {wait}
        __syncthreads();
        y[threadIdx.x] = tile[127 - threadIdx.x] + tile[threadIdx.x];"""


@BOTH_MODES
@pytest.mark.parametrize("late", [True, False])
def test_asynchronous_copies_fill_with_zeros(late, mode):
    body = kernel("const float* x, float* y", COPY.format(wait="copy_async_wait<0>();"))
    x, y = np.arange(1, 129, dtype=np.float32), np.empty(32, np.float32)
    launch(body, (x, y), mode=mode, late_copies=late)
    tile = x.reshape(32, 4).copy()
    tile[20:, 1:] = 0
    tile = tile.reshape(-1)
    np.testing.assert_array_equal(y, tile[:-33:-1] + tile[:32])


@BOTH_MODES
@pytest.mark.parametrize("transposed", [False, True])
def test_matrix_loads(transposed, mode):
    body = kernel(
        "const unsigned short* x, unsigned* y",
        f"""__shared__ __align__(16) unsigned short tile[256];
        for (int i = threadIdx.x; i < 256; i += 32) tile[i] = x[i];
        __syncthreads();
        unsigned r[4];
        load_matrices{"_transposed" if transposed else ""}(r, &tile[8 * threadIdx.x]);
        for (int m = 0; m < 4; ++m) y[4 * threadIdx.x + m] = r[m];""",
    )
    x, y = np.arange(256, dtype=np.uint16), np.empty(128, np.uint32)
    launch(body, (x, y), mode=mode)
    matrices = x.reshape(4, 8, 8).swapaxes(1, 2) if transposed else x.reshape(4, 8, 8)
    pairs = y.view(np.uint16).reshape(32, 4, 2)
    for lane in range(32):
        for m in range(4):
            g, t = divmod(lane, 4)
            np.testing.assert_array_equal(pairs[lane, m], matrices[m, g, 2 * t : 2 * t + 2])


# Fragments by rows and columns, as PTX describes them: of lane 4 g + t, element e of each operand.
PRODUCTS = {
    "f16 k8": (8, "multiply_16x8x8(d, a, b[0], half{})", 2, 1, np.float16),
    "f16 k16": (16, "multiply_16x8x16(d, a, b, half{})", 4, 2, np.float16),
    "bf16 k16": (16, "multiply_16x8x16(d, a, b, bfloat16{})", 4, 2, "bfloat16"),
    "tf32 k8": (8, "multiply_16x8x8_tf32(d, a, b)", 4, 2, np.float32),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_matrix_products(name):
    k, call, a_registers, b_registers, dtype = PRODUCTS[name]
    if dtype == "bfloat16":
        import ml_dtypes

        dtype = ml_dtypes.bfloat16
    body = kernel(
        "const unsigned* x, const unsigned* w, float* y",
        f"""unsigned a[{a_registers}], b[{b_registers}];
        float d[4];
        for (int i = 0; i < {a_registers}; ++i) a[i] = x[{a_registers} * threadIdx.x + i];
        for (int i = 0; i < {b_registers}; ++i) b[i] = w[{b_registers} * threadIdx.x + i];
        for (int i = 0; i < 4; ++i) d[i] = y[4 * threadIdx.x + i];
        {call};
        for (int i = 0; i < 4; ++i) y[4 * threadIdx.x + i] = d[i];""",
    )
    rng = np.random.default_rng(1)
    a, b, d = (rng.integers(-4, 5, shape).astype(np.float32) for shape in ((16, k), (k, 8), (16, 8)))
    packed = 4 // np.dtype(dtype).itemsize
    fragments_a = np.empty((32, a_registers, packed), dtype)
    fragments_b = np.empty((32, b_registers, packed), dtype)
    fragments_d = np.empty((32, 4), np.float32)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i in range(a_registers):
            columns = t * packed + 4 * packed * (i // 2) + np.arange(packed)
            fragments_a[lane, i] = a[g + 8 * (i % 2), columns]
        for i in range(b_registers):
            fragments_b[lane, i] = b[t * packed + 4 * packed * i + np.arange(packed), g]
        fragments_d[lane] = d[[g, g, g + 8, g + 8], [2 * t, 2 * t + 1, 2 * t, 2 * t + 1]]
    y = fragments_d.copy()
    launch(body, (fragments_a.view(np.uint32).reshape(-1), fragments_b.view(np.uint32).reshape(-1), y))
    exact = d + a @ b
    for lane in range(32):
        g, t = divmod(lane, 4)
        np.testing.assert_array_equal(y[lane], exact[[g, g, g + 8, g + 8], [2 * t, 2 * t + 1, 2 * t, 2 * t + 1]])


def test_matrix_product_of_float64():
    body = kernel(
        "const double* a, const double* b, double* y",
        """double d[2] = {y[2 * threadIdx.x], y[2 * threadIdx.x + 1]};
        multiply_8x8x4(d, a[threadIdx.x], b[threadIdx.x % 4 * 8 + threadIdx.x / 4]);
        y[2 * threadIdx.x] = d[0];
        y[2 * threadIdx.x + 1] = d[1];""",
    )
    rng = np.random.default_rng(2)
    a, b, y = (rng.integers(-4, 5, shape).astype(float) for shape in ((8, 4), (4, 8), (8, 8)))
    exact = y + a @ b
    launch(body, (a, b, y))
    np.testing.assert_array_equal(y, exact)


RIGHT = {
    "some lanes shuffle while others wait at __syncwarp": (
        """const int lane = threadIdx.x % 32;
        int v = lane;
        if (lane >= 16) v = __shfl_xor_sync(0xffff0000u, lane, 1);
        __syncwarp();
        y[threadIdx.x] = v;""",
        [*range(16), *(i ^ 1 for i in range(16, 32))] + [*range(16), *(i ^ 1 for i in range(16, 32))][:16],
    ),
    "some lanes return and the others synchronise": (
        """y[threadIdx.x] = 7;
        if (threadIdx.x % 2) return;
        __shared__ int tile[48];
        tile[threadIdx.x] = threadIdx.x;
        __syncwarp();
        y[threadIdx.x] = tile[threadIdx.x ^ 2];""",
        [7 if i % 2 else i ^ 2 for i in range(48)],
    ),
    "a whole mask in a warp of 16": (
        """const int v = __shfl_xor_sync(~0u, int(threadIdx.x), 3);
        y[threadIdx.x] = v + 100 * __popc(__ballot_sync(~0u, 1));""",
        [(i ^ 3) + 100 * (32 if i < 32 else 16) for i in range(48)],
    ),
    "a warp's sum": (
        """int v = threadIdx.x < 32 ? 1 : 2;
        const unsigned lanes = threadIdx.x < 32 ? ~0u : 0xffffu;
        for (int d = 8; d; d /= 2) v += __shfl_xor_sync(lanes, v, d);
        y[threadIdx.x] = v;""",
        [16] * 32 + [32] * 16,
    ),
    "minus one": ("y[threadIdx.x] = -1;\n__syncthreads();\ny[threadIdx.x] = y[threadIdx.x] - 1;", [-2] * 48),
    "two stages in turns": (
        """__shared__ int stage[2][48];
        int sum = 0;
        stage[0][threadIdx.x] = threadIdx.x;
        for (int k = 0; k < 5; ++k) {
            __syncthreads();
            stage[(k + 1) % 2][threadIdx.x] = threadIdx.x + k + 1;
            sum += stage[k % 2][47 - threadIdx.x];
        }
        y[threadIdx.x] = sum;""",
        [5 * (47 - i) + 10 for i in range(48)],
    ),
}


@BOTH_MODES
@ORDERS
@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_raises_no_alarm(name, order, mode):
    body, expected = RIGHT[name]
    y = np.zeros(48, np.int32)
    launch(kernel("int* y", body), (y,), block=48, mode=mode, order=order)
    np.testing.assert_array_equal(y, expected)


def test_blocks_of_two_axes_and_grids_of_three():
    body = kernel(
        "int* y",
        """const int thread = threadIdx.x + blockDim.x * threadIdx.y;
        const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
        y[block * blockDim.x * blockDim.y + thread] = 1000 * block + 10 * threadIdx.y + threadIdx.x;""",
    )
    y = np.zeros(2 * 3 * 2 * 20, np.int32)
    launch(body, (y,), grid=(2, 3, 2), block=(5, 4, 1), mode="checked")
    expected = [1000 * b + 10 * j + i for b in range(12) for j in range(4) for i in range(5)]
    np.testing.assert_array_equal(y, expected)


# ------------------------------------------------------------------------------------------------- what it notices

X, Y = np.arange(1, 65, dtype=np.float32), 64

# name: parameters, body, the words of fast mode (None: it does not notice), and those of checked mode
WRONG = {
    "read past the end": (
        "const float* x, float* y",
        "y[threadIdx.x] = x[threadIdx.x + 33];",
        "memory fault: access 0 bytes past the end of x at planted.cu:2",
        "out of bounds: read of 4 bytes 0 bytes past the end of x of 256 bytes at planted.cu:2",
    ),
    "write before the start": (
        "float* y",
        "y[int(threadIdx.x) - 1] = 0;",
        "something was written next to y",
        "out of bounds: write of 4 bytes 4 bytes before y of 256 bytes at planted.cu:2",
    ),
    "write to what is only read": (
        "const float* x",
        "const_cast<float*>(x)[threadIdx.x] = 0;",
        "the read-only x was written to",
        "write of 4 bytes in the read-only x at planted.cu:2",
    ),
    "race of two threads": (
        "float* y",
        "y[threadIdx.x / 2] = threadIdx.x;",
        None,
        "race: write of y + 0 bytes and a write by thread 0 at planted.cu:2, here at planted.cu:2",
    ),
    "race through shared memory": (
        "float* y",
        "__shared__ float tile[64];\ntile[threadIdx.x] = 1;\ny[threadIdx.x] = tile[63 - threadIdx.x];",
        None,
        "which was never set at planted.cu:4",
    ),
    "sum without an atomic": (
        "float* y",
        "y[0] += 1;",
        None,
        "race: read of y + 0 bytes and a write by thread 0 at planted.cu:2",
    ),
    "warp without __syncwarp": (
        "float* y",
        "__shared__ float tile[64];\ntile[threadIdx.x] = 1;\n__shfl_sync(~0u, 1, 0);\n"
        "y[threadIdx.x] = tile[threadIdx.x ^ 1];",
        None,
        "at planted.cu:3, here at planted.cu:5",
    ),
    "shared memory that nobody set": (
        "float* y",
        "__shared__ float tile[64];\nif (threadIdx.x) tile[threadIdx.x] = 1;\n__syncthreads();\n"
        "y[threadIdx.x] = tile[0];",
        None,
        "read of shared tile + 0 bytes, which was never set at planted.cu:5",
    ),
    "past a shared array": (
        "float* y",
        "__shared__ float tile[64];\nfloat* p = tile;\np[threadIdx.x + 1] = 1;\ny[threadIdx.x] = 1;",
        None,
        "out of bounds: write of 4 bytes",
    ),
    "past the dynamic shared memory": (
        "float* y",
        "DYNAMIC_SHARED(float, tile);\ntile[threadIdx.x] = 1;\ny[threadIdx.x] = 1;",
        None,
        "out of bounds: write of 4 bytes at 64 in dynamic shared memory, which has 64 at planted.cu:3",
    ),
    "misaligned vector": (
        "const float* x, float* y",
        "const float4 v = *(const float4*)(x + 1);\nif (threadIdx.x == 0) y[0] = v.x;",
        None,
        "misaligned",
    ),
    "integer overflow": (
        "float* y",
        "int i = 1 << 30;\ni *= int(blockDim.x);\nif (threadIdx.x == 0) y[0] = i;",
        None,
        "undefined: integer overflow of * in planted.cu:3",
    ),
    "diverged barrier": (
        "float* y",
        "if (threadIdx.x < 32)\n__syncthreads();\nelse\n__syncthreads();\ny[threadIdx.x] = 1;",
        "diverged barrier: threads 0-31 wait in __syncthreads() at planted.cu:3; thread 32 waits in __syncthreads() at"
        " planted.cu:5",
        "diverged barrier: threads 0-31 wait in __syncthreads() at planted.cu:3",
    ),
    "barrier that some miss": (
        "float* y",
        "if (threadIdx.x == 5) return;\n__syncthreads();\ny[threadIdx.x] = 1;",
        "barrier after return: threads 0-4 wait in __syncthreads() at planted.cu:3; thread 5 has returned; threads 6-63"
        " wait in __syncthreads() at planted.cu:3",
        "barrier after return",
    ),
    "shuffle that some miss": (
        "float* y",
        "if (threadIdx.x != 3)\n__shfl_sync(~0u, 1, 0);\ny[threadIdx.x] = 1;",
        "deadlock: threads 0-2 wait in a shuffle at planted.cu:3; thread 3 has returned; threads 4-31 wait in a shuffle"
        " at planted.cu:3",
        "deadlock: threads 0-2 wait in a shuffle at planted.cu:3",
    ),
    "diverged warp": (
        "float* y",
        "if (threadIdx.x % 2)\n__shfl_sync(~0u, 1, 0);\nelse\n__ballot_sync(~0u, 1);\ny[threadIdx.x] = 1;",
        "diverged warp: this lane executes a shuffle while others execute a vote at planted.cu:3",
        "diverged warp: this lane executes a shuffle while others execute a vote at planted.cu:3",
    ),
    "barriers on one line": (
        "float* y",
        "if (threadIdx.x < 32) { __syncthreads(); } else { __syncthreads(); }\ny[threadIdx.x] = 1;",
        "diverged barrier",
        "diverged barrier",
    ),
    "division by zero": (
        "float* y",
        "y[threadIdx.x] = 7 / int(y[threadIdx.x]);",
        "integer division by zero at planted.cu:2",
        "undefined: division by zero, or its overflow in planted.cu:2",
    ),
    "more shared memory than there is": (
        "float* y",
        "__shared__ float tile[12288];\ntile[threadIdx.x] = 1;\ny[threadIdx.x] = tile[threadIdx.x];",
        "planted takes more than the 49152 bytes of shared memory that a block has",
        "planted takes more than the 49152 bytes of shared memory that a block has",
    ),
    "copy in flight": (
        "const float* x, float* y",
        COPY.format(wait="").replace("threadIdx.x < 20 ? 16 : 4", "16").replace("&x[4 * threadIdx.x]", "x"),
        "returned with asynchronous copies that nobody waited for",
        "while an asynchronous copy into it is under way",
    ),
}


def test_a_copy_that_came_early_by_luck_is_still_in_flight():
    body = kernel(
        "const float* x, float* y", COPY.format(wait="__syncthreads(); y[0] = tile[0]; copy_async_wait<0>();")
    )
    x, y = np.arange(1, 129, dtype=np.float32), np.zeros(32, np.float32)
    with pytest.raises(EmulationError, match="while an asynchronous copy into it is under way"):
        launch(body, (x, y), mode="checked", late_copies=False)


@BOTH_MODES
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_with_its_line(name, mode):
    parameters, body, *words = WRONG[name]
    words = words[mode == "checked"]
    y = np.zeros(Y, np.float32)
    arguments = [X.copy() if "x" in declared else y for declared in parameters.split(",")]
    block = 32 if "past the end" in name or "flight" in name else 64
    shared_memory = 64 if mode == "checked" else 256
    if words is None:
        launch(kernel(parameters, body), arguments, block=block, shared_memory=shared_memory)
        return
    with pytest.raises(EmulationError) as caught:
        launch(
            kernel(parameters, body), arguments, block=block, mode=mode, shared_memory=64 if "dynamic" in name else 256
        )
    assert words in str(caught.value)


@BOTH_MODES
def test_blocks_that_write_one_element_race(mode):
    body = kernel("float* y", "y[threadIdx.x] = blockIdx.x;")
    y = np.zeros(32, np.float32)
    if mode == "fast":
        launch(body, (y,), grid=2)
        return
    with pytest.raises(EmulationError, match=r"a write by thread 0 of another block at planted\.cu:2"):
        launch(body, (y,), grid=2, mode=mode)


def test_unset_memory_of_the_host_is_noticed():
    body = kernel("const float* x, float* y", "y[threadIdx.x] = x[threadIdx.x];")
    x = launcher.EMULATED.xp.empty(32, np.float32)
    assert np.isnan(x).all()
    y = np.zeros(32, np.float32)
    launch(body, (x, y))
    assert np.isnan(y).all()
    with pytest.raises(EmulationError, match=r"read of x \+ 0 bytes, which was never set at planted.cu:2"):
        launch(body, (x, y), mode="checked")
    x[:-1] = 0  # one number of the last four
    fours = kernel(
        "const float* x, float* y", "const float4 v = ((const float4*)x)[threadIdx.x % 8];\ny[threadIdx.x] = v.x;"
    )
    with pytest.raises(EmulationError, match=r"read of x \+ 112 bytes, which was never set at planted.cu:2"):
        launch(fours, (x, y), mode="checked")


@BOTH_MODES
@pytest.mark.parametrize("loop", ["while (*(volatile float*)y == 0) {}", "while (y[1] == 0) __syncthreads();"])
def test_a_kernel_that_does_not_end_is_stopped(loop, mode):
    with pytest.raises(EmulationError, match="takes longer than its time limit"):
        launch(kernel("float* y", loop), (np.zeros(32, np.float32),), mode=mode, seconds=0.2)


def test_a_stack_that_overflows_is_named():
    body = kernel("float* y", "volatile float big[60000];\nbig[threadIdx.x] = 1;\ny[threadIdx.x] = big[threadIdx.x];")
    with pytest.raises(EmulationError, match="stack overflow"):
        launch(body, (np.zeros(32, np.float32),))


def test_the_next_launch_is_sound_after_a_fault():
    wrong = kernel("const float* x, float* y", "y[threadIdx.x] = x[threadIdx.x + 64];")
    right = kernel("const float* x, float* y", "y[threadIdx.x] = x[threadIdx.x];")
    y = np.zeros(32, np.float32)
    for _ in range(3):
        with pytest.raises(EmulationError):
            launch(wrong, (X, y))
        launch(right, (X, y))
        np.testing.assert_array_equal(y, X[:32])
        y[...] = 0


def test_a_kernel_that_does_not_compile_shows_the_compiler_s_words():
    with pytest.raises(RuntimeError, match=r"planted.cu:2.*undeclared|undeclared.*planted.cu:2|planted.cu:2"):
        library(kernel("float* y", "y[0] = undeclared;"), "fast")


def test_a_library_is_built_once_for_all_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("GPUCONV_CACHE_DIR", str(tmp_path))
    body = kernel("float* y", "y[threadIdx.x] = 42;")
    text = (loader.FOLDER / "primitives.hpp").read_text() + body
    first = Library(text, "fast")
    built = first.path.stat().st_mtime_ns
    assert Library(text, "fast").path.stat().st_mtime_ns == built
    assert Library(text, "checked").path != first.path
    assert sorted(path.suffix for path in (tmp_path / "emulation").iterdir()) == [".so", ".so"]


def test_a_library_is_found_through_a_link(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.setenv("GPUCONV_CACHE_DIR", str(tmp_path / "link"))
    y = np.zeros(32, np.float32)
    body = kernel("float* y", "y[threadIdx.x] = 43;")
    launcher.run(Library((loader.FOLDER / "primitives.hpp").read_text() + body, "fast"), "planted", 1, 32, (y,))
    assert (y == 43).all()


def test_threads_launch_one_after_the_other():
    body = kernel("float* y", "for (int i = 0; i < 100; ++i) { __syncthreads(); y[threadIdx.x] += 1; }")
    compiled = library(body, "fast")
    results = [np.zeros(256, np.float32) for _ in range(8)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda y: launcher.run(compiled, "planted", 1, 256, (y,)), results))
    assert all((y == 100).all() for y in results)


def test_machines_that_cannot_run_kernels_are_told_why(monkeypatch):
    monkeypatch.setattr(loader.platform, "machine", lambda: "aarch64")
    assert loader.why_not() == "kernels run on the CPU of x86-64 Linux only, and this is aarch64 linux"
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "")
    assert loader.why_not() == "running kernels on the CPU needs g++, which is not installed"
