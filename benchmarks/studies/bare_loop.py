"""A bare training step: the baseline for measuring DeepSpeed's engine.

Purpose: trains our model with a page of plain PyTorch, as fast as possible.
Principle: bf16 weights with float32 masters, or float32 alone; gradients are summed in float32 in one flat buffer, which
    several ranks reduce in one call; norm clipping; fused AdamW. Learning rates and groups are the Trainer's.
Properties: an optimizer step has the engine's arithmetic, so losses must agree. Nothing is checked, saved or logged; a step
    that is not finite is taken. Its parts can be clocked.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from minimind_fast.data.packing import Batch
from minimind_fast.model import MiniMind
from minimind_fast.training import setup
from minimind_fast.training.config import TrainConfig
from minimind_fast.training.log import Window
from minimind_fast.training.trainer import learning_rate
from minimind_fast.training.zero.engine import param_groups

DOCUMENT = 512  # positions per packed document, or the whole batch if shorter


PHASES = ("forward", "backward", "gradients", "norm, clip", "AdamW", "weights", "clearing", "rest")


class Phases:
    """Exclusive seconds by phase; off by default."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on = device, False
        self.seconds: dict[str, float] = defaultdict(float)
        self._stack: list[str] = []
        self._since = 0.0

    def _turn(self) -> None:
        """Credit the time since the last change to the running phase."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if not self.on:
            yield
            return
        self._turn()
        self._stack.append(phase)
        try:
            yield
        finally:
            self._turn()
            self._stack.pop()

    def wrap(self, owner: Any, name: str, phase: str) -> None:
        """Clock a function of an object or module, if it exists."""
        function = getattr(owner, name, None)
        if function is None:
            return

        @functools.wraps(function)
        def clocked(*args: Any, **kwargs: Any) -> Any:
            with self(phase):
                return function(*args, **kwargs)

        setattr(owner, name, clocked)


class FixedBatches:
    """Micro-batches of one size, the same for every loop; ids are skewed so that there is something to learn."""

    def __init__(self, tokens: int, vocab_size: int, rank: int) -> None:
        self.tokens, self.vocab_size, self.rank, self.made = tokens, vocab_size, rank, 0

    def __iter__(self) -> Iterator[Batch]:
        length = min(DOCUMENT, self.tokens)
        bounds = torch.arange(0, self.tokens + 1, length, dtype=torch.int32)
        while True:
            generator = torch.Generator().manual_seed(1000 * self.made + self.rank)
            self.made += 1
            ids = (torch.rand(self.tokens, generator=generator) ** 4 * self.vocab_size).long()
            yield Batch(ids, ids.roll(-1), bounds, length, self.tokens, bounds.numel() - 1)

    def num_batches(self, epoch: int) -> int:
        return 1 << 30

    def num_left(self) -> int:
        return 1 << 30

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError("never resumed")


class BareLoop:
    """A bare training step, the baseline for the engine.

    Args:
        model: float32, on its device.
        config: dtype, grad_clip, and the optimizer's and schedule's options.
        phases: clocks for the parts of a step.
    """

    def __init__(self, model: MiniMind, config: TrainConfig, phases: Phases) -> None:
        self.module, self.options, self.phases, self.step = model, config, phases, 0
        self.config = model.config  # losses read it from an engine
        self.world_size = dist.get_world_size()
        groups = param_groups(model, config.weight_decay)
        self.weights: list[torch.Tensor] = [p for group in groups for p in group["params"]]
        self.masters: list[torch.Tensor] = self.weights
        if config.dtype == "bfloat16":
            self.masters = [torch.nn.Parameter(p.detach().clone()) for p in self.weights]
            for p in self.weights:  # not the buffers: RoPE tables stay float32
                p.data = p.data.bfloat16()
            of = dict(zip(self.weights, self.masters, strict=True))
            groups = [{**group, "params": [of[p] for p in group["params"]]} for group in groups]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), fused=True)
        # One flat buffer, reduced in a single call; the masters' gradients are views of it.
        self.flat = torch.zeros(sum(p.numel() for p in self.masters), device=self.masters[0].device)
        parts = self.flat.split([p.numel() for p in self.masters])
        self.gradients = [part.view_as(p) for part, p in zip(parts, self.masters, strict=True)]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def train_step(self, group: list[Batch], counted: float, window: Window, total_steps: int) -> None:
        """Like `Trainer.train_step`."""
        phases = self.phases
        lr = learning_rate(self.options, self.step, total_steps)
        for options in self.optimizer.param_groups:
            options["lr"] = lr
        for i, batch in enumerate(group):
            batch = batch.to(self.flat.device, non_blocking=True)
            with phases("forward"):
                out = setup.next_token_loss(self, replace(batch, factor=1.0 / counted))
                loss = out.total / counted
                if out.aux is not None:
                    loss = loss + out.aux / len(group) / self.world_size
            window.add_loss(out, 1.0 / len(group))
            with phases("backward"):
                loss.backward()
            with phases("gradients"), torch.no_grad():
                self._take_gradients(first=i == 0, last=i == len(group) - 1)
        with phases("norm, clip"):
            torch.nn.utils.clip_grad_norm_(self.masters, self.options.grad_clip)
        with phases("AdamW"):
            self.optimizer.step()
        with phases("weights"), torch.no_grad():
            if self.masters is not self.weights:
                torch._foreach_copy_(self.weights, self.masters)
        with phases("clearing"):
            self.optimizer.zero_grad()
        self.step += 1

    def _take_gradients(self, first: bool, last: bool) -> None:
        """Add a micro-batch's gradients in float32, and reduce over the ranks after the last one."""
        if self.masters is not self.weights:
            new = [p.grad for p in self.weights if p.grad is not None]
            if first:
                torch._foreach_copy_(self.gradients, new)
            else:
                torch._foreach_add_(self.gradients, new)
            for p in self.weights:
                p.grad = None
        elif last and self.world_size > 1:
            torch._foreach_copy_(self.gradients, [p.grad for p in self.weights if p.grad is not None])
        if last and self.world_size > 1:
            dist.all_reduce(self.flat)
        if last and (self.masters is not self.weights or self.world_size > 1):
            for p, gradient in zip(self.masters, self.gradients, strict=True):
                p.grad = gradient
