"""The error rule: when a result counts as correct.

Purpose: one rule for tests, benchmarks and `minimind-fast verify`.
Principle: truth is the reference in float64. For an output and for each gradient
        |kernel - truth| <= |eager at the same dtype - truth| + tol.
    By element: no error may exceed eager's worst one, plus one unit in the last place of the element's own value, plus the
    float32 noise of a sum over values of the tensor's size (eager's error at the same element would be a matter of luck).
    By norm: 1.25 times eager's error, plus the noise.
    A float32 output of 16-bit inputs carries their roundings: its unit in the last place is that of the inputs.
    Where few values make up an output, one draw of the inputs is a matter of luck too (eager may happen to be exact):
    a small output that breaks the rule is judged once more, over many draws taken as one tensor.
Properties: integers must be equal; inf and nan are right where eager or truth has them. Kernels run in memory poisoned
    with NaN, so unwritten elements show.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# A few roundings of a float32 sum, relative to the tensor's largest value.
FLOAT32_NOISE = 16 * torch.finfo(torch.float32).eps
NORM_FACTOR = 1.25
# Draws that judge a small output together, and how many elements are small. The count is not that of independent
# errors: a weight's gradient from one token is an outer product of two short vectors.
POOLED_DRAWS, SMALL_OUTPUT = 16, 1 << 15

Triple = tuple[Tensor, Tensor, Tensor]  # the kernel's result, eager's and the truth


@dataclass
class Comparison:
    """A result checked by the error rule."""

    passed: bool
    reason: str = ""  # how it broke the rule
    max_error: float = 0.0  # largest |kernel - truth|
    eager_max_error: float = 0.0
    norm_error: float = 0.0  # ||kernel - truth|| / ||truth||
    eager_norm_error: float = 0.0
    elements: int = 0  # of the tensor, where a report needs a case's size


def compare(
    kernel: Tensor,
    eager: Tensor,
    truth: Tensor,
    norm_factor: float | None = None,
    inputs: torch.dtype | None = None,
) -> Comparison:
    """Compare a kernel's result with truth, bounded by eager's error at the same dtype.

    Args:
        kernel: the kernel's result, any shape, any dtype.
        eager: the reference's result at the same dtype.
        truth: the reference's result in float64, same shape. Integers must be equal.
        norm_factor: apply only the norm rule, with this factor (for whole models, where element errors have many causes).
        inputs: the op's inputs, where they are coarser than the result: their precision is allowed to each element.

    Source: cut-cross-entropy (error against high-precision truth, bounded by eager's own).
    """
    if not kernel.shape == eager.shape == truth.shape:
        return Comparison(False, f"shapes differ: {kernel.shape} {eager.shape} {truth.shape}")
    if kernel.dtype != eager.dtype:
        return Comparison(False, f"kernel gives {kernel.dtype}, eager {eager.dtype}")
    if kernel.numel() == 0:
        return Comparison(True)
    if not kernel.is_floating_point():
        wrong = int((kernel != truth).sum())
        return Comparison(not wrong, f"{wrong} of {kernel.numel()} integers differ" if wrong else "", wrong)
    finfo = torch.finfo(kernel.dtype)
    rounded_truth = truth.detach().to(kernel.dtype).double().flatten()
    kernel, eager, truth = (t.detach().double().flatten() for t in (kernel, eager, truth))
    if not (kernel.isfinite().all() and eager.isfinite().all()):
        # Where eager gives inf or nan, the kernel may do the same, element for element, or give the right value.
        same = (kernel == eager) | (kernel.isnan() & eager.isnan())
        right = (kernel == rounded_truth) | (kernel.isnan() & rounded_truth.isnan())
        rest = eager.isfinite() | ~(same | right)
        kernel, eager, truth = kernel[rest], eager[rest], truth[rest]
        if kernel.numel() == 0:
            return Comparison(True)
        if bad := int((~kernel.isfinite()).sum()):
            return Comparison(False, f"{bad} elements are inf or nan, and not as eager's are")
        # Where eager overflows and the kernel does not, eager's error is no bound.
        eager = eager.where(eager.isfinite(), truth)
    scale, size = truth.abs().max(), truth.norm()
    error, allowed = (kernel - truth).abs(), (eager - truth).abs()
    tiny = finfo.smallest_normal * finfo.eps
    eps = max(finfo.eps, torch.finfo(inputs).eps if inputs else 0.0)
    tol = eps * truth.abs() + FLOAT32_NOISE * scale + tiny
    excess = error - allowed.max() - tol
    result = Comparison(
        True,
        max_error=error.max().item(),
        eager_max_error=allowed.max().item(),
        norm_error=(error.norm() / size.clamp(min=tiny)).item(),
        eager_norm_error=(allowed.norm() / size.clamp(min=tiny)).item(),
    )
    if (excess > 0).any() and norm_factor is None:
        worst = excess.argmax()
        result.passed = False
        result.reason = (
            f"{int((excess > 0).sum())} of {error.numel()} elements break the error rule; the worst is "
            f"{kernel[worst]:.8g}, truth {truth[worst]:.8g}, eager {eager[worst]:.8g}, tolerance {tol[worst]:.3g} "
            f"plus eager's worst {allowed.max():.3g}"
        )
        return result
    noise = FLOAT32_NOISE * size + tiny * error.numel() ** 0.5
    if error.norm() > (norm_factor or NORM_FACTOR) * allowed.norm() + noise:
        result.passed = False
        result.reason = f"error norm {error.norm():.4g}, eager's {allowed.norm():.4g}, truth's {size:.4g}"
    return result


def judge(draw: Callable[[int], Mapping[str, Triple]], inputs: torch.dtype) -> dict[str, Comparison]:
    """Judge an op by its first draw; what is small and breaks the rule, by all draws together.

    Args:
        draw: number of a draw -> the kernel's result, eager's and the truth, for each output and each gradient.
        inputs: dtype of the inputs.
    """
    first = draw(0)
    found = {key: compare(*results, inputs=inputs) for key, results in first.items()}
    doubtful = [key for key, result in found.items() if not result.passed and _may_be_luck(*first[key])]
    if doubtful:
        draws = [first, *(draw(i) for i in range(1, POOLED_DRAWS))]
        for key in doubtful:
            kernel, eager, truth = (torch.cat([results[key][i].flatten() for results in draws]) for i in range(3))
            found[key] = compare(kernel, eager, truth, inputs=inputs)
            found[key].reason = found[key].reason and f"over {POOLED_DRAWS} draws, {found[key].reason}"
    for key, result in found.items():
        result.elements = first[key][2].numel()
    return found


def _may_be_luck(kernel: Tensor, eager: Tensor, truth: Tensor) -> bool:
    """Whether roundings of one draw may have broken the rule: no integers, and no nan of the kernel's own."""
    same_kind = kernel.shape == eager.shape == truth.shape and kernel.dtype == eager.dtype
    own_nan = kernel.isnan() & ~eager.isnan() if same_kind else None
    return own_nan is not None and kernel.is_floating_point() and kernel.numel() <= SMALL_OUTPUT and not own_nan.any()


@contextlib.contextmanager
def poisoned_memory(device: str | torch.device = "cpu") -> Iterator[None]:
    """Fill every uninitialised tensor with NaN (integers: the largest value), so unwritten elements show.

    Args:
        device: device on which to check that the poison works.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill_before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[assignment]
    try:
        if not torch.empty(3, device=device).isnan().all():
            raise RuntimeError("this PyTorch does not fill empty tensors with NaN: unwritten elements would go unseen")
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill_before  # type: ignore[assignment]
