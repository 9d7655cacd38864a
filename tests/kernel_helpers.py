"""What the kernel tests share: the process they run in, the error rule, poisoned memory, broken variants.

Purpose:    one place that says when a kernel counts as right, so that every kernel is held to the same rule.
Principle:  the error rule and the poison are those of `minimind-fast verify` (proof/rule.py),
            so that tests and the report that a user runs cannot disagree.
Properties: import this module before anything imports triton: it chooses the interpreter where there is no GPU
            (Triton decides at import). The interpreter is wrong in bfloat16, so there bfloat16 is tested on a GPU only.
"""

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch

from minimind_fast.proof.rule import compare, poisoned_memory

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if HAS_GPU else [])


def assert_error_rule(
    name: str, kernel: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, inputs: torch.dtype | None = None
) -> None:
    """Hold a kernel's result to truth, with eager's own error at the same dtype as the measure.

    Args:
        name: what is compared, for the message.
        kernel: the kernel's result, any shape, any dtype.
        eager: the reference's result at the same dtype.
        truth: the reference's result in float64, same shape.
        inputs: the coarsest dtype among the op's inputs.
    Raises:
        AssertionError: shape or dtype differ, an element breaks the rule, or the norm of the error does.
    """
    result = compare(kernel, eager, truth.to(kernel.device), inputs=inputs)
    assert result.passed, f"{name}: {result.reason}"


def run(
    op: Callable[..., object],
    inputs: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor | None] | None,
    wanted: Sequence[bool] | None = None,
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Run an op on copies of its inputs, backward too, and check that it wrote to none of them.

    Args:
        op: takes the tensors in order and returns a tensor or a tuple of tensors.
        inputs: tensors of any dtype; strides are kept.
        grads: the gradient of each output (None: no backward through it); None: no backward at all.
        wanted: for each input, whether its gradient is asked for; default: every floating-point input's.
    Returns:
        Detached outputs, and each input's gradient (None where not asked for).
    """
    if wanted is None:
        wanted = [t.is_floating_point() for t in inputs]
    wanted = [w and grads is not None for w in wanted]
    leaves = [t.detach().requires_grad_(w) for t, w in zip(inputs, wanted, strict=True)]
    kept = [t.detach().clone() for t in inputs]
    outputs = op(*leaves)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)  # type: ignore[arg-type]
    results = [o.detach().clone() for o in outputs]
    gradients: list[torch.Tensor | None] = [None] * len(leaves)
    if grads is not None:
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
        asked = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(
            torch.autograd.grad([o for o, _ in pairs], asked, [g.to(o.dtype) for o, g in pairs], allow_unused=True)
        )
        gradients = [next(found) if leaf.requires_grad else None for leaf in leaves]
        for output, result in zip(outputs, results, strict=True):
            assert torch.equal(output.detach().nan_to_num(), result.nan_to_num()), "the backward wrote to an output"
    for i, (leaf, before) in enumerate(zip(leaves, kept, strict=True)):
        same = leaf.detach() == before
        if leaf.is_floating_point():
            same = same | (leaf.detach().isnan() & before.isnan())
        assert same.all(), f"the op wrote to its input {i}"
    return results, gradients


def assert_op(
    name: str,
    kernel: Callable[..., object],
    reference: Callable[..., object],
    inputs: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor | None] | None,
    wanted: Sequence[bool] | None = None,
    float64: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Hold an op's outputs and gradients to the error rule, in poisoned memory.

    Args:
        name: of the case, for messages.
        kernel, reference: the two implementations; both take the inputs in order.
        inputs: at the dtype under test, on DEVICE.
        grads: the gradient of each output.
        wanted: which inputs' gradients are asked for.
        float64: how an input becomes its float64 self; default: every floating-point tensor is cast.
    """
    float64 = float64 or (lambda t: t.double() if t.is_floating_point() else t)
    truth = run(reference, [float64(t) for t in inputs], grads, wanted)
    eager = run(reference, inputs, grads, wanted)
    with poisoned_memory(DEVICE):
        ours = run(kernel, inputs, grads, wanted)
    coarsest = max((t.dtype for t in inputs if t.is_floating_point()), key=lambda d: torch.finfo(d).eps)
    for kind, got, plain, true in zip(("output", "gradient"), ours, eager, truth, strict=True):
        for i, (k, e, t) in enumerate(zip(got, plain, true, strict=True)):
            if t is None and e is None and kind == "gradient":
                assert k is None or not k.any(), f"{name}: gradient {i} where the reference has none"
                continue
            assert k is not None and e is not None and t is not None, f"{name}: {kind} {i} is missing"
            assert_error_rule(f"{name}: {kind} {i}", k, e, t, coarsest)


def broken_variant(module: ModuleType, folder: Path, old: str, new: str) -> ModuleType:
    """Load a copy of a kernel file with one piece of its source, or of what it shares, replaced; ops under other names.

    Args:
        module: the healthy kernel module.
        folder: an empty folder for the copies (Triton reads a kernel's source from a file).
        old: the text to replace, which must occur in the file or in a helper of kernels/ that it imports.
        new: what to write there.
    Returns:
        The module of the broken copy.
    """
    source = Path(str(module.__file__)).read_text(encoding="utf-8")
    name = f"broken_{module.__name__.rsplit('.', 1)[-1]}_{abs(hash((str(folder), old, new)))}"
    if old in source:
        source = source.replace(old, new, 1)
    else:
        for part in re.findall(r"^from (minimind_fast\.kernels\.\w+) import", source, re.M):
            text = Path(str(importlib.import_module(part).__file__)).read_text(encoding="utf-8")
            if old in text:
                copy = f"{name}_{part.rsplit('.', 1)[-1]}"
                _load(copy, folder, text.replace(old, new, 1))
                source = source.replace(part, copy)
                break
        else:
            raise LookupError(f"{old!r} occurs neither in {module.__name__} nor in what it shares: mend the test")
    return _load(name, folder, source.replace("minimind_fast::", f"{name}::"))


def _load(name: str, folder: Path, source: str) -> ModuleType:
    path = folder / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def assert_broken(check: Callable[[ModuleType], None], module: ModuleType, folder: Path, old: str, new: str) -> None:
    """Check that a check which the healthy module passes fails for a broken copy."""
    check(module)
    with pytest.raises(AssertionError):
        check(broken_variant(module, folder, old, new))


def randn(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Normal values drawn on the CPU from a seed, so that a case is the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float32) * scale).to(DEVICE, dtype)


def special_values(x: torch.Tensor, seed: int, values: Sequence[float]) -> torch.Tensor:
    """Put each value (inf, nan, -0.0, the largest, ...) at a random place of a copy of x."""
    generator = torch.Generator().manual_seed(seed)
    x = x.clone()
    if x.numel():
        for value in values:
            x.view(-1)[int(torch.randint(x.numel(), (), generator=generator))] = value
    return x


def assert_repeatable(op: Callable[..., object], inputs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> None:
    """Check that two runs agree bitwise, outputs and gradients."""
    first, second = run(op, inputs, grads), run(op, inputs, grads)
    for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert a is not None and b is not None and torch.equal(a, b), "two runs differ"


def assert_refuses_second_derivative(op: Callable[..., torch.Tensor], x: torch.Tensor) -> None:
    """Check that a second backward raises an error that says why."""
    x = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(op(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(first.sum(), x)


def assert_compiles(op: Callable[..., object], inputs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> None:
    """Check that the op, between other operations, compiles in one graph, sizes fixed and free, and changes nothing."""

    def around(*tensors):
        outputs = op(*(t * 2 if t.is_floating_point() and t.requires_grad else t for t in tensors))
        return tuple(o * 3 for o in ([outputs] if isinstance(outputs, torch.Tensor) else outputs))

    plain = run(around, inputs, grads)
    for dynamic in (False, True):
        torch._dynamo.reset()
        # On the CPU the generated code is not what is tested, and costs 20 s of g++.
        backend = "inductor" if HAS_GPU else "aot_eager"
        compiled = torch.compile(around, fullgraph=True, dynamic=dynamic, backend=backend)
        ours = run(compiled, inputs, grads)
        for a, b in zip(plain[0] + plain[1], ours[0] + ours[1], strict=True):
            assert a is not None and b is not None
            torch.testing.assert_close(a, b, rtol=2 * torch.finfo(a.dtype).eps, atol=0.0)


def assert_captures(op: Callable[..., object], inputs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> None:
    """Check (on a GPU) that forward and backward run inside a CUDA graph and that its replay reads fresh inputs."""
    static = [t.clone() for t in inputs]
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in static]
    asked = [leaf for leaf in leaves if leaf.requires_grad]

    def step():
        outputs = op(*leaves)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)  # type: ignore[arg-type]
        return outputs, torch.autograd.grad(
            outputs, asked, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)]
        )

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs, gradients = step()
    fresh = [t.flip(0) if t.dim() > 1 else t for t in inputs]
    with torch.no_grad():
        for leaf, value in zip(leaves, fresh, strict=True):
            leaf.copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    expected = run(op, fresh, grads)
    for a, b in zip([*outputs, *gradients], expected[0] + [g for g in expected[1] if g is not None], strict=True):
        assert torch.equal(a, b), "the graph's replay differs from a plain run"
