"""Modules with the function names of existing programs: only an import changes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator


@contextlib.contextmanager
def named(**names: str) -> Iterator[None]:
    """A context in which error messages call arguments by the caller's names."""
    try:
        yield
    except (TypeError, ValueError) as error:
        message = re.sub(r"\b(" + "|".join(names) + r")\b", lambda match: names[match[0]], str(error))
        raise type(error)(message) from None
