"""Benchmarks and checks of the command line: real layers, a float64 reference, timing, tables and plots."""
