"""Triton kernels, one op a file; imported as `minimind_fast.kernels.<op>`, and only by `minimind_fast.ops`."""
