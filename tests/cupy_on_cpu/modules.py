"""The functions of the driver that need the source or the symbols of compiled kernels."""

import _thread
import ctypes
import functools
import os
import tempfile
import traceback
from pathlib import Path

from gpuconv.gpu.compiler import elf_size
from tests.cupy_on_cpu import loaded
from tests.emulation import loader

ELF = b"\x7fELF"  # the first bytes of a file of this format
SUCCESS, INVALID_IMAGE, FILE_NOT_FOUND, NOT_FOUND, UNKNOWN = 0, 200, 301, 500, 999


class _Function(ctypes.Structure):
    _fields_ = (
        ("library", ctypes.c_void_p),
        ("entry", ctypes.c_void_p),
        ("parameters", ctypes.c_void_p),
        ("static_memory", ctypes.c_size_t),
        ("name", ctypes.c_char * 256),
    )


_LOAD_FILE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p))
_LOAD_DATA = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))
_FIND = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(_Function))
_LOCATE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_char), ctypes.c_size_t)


class _Hooks(ctypes.Structure):
    _fields_ = (
        ("load_file", _LOAD_FILE),
        ("load_data", _LOAD_DATA),
        ("find", _FIND),
        ("locate", _LOCATE),
        ("run", ctypes.c_void_p),
        ("report", ctypes.c_void_p),
    )


def _reported(function):
    """Return a function that prints an exception, which its caller would lose, and returns an error of the driver."""

    @functools.wraps(function)
    def called(*arguments):
        try:
            return function(*arguments)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                _thread.interrupt_main()
            traceback.print_exc()
            return UNKNOWN

    return called


def install(driver):
    """Make the replacement of the driver load modules by this module."""
    libraries, by_handle = [None], {}  # the handle of a module is its index
    folder = tempfile.TemporaryDirectory(prefix="gpuconv-modules-")

    def add(image, module):
        if not image.startswith(ELF) or len(image) < elf_size(image):
            return INVALID_IMAGE
        path = Path(folder.name) / f"{os.getpid()}_{len(libraries)}.so"  # forked processes share the folder
        path.write_bytes(image)
        try:
            library = loader.Library(path, "checked" if b"__tsan_init" in image else "fast")
        except OSError:
            return INVALID_IMAGE
        libraries.append(library)
        by_handle[library.handle.value] = library
        module[0] = len(libraries) - 1
        return SUCCESS

    @_reported
    def load_file(path, module):
        try:
            image = Path(path.decode()).read_bytes()
        except OSError:
            return FILE_NOT_FOUND
        loaded.note(image, "gpuconv")
        return add(image, module)

    @_reported
    def load_data(address, module):
        header = ctypes.string_at(address, 64)
        if not header.startswith(ELF):
            return INVALID_IMAGE
        image = ctypes.string_at(address, elf_size(header))
        loaded.note(image, "CuPy")
        return add(image, module)

    @_reported
    def find(module, name, function):
        library, name = libraries[module], name.decode()
        if name not in library.names:
            return NOT_FOUND
        entry, parameters = library.kernel(name)
        function[0].library, function[0].entry = library.handle, entry
        function[0].parameters = ctypes.cast(parameters, ctypes.c_void_p)
        function[0].static_memory = library.static_memory(name)
        return SUCCESS

    def locate(handle, reports, located, size):
        text = by_handle[handle].located(reports.decode()).encode()[: size - 1]
        ctypes.memmove(located, text + b"\0", len(text) + 1)

    emulator = (
        ctypes.cast(getattr(loader.runtime(), f"emulated_{name}"), ctypes.c_void_p) for name in ("run", "report")
    )
    hooks = _Hooks(_LOAD_FILE(load_file), _LOAD_DATA(load_data), _FIND(find), _LOCATE(locate), *emulator)
    driver.emulated_hooks(ctypes.byref(hooks))
    return hooks  # must be referenced as long as it may be called
