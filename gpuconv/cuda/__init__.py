"""The CUDA side: kernels' sources, their compilation, the cache of what was compiled, and the launch."""

from __future__ import annotations

from pathlib import Path


def kernels_folder() -> Path:
    """The folder of the ``.cu`` files: in the package in a wheel, beside it in a checkout or an editable install."""
    package = Path(__file__).parents[1]
    for folder in (package / "kernels", package.parent / "kernels"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"gpuconv's kernels are neither in {package} nor beside it: the installation is incomplete")
