"""Weights on disk: MiniMind's names outside, fused and stacked tensors inside.

Purpose: `load_pretrained` and `save_pretrained` for MiniMind's Transformers-format folder and its `.pth` files.
Principle: a table says which tensors on disk make up one tensor in memory; both directions read the same table.
Properties: a folder appears whole or not at all (written aside, then renamed); files are read without unpickling code;
    extra or missing tensors are an error that lists them; a tied head is stored once.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minimind_fast.config import ModelConfig
from minimind_fast.model import MiniMind

WEIGHTS_FILE = "model.safetensors"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Written by some releases, computed here.
_BUFFERS = re.compile(r"(freqs_cos|freqs_sin|rotary_emb\.inv_freq|\.mask)$")
FORMATS = ("minimind", "pth")


# ---------------------------------------------------------------------------------------------------------------- names


def _qkv_sizes(config: ModelConfig) -> list[int]:
    assert config.head_dim is not None
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return [q, kv, kv]


def _expert_names(prefix: str, leaf: str, count: int) -> list[str]:
    return [f"{prefix}experts.{e}.{leaf}_proj.weight" for e in range(count)]


def to_disk_names(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our tensors -> MiniMind's: fused projections are split, experts unstacked.

    Args:
        state: `model.state_dict()`, or any subset of it (gradients by name work too).
        config: the model's.

    Returns:
        {name on disk: tensor}, views where possible.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        head, _, leaf = name.rpartition("self_attn.qkv_proj.weight")
        if head and not leaf:
            parts = tensor.split(_qkv_sizes(config))
            out.update({f"{head}self_attn.{x}_proj.weight": part for x, part in zip("qkv", parts, strict=True)})
        elif name.endswith("mlp.experts.gate_up"):
            prefix = name.removesuffix("experts.gate_up")
            gate, up = tensor.chunk(2, dim=1)
            for leaf, stacked in (("gate", gate), ("up", up)):
                out.update(zip(_expert_names(prefix, leaf, config.num_experts), stacked, strict=True))
        elif name.endswith("mlp.experts.down"):
            prefix = name.removesuffix("experts.down")
            out.update(zip(_expert_names(prefix, "down", config.num_experts), tensor, strict=True))
        elif ".mlp.shared." in name:
            prefix, leaf = name.split("shared.")
            n = config.num_shared_experts
            assert n
            if leaf.startswith("gate_up"):
                pieces = {"gate": tensor.chunk(2)[0].chunk(n), "up": tensor.chunk(2)[1].chunk(n)}
            else:
                pieces = {"down": tensor.chunk(n, dim=1)}
            for kind, parts in pieces.items():
                out.update({f"{prefix}shared_experts.{i}.{kind}_proj.weight": p for i, p in enumerate(parts)})
        elif name.endswith("mlp.gate_up_proj.weight"):
            prefix = name.removesuffix("gate_up_proj.weight")
            gate, up = tensor.chunk(2)
            out.update({f"{prefix}gate_proj.weight": gate, f"{prefix}up_proj.weight": up})
        else:
            out[_head_norm_on_disk(name)] = tensor
    return out


def _head_norm_on_disk(name: str) -> str:
    """q_norm_weight in memory is q_norm.weight on disk; every other name stays."""
    return re.sub(r"\.([qk])_norm_weight$", r".\1_norm.weight", name)


def from_disk_names(
    disk: dict[str, Tensor], config: ModelConfig, expected: Iterable[str], where: str
) -> dict[str, Tensor]:
    """MiniMind's tensors -> ours.

    Args:
        disk: tensors by MiniMind's names.
        config: the model's.
        expected: our names, as in `model.state_dict()`.
        where: named in errors.

    Raises:
        ValueError: missing or extra tensors, all of them listed.
    """
    rest = {name: tensor for name, tensor in disk.items() if not _BUFFERS.search(name)}
    if config.tie_word_embeddings:
        rest.setdefault(HEAD, rest.get(EMBEDDING, torch.empty(0)))
        rest.setdefault(EMBEDDING, rest[HEAD])
    missing: list[str] = []

    def take(name: str) -> Tensor:
        if name not in rest:
            missing.append(name)
            return torch.empty(0)
        return rest.pop(name)

    def gate_up(prefix: str) -> Tensor:
        return torch.cat([take(f"{prefix}gate_proj.weight"), take(f"{prefix}up_proj.weight")])

    state: dict[str, Tensor] = {}
    for name in expected:
        if name.endswith("self_attn.qkv_proj.weight"):
            prefix = name.removesuffix("qkv_proj.weight")
            state[name] = torch.cat([take(f"{prefix}{x}_proj.weight") for x in "qkv"])
        elif name.endswith("mlp.experts.gate_up"):
            prefix = name.removesuffix("gate_up")
            state[name] = _stack([gate_up(f"{prefix}{e}.") for e in range(config.num_experts)])
        elif name.endswith("mlp.experts.down"):
            prefix = name.removesuffix("down")
            state[name] = _stack([take(f"{prefix}{e}.down_proj.weight") for e in range(config.num_experts)])
        elif ".mlp.shared." in name:
            prefix, leaf = name.split("shared.")
            shared = [f"{prefix}shared_experts.{i}." for i in range(config.num_shared_experts or 0)]
            if leaf.startswith("gate_up"):
                parts = [take(f"{p}{x}_proj.weight") for x in ("gate", "up") for p in shared]
                state[name] = torch.cat(parts)
            else:
                state[name] = _cat_columns([take(f"{p}down_proj.weight") for p in shared])
        elif name.endswith("mlp.gate_up_proj.weight"):
            state[name] = gate_up(name.removesuffix("gate_up_proj.weight"))
        else:
            state[name] = take(_head_norm_on_disk(name))
    if missing or rest:
        lines = [f"missing: {', '.join(sorted(missing))}"] if missing else []
        lines += [f"not part of this model: {', '.join(sorted(rest))}"] if rest else []
        raise ValueError(f"{where} does not hold this model; {'; '.join(lines)}")
    return state


def _stack(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts) if len({p.shape for p in parts}) == 1 else torch.empty(0)


def _cat_columns(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, dim=1) if all(p.dim() == 2 for p in parts) else torch.empty(0)


# ---------------------------------------------------------------------------------------------------------------- write


def save_pretrained(
    model: MiniMind,
    path: str | Path,
    *,
    format: str = "minimind",
    dtype: torch.dtype | None = None,
    tokenizer: Any = None,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write a model so that MiniMind (and `load_pretrained`) can read it.

    Args:
        model: what to write.
        path: a folder, or a file for "pth".
        format: "minimind" (folder with config.json and safetensors) or "pth" (MiniMind's own file).
        dtype: convert floating-point weights; None keeps theirs ("pth": float16, as MiniMind writes).
        tokenizer: an `mm.Tokenizer`; saved beside the weights, its fingerprint recorded.
        state: weights in place of `model.state_dict()` (a trainer's float32 masters).

    Raises:
        ValueError: an unknown format.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; choose one of {', '.join(FORMATS)}")
    path, config = Path(path), model.config
    disk = to_disk_names(state or model.state_dict(), config)
    if format == "pth":
        disk = {name: t.detach().to("cpu", dtype or torch.float16) for name, t in disk.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside:
            torch.save(disk, aside)
        return
    if config.tie_word_embeddings:
        disk.pop(HEAD, None)
    disk = {name: t.detach().to("cpu", dtype or t.dtype).contiguous() for name, t in disk.items()}
    raw = config.to_dict()
    raw["dtype"] = str(next(iter(disk.values())).dtype).removeprefix("torch.")
    if tokenizer is not None:
        raw["minimind_fast"] = {"tokenizer_fingerprint": tokenizer.fingerprint, "tokenizer_size": tokenizer.vocab_size}
    with written_aside(path) as aside:
        aside.mkdir(parents=True)
        save_file(disk, aside / WEIGHTS_FILE, metadata={"format": "pt"})
        (aside / "config.json").write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(aside)


class written_aside:
    """A path to write to beside the real one, which it replaces when all went well.

    Whatever happens in the block or on the way (an exception, a kill, a full disk), the old file or folder is still
    whole: under its own name, or for the instant of a folder's swap as `.<name>.old-*` beside it.

    Args:
        path: the file or folder to replace.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.aside = self.path.with_name(f".{self.path.name}.new-{os.getpid()}-{uuid.uuid4().hex[:6]}")

    def __enter__(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.aside

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None:
            _remove(self.aside)
            return
        sync_to_disk(self.aside)
        if self.path.is_dir():
            old = self.path.with_name(f".{self.path.name}.old-{uuid.uuid4().hex[:6]}")
            os.replace(self.path, old)
            os.replace(self.aside, self.path)
            _remove(old)
        else:
            os.replace(self.aside, self.path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync_to_disk(path: Path) -> None:
    """Push a file, or all files of a folder, to the disk."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ----------------------------------------------------------------------------------------------------------------- read


def resolve_folder(path: str | Path) -> Path:
    """The folder that holds the weights: `path` itself, or `path/weights` where `path` is a run's folder.

    Args:
        path: as a user gives it.
    """
    path = Path(path)
    return path / "weights" if not (path / "config.json").exists() and (path / "weights").is_dir() else path


def load_config(path: str | Path) -> ModelConfig:
    """Read `config.json` of a folder.

    Args:
        path: the folder.

    Raises:
        ValueError: no such file, not JSON, an unknown model type or field.
    """
    file = Path(path) / "config.json"
    raw = _read_json(file)
    kind = raw.get("model_type", "minimind")
    if kind != "minimind":
        raise ValueError(f"{file}: model_type {kind!r} cannot be read; known is 'minimind'")
    return ModelConfig.from_dict(raw, str(file))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return raw


def tokenizer_fingerprint(path: str | Path) -> str | None:
    """The fingerprint of the tokenizer that a folder's weights were trained with, if it says.

    Args:
        path: a folder written by `save_pretrained`.
    """
    return _read_json(Path(path) / "config.json").get("minimind_fast", {}).get("tokenizer_fingerprint")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors by their names on disk, of a folder (safetensors or .bin, whole or sharded) or a .pth file.

    Args:
        path: folder or file.

    Raises:
        ValueError: nothing to read there, or a file that is not what its name says.
    """
    path = Path(path)
    if path.is_file():
        files = [path]
    else:
        index = next((f for f in path.glob("*.index.json")), None)
        if index is not None:
            files = [path / name for name in sorted(set(_read_json(index)["weight_map"].values()))]
        else:
            files = [f for f in (path / WEIGHTS_FILE, path / "pytorch_model.bin") if f.is_file()][:1]
    if not files:
        raise ValueError(f"{path}: no {WEIGHTS_FILE}, pytorch_model.bin or .pth file there")
    out: dict[str, Tensor] = {}
    for file in files:
        try:
            read = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
        except Exception as error:  # each reader has its own; the user needs the file's name
            raise ValueError(f"{file} cannot be read as weights: {error}") from None
        if not isinstance(read, dict) or not all(isinstance(t, Tensor) for t in read.values()):
            raise ValueError(f"{file} does not hold tensors by name")
        out.update(read)
    return out


def load_pretrained(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    config: ModelConfig | None = None,
) -> MiniMind:
    """Open a model from a folder, or from MiniMind's own `.pth` with its config.

    Args:
        path: folder with config.json and weights, or a .pth file.
        device: where the model goes.
        dtype: of its parameters; None: as stored (a .pth: float32).
        config: required for a .pth, which does not say its shape.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: what is wrong with the path, the config or the weights.
    """
    path = resolve_folder(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if path.is_file() and config is None:
        raise ValueError(f"{path} holds weights only; pass config=ModelConfig(...) that says the model's shape")
    config = config or load_config(path)
    disk = read_weights(path)
    stored = next((t.dtype for t in disk.values() if t.is_floating_point()), torch.float32)
    with torch.random.fork_rng(devices=[]):  # weights drawn and thrown away must not move the caller's generator
        model = MiniMind(config)
    load_disk_weights(model, disk, str(path))
    model.to(device=device, dtype=dtype or (torch.float32 if path.is_file() else stored))
    return model.eval()


def load_disk_weights(model: MiniMind, disk: dict[str, Tensor], where: str) -> None:
    """Fill a model with tensors by MiniMind's names.

    Args:
        model: filled in place.
        disk: tensors by MiniMind's names.
        where: named in errors.

    Raises:
        ValueError: missing, extra or misshapen tensors.
    """
    expected = model.state_dict()
    state = from_disk_names(disk, model.config, expected, where)
    wrong = [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(have.shape)}"
        for name, have in expected.items()
        if state[name].shape != have.shape
    ]
    if wrong:
        raise ValueError(f"{where} does not fit the config: {'; '.join(wrong)}")
    model.load_state_dict(state)
