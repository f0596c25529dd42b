"""The emulator: the results of its instructions, and how libraries are built."""

import concurrent.futures

import numpy as np
import pytest

from gpuconv.gpu import kernels_folder
from tests.emulation import launcher, loader
from tests.emulation.loader import library_of
from tests.emulation.planted import COPY, kernel, launch, library

pytestmark = pytest.mark.emulated

BOTH_MODES = pytest.mark.parametrize("mode", ["fast", "checked"])
ORDERS = pytest.mark.parametrize("order", launcher.ORDERS)


@pytest.mark.parametrize("mode", loader.MODES)
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
    """The function for sm_75 is taken from primitives.cuh."""
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


# Row and column of element e of each operand's fragment in lane 4 g + t, as described by PTX.
PRODUCTS = {
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


# ------------------------------------------------------------------------------------------------- libraries


def test_a_kernel_that_does_not_compile_shows_the_compiler_s_words():
    with pytest.raises(RuntimeError, match=r"planted.cu:2.*undeclared|undeclared.*planted.cu:2|planted.cu:2"):
        library(kernel("float* y", "y[0] = undeclared;"), "fast")


def test_a_library_is_built_once_for_all_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("GPUCONV_CACHE_DIR", str(tmp_path))
    body = kernel("float* y", "y[threadIdx.x] = 42;")
    text = (loader.FOLDER / "primitives.hpp").read_text() + body
    first = library_of(text, "fast")
    built = first.path.stat().st_mtime_ns
    assert library_of(text, "fast").path.stat().st_mtime_ns == built
    assert library_of(text, "checked").path != first.path
    assert len(list((tmp_path / "emulation").glob("*.so"))) == 2


def test_a_library_is_found_through_a_link(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.setenv("GPUCONV_CACHE_DIR", str(tmp_path / "link"))
    y = np.zeros(32, np.float32)
    body = kernel("float* y", "y[threadIdx.x] = 43;")
    launcher.run(library_of((loader.FOLDER / "primitives.hpp").read_text() + body, "fast"), "planted", 1, 32, (y,))
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
