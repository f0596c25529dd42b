"""Algorithms that consist of CUDA kernels, one file each, and the road from their sources to a launch.

implicit_gemm   gemm_layout.py: matrices in arrays; gemm_tiles.py, gemm_table.py: the choice of tiles
direct, scatter, scatter_plain
params.py, structs.py          arguments of kernels
kernel.py, compiler.py, cache.py, launch.py    source, NVRTC, compiled kernels on disk, launch
cublas.py       matrix products of the algorithms of gpuconv/cpu
device.py, occupancy.py, report.py             devices, blocks for each multiprocessor, ``gpuconv kernels``
"""

from __future__ import annotations

from pathlib import Path


def kernels_folder() -> Path:
    """The folder of the ``.cu`` files: in the package in a wheel, beside it in a checkout or an editable install."""
    package = Path(__file__).parents[1]
    for folder in (package / "kernels", package.parent / "kernels"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"gpuconv's kernels are neither in {package} nor beside it: the installation is incomplete")
