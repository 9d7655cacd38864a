"""What the model calls, and the one place that decides which implementation runs.

Purpose: `ops.rms_norm(...)` and its siblings; `ops.use("none")` switches every Triton kernel off, `ops.use("swiglu")`
    switches that one on and all others off: a difference in a run is traced by switching one op at a time.
Principle: each op has a record (`records/<op>.py`) with a reference, perhaps a function of the CPU's own, and a kernel of
    the same signature. `use` fills a table of modes; a call is one look-up. No op is named here.
Properties: `auto` takes a kernel where the tensor is on a GPU; elsewhere the CPU's own function, or else the reference. A
    kernel asked for by name that cannot run is an error, never a silent fallback. With TRITON_INTERPRET=1 kernels asked
    for by name run on a CPU. Triton is imported when a kernel is first called. Imports kernels by name, and the config.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minimind_fast.config import IGNORE_INDEX
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
# Tables and not functools.cache, which torch.compile would look through.
_cpu_functions = {name: op.cpu_function() for name, op in OPS.items()}
_loaded: dict[str, Callable] = {}


def kernel(name: str) -> Callable:
    """The Triton implementation of an op; Triton is imported by the first call, not before.

    Args:
        name: one of NAMES.
    """
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
        raise ValueError(
            f"unknown kernel {', '.join(unknown) or repr(spec)}; choose auto, all, none or of {', '.join(NAMES)}"
        )
    return {name: "kernel" if name in asked else "reference" for name in NAMES}


_modes: dict[str, str] = _read(os.environ.get("MINIMIND_KERNELS") or "auto")


class use:
    """Choose implementations from now on, or within a `with` block.

    Args:
        spec: "auto", "all", "none", or op names joined by commas (those by kernel, all others by reference).

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
    """Which implementation an op has on a device, and why.

    Args:
        name: one of NAMES.
        device_type: "cuda" or "cpu".

    Returns:
        The function, and the reason for the log.

    Raises:
        ValueError: a kernel asked for by name cannot run there.
    """
    mode, op = _modes[name], OPS[name]
    if mode == "reference":
        return op.reference, "reference: switched off"
    if mode == "auto" and device_type != "cuda":
        own = _cpu_functions[name]
        return (own, f"chunks: on {device_type}") if own else (op.reference, f"reference: on {device_type}")
    if mode == "auto" and op.needs == "ampere" and before_ampere():
        return op.reference, "reference: its dots find no tensor cores on this GPU"
    if mode == "auto":
        return kernel(name), "kernel: on a GPU"
    if device_type != "cuda" and not _interpreting():
        raise ValueError(
            f"the {name} kernel was asked for but the tensors are on {device_type}: "
            "use --kernels auto, or set TRITON_INTERPRET=1 before Python starts to run it in the interpreter"
        )
    return kernel(name), "kernel: asked for" + ("" if device_type == "cuda" else " (interpreter)")


def describe(device_type: str) -> dict[str, str]:
    """Which implementation each op has on such a device, and why; for the log.

    Args:
        device_type: "cuda" or "cpu".

    Raises:
        ValueError: a kernel asked for by name cannot run there.
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
    """Rows of a table; its gradient is exact on every device. There is no kernel of ours, hence no switch.

    Args:
        ids: (...) int64.
        weight: (V, D).

    Returns:
        (..., D).
    """
    inexact = weight.device.type == "cpu" and weight.dtype.itemsize == 2
    return (fused.embedding if inexact else torch.nn.functional.embedding)(ids, weight)
