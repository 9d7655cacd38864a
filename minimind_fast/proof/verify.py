"""The proof: every kernel against float64, beside eager's own error, on any machine.

Purpose: the table of cases that tests, benchmarks and `minimind-fast verify` share; the one error rule; the report.
Principle: truth is the reference in float64. For an output and for each gradient
        |kernel - truth| <= |eager at the same dtype - truth| + tol.
    By element: no element may be off by more than eager's worst element, plus one unit in the last place of its own
    value, plus the float32 noise of a sum over values of the tensor's size (which element eager happens to hit exactly
    is luck, and no measure). By norm: 1.25 times eager's error, plus the noise.
    Then whole models, cut in layers: log-probabilities and gradients with one kernel on, and with all, by the norm rule.
Properties: kernels run in memory poisoned with NaN, so that an element nobody wrote is seen, and may not write to
    their inputs. The report runs in processes of its own: several at a time, and on a CPU under Triton's interpreter
    (Triton decides at its import), there on small cases in float32 and float16: the interpreter is wrong in bfloat16.
    Cases are drawn on the CPU from a seed. Near ties between experts are decided by rounding, not by right and wrong:
    cases of the router hold no such tokens, and whole models are compared at the eager run's experts, with the number
    of choices that differed.

Shapes: T tokens, D hidden, F ffn, H query heads, K kv heads, hd head_dim, E experts, V vocab.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimind_fast import ops
from minimind_fast.config import PRESETS, YARN, ModelConfig
from minimind_fast.model import MiniMind, rope_tables
from minimind_fast.ops import reference

MODELS = tuple(name for name in PRESETS if name != "tiny")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# A few roundings of a float32 sum, relative to the tensor's largest value.
FLOAT32_NOISE = 16 * torch.finfo(torch.float32).eps
NORM_FACTOR = 1.25
# Tokens of a model-shaped case: what the interpreter manages in a second, and enough for every program of a GPU.
SMALL_TOKENS, LARGE_TOKENS = 20, 8192


# The error rule -------------------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """A result held to the error rule."""

    passed: bool
    reason: str = ""  # what broke the rule
    max_error: float = 0.0  # largest |kernel - truth|
    eager_max_error: float = 0.0
    norm_error: float = 0.0  # ||kernel - truth|| / ||truth||
    eager_norm_error: float = 0.0


def compare(kernel: Tensor, eager: Tensor, truth: Tensor, norm_factor: float | None = None) -> Comparison:
    """Hold a kernel's result to truth, with eager's own error at the same dtype as the measure.

    Args:
        kernel: the kernel's result, any shape, any dtype.
        eager: the reference's result at the same dtype.
        truth: the reference's result in float64, same shape. Integers must be equal.
        norm_factor: use the rule by norm alone, with this factor (whole models, where an element's error has no owner).

    Returns:
        Comparison.

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
        # Where eager overflows or meets inf and nan, the kernel may do the same, element for element, or know better.
        same = (kernel == eager) | (kernel.isnan() & eager.isnan())
        right = (kernel == rounded_truth) | (kernel.isnan() & rounded_truth.isnan())
        rest = eager.isfinite() | ~(same | right)
        kernel, eager, truth = kernel[rest], eager[rest], truth[rest]
        if kernel.numel() == 0:
            return Comparison(True)
        if bad := int((~kernel.isfinite()).sum()):
            return Comparison(False, f"{bad} elements are inf or nan, and not as eager's are")
        # Where eager overflows and the kernel does not, eager is no measure.
        eager = eager.where(eager.isfinite(), truth)
    scale, size = truth.abs().max(), truth.norm()
    error, allowed = (kernel - truth).abs(), (eager - truth).abs()
    tiny = finfo.smallest_normal * finfo.eps
    tol = finfo.eps * truth.abs() + FLOAT32_NOISE * scale + tiny
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


@contextlib.contextmanager
def poisoned_memory(device: str | torch.device = "cpu") -> Iterator[None]:
    """Fill every uninitialised tensor with NaN (integers: the largest), so that an element nobody wrote is seen.

    Args:
        device: where to check that the poison works.
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


# The cases ------------------------------------------------------------------------------------------------------------


class Draw:
    """Draws a case's tensors on the CPU from one seed, so that a case is the same on every machine."""

    def __init__(self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
        """N(mean, scale) values, rounded to the case's dtype or another."""
        values = torch.randn(shape, generator=self.generator) * scale + mean
        return values.to(dtype or self.dtype).to(self.device)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Integers of [low, high)."""
        return torch.randint(low, high, shape, generator=self.generator).to(dtype).to(self.device)

    def chance(self, share: float, *shape: int) -> Tensor:
        """bool, True with this probability."""
        return (torch.rand(shape, generator=self.generator) < share).to(self.device)


@dataclass(frozen=True)
class Case:
    """One call of one op."""

    op: str
    name: str
    tensors: Callable[[Draw], dict[str, Any]]  # by the op's argument names; None where an argument is absent
    options: dict[str, Any] = field(default_factory=dict)
    only: tuple[str, ...] = ()  # the dtypes that this case is for; all if empty
    strided: bool = False  # every other row of larger tensors, and one gradient expanded to all rows, as of a sum

    def call(self, function: Callable, tensors: dict[str, Any]) -> tuple[Tensor, ...]:
        """Call an implementation.

        Args:
            function: the kernel or the reference.
            tensors: of `tensors`, perhaps cast.

        Returns:
            The op's outputs as a tuple.
        """
        if self.op == "moe_mlp":
            tensors = dict(tensors)
            parts = {name: tensors.pop(name) for name in ("weights", "experts", "counts", "order", "inverse")}
            routing = reference.Routing(**parts, aux_loss=parts["weights"].sum(), scores=parts["weights"])
            out = function(tensors["x"], routing, tensors["gate_up"], tensors["down"])
        else:
            if function is reference.linear_cross_entropy:  # gradients in the forward are the kernel's affair
                tensors = {key: value for key, value in tensors.items() if key != "grad_weights"}
            out = function(**tensors, **self.options)
        return (out,) if isinstance(out, Tensor) else tuple(out)


# The arguments that gradients go to.
DIFFERENTIABLE = {
    "rms_norm": ("x", "weight", "residual"),
    "rope": ("qkv", "q_weight", "k_weight"),
    "swiglu": ("gate_up",),
    "linear_cross_entropy": ("hidden", "weight"),
    "linear_kl": ("student_hidden", "student_weight"),
    "moe_route": ("x", "gate_weight"),
    "moe_mlp": ("x", "weights", "gate_up", "down"),
}


def _rms_norm(name, shape, eps=1e-5, cast_first=False, residual=True, scale=1.0, only=()) -> Case:
    def tensors(draw: Draw) -> dict[str, Any]:
        out = {"x": draw.normal(*shape, scale=scale), "weight": draw.normal(shape[-1], scale=0.2, mean=1.0)}
        return {**out, "residual": draw.normal(*shape, scale=scale) if residual else None}

    return Case("rms_norm", name, tensors, {"eps": eps, "cast_first": cast_first}, only)


def _rope(name, tokens, heads, kv_heads, head_dim, qk_norm, eps=1e-6, config=None, scale=1.0) -> Case:
    config = config or ModelConfig(
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=2048
    )

    def tensors(draw: Draw) -> dict[str, Any]:
        cos, sin = (table.to(draw.device) for table in rope_tables(config, 2048))
        qkv = draw.normal(tokens, (heads + 2 * kv_heads) * head_dim, scale=scale)
        norms = [draw.normal(head_dim, scale=0.2, mean=1.0) if qk_norm else None for _ in "qk"]
        return {
            "qkv": qkv,
            "cos": cos,
            "sin": sin,
            "positions": draw.integers(0, 2048, tokens),
            "q_weight": norms[0],
            "k_weight": norms[1],
        }

    return Case("rope", name, tensors, {"num_heads": heads, "num_kv_heads": kv_heads, "eps": eps})


def _swiglu(name, shape, scale=1.0, only=()) -> Case:
    return Case("swiglu", name, lambda draw: {"gate_up": draw.normal(*shape, scale=scale)}, only=only)


def _targets(draw: Draw, vocab: int, tokens: int, ignored: float) -> Tensor:
    targets = draw.integers(0, vocab, tokens)
    return targets.masked_fill(draw.chance(ignored, tokens), reference.IGNORE_INDEX)


def _linear_cross_entropy(name, tokens, hidden, vocab, ignored=0.2, scale=1.0, weighted=False, **options) -> Case:
    def tensors(draw: Draw) -> dict[str, Any]:
        out = {
            "hidden": draw.normal(tokens, hidden),
            "weight": draw.normal(vocab, hidden, scale=scale * hidden**-0.5),
            "targets": _targets(draw, vocab, tokens, ignored),
        }
        return {**out, "grad_weights": draw.normal(tokens, dtype=torch.float32)} if weighted else out

    return Case("linear_cross_entropy", name, tensors, options)


def _linear_kl(name, tokens, hidden, vocab, teacher_hidden, teacher_vocab, masked=True, scale=1.0, **options) -> Case:
    def tensors(draw: Draw) -> dict[str, Any]:
        return {
            "student_hidden": draw.normal(tokens, hidden),
            "student_weight": draw.normal(vocab, hidden, scale=scale * hidden**-0.5),
            "teacher_hidden": draw.normal(tokens, teacher_hidden),
            "teacher_weight": draw.normal(teacher_vocab, teacher_hidden, scale=scale * teacher_hidden**-0.5),
            "mask": draw.chance(0.8, tokens) if masked else None,
        }

    return Case("linear_kl", name, tensors, options)


def _moe_route(name, tokens, hidden, experts, top_k, normalize, documents=0, padded=False) -> Case:
    def tensors(draw: Draw) -> dict[str, Any]:
        gate = draw.normal(experts, hidden, scale=3 * hidden**-0.5)
        x = draw.normal(tokens, hidden)
        if tokens and type(x) is Tensor:  # not where the compiler looks at shapes only
            x = _without_near_ties(x, gate, top_k)
        cu = None
        if documents:
            cu = torch.arange(documents + 1) * tokens // documents
            cu = cu.to(torch.int32).to(draw.device)
        valid = draw.chance(0.8, tokens) if padded else None
        return {"x": x, "gate_weight": gate, "cu_seqlens": cu, "valid": valid}

    return Case("moe_route", name, tensors, {"top_k": top_k, "normalize": normalize})


def _without_near_ties(x: Tensor, gate: Tensor, top_k: int) -> Tensor:
    """Put a clear token in the place of each whose order of experts hangs on rounding."""
    logits = (x.double() @ gate.double().t()).sort(-1, descending=True).values
    gap = (logits[:, :-1] - logits[:, 1:])[:, :top_k]
    clear = gap.min(-1).values > 0.1 if gap.numel() else x.new_ones(x.shape[0], dtype=torch.bool)
    best = x[gap.min(-1).values.argmax()] if gap.numel() else x[0]
    return torch.where(clear[:, None], x, best)


def _moe_mlp(name, tokens, hidden, ffn, experts, top_k, skew=0.0, scale=1.0) -> Case:
    def tensors(draw: Draw) -> dict[str, Any]:
        liking = torch.rand(tokens, experts, generator=draw.generator)
        liking[:, 1:] -= skew  # 1: every token's first choice is expert 0
        chosen = liking.topk(top_k, -1).indices
        weights = torch.rand(tokens, top_k, generator=draw.generator) + 0.1
        weights = weights / weights.sum(-1, keepdim=True) if top_k > 1 else weights
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        inverse = order.argsort()
        counts = (flat[:, None] == torch.arange(experts)).sum(0)
        plan = {"experts": chosen, "counts": counts, "order": order, "inverse": inverse}
        return {
            "x": draw.normal(tokens, hidden),
            "weights": weights.to(draw.device),
            **{key: value.to(torch.int32).to(draw.device) for key, value in plan.items()},
            "gate_up": draw.normal(experts, 2 * ffn, hidden, scale=scale * hidden**-0.5),
            "down": draw.normal(experts, hidden, ffn, scale=scale * ffn**-0.5),
        }

    return Case("moe_mlp", name, tensors)


def preset_case(
    op: str, preset: str, tokens: int, vocab: int | None = None, width: int | None = None, weighted: bool = False
) -> Case | None:
    """An op as a model of MiniMind's calls it in training.

    Args:
        op: one of ops.NAMES.
        preset: one of MODELS.
        tokens: T.
        vocab: the model's own if None; less for the interpreter.
        width: ffn size; the model's own if None.
        weighted: linear_cross_entropy is given its grad_weights, as by the stages that predict the next token.

    Returns:
        The case; None where the model does not call the op.
    """
    c = ModelConfig.preset(preset)
    assert c.rms_norm_eps and c.head_dim and c.intermediate_size and c.moe_intermediate_size and c.num_experts_per_tok
    vocab, d = vocab or c.vocab_size, c.hidden_size
    width = width or (c.moe_intermediate_size if c.use_moe else c.intermediate_size)
    name = f"{preset} T={tokens}"
    if op == "rms_norm":
        return _rms_norm(name, (tokens, d), c.rms_norm_eps, bool(c.norm_cast_first))
    if op == "rope":
        heads = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        return _rope(name, tokens, *heads, c.qk_norm, c.rms_norm_eps, ModelConfig.preset(preset))
    if op == "swiglu":
        # A mixture's own SwiGLU is inside moe_mlp; the op runs in its shared expert, if it has one.
        return _swiglu(name, (tokens, 2 * width)) if not c.use_moe or c.num_shared_experts else None
    if op == "linear_cross_entropy":
        return _linear_cross_entropy(name, tokens, d, vocab, weighted=weighted)
    if op == "linear_kl":
        return _linear_kl(name, tokens, d, vocab, 768, vocab)
    if not c.use_moe:
        return None
    if op == "moe_route":
        documents = min(tokens, 4) if c.aux_loss_per_sequence else 0
        return _moe_route(name, tokens, d, c.num_experts, c.num_experts_per_tok, c.norm_topk_prob, documents)
    if op == "moe_mlp":
        return _moe_mlp(name, tokens, d, width, c.num_experts, c.num_experts_per_tok)
    raise ValueError(f"unknown op {op!r}; choose of {', '.join(ops.NAMES)}")


def _preset_cases(op: str, tokens: int = SMALL_TOKENS, **sizes: Any) -> list[Case]:
    cases = [preset_case(op, preset, tokens, **sizes) for preset in MODELS]
    found = [case for case in cases if case is not None]
    return [*found, replace(found[-1], name=f"{found[-1].name} strided", strided=True)]


# op -> its cases that run anywhere: the models' shapes, few tokens, and the awkward ones.
CASES: dict[str, list[Case]] = {
    "rms_norm": [
        *_preset_cases("rms_norm"),
        _rms_norm("no residual", (5, 64), residual=False),
        _rms_norm("no residual, cast first", (2, 3, 96), residual=False, cast_first=True),
        _rms_norm("one row", (1, 512)),
        _rms_norm("no rows", (0, 128)),
        _rms_norm("one column", (7, 1)),
        _rms_norm("odd width", (3, 5, 333), cast_first=True),
        _rms_norm("wide", (3, 2050)),
        _rms_norm("huge values", (4, 100), scale=100.0),
        _rms_norm("squares past fp16", (4, 100), scale=2000.0),
        _rms_norm("values near eps", (4, 100), scale=1e-3),
        _rms_norm("zeros", (4, 100), scale=0.0),
    ],
    "rope": [
        *_preset_cases("rope"),
        _rope("q/k norm, head_dim 64", 9, 8, 2, 64, True),
        _rope("one head", 5, 1, 1, 32, False),
        _rope("as many kv heads as heads", 6, 4, 4, 16, True),
        _rope("odd head_dim half", 7, 3, 1, 10, True),
        _rope("odd head_dim half, no norm", 7, 5, 5, 6, False),
        _rope("head_dim 128", 3, 4, 2, 128, True),
        _rope("one token", 1, 8, 4, 96, True),
        _rope("no tokens", 0, 8, 4, 96, True),
        _rope("huge values", 4, 2, 1, 64, True, scale=500.0),
        _rope("tiny values", 4, 2, 1, 64, True, scale=1e-3),
        _rope(
            "yarn",
            8,
            2,
            1,
            64,
            False,
            config=ModelConfig(
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=64,
                rope_scaling=dict(YARN),
            ),
        ),
    ],  # fmt: skip
    "swiglu": [
        *_preset_cases("swiglu"),
        _swiglu("odd width", (2, 3, 2 * 333)),
        _swiglu("one column", (17, 2)),
        _swiglu("one row", (1, 2 * 64)),
        _swiglu("no rows", (0, 2 * 64)),
        _swiglu("huge values", (5, 2 * 96), scale=30.0),
        _swiglu("saturated", (5, 2 * 96), scale=1000.0, only=("float32", "bfloat16")),
        _swiglu("tiny values", (5, 2 * 96), scale=1e-3),
    ],
    "linear_cross_entropy": [
        *_preset_cases("linear_cross_entropy", vocab=640),
        _linear_cross_entropy("temperature", 19, 64, 300, temperature=0.7),
        _linear_cross_entropy("entropy", 19, 64, 300, temperature=1.3, return_entropy=True),
        _linear_cross_entropy("gradients in the forward", 19, 64, 300, weighted=True, temperature=0.7),
        _linear_cross_entropy("gradients there, all ignored", 8, 32, 100, ignored=1.1, weighted=True),
        _linear_cross_entropy("vocabulary of a prime", 9, 48, 1009),
        _linear_cross_entropy("small vocabulary", 9, 32, 3),
        _linear_cross_entropy("all ignored", 8, 32, 100, ignored=1.1),
        _linear_cross_entropy("none ignored", 8, 32, 100, ignored=-1.0),
        _linear_cross_entropy("one token", 1, 64, 200),
        _linear_cross_entropy("no tokens", 0, 64, 200),
        _linear_cross_entropy("sharp", 16, 64, 200, scale=20.0),
        _linear_cross_entropy("flat", 16, 64, 200, scale=1e-3),
    ],
    "linear_kl": [
        *_preset_cases("linear_kl", vocab=640),
        _linear_kl("reverse", 11, 48, 300, 64, 300, reverse=True),
        _linear_kl("temperature, wider teacher", 11, 48, 300, 96, 320, temperature=2.0),
        _linear_kl("reverse, temperature, no mask", 11, 48, 301, 32, 301, masked=False, reverse=True, temperature=0.7),
        _linear_kl("one token", 1, 32, 100, 32, 100),
        _linear_kl("no tokens", 0, 32, 100, 32, 100),
        _linear_kl("sharp", 9, 64, 200, 64, 200, scale=8.0),
    ],
    "moe_route": [
        *_preset_cases("moe_route"),
        _moe_route("odd sizes", 37, 50, 5, 3, True),
        _moe_route("many experts", 40, 64, 64, 6, True),
        _moe_route("documents and padding", 50, 64, 4, 2, True, documents=3, padded=True),
        _moe_route("padding", 50, 64, 4, 1, False, padded=True),
        _moe_route("all experts", 9, 32, 4, 4, True),
        _moe_route("one token", 1, 32, 4, 2, True),
        _moe_route("no tokens", 0, 32, 4, 2, True),
    ],
    "moe_mlp": [
        *_preset_cases("moe_mlp", tokens=24, width=128),
        _moe_mlp("odd sizes", 37, 50, 34, 3, 2),
        _moe_mlp("one expert has all", 40, 64, 64, 4, 1, skew=1.0),
        _moe_mlp("one expert has half", 40, 64, 64, 4, 2, skew=1.0),
        _moe_mlp("many experts, few tokens", 5, 32, 32, 16, 2),
        _moe_mlp("one token", 1, 64, 64, 4, 2),
        _moe_mlp("no tokens", 0, 64, 64, 4, 2),
    ],
}


def large_cases(op: str) -> list[Case]:
    """The models' shapes at a size that fills a GPU, whole vocabularies and widths.

    Args:
        op: one of ops.NAMES.

    Returns:
        One case for each model that calls the op, and one with a vocabulary of Qwen's size for the head.
    """
    cases = _preset_cases(op, LARGE_TOKENS + 3)
    if op == "linear_cross_entropy":
        cases.append(_linear_cross_entropy("vocabulary of 151936", 515, 768, 151936))
    return cases


# One op ---------------------------------------------------------------------------------------------------------------


def evaluate(
    case: Case, function: Callable, dtype: torch.dtype, device: str, double: bool = False, poison: bool = False
) -> dict[str, Tensor]:
    """Run a case forward and backward.

    Args:
        case: what to call.
        function: the kernel or the reference.
        dtype: the inputs are drawn and rounded at this dtype.
        device: "cpu" or "cuda".
        double: then cast to float64 (tables of cosines stay as they are in training: float32 values).
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
            if tensor is not None and key not in ("experts", "counts", "order", "inverse"):  # a plan is moe_route's own
                tensors[key] = torch.stack([tensor, torch.ones_like(tensor)], 1).flatten(0, 1)[::2]
    kept = {k: t.clone() for k, t in tensors.items() if t is not None}
    leaves = [k for k in DIFFERENTIABLE[case.op] if tensors[k] is not None]
    for key in leaves:
        tensors[key] = tensors[key].requires_grad_()
    with poisoned_memory(device) if poison else contextlib.nullcontext():
        outputs = case.call(function, tensors)
        draw = Draw(dtype, device, seed=1)
        grads = [draw.normal(*out.shape) if out.is_floating_point() else None for out in outputs]
        if case.strided:
            grads = [g if g is None or not g.dim() else g[:1].expand_as(g) for g in grads]
        if "grad_weights" in tensors:  # the promise that this argument makes, with a factor that costs no rounding
            grads[0] = 0.5 * tensors["grad_weights"]
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


def check(case: Case, function: Callable, dtype: torch.dtype, device: str) -> dict[str, Comparison]:
    """Hold an implementation to the error rule in one case.

    Args:
        case: what to call.
        function: the implementation, usually `ops.kernel(case.op)`.
        dtype: of the inputs.
        device: "cpu" or "cuda".

    Returns:
        A Comparison for each output and each gradient.
    """
    plain = getattr(reference, case.op)
    truth = evaluate(case, plain, dtype, device, double=True)
    eager = evaluate(case, plain, dtype, device)
    try:
        ours = evaluate(case, function, dtype, device, poison=True)
    except Exception as error:  # a report goes on to the next case
        return {"run": Comparison(False, f"{type(error).__name__}: {error}")}
    return {key: compare(ours[key], eager[key], truth[key]) for key in truth}


# Whole models ---------------------------------------------------------------------------------------------------------


def _cut_model(preset: str, on_gpu: bool, dtype: torch.dtype, device: str) -> tuple[MiniMind, dict[str, Any]]:
    """Two layers of a model and a packed batch; vocabulary, ffn and batch small where the interpreter runs."""
    sizes = {} if on_gpu else {"vocab_size": 320, "intermediate_size": 128}
    config = ModelConfig.preset(preset, num_hidden_layers=2, max_position_embeddings=2048, **sizes)
    lengths = [700, 1, 1300, 47] if on_gpu else [7, 1, 6]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MiniMind(config).to(device, dtype).train()
    draw = Draw(dtype, device)
    tokens = sum(lengths)
    batch = {
        "input_ids": draw.integers(0, config.vocab_size, tokens),
        "targets": _targets(draw, config.vocab_size, tokens, 0.2),
        "cu_seqlens": torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32),
        "max_seqlen": max(lengths),
    }
    return model, batch


class _SameExperts:
    """Records the experts of a run, then holds later runs to them, and counts the choices that differed."""

    def __init__(self) -> None:
        self.recorded: list[Tensor] = []
        self.recording, self.at, self.differed = True, 0, 0
        self._real = ops.moe_route

    def __enter__(self) -> _SameExperts:
        ops.moe_route = self._route
        return self

    def __exit__(self, *_: object) -> None:
        ops.moe_route = self._real

    def replay(self) -> None:
        """From now on hold runs to the record; call before each."""
        self.recording, self.at, self.differed = False, 0, 0

    def _route(self, x, gate_weight, top_k, normalize, cu_seqlens=None, valid=None):
        routing = self._real(x, gate_weight, top_k, normalize, cu_seqlens, valid)
        if self.recording:
            self.recorded.append(routing.experts)
            return routing
        experts = self.recorded[self.at]
        self.at += 1
        differed = int((experts != routing.experts).sum())
        self.differed += differed
        if not differed:
            return routing
        weights = routing.scores.gather(1, experts.long())
        if normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        order = experts.flatten().argsort(stable=True)
        counts = experts.flatten().bincount(minlength=gate_weight.shape[0]).int()
        plan = {"experts": experts, "counts": counts, "order": order.int(), "inverse": order.argsort().int()}
        return reference.Routing(weights=weights, **plan, aux_loss=routing.aux_loss, scores=routing.scores)


def check_model(preset: str, dtype: torch.dtype, device: str, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Compare a cut model with kernels on against off: each op alone, then all.

    Args:
        preset: one of MODELS.
        dtype: of the parameters.
        device: "cpu" (under the interpreter) or "cuda".
        names: ops to switch on.

    Yields:
        Rows for the report.
    """
    model, batch = _cut_model(preset, device == "cuda", dtype, device)
    wide = _cut_model(preset, device == "cuda", dtype, device)[0].double()
    called = [name for name in names if preset_case(name, preset, 1) is not None and name != "linear_kl"]

    def run(net: MiniMind, kernels: str) -> tuple[Tensor, Tensor]:
        net.zero_grad(set_to_none=True)
        with ops.use(kernels):
            out = net(**batch)
            loss = -out.logprobs.sum() / (batch["targets"] != reference.IGNORE_INDEX).sum() + out.aux_loss
            loss.backward()
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        return out.logprobs.detach(), torch.cat([g.detach().flatten() for g in grads])

    with _SameExperts() as experts:
        off = run(model, "none")
        experts.replay()
        truth = run(wide, "none")
        counted = int((batch["targets"] != reference.IGNORE_INDEX).sum())
        for kernels in [*called, ",".join(called)] if len(called) > 1 else called:
            experts.replay()
            on = run(model, kernels)
            # The norm of n random errors is itself random, within 1 / sqrt(n): wide for a few dozen tokens.
            rows = {
                key: compare(a, b, c, norm_factor=NORM_FACTOR + 3 * a.numel() ** -0.5)
                for key, a, b, c in zip(("logprobs", "gradients"), on, off, truth, strict=True)
            }
            yield {
                "op": kernels if kernels in called else "all",
                "case": f"model {preset}",
                "results": rows,
                "loss_difference": ((on[0] - off[0]).double().sum() / counted).abs().item(),
                "gradient_difference": ((on[1] - off[1]).double().norm() / off[1].double().norm()).item(),
                "expert_choices_that_differed": experts.differed,
            }


# The report -----------------------------------------------------------------------------------------------------------


def report(
    names: Sequence[str], dtypes: Sequence[str], device: str, alone: bool = True, presets: Sequence[str] = MODELS
) -> Iterator[dict[str, Any]]:
    """Check ops, then whole models.

    Args:
        names: ops.
        dtypes: keys of DTYPES.
        device: "cpu" or "cuda".
        alone: each op by itself.
        presets: of MODELS: whole models.

    Yields:
        One row a case and dtype: op, case, dtype, results (a Comparison for each tensor), passed, seconds.
    """

    def finish(row: dict[str, Any], dtype: str, started: float) -> dict[str, Any]:
        passed = all(result.passed for result in row["results"].values())
        return {**row, "dtype": dtype, "passed": passed, "seconds": round(time.perf_counter() - started, 2)}

    for name in names if alone else ():
        cases = CASES[name] + (large_cases(name) if device == "cuda" else [])
        for case in cases:
            for dtype in dtypes:
                if case.only and dtype not in case.only:
                    continue
                started = time.perf_counter()
                results = check(case, ops.kernel(name), DTYPES[dtype], device)
                yield finish({"op": name, "case": case.name, "results": results}, dtype, started)
    for preset in presets:
        for dtype in dtypes:
            started = time.perf_counter()
            for row in check_model(preset, DTYPES[dtype], device, names):
                yield finish(row, dtype, started)
                started = time.perf_counter()


HEADER = (
    f"{'op':21}{'case':32}{'dtype':9} {'output error (eager)':>24} {'gradient error (eager)':>24} "
    f"{'worst max':>10}  result"
)


def format_row(row: dict[str, Any]) -> str:
    """One line of the table; errors are norms relative to truth's, the worst tensor of each kind.

    Args:
        row: of `report`.

    Returns:
        The line, and one more for each tensor that failed.
    """

    def worst(keys: list[str]) -> str:
        if not keys:
            return ""
        result = max((row["results"][k] for k in keys), key=lambda r: r.norm_error)
        return f"{result.norm_error:.2e} ({result.eager_norm_error:.2e})"

    is_gradient = [k for k in row["results"] if k.startswith("d ") or k == "gradients"]
    outputs = [k for k in row["results"] if k not in is_gradient]
    most = max((r.max_error for r in row["results"].values()), default=0.0)
    note = ""
    if "loss_difference" in row:
        note = f"  on against off: loss {row['loss_difference']:.1e}, gradients {row['gradient_difference']:.1e}"
        if row["expert_choices_that_differed"]:
            note += f", {row['expert_choices_that_differed']} expert choices differed"
    line = (
        f"{row['op']:21}{row['case']:32}{row['dtype']:9} {worst(outputs):>24} {worst(is_gradient):>24} {most:10.1e}  "
        f"{'pass' if row['passed'] else 'FAIL'}{note}"
    )
    failed = [f"    {key}: {r.reason}" for key, r in row["results"].items() if not r.passed]
    return "\n".join([line, *failed])


def to_json(row: dict[str, Any]) -> dict[str, Any]:
    """A row as plain data.

    Args:
        row: of `report`.
    """
    return {**row, "results": {key: vars(result) for key, result in row["results"].items()}}


def from_json(row: dict[str, Any]) -> dict[str, Any]:
    """The row that `to_json` gave.

    Args:
        row: plain data.
    """
    return {**row, "results": {key: Comparison(**numbers) for key, numbers in row["results"].items()}}


def _report_by_processes(
    names: Sequence[str], dtypes: Sequence[str], device: str, models: str, presets: Sequence[str], jobs: int
) -> Iterator[dict[str, Any]]:
    """The same report from one process an op and one a model, `jobs` at a time: compiling is most of the time."""
    env = dict(os.environ)
    if device == "cpu":  # Triton chooses the interpreter at its import
        env.update(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    same = ["--dtype", ",".join(dtypes), "--device", device, "--jobs", "0"]
    tasks = [["--ops", name, "--models", "no"] for name in names] if models != "only" else []
    if models != "no":
        tasks += [["--ops", ",".join(names), "--models", "only", "--preset", preset] for preset in presets]

    def run(task: list[str]) -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.json"
            command = [sys.executable, "-m", "minimind_fast.proof.verify", *task, *same, "--json", str(file)]
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            if file.exists():
                return [from_json(row) for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]
        said = f"the process ended with {done.returncode}: {done.stderr.strip()[-2000:]}"
        case = " ".join(task)
        return [
            {"op": task[1], "case": case, "dtype": "", "passed": False, "results": {"run": Comparison(False, said)}}
        ]

    with ThreadPoolExecutor(jobs) as pool:
        for rows in pool.map(run, tasks):
            yield from rows


def _names(text: str, known: Sequence[str], what: str) -> list[str]:
    names = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"unknown {what} {', '.join(unknown) or repr(text)}; choose of {', '.join(known)}")
    return names


def main(argv: list[str] | None = None) -> int:
    """`minimind-fast verify`: check every kernel, then whole models, and say pass or fail.

    Args:
        argv: arguments after `verify`; the process's own if None.

    Returns:
        The exit code: 0 if everything passes, 1 if not (2 for wrong usage).
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="minimind-fast verify", description=main.__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--ops", default=",".join(ops.NAMES), help="ops to check, joined by commas (default: all)")
    parser.add_argument("--dtype", default="", help=f"of {', '.join(DTYPES)}, joined by commas (default: all that can)")
    parser.add_argument("--device", default="", choices=("", "cpu", "cuda"), help="cuda where there is one, else cpu")
    parser.add_argument("--models", choices=("yes", "no", "only"), default="yes", help="whole models, two layers each")
    parser.add_argument("--preset", default=",".join(MODELS), help="which models (default: all)")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8), help="processes (0: in this one)")
    parser.add_argument("--json", metavar="FILE", help="also write every number to this file")
    args = parser.parse_args(argv)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    possible = list(DTYPES) if device == "cuda" else ["float32", "float16"]
    try:
        names, presets = _names(args.ops, ops.NAMES, "op"), _names(args.preset, MODELS, "preset")
        dtypes = _names(args.dtype, list(DTYPES), "dtype") if args.dtype else possible
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: PyTorch sees no GPU here; leave --device out to check on the CPU")
        if set(dtypes) - set(possible):
            raise ValueError("--dtype bfloat16 needs a GPU: Triton's interpreter is wrong in bfloat16")
    except ValueError as error:
        parser.error(str(error))
    jobs = args.jobs
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        jobs = max(jobs, 1)

    where = torch.cuda.get_device_name() if device == "cuda" else "CPU, Triton's interpreter: small cases"
    print(f"torch {torch.__version__}, {where}, {', '.join(dtypes)}")
    if device == "cpu":
        print("No GPU: this proves the arithmetic in float32 and float16; bfloat16 and speed need a GPU.")
    print(HEADER)
    rows = []
    if jobs:
        found = _report_by_processes(names, dtypes, device, args.models, presets, jobs)
    else:
        found = report(names, dtypes, device, args.models != "only", presets if args.models != "no" else ())
    for row in found:
        rows.append(row)
        print(format_row(row), flush=True)
    failed = [row for row in rows if not row["passed"]]
    if args.json:
        summary = {
            "torch": torch.__version__,
            "device": where,
            "passed": not failed,
            "rows": [to_json(r) for r in rows],
        }
        Path(args.json).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(f"{len(rows) - len(failed)} of {len(rows)} pass" + "".join(f"\nFAIL {r['op']}: {r['case']}" for r in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
