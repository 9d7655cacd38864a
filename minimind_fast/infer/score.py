"""Scoring of given texts: log-probabilities, perplexity, multiple-choice accuracy.

Purpose: `score(model, pairs)`, and the two metrics that `minimind-fast eval` prints.
Principle: every metric sums log-probabilities of continuations given contexts, so there is one scorer; pairs are packed
    into one stream per batch, as in training.
Properties: perplexity is per token (comparable within a tokenizer) and per byte of text (comparable across tokenizers).
    Each token of a text is predicted exactly once, the first after bos; eos is not counted.

Formats of multiple-choice rows: C-Eval and CMMLU (`question`, `A` ... `D`, `answer`; capitalised names too) and
    OpenBookQA / ARC (`question_stem` or `question.stem`, `choices`, `answerKey`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from minimind_fast.config import IGNORE_INDEX
from minimind_fast.data.batches import Batch
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.errors import UserError
from minimind_fast.model import MiniMind
from minimind_fast.ops.documents import run


@torch.inference_mode()
def score(
    model: MiniMind, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_tokens: int = 8192
) -> list[float]:
    """Log-probability of each continuation after its context.

    Args:
        model: in evaluation mode.
        pairs: (context ids, at least one; continuation ids). Contexts too long for the model are cut at the start.
        batch_tokens: most tokens per forward pass (a single pair may exceed it).

    Returns:
        Sums of natural logarithms, in order.

    Raises:
        ValueError: an empty context, or a continuation longer than the model's context.
    """
    limit = model.config.max_position_embeddings
    rows = []
    for context, continuation in pairs:
        if not context:
            raise UserError("a context needs at least one token; begin with the tokenizer's bos_id")
        if len(continuation) > limit:
            raise UserError(f"a continuation of {len(continuation)} tokens exceeds the model's context of {limit}")
        ids = [*context, *continuation][-(limit + 1) :]
        rows.append(
            (ids[:-1], [IGNORE_INDEX] * (len(ids) - 1 - len(continuation)) + ids[len(ids) - len(continuation) :])
        )
    # Similar lengths together, longest first, so that running out of memory shows at once.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    out = [0.0] * len(rows)
    device = model.model.embed_tokens.weight.device
    for batch in _batches(order, [len(ids) for ids, _ in rows], batch_tokens):
        lengths = torch.tensor([0] + [len(rows[i][0]) for i in batch])
        ids = torch.tensor([t for i in batch for t in rows[i][0]], device=device)
        targets = torch.tensor([t for i in batch for t in rows[i][1]], device=device)
        cu = lengths.cumsum(0).to(device, torch.int32)
        pack = Batch(ids, targets, cu, int(lengths.max()), num_targets=0, num_docs=len(batch))
        logprobs = run(model, pack, targets=targets).logprobs
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
        tokenizer: the model's.
        texts: each is scored on its own, after bos.
        max_seq_len: tokens; longer texts are cut into independent pieces.

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
        raise UserError("the texts are empty: there is nothing to measure")
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
    letters: bool  # True: the prompt lists the choices and a letter answers (C-Eval); else each choice's text is scored


def read_question(row: dict[str, Any], where: str) -> Question:
    """Parse one row of a multiple-choice file.

    Args:
        row: the JSON object.
        where: source to name in errors.

    Raises:
        ValueError: an unknown format.
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
    raise UserError(
        f"{where}: not a multiple-choice row; known are question/A/B/C/D/answer (C-Eval, CMMLU) "
        "and question_stem/choices/answerKey (OpenBookQA)"
    )


class Accuracy(NamedTuple):
    """Share of questions answered correctly."""

    accuracy: float
    accuracy_norm: float  # with log-probabilities divided by the choice's length in characters
    chance: float
    questions: int


def multiple_choice(model: MiniMind, tokenizer: Tokenizer, questions: Sequence[Question]) -> Accuracy:
    """Accuracy by log-likelihood: the likeliest continuation is the model's choice.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        questions: from `read_question`.

    Raises:
        ValueError: no questions.

    Source: Gao et al., lm-evaluation-harness 0.4.13: acc and acc_norm, its prompts for C-Eval, CMMLU and OpenBookQA without
        their description, and where a continuation begins in the ids. Matches its numbers with `add_bos_token=True`.
    """
    if not questions:
        raise UserError("no questions: there is nothing to measure")
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
            cut = min(begin, len(ids) - 1)  # a merge across the boundary must not leave an empty continuation
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
