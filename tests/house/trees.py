"""Copies of this checkout, to change or to build."""

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = shutil.ignore_patterns(
    *(".git", ".venv", ".*_cache", ".hypothesis", ".benchmarks", "__pycache__", "*.egg-info", "build", "dist"),
    *("out", "runs", "wheels", "corpus", "golden", "node_modules"),
)


def copy(to: Path) -> Path:
    """This checkout without what git ignores, its links kept as links; the folder."""
    return Path(shutil.copytree(ROOT, to, symlinks=True, ignore=LEFT_OUT))


def environment(**more: str) -> dict[str, str]:
    """This process's, without what would lead Python to a package of ours or change how kernels run."""
    left_out = ("PYTHONPATH", "TRITON_INTERPRET", "MINIMIND_KERNELS", "PYTEST_ADDOPTS")
    return {name: value for name, value in os.environ.items() if name not in left_out} | more
