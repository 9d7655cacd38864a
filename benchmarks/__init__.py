"""What measures: `suite/` (pytest), `studies/` (a program a question), `peers/` (what others do), `report.py`, `results/`.

May import anything of the package; only tests import it. From the repository's root: `python -m benchmarks.report`.
"""
