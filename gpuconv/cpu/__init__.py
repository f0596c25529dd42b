"""Algorithms that use only functions of an array module, one file each. They run on NumPy and on CuPy.

An algorithm has five functions: ``why_not`` returns the reason why it cannot compute a request, ``nanoseconds``
estimates its time on NumPy, and ``forward``, ``data_grad`` and ``weight_grad`` describe their steps to a planner
(gpuconv/plan.py) on canonical views (gpuconv/operands.py).

im2col          windows.py, unfold.py: im2col matrix; phases.py: stride phases; col2im.py, lines.py: few channels
winograd        winograd_plan.py: tiles and blocks; winograd_tiles.py: steps
fft
depthwise, direct    vector_plan.py, vector_kernels.py, vectors.py: kernels compiled by Numba (compiled.py)
banded          depthwise without Numba
slices          tap by tap; the scatter algorithm on NumPy
bias_grad       db
containment.py, finite.py    non-finite fallback of algorithms that mix neighbouring elements
cost_model.py   measured costs, on which the estimates of time are based
"""
