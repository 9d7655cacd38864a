"""Pack what a bare, offline GPU machine needs beside the repository: wheels and a corpus of real text.

    python -m benchmarks.pack_for_gpu --data_path pretrain.jsonl --val_data_path val.jsonl --sft_data_path sft.jsonl \
        --tokenizer_path FOLDER

Purpose: one command before using GPU time. It fills benchmarks/wheels (by wheels.sh) and benchmarks/corpus, both ignored by
    git; copy both, and `benchmarks/gpu.sh` finds them.
Principle: text is copied as JSONL and tokenised there in seconds, by the code under test; a token cache would double the
    size. Text beyond --max_mb is thinned evenly by whole lines, deterministically.
Properties: each file is tokenised here first, so bad lines show before the copy; corpus.json holds rows, tokens, bytes and
    hashes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from minimind_fast.data import samples
from minimind_fast.data.cache import build_cache, encode_pretrain
from minimind_fast.data.chats import ChatEncoder
from minimind_fast.data.tokenizer import Tokenizer

HERE = Path(__file__).parent
FOLDER = HERE / "corpus"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class Corpus(NamedTuple):
    """Paths of the text, packed or shipped with the package."""

    pretrain: Path
    val: Path
    sft: Path
    tokenizer: Path


def find_corpus(folder: Path, dry_run: bool = False) -> Corpus:
    """The packed corpus; in a dry run without one, the shipped samples.

    Args:
        folder: written by `pack`.
        dry_run: allow the samples.

    Raises:
        ValueError: there is no corpus.
    """
    corpus = Corpus(folder / "pretrain.jsonl", folder / "val.jsonl", folder / "sft.jsonl", folder / "tokenizer")
    missing = [path.name for path in corpus if not path.exists()]
    if not missing:
        return corpus
    if dry_run:
        return Corpus(*(samples.path(n) for n in ("pretrain.jsonl", "pretrain_val.jsonl", "sft.jsonl", "tokenizer")))
    raise ValueError(
        f"no real text in {folder} ({', '.join(missing)} missing): run `python -m benchmarks.pack_for_gpu --help` where "
        "the data is, and carry that folder here; or --dry_run for the shipped samples"
    )


def thin(sources: list[str], target: Path, max_bytes: int) -> dict[str, Any]:
    """Copy JSONL lines, evenly spaced ones if all are too large.

    Args:
        sources: JSONL files, read in order.
        target: file to write.
        max_bytes: size limit of the target.

    Returns:
        rows, of_rows, bytes, sha256.
    """
    lines = [line.rstrip(b"\r\n") for source in sources for line in Path(source).read_bytes().split(b"\n")]
    lines = [line for line in lines if line.strip()]
    share = 1.0
    while True:
        kept = [line for i, line in enumerate(lines) if int((i + 1) * share) > int(i * share)]
        data = b"".join(line + b"\n" for line in kept)
        if len(data) <= max_bytes:
            break
        share *= 0.999 * max_bytes / len(data)
    target.write_bytes(data)
    return {
        "rows": len(kept),
        "of_rows": len(lines),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def pack(args: argparse.Namespace) -> dict[str, Any]:
    """Write the corpus folder.

    Returns:
        The content of corpus.json.

    Raises:
        ValueError: an unusable file or line, or no room left for the pretraining text.
    """
    tokenizer = Tokenizer.load(args.tokenizer_path)
    aside = args.out.with_name(f"{args.out.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "tokenizer").mkdir(parents=True)
    source = Path(args.tokenizer_path)
    for name in TOKENIZER_FILES:
        file = (source if source.is_dir() else source.parent) / name
        if file.is_file():
            shutil.copyfile(file, aside / "tokenizer" / name)
    left = int(args.max_mb * 1e6) - sum(file.stat().st_size for file in (aside / "tokenizer").iterdir())
    found: dict[str, Any] = {"tokenizer": tokenizer.fingerprint}
    with tempfile.TemporaryDirectory() as caches:
        for name, sources in (("val", args.val_data_path), ("sft", args.sft_data_path), ("pretrain", args.data_path)):
            room = left if name == "pretrain" else left // 3
            found[name] = thin(sources, aside / f"{name}.jsonl", room)
            left -= found[name]["bytes"]
            encode = ChatEncoder(tokenizer) if name == "sft" else encode_pretrain
            cache = build_cache(aside / f"{name}.jsonl", tokenizer, cache_dir=caches, encode=encode, log=lambda _: None)
            found[name]["tokens"] = cache.num_tokens
    (aside / "corpus.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(args.out, ignore_errors=True)
    os.replace(aside, args.out)
    return found


def size_mb(folder: Path) -> float:
    """Total size of a folder's files in MB."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--data_path", nargs="+", required=True, help="pretraining JSONL")
    add("--val_data_path", nargs="+", required=True, help="held-out pretraining JSONL")
    add("--sft_data_path", nargs="+", required=True, help="chats")
    add("--tokenizer_path", required=True, help="folder with tokenizer.json")
    add("--out", type=Path, default=FOLDER)
    add("--max_mb", type=float, default=30.0, help="size of the corpus at most")
    add("--no_wheels", action="store_true", help="the corpus only")
    args = parser.parse_args()
    try:
        found = pack(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name in ("pretrain", "val", "sft"):
        print("{name:9} {rows:,} of {of_rows:,} rows, {tokens:,} tokens".format(name=name, **found[name]))
    print(f"{args.out}: {size_mb(args.out):.1f} MB")
    if not args.no_wheels:
        code = subprocess.run([str(HERE / "wheels.sh")], env=os.environ | {"PYTHON": sys.executable}).returncode
        if code:
            print(
                "error: the wheels could not be fetched; what pip said is above. The corpus is done.", file=sys.stderr
            )
            return code
    print("Carry benchmarks/corpus and benchmarks/wheels with the repository; there: benchmarks/gpu.sh, then --second.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
