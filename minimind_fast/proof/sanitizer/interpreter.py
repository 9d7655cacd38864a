"""Triton's interpreter, watched: every access to memory and every sum of integers is told to a watcher.

Purpose: the one place that knows the interpreter's insides.
Principle: the interpreter executes a kernel's source with numpy, one program after another, through a builder of
    operations. Some of its operations are replaced while a `Watcher` watches. A pointer carries the name of the argument
    that it came from through every operation on addresses.
Properties: TRITON_INTERPRET=1 must be set before Triton is imported. The interpreter is wrong in bfloat16. Knows Triton
    3.6 and 3.7.

Source: triton/runtime/interpreter.py of Triton 3.7.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder, TensorHandle

from minimind_fast.proof.sanitizer.findings import Findings

# Operations on blocks of addresses, whose result belongs to the same argument.
_ON_ADDRESSES = (
    "create_addptr", "create_splat", "create_unsplat", "create_broadcast", "create_expand_dims", "create_reshape",
    "create_trans", "create_bitcast",
)  # fmt: skip
_NOT_KNOWN = ("create_atomic_rmw", "create_atomic_cas")


def numpy_dtype(handle: TensorHandle) -> np.dtype:
    """The dtype of the values at these addresses."""
    return interpreter._get_np_dtype(handle.get_element_ty())


class Watcher:
    """Is told what kernels do, and may change it: the order of programs, the values that they read."""

    def __init__(self) -> None:
        self.findings = Findings()
        self.kernel, self.program = "", 0  # now running
        self.launches, self.programs = 0, 0

    def report(self, kind: str, argument: str = "", detail: str = "") -> None:
        self.findings.add(kind, self.kernel, argument, self.program, detail)

    def begin(self, arguments: dict[str, Any]) -> bool:
        """A launch begins, `arguments` by name, tensors too; whether to run it."""
        return True

    def address(self, name: str, tensor: torch.Tensor) -> int:
        """Where the kernel shall believe that a tensor lies."""
        return tensor.data_ptr()

    def order(self, count: int) -> Iterable[int]:
        """The programs to run, of 0 to count - 1."""
        return range(count)

    def running(self) -> contextlib.AbstractContextManager[None]:
        """Around the programs of a launch."""
        return contextlib.nullcontext()

    def steps(self, steps: range) -> Iterable[int]:
        """The steps to take of a loop in the kernel itself."""
        return steps

    def load(self, argument: str, addresses: np.ndarray, mask: np.ndarray, dtype: np.dtype) -> np.ndarray | None:
        """Values of the lanes where mask is true; None to read memory where `mask`, which may be changed, still is."""

    def read(self, argument: str, values: np.ndarray) -> None:
        """What a load read from memory, in the lanes that are not masked."""

    def store(self, argument: str, addresses: np.ndarray, mask: np.ndarray, values: np.ndarray) -> bool:
        """Whether to write memory where `mask`, which may be changed, still is true."""
        return True

    def undefined(self, dtype: np.dtype) -> Any:
        """What a masked lane of a load without `other` holds."""
        return np.nan if dtype.kind == "f" else True if dtype.kind == "b" else np.iinfo(dtype).max // 2

    def multiply(self, a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray | None:
        """The result of a tl.dot; None to compute it."""


def _pointer(tensor: torch.Tensor, address: int, name: str) -> tl.tensor:
    kind = tl.dtype(
        str(tensor.dtype).split(".")[-1].replace("float", "fp").replace("bfp", "bf").replace("bool", "int1")
    )
    handle = TensorHandle(np.array([address], dtype=np.uint64), tl.pointer_type(kind))
    handle.attr["argument"] = name
    return tl.tensor(handle, handle.dtype)


class _Hooks:
    """The interpreter's operations with a watcher between."""

    def __init__(self, watcher: Watcher) -> None:
        self.watcher = watcher
        self.dot, self.binary = InterpreterBuilder.create_dot, InterpreterBuilder.binary_op
        self.read, self.write = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def replacements(self) -> dict[str, Any]:
        """Name of a builder's method -> its replacement."""
        hooks = self

        def load(builder, pointers, mask, other, *rest):
            return hooks.load(builder, pointers, mask, other, *rest)

        def store(builder, pointers, value, mask, *rest):
            argument, lanes = hooks.lanes(pointers, mask)
            values = np.broadcast_to(value.data, lanes.shape)
            if hooks.watcher.store(argument, pointers.data, lanes, values):
                hooks.write(builder, pointers, value, TensorHandle(lanes, tl.int1), *rest)

        def binary(builder, left, right, op):
            out = hooks.binary(builder, left, right, op)
            hooks.check_overflow(left.data, right.data, op, out.data)
            return out

        def dot(builder, a, b, total, *rest):
            product = hooks.watcher.multiply(a.data, b.data, total.data)
            if product is None:
                return hooks.dot(builder, a, b, total, *rest)
            return TensorHandle(product, total.dtype.scalar)

        own = {"create_masked_load": load, "create_masked_store": store, "binary_op": binary, "create_dot": dot}
        carried = {name: _carrying(getattr(InterpreterBuilder, name)) for name in _ON_ADDRESSES}
        return {**own, **carried, **{name: _unknown(name) for name in _NOT_KNOWN}}

    def lanes(self, pointers: TensorHandle, mask: TensorHandle) -> tuple[str, np.ndarray]:
        argument = pointers.attr.get("argument")
        if argument is None:
            raise NotImplementedError(f"{self.watcher.kernel} uses a pointer whose argument is not known")
        return argument, np.array(np.broadcast_to(mask.data, pointers.data.shape))

    def load(self, builder, pointers, mask, other, *rest) -> TensorHandle:
        argument, lanes = self.lanes(pointers, mask)
        dtype, masked = numpy_dtype(pointers), ~lanes
        values = self.watcher.load(argument, pointers.data, lanes, dtype)
        if values is None:
            values = self.read(builder, pointers, TensorHandle(lanes, tl.int1), None, *rest).data
            self.watcher.read(argument, np.asarray(values)[lanes])
        values = np.array(np.broadcast_to(values, lanes.shape), dtype=dtype)
        if masked.any():  # not those that the watcher masked
            fill = self.watcher.undefined(dtype) if other is None else np.broadcast_to(other.data, lanes.shape)[masked]
            values[masked] = fill
        return TensorHandle(values, pointers.get_element_ty())

    def check_overflow(self, left: np.ndarray, right: np.ndarray, op: Any, out: np.ndarray) -> None:
        if op in (np.add, np.subtract, np.multiply) and left.dtype in (np.int32, np.uint32) and out.dtype == left.dtype:
            wide = op(left.astype(np.int64), right.astype(np.int64))
            if (wide != out).any():
                self.watcher.report("int32 overflow", detail=str(int(wide[wide != out].flat[0])))


def _carrying(real: Any) -> Any:
    def operation(builder, *args, **kwargs):
        out = real(builder, *args, **kwargs)
        for arg in args:
            if isinstance(arg, TensorHandle) and "argument" in arg.attr:
                out.attr["argument"] = arg.attr["argument"]
        return out

    return operation


def _unknown(name: str) -> Any:
    def operation(builder, *args, **kwargs):
        raise NotImplementedError(f"{name}: the sanitizer does not know this operation")

    return operation


def _executor(watcher: Watcher) -> Any:
    def execute(self: Any, *args: Any, **kwargs: Any) -> None:
        names = inspect.getfullargspec(self.fn).args
        bound = inspect.getcallargs(self.fn, *args, **{k: v for k, v in kwargs.items() if k in names})
        watcher.kernel = self.fn.__name__
        watcher.launches += 1
        if not watcher.begin(bound):
            return
        with watcher.running(), _interpreting(self.fn, watcher):
            given = {}
            for name, value in bound.items():
                if isinstance(value, torch.Tensor):
                    given[name] = _pointer(value, watcher.address(name, value), name)
                elif name in self.constexprs:
                    given[name] = value
                else:
                    given[name] = interpreter._implicit_cvt(int(value) if isinstance(value, torch.SymInt) else value)
            grid: Any = self.grid(given) if callable(self.grid) else self.grid
            x, y, z = (int(size) for size in (*grid, 1, 1, 1)[:3])
            builder = interpreter.interpreter_builder
            builder.set_grid_dim(x, y, z)
            for program in watcher.order(x * y * z):
                watcher.program = program
                watcher.programs += 1
                builder.set_grid_idx(program % x, program // x % y, program // x // y)
                self.fn(**given)

    return execute


@contextlib.contextmanager
def _interpreting(function: Any, watcher: Watcher) -> Iterator[None]:
    """The language's functions are those of the interpreter; `range` asks the watcher."""
    scope = interpreter._patch_lang(function)
    names = function.__globals__
    names["range"] = lambda *ends: watcher.steps(range(*map(int, ends)))
    try:
        yield
    finally:
        del names["range"]
        if scope is not None:
            scope.restore()


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Tell the watcher all that kernels do meanwhile.

    Raises:
        RuntimeError: Triton was imported as a compiler.
    """
    from minimind_fast.kernels import swiglu

    if not isinstance(vars(swiglu)["_swiglu_fwd_kernel"], InterpretedFunction):
        raise RuntimeError(
            "the sanitizer watches Triton's interpreter: set TRITON_INTERPRET=1 before Triton is imported"
        )
    with contextlib.ExitStack() as stack:
        for name, value in _Hooks(watcher).replacements().items():
            stack.enter_context(mock.patch.object(InterpreterBuilder, name, value))
        stack.enter_context(mock.patch.object(GridExecutor, "__call__", _executor(watcher)))
        yield
