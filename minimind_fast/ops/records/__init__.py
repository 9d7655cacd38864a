"""The records: one file per op, which holds its reference, its work, its cases and where it is timed.

Imports torch, the model's config and the modules of `ops` that say what a record is; never a kernel, never a model.
`registry.load` lists this folder: to add an op, add its file here and its kernel in `kernels/`.
"""
