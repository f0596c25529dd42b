"""Algorithms that consist of CUDA kernels, one file each, and the modules that compile and launch the kernels.

implicit_gemm   gemm_plan.py: what is launched; gemm_layout.py: memory layout of the matrices; gemm_tiles.py: tiles;
                gemm_choice.py, gemm_model.py, gemm_table.py: selection of a tile; gemm_packing.py: packed copies;
                gemm_windows.py: tables of windows
depthwise       depthwise_layer.py: boxes of thread blocks
direct, scatter, scatter_plain, bias_grad
split_sum.py    second pass of split-K
params.py, structs.py          kernel arguments
kernel.py, compiler.py, cache.py, launch.py    source, NVRTC, compiled kernels on disk, launch
cublas.py       matrix products of the algorithms of gpuconv/cpu
device.py, occupancy.py, report.py, sass.py    devices, blocks per multiprocessor, ``gpuconv kernels``
"""

from __future__ import annotations

from pathlib import Path


def kernels_folder() -> Path:
    """Return the folder of the ``.cu`` files: in the package (wheel) or beside it (checkout, editable install)."""
    package = Path(__file__).parents[1]
    for folder in (package / "kernels", package.parent / "kernels"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"the CUDA sources are neither in {package} nor beside it: the installation is incomplete")
