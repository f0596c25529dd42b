"""Print the cost of the memory accesses of a kernel next to its source: ``python -m tests.profile KERNEL CASE``.

KERNEL is a kernel's name, such as scatter_data_grad, and CASE the name of a convolution in tests/cases.py, such as
"many channels". The kernel runs on the CPU in checked mode. For each line the shared-memory wavefronts and the global
32-byte sectors of one request of a warp are printed, and in parentheses their number without bank conflicts, or for
contiguous bytes. This is a model, not a measurement (tests/emulation/profile.cpp).
"""

import argparse
import collections
from unittest import mock

from gpuconv.gpu import kernels_folder, scatter_plain
from gpuconv.select import MODULES
from tests.backends import arrays_of
from tests.cases import DIRECTIONS, DTYPES, LAYOUTS
from tests.emulation import launcher, loader
from tests.test_matrix import BY_NAME, computed

KERNELS = [name for path in sorted(kernels_folder().glob("*.cu")) for name in loader.kernel_names(path.read_text())]


def algorithm_of(kernel):
    """Return the algorithm and the direction of a kernel, from its name, such as scatter_weight_grad_plain."""
    direction = next(direction for direction in DIRECTIONS if direction in kernel)
    algorithm, _, rest = kernel.partition(f"_{direction}")
    return algorithm + ("_plain" if rest == "_plain" else ""), direction


def accesses(kernel, case, dtype="float32", layout="channels_first"):
    """Return the memory accesses of a kernel in a case: {(line, memory, kind): [requests, cost, least cost]}."""
    algorithm, direction = algorithm_of(kernel)
    with (
        arrays_of("emulated") as arrays,
        mock.patch.dict(MODULES, scatter_plain=scatter_plain),
        launcher.using(mode="checked", profiled=True, order="natural") as launches,
    ):
        computed(arrays, BY_NAME[case], algorithm, direction, dtype, layout, integers=True)
    sums = collections.defaultdict(lambda: [0, 0, 0])
    for launch in launches:
        if launch.name == kernel:
            for access in launch.accesses:
                entry = sums[access.line, access.memory, access.kind]
                for i, count in enumerate((access.requests, access.cost, access.least)):
                    entry[i] += count
    return dict(sums)


def table(kernel, found):
    """Return the lines of the kernel's file that access memory, with the cost."""
    notes = collections.defaultdict(list)
    for (line, memory, kind), (requests, cost, least) in found.items():
        file, number = line.split(":")
        unit = "wavefronts" if memory == "shared" else "sectors"
        notes[file, int(number)].append(
            f"{requests:8,} {memory} {kind:<6} {cost / requests:5.1f} {unit:<10} ({least / requests:.1f})"
        )
    lines = []
    for (file, number), entries in sorted(notes.items()):
        text = (kernels_folder() / file).read_text().splitlines()[number - 1].strip()
        lines += ["", f"{file}:{number}  {text}", *sorted(entries)]
    return "\n".join(lines[1:])


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.profile", description=__doc__.split("\n\n")[0])
    parser.add_argument("kernel", metavar="KERNEL", choices=KERNELS, help=", ".join(KERNELS))
    parser.add_argument(
        "case", metavar="CASE", choices=BY_NAME, help='a name in tests/cases.py, such as "many channels"'
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--layout", choices=LAYOUTS, default="channels_first")
    options = parser.parse_args()
    if loader.why_not():
        parser.error(loader.why_not())
    found = accesses(options.kernel, options.case, options.dtype, options.layout)
    print(f"{options.kernel}, {options.case}, {options.dtype}, {options.layout}")
    print("warps' requests, and what one of them costs (in brackets: at best)\n")
    print(table(options.kernel, found))


if __name__ == "__main__":
    main()
