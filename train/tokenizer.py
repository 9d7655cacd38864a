"""Train a tokenizer: byte-level BPE with MiniMind's special tokens, from any `{"text": ...}` JSONL.

Purpose: a vocabulary fitted to your corpus. MiniMind's own tokenizers load as they are; this is for other languages
or domains. The result is a folder that `mm.Tokenizer.load` and Transformers' `AutoTokenizer` can open.

Principle: the files are streamed; every 100th text is held out, and bytes per token are measured on those.

Properties: time and memory grow with the number of distinct words, which in Chinese are whole clauses: 20 MB of mixed
Chinese and English took 25 s and 1.6 GB. So at most about --max_train_mb of text are used: every k-th row of a larger
corpus. A vocabulary of 6,400 does not need more.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from minimind_fast.data.bpe import train_bpe
from minimind_fast.data.packing import read_texts
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.training import setup
from minimind_fast.training.run import command

HOLD_OUT_EVERY = 100
MAX_HELD_OUT = 2000


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", nargs="+", required=True, help='one or more JSONL files of {"text": ...} rows')
    parser.add_argument("--vocab_size", type=int, default=6400, help="tokens in all, 36 special ones and 256 bytes too")
    parser.add_argument("--save_dir", default="out/tokenizer", help="the folder to write")
    parser.add_argument("--max_train_mb", type=float, default=50, help="use about this much text at most")
    parser.add_argument("--join_digits", action="store_true", help="let numbers become tokens; else a digit is a token")
    parser.add_argument("--on_bad_line", choices=["error", "skip"], default="error", help="stop at a bad line, or not")
    return parser.parse_args(argv)


def split(args: argparse.Namespace, held_out: list[str], counts: dict[str, int]) -> Iterator[str]:
    """Yield the texts to train on; append the others to `held_out` and count both."""
    total_mb = sum(Path(path).stat().st_size for path in args.data_path if Path(path).is_file()) / 1e6
    stride = max(1, -(-int(total_mb) // max(1, int(args.max_train_mb))))
    if stride > 1:
        print(f"{total_mb:,.0f} MB of text: training on every {stride}th row (--max_train_mb {args.max_train_mb:g})")
    for index, text in enumerate(read_texts(args.data_path, on_bad_line=args.on_bad_line)):
        if index % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1 and len(held_out) < MAX_HELD_OUT:
            held_out.append(text)
        elif index % stride == 0:
            counts["texts"] += 1
            counts["bytes"] += len(text.encode("utf-8"))
            yield text


def bytes_per_token(tokenizer: Tokenizer, texts: list[str]) -> float:
    num_tokens = sum(len(ids) for ids in tokenizer.encode_batch(texts))
    return sum(len(text.encode("utf-8")) for text in texts) / max(1, num_tokens)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    held_out: list[str] = []
    counts = {"texts": 0, "bytes": 0}
    start = time.monotonic()
    texts = split(args, held_out, counts)
    tokenizer = train_bpe(texts, args.vocab_size, sys.stderr.isatty(), split_digits=not args.join_digits)
    tokenizer.save(args.save_dir)
    seconds = time.monotonic() - start
    print(f"trained on {counts['texts']:,} texts, {counts['bytes'] / 1e6:.1f} MB, in {seconds:.1f} s")
    if held_out:
        print(f"held-out texts: {len(held_out):,}, {bytes_per_token(tokenizer, held_out):.2f} bytes per token")
    print(f"wrote {args.save_dir}: {tokenizer.vocab_size:,} tokens, fingerprint {tokenizer.fingerprint}")
    data = " ".join(args.data_path)
    print(f"next: {command('pretrain')} --tokenizer_path {args.save_dir} --data_path {data}")


if __name__ == "__main__":
    setup.start(main)
