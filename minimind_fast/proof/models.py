"""Whole models, reduced to a few layers: kernels on against kernels off.

Purpose: shows that the ops work together inside a model.
Principle: log-probabilities and gradients with one kernel on, then with all, compared with float64 by the norm rule.
Properties: rounding decides near ties between experts, so every run is forced to the eager run's experts, and the choices
    that differed are counted.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from minimind_fast import ops
from minimind_fast.config import IGNORE_INDEX, ModelConfig
from minimind_fast.model import MiniMind
from minimind_fast.ops import precision
from minimind_fast.ops.cases import Draw
from minimind_fast.proof.rule import NORM_FACTOR, compare


def _cut_model(preset: str, on_gpu: bool, dtype: torch.dtype, device: str) -> tuple[MiniMind, dict[str, Any]]:
    """Two layers of a model and a packed batch; vocabulary, ffn and batch are small for the interpreter."""
    sizes = {} if on_gpu else {"vocab_size": 320, "intermediate_size": 128}
    config = ModelConfig.preset(preset, num_hidden_layers=2, max_position_embeddings=2048, **sizes)
    lengths = [700, 1, 1300, 47] if on_gpu else [7, 1, 6]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MiniMind(config).to(device, dtype).train()
    draw = Draw(dtype, device)
    tokens = sum(lengths)
    batch = {
        "input_ids": draw.integers(0, config.vocab_size, tokens),
        "targets": draw.targets(config.vocab_size, tokens, 0.2),
        "cu_seqlens": torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32),
        "max_seqlen": max(lengths),
    }
    return model, batch


class SameExperts:
    """Records a run's experts, then forces later runs to them and counts the choices that differed."""

    def __init__(self) -> None:
        self.recorded: list[Tensor] = []
        self.recording, self.at, self.differed = True, 0, 0
        self._real = ops.moe_route

    def __enter__(self) -> SameExperts:
        ops.moe_route = self._route
        return self

    def __exit__(self, *_: object) -> None:
        ops.moe_route = self._real

    def replay(self) -> None:
        """Force the next run to the record; call before each run."""
        self.recording, self.at, self.differed = False, 0, 0

    def _route(self, x, gate_weight, top_k, normalize, cu_seqlens=None, valid=None):
        routing = self._real(x, gate_weight, top_k, normalize, cu_seqlens, valid)
        if self.recording:
            self.recorded.append(routing.experts)
            return routing
        experts = self.recorded[self.at]
        self.at += 1
        differed = int((experts != routing.experts).sum())
        self.differed += differed
        if not differed:
            return routing
        weights = routing.scores.gather(1, experts.long())
        if normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        order = experts.flatten().argsort(stable=True)
        counts = experts.flatten().bincount(minlength=gate_weight.shape[0]).int()
        plan = {"experts": experts, "counts": counts, "order": order.int(), "inverse": order.argsort().int()}
        return ops.Routing(weights=weights, **plan, aux_loss=routing.aux_loss, scores=routing.scores)


def check_model(preset: str, dtype: torch.dtype, device: str, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Compare a reduced model with kernels on and off: each op alone, then all.

    Args:
        preset: one of MODELS.
        dtype: dtype of the parameters.
        device: "cpu" (under the interpreter) or "cuda".
        names: ops to switch on.

    Yields:
        Rows for the report.
    """
    model, batch = _cut_model(preset, device == "cuda", dtype, device)
    wide = _cut_model(preset, device == "cuda", dtype, device)[0].double()
    called = [name for name in names if ops.OPS[name].in_forward and ops.OPS[name].preset_case(preset, 1)]

    def run(net: MiniMind, kernels: str) -> tuple[Tensor, Tensor]:
        net.zero_grad(set_to_none=True)
        with ops.use(kernels):
            out = net(**batch)
            loss = -out.logprobs.sum() / (batch["targets"] != IGNORE_INDEX).sum() + out.aux_loss
            loss.backward()
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        return out.logprobs.detach(), torch.cat([g.detach().flatten() for g in grads])

    with precision.exact_matmuls(), SameExperts() as experts:
        off = run(model, "none")
        experts.replay()
        truth = run(wide, "none")
        counted = int((batch["targets"] != IGNORE_INDEX).sum())
        for kernels in [*called, ",".join(called)] if len(called) > 1 else called:
            experts.replay()
            on = run(model, kernels)
            # The norm of n random errors fluctuates by about 1 / sqrt(n): a lot for a few dozen tokens.
            rows = {
                key: compare(a, b, c, norm_factor=NORM_FACTOR + 3 * a.numel() ** -0.5)
                for key, a, b, c in zip(("logprobs", "gradients"), on, off, truth, strict=True)
            }
            yield {
                "op": kernels if kernels in called else "all",
                "case": f"model {preset}",
                "results": rows,
                "loss_difference": ((on[0] - off[0]).double().sum() / counted).abs().item(),
                "gradient_difference": ((on[1] - off[1]).double().norm() / off[1].double().norm()).item(),
                "expert_choices_that_differed": experts.differed,
            }
