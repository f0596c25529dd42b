"""Compilation of kernels of the package from texts other than those in kernels/."""

import contextlib
import re
from unittest import mock

from gpuconv.gpu import kernel, kernels_folder
from tests.emulation import loader


@contextlib.contextmanager
def edited(file, text):
    """Enter a context in which a file of kernels has this text."""
    read = kernel._read
    with mock.patch.object(kernel, "_read", lambda name: text if name == file else read(name)):
        _forget()
        try:
            yield
        finally:
            _forget()


def _forget():
    for remembered in (kernel.source, kernel.parameters, loader.library_for):
        remembered.cache_clear()


def body_of(text, name):
    """Return the start and the end of a kernel in the text of its file, from its name to the next kernel."""
    start = re.search(rf"\b{name}\(", text).start()
    following = text.find("__global__", start)
    return start, len(text) if following < 0 else following


def replaced(file, name, right, wrong):
    """Return the text of a file with one change in one kernel."""
    text = (kernels_folder() / file).read_text()
    start, end = body_of(text, name)
    body = text[start:end]
    assert body.count(right) == 1, f"{name} has {body.count(right)} times {right!r}"
    return text[:start] + body.replace(right, wrong) + text[end:]
