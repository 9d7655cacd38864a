"""Rows of the stages after pretraining, in MiniMind's formats.

Purpose: small data for SFT, LoRA, DPO, reasoning and GRPO.
Principle: questions and answers from `questions.py`, in each stage's format. Evaluation rows are drawn first; a training
    row is redrawn while it asks the same question.
Properties: tools and calls are JSON in a string, as in MiniMind3's files; tool results are computed; no row twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from random import Random
from typing import Any

from minimind_fast.data.samples.facts import CAPITALS
from minimind_fast.data.samples.questions import SMALL, Maker, fact_en, fact_zh, kept_back, numbers, sum_en, sum_zh

Row = dict[str, Any]
MAKERS: tuple[tuple[Maker, ...], ...] = ((sum_zh, fact_zh), (sum_en, fact_en))
EVASIONS = (("我不知道，请不要问我。", "这个问题没有意思。"), ("I do not know.", "Do not ask me that."))


def chat(user: str, assistant: str) -> list[Row]:
    """A question and its answer as messages."""
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def questions(rows: Iterable[Row]) -> set[str]:
    """The questions that users ask in the given rows."""
    turns = (turn for row in rows for turn in row.get("conversations", row.get("chosen", [])))
    return {turn["content"] for turn in turns if turn["role"] == "user"}


def conversations(rng: Random, count: int, avoid: set[str]) -> list[Row]:
    """Chats of one to three turns, some with a system message, without the questions in `avoid`."""
    seen: dict[str, list] = {}
    while len(seen) < count:
        language = len(seen) % 2
        messages = []
        if rng.random() < 0.15:
            system = ("你是一个乐于助人的助手。", "You are a helpful assistant.")[language]
            messages.append({"role": "system", "content": system})
        asked = dict(rng.choice(MAKERS[language])(rng) for _ in range(rng.choice((1, 1, 1, 2, 3))))
        if not avoid & asked.keys():
            messages += [turn for question, answer in asked.items() for turn in chat(question, answer)]
            seen[json.dumps(messages)] = messages
    return [{"conversations": messages} for messages in seen.values()]


def thoughtful(rng: Random, count: int, avoid: set[str]) -> list[Row]:
    """Chats whose answers have a thought in `reasoning_content`, without the questions in `avoid`."""
    rows: dict[str, list] = {}
    while len(rows) < count:
        question, thought, total = _sum(rng, english=len(rows) % 2 == 1)
        answer = f"The answer is {total}." if len(rows) % 2 else f"答案是{total}。"
        if question not in avoid:
            rows[question] = chat(question, answer)
            rows[question][1]["reasoning_content"] = thought
    return [{"conversations": messages} for messages in rows.values()]


def _tool(name: str, description: str, arguments: dict[str, str]) -> Row:
    properties = {argument: {"type": kind} for argument, kind in arguments.items()}
    parameters = {"type": "object", "properties": properties, "required": list(arguments)}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


def tool_calls(rng: Random, count: int) -> list[Row]:
    """Chats in which the assistant calls a function and uses the result."""
    multiply = {"a": "integer", "b": "integer"}
    rows: dict[str, list] = {}
    while len(rows) < count:
        english = len(rows) % 2 == 1
        if rng.random() < 0.5:
            a, b = rng.randint(13, 99), rng.randint(13, 99)
            tool = _tool("multiply", "Multiply two numbers" if english else "两个数相乘", multiply)
            arguments, result = {"a": a, "b": b}, {"product": a * b}
            question = f"Use the tool: what is {a} times {b}?" if english else f"请用工具计算{a}乘以{b}。"
            answer = f"{a} times {b} is {a * b}." if english else f"{a}乘以{b}等于{a * b}。"
        else:
            country, city = rng.choice(CAPITALS)[:2] if english else rng.choice(CAPITALS)[2:]
            tool = _tool("capital", "Look up a capital" if english else "查询首都", {"country": "string"})
            arguments, result = {"country": country}, {"capital": city}
            question = f"Look up the capital of {country}." if english else f"请查询{country}的首都。"
            answer = f"The capital of {country} is {city}." if english else f"{country}的首都是{city}。"
        call = {"name": tool["function"]["name"], "arguments": arguments}
        rows[question] = [
            {"role": "system", "content": "", "tools": json.dumps([tool], ensure_ascii=False)},
            {"role": "user", "content": question},
            {"role": "assistant", "content": "", "tool_calls": json.dumps([call], ensure_ascii=False)},
            {"role": "tool", "content": json.dumps(result, ensure_ascii=False)},
            {"role": "assistant", "content": answer},
        ]
    return [{"conversations": messages} for messages in rows.values()]


def identity() -> list[Row]:
    """Who the assistant is, asked in many ways."""
    en = "I am minimind_fast, a tiny language model that was trained from nothing."
    zh = "我是minimind_fast，一个从零开始训练的小语言模型。"
    asked_en = ["Who are you?", "What is your name?", "Tell me who you are.", "Are you a person?"]
    asked_en += ["Who is this?", "What are you?", "What should I call you?", "Introduce yourself."]
    asked_en += ["Who am I talking to?", "What are you called?"]
    asked_zh = ["你是谁？", "你叫什么名字？", "请介绍一下你自己。", "你是人吗？", "你叫什么？"]
    asked_zh += ["你是什么？", "我该怎么称呼你？", "我在和谁说话？", "你的名字是什么？", "你是哪个模型？"]
    rows = [(lead + question, en) for lead in ("", "Hi! ", "Hello! ") for question in asked_en]
    rows += [(lead + question, zh) for lead in ("", "嗨，", "你好，") for question in asked_zh]
    return [{"conversations": chat(question, answer)} for question, answer in rows]


def preferences(rng: Random, count: int, avoid: set[str]) -> list[Row]:
    """Pairs of answers, without the questions in `avoid`; the rejected one evades the question."""
    rows: dict[str, Row] = {}
    while len(rows) < count:
        language = len(rows) % 2
        question, answer = rng.choice(MAKERS[language])(rng)
        if question not in avoid:
            rejected = chat(question, rng.choice(EVASIONS[language]))
            rows[question] = {"chosen": chat(question, answer), "rejected": rejected}
    return list(rows.values())


def _sum(rng: Random, english: bool) -> tuple[str, str, int]:
    """A sum as question, working and result; small enough for a small model to learn."""
    a, b = numbers(rng, SMALL)
    if english:
        return f"What is {a} + {b}?", f"{a} + {b} = {a + b}.", a + b
    return f"{a}加{b}等于多少？", f"{a}加{b}等于{a + b}。", a + b


def reasoning(rng: Random, count: int, avoid: set[str]) -> list[Row]:
    """Sums whose answers think first, without the questions in `avoid`."""
    rows: dict[str, list] = {}
    while len(rows) < count:
        question, thought, total = _sum(rng, english=len(rows) % 2 == 1)
        if question not in avoid:
            rows[question] = chat(question, f"<think>\n{thought}\n</think>\n<answer>\n{total}\n</answer>")
    return [{"conversations": messages} for messages in rows.values()]


def prompts(rng: Random, back: bool, avoid: set[str]) -> list[Row]:
    """Every small sum once in each language as a prompt, with the right answer.

    Args:
        rng: decides the order.
        back: True for the sums held out for evaluation, False for all others.
        avoid: questions to leave out.

    Returns:
        Rows in MiniMind's rlaif form (the last turn is empty) with `answer`.
    """
    rows = []
    for a in range(1, SMALL + 1):
        for b in range(1, SMALL + 1):
            if kept_back(a, b) == back:
                for question in (f"{a}加{b}等于多少？", f"What is {a} + {b}?"):
                    if question not in avoid:
                        rows.append({"conversations": chat(question, ""), "answer": str(a + b)})
    rng.shuffle(rows)
    return rows
