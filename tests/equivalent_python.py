"""Mutants of the Python that change nothing that a caller could see, each with the reason: for mutate_python.py."""

EQUIVALENT = {}
