"""LoRA: small trained matrices beside a MiniMind's frozen ones.

Purpose: `apply` puts adapters on chosen projections and freezes the rest; `save_adapters` and `load_adapters` store them in
    PEFT's format or MiniMind's `.pth`; `merge` adds them into the weights; `minimind-fast lora` does it with files.
Principle: y = W x + (alpha / rank) * B A dropout(x). A (rank, in) is drawn from N(0, 0.02) and B (out, rank) is zero, so
    training starts from the base model. q, k and v share one matmul here, as do gate and up; each still has its own A and
    B, acting on its rows of the fused output, so files fit models with separate projections.
Properties: only A and B are trainable, so the optimizer holds nothing else. Experts and routers get no adapters. An adapted
    module keeps the name of its weight. A merged model is an ordinary one.

Source: Hu et al., LoRA, 2021; file format of Hugging Face PEFT; initialisation and `.pth` of MiniMind's model_lora.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minimind_fast.errors import UserError
from minimind_fast.model import INIT_STD, MLP, Attention, MiniMind
from minimind_fast.weights.files import check_replaceable, written_aside

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = TARGETS[:4]
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PEFT_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight$")
_PTH_KEY = re.compile(r"(?:module\.)?(.+)\.lora\.([AB])\.weight$")
# PEFT's LoRA variants that change the computation: files that use one are refused.
_VARIATIONS = (
    "use_dora",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "fan_in_fan_out",
    "lora_bias",
)


@dataclass(frozen=True)
class LoRA:
    """The hyperparameters of adapters.

    Attributes:
        rank: rows of A.
        alpha: the output is scaled by alpha / rank; None: by 1, as in MiniMind.
        dropout: probability of dropping an input feature, in training.
        targets: names from `TARGETS`, or ("square",) for projections with as many outputs as inputs, MiniMind's choice.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] = ATTENTION

    def __post_init__(self) -> None:
        unknown = sorted(set(self.targets) - set(TARGETS) - {"square"})
        if unknown or not self.targets:
            raise UserError(
                f"LoRA has no target {', '.join(unknown) or 'at all'}; choose from {', '.join(TARGETS)}, square"
            )
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise UserError(
                f"LoRA needs a rank of at least 1 and a dropout in [0, 1), not {self.rank} and {self.dropout}"
            )

    @property
    def scale(self) -> float:
        """Factor on the adapters' output."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


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
        raise UserError(
            f"this model has no {', '.join(sorted(absent))} for adapters: its feed-forward layers are experts, which LoRA "
            f"leaves alone; choose from {', '.join(ATTENTION)}"
        )
    if not names:
        raise UserError("this model has no square projection; name the targets")
    _attach(model, set(names), lora)
    return names


def _attach(model: MiniMind, names: set[str], lora: LoRA) -> None:
    if any(isinstance(module, AdaptedLinear) for module in model.modules()):
        raise UserError("the model has adapters already: merge them first")
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
    """Merge the adapters into the weights, in place; the result is an ordinary, fully trainable model."""
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


def save_adapters(
    found: dict[str, tuple[Tensor, Tensor]],
    lora: LoRA,
    path: str | Path,
    *,
    base: str = "",
) -> None:
    """Write adapters as PEFT's folder, or as MiniMind's file if the path ends with `.pth`.

    Args:
        found: from `adapters`.
        lora: their hyperparameters.
        path: folder or .pth file; replaced as a whole.
        base: path of the base model, for PEFT's config.

    Raises:
        ValueError: the folder holds other files.
    """
    path = Path(path)
    if path.suffix == ".pth":
        check_replaceable(path, a_file=True)
        # MiniMind has no alpha and stores half precision.
        tensors = {f"{name}.lora.A.weight": a.detach().cpu().half() for name, (a, _) in found.items()}
        tensors.update(
            {f"{name}.lora.B.weight": (b.detach().cpu() * lora.scale).half() for name, (_, b) in found.items()}
        )
        with written_aside(path) as aside:
            torch.save(tensors, aside)
        return
    if path.is_file() or (path.is_dir() and {p.name for p in path.iterdir()} - {CONFIG_FILE, WEIGHTS_FILE}):
        raise UserError(f"{path} holds other things than adapters, which would be lost; name a new folder")
    tensors = {
        f"base_model.model.{name}.lora_A.weight": a.detach().cpu().contiguous() for name, (a, _) in found.items()
    }
    tensors.update(
        {f"base_model.model.{name}.lora_B.weight": b.detach().cpu().contiguous() for name, (_, b) in found.items()}
    )
    leaves = {name.rpartition(".")[2] for name in found}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.scale * lora.rank,
        "lora_dropout": lora.dropout,
        "target_modules": [leaf for leaf in TARGETS if leaf in leaves],
        "bias": "none",
        "fan_in_fan_out": False,
    }
    with written_aside(path) as aside:
        aside.mkdir(parents=True)
        save_file(tensors, aside / WEIGHTS_FILE, metadata={"format": "pt"})
        (aside / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_adapters(path: str | Path) -> tuple[dict[str, tuple[Tensor, Tensor]], LoRA]:
    """Read adapters from PEFT's folder or MiniMind's .pth.

    Args:
        path: written by `save_adapters`, PEFT or MiniMind; a LoRA run's folder works too.

    Returns:
        (adapters by projection, their hyperparameters).

    Raises:
        ValueError: no adapters there, or an unsupported kind.
    """
    path = Path(path)
    if path.is_file():
        try:
            raw = torch.load(path, "cpu", weights_only=True)
        except Exception as error:  # torch.load raises many types
            raise UserError(f"{path} cannot be read as adapters: {error}") from None
        found = _pairs(raw, _PTH_KEY, path)
        return found, LoRA(_rank(found, path), None, 0.0, _leaves(found, path))
    path = path / "adapter" if not (path / CONFIG_FILE).is_file() and (path / "adapter").is_dir() else path
    try:
        config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
        raw = load_file(path / WEIGHTS_FILE)
    except OSError as error:
        raise UserError(f"{path} holds no adapters: {error}") from None
    except Exception as error:  # JSON's and safetensors' own
        raise UserError(f"{path} cannot be read as adapters: {error}") from None
    used = [key for key in _VARIATIONS if config.get(key)]
    if config.get("peft_type") != "LORA" or used or config.get("bias", "none") != "none":
        raise UserError(
            f"{path}: only plain LoRA adapters can be read, not {config.get('peft_type')} with {used or 'bias'}"
        )
    found = _pairs(raw, _PEFT_KEY, path)
    rank = _rank(found, path)
    return found, LoRA(
        rank, float(config.get("lora_alpha", rank)), config.get("lora_dropout", 0.0), _leaves(found, path)
    )


def _pairs(raw: Any, key: re.Pattern[str], path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in raw.items() if isinstance(raw, dict) else ():
        match = key.fullmatch(name)
        if match is None or not isinstance(tensor, Tensor) or tensor.dim() != 2:
            raise UserError(f"{path}: {name} is not part of an adapter")
        halves.setdefault(match[1], {})[match[2]] = tensor
    if not halves or any(set(pair) != {"A", "B"} for pair in halves.values()):
        raise UserError(f"{path} does not hold an A and a B for each adapter")
    return {name: (pair["A"], pair["B"]) for name, pair in halves.items()}


def _rank(found: dict[str, tuple[Tensor, Tensor]], path: Path) -> int:
    ranks = {a.shape[0] for a, _ in found.values()} | {b.shape[1] for _, b in found.values()}
    if len(ranks) > 1:
        raise UserError(f"{path} has adapters of several ranks: {sorted(ranks)}")
    return ranks.pop()


def _leaves(found: dict[str, tuple[Tensor, Tensor]], path: Path) -> tuple[str, ...]:
    leaves = {name.rpartition(".")[2] for name in found}
    if leaves - set(TARGETS):
        raise UserError(
            f"{path} has adapters on {', '.join(sorted(leaves - set(TARGETS)))}; known are {', '.join(TARGETS)}"
        )
    return tuple(leaf for leaf in TARGETS if leaf in leaves)


@torch.no_grad()
def load_adapters(model: MiniMind, path: str | Path) -> LoRA:
    """Load adapters from a folder or file onto a model, in place; the rest is frozen.

    Args:
        model: the base model, without adapters.
        path: as for `read_adapters`.

    Returns:
        Their hyperparameters.

    Raises:
        ValueError: the adapters do not fit this model.
    """
    found, lora = read_adapters(path)
    shapes = {
        p.name: (getattr(module, attribute).in_features, p.stop - p.start)
        for module, attribute, projections in _layers(model)
        for p in projections
    }
    absent = sorted(found.keys() - shapes.keys())
    if absent:
        raise UserError(
            f"{path}: the model has no {', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''} for adapters"
        )
    for name, (a, b) in found.items():
        if (a.shape[1], b.shape[0]) != shapes[name]:
            raise UserError(
                f"{path}: {name} maps {a.shape[1]} to {b.shape[0]} features, the model's {shapes[name][0]} to "
                f"{shapes[name][1]}: these adapters belong to another model"
            )
    _attach(model, set(found), lora)
    for name, (a, b) in adapters(model).items():
        a.copy_(found[name][0])
        b.copy_(found[name][1])
    return lora


# --------------------------------------------------------------------------------------------------------- command line
