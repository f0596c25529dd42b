"""The cost of memory accesses: the profile counts correctly, and the shipped kernels do not exceed stated costs."""

import functools
import itertools
import re

import numpy as np
import pytest

from gpuconv.gpu import kernels_folder
from tests import profile
from tests.emulation.planted import kernel, launch

pytestmark = pytest.mark.emulated

# The body of a kernel of one warp, and its requests: (memory, kind, bytes per lane), cost and least cost.
COSTS = {
    "neighbours": ("tile[lane] = x[lane];", {("global", "read", 4): (4, 4), ("shared", "write", 4): (1, 1)}),
    "one for all": ("y[lane] = x[7];", {("global", "read", 4): (1, 1), ("global", "write", 4): (4, 4)}),
    "every other word": ("tile[2 * lane] = 1;", {("shared", "write", 4): (2, 1)}),
    "columns": ("tile[32 * lane] = 1;", {("shared", "write", 4): (32, 1)}),
    "padded columns": ("tile[33 * lane] = 1;", {("shared", "write", 4): (1, 1)}),
    "one word for all": ("y[lane] = tile[5];", {("shared", "read", 4): (1, 1), ("global", "write", 4): (4, 4)}),
    "every eighth number": ("y[lane] = x[8 * lane];", {("global", "read", 4): (32, 4), ("global", "write", 4): (4, 4)}),
    "past the start of a sector": (
        "tile[lane] = x[lane + 1];",
        {("global", "read", 4): (5, 4), ("shared", "write", 4): (1, 1)},
    ),
    "half a warp": ("if (lane < 16) tile[2 * lane] = 1;", {("shared", "write", 4): (1, 1)}),
    "vectors": (
        "((float4*)tile)[lane] = ((const float4*)x)[lane];",
        {("global", "read", 16): (16, 16), ("shared", "write", 16): (4, 4)},
    ),
    "vectors apart": ("((float4*)tile)[2 * lane] = float4{};", {("shared", "write", 16): (8, 4)}),
    "doubles": ("((double*)tile)[lane] = 1;", {("shared", "write", 8): (2, 2)}),
    "four at once": ("atomic_add(y + 4 * lane, make_float4(1, 1, 1, 1));", {("global", "atomic", 16): (16, 16)}),
    "one by one": ("for (int i = 0; i < 2; ++i) tile[lane + 32 * i] = 1;", {("shared", "write", 4): (1, 1)}),
    "rows of matrices": (
        "unsigned r[4];\nload_matrices(r, &tile[8 * lane]);",  # eight rows of 16 bytes, 32 bytes apart
        {("shared", "read", 16): (8, 4)},
    ),
    "swizzled rows of matrices": (
        "unsigned r[4];\nload_matrices(r, &tile[8 * lane + (lane / 4 & 1) * 4]);",
        {("shared", "read", 16): (4, 4)},
    ),
    "asynchronous copies": (
        "copy_async<16>(&tile[4 * lane], &x[4 * lane]);\ncopy_async_commit();\ncopy_async_wait<0>();",
        {("global", "read", 16): (16, 16), ("shared", "write", 16): (4, 4)},
    ),
}


SETUP = """__shared__ __align__(128) float tile[1088];
const int lane = threadIdx.x;
for (int i = lane; i < 1088; i += 32) tile[i] = 0;
__syncthreads();
"""
ALL = kernel(
    "const float* x, float* y, int which",
    SETUP + "\n".join(f"if (which == {i}) {{\n{body}\n}}" for i, (body, _) in enumerate(COSTS.values())),
)


@pytest.mark.parametrize("name", COSTS)
def test_requests_cost_what_the_hardware_s_rules_say(name):
    x, y = (aligned(1024) for _ in range(2))
    which = np.int32(list(COSTS).index(name))
    launched = launch(ALL, (x, y, which), mode="checked", profiled=True)
    found = {}
    for access in launched.accesses:
        if int(access.line.split(":")[1]) > SETUP.count("\n") + 1:
            key = access.memory, access.kind, access.width
            assert key not in found
            assert access.requests in (1, 2)
            found[key] = access.cost / access.requests, access.least / access.requests
    assert found == COSTS[name][1]


def aligned(count):
    """Return zeros that begin at a sector of global memory, as all arrays of a GPU do."""
    memory = np.zeros(count + 32, np.float32)
    first = -memory.ctypes.data % 128 // 4
    return memory[first : first + count]


# Lines with bank conflicts in shared memory: the maximal ratio of wavefronts to those without conflicts, and the
# reason. All other lines have no conflicts.
HALVES = "four numbers of 8 bytes are read as two vectors, 32 bytes apart, so lanes use every other 16 bytes"
CONFLICTS = {
    "float32": {
        "ROWS> a = ": (2, "the padding of x_tile is for those who write its columns: they would meet"),
        "COUNT> numbers = *to": (4, "a thread's outputs, or rows, are neighbours, so that the inner loop reads"
                                            " them as one vector; this is once for each tap, or each block"),
        "*to = numbers": (4, "as above"),
        "const int row = region_row": (2, "as above"),
        "seen = seen && inside": (1.3, "lanes that have left the loop over the axes early count as if they had not"),
        "x_tile[k][j] = seen": (2, "channels_last, one filter: x_tile has rows of 16, so a warp writes two of them"),
    },
    "float64": {
        "ROWS> a = ": (2, HALVES),
        "Numbers<Sum, COLUMNS> b = ": (2, HALVES),
        "Numbers<T, COUNT> sums = ": (2, HALVES),
        "COUNT> numbers = *to": (8, HALVES + "; and as for float32"),
        "*to = numbers": (8, "as above"),
        "const int row = region_row": (2, "as for float32"),
        "seen = seen && inside": (1.3, "as for float32"),
        "x_tile[k][j] = seen": (2, "rows begin 8 banks apart, and 16 lanes write 8 of them"),
        "dy_tile[k][f] =": (2, "as above"),
        "dy_tile[f][j] =": (2, "as above"),
    },
}  # fmt: skip


TILED = ("scatter_data_grad", "scatter_weight_grad")
ALL_TILES = ("several boxes in a row", "depthwise", "3x3", "many channels")
BOTH_LAYOUTS = ("channels_first", "channels_last")
accesses = functools.cache(profile.accesses)


@pytest.mark.parametrize("layout", BOTH_LAYOUTS)
@pytest.mark.parametrize("dtype", CONFLICTS)
@pytest.mark.parametrize("case", ALL_TILES)
@pytest.mark.parametrize("kernel_name", TILED)
def test_shared_memory_has_no_bank_conflicts_but_those_stated(kernel_name, case, dtype, layout):
    found = accesses(kernel_name, case, dtype, layout)
    shared = {where: counts for where, counts in found.items() if where[1] == "shared"}
    assert len(shared) > 10
    for (line, _, _), (_, cost, least) in shared.items():
        text = source_line(line)
        stated = [most for words, (most, _) in CONFLICTS[dtype].items() if words in text]
        assert cost <= (stated[0] if stated else 1) * least, f"{line}: {text}: {cost} wavefronts, {least} are needed"


@pytest.mark.parametrize("dtype", CONFLICTS)
def test_every_conflict_that_is_stated_exists(dtype):
    """Otherwise its reason is obsolete."""
    found = [
        (source_line(line), cost > least)
        for run in itertools.product(TILED, ALL_TILES, [dtype], BOTH_LAYOUTS)
        for (line, memory, _), (_, cost, least) in accesses(*run).items()
        if memory == "shared"
    ]
    for words in CONFLICTS[dtype]:
        assert any(words in text and has_conflicts for text, has_conflicts in found), words


# The ratio of the sectors that reads of inner loops touch to those that their bytes fill; windows of x overlap and are
# divided by rows.
SECTORS = {
    ("scatter_data_grad", "dy_tile[f][j] =", "channels_first"): 2,
    ("scatter_data_grad", "dy_tile[f][j] =", "channels_last"): 2,
    ("scatter_weight_grad", "dy_tile[k][f] =", "channels_first"): 2,
    ("scatter_weight_grad", "dy_tile[k][f] =", "channels_last"): 2,
    ("scatter_weight_grad", "x_tile[k][j] =", "channels_first"): 4,
    ("scatter_weight_grad", "x_tile[k][j] =", "channels_last"): 2,
}


@pytest.mark.parametrize("kernel_name, words, layout", SECTORS)
def test_inner_loops_walk_along_global_memory(kernel_name, words, layout):
    found = profile.accesses(kernel_name, "several boxes", "float32", layout)
    (costs,) = (
        (cost, least)
        for (line, memory, _), (_, cost, least) in found.items()
        if memory == "global" and words in source_line(line)
    )
    cost, least = costs
    assert cost <= SECTORS[kernel_name, words, layout] * least


def source_line(where):
    file, number = re.fullmatch(r"([\w.]+):(\d+)", where).groups()
    return (kernels_folder() / file).read_text().splitlines()[int(number) - 1]


def test_the_program_prints_costs_beside_the_source(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["profile", "direct_forward", "3x3", "--dtype", "float16"])
    profile.main()
    printed = capsys.readouterr().out
    assert "add_product(sum, x[x_tap + c * x_at.channel], w[w_tap + c * w_at.channel]);" in printed
    assert re.search(r"[\d,]+ global read +\d+\.\d sectors +\(\d+\.\d\)", printed)


@pytest.mark.parametrize(
    "kernel_name, expected",
    [
        ("direct_forward", ("direct", "forward")),
        ("direct_weight_grad", ("direct", "weight_grad")),
        ("scatter_data_grad_plain", ("scatter_plain", "data_grad")),
    ],
)
def test_a_kernel_s_name_says_who_launches_it(kernel_name, expected):
    assert profile.algorithm_of(kernel_name) == expected
    assert kernel_name in profile.KERNELS
