"""Counts the compiled modules that a command loads: NVRTC compiles as many where nothing is cached."""

import hashlib
import os
from pathlib import Path

FOLDER = "GPUCONV_LOADED_KERNELS"  # has a file for each
MOST = 300  # of gpuconv that a run of the tests on a GPU loads


def note(image, name):
    """Counts a module, once in all processes of a command; ``name`` is "gpuconv" or "CuPy"."""
    (Path(os.environ[FOLDER]) / f"{name} {hashlib.sha256(image).hexdigest()}").touch()


def counts():
    """How many there are of gpuconv and of CuPy."""
    names = [path.name.partition(" ")[0] for path in Path(os.environ[FOLDER]).iterdir()]
    return {name: names.count(name) for name in ("gpuconv", "CuPy")}
