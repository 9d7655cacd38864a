"""Implementations of an op side by side, and how they are called, checked and timed.

Purpose:    eager, eager compiled, ours, and Liger-Kernel if installed: one signature, one check.
Principle:  inputs are a case of the op's record, at a model's shapes, as training calls the op: the head is promised its
            gradient. Truth is the reference in float64; verify's error rule is applied to the timed shape itself.
Properties: inputs are drawn on the device from a seed. Kernels are checked in memory poisoned with NaN.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import liger_ops
from minimind_fast import ops
from minimind_fast.ops.cases import Draw
from minimind_fast.proof.rule import Comparison, compare, poisoned_memory

NAMES = ("eager", "compile", "ours", "liger")
# Compiling takes seconds per op; a few ops are enough to see the effect on a CPU.
COMPILED_ON_CPU = [name for name, op in ops.OPS.items() if op.timing.compile_on_cpu]


class DeviceDraw(Draw):
    """Draws on the device: GPU-sized cases take seconds on a CPU."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int = 0) -> None:
        super().__init__(dtype, device, seed)
        self._own = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(shape, generator=self._own, device=self.device)
        return values.mul_(scale).add_(mean).to(dtype or self.dtype)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(low, high, shape, generator=self._own, device=self.device, dtype=dtype)

    def chance(self, share: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._own, device=self.device) < share


class Bench:
    """One input set of an op, ready to run forward and backward.

    Args:
        op: one of ops.NAMES.
        preset: the model whose shapes are used.
        tokens: T.
        dtype: dtype of the inputs.
        device: "cuda" or "cpu".
        seed: for drawing the inputs.

    Raises:
        LookupError: the model does not call the op.
    """

    def __init__(self, op: str, preset: str, tokens: int, dtype: torch.dtype, device: str, seed: int = 0) -> None:
        case = ops.OPS[op].preset_case(preset, tokens, training=True)
        if case is None:
            raise LookupError(f"{preset} does not call {op}")
        self.case, self.dtype, self.device = case, dtype, device
        draw = DeviceDraw(dtype, device, seed)
        self.tensors: dict[str, Any] = case.tensors(draw)
        self.leaves = [key for key in ops.OPS[op].differentiable if self.tensors[key] is not None]
        for key in self.leaves:
            self.tensors[key].requires_grad_()
        self.draw, self.grads = draw, None

    @property
    def size(self) -> int:
        """Total bytes of the inputs."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values() if t is not None)

    def forward(self, function: Callable, training: bool = True) -> list[Tensor]:
        """The op's differentiable outputs; without training no gradient is promised."""
        tensors = self.tensors if training else {k: t for k, t in self.tensors.items() if k != self.case.promised}
        return [out for out in self.case.call(function, tensors) if out.requires_grad]

    def backward(self, outputs: list[Tensor], keep: bool = False, copies: bool = False) -> tuple[Tensor | None, ...]:
        """Gradients of the leaves; output gradients are drawn at the first call.

        Args:
            outputs: from `forward`.
            keep: retain the graph, to time backward alone.
            copies: pass copies of the output gradients, since some peers overwrite them.
        """
        if self.grads is None:
            if self.case.promised:
                self.grads = [0.5 * self.tensors[self.case.promised]]
            else:
                self.grads = [self.draw.normal(*out.shape, dtype=out.dtype) for out in outputs]
        leaves = [self.tensors[key] for key in self.leaves]
        grads = [g.clone() for g in self.grads] if copies else self.grads
        return torch.autograd.grad(outputs, leaves, grads, allow_unused=True, retain_graph=keep)

    def both(self, function: Callable) -> None:
        """Forward and backward."""
        self.backward(self.forward(function))

    def results(self, function: Callable, double: bool = False, poison: bool = False) -> dict[str, Tensor]:
        """Outputs and gradients by name.

        Args:
            function: the implementation.
            double: cast the inputs to float64.
            poison: fill uninitialised memory with NaN.
        """
        kept = self.tensors, self.grads
        if double:
            self.tensors = {
                key: t.detach().double().requires_grad_(key in self.leaves)
                if t is not None and t.is_floating_point()
                else t
                for key, t in self.tensors.items()
            }
        try:
            with poisoned_memory(self.device) if poison else contextlib.nullcontext():
                outputs = self.case.call(function, self.tensors)
                live = [out for out in outputs if out.requires_grad]
                if double and self.grads is not None:
                    self.grads = [g.to(o.dtype) for g, o in zip(self.grads, live, strict=True)]
                found = self.backward(live, copies=True)
            out = {f"out{i}": tensor.detach() for i, tensor in enumerate(outputs)}
            for key, grad in zip(self.leaves, found, strict=True):
                out[f"d {key}"] = torch.zeros_like(self.tensors[key]) if grad is None else grad
            return out
        finally:
            self.tensors = kept[0]
            if double:
                self.grads = kept[1]


@cache
def implementation(op: str, name: str, device: str) -> Callable | str:
    """An implementation (one of NAMES) with the op's signature, or the reason why there is none."""
    eager = ops.OPS[op].reference
    if name == "eager":
        return eager
    if name == "compile":
        if not ops.OPS[op].timing.compiles:
            return "the reference reads numbers on the host: there is nothing whole to compile"
        if device == "cpu" and op not in COMPILED_ON_CPU:
            return f"on a CPU the compiler is asked for {' and '.join(COMPILED_ON_CPU)} only"
        if device == "cpu":  # backward is timed alone there, so the graph must outlive it
            torch._functorch.config.donated_buffer = False
        return torch.compile(eager, dynamic=False)
    if name == "ours":
        with ops.use("auto"):  # the registry's choice for this device
            function, _ = ops.choose(op, device)
        return "on a CPU ours is the reference itself" if function is eager else function
    if device == "cpu":
        return "Liger-Kernel's kernels run on a GPU only"
    return liger_ops.op(op)


@lru_cache(maxsize=1)
def expected(
    op: str, preset: str, tokens: int, dtype: torch.dtype, device: str
) -> tuple[Bench, dict[str, Tensor], dict[str, Tensor]]:
    """An input set, eager's results on it and the truth; cached, since a shape's implementations run in sequence."""
    bench, plain = Bench(op, preset, tokens, dtype, device), ops.OPS[op].reference
    eager = bench.results(plain)
    return bench, eager, bench.results(plain, double=True)


@lru_cache(maxsize=4)
def check(op: str, preset: str, tokens: int, dtype: torch.dtype, device: str, name: str) -> dict[str, Comparison]:
    """Apply the error rule to an available implementation on the shape to be timed.

    Returns:
        A Comparison for each output and gradient.
    """
    function = implementation(op, name, device)
    if isinstance(function, str):
        raise LookupError(function)
    bench, eager, truth = expected(op, preset, tokens, dtype, device)
    mine = bench.results(function, poison=True)
    return {key: compare(mine[key], eager[key], truth[key]) for key in truth}
