"""Adapters on disk: PEFT's folder and MiniMind's `.pth`.

Purpose: `save_adapters` writes them, `read_adapters` reads them, `LoRA` holds their hyperparameters.
Principle: only what is known to leave the arithmetic y = W x + scale * B A x as it is, is read. Any other field of PEFT's
    config that is set is refused by its name, so a new kind of adapter is never taken for a plain one.
Properties: PiSSA and OLoRA begin by taking their start out of the base, which PEFT repeats whenever it loads them;
    `LoRA.init` says so, and `lora.py` does it. The base's fingerprint is metadata of the weights, which others skip.

Source: file format and kinds of Hugging Face PEFT 0.21; `.pth` of MiniMind's model_lora.py.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from minimind_fast.data.rows import read_object
from minimind_fast.errors import UserError
from minimind_fast.weights.checkpoint import check_numbers
from minimind_fast.weights.files import check_replaceable, written_aside

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = TARGETS[:4]
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PEFT_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight$")
_PTH_KEY = re.compile(r"(?:module\.)?(.+)\.lora\.([AB])\.weight$")
# PEFT's fields that do not change what a loaded adapter computes; any other that is set is refused.
_HARMLESS = {
    *(
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *("r", "lora_alpha", "lora_dropout", "bias", "init_lora_weights", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "megatron_config", "megatron_core", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying"),
}
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # they change A and B only
_BASE = "minimind_fast.base_fingerprint"
BASE_CHANGES = ("pissa", "olora")  # they also change the base


@dataclass(frozen=True)
class LoRA:
    """The hyperparameters of adapters.

    Attributes:
        rank: rows of A.
        alpha: the output is scaled by alpha / rank; None: by 1, as in MiniMind.
        dropout: probability of dropping an input feature, in training.
        targets: names from `TARGETS`, or ("square",) for projections with as many outputs as inputs, MiniMind's choice.
        init: one of BASE_CHANGES if the base loses what these adapters began with, else "".
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] = ATTENTION
    init: str = ""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.targets) - set(TARGETS) - {"square"})
        if unknown or not self.targets:
            raise UserError(
                f"LoRA has no target {', '.join(unknown) or 'at all'}; choose from {', '.join(TARGETS)}, square"
            )
        if not _is_number(self.rank) or self.rank < 1 or not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise UserError(
                f"LoRA needs a rank of at least 1 and a dropout in [0, 1), not {self.rank!r} and {self.dropout!r}"
            )
        if self.alpha is not None and not _is_number(self.alpha):
            raise UserError(f"LoRA's alpha must be a finite number, not {self.alpha!r}")

    @property
    def scale(self) -> float:
        """Factor on the adapters' output."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def save_adapters(
    found: dict[str, tuple[Tensor, Tensor]],
    lora: LoRA,
    path: str | Path,
    *,
    base: str = "",
    fingerprint: str = "",
    square_only: bool = False,
) -> None:
    """Write adapters as PEFT's folder, or as MiniMind's file if the path ends with `.pth`.

    Args:
        found: from `adapters`.
        lora: their hyperparameters.
        path: folder or .pth file; replaced as a whole.
        base: path of the base model, for PEFT's config.
        fingerprint: of the base model, from `lora.base_fingerprint`.
        square_only: for a .pth: refuse adapters that MiniMind's own loader would pass over.

    Raises:
        ValueError: the folder holds other files, or the format cannot say what these adapters are.
    """
    path = Path(path)
    if path.suffix == ".pth" and lora.init:
        raise UserError(
            f"{path}: {lora.init} adapters also change their base, which a .pth cannot say; merge them (minimind-fast lora "
            "merge)"
        )
    oblong = sorted(name for name, (a, b) in found.items() if a.shape[1] != b.shape[0])
    if path.suffix == ".pth" and square_only and oblong:
        raise UserError(
            f"{path}: MiniMind's loader puts adapters on square projections only and would pass over {len(oblong)} of "
            f"{len(found)}, such as {oblong[0]}; merge them, or train with --lora_targets square"
        )
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
        "init_lora_weights": lora.init or True,
    }
    with written_aside(path) as aside:
        aside.mkdir(parents=True)
        more = {_BASE: fingerprint} if fingerprint else {}
        save_file(tensors, aside / WEIGHTS_FILE, metadata={"format": "pt", **more})
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
    path = _folder(path)
    try:
        raw = load_file(path / WEIGHTS_FILE)
    except OSError as error:
        raise UserError(f"{path} holds no adapters: {error}") from None
    except Exception as error:  # safetensors' own
        raise UserError(f"{path} cannot be read as adapters: {error}") from None
    config = read_object(path / CONFIG_FILE)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: only LoRA adapters can be read, not {config.get('peft_type')}")
    used = sorted(key for key, value in config.items() if value and key not in _HARMLESS)
    used += ["bias"] if config.get("bias", "none") != "none" else []
    start = config.get("init_lora_weights")
    start = start.lower() if isinstance(start, str) else start
    if start not in (*_PLAIN_STARTS, *BASE_CHANGES):
        used.append(f"init_lora_weights={start!r}")
    if used:
        raise UserError(
            f"{path}: only plain LoRA, PiSSA and OLoRA adapters can be read, not those with {', '.join(used)}; merge them "
            "with PEFT"
        )
    found = _pairs(raw, _PEFT_KEY, path)
    rank = _rank(found, path)
    if config.get("r", rank) != rank:  # PEFT would divide alpha by it
        raise UserError(f"{path}: {CONFIG_FILE} says r={config['r']!r}, the adapters have rank {rank}")
    alpha, dropout = config.get("lora_alpha"), config.get("lora_dropout", 0.0)
    if alpha is None:
        raise UserError(f"{path}: {CONFIG_FILE} lacks lora_alpha, which scales the adapters")
    try:
        lora = LoRA(rank, alpha, dropout, _leaves(found, path), str(start) if start in BASE_CHANGES else "")
    except UserError as error:
        raise UserError(f"{path / CONFIG_FILE}: {error}") from None
    return found, lora


def _folder(path: Path) -> Path:
    return path / "adapter" if not (path / CONFIG_FILE).is_file() and (path / "adapter").is_dir() else path


def recorded_base(path: str | Path) -> tuple[str, str]:
    """(the base's name in PEFT's config, its fingerprint), each "" where it is not recorded.

    Args:
        path: as for `read_adapters`, which has read it already.
    """
    folder = _folder(Path(path))
    if not folder.is_dir():
        return "", ""
    name = read_object(folder / CONFIG_FILE).get("base_model_name_or_path")
    with safe_open(folder / WEIGHTS_FILE, "pt") as file:
        return str(name or ""), (file.metadata() or {}).get(_BASE, "")


def _pairs(raw: Any, key: re.Pattern[str], path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in raw.items() if isinstance(raw, dict) else ():
        match = key.fullmatch(name)
        if match is None or not isinstance(tensor, Tensor) or tensor.dim() != 2:
            raise UserError(f"{path}: {name} is not part of an adapter")
        halves.setdefault(match[1], {})[match[2]] = tensor
    if not halves or any(set(pair) != {"A", "B"} for pair in halves.values()):
        raise UserError(f"{path} does not hold an A and a B for each adapter")
    check_numbers(raw, str(path))
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
