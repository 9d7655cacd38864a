"""Triton's launches, taken over: compiled for a card, executed here.

Purpose: the project's own launchers, unchanged, on CPU tensors, with the PTX that would run on the card.
Principle: `JITFunction.run` compiles as for a launch, specialisation of integers and alignment included, and gives the PTX;
    the arguments that the compiler kept become parameters, and the programs run in `execute.py`.
Properties: the last stage (ptxas) is left out: it costs half of the time, and `make aot` has it. Triton's own cache keeps
    the rest, under another key. In one process for each target, and without Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from minimind_fast import ops
from minimind_fast.errors import UserError
from minimind_fast.proof.ptx.execute import Code, decode, narrowest, run
from minimind_fast.proof.ptx.findings import Record
from minimind_fast.proof.ptx.fresh import marked_memory
from minimind_fast.proof.ptx.lanes import Launch
from minimind_fast.proof.ptx.parse import Program, parse
from minimind_fast.proof.ptx.storage import GlobalMemory
from minimind_fast.proof.targets import TARGETS, Target, as_card, patched

# What can be executed: cards whose matrix instructions are mma.sync or wgmma.
EXECUTABLE = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
FORMATS = {  # Triton's names of numbers -> those of `struct`
    **{"i1": "?", "u1": "?", "i8": "b", "u8": "B", "i16": "h", "u16": "H", "i32": "i", "u32": "I", "i64": "q"},
    **{"u64": "Q", "fp32": "f", "f32": "f", "fp64": "d", "f64": "d"},
}
Change = Callable[[str, str], str]  # (kernel, PTX) -> PTX


class _Driver:
    """Stands for Triton's driver: only the target is asked for."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return GPUTarget(self.target.backend, self.target.arch, self.target.warp_size)

    def get_current_device(self) -> int:
        return int(self.target.arch)  # Triton keeps compiled kernels by device: so targets are kept apart

    def get_current_stream(self, device: int) -> int:
        return 0


def _without_ptxas(*args: Any) -> tuple[str, str] | None:
    """Triton asks this for a key, then with a backend and its stages before it compiles."""
    if args:
        args[1]["cubin"] = lambda source, metadata: b""
        return None
    return "without ptxas", hashlib.sha256(b"without ptxas").hexdigest()


def compile_only(function: JITFunction, args: tuple, options: dict[str, Any]) -> Any:
    """Compile a kernel as its launch would.

    Args:
        function: the kernel.
        args: of the launch.
        options: of the launch.

    Returns:
        Triton's compiled kernel.
    """
    return _REAL_RUN(function, *args, grid=None, warmup=True, **options)


_REAL_RUN = JITFunction.run
_decoded: dict[str, tuple[Program, list[Code]]] = {}


def _load(text: str) -> tuple[Program, list[Code]]:
    if text not in _decoded:
        program = parse(text)
        _decoded[text] = program, decode(program)
    return _decoded[text]


def _execute(record: Record, compiled: Any, named: dict[str, Any], grid: Any, change: Change | None, name: str) -> None:
    text = compiled.asm["ptx"]
    program, code = _load(change(name, text) if change else text)
    kinds = compiled.src.signature
    values = [(kinds[key], named[key]) for key in named if kinds.get(key, "constexpr") != "constexpr"]
    pointers = [value for kind, value in values if kind.startswith("*")]
    memory = GlobalMemory(pointers, narrowest(program, "global"))
    addresses = iter(argument.pointer for argument in memory.arguments)
    given = [
        struct.pack("<Q", next(addresses)) if kind.startswith("*") else struct.pack(f"<{FORMATS[kind]}", value)
        for kind, value in values
    ]
    # Triton's own last parameters, scratch memory for instruments, are null.
    names = [parameter for parameter, _, _ in program.parameters]
    parameters = dict(zip(names, [*given, *[bytes(8)] * (len(names) - len(given))], strict=True))
    sizes: Any = grid(named) if callable(grid) else grid
    x, y, z = [*map(int, sizes), 1, 1][:3]
    threads = compiled.metadata.num_warps * 32
    launch = Launch(program, (x, y, z), threads, compiled.metadata.shared, parameters, memory, record, name)
    run(launch, code)


@contextlib.contextmanager
def executed(target: str, change: Change | None = None) -> Iterator[Record]:
    """Within the block, kernels that are launched on CPU tensors are compiled for a card and executed from their PTX.

    Args:
        target: of EXECUTABLE.
        change: (kernel, PTX) -> the PTX that runs instead, to plant faults.

    Yields:
        The record of what ran and what was found.

    Raises:
        RuntimeError: Triton was imported with its interpreter.
    """
    if target not in EXECUTABLE:
        raise UserError(f"cannot execute {target}; choose of {', '.join(EXECUTABLE)}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 leaves no compiler: kernels are executed from PTX without it")
    record = Record()

    def launch(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = compile_only(self, args, options)
        if not warmup:
            bound = inspect.signature(self.fn).bind(*args, **{k: v for k, v in options.items() if k in self.arg_names})
            bound.apply_defaults()
            _execute(record, compiled, dict(bound.arguments), grid, change, self.fn.__name__)
        return compiled

    card = TARGETS[target]
    hook = (triton.knobs.runtime, "add_stages_inspection_hook", _without_ptxas)
    here = (ops, "_interpreting", lambda: True)  # a kernel asked for by name runs on CPU tensors
    before = triton.runtime.driver._active if hasattr(triton.runtime.driver, "_active") else None
    triton.runtime.driver.set_active(_Driver(card))  # type: ignore[arg-type]
    try:
        with as_card(card, torch.Tensor, launch, JITFunction), patched([hook, here]), marked_memory():
            yield record
    finally:
        if before is not None:
            triton.runtime.driver.set_active(before)
