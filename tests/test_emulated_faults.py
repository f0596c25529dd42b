"""The emulator reports the errors of a kernel with their location, and reports none for a correct kernel."""

import numpy as np
import pytest

from tests.emulation import launcher
from tests.emulation.loader import EmulationError
from tests.emulation.planted import COPY, kernel, launch

pytestmark = pytest.mark.emulated

BOTH_MODES = pytest.mark.parametrize("mode", ["fast", "checked"])
ORDERS = pytest.mark.parametrize("order", launcher.ORDERS)


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


X, Y = np.arange(1, 65, dtype=np.float32), 64

# name: parameters, body, words of the report in fast mode (None: not detected), and in checked mode
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
        "__shared__ float tile[12289];\ntile[threadIdx.x] = 1;\ny[threadIdx.x] = tile[threadIdx.x];",
        "planted takes more than the 49152 bytes of shared memory that a kernel declares",
        "planted takes more than the 49152 bytes of shared memory that a kernel declares",
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
    x[:-1] = 0  # only one of the last four numbers is set
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
