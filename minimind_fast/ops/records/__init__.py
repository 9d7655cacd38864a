"""The records: one file per op, with its reference, work, cases and timing.

Imports torch, the model's config and the modules of `ops` that define a record; never a kernel, never a model.
`registry.load` lists this folder: to add an op, add its file here and its kernel in `kernels/`.
"""
