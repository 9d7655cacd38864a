"""A case of an op under watch, with its programs in a random order and in the given one.

Purpose: the sanitizer's verdict on one case.
Principle: findings of the watched run, and the outputs and gradients that differ in any bit from a plain run.
Properties: undefined lanes are poison in one run and zero in the other, so a result that depends on them differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from minimind_fast.ops.cases import Case
from minimind_fast.proof.cases import evaluate
from minimind_fast.proof.sanitizer.findings import Findings
from minimind_fast.proof.sanitizer.interpreter import watched
from minimind_fast.proof.sanitizer.shadow import Shadow


@dataclass
class Verdict:
    """What was found in one case."""

    findings: Findings
    differ: list[str]  # outputs and gradients that are not bitwise those of the given order
    launches: int
    programs: int
    accesses: int

    @property
    def clean(self) -> bool:
        return not self.findings and not self.differ

    def __str__(self) -> str:
        return "\n".join([*map(str, self.findings.values()), *(f"{key}: differs by order" for key in self.differ)])


def examine(case: Case, function: Callable, dtype: torch.dtype, seed: int = 0) -> Verdict:
    """Run a case's forward and backward under watch.

    Args:
        case: arguments of the call.
        function: the kernel.
        dtype: float32 or float16; the interpreter is wrong in bfloat16.
        seed: of the order of programs.
    """
    watcher = Shadow(seed)
    with watched(watcher):
        ours = evaluate(case, function, dtype, "cpu", poison=True)
    differ = []
    if not watcher.findings:  # what writes past the end of its memory must not run unwatched
        plain = evaluate(case, function, dtype, "cpu", poison=True)
        differ = [key for key in plain if not _same_bits(ours[key], plain[key])]
    return Verdict(watcher.findings, differ, watcher.launches, watcher.programs, watcher.accesses)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.contiguous().flatten().view(torch.uint8).equal(b.contiguous().flatten().view(torch.uint8))
