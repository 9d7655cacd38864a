"""Muon for the hidden matrices, AdamW for embedding, head, router and norms: `--optimizer muon`.

Purpose: `Muon(model, ...)`, an optimizer that DeepSpeed can wrap under every ZeRO stage, however it cuts the parameters.
Principle: the momentum's nearest orthogonal matrix is the step, so that it is equally long in every direction:
        m += (1 - mu) (g - m);  u = g + mu (m - g);  W -= lr (decay W + 0.2 sqrt(max(rows, columns)) U V^T),  u = U S V^T
    U V^T comes from five Newton-Schulz steps, which bring all but tiny singular values to 0.7-1.2. The factor gives it the
    root mean square of AdamW's, so that one --learning_rate serves both. Decay is decoupled, as AdamW's.
Properties: q, k, v, gate and up are matrices of their own although fused in one parameter, and so is each expert; those of
    one shape are multiplied as a batch. Momentum and masters are float32; Newton-Schulz runs in bfloat16 where the run's
    precision is 16 bits and the hardware multiplies it. `grad_scale` and `found_inf` are those of PyTorch's fused AdamW:
    neither clipping nor skipping asks the device. State: one momentum a weight, as "exp_avg"; "exp_avg_sq" is one zero in
    the weight's shape, because DeepSpeed's converter to another number of ranks knows AdamW's names only.

DeepSpeed 0.19 has a Muon of its own (`runtime/zero/muon`). It takes each parameter as one matrix, or as heads of equal size,
    so that q, k and v of unequal size or gate and up cannot be told apart; refuses stacked experts in bf16 at stage 1; clips
    the orthogonal update, not the gradient, and reports that norm, everywhere but there and at stage 0; keeps its momentum
    under a name that the converter does not find; and scales by sqrt(rows / columns), which needs another learning rate.

Source: Jordan, Muon: An optimizer for hidden layers in neural networks, 2024 (the iteration and its coefficients); Liu et
    al., Muon is scalable for LLM training, 2025 (the factor, and decay).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minimind_fast import ops
from minimind_fast.errors import UserError
from minimind_fast.model import MLP, Attention, Experts, MiniMind
from minimind_fast.training.optimizers.shares import Held, Matrix, Shares

MOMENTUM = 0.95
STEPS = 5
# a s + b s^3 + c s^5 lifts small singular values as fast as it can without leaving 0.7-1.2 at the large ones.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
RMS = 0.2  # of AdamW's updates


class Place(NamedTuple):
    """Where a part of a parameter lies in a tensor that the optimizer is given.

    Attributes:
        parameter: the model's.
        start: the part's first element in it.
        numel: elements of the part.
        master: the float32 tensor.
        offset: the part's first element in that.
    """

    parameter: Tensor
    start: int
    numel: int
    master: Tensor
    offset: int


def matrices(model: nn.Module) -> dict[Tensor, list[tuple[int, int]]]:
    """The trained hidden matrices: parameter -> (rows, columns) of each matrix in it, in the order of memory.

    Args:
        model: a MiniMind; embedding, head, router and norms are left out.
    """
    found: dict[Tensor, list[tuple[int, int]]] = {}
    for module in model.modules():
        if isinstance(module, Attention):
            qkv, o = module.qkv_proj, module.o_proj
            kv = (qkv.out_features - o.in_features) // 2
            found[qkv.weight] = [(rows, qkv.in_features) for rows in (o.in_features, kv, kv)]
            found[o.weight] = [(o.out_features, o.in_features)]
        elif isinstance(module, MLP):
            hidden, width = module.down_proj.out_features, module.down_proj.in_features
            found[module.gate_up_proj.weight] = [(width, hidden)] * 2
            found[module.down_proj.weight] = [(hidden, width)]
        elif isinstance(module, Experts):
            count, hidden, width = module.down.shape
            found[module.gate_up] = [(width, hidden)] * (2 * count)
            found[module.down] = [(hidden, width)] * count
    return {parameter: shapes for parameter, shapes in found.items() if parameter.requires_grad}


def orthogonalise(batch: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring the singular values of matrices to about 1 by Newton-Schulz steps.

    Args:
        batch: (N, rows, columns) float32, rows <= columns. Zeros stay zeros.
        dtype: to multiply in.

    Returns:
        The same shape, float32.
    """
    a, b, c = COEFFICIENTS
    x = (batch / (batch.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(STEPS):
        gram = ops.symmetric_product(x)
        x = torch.baddbmm(x, ops.symmetric_product(gram, gram, c, b), x, beta=a)
    return x.float()


def updates(found: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Muon's updates of whole matrices, before the learning rate.

    Args:
        found: (rows, columns) float32, the momentum with Nesterov's look ahead.
        dtype: to multiply in.
    """
    out: list[Tensor] = [torch.empty(0)] * len(found)
    sides = [tuple(sorted(matrix.shape)) for matrix in found]
    for shape in sorted(set(sides)):
        alike = [i for i, side in enumerate(sides) if side == shape]
        turned = [found[i].shape[0] > found[i].shape[1] for i in alike]
        batch = torch.stack([found[i].T if t else found[i] for i, t in zip(alike, turned, strict=True)])
        factor = RMS * max(shape) ** 0.5
        for i, t, update in zip(alike, turned, orthogonalise(batch, dtype) * factor, strict=True):
            out[i] = update.T if t else update
    return out


class Muon(torch.optim.AdamW):
    """AdamW whose last group takes Muon's steps.

    Args:
        model: any MiniMind whose hidden matrices are trained.
        weight_decay: coefficient for matrices; norms do not decay.
        betas: AdamW's, for the rest.
        dtype: for Newton-Schulz.
        device: where matrices are whole.

    Raises:
        UserError: the model's hidden matrices are frozen.
    """

    def __init__(
        self,
        model: MiniMind,
        weight_decay: float,
        betas: tuple[float, float],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        found = matrices(model)
        if not found:
            raise UserError("--optimizer muon needs whole matrices to train, and these are frozen: leave it out")
        rest = [p for p in model.parameters() if p.requires_grad and p not in found]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in rest if p.dim() > 1], "weight_decay": weight_decay, "muon": False},
            {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0, "muon": False},
            {"params": list(found), "weight_decay": weight_decay, "muon": True},
        ]
        # DeepSpeed may step once inside initialize(); lr=0 makes that a no-op.
        super().__init__([g for g in groups if g["params"]], lr=0.0, betas=betas, fused=True)
        self._dtype, self._device = dtype, device
        numels = [p.numel() for p in found]
        self._begin = dict(zip(found, itertools.accumulate([0, *numels[:-1]]), strict=True))
        shapes = [shape for each in found.values() for shape in each]
        ends = itertools.accumulate([0, *(rows * columns for rows, columns in shapes)])
        self._matrices = [Matrix(begin, *shape) for begin, shape in zip(ends, shapes, strict=False)]
        self._places: Mapping[Tensor, list[Place]] | None = None
        self._shares: dict[tuple[int, ...], Shares] = {}

    def place(self, places: Iterable[Place]) -> None:
        """Note where DeepSpeed has put this rank's parts of the matrices; steps before take no effect on them.

        Args:
            places: of any parameters; those of AdamW are left out.
        """
        self._places = {}
        for place in places:
            if place.parameter in self._begin:
                self._places.setdefault(place.master, []).append(place)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step; under several ranks all of them call it."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            masters = [p for p in group["params"] if p.grad is not None]
            if group["muon"] and masters and self._places is not None:
                self._step_matrices(masters, group["lr"], group["weight_decay"])
        return loss

    def _step_matrices(self, masters: list[Tensor], lr: float, weight_decay: float) -> None:
        scale, skip = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        taken = 1.0 if skip is None else 1.0 - skip
        ahead = []
        for master in masters:
            assert master.grad is not None
            grad = master.grad if scale is None else master.grad / scale
            if skip is not None:
                grad = torch.where(skip > 0, 0.0, grad)  # so that nothing below is nan
            state = self._state_of(master)
            state["step"] += taken
            ahead.append(grad.lerp(state["exp_avg"].lerp_(grad, (1 - MOMENTUM) * taken), MOMENTUM))
        found = self._shared(masters).map(lambda whole: updates(whole, self._dtype), ahead)
        for master, update in zip(masters, found, strict=True):
            master.mul_(1 - lr * weight_decay * taken).sub_(update * (lr * taken))

    def _state_of(self, master: Tensor) -> dict[str, Tensor]:
        state = self.state[master]
        if not state:
            zero = torch.zeros((), device=master.device)
            state.update(step=zero.clone(), exp_avg=torch.zeros_like(master), exp_avg_sq=zero.expand_as(master))
        return state

    def _shared(self, masters: list[Tensor]) -> Shares:
        """How the matrices in these masters are shared; ZeRO 3 may step through them in several calls."""
        key = tuple(map(id, masters))
        if key not in self._shares:
            assert self._places is not None
            held = [
                Held(self._begin[place.parameter] + place.start, place.numel, i, place.offset)
                for i, master in enumerate(masters)
                for place in self._places.get(master, [])
            ]
            self._shares[key] = Shares(self._matrices, held, self._device)
        return self._shares[key]
