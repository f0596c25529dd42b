"""Count the compiled modules that a command loads, as many as NVRTC compiles with empty caches."""

import hashlib
import os
from pathlib import Path

FOLDER = "GPUCONV_LOADED_KERNELS"  # a folder with one file per module
MOST = 300  # modules of gpuconv that a run of the tests on a GPU may load


def note(image, name):
    """Count a module, once for all processes of a command; ``name`` is "gpuconv" or "CuPy"."""
    (Path(os.environ[FOLDER]) / f"{name} {hashlib.sha256(image).hexdigest()}").touch()


def counts():
    """Return the numbers of modules of gpuconv and of CuPy."""
    names = [path.name.partition(" ")[0] for path in Path(os.environ[FOLDER]).iterdir()]
    return {name: names.count(name) for name in ("gpuconv", "CuPy")}
