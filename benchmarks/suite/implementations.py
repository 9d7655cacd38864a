"""Implementations of an op that stand side by side, and how they are called, checked and timed.

Purpose:    eager, torch.compile of it, ours, Liger-Kernel where it is installed: one signature, one check.
Principle:  inputs are a case of the op's record, at a model's shapes, as training calls the op: the head is promised its
            gradient. Truth is the reference in float64; the error rule is verify's own, on the very shape that is timed.
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
# The compiler takes seconds for each; a few ops are enough to see what it does on a CPU.
COMPILED_ON_CPU = [name for name, op in ops.OPS.items() if op.timing.compile_on_cpu]


class DeviceDraw(Draw):
    """Draws on the device: a case of a GPU's size takes a CPU seconds."""

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
    """One input set of an op, ready to be run forward and backward.

    Args:
        op: its name.
        preset: the model.
        tokens: T.
        dtype: of the inputs.
        device: "cuda" or "cpu".
        seed: of the inputs.

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
        """Bytes of the inputs."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values() if t is not None)

    def forward(self, function: Callable, training: bool = True) -> list[Tensor]:
        """The op's outputs that gradients come from; without training no gradient is promised."""
        tensors = self.tensors if training else {k: t for k, t in self.tensors.items() if k != self.case.promised}
        return [out for out in self.case.call(function, tensors) if out.requires_grad]

    def backward(self, outputs: list[Tensor], keep: bool = False, copies: bool = False) -> tuple[Tensor | None, ...]:
        """Gradients of the leaves; the outputs' own are drawn at the first call.

        Args:
            outputs: of `forward`.
            keep: the graph, for a backward that is timed by itself.
            copies: hand out copies of the outputs' gradients, as some peers write to what they are given.
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
            double: on inputs cast to float64.
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
    """An implementation of an op, or why there is none.

    Args:
        op: its name.
        name: of NAMES.
        device: "cuda" or "cpu".

    Returns:
        A function with the op's signature, or a reason.
    """
    eager = ops.OPS[op].reference
    if name == "eager":
        return eager
    if name == "compile":
        if not ops.OPS[op].timing.compiles:
            return "the reference reads numbers on the host: there is nothing whole to compile"
        if device == "cpu" and op not in COMPILED_ON_CPU:
            return f"on a CPU the compiler is asked for {' and '.join(COMPILED_ON_CPU)} only"
        if device == "cpu":  # its backward is timed by itself there, so that its graph must outlive it
            torch._functorch.config.donated_buffer = False
        return torch.compile(eager, dynamic=False)
    if name == "ours":
        with ops.use("auto"):  # ops' own choice for this device, which is called as it stands
            function, _ = ops.choose(op, device)
        return "on a CPU ours is the reference itself" if function is eager else function
    if device == "cpu":
        return "Liger-Kernel's kernels run on a GPU only"
    return liger_ops.op(op)


@lru_cache(maxsize=1)
def expected(
    op: str, preset: str, tokens: int, dtype: torch.dtype, device: str
) -> tuple[Bench, dict[str, Tensor], dict[str, Tensor]]:
    """An input set, eager's results on it and the truth; the last ones are kept, as implementations follow each other."""
    bench, plain = Bench(op, preset, tokens, dtype, device), ops.OPS[op].reference
    eager = bench.results(plain)
    return bench, eager, bench.results(plain, double=True)


@lru_cache(maxsize=4)
def check(op: str, preset: str, tokens: int, dtype: torch.dtype, device: str, name: str) -> dict[str, Comparison]:
    """Hold an implementation to the error rule on the shape that is to be timed.

    Args:
        op, preset, tokens, dtype, device: the case.
        name: of an implementation that is there.

    Returns:
        A Comparison for each output and gradient.
    """
    function = implementation(op, name, device)
    if isinstance(function, str):
        raise LookupError(function)
    bench, eager, truth = expected(op, preset, tokens, dtype, device)
    mine = bench.results(function, poison=True)
    return {key: compare(mine[key], eager[key], truth[key]) for key in truth}
