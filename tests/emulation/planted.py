"""Small kernels for the tests of the emulator: their source is in a test, and they run on the CPU."""

import functools

from tests.emulation import launcher, loader


@functools.cache
def library(body, mode):
    primitives = (loader.FOLDER / "primitives.hpp").read_text()
    return loader.library_of(f'#line 1 "primitives.hpp"\n{primitives}\n#line 1 "planted.cu"\n{body}', mode)


def launch(body, arguments, grid=1, block=32, mode="fast", shared_memory=0, **how):
    """Run the only kernel of a source and return the record of the launch."""
    compiled = library(body, mode)
    (name,) = loader.kernel_names(body)
    declared = body[body.index(name) :].partition("(")[2].partition(")")[0].split(",")
    names = [(one.split()[-1].strip("* "), one.strip().startswith("const")) for one in declared]
    with launcher.using(mode=mode, **{"order": "natural", **how}) as launches:
        launcher.run(compiled, name, grid, block, arguments, shared_memory, names)
    return launches[0]


def kernel(parameters, body):
    """Return the source of a kernel; its body begins in line 2."""
    return f'extern "C" __global__ void planted({parameters}) {{\n{body}\n}}'


# The body of a kernel that copies x into shared memory; {wait} is replaced by the statement that waits for the copies.
COPY = """__shared__ __align__(16) float tile[128];
        copy_async<16>(&tile[4 * threadIdx.x], &x[4 * threadIdx.x], threadIdx.x < 20 ? 16 : 4);
        copy_async_commit();
        {wait}
        __syncthreads();
        y[threadIdx.x] = tile[127 - threadIdx.x] + tile[threadIdx.x];"""
