"""Modules with the function names of programs that exist, for one changed import."""
