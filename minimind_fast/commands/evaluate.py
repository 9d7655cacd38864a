"""How good is it: sample answers, perplexity, and multiple-choice accuracy (`minimind-fast eval`).

Purpose: the habits of MiniMind's `eval_llm.py` (a list of prompts for each kind of model), and numbers beside them.
Principle: every number is a sum of log-probabilities of given tokens after given tokens, so there is one scorer; pairs are
    packed into one stream a batch, as in training.
Properties: perplexity is per token (comparable for one tokenizer) and per byte of text (comparable for all). Each token
    of a text is predicted exactly once, the first after bos; eos is not counted.

Formats of multiple-choice rows: C-Eval and CMMLU (`question`, `A` ... `D`, `answer`; capitalised names too) and
    OpenBookQA / ARC (`question_stem` or `question.stem`, `choices`, `answerKey`).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minimind_fast.commands.options import add_model_options, add_sampling_options, open_model, sampling_of
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.infer.generate import generate_batch
from minimind_fast.model import MiniMind
from minimind_fast.ops.reference import IGNORE_INDEX

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


@torch.inference_mode()
def score(
    model: MiniMind, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_tokens: int = 8192
) -> list[float]:
    """Log-probability of each continuation after its context.

    Args:
        model: in evaluation mode.
        pairs: (context ids, at least one; continuation ids). A context too long for the model loses its beginning.
        batch_tokens: tokens a forward pass, at most (one pair may have more).

    Returns:
        Sums of natural logarithms, in the pairs' order.

    Raises:
        ValueError: an empty context, or a continuation longer than the model's context.
    """
    limit = model.config.max_position_embeddings
    rows = []
    for context, continuation in pairs:
        if not context:
            raise ValueError("a context needs at least one token; begin with the tokenizer's bos_id")
        if len(continuation) > limit:
            raise ValueError(f"a continuation of {len(continuation)} tokens exceeds the model's context of {limit}")
        ids = [*context, *continuation][-(limit + 1) :]
        rows.append(
            (ids[:-1], [IGNORE_INDEX] * (len(ids) - 1 - len(continuation)) + ids[len(ids) - len(continuation) :])
        )
    # Like lengths together, longest first: what does not fit into memory shows at once.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    out = [0.0] * len(rows)
    device = model.model.embed_tokens.weight.device
    for batch in _batches(order, [len(ids) for ids, _ in rows], batch_tokens):
        lengths = torch.tensor([0] + [len(rows[i][0]) for i in batch])
        ids = torch.tensor([t for i in batch for t in rows[i][0]], device=device)
        targets = torch.tensor([t for i in batch for t in rows[i][1]], device=device)
        cu = lengths.cumsum(0).to(device, torch.int32)
        logprobs = model(ids, targets=targets, cu_seqlens=cu, max_seqlen=int(lengths.max())).logprobs
        for i, part in zip(batch, logprobs.double().split(lengths[1:].tolist()), strict=True):
            out[i] = part.sum().item()
    return out


def _batches(order: list[int], lengths: list[int], batch_tokens: int) -> Iterator[list[int]]:
    batch, total = [], 0
    for i in order:
        if batch and total + lengths[i] > batch_tokens:
            yield batch
            batch, total = [], 0
        if lengths[i]:
            batch.append(i)
            total += lengths[i]
    if batch:
        yield batch


class Perplexity(NamedTuple):
    """How well a model predicts texts."""

    per_token: float
    per_byte: float
    bits_per_byte: float
    tokens: int
    bytes: int


def perplexity(model: MiniMind, tokenizer: Tokenizer, texts: Sequence[str], max_seq_len: int = 512) -> Perplexity:
    """Perplexity of texts.

    Args:
        model: in evaluation mode.
        tokenizer: its own.
        texts: each begins anew after bos.
        max_seq_len: longer texts are cut into pieces that do not see each other.

    Raises:
        ValueError: there is nothing to predict.
    """
    pairs = []
    for ids in tokenizer.encode_batch(list(texts)):
        whole = [tokenizer.bos_id, *ids]
        for begin in range(0, len(ids), max_seq_len):
            pairs.append((whole[begin : begin + 1], whole[begin + 1 : begin + 1 + max_seq_len]))
    tokens, size = sum(len(c) for _, c in pairs), sum(len(t.encode("utf-8")) for t in texts)
    if not tokens:
        raise ValueError("the texts are empty: there is nothing to measure")
    nats = -math.fsum(score(model, pairs))
    return Perplexity(_exp(nats / tokens), _exp(nats / size), nats / size / math.log(2), tokens, size)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


class Question(NamedTuple):
    """A multiple-choice question."""

    text: str
    labels: list[str]
    choices: list[str]
    answer: str
    letters: bool  # the choices are shown and a letter is the answer (C-Eval); else each choice's text is scored


def read_question(row: dict[str, Any], where: str) -> Question:
    """One row of a multiple-choice file.

    Args:
        row: the JSON object.
        where: named in errors.

    Raises:
        ValueError: no known format.
    """
    lower = {key if len(key) == 1 else key.lower(): value for key, value in row.items()}
    labels = [c for c in "ABCDEFGH" if lower.get(c) is not None]
    if isinstance(lower.get("question"), str) and len(labels) > 1 and lower.get("answer") in labels:
        return Question(lower["question"], labels, [str(lower[c]) for c in labels], str(lower["answer"]), True)
    inner = lower["question"] if isinstance(lower.get("question"), dict) else lower
    text = inner.get("question_stem") or inner.get("stem") or inner.get("question")
    choices, answer = inner.get("choices"), lower.get("answerkey")
    if isinstance(choices, list) and all(isinstance(c, dict) and {"text", "label"} <= c.keys() for c in choices):
        choices = {"text": [c["text"] for c in choices], "label": [c["label"] for c in choices]}
    if isinstance(text, str) and isinstance(choices, dict) and answer in choices.get("label", ()):
        return Question(text, list(choices["label"]), list(choices["text"]), str(answer), False)
    raise ValueError(
        f"{where}: not a multiple-choice row; known are question/A/B/C/D/answer (C-Eval, CMMLU) "
        "and question_stem/choices/answerKey (OpenBookQA)"
    )


class Accuracy(NamedTuple):
    """Share of questions answered right."""

    accuracy: float
    accuracy_norm: float  # log-probabilities divided by the choice's characters
    chance: float
    questions: int


def multiple_choice(model: MiniMind, tokenizer: Tokenizer, questions: Sequence[Question]) -> Accuracy:
    """Accuracy by log-likelihood: the likeliest continuation is the model's choice.

    Args:
        model: in evaluation mode.
        tokenizer: its own.
        questions: from `read_question`.

    Raises:
        ValueError: no questions.

    Source: Gao et al., lm-evaluation-harness 0.4.13 (acc and acc_norm, its prompts for C-Eval, CMMLU and OpenBookQA without
        their description; where a continuation begins in the token ids). Its numbers are these with `add_bos_token=True`.
    """
    if not questions:
        raise ValueError("no questions: there is nothing to measure")
    pairs: list[tuple[list[int], list[int]]] = []
    for q in questions:
        if q.letters:
            shown = "\n".join(f"{label}. {text}" for label, text in zip(q.labels, q.choices, strict=True))
            context, continuations = f"{q.text.strip()}\n{shown}\n答案：", [f" {label}" for label in q.labels]
        else:
            context, continuations = q.text.strip(), [f" {c}" for c in q.choices]
        begin = len(tokenizer.encode(context))
        for continuation in continuations:
            ids = tokenizer.encode(context + continuation)
            cut = min(begin, len(ids) - 1)  # a merge across the border must not leave an empty continuation
            pairs.append(([tokenizer.bos_id, *ids[:cut]], ids[cut:]))
    scores = iter(score(model, pairs))
    right = right_norm = 0
    for q in questions:
        values = [next(scores) for _ in q.choices]
        sizes = [len(c) for c in (q.labels if q.letters else q.choices)]
        wanted = q.labels.index(q.answer)
        right += max(range(len(values)), key=values.__getitem__) == wanted
        right_norm += max(range(len(values)), key=lambda i: values[i] / max(sizes[i], 1)) == wanted
    n = len(questions)
    return Accuracy(right / n, right_norm / n, sum(1 / len(q.choices) for q in questions) / n, n)


def read_jsonl(file: str | Path, limit: int = 0) -> list[dict[str, Any]]:
    """Objects of a JSONL file.

    Args:
        file: its path.
        limit: at most; 0 for all.

    Raises:
        ValueError: a line that is not a JSON object, with its number.
    """
    rows = []
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file}, line {number}, is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{file}, line {number}, must be a JSON object")
            rows.append(row)
            if len(rows) == limit:
                break
    return rows


def read_texts(file: str | Path, limit: int = 0) -> list[str]:
    """The `text` of each row of a JSONL file.

    Args:
        file: its path.
        limit: at most; 0 for all.

    Raises:
        ValueError: a row without it.
    """
    rows = read_jsonl(file, limit)
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("text"), str):
            raise ValueError(f'{file}, row {number}, has no "text"; it has {", ".join(row)}')
    return [row["text"] for row in rows]


def show_prompts(model: MiniMind, tokenizer: Tokenizer, kind: str, **options: Any) -> list[dict[str, str]]:
    """Let the model answer a list of prompts.

    Args:
        model: the model.
        tokenizer: its own.
        kind: one of PROMPTS; "pretrained" continues, the others answer by the chat template.
        options: of `generate.generate_batch`.

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
        raise ValueError(f"unknown kind of prompts {unknown[0]!r}; choose from {', '.join(PROMPTS)}")
    sampling = sampling_of(args)
    # Files are read before the model is loaded: a typing error shows at once.
    texts = {file: read_texts(file, args.limit) for file in args.text}
    questions = {
        file: [read_question(row, f"{file}, row {i}") for i, row in enumerate(read_jsonl(file, args.limit), 1)]
        for file in args.choices
    }
    model, tokenizer = open_model(args)
    if not 1 <= args.max_seq_len <= model.config.max_position_embeddings:
        raise ValueError(f"--max_seq_len must be between 1 and {model.config.max_position_embeddings}")
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
