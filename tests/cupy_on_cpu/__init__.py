"""CuPy on a machine without a GPU: the wheel, with replacements of NVIDIA's libraries that run its kernels on the CPU.

    python -m tests.cupy_on_cpu                           builds it, if it is not built yet
    python -m tests.cupy_on_cpu pytest -m gpu             runs a command for which CuPy has an emulated GPU
    python -m tests.cupy_on_cpu --cupy 14.1.1 pytest ...  the same with another CuPy

build.py        makes the build, a folder of the cache: the wheel, two of its modules recompiled, and libraries/
install.py      gives the build precedence in ``import cupy``, in every process of the command
compiler.py     NVRTC: compiles sources to libraries by the compiler of tests/emulation
modules.py      the functions of the driver that load compiled kernels
replaced.py     replacements of modules of CuPy that are linked with NVIDIA's runtime
loaded.py       counts the kernels that would be compiled on a GPU
small.py        runs programs of the GPU campaign with tiny layers
libraries/      libcudart, libcuda, libnvrtc, libcublas, libcufft, libcurand, libcusparse, as NVIDIA documents them

Device memory is host memory between guard pages; kernels run in the emulator of tests/emulation with its checks. Speed,
the limits of ptxas, inline PTX and the numerical results of NVIDIA's libraries are not emulated.
"""
