"""`minimind-fast export`, `import` and `lora`: convert models and adapters between formats.

Purpose: take a trained model to other tools (Transformers, vLLM, llama.cpp's converter, lm-eval), or bring one from there.
Principle: open what PATH names, write it in the requested format; `weights/checkpoint.py` and `weights/hf.py` do both.
Properties: no partial output; an existing model is replaced only with --overwrite, anything else never. Weights are not
    changed unless --dtype is given.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from minimind_fast.commands.options import (
    add_base_option,
    add_lora_option,
    add_shape_options,
    open_stored,
    told_shape,
    with_adapters,
)
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.model import MiniMind
from minimind_fast.weights.adapter_files import read_adapters, recorded_base, save_adapters
from minimind_fast.weights.checkpoint import (
    FORMATS,
    check_replaceable,
    load_pretrained,
    resolve_folder,
    save_pretrained,
)
from minimind_fast.weights.hf import ARCHITECTURES, fitting_format, obstacles
from minimind_fast.weights.pth import read_differently

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main_export(argv: list[str]) -> int:
    """`minimind-fast export PATH OUT`: write a model in another format.

    Args:
        argv: the arguments after the command.

    Returns:
        The exit code.

    Raises:
        ValueError: something cannot be read, represented or written.
    """
    parser = _parser("export", "Write a model for Transformers and the tools that read its folders.")
    parser.add_argument(
        "--format",
        default="auto",
        choices=("auto", *FORMATS),
        help="auto: the Hugging Face format that holds this model (llama, qwen3 or qwen3_moe) (default: auto)",
    )
    text = "write a .pth though MiniMind's own config would compute something else; its MiniMindConfig is edited then"
    parser.add_argument("--edited_config", action="store_true", help=text)
    add_lora_option(parser)
    return _convert(parser.parse_args(argv))


def main_import(argv: list[str]) -> int:
    """`minimind-fast import PATH OUT`: write a model in our own folder format, ready for training and chat.

    Args:
        argv: the arguments after the command.

    Returns:
        The exit code.

    Raises:
        ValueError: something cannot be read, represented or written.
    """
    parser = _parser("import", "Bring a Llama, Qwen3 or Qwen3-MoE folder or a MiniMind .pth into a MiniMind folder.")
    parser.set_defaults(format="minimind", edited_config=False)
    return _convert(parser.parse_args(argv))


def _parser(command: str, text: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"minimind-fast {command}", description=text)
    add = parser.add_argument
    add("path", metavar="PATH", help="folder with a model, a run's folder, or MiniMind's .pth")
    add("out", metavar="OUT", help="folder to write (a file for --format pth)")
    add("--dtype", default="auto", choices=("auto", *DTYPES), help="of the weights (default: auto, as stored)")
    add("--max_shard_size", metavar="SIZE", help="split larger weights into files of this size, such as 500MB")
    add("--tokenizer", metavar="FOLDER", help="where the tokenizer is (default: with the model)")
    add("--overwrite", action="store_true", help="replace a model that is there already")
    add_shape_options(parser)
    parser.set_defaults(device="cpu", threads=0, lora=None)
    return parser


def _convert(args: argparse.Namespace) -> int:
    source, out = resolve_folder(args.path), Path(args.out)
    _check_places(source, out, args.format == "pth", args.overwrite)
    model, tokenizer = _open(args, source)
    format = args.format
    if format == "auto":
        format = fitting_format(model.config)
        if format is None:
            reasons = "; ".join(f"{name}: {', '.join(obstacles(model.config, name))}" for name in ARCHITECTURES)
            raise ValueError(f"no other format holds this model ({reasons}); --format minimind and pth do")
    if format == "pth":
        _check_reader(model, args.edited_config)
    if format in ARCHITECTURES and model.config.dropout:
        print(f"note: dropout {model.config.dropout} becomes attention_dropout; answers do not change", file=sys.stderr)
    dtype = DTYPES.get(args.dtype) or model.lm_head.weight.dtype
    save_pretrained(model, out, format=format, dtype=dtype, tokenizer=tokenizer, max_shard_size=args.max_shard_size)
    if tokenizer is None and format != "pth":
        print("note: no tokenizer with the model; written without one (name it with --tokenizer)", file=sys.stderr)
    print(f"{out}: {format}, {str(dtype).removeprefix('torch.')}, {model.num_parameters() / 1e6:.1f}M parameters")
    return 0


def _open(args: argparse.Namespace, source: Path) -> tuple[MiniMind, Tokenizer | None]:
    """The model in its stored dtype (the writer casts, and sees what would be lost), and its tokenizer if any."""
    if args.tokenizer or (source / "tokenizer.json").is_file():
        return open_stored(argparse.Namespace(**{**vars(args), "dtype": "auto"}))
    model = load_pretrained(source, **told_shape(args, source))
    return with_adapters(model, args.lora, getattr(args, "any_base", False)), None


def _check_reader(model: MiniMind, edited: bool) -> None:
    """Refuse a .pth that MiniMind would open as another model without a word."""
    fields = read_differently(model.config)
    if not fields:
        return
    need = ", ".join(f"{name}={value!r}" for name, value in fields.items())
    if not edited:
        raise ValueError(
            f"a .pth has no config, and MiniMind's own would make another model of this one: it needs {need}; write a "
            "folder (--format minimind), or edit its MiniMindConfig and add --edited_config"
        )
    print(f"note: MiniMind reads this as it is only with MiniMindConfig(..., {need})", file=sys.stderr)


def _check_places(source: Path, out: Path, a_file: bool, overwrite: bool) -> None:
    check_replaceable(out, a_file)
    here, there = source.resolve(), out.resolve()
    if here == there or there in here.parents or here in there.parents:
        raise ValueError(f"one of {out} and {source} lies inside the other; name another place to write to")
    if not overwrite and (out.is_file() or (out.is_dir() and any(out.iterdir()))):
        raise ValueError(f"{out} is there already; add --overwrite to replace it")


def main_lora(argv: list[str]) -> int:
    """`minimind-fast lora merge BASE ADAPTER OUT` and `minimind-fast lora convert ADAPTER OUT`.

    Args:
        argv: the arguments after the command.

    Returns:
        The exit code.

    Raises:
        ValueError: something cannot be read or written, or does not belong together.
    """
    parser = argparse.ArgumentParser(
        prog="minimind-fast lora", description="Adapters: merge them, or change their format."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="merge|convert")
    add = commands.add_parser("merge", help="add adapters into a model").add_argument
    add("path", metavar="BASE", help="folder of the model that the adapters were trained on, or its .pth")
    add("adapter", metavar="ADAPTER", help="PEFT folder, MiniMind .pth, or the folder of a LoRA run")
    add("out", metavar="OUT", help="folder to write")
    add_shape_options(commands.choices["merge"])
    add("--tokenizer", metavar="FOLDER", help="where the tokenizer is (default: with the model)")
    text = "of the merged weights; half precision rounds small changes away (default: float32)"
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help=text)
    add = commands.add_parser("convert", help="PEFT's folder to MiniMind's .pth, or back").add_argument
    add("adapter", metavar="ADAPTER", help="PEFT folder, MiniMind .pth, or the folder of a LoRA run")
    add("out", metavar="OUT", help="a .pth file or a folder to write")
    text = "refuse what MiniMind's own loader would pass over: adapters of projections that are not square"
    add("--for_minimind", action="store_true", help=text)
    add_base_option(commands.choices["merge"])
    for command in commands.choices.values():
        command.add_argument("--overwrite", action="store_true", help="replace what is there already")
    args = parser.parse_args(argv)
    if Path(args.out).exists() and not args.overwrite:
        raise ValueError(f"{args.out} is there already; add --overwrite to replace it")
    if args.command == "convert":
        found, lora = read_adapters(args.adapter)
        base, fingerprint = recorded_base(args.adapter)
        about = dict(base=base, fingerprint=fingerprint)
        save_adapters(found, lora, args.out, **about, square_only=args.for_minimind)
        print(f"{args.out}: {len(found)} adapters of rank {lora.rank} on {', '.join(lora.targets)}")
        if Path(args.out).suffix == ".pth" and not set(lora.targets) <= {"q_proj", "o_proj"}:
            print("note: MiniMind itself loads adapters of square projections only (--lora_targets square)")
        return 0
    model, tokenizer = open_stored(argparse.Namespace(**vars(args), device="cpu", threads=0, lora=args.adapter))
    save_pretrained(model, args.out, tokenizer=tokenizer)
    print(f"{args.out}: {model.num_parameters() / 1e6:.1f}M parameters, the adapters of {args.adapter} merged")
    return 0
