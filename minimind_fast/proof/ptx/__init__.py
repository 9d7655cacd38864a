"""Compiled kernels executed without a GPU: the PTX that Triton makes for a card, run on CPU tensors with numpy.

Here lie the parser of PTX, the threads of a launch as numpy lanes, the two memories with their checks, and the place
where Triton's launches are taken over. What an instruction does stands in `instructions`. numpy and Triton only; the
report of `minimind-fast verify --device ptx:sm_90` calls it.
"""
