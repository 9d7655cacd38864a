"""`pytest benchmarks/`: every op, layer and step beside eager PyTorch, torch.compile and other kernels.

A test is a row of the report; `tables.py` makes the report, `goals.py` compares it with the project's goals.
"""
