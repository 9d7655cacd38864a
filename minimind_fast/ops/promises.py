"""What callers promise an op, and how a broken promise is reported.

Purpose: `grad_weights` of linear_cross_entropy announces the incoming gradient. If a different one arrives, the gradients
    computed in the forward are wrong: this must be a clear error, not an unexplained NaN.
Principle: the backward checks the promise on its device. On a CPU it raises at once. On a GPU it sets a flag in the
    device's memory, which `check_promises` reads later.
Properties: only `check_promises` waits for a GPU, for one number a device. Setting the flag is a plain operator on one
    tensor, so it works in CUDA graphs. Kernels call the custom op by name and import nothing from here.
"""

from __future__ import annotations

import torch
from torch import Tensor

SENTENCE = (
    "the gradient that came back to linear_cross_entropy is not the one promised by grad_weights: "
    "the loss must be one number times the sum of grad_weights times log-probabilities; leave grad_weights out"
)

_flags: dict[torch.device, Tensor] = {}  # device -> () bool: a promise was broken there


class BrokenPromise(RuntimeError):
    """A loss's gradient is not the one that its caller promised."""


def prepare(device: torch.device) -> None:
    """Allocate a GPU's flag, before any CUDA graph is captured: else its memory and its zero belong to the graph.

    Args:
        device: where the tensors are; a CPU needs no flag.
    """
    if device.type != "cpu" and device not in _flags:
        _flags[device] = torch.zeros((), dtype=torch.bool, device=device)


def note_promise(broken: Tensor) -> None:
    """Record on the tensor's device whether a promise was broken.

    Args:
        broken: () bool.

    Raises:
        BrokenPromise: `broken` is true and on a CPU.
    """
    if broken.device.type == "cpu":
        if broken:
            raise BrokenPromise(SENTENCE)
        return
    prepare(broken.device)
    _flags[broken.device].logical_or_(broken)


# torch.library.custom_op does the same but adds 0.1 s to the package's import.
_library = torch.library.Library("minimind_fast", "FRAGMENT")
_library.define("note_promise(Tensor broken) -> ()")
for _key in ("CPU", "CUDA"):
    _library.impl("note_promise", note_promise, _key)
_library.impl("note_promise", lambda broken: None, "Meta")  # for fake tensors


def check_promises() -> None:
    """Raise BrokenPromise if a promise was broken on a GPU since the last call; waits for the GPU."""
    broken = [flag for flag in _flags.values() if flag.item()]
    for flag in broken:
        flag.zero_()
    if broken:
        raise BrokenPromise(SENTENCE)
