"""`pytest benchmarks/`: every op, layer and step beside eager PyTorch, torch.compile and other people's kernels.

A test is a row of the report; `tables.py` makes the report, `goals.py` holds it against the project's goals.
"""
