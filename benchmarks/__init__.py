"""Benchmarks: `suite/` (pytest), `studies/` (one program per question), `peers/` (other implementations), `results/`.

May import anything in the package; only tests import it. Run from the repository's root: `python -m benchmarks.report`.
"""
