"""Copied into the build: every Python process of a command starts with this."""

from tests.cupy_on_cpu import install

install.install()
