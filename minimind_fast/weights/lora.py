"""LoRA: small trained matrices beside a MiniMind's frozen ones.

Purpose: `apply` puts adapters on chosen projections and freezes the rest; `merge` adds them into the weights;
    `load_adapters` takes them from files, which `adapter_files.py` reads and writes; `minimind-fast lora` does it all with
    files.
Principle: y = W x + (alpha / rank) * B A dropout(x). A (rank, in) is drawn from N(0, 0.02) and B (out, rank) is zero, so
    training starts from the base model. q, k and v share one matmul here, as do gate and up; each still has its own A and
    B, acting on its rows of the fused output, so files fit models with separate projections.
Properties: only A and B are trainable, so the optimizer holds nothing else. Experts and routers get no adapters. An adapted
    module keeps the name of its weight. A merged model is an ordinary one. Adapters remember the base that they were
    trained on, and a merged model the adapters in it: a wrong base or a second merge is refused.

Source: Hu et al., LoRA, 2021; Meng et al., PiSSA, 2024; Büyükakyüz, OLoRA, 2024; initialisation of MiniMind's model_lora.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind_fast.model import INIT_STD, MLP, Attention, MiniMind
from minimind_fast.weights.adapter_files import ATTENTION, TARGETS, LoRA, read_adapters, recorded_base, save_adapters

__all__ = [
    "ATTENTION", "TARGETS", "AdaptedLinear", "Adapter", "LoRA", "Projection", "adapters", "apply", "base_fingerprint",
    "load_adapters", "merge", "read_adapters", "save_adapters",
]  # fmt: skip


class Projection(NamedTuple):
    """One projection as named in files: some rows of a linear layer in memory."""

    name: str  # model.layers.0.self_attn.q_proj
    start: int
    stop: int

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]


class Adapter(nn.Module):
    """B A dropout(x)."""

    def __init__(self, inputs: int, outputs: int, rank: int, dropout: float) -> None:
        super().__init__()
        self.A, self.B = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)
        self.dropout = dropout
        nn.init.normal_(self.A.weight, std=INIT_STD)
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.B(self.A(F.dropout(x, self.dropout, self.training)))


class AdaptedLinear(nn.Linear):
    """A frozen linear layer with adapters on its projections.

    Args:
        base: the layer; its weight is shared, not copied.
        projections: cover all of its rows, in order.
        names: the projections that get adapters.
        lora: hyperparameters of the adapters.
    """

    def __init__(self, base: nn.Linear, projections: list[Projection], names: set[str], lora: LoRA) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.weight, self.bias = (
            base.in_features,
            base.out_features,
            base.weight,
            None,
        )
        self.projections, self.scale = projections, lora.scale
        adapters = {
            p.leaf: Adapter(base.in_features, p.stop - p.start, lora.rank, lora.dropout)
            for p in projections
            if p.name in names
        }
        self.lora = nn.ModuleDict(adapters).to(base.weight.device, base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        parts = [
            self.lora[p.leaf](x) if p.leaf in self.lora else x.new_zeros(*x.shape[:-1], p.stop - p.start)
            for p in self.projections
        ]
        return torch.add(F.linear(x, self.weight), torch.cat(parts, -1), alpha=self.scale)


# ------------------------------------------------------------------------------------------------------------ the model


def _layers(model: MiniMind) -> Iterator[tuple[nn.Module, str, list[Projection]]]:
    """(module, attribute of a linear layer, its projections) for every layer that can have adapters."""
    c = model.config
    assert c.head_dim is not None
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            fused = {"qkv_proj": [("q_proj", q), ("k_proj", kv), ("v_proj", kv)], "o_proj": [("o_proj", c.hidden_size)]}
        elif isinstance(module, MLP) and name.endswith(".mlp"):  # an MoE layer's shared expert has another name
            width = module.down_proj.in_features
            fused = {
                "gate_up_proj": [("gate_proj", width), ("up_proj", width)],
                "down_proj": [("down_proj", c.hidden_size)],
            }
        else:
            continue
        for attribute, sizes in fused.items():
            stops = torch.tensor([size for _, size in sizes]).cumsum(0).tolist()
            yield (
                module,
                attribute,
                [
                    Projection(f"{name}.{leaf}", stop - size, stop)
                    for (leaf, size), stop in zip(sizes, stops, strict=True)
                ],
            )


def apply(model: MiniMind, lora: LoRA) -> list[str]:
    """Add fresh adapters to a model and freeze everything else, in place.

    Args:
        model: must not have adapters yet.
        lora: hyperparameters and target projections.

    Returns:
        Names of the adapted projections.

    Raises:
        ValueError: the model lacks a target, or already has adapters.
    """
    names = []
    for module, attribute, projections in _layers(model):
        inputs = getattr(module, attribute).in_features
        for p in projections:
            square = "square" in lora.targets and p.stop - p.start == inputs
            if p.leaf in lora.targets or square:
                names.append(p.name)
    absent = set(lora.targets) - {"square"} - {name.rpartition(".")[2] for name in names}
    if absent:
        raise ValueError(
            f"this model has no {', '.join(sorted(absent))} for adapters: its feed-forward layers are experts, which LoRA "
            f"leaves alone; choose from {', '.join(ATTENTION)}"
        )
    if not names:
        raise ValueError("this model has no square projection; name the targets")
    model.base_fingerprint = base_fingerprint(model)
    _attach(model, set(names), lora)
    return names


def _attach(model: MiniMind, names: set[str], lora: LoRA) -> None:
    if any(isinstance(module, AdaptedLinear) for module in model.modules()):
        raise ValueError("the model has adapters already: merge them first")
    model.requires_grad_(False)
    for module, attribute, projections in list(_layers(model)):
        if any(p.name in names for p in projections):
            setattr(module, attribute, AdaptedLinear(getattr(module, attribute), projections, names, lora))
    model.train(model.training)


def adapters(model: MiniMind) -> dict[str, tuple[Tensor, Tensor]]:
    """A model's adapters, which must be unsharded on this rank.

    Returns:
        {projection: (A (rank, in), B (out, rank))}.
    """
    found = {}
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            for p in module.projections:
                if p.leaf in module.lora:
                    adapter = module.lora[p.leaf]
                    assert isinstance(adapter, Adapter)
                    found[p.name] = (adapter.A.weight, adapter.B.weight)
    return found


@torch.no_grad()
def merge(model: MiniMind) -> None:
    """Merge the adapters into the weights, in place; the result is an ordinary model that remembers them."""
    model.merged_adapters = (*model.merged_adapters, _adapters_digest(adapters(model)))
    for module, attribute, projections in list(_layers(model)):
        layer = getattr(module, attribute)
        if not isinstance(layer, AdaptedLinear):
            continue
        for p in projections:
            if p.leaf in layer.lora:
                adapter = layer.lora[p.leaf]
                assert isinstance(adapter, Adapter)
                rows = layer.weight[p.start : p.stop]
                # Round once: rounding the product to bfloat16 first would lose what the adapters learned.
                rows.copy_(rows.float() + layer.scale * (adapter.B.weight.float() @ adapter.A.weight.float()))
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = layer.weight
        setattr(module, attribute, plain)
    model.requires_grad_(True)
    model.train(model.training)


# -------------------------------------------------------------------------------------------------------------- on disk


@torch.no_grad()
def load_adapters(model: MiniMind, path: str | Path, any_base: bool = False) -> LoRA:
    """Load adapters from a folder or file onto a model, in place; the rest is frozen.

    Args:
        model: the base model, without adapters.
        path: as for `read_adapters`.
        any_base: load them onto weights that they were not trained on, or a second time.

    Returns:
        Their hyperparameters.

    Raises:
        ValueError: the adapters do not fit this model, were trained on another, or are merged into it already.
    """
    found, lora = read_adapters(path)
    shapes = {
        p.name: (getattr(module, attribute).in_features, p.stop - p.start)
        for module, attribute, projections in _layers(model)
        for p in projections
    }
    absent = sorted(found.keys() - shapes.keys())
    if absent:
        raise ValueError(
            f"{path}: the model has no {', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''} for adapters"
        )
    for name, (a, b) in found.items():
        if (a.shape[1], b.shape[0]) != shapes[name]:
            raise ValueError(
                f"{path}: {name} maps {a.shape[1]} to {b.shape[0]} features, the model's {shapes[name][0]} to "
                f"{shapes[name][1]}: these adapters belong to another model"
            )
    if not any_base:
        _check_base(model, path, found)
    _attach(model, set(found), lora)
    for name, (a, b) in adapters(model).items():
        a.copy_(found[name][0])
        b.copy_(found[name][1])
    if lora.init:
        for module, attribute, projections in _layers(model):
            for p in projections:
                if p.name in found:
                    rows = getattr(module, attribute).weight[p.start : p.stop]
                    rows.copy_(rows.float() - _start(rows.float(), lora))
    return lora


def _start(weight: Tensor, lora: LoRA) -> Tensor:
    """What PiSSA or OLoRA took out of a weight (out, in): its first `rank` singular parts, or columns of its QR."""
    r = lora.rank
    if lora.init == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        return (u[:, :r] * s[:r]) @ vh[:r]  # the scale cancels: S / scale is split over A and B
    q, upper = torch.linalg.qr(weight)
    return lora.scale * q[:, :r] @ upper[:r]


def _check_base(model: MiniMind, path: str | Path, found: dict[str, tuple[Tensor, Tensor]]) -> None:
    if _adapters_digest(found) in model.merged_adapters:
        raise ValueError(f"{path}: these adapters are merged into this model already; --any_base adds them once more")
    name, recorded = recorded_base(path)
    if recorded and not set(recorded.split()) & set(base_fingerprint(model).split()):
        named = f" ({name})" if name else ""
        raise ValueError(
            f"{path}: these adapters were trained on other weights{named} than this model's: another model, one trained "
            "further, or one with adapters merged already; name their base, or add --any_base"
        )


def base_fingerprint(model: MiniMind) -> str:
    """Two digests of a model's weights without adapters, equal where bfloat16 or float16 holds the same: a base that was
    exported in half precision is still the same base."""
    weights = [t for name, t in sorted(model.state_dict().items()) if ".lora." not in name]
    if any(t.is_meta for t in weights):
        return ""
    return " ".join(_digest(weights, dtype) for dtype in (torch.bfloat16, torch.float16))


def _adapters_digest(found: dict[str, tuple[Tensor, Tensor]]) -> str:
    return _digest(tensor for _, pair in sorted(found.items()) for tensor in pair)


def _digest(tensors: Iterable[Tensor], dtype: torch.dtype = torch.float16) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().to(dtype).contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
