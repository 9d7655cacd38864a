"""Rewards: plain functions that score answers, found by name and summed.

Purpose: `--reward correct format*0.5 mine.py:politeness` turns each answer into one number.
Principle: a reward is a function f(prompts, answers, rows) -> list of floats, one per answer, of the prompt texts, the
    answer texts (tags kept, end marker removed) and the data's rows as dicts. Built-in rewards use the same interface as
    a user's own.
Properties: pure Python on strings; a wrong number of values, or one that is not finite, is an error that names the reward.
    If the prompt opens a thought, it counts as the start of the answer.

Built in: `length`, `thinking`, `repetition` are the rules of MiniMind's GRPO (`minimind_repetition` to the letter);
`format`, `tagged` and `correct` are strict, for answers that can be checked. For a model as judge see `ModelReward`.

Source: MiniMind's train_grpo for the first three.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from minimind_fast import plugins
from minimind_fast.data.batches import Batch
from minimind_fast.data.chats import Chat, read_chat
from minimind_fast.data.rows import BadRow
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.errors import UserError
from minimind_fast.infer.score import score
from minimind_fast.model import MiniMind
from minimind_fast.ops.documents import run
from minimind_fast.weights.checkpoint import load_config, load_disk_weights, read_weights, resolve_folder
from minimind_fast.weights.frozen import frozen

Reward = Callable[[Sequence[str], Sequence[str], Sequence[dict[str, Any]]], list[float]]

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def expected_answer(row: dict[str, Any]) -> str | None:
    """The right answer according to a row of the data.

    Args:
        row: has `answer`, MiniMind's `gt`, or a last message by the assistant.

    Returns:
        The text; None if there is none: an empty one says no more than a missing one.
    """
    for key in ("answer", "gt"):
        value = row.get(key)
        if isinstance(value, list):
            value = value[0] if value else None
        if value is not None:
            return str(value).strip() and str(value) or None
    last = row["conversations"][-1]
    content = last.get("content") if last.get("role", "assistant") == "assistant" else None
    return (final_answer(content) or None) if isinstance(content, str) else None


def split_thought(prompt: str, answer: str) -> tuple[str | None, str]:
    """Split an answer into its thought and the rest.

    Args:
        prompt: the text before the answer; it may open the thought.
        answer: as written.

    Returns:
        (the thought, or None unless one was opened and closed; the rest).
    """
    whole = f"<think>{answer}" if prompt.rstrip().endswith("<think>") else answer
    thought, closed, rest = whole.partition("</think>")
    if not closed or "<think>" not in thought:
        return None, answer
    return thought.split("<think>", 1)[1], rest


def final_answer(answer: str) -> str:
    """The part of an answer that counts: between its <answer> tags, else after its thought."""
    rest = answer.rpartition("</think>")[2]
    tagged = re.search(r"<answer>(.*?)</answer>", rest, re.DOTALL)
    return (tagged[1] if tagged else rest).strip()


def length(prompts: Sequence[str], answers: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
    """0.5 for an answer of 20 to 800 characters, else -0.5."""
    return [0.5 if 20 <= len(answer.strip()) <= 800 else -0.5 for answer in answers]


def thinking(prompts: Sequence[str], answers: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
    """1 for a closed thought of 20 to 300 characters, else -0.5; 0.25 more if it is closed once, 0.25 less if more often.

    An answer without `</think>` gets 0.
    """
    out = []
    for answer in answers:
        thought, closed, _ = answer.partition("</think>")
        once = 0.25 if answer.count("</think>") == 1 else -0.25
        out.append((1.0 if 20 <= len(thought.strip()) <= 300 else -0.5) + once if closed else 0.0)
    return out


def repetition(prompts: Sequence[str], answers: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
    """Minus the share of repeated trigrams after the thought, at least -0.5; a punctuation mark counts as a word."""
    out = []
    for answer in answers:
        # Each Chinese character is a word: \w+ would match a whole sentence as one.
        words = re.findall(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+|[^\w\s]", answer.rpartition("</think>")[2].lower())
        out.append(_repeated(words))
    return out


def minimind_repetition(prompts: Sequence[str], answers: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
    """MiniMind's own `repetition`: Chinese without punctuation is one word, and the answer follows the first </think>."""
    out = []
    for answer in answers:
        words = re.findall(
            r"\w+|[^\w\s]", (answer.partition("</think>")[2] if "</think>" in answer else answer).lower()
        )
        out.append(_repeated(words))
    return out


def _repeated(words: list[str]) -> float:
    """Minus the share of trigrams that occurred before, at least -0.5; 0 for fewer than three words."""
    runs = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    return -min(0.5, (len(runs) - len(set(runs))) / len(runs)) if runs else 0.0


def format(prompts: Sequence[str], answers: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
    """1 for a thought that is opened and closed once, then an answer, with <answer> tags paired if any; else 0."""
    out = []
    for prompt, answer in zip(prompts, answers, strict=True):
        thought, rest = split_thought(prompt, answer)
        pairs = len(re.findall(r"<answer>[^<]*\S[^<]*</answer>", rest))
        good = thought is not None and bool(thought.strip()) and bool(rest.strip())
        good = good and not re.search("</?think>|</?answer>", thought or "") and not re.search("</?think>", rest)
        out.append(float(good and pairs <= 1 and rest.count("<answer>") == rest.count("</answer>") == pairs))
    return out


def tagged(prompts: Sequence[str], answers: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
    """1 for a thought followed by one non-empty pair of <answer> tags and nothing else; else 0."""
    thoughts = (split_thought(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True))
    whole = re.compile(r"\s*<answer>[^<]*[^<\s][^<]*</answer>\s*")
    return [float(thought is not None and whole.fullmatch(rest) is not None) for thought, rest in thoughts]


def correct(prompts: Sequence[str], answers: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
    """1 if the last number of the final answer is the expected one; for a non-numeric answer, if the texts are equal.

    Raises:
        UserError: a row has no expected answer.
    """
    out = []
    for answer, row in zip(answers, rows, strict=True):
        expected = expected_answer(row)
        if expected is None:
            said = json.dumps(row, ensure_ascii=False)[:120]
            raise UserError(f'--reward correct: the row says no answer (give it an "answer" or "gt"): {said}')
        out.append(float(_same(final_answer(answer), expected)))
    return out


def _same(answer: str, expected: str) -> bool:
    expected = expected.strip()
    if _NUMBER.fullmatch(expected.replace(",", "")):
        found = _NUMBER.findall(answer.replace(",", ""))
        return bool(found) and float(found[-1]) == float(expected.replace(",", ""))
    return " ".join(answer.split()).casefold() == " ".join(expected.split()).casefold()


BUILT_IN: dict[str, Reward] = {
    f.__name__: f for f in (length, thinking, repetition, minimind_repetition, format, tagged, correct)
}


class ModelReward:
    """Scores answers (after their thoughts) with a model that our own reader knows; for others see `judge`.

    A folder whose config names a `...ForSequenceClassification` with one label, as published reward models of the Llama
    and Qwen3 families do, gives its score of the chat, clipped to +-3 as in MiniMind. Any other readable folder is a
    language model: the reward is the mean log-probability of the answer's tokens under it, which asks "would this model
    say so?" and is not a learned preference.

    Args:
        folder: weights, config.json and tokenizer; the chat is rendered by its own template.
        device: device of the weights.
        dtype: dtype of the weights; None: as stored.

    Raises:
        UserError: an unsupported model; says what to do.
    """

    __name__ = "model"

    def __init__(
        self, folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> None:
        folder = resolve_folder(folder)
        try:
            self.tokenizer = Tokenizer.load(folder)
            self.head: torch.Tensor | None = None
            weights = read_weights(folder)
            if "score.weight" in weights:
                model, head = _load_scorer(folder, weights)
                self.model, self.head = frozen(model, device, dtype), head.to(device, dtype)
            else:
                self.model = frozen(folder, device, dtype)
        except ValueError as error:
            raise UserError(f"--reward_model_path: {error}") from None

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str], answers: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
        """Return each answer's score, or the mean log-probability of its tokens (0 if empty)."""
        render, encode = self.tokenizer.render_chat, self.tokenizer.encode
        pairs = [
            (question(row), answer.rpartition("</think>")[2].strip()) for row, answer in zip(rows, answers, strict=True)
        ]
        if self.head is None:
            contexts = [encode(render(chat.messages, chat.tools, add_generation_prompt=True)) for chat, _ in pairs]
            said = [encode(text) for _, text in pairs]
            sums = score(self.model, list(zip(contexts, said, strict=True)))
            return [total / max(len(ids), 1) for total, ids in zip(sums, said, strict=True)]
        chats = [([*chat.messages, {"role": "assistant", "content": text}], chat.tools) for chat, text in pairs]
        rows_ids = [encode(render(*chat)) for chat in chats]
        cu = torch.tensor([0, *map(len, rows_ids)], device=self.head.device).cumsum(0)
        ids = torch.tensor([i for row in rows_ids for i in row], device=self.head.device)
        batch = Batch(ids, ids, cu.to(torch.int32), max(map(len, rows_ids)), num_targets=0, num_docs=len(rows_ids))
        hidden = run(self.model, batch, return_hidden=True).hidden
        assert hidden is not None
        return (hidden[cu[1:] - 1] @ self.head.T).float().squeeze(-1).clamp(-3, 3).tolist()


def _load_scorer(folder: Path, weights: dict[str, torch.Tensor]) -> tuple[MiniMind, torch.Tensor]:
    """Load (the body, the (1, D) head) of a sequence classifier with one label."""
    head = weights.pop("score.weight")
    if head.shape[0] != 1:
        raise UserError(f"{folder} has {head.shape[0]} labels: a reward model has one")
    config = load_config(folder)
    config.tie_word_embeddings = True  # there is no vocabulary head
    with torch.random.fork_rng(devices=[]):
        model = MiniMind(config).to(head.dtype)
    load_disk_weights(model, weights, str(folder))
    return model, head


def question(row: dict[str, Any]) -> Chat:
    """The chat of a row up to the model's answer.

    Args:
        row: has `conversations`; a last message by the assistant is dropped.

    Raises:
        UserError: the row is unusable.
    """
    chat = read_chat(row)
    if isinstance(chat, BadRow):
        raise UserError(chat.problem)
    if chat.messages[-1]["role"] == "assistant":
        chat.messages.pop()
    if not chat.messages or chat.messages[-1]["role"] not in ("user", "tool"):
        raise UserError(
            "nobody asks anything: the last message before the empty one of the assistant must be the user's"
        )
    return chat


class Rewards:
    """The weighted sum of several rewards.

    Args:
        specs: each NAME, MODULE:FUNCTION or FILE.py:FUNCTION, followed by *WEIGHT if that is not 1.
        model: one more reward, or None.

    Raises:
        UserError: an unknown name, or something that cannot be imported or called.
    """

    def __init__(self, specs: Sequence[str], model: Reward | None = None) -> None:
        if not specs and model is None:
            raise UserError("give at least one --reward")
        self.parts: list[tuple[str, Reward, float]] = []
        for spec in specs:
            name, star, weight = spec.partition("*")
            try:
                factor = float(weight) if star else 1.0
            except ValueError:
                factor = math.nan
            if not math.isfinite(factor):
                raise UserError(f"--reward {spec}: {weight!r} is not a number; write for example {name}*0.5")
            self.parts.append((name, find(name), factor))
        if model is not None:
            self.parts.append(("model", model, 1.0))
        self.names = [name.rpartition(":")[2] for name, _, _ in self.parts]
        if len(set(self.names)) < len(self.names):
            raise UserError(f"--reward: two rewards are called the same: {', '.join(self.names)}")

    def check_row(self, row: dict[str, Any]) -> None:
        """Refuse a row that cannot be rewarded, before training starts.

        Args:
            row: of the data.

        Raises:
            UserError: `correct` is used and the row has no expected answer.
        """
        if any(function is correct for _, function, _ in self.parts):
            correct([""], [""], [row])

    def __call__(
        self, prompts: Sequence[str], answers: Sequence[str], rows: Sequence[dict[str, Any]]
    ) -> tuple[list[float], dict[str, list[float]]]:
        """Reward answers.

        Args:
            prompts: N texts given to the model.
            answers: N texts that it wrote.
            rows: N rows of the data.

        Returns:
            (N weighted sums, the N unweighted values of each reward by name).

        Raises:
            UserError: a reward did not return N finite numbers.
        """
        total, each = [0.0] * len(answers), {}
        for name, (spec, function, weight) in zip(self.names, self.parts, strict=True):
            given = plugins.call(f"--reward {spec}", function, prompts, answers, rows)
            if not isinstance(given, Iterable):
                raise UserError(f"--reward {spec} must give a list of numbers, one an answer, not {given!r:.80}")
            values = list(given)
            if len(values) != len(answers):
                raise UserError(f"--reward {spec} gave {len(values)} values for {len(answers)} answers")
            try:
                values = [float(value) for value in values]
            except (TypeError, ValueError):
                raise UserError(f"--reward {spec} must give numbers, not {values[:3]}") from None
            bad = [value for value in values if not math.isfinite(value)]
            if bad:
                raise UserError(f"--reward {spec} gave {bad[0]}: rewards must be finite")
            each[name] = values
            total = [t + weight * value for t, value in zip(total, values, strict=True)]
        return total, each


def find(name: str) -> Reward:
    """Look up a reward by name.

    Args:
        name: a built-in reward, MODULE:FUNCTION (importable, or in the current folder) or FILE.py:FUNCTION.

    Raises:
        UserError: no such reward.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    if ":" not in name:
        raise UserError(f"--reward {name}: no such reward; built in are {', '.join(BUILT_IN)}, else FILE.py:FUNCTION")
    return cast(Reward, plugins.load("--reward", name))
