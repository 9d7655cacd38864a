"""The ops that the model calls, and the one place that decides which implementation runs.

Purpose: `ops.rms_norm(...)` and its siblings; `ops.use("none")` turns every Triton kernel off, `ops.use("swiglu")` turns
    on that one alone: switch one op at a time to trace a difference between runs.
Principle: each op has a record (`records/<op>.py`) with a reference, an optional CPU function, and a kernel of the same
    signature. `use` fills a table of modes; a call is one look-up. No op is named here.
Properties: `auto` runs the kernel on a GPU; elsewhere the CPU function, or else the reference. A kernel requested by name
    that cannot run is an error, never a silent fallback. With TRITON_INTERPRET=1, kernels requested by name run on a CPU.
    Triton is imported when a kernel is first called. Imports kernels by name, and the config.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minimind_fast.config import IGNORE_INDEX
from minimind_fast.errors import UserError
from minimind_fast.ops import registry
from minimind_fast.ops.attention import attention
from minimind_fast.ops.cpu import fused
from minimind_fast.ops.precision import before_ampere
from minimind_fast.ops.promises import BrokenPromise, check_promises, prepare
from minimind_fast.ops.routing import Routing

__all__ = [
    "IGNORE_INDEX",
    "NAMES",
    "OPS",
    "BrokenPromise",
    "Routing",
    "attention",
    "check_promises",
    "choose",
    "describe",
    "embedding",
    "kernel",
    "use",
]

OPS = registry.load()
NAMES = tuple(OPS)
# Tables, not functools.cache: torch.compile would trace through the cache.
_cpu_functions = {name: op.cpu_function() for name, op in OPS.items()}
_loaded: dict[str, Callable] = {}


def kernel(name: str) -> Callable:
    """The Triton implementation of an op (one of NAMES); the first call imports Triton."""
    if name not in _loaded:
        _loaded[name] = OPS[name].kernel()
    return _loaded[name]


def _read(spec: str) -> dict[str, str]:
    """'auto' | 'all' | 'none' | 'a,b' -> {op: 'auto' | 'kernel' | 'reference'}."""
    if spec in ("auto", "all", "none"):
        mode = {"auto": "auto", "all": "kernel", "none": "reference"}[spec]
        return dict.fromkeys(NAMES, mode)
    asked = [part.strip() for part in spec.split(",") if part.strip()]
    unknown = [part for part in asked if part not in NAMES]
    if unknown or not asked:
        raise UserError(
            f"unknown kernel {', '.join(unknown) or repr(spec)}; choose auto, all, none or any of {', '.join(NAMES)}"
        )
    return {name: "kernel" if name in asked else "reference" for name in NAMES}


_modes: dict[str, str] = _read(os.environ.get("MINIMIND_KERNELS") or "auto")


class use:
    """Choose implementations from now on, or within a `with` block.

    Args:
        spec: "auto", "all", "none", or op names joined by commas (those run as kernels, all others as references).

    Raises:
        ValueError: an unknown name; the message lists the names.
    """

    def __init__(self, spec: str) -> None:
        global _modes
        self._before, _modes = _modes, _read(spec)

    def __enter__(self) -> use:
        return self

    def __exit__(self, *_: object) -> None:
        global _modes
        _modes = self._before


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def choose(name: str, device_type: str) -> tuple[Callable, str]:
    """Which implementation of an op runs on a device, and why.

    Args:
        name: one of NAMES.
        device_type: "cuda" or "cpu".

    Returns:
        The function, and the reason for the log.

    Raises:
        ValueError: a kernel requested by name cannot run there.
    """
    mode, op = _modes[name], OPS[name]
    if mode == "reference":
        return op.reference, "reference: switched off"
    if mode == "auto" and device_type != "cuda":
        own = _cpu_functions[name]
        return (own, f"chunks: on {device_type}") if own else (op.reference, f"reference: on {device_type}")
    if mode == "auto" and op.needs == "ampere" and before_ampere():
        return op.reference, "reference: this GPU has no tensor cores for the kernel's matmuls"
    if mode == "auto":
        return kernel(name), "kernel: on a GPU"
    if device_type != "cuda" and not _interpreting():
        raise UserError(
            f"the {name} kernel was asked for but the tensors are on {device_type}: "
            "use --kernels auto, or set TRITON_INTERPRET=1 before Python starts to run it in the interpreter"
        )
    return kernel(name), "kernel: asked for" + ("" if device_type == "cuda" else " (interpreter)")


def describe(device_type: str) -> dict[str, str]:
    """Which implementation of each op runs on a device, and why; for the log.

    Args:
        device_type: "cuda" or "cpu".

    Raises:
        ValueError: a kernel requested by name cannot run there.
    """
    if device_type == "cuda" and torch.cuda.is_initialized():
        prepare(torch.device("cuda", torch.cuda.current_device()))  # before any CUDA graph is captured
    return {name: choose(name, device_type)[1] for name in NAMES}


def _dispatch(name: str) -> Callable:
    def call(first: Any, *args: Any, **kwargs: Any):
        return choose(name, first.device.type)[0](first, *args, **kwargs)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = OPS[name].reference.__doc__
    return call


if TYPE_CHECKING:

    def __getattr__(name: str) -> Callable[..., Any]: ...  # ops.<name> of each record
else:
    globals().update({name: _dispatch(name) for name in NAMES})


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Look up rows of a table, with an exact gradient on every device; it has no kernel and so no switch.

    Args:
        ids: (...) int64.
        weight: (V, D).

    Returns:
        (..., D).
    """
    inexact = weight.device.type == "cpu" and weight.dtype.itemsize == 2
    return (fused.embedding if inexact else torch.nn.functional.embedding)(ids, weight)
