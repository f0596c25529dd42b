"""Algorithms that consist of functions of an array module, one file each; they run on NumPy and on CuPy.

An algorithm has five functions: ``why_not`` returns the reason why it cannot compute a request, ``nanoseconds``
estimates its time on NumPy, and ``forward``, ``data_grad`` and ``weight_grad`` describe their steps to a planner
(gpuconv/plan.py) on canonical views (gpuconv/operands.py).

im2col          windows.py, unfold.py: windows as matrices; residues.py: strides; col2im.py, lines.py: few channels
winograd        winograd_plan.py: tiles and blocks; winograd_tiles.py: its steps
fft, depthwise
slices          tap by tap: what scatter computes on NumPy
bias_grad       db
containment.py, finite.py    NaN and Inf in algorithms that mix neighbouring elements
cost_model.py   measured costs, from which the estimates of time are made
"""
