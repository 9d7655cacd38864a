"""What is proven and counted: the error rule and its cases, memory, rooflines.

May import everything; only commands, tests and benchmarks call it.
"""
