"""Modules with the function names of other libraries, so that existing programs change only an import."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator


@contextlib.contextmanager
def named(**names: str) -> Iterator[None]:
    """Enter a context in which error messages use the caller's names of arguments."""
    try:
        yield
    except (TypeError, ValueError) as error:
        message = re.sub(r"\b(" + "|".join(names) + r")\b", lambda match: names[match[0]], str(error))
        raise type(error)(message) from None
