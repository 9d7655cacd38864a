"""Proof and accounting: the error rule and its cases, memory, rooflines.

May import everything; only commands, tests and benchmarks call it.
"""
