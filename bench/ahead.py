"""Compilation of modules for the current device in threads, before they are launched."""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor

from gpuconv.backends import cupy_backend
from gpuconv.gpu import cache, compiler


@contextlib.contextmanager
def compiling():
    """Enter a context with a function that submits a module for compilation and returns the future."""
    architecture = compiler.architecture_for(cupy_backend().xp.cuda.Device().compute_capability)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            yield lambda module: pool.submit(cache.cubin_path, module, architecture)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
