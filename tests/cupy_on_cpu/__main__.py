"""Build CuPy for the CPU, or run a command with it; see the docstring of the package."""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpuconv import settings
from gpuconv.backends import driver_devices
from tests.cupy_on_cpu import build, loaded

ROOT = Path(__file__).parents[2]


def environment(folder, mode):
    """Return the environment of a command, with separate caches, since compiled kernels would not run on a GPU."""
    emulation, caches = settings.cache_folder() / "emulation", build.caches(folder, mode)
    emulation.mkdir(parents=True, exist_ok=True)
    (caches / "gpuconv").mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (caches / "gpuconv" / "emulation").symlink_to(emulation.resolve())
    return {
        **os.environ,
        build.FOLDER: str(folder),
        "PYTHONPATH": os.pathsep.join([str(folder / "site"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "LD_LIBRARY_PATH": os.pathsep.join([str(folder / "lib"), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "GPUCONV_KERNELS_ON_CPU": mode,
        "GPUCONV_CACHE_DIR": str(caches / "gpuconv"),
        "CUPY_CACHE_DIR": str(caches / "cupy"),
        "CUPY_ACCELERATORS": "",
        "CUDA_PATH": str(folder / "headers"),
    }


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.cupy_on_cpu", description=__doc__)
    parser.add_argument("--cupy", metavar="VERSION", help="another CuPy than the one that is installed")
    parser.add_argument("--checked", action="store_true", help="gpuconv's kernels with every access checked")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run; nothing: build only")
    given = parser.parse_args()
    if driver_devices():
        sys.exit("the driver reports a CUDA device: CuPy computes on it, and nothing is emulated")
    start = time.monotonic()
    try:
        folder = build.made(given.cupy or build.version_at_hand())
    except build.BuildError as error:
        sys.exit(str(error))
    if not given.command:
        print(f"{folder} ({time.monotonic() - start:.0f} s)")
        return
    variables = environment(folder, "checked" if given.checked else "fast")
    with tempfile.TemporaryDirectory() as kernels:
        try:
            sys.exit(subprocess.call(given.command, env={**variables, loaded.FOLDER: kernels}))
        except FileNotFoundError:
            sys.exit(f"there is no command {given.command[0]}")


if __name__ == "__main__":
    main()
