"""Options shared by several commands, and the model they name.

Purpose: `chat`, `generate`, `eval` and others open a model and sample with the same options.
Principle: an `add_*` function for the parser, and a function that turns the parsed options into the object.
Properties: a user's mistake (a path, a foreign tokenizer, a range) is a ValueError that says so.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from minimind_fast.config import YARN, ends_at
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.errors import UserError
from minimind_fast.infer.sampling import Sampling
from minimind_fast.model import MiniMind
from minimind_fast.ops.precision import as_stored
from minimind_fast.weights.adapter_files import recorded_base
from minimind_fast.weights.checkpoint import check_exists, load_config, load_pretrained, resolve_folder
from minimind_fast.weights.lora import load_adapters, merge
from minimind_fast.weights.open import check_match, check_size, tokenizer_of
from minimind_fast.weights.pth import as_minimind

# What a .pth does not say, or MiniMind's scripts say again; each is a field of ModelConfig.
_SHAPE: dict[str, tuple[type, str]] = {
    "hidden_size": (int, "of a .pth: checked against it"),
    "num_hidden_layers": (int, "of a .pth: checked against it"),
    "num_attention_heads": (int, "of a .pth without q/k norm (default: 8, MiniMind's)"),
    "num_key_value_heads": (int, "of a .pth without q/k norm (default: by the heads' size)"),
    "num_experts_per_tok": (int, "of a .pth with experts (default: MiniMind's 2 or, of generation 3, 1)"),
    "rope_theta": (float, "of a .pth (default: 1e6, MiniMind's)"),
    "rms_norm_eps": (float, "of a .pth (default: MiniMind's)"),
}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add PATH, --tokenizer, --lora, --device, --dtype, --threads and a .pth's shape; `open_model` reads them."""
    parser.add_argument("path", metavar="PATH", help="folder with a model, a run's folder, or MiniMind's .pth")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="where the tokenizer is (default: with the model)")
    add_shape_options(parser)
    text = "stretch positions by YaRN to 16 times 2048 tokens, as MiniMind does"
    parser.add_argument("--rope_scaling", "--inference_rope_scaling", action="store_true", help=text)
    add_lora_option(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument(
        "--dtype",
        default="auto",
        help="auto (as stored; float32 on a CPU without instructions for it), float32, bfloat16 or float16 (default: auto)",
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: PyTorch's choice)")


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    """Add --preset and the single fields of a .pth's shape; `told_shape` reads them."""
    parser.add_argument("--preset", help="shape of a .pth (default: read from its tensors)")
    for name, (kind, text) in _SHAPE.items():
        parser.add_argument(f"--{name}", type=kind, help=text)
    on_off = argparse.BooleanOptionalAction
    parser.add_argument("--use_moe", action=on_off, help="of a .pth: checked against it")
    text = "of a .pth with experts: whether the chosen scores are normalised (default: yes, as in MiniMind)"
    parser.add_argument("--norm_topk_prob", action=on_off, help=text)


def told_shape(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    """The keyword arguments of `load_pretrained` that say a model's shape.

    Args:
        args: parsed options of `add_shape_options`, and rope_scaling if there.
        path: the model, from `resolve_folder`.

    Raises:
        ValueError: a shape is told of a folder, which has its own.
    """
    names = (*_SHAPE, "use_moe", "norm_topk_prob")
    told = {name: getattr(args, name, None) for name in names}
    told = {name: value for name, value in told.items() if value is not None}
    preset = getattr(args, "preset", None)
    check_exists(path)
    if path.is_dir() and (told or preset):
        option = "preset" if preset else next(iter(told))
        raise UserError(f"--{option} says the shape of a .pth; {path} is a folder with a config.json of its own")
    if getattr(args, "rope_scaling", False) and not (path.is_dir() and load_config(path).rope_scaling):
        told["rope_scaling"] = dict(YARN)
    return {"config": as_minimind(preset, **told)} if preset else {"told": told}


def add_lora_option(parser: argparse.ArgumentParser) -> None:
    """Add --lora."""
    text = "adapters to merge first: PEFT folder, MiniMind .pth, or the folder of a LoRA run; in float32 unless --dtype says"
    parser.add_argument("--lora", metavar="ADAPTER", help=text)
    add_base_option(parser)


def add_base_option(parser: argparse.ArgumentParser) -> None:
    """Add --any_base."""
    text = "load adapters onto weights that they were not trained on, or once more onto a model that has them"
    parser.add_argument("--any_base", action="store_true", help=text)


def with_adapters(model: MiniMind, adapters: str | None, any_base: bool = False) -> MiniMind:
    """Merge adapters into a model.

    Args:
        model: the base model.
        adapters: value of --lora, or None.
        any_base: value of --any_base.

    Returns:
        The model in float32, since half precision rounds small changes away; without adapters, unchanged.

    Raises:
        ValueError: the adapters cannot be read, or do not fit.
    """
    if adapters:
        load_adapters(model.float(), adapters, any_base)
        name, fingerprint = recorded_base(adapters)
        if not fingerprint and not any_base:
            named = f" (only a name, {name})" if name else ""
            print(
                f"note: {adapters} does not record the weights that it was trained on{named}: nothing can tell whether "
                "these are they",
                file=sys.stderr,
            )
        merge(model)
    return model


def open_model(args: argparse.Namespace) -> tuple[MiniMind, Tokenizer]:
    """Load the model for inference.

    Args:
        args: parsed options of `add_model_options`.

    Returns:
        (model in evaluation mode, tokenizer); with --dtype auto in float32 if the device lacks the stored dtype.

    Raises:
        ValueError: as for `open_stored`.
    """
    model, tokenizer = open_stored(args)
    if args.dtype == "auto":
        weight = model.lm_head.weight
        model.to(as_stored(weight.dtype, weight.device.type))
    return model, tokenizer


def open_stored(args: argparse.Namespace) -> tuple[MiniMind, Tokenizer]:
    """Load the model as stored; with --dtype auto weights keep their dtype.

    Args:
        args: parsed options of `add_model_options`.

    Returns:
        (model in evaluation mode, tokenizer).

    Raises:
        ValueError: an invalid option, or a tokenizer that is not the model's.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: no GPU that PyTorch can use; leave --device out")
    known = ("auto", "float32", "bfloat16", "float16")
    if args.dtype not in known:
        raise UserError(f"--dtype must be one of {', '.join(known)}, not {args.dtype!r}")
    folder = resolve_folder(args.path)
    shape = told_shape(args, folder)
    tokenizer = tokenizer_of(folder, args.tokenizer, "--tokenizer")
    check_match(folder, tokenizer, "leave --tokenizer out or name the right one")
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    model = load_pretrained(folder, dtype=None if args.lora else dtype, **shape)
    model = with_adapters(model, args.lora, getattr(args, "any_base", False))
    model = model.to(device=device, dtype=dtype).eval()
    check_size(tokenizer, model.config.vocab_size)
    model.config = ends_at(model.config, tokenizer.eos_id)
    return model, tokenizer


def add_sampling_options(parser: argparse.ArgumentParser, temperature: float, top_p: float) -> None:
    """Add --max_new_tokens, --temperature, --top_p, --top_k, --min_p, --repetition_penalty, --seed.

    Args:
        parser: receives the options.
        temperature, top_p: their defaults.
    """
    add = parser.add_argument
    add("--max_new_tokens", type=int, default=512, help="most tokens per answer (default: 512)")
    add("--temperature", type=float, default=temperature, help=f"0 is greedy (default: {temperature})")
    add("--top_p", type=float, default=top_p, help=f"probability to keep (default: {top_p})")
    add("--top_k", type=int, default=0, help="tokens to keep; 0 for all (default: 0)")
    add("--min_p", type=float, default=0.0, help="share of the likeliest token's probability to keep (default: 0)")
    add("--repetition_penalty", type=float, default=1.0, help="above 1 discourages repetition (default: 1)")
    add("--seed", type=int, help="makes sampling repeatable (default: a random seed)")


def sampling_of(args: argparse.Namespace) -> Sampling:
    """The Sampling given by the options of `add_sampling_options`.

    Raises:
        ValueError: a value out of range.
    """
    return Sampling(args.temperature, args.top_p, args.top_k, args.min_p, args.repetition_penalty)
