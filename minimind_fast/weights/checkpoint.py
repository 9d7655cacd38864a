"""Weights on disk: MiniMind's names outside, fused and stacked tensors inside.

Purpose: `load_pretrained` and `save_pretrained` for MiniMind's Transformers-format folder and its `.pth` files, and for
    Llama, Qwen3 and Qwen3-MoE folders, whose tensors have the same names (`hf.py` translates the config).
Principle: one table maps each tensor on disk to a view of a tensor in memory. Writing stores the views, reading copies
    into them.
Properties: a folder appears whole or not at all (temporary folder, then rename); files are read without unpickling code;
    extra, missing or misshapen tensors are an error that lists them; a tied head is stored once; a folder that holds
    anything but a model is never replaced.
"""

from __future__ import annotations

import glob
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minimind_fast.config import NO_TOKEN, ModelConfig
from minimind_fast.data.rows import read_object
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.errors import UserError
from minimind_fast.model import MiniMind
from minimind_fast.weights.files import check_replaceable, old_prefix, written_aside
from minimind_fast.weights.hf import ARCHITECTURES, from_hf_config, generation_config, to_hf_config
from minimind_fast.weights.pth import EMBEDDING, HEAD, shape_of, weights_in

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Buffers that some releases store and we recompute.
_BUFFERS = re.compile(r"(freqs_cos|freqs_sin|rotary_emb\.inv_freq|\.mask)$")
# What Transformers needs to open a folder of ours: its own file, and the classes in it.
REMOTE = Path(__file__).with_name("remote") / "modeling_minimind.py"
_AUTO_MAP = {"AutoConfig": "MiniMindConfig", "AutoModelForCausalLM": "MiniMindForCausalLM"}
FORMATS = ("minimind", "pth", *ARCHITECTURES)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
        state: `model.state_dict()` or a subset of it (gradients by name work too).
        config: decides the split sizes.

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
    """q_norm_weight in memory is q_norm.weight on disk; other names stay."""
    return re.sub(r"\.([qk])_norm_weight$", r".\1_norm.weight", name)


# ---------------------------------------------------------------------------------------------------------------- write


def save_pretrained(
    model: MiniMind,
    path: str | Path,
    *,
    format: str = "minimind",
    dtype: torch.dtype | None = None,
    tokenizer: Any = None,
    state: dict[str, Tensor] | None = None,
    max_shard_size: int | str | None = None,
) -> None:
    """Write a model so that MiniMind, Transformers or `load_pretrained` can read it.

    Everything is checked before anything is written. An existing model folder is replaced as a whole.

    Args:
        path: a folder, or a file for "pth".
        format: "minimind" (folder with config.json and safetensors), "pth" (MiniMind's own file), or a Hugging Face
            folder: "llama", "qwen3" or "qwen3_moe" (with generation_config.json).
        dtype: float32, bfloat16 or float16; None keeps the weights' own ("pth": float16, as MiniMind writes).
        tokenizer: an `mm.Tokenizer`; saved beside the weights with its chat template, its fingerprint recorded. In a
            Hugging Face format its special ids replace the model's.
        state: weights to write instead of `model.state_dict()` (a trainer's float32 masters).
        max_shard_size: bytes, or text such as "500MB" or "2GiB": larger weights become several files with an index.

    Raises:
        ValueError: an unknown format, dtype or size; a model that the format cannot represent (with the reason); a value
            out of float16's range; or a path that holds something other than a model.
    """
    path = Path(path)
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}; choose one of {', '.join(FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"weights are written as float32, bfloat16 or float16, not {dtype}")
    limit = _shard_bytes(max_shard_size)
    if format == "pth" and limit is not None:
        raise UserError("a .pth is one file: leave max_shard_size out, or write a folder")
    check_replaceable(path, a_file=format == "pth")
    raw, extra = _config_files(model.config, format, tokenizer)
    if merged := model.merged_adapters:
        raw.setdefault("minimind_fast", {})["merged_adapters"] = list(merged)
    disk = _for_disk(state or model.state_dict(), model.config, dtype or (torch.float16 if format == "pth" else None))
    if format == "pth":
        with written_aside(path) as aside:
            torch.save(disk, aside)
        return
    if model.config.tie_word_embeddings:
        disk.pop(HEAD, None)
    raw["dtype"] = str(next(iter(disk.values())).dtype).removeprefix("torch.")
    if format in ARCHITECTURES:
        raw["torch_dtype"] = raw["dtype"]  # the name in Transformers 4
    with written_aside(path) as aside:
        aside.mkdir(parents=True)
        _write_weights(disk, aside, limit)
        for name, content in {"config.json": raw, **extra}.items():
            _write_json(aside / name, content)
        if format == "minimind":
            shutil.copyfile(REMOTE, aside / REMOTE.name)
        if tokenizer is not None:
            tokenizer.save(aside)


def _config_files(config: ModelConfig, format: str, tokenizer: Any) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """config.json in a format, and the other JSON files by name."""
    extra = {}
    if format in ARCHITECTURES:
        if tokenizer is not None:
            if tokenizer.vocab_size > config.vocab_size:
                raise UserError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}")
            config = replace(config, **_ids_of(tokenizer, config))
        raw = to_hf_config(config, format)
        extra["generation_config.json"] = generation_config(config)
    else:
        raw = config.to_dict()
        raw["auto_map"] = {kind: f"{REMOTE.stem}.{name}" for kind, name in _AUTO_MAP.items()}
    if tokenizer is not None:
        raw["minimind_fast"] = {"tokenizer_fingerprint": tokenizer.fingerprint, "tokenizer_size": tokenizer.vocab_size}
    return raw, extra


def _ids_of(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Any]:
    """A tokenizer's special ids; where the model ends at several, it still ends at all of them."""
    more = sorted(config.stop_ids - {tokenizer.eos_id}) if len(config.stop_ids) > 1 else ()
    bos = tokenizer.bos_id if tokenizer.has("bos_token") else NO_TOKEN
    return dict(
        bos_token_id=bos, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id, more_eos_token_ids=tuple(more)
    )


def _for_disk(state: dict[str, Tensor], config: ModelConfig, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Tensors by MiniMind's names, on the CPU, in the dtype on disk; a tied head shares memory."""
    out: dict[str, Tensor] = {}
    for name, tensor in to_disk_names(state, config).items():
        if name == HEAD and config.tie_word_embeddings:
            continue
        out[name] = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        if out[name].dtype == torch.float16 and tensor.dtype != torch.float16:
            lost = (out[name].isinf() & tensor.detach().cpu().isfinite()).sum()
            if lost:
                raise UserError(f"{name} holds {lost} values beyond float16's 65504; write bfloat16 or float32")
    if config.tie_word_embeddings:
        out[HEAD] = out[EMBEDDING]
    return out


def _write_weights(disk: dict[str, Tensor], folder: Path, limit: int | None) -> None:
    """Write one safetensors file, or several of at most `limit` bytes each (a larger tensor gets its own)."""
    shards: list[dict[str, Tensor]] = [{}]
    sizes = [0]
    for name, tensor in disk.items():
        if shards[-1] and limit is not None and sizes[-1] + tensor.nbytes > limit:
            shards.append({})
            sizes.append(0)
        shards[-1][name] = tensor
        sizes[-1] += tensor.nbytes
    if len(shards) == 1:
        save_file(disk, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        return
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, file))
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": sum(sizes)}, "weight_map": where})


def _shard_bytes(size: int | str | None) -> int | None:
    if size is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT]?)(i?)B)?\s*", str(size), re.IGNORECASE)
    number = float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index((match[2] or " ").upper()) if match else 0
    if number < 1:
        raise UserError(f"max_shard_size must be bytes or text such as 500MB or 2GiB, not {size!r}")
    return int(number)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------- read


def resolve_folder(path: str | Path) -> Path:
    """The folder that holds the weights: `path` itself, or `path/weights` if `path` is a run folder."""
    path = Path(path)
    return path / "weights" if not (path / "config.json").exists() and (path / "weights").is_dir() else path


def check_exists(path: Path) -> None:
    """Refuse missing weights.

    Args:
        path: from `resolve_folder`.

    Raises:
        ValueError: no such file or folder; names the previous model if an interrupted save left it aside.
    """
    if not path.exists():
        old = sorted(path.parent.glob(f"{glob.escape(old_prefix(path))}*"))  # killed between a swap's two renames
        hint = f"; an interrupted save left the model before it as {old[-1]}: rename that" if old else ""
        raise UserError(f"{path}: no such file or folder{hint}")


def load_config(path: str | Path) -> ModelConfig:
    """Read a folder's `config.json`.

    Raises:
        ValueError: no such file, not JSON, or an unknown model type or field.
    """
    file = Path(path) / "config.json"
    raw = read_object(file)
    kind = raw.get("model_type", "minimind")
    beside = file.with_name("generation_config.json")
    generation = read_object(beside) if beside.is_file() else {}
    if kind in ARCHITECTURES:
        return from_hf_config(raw, str(file), generation)
    if kind != "minimind":
        raise UserError(f"{file}: model_type {kind!r} cannot be read; known are minimind, {', '.join(ARCHITECTURES)}")
    if generation.get("eos_token_id") is not None:  # it wins, as in Transformers
        raw["eos_token_id"] = generation["eos_token_id"]
    return ModelConfig.from_dict(raw, str(file))


def tokenizer_fingerprint(path: str | Path) -> str | None:
    """The recorded fingerprint of the tokenizer that a folder's weights were trained with, if any."""
    return read_object(Path(path) / "config.json").get("minimind_fast", {}).get("tokenizer_fingerprint")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read tensors by their names on disk, from a folder (safetensors or .bin, whole or sharded) or a .pth file.

    Raises:
        ValueError: no weights there, or a file that is not what its name says.
    """
    path = Path(path)
    files = [path] if path.is_file() else []
    for name in () if files else (WEIGHTS_FILE, INDEX_FILE, "pytorch_model.bin", "pytorch_model.bin.index.json"):
        if (path / name).is_file():
            files = _shards(path / name) if name.endswith(".json") else [path / name]
            break
    if not files:
        raise UserError(f"{path}: no {WEIGHTS_FILE}, pytorch_model.bin or .pth file there")
    out: dict[str, Tensor] = {}
    for file in files:
        try:
            read = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
            read = weights_in(read) if path.is_file() else read
        except Exception as error:  # each reader has its own types; the user needs the file's name
            raise UserError(f"{file} cannot be read as weights: {error}") from None
        if not isinstance(read, dict) or not all(isinstance(t, Tensor) for t in read.values()):
            raise UserError(f"{file} does not hold tensors by name")
        check_numbers(read, str(file))
        out.update(read)
    return out


def check_numbers(tensors: dict[str, Tensor], where: str) -> None:
    """Refuse what copying into float parameters would turn into other weights without a word.

    Args:
        tensors: by name.
        where: the file, to name in errors.

    Raises:
        UserError: names a quantised tensor, or one with values that are not finite.
    """
    for name, tensor in tensors.items():
        if _BUFFERS.search(name):
            continue
        if tensor.dtype not in (*DTYPES, torch.float64):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"{where}: {name} is stored as {kind}, so it is quantised: convert the model to bfloat16 first"
            )
        if not torch.isfinite(tensor).all():
            raise UserError(f"{where}: {name} holds NaN or infinity: its training diverged, or the file is damaged")


def _shards(index: Path) -> list[Path]:
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index} has no weight_map")
    shards = sorted({str(name) for name in names.values()})
    absent = [name for name in shards if Path(name).name != name or not index.with_name(name).is_file()]
    if absent:
        raise UserError(f"{index} names files that are not beside it: {', '.join(absent)}")
    return [index.with_name(name) for name in shards]


def load_pretrained(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    config: ModelConfig | None = None,
    told: dict[str, Any] | None = None,
) -> MiniMind:
    """Open a model from a folder, or from MiniMind's own `.pth`.

    Args:
        path: folder with config.json and weights (model_type minimind, llama, qwen3 or qwen3_moe), or a .pth file.
        device: device of the parameters.
        dtype: dtype of the parameters; None: as stored (a .pth: float32).
        config: the whole config, instead of what the folder or the tensors of a .pth say.
        told: single fields that win over these, such as {"num_attention_heads": 4}.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: the path, the config or the weights are unusable.
    """
    path = resolve_folder(path)
    check_exists(path)
    if config is None and not path.is_file():
        config = load_config(path)
    disk = read_weights(path)
    if config is None:
        config = shape_of(disk, str(path), **told or {})
    elif told:
        config = replace(config, **told)
    stored = next((t.dtype for t in disk.values() if t.is_floating_point()), torch.float32)
    with torch.random.fork_rng(devices=[]):  # discarded initial weights must not advance the caller's generator
        model = MiniMind(config)
    load_disk_weights(model, disk, str(path))
    if path.is_dir() and (merged := read_object(path / "config.json").get("minimind_fast", {}).get("merged_adapters")):
        model.merged_adapters = tuple(merged)
    model.to(device=device, dtype=dtype or (torch.float32 if path.is_file() else stored))
    return model.eval()


def load_disk_weights(model: MiniMind, disk: dict[str, Tensor], where: str) -> None:
    """Copy tensors by MiniMind's names into a model.

    Args:
        model: filled in place.
        disk: tensors by MiniMind's names.
        where: source to name in errors.

    Raises:
        ValueError: missing, extra or misshapen tensors.
    """
    config = model.config
    wanted = to_disk_names(model.state_dict(), config)
    disk = {name: tensor for name, tensor in disk.items() if not _BUFFERS.search(name)}
    if config.tie_word_embeddings and HEAD in disk:
        embedding = disk.setdefault(EMBEDDING, disk[HEAD])
        if not torch.equal(disk[HEAD], embedding):
            raise UserError(
                f'{where}: {HEAD} and {EMBEDDING} differ, but the config ties them; set "tie_word_embeddings": false there'
            )
    elif config.tie_word_embeddings and EMBEDDING in disk:
        disk[HEAD] = disk[EMBEDDING]
    missing, extra = sorted(wanted.keys() - disk.keys()), sorted(disk.keys() - wanted.keys())
    if missing or extra:
        lines = [f"missing: {', '.join(missing)}"] if missing else []
        lines += [f"not part of this model: {', '.join(extra)}"] if extra else []
        raise UserError(f"{where} does not hold this model; {'; '.join(lines)}")
    wrong = [
        f"{name} is {tuple(disk[name].shape)}, expected {tuple(part.shape)}"
        for name, part in wanted.items()
        if disk[name].shape != part.shape
    ]
    if wrong:
        raise UserError(f"{where} does not fit the config: {'; '.join(wrong)}")
    for name, part in wanted.items():
        part.copy_(disk[name])  # a view of the parameter in memory
