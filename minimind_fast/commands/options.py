"""Options shared by several commands, and the model they name.

Purpose: `chat`, `generate`, `eval` and others open a model and sample with the same options.
Principle: an `add_*` function for the parser, and a function that turns the parsed options into the object.
Properties: a user's mistake (a path, a foreign tokenizer, a range) is a ValueError that says so.
"""

from __future__ import annotations

import argparse

import torch

from minimind_fast.config import ModelConfig
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.errors import UserError
from minimind_fast.infer.sampling import Sampling
from minimind_fast.model import MiniMind
from minimind_fast.ops.precision import as_stored
from minimind_fast.weights.checkpoint import load_pretrained, resolve_folder
from minimind_fast.weights.lora import load_adapters, merge
from minimind_fast.weights.open import check_match, check_size, tokenizer_of


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add PATH, --tokenizer, --preset, --lora, --device, --dtype, --threads; `open_model` reads them."""
    parser.add_argument("path", metavar="PATH", help="folder with a model, a run's folder, or MiniMind's .pth")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="where the tokenizer is (default: with the model)")
    parser.add_argument("--preset", help="shape of a .pth file, such as minimind2-small")
    add_lora_option(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument(
        "--dtype",
        default="auto",
        help="auto (as stored; float32 on a CPU without instructions for it), float32, bfloat16 or float16 (default: auto)",
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: PyTorch's choice)")


def add_lora_option(parser: argparse.ArgumentParser) -> None:
    """Add --lora."""
    text = "adapters to merge first: PEFT folder, MiniMind .pth, or the folder of a LoRA run; in float32 unless --dtype says"
    parser.add_argument("--lora", metavar="ADAPTER", help=text)


def with_adapters(model: MiniMind, adapters: str | None) -> MiniMind:
    """Merge adapters into a model.

    Args:
        model: the base model.
        adapters: value of --lora, or None.

    Returns:
        The model in float32, since half precision rounds small changes away; without adapters, unchanged.

    Raises:
        ValueError: the adapters cannot be read, or do not fit.
    """
    if adapters:
        load_adapters(model.float(), adapters)
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
    if folder.is_file() and not args.preset:
        raise UserError(f"{folder} does not say its model's shape: add --preset minimind2-small (or another)")
    tokenizer = tokenizer_of(folder, args.tokenizer, "--tokenizer")
    check_match(folder, tokenizer, "leave --tokenizer out or name the right one")
    config = ModelConfig.preset(args.preset) if args.preset else None
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    model = with_adapters(load_pretrained(folder, dtype=None if args.lora else dtype, config=config), args.lora)
    model = model.to(device=device, dtype=dtype).eval()
    check_size(tokenizer, model.config.vocab_size)
    return model, tokenizer


def add_sampling_options(parser: argparse.ArgumentParser, temperature: float, top_p: float) -> None:
    """Add --max_new_tokens, --temperature, --top_p, --top_k, --min_p, --repetition_penalty, --seed.

    Args:
        parser: receives the options.
        temperature, top_p: their defaults.
    """
    add = parser.add_argument
    add("--max_new_tokens", type=int, default=512, help="at most, for each answer (default: 512)")
    add("--temperature", type=float, default=temperature, help=f"0 is greedy (default: {temperature})")
    add("--top_p", type=float, default=top_p, help=f"probability to keep (default: {top_p})")
    add("--top_k", type=int, default=0, help="tokens to keep; 0 for all (default: 0)")
    add("--min_p", type=float, default=0.0, help="share of the likeliest token's probability to keep (default: 0)")
    add("--repetition_penalty", type=float, default=1.0, help="above 1 discourages repetition (default: 1)")
    add("--seed", type=int, help="the same draw every time (default: a new one)")


def sampling_of(args: argparse.Namespace) -> Sampling:
    """The Sampling given by the options of `add_sampling_options`.

    Raises:
        ValueError: a value out of range.
    """
    return Sampling(args.temperature, args.top_p, args.top_k, args.min_p, args.repetition_penalty)
