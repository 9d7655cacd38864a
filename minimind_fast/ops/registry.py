"""One record per op, and the table of all records.

Purpose: an op's record, `records/<op>.py`, holds everything about it; the switch, the proof, benchmarks, counts and docs
    read it there.
Principle: the table is built by listing the folder, so a new file is a new op.
Properties: building the table imports no kernel and no Triton. It is sorted by `place`, then by name.

Shapes: T tokens.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from minimind_fast.config import ModelConfig
from minimind_fast.ops.cases import Case


class Work(NamedTuple):
    """The minimum traffic and arithmetic of an op or a model."""

    bytes: float
    flops: float = 0.0

    def seconds(self, bytes_per_s: float, flop_per_s: float) -> float:
        """The minimum time, if memory traffic and arithmetic overlap fully."""
        return max(self.bytes / bytes_per_s, self.flops / flop_per_s)


@dataclass(frozen=True)
class Timing:
    """How the benchmarks time an op.

    Attributes:
        place: position among the ops; those with performance goals come first.
        cpu_tokens: T on a CPU: larger than its caches where that is cheap, small where the op multiplies matrices.
        matmul: (config, T) -> (m, n, k) of its largest matmul, timed beside it; None if it has none.
        compiles: whether torch.compile makes one graph of the reference.
        compile_on_cpu: compile it on a CPU too, which takes seconds.
        reference_waits: the reference syncs with the host, so a CUDA graph cannot capture it.
        no_backward: why its backward is not timed separately; "" if it is.
    """

    place: int = 100
    cpu_tokens: int = 256
    matmul: Callable[[ModelConfig, int], tuple[int, int, int]] | None = None
    compiles: bool = True
    compile_on_cpu: bool = False
    reference_waits: bool = False
    no_backward: str = ""


@dataclass(frozen=True)
class Op:
    """Everything about an op. Its kernel is `<name>` in `kernels/<name>.py`.

    Attributes:
        name: also that of its kernel file, and its name on the command line.
        reference: its definition in plain PyTorch; in float64 the ground truth of the error rule.
        differentiable: which tensors of its cases get gradients.
        work: (config, "forward" or "backward", T, bytes an activation) -> its minimum work.
        model_case: (config, T) -> the op as a model calls it; None if that model does not.
        cases: awkward calls: odd sizes, one row, no rows, huge and tiny values.
        training_case: the same as model_case, but as a training step calls it; model_case if None.
        large_cases: more calls, which only a GPU has the memory for.
        small: config fields reduced for the interpreter, such as vocab_size.
        small_tokens: T of the models' cases in the interpreter.
        cpu: "module:function" for training on a CPU, or "" for the reference.
        needs: "ampere": on an older GPU the reference runs; "" for no requirement.
        of_mixtures: only mixtures of experts use it.
        in_forward: whether a model's forward calls it, so that whole-model checks cover it.
        forward_only: its backward launches no kernel.
        place: position in tables and lists.
        timing: how it is timed.
        page: its page in docs/, without language and suffix; "" if it has none.
        issue_bound: kernel -> why, in the cost model, issuing its instructions takes over 60% of its bytes' time.
    """

    name: str
    reference: Callable
    differentiable: tuple[str, ...]
    work: Callable[[ModelConfig, str, int, int], Work]
    model_case: Callable[[ModelConfig, int], Case | None]
    cases: tuple[Case, ...] = ()
    training_case: Callable[[ModelConfig, int], Case | None] | None = None
    large_cases: tuple[Case, ...] = ()
    small: dict[str, int] = field(default_factory=dict)
    small_tokens: int = 20
    cpu: str = ""
    needs: str = ""
    of_mixtures: bool = False
    in_forward: bool = True
    forward_only: bool = False
    place: int = 100
    timing: Timing = Timing()
    page: str = ""
    issue_bound: dict[str, str] = field(default_factory=dict)

    def preset_case(self, preset: str, tokens: int, training: bool = False, **sizes: int) -> Case | None:
        """The op as one of MiniMind's models calls it.

        Args:
            preset: the model's name.
            tokens: T.
            training: as a training step calls it.
            sizes: config fields to override, smaller for the interpreter.

        Returns:
            The case; None if the model does not call the op.
        """
        make = self.training_case if training and self.training_case else self.model_case
        case = make(ModelConfig.preset(preset, **sizes), tokens)
        return None if case is None else replace(case, name=f"{preset} T={tokens}")

    def kernel(self) -> Callable:
        """The Triton implementation; imports Triton."""
        return getattr(importlib.import_module(f"minimind_fast.kernels.{self.name}"), self.name)

    def cpu_function(self) -> Callable | None:
        """The CPU's own implementation, or None."""
        if not self.cpu:
            return None
        module, function = self.cpu.split(":")
        return getattr(importlib.import_module(module), function)


def load() -> dict[str, Op]:
    """Import every record.

    Returns:
        name -> Op, sorted by `place`, then by name.
    """
    package = importlib.import_module("minimind_fast.ops.records")
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    found: list[Op] = [importlib.import_module(f"{package.__name__}.{name}").OP for name in names]
    return {op.name: op for op in sorted(found, key=lambda op: (op.place, op.name))}
