"""Modules with the function names of programs that exist, for one changed import."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator


@contextlib.contextmanager
def named(**names: str) -> Iterator[None]:
    """Errors that call arguments what the caller calls them."""
    try:
        yield
    except (TypeError, ValueError) as error:
        message = re.sub(r"\b(" + "|".join(names) + r")\b", lambda match: names[match[0]], str(error))
        raise type(error)(message) from None
