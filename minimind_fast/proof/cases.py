"""Each op on its cases, model-shaped and awkward, checked by the error rule.

Purpose: the table of cases that tests, benchmarks and `minimind-fast verify` share.
Principle: an op's record gives the models' calls and further cases; this module joins them into one list.
Properties: a kernel may not write to its inputs and runs in poisoned memory. Model-shaped cases are small enough for
    Triton's interpreter; `large_cases` fill a GPU.

Shapes: T tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from minimind_fast import ops
from minimind_fast.config import PRESETS
from minimind_fast.ops import precision
from minimind_fast.ops.cases import Case, Draw
from minimind_fast.ops.registry import Op
from minimind_fast.proof.rule import Comparison, compare, poisoned_memory

MODELS = tuple(name for name in PRESETS if name != "tiny")
LARGE_TOKENS = 8192


def _model_cases(op: Op, tokens: int, **sizes: int) -> list[Case]:
    """Every model's call, the last of them also strided; empty if no model calls the op."""
    cases = [op.preset_case(preset, tokens, training=False, **sizes) for preset in MODELS]
    found = [case for case in cases if case is not None]
    return [*found, *(replace(case, name=f"{case.name} strided", strided=True) for case in found[-1:])]


# op -> cases that run anywhere: the models' shapes with few tokens, and the awkward ones.
CASES: dict[str, list[Case]] = {
    name: [*_model_cases(op, op.small_tokens, **op.small), *op.cases] for name, op in ops.OPS.items()
}


def large_cases(name: str) -> list[Case]:
    """The models' shapes at a size that fills a GPU, and the large cases in the op's record."""
    op = ops.OPS[name]
    return [*_model_cases(op, LARGE_TOKENS + 3), *op.large_cases]


def evaluate(
    case: Case, function: Callable, dtype: torch.dtype, device: str, double: bool = False, poison: bool = False
) -> dict[str, Tensor]:
    """Run a case forward and backward.

    Args:
        case: arguments of the call.
        function: the kernel or the reference.
        dtype: inputs are drawn and rounded in this dtype.
        device: "cpu" or "cuda".
        double: then cast inputs to float64 (cosine tables keep their float32 values, as in training).
        poison: fill uninitialised memory with NaN.

    Returns:
        Outputs "out0", "out1", ... and gradients "d <argument>".

    Raises:
        RuntimeError: the op wrote to one of its inputs.
    """
    tensors: dict[str, Any] = case.tensors(Draw(dtype, device))
    if double:
        for key, tensor in tensors.items():
            if tensor is not None and tensor.is_floating_point():
                tensors[key] = tensor.double()
    if case.strided:
        for key, tensor in tensors.items():
            if tensor is not None and key not in case.fixed:
                tensors[key] = torch.stack([tensor, torch.ones_like(tensor)], 1).flatten(0, 1)[::2]
    kept = {k: t.clone() for k, t in tensors.items() if t is not None}
    leaves = [k for k in ops.OPS[case.op].differentiable if tensors[k] is not None]
    for key in leaves:
        tensors[key] = tensors[key].requires_grad_()
    with poisoned_memory(device) if poison else contextlib.nullcontext():
        outputs = case.call(function, tensors)
        draw = Draw(dtype, device, seed=1)
        grads = [draw.normal(*out.shape) if out.is_floating_point() else None for out in outputs]
        if case.strided:
            grads = [g if g is None or not g.dim() else g[:1].expand_as(g) for g in grads]
        if case.promised:  # scale by a factor that needs no rounding
            grads[0] = 0.5 * tensors[case.promised]
        pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
        found = torch.autograd.grad(
            [o for o, _ in pairs], [tensors[k] for k in leaves], [g for _, g in pairs], allow_unused=True
        )
    for key, before in kept.items():
        if not torch.equal(tensors[key].detach(), before):
            raise RuntimeError(f"{case.op} wrote to its input {key!r}")
    results = {f"out{i}": out.detach() for i, out in enumerate(outputs)}
    for key, grad in zip(leaves, found, strict=True):
        results[f"d {key}"] = torch.zeros_like(tensors[key]) if grad is None else grad
    return results


@precision.exact_matmuls()
def check(case: Case, function: Callable, dtype: torch.dtype, device: str) -> dict[str, Comparison]:
    """Check an implementation by the error rule on one case.

    Args:
        case: arguments of the call.
        function: the implementation, usually `ops.kernel(case.op)`.
        dtype: dtype of the inputs.
        device: "cpu" or "cuda".

    Returns:
        A Comparison for each output and each gradient.
    """
    plain = ops.OPS[case.op].reference
    truth = evaluate(case, plain, dtype, device, double=True)
    eager = evaluate(case, plain, dtype, device)
    try:
        ours = evaluate(case, function, dtype, device, poison=True)
    except Exception as error:  # the report continues with the next case
        elements = sum(t.numel() for t in truth.values())
        return {"run": Comparison(False, f"{type(error).__name__}: {error}", elements=elements)}
    found = {key: compare(ours[key], eager[key], truth[key]) for key in truth}
    for key, result in found.items():
        result.elements = truth[key].numel()
    return found
