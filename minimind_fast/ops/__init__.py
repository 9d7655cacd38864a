"""What the model calls, and the one place that decides which implementation runs.

Purpose: `ops.rms_norm(...)` and its siblings; `ops.use("none")` switches every Triton kernel off, `ops.use("swiglu")`
    switches that one on and all others off, and so on: a difference in a run is traced by switching one op at a time.
Principle: each op has a reference (`reference.<op>`) and a kernel (`kernels/<file>.<op>`) with the same signature.
    The choice is a table filled by `use`; a call is one look-up.
Properties: `auto` takes a kernel where the tensor is on a GPU; elsewhere what `cpu_ops.py` has, or else the reference. A
    kernel asked for by name that cannot run is an error, never a silent fallback. With TRITON_INTERPRET=1 kernels asked
    for by name run on a CPU.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minimind_fast.ops import reference
from minimind_fast.ops.attention import attention
from minimind_fast.ops.cpu import fused as cpu_ops
from minimind_fast.ops.precision import before_ampere
from minimind_fast.ops.reference import IGNORE_INDEX, Routing

__all__ = ["IGNORE_INDEX", "Routing", "attention", "describe", "embedding", "use", "NAMES"]

# op -> the file in kernels/ that holds it. To add a kernel: one file there, one entry here, one in reference.py, one in
# verify.py.
_FILES = {
    "rms_norm": "rms_norm",
    "rope": "rope",
    "swiglu": "swiglu",
    "linear_cross_entropy": "linear_cross_entropy",
    "linear_kl": "linear_kl",
    "moe_route": "moe_route",
    "moe_mlp": "moe_mlp",
}
NAMES = tuple(_FILES)


_loaded: dict[str, Callable] = {}  # a table and not functools.cache, which torch.compile would look through


def kernel(name: str) -> Callable:
    """The Triton implementation of an op; Triton is imported by the first call, not before.

    Args:
        name: one of NAMES.
    """
    if name not in _loaded:
        _loaded[name] = getattr(importlib.import_module(f"minimind_fast.kernels.{_FILES[name]}"), name)
    return _loaded[name]


_NEEDS_AMPERE = ("moe_route", "moe_mlp")  # compiled for a T4 they spill 4 to 14 KB a thread


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


def _choose(name: str, device_type: str) -> tuple[Callable, str]:
    mode = _modes[name]
    plain = getattr(reference, name)
    if mode == "reference":
        return plain, "reference: switched off"
    if mode == "auto" and device_type != "cuda":
        chunked = getattr(cpu_ops, name, None)
        return (chunked, f"chunks: on {device_type}") if chunked else (plain, f"reference: on {device_type}")
    if mode == "auto" and name in _NEEDS_AMPERE and before_ampere():
        return plain, "reference: its dots find no tensor cores on this GPU"
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
    return {name: _choose(name, device_type)[1] for name in NAMES}


def _dispatch(name: str) -> Callable:
    def call(first: Any, *args: Any, **kwargs: Any):
        return _choose(name, first.device.type)[0](first, *args, **kwargs)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = getattr(reference, name).__doc__
    return call


rms_norm = _dispatch("rms_norm")
rope = _dispatch("rope")
swiglu = _dispatch("swiglu")
linear_cross_entropy = _dispatch("linear_cross_entropy")
linear_kl = _dispatch("linear_kl")
moe_route = _dispatch("moe_route")
moe_mlp = _dispatch("moe_mlp")


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of a table; its gradient is exact on every device. There is no kernel of ours, hence no switch.

    Args:
        ids: (...) int64.
        weight: (V, D).

    Returns:
        (..., D).
    """
    inexact = weight.device.type == "cpu" and weight.dtype.itemsize == 2
    return (cpu_ops.embedding if inexact else torch.nn.functional.embedding)(ids, weight)
