"""What callers promise an op, and how a broken promise is told.

Purpose: `grad_weights` of linear_cross_entropy says beforehand which gradient will come back. If another one comes, the
    gradients computed in the forward are wrong, and that must be an error with a sentence, not a NaN with none.
Principle: the backward knows on its device whether the promise was kept. On a CPU it raises there. On a GPU it raises a
    flag in the device's memory, and `check_promises` reads it later.
Properties: nothing waits for a GPU but `check_promises` itself, one number a device. The flag is a plain operator on one
    tensor, so it works in CUDA graphs. Kernels reach it by the name of the custom op and import nothing from here.
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
    """A loss has another gradient than its caller promised."""


def prepare(device: torch.device) -> None:
    """Make a GPU's flag. A CUDA graph must not make it: its memory, and its zero, would belong to the graph.

    Args:
        device: of the tensors; a CPU needs no flag.
    """
    if device.type != "cpu" and device not in _flags:
        _flags[device] = torch.zeros((), dtype=torch.bool, device=device)


def note_promise(broken: Tensor) -> None:
    """Note on the tensor's device whether a promise was broken.

    Args:
        broken: () bool.

    Raises:
        BrokenPromise: it was, and the tensor is on a CPU.
    """
    if broken.device.type == "cpu":
        if broken:
            raise BrokenPromise(SENTENCE)
        return
    prepare(broken.device)
    _flags[broken.device].logical_or_(broken)


# torch.library.custom_op would do the same, and add 0.1 s to the import of the package.
_library = torch.library.Library("minimind_fast", "FRAGMENT")
_library.define("note_promise(Tensor broken) -> ()")
for _key in ("CPU", "CUDA"):
    _library.impl("note_promise", note_promise, _key)
_library.impl("note_promise", lambda broken: None, "Meta")  # for fake tensors


def check_promises() -> None:
    """Raise if a promise was broken on a GPU since the last call; waits for the GPU.

    Raises:
        BrokenPromise: says what was promised.
    """
    broken = [flag for flag in _flags.values() if flag.item()]
    for flag in broken:
        flag.zero_()
    if broken:
        raise BrokenPromise(SENTENCE)
