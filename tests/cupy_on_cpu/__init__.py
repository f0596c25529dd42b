"""CuPy's own wheel on a machine without a GPU: libraries of ours in the place of NVIDIA's run its kernels on the CPU.

    python -m tests.cupy_on_cpu                           builds it, once
    python -m tests.cupy_on_cpu pytest -m gpu             runs a command that finds a GPU with CuPy on it
    python -m tests.cupy_on_cpu --cupy 14.1.1 pytest ...  the same with another CuPy

build.py        makes the build, a folder of the cache: the wheel, two of its modules compiled anew, and libraries/
install.py      puts it in front of what ``import cupy`` would find, in every process of the command
compiler.py     NVRTC: sources to libraries, by the compiler of tests/emulation
modules.py      what a driver does with compiled kernels
replaced.py     modules of CuPy that NVIDIA's runtime is linked into
loaded.py       counts the kernels that a GPU would have compiled
small.py        programs of the GPU campaign with tiny layers
libraries/      libcudart, libcuda, libnvrtc, libcublas, libcufft, libcurand, libcusparse, as NVIDIA documents them

Device memory is memory of the CPU between pages that fault; kernels run in the emulator of tests/emulation with its
checks. It shows nothing of speed, of the limits of ptxas, of inline PTX, or of the numbers of NVIDIA's libraries.
"""
