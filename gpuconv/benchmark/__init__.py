"""What the command line runs: real layers, a float64 reference, timing, tables and plots."""
