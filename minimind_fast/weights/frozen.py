"""Frozen models: a reference, a teacher, a judge.

Purpose: `frozen(model, device, dtype)` copies a model as it is now, `frozen(path, device, dtype)` loads another one.
Principle: frozen models run in the precision of the model being trained, without gradients or optimizer state.
Properties: in evaluation mode; the given model is not modified.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from minimind_fast.model import MiniMind
from minimind_fast.weights.checkpoint import load_pretrained


def frozen(
    source: MiniMind | str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> MiniMind:
    """A model without gradients, in evaluation mode.

    Args:
        source: a model, which is copied, or a folder with weights.
        device: device of the weights.
        dtype: dtype of the weights; None: unchanged.

    Raises:
        ValueError: the weights cannot be read; says what to do.
    """
    if isinstance(source, MiniMind):
        model = copy.deepcopy(source).to(device, dtype)
    else:
        model = load_pretrained(source, device=device, dtype=dtype)
    return model.requires_grad_(False).eval()
