"""The algorithms, one file each, with the same functions: why_not, forward, data_grad and weight_grad.

``why_not`` says whether the algorithm can do a convolution, and the reason where it cannot. The other three read
operands and write a result through canonical views (gpuconv/operands.py) and take memory from a Run
(gpuconv/workspace.py). blocks.py, windows.py and unfold.py hold what they share. im2col has files for what it does by
other means: residues.py for strides, col2im.py and lines.py for few channels. winograd has its plan and its steps in
files of their own.
"""
