"""Every op in plain PyTorch, by name: `reference.rms_norm` is the reference of the record `rms_norm`.

Purpose: one namespace for tests, and for reading what an op means.
Principle: filled from the records, which hold the functions.
Properties: no kernels, no state. In float64 the same functions are the ground truth of the error rule (`proof/rule.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from minimind_fast.config import IGNORE_INDEX
from minimind_fast.ops import registry
from minimind_fast.ops.numbers import accum_dtype
from minimind_fast.ops.routing import Routing

__all__ = ["IGNORE_INDEX", "Routing", "accum_dtype"]

globals().update({name: op.reference for name, op in registry.load().items()})

if TYPE_CHECKING:

    def __getattr__(name: str) -> Callable: ...
