"""`minimind-fast eval`: sample answers, perplexity and multiple-choice accuracy.

Purpose: a list of prompts for each kind of model, as in MiniMind's `eval_llm.py`, plus numbers.
Principle: files are read before the model is loaded, so a typo shows at once; `infer/score.py` computes the metrics.
Properties: prints its measurements and, with --out, writes them as JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minimind_fast.commands.options import add_model_options, add_sampling_options, open_model, sampling_of
from minimind_fast.data.formats import Formats
from minimind_fast.data.rows import BadRow, read_rows, string_field
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.errors import DataError, UserError
from minimind_fast.infer.generate import generate_batch
from minimind_fast.infer.score import multiple_choice, perplexity, read_question
from minimind_fast.model import MiniMind

PROMPTS = {
    "pretrained": [
        "人类大脑的主要功能",
        "万有引力原理是",
        "世界上最高的山峰是",
        "The capital of France is",
        "水的沸点是",
    ],
    "chat": [
        "请介绍一下你自己。",
        "为什么天空是蓝色的？",
        "请用一句话说明什么是机器学习。",
        "推荐一些中国的美食。",
        "What is the largest planet in our solar system?",
    ],
    "identity": ["你是谁？", "你叫什么名字？", "你是ChatGPT吗？", "Who made you?"],
}


def read_some(file: str, kind: str, read: Callable[[dict[str, Any]], Any], limit: int = 0) -> list[Any]:
    """Read the rows of a file as training does.

    Args:
        file: a file, folder or glob.
        kind: what its rows are to hold, for `Formats`.
        read: a row to what is wanted; raises ValueError for one that is not usable.
        limit: most rows to read; 0 for all.

    Raises:
        DataError: names file and line.
    """

    def checked(row: dict[str, Any]) -> Any:
        try:
            return read(row)
        except ValueError as error:
            return BadRow(str(error))

    def quiet(_: str) -> None: ...

    rows = read_rows([file], checked, formats=Formats(kind), log=quiet)
    found = list(itertools.islice(rows, limit or None))
    if not found:
        raise DataError(f"{file} has no rows")
    return found


def text_of(row: dict[str, Any]) -> str:
    """The text of a row.

    Raises:
        DataError: it has none.
    """
    text = string_field(row, "text")
    if isinstance(text, BadRow):
        raise DataError(text.problem)
    return text


def show_prompts(model: MiniMind, tokenizer: Tokenizer, kind: str, **options: Any) -> list[dict[str, str]]:
    """Let the model answer a list of prompts.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        kind: one of PROMPTS; "pretrained" continues, the others answer with the chat template.
        options: for `generate.generate_batch`.

    Returns:
        [{"prompt", "answer"}].
    """
    if kind == "pretrained":
        ids = [[tokenizer.bos_id, *tokenizer.encode(p)] for p in PROMPTS[kind]]
    else:
        chats = [[{"role": "user", "content": p}] for p in PROMPTS[kind]]
        ids = [tokenizer.encode(tokenizer.render_chat(c, add_generation_prompt=True)) for c in chats]
    outs = generate_batch(model, ids, **options)
    answers = [tokenizer.decode(o, skip_special_tokens=True).strip() for o in outs]
    return [{"prompt": p, "answer": a} for p, a in zip(PROMPTS[kind], answers, strict=True)]


def main(argv: list[str]) -> int:
    """`minimind-fast eval`: sample answers, perplexity, multiple-choice accuracy.

    Args:
        argv: arguments after `eval`.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="minimind-fast eval", description="How good is a model?")
    add_model_options(parser)
    add_sampling_options(parser, temperature=0.7, top_p=0.9)
    parser.set_defaults(max_new_tokens=64, seed=0)
    add = parser.add_argument
    add("--prompts", nargs="*", help=f"kinds of prompts: {', '.join(PROMPTS)} (default: all, if nothing else is asked)")
    add("--text", nargs="+", default=[], metavar="FILE", help='JSONL of {"text"}: perplexity')
    add("--choices", nargs="+", default=[], metavar="FILE", help="JSONL of C-Eval, CMMLU or OpenBookQA rows: accuracy")
    add("--limit", type=int, default=0, help="rows of each file at most; 0 for all (default: 0)")
    add("--max_seq_len", type=int, default=512, help="longer texts are cut into pieces (default: 512)")
    add("--out", metavar="FILE", help="write the results as JSON too")
    args = parser.parse_args(argv)
    kinds = args.prompts if args.prompts is not None else [] if args.text or args.choices else list(PROMPTS)
    if unknown := [k for k in kinds if k not in PROMPTS]:
        raise UserError(f"unknown kind of prompts {unknown[0]!r}; choose from {', '.join(PROMPTS)}")
    sampling = sampling_of(args)
    texts = {file: read_some(file, "text", text_of, args.limit) for file in args.text}
    questions = {
        file: read_some(file, "questions", lambda row: read_question(row, "the row"), args.limit)
        for file in args.choices
    }
    model, tokenizer = open_model(args)
    if not 1 <= args.max_seq_len <= model.config.max_position_embeddings:
        raise UserError(f"--max_seq_len must be between 1 and {model.config.max_position_embeddings}")
    results: dict[str, Any] = {"model": args.path, "prompts": {}, "perplexity": {}, "accuracy": {}}
    for kind in kinds:
        options = {**vars(sampling), "max_new_tokens": args.max_new_tokens, "seed": args.seed}
        results["prompts"][kind] = show_prompts(model, tokenizer, kind, **options)
        print(f"\n{kind}:")
        for shown in results["prompts"][kind]:
            print(f"  {shown['prompt']} → " + shown["answer"].replace("\n", " "))
    for file, rows in texts.items():
        p = perplexity(model, tokenizer, rows, args.max_seq_len)
        results["perplexity"][file] = p._asdict()
        print(f"{file}: perplexity {p.per_token:.3f} per token, {p.per_byte:.4f} per byte", end="")
        print(f" ({p.bits_per_byte:.4f} bits per byte; {p.tokens:,} tokens, {p.bytes:,} bytes)")
    for file, rows in questions.items():
        a = multiple_choice(model, tokenizer, rows)
        results["accuracy"][file] = a._asdict()
        print(f"{file}: accuracy {a.accuracy:.1%}, by length {a.accuracy_norm:.1%}", end="")
        print(f" (chance {a.chance:.1%}; {a.questions:,} questions)")
    if args.out:
        Path(args.out).write_text(json.dumps(results, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return 0
