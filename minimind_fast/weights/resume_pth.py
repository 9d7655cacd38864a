"""The optimizer in MiniMind's `*_resume.pth`: AdamW's moments by our parameters' names.

Purpose: `read_adamw(path, model)` for --with_optimizer, which goes on with a run that MiniMind began.
Principle: the file numbers its moments in the order of the model's parameters, which is the order of its weights without the
    second name of a tied head. Moments are fused as weights are: as tensors by MiniMind's names, copied into a model.
Properties: refused by name where numbers, shapes or kinds do not fit. Its step counts micro-batches of an epoch; AdamW's own
    step counts optimizer steps, and is what a run goes on from. Packed data has no counterpart of the place in the epoch.

Source: `lm_checkpoint` in MiniMind's trainer/trainer_utils.py, for the file's fields; torch.optim.AdamW, for the state's.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimind_fast.errors import UserError
from minimind_fast.model import MiniMind
from minimind_fast.weights.checkpoint import load_disk_weights
from minimind_fast.weights.pth import EMBEDDING, HEAD, weights_in

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class AdamWState:
    """Where an AdamW stood.

    Attributes:
        step: optimizer steps so far.
        epoch: the epoch it was in, from 0.
        moments: (exp_avg, exp_avg_sq) float32 by our parameters' names, in their shapes.
    """

    step: int
    epoch: int
    moments: dict[str, tuple[Tensor, Tensor]]


def holds_optimizer(path: str | Path) -> bool:
    """Whether a file is called as MiniMind calls those that hold an optimizer."""
    return Path(path).is_file() and Path(path).name.endswith("_resume.pth")


def read_adamw(path: str | Path, model: MiniMind) -> AdamWState:
    """Read the optimizer of a `*_resume.pth`.

    Args:
        path: the file.
        model: made from its weights; every parameter is trained.

    Raises:
        UserError: the file holds no AdamW of this model.
    """
    where = f"--with_optimizer: {path}"
    try:
        raw = torch.load(path, "cpu", weights_only=True)
        state, groups = raw["optimizer"]["state"], raw["optimizer"]["param_groups"]
        numbers = [number for group in groups for number in group["params"]]
        weights: dict[str, Any] = weights_in(raw)
    except Exception as error:  # torch's own kinds, and whatever the file lacks
        raise UserError(f"{where} holds no model with its optimizer: {type(error).__name__} {error}") from None
    tied = model.config.tie_word_embeddings
    names = [
        n
        for n in weights
        if not re.search(r"freqs_(cos|sin)$", n) and not (tied and n == HEAD and EMBEDDING in weights)
    ]
    if len(names) != len(numbers) or set(numbers) != set(state):
        raise UserError(f"{where}: {len(state)} states and {len(numbers)} numbers for {len(names)} parameters")
    halves: list[dict[str, Tensor]] = []
    for moment in _MOMENTS:
        found = {name: state[number].get(moment) for name, number in zip(names, numbers, strict=True)}
        wrong = next((n for n, t in found.items() if t is None or t.shape != weights[n].shape), None)
        if wrong is not None:
            raise UserError(
                f"{where}: {wrong} has no {moment} of its shape; AdamW's state of another model, or not AdamW's"
            )
        shadow = copy.deepcopy(model).float()
        with torch.no_grad():
            load_disk_weights(shadow, found, str(path))
        halves.append({name: p.detach() for name, p in shadow.named_parameters()})
    steps = {int(s["step"]) for s in state.values()}
    if len(steps) != 1:
        raise UserError(f"{where}: its parameters are at different steps, {sorted(steps)}")
    return AdamWState(steps.pop(), int(raw.get("epoch", 0)), {n: (halves[0][n], halves[1][n]) for n in halves[0]})
