"""Write the sample files: `python -m minimind_fast.samples.generate`.

Purpose: small corpora in MiniMind's formats for each stage, without a download.
Principle: every document is drawn from a seeded generator: stories from `prose.py`, true facts from `facts.py`, sums that
    are computed, and short dialogues made of these.
Properties: deterministic to the byte; no document twice; about half Chinese, half English; under 1.5 MB for pretraining.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import Any

from minimind_fast.samples import FOLDER
from minimind_fast.samples.facts import ANIMALS, CAPITALS, ELEMENTS, PLANETS, SCIENCE_EN, SCIENCE_ZH
from minimind_fast.samples.prose import NAMES_EN, NAMES_ZH, story_en, story_zh

SEED = 20261124
PRETRAIN_ROWS, VAL_ROWS = 5200, 120
GOODS_EN = ["apples", "pears", "books", "pencils", "stones", "shells", "stamps", "eggs", "buttons", "coins"]
GOODS_ZH = [
    ("个", "苹果"),
    ("个", "梨"),
    ("本", "书"),
    ("支", "铅笔"),
    ("块", "石头"),
    ("张", "邮票"),
    ("个", "鸡蛋"),
    ("枚", "硬币"),
]


# ------------------------------------------------------------------------------------------------------ questions


def sum_en(rng: Random) -> tuple[str, str]:
    """A question of arithmetic and its answer, worked out."""
    kind, a, b = rng.choice("+-*/w"), rng.randint(2, 50), rng.randint(2, 50)
    if kind == "+":
        return f"What is {a} + {b}?", f"{a} + {b} = {a + b}."
    if kind == "-":
        a, b = max(a, b), min(a, b)
        return f"What is {a} - {b}?", f"{a} - {b} = {a - b}."
    if kind == "*":
        a, b = rng.randint(2, 12), rng.randint(2, 12)
        return f"What is {a} times {b}?", f"{a} times {b} is {a * b}."
    if kind == "/":
        a, b = rng.randint(2, 12), rng.randint(2, 12)
        return f"What is {a * b} divided by {b}?", f"{a * b} divided by {b} is {a}, because {b} times {a} is {a * b}."
    name, goods = rng.choice(NAMES_EN), rng.choice(GOODS_EN)
    if rng.random() < 0.5:
        question = f"{name} has {a} {goods} and gets {b} more. How many {goods} does {name} have now?"
        return question, f"{a} + {b} = {a + b}, so {name} has {a + b} {goods}."
    question = f"{name} has {a + b} {goods} and gives away {b}. How many {goods} are left?"
    return question, f"{a + b} - {b} = {a}, so {a} {goods} are left."


def sum_zh(rng: Random) -> tuple[str, str]:
    """The same in Chinese."""
    kind, a, b = rng.choice("+-*/w"), rng.randint(2, 50), rng.randint(2, 50)
    if kind == "+":
        return f"{a}加{b}等于多少？", f"{a}加{b}等于{a + b}。"
    if kind == "-":
        a, b = max(a, b), min(a, b)
        return f"{a}减{b}等于多少？", f"{a}减{b}等于{a - b}。"
    if kind == "*":
        a, b = rng.randint(2, 12), rng.randint(2, 12)
        return f"{a}乘以{b}等于多少？", f"{a}乘以{b}等于{a * b}。"
    if kind == "/":
        a, b = rng.randint(2, 12), rng.randint(2, 12)
        return f"{a * b}除以{b}等于多少？", f"{a * b}除以{b}等于{a}，因为{b}乘以{a}等于{a * b}。"
    name, (unit, goods) = rng.choice(NAMES_ZH), rng.choice(GOODS_ZH)
    if rng.random() < 0.5:
        question = f"{name}有{a}{unit}{goods}，又得到{b}{unit}，现在一共有多少{unit}{goods}？"
        return question, f"{a}加{b}等于{a + b}，所以{name}现在有{a + b}{unit}{goods}。"
    question = f"{name}有{a + b}{unit}{goods}，送出{b}{unit}，还剩多少{unit}？"
    return question, f"{a + b}减{b}等于{a}，所以还剩{a}{unit}{goods}。"


def fact_en(rng: Random) -> tuple[str, str]:
    """A question about the world and its answer."""
    kind = rng.randrange(5)
    if kind == 0:
        country, city, *_ = rng.choice(CAPITALS)
        if rng.random() < 0.5:
            return f"What is the capital of {country}?", f"The capital of {country} is {city}."
        return f"Which country has {city} as its capital?", f"{city} is the capital of {country}."
    if kind == 1:
        name, symbol, number, _ = rng.choice(ELEMENTS)
        if rng.random() < 0.5:
            return f"What is the chemical symbol of {name}?", f"The chemical symbol of {name} is {symbol}."
        return f"What is the atomic number of {name}?", f"The atomic number of {name} is {number}."
    if kind == 2:
        name, habit, food, *_ = rng.choice(ANIMALS)
        article = "an" if name[0] in "aeiou" else "a"
        if rng.random() < 0.5:
            return f"What does {article} {name} eat?", f"{article.capitalize()} {name} eats {food}."
        return f"What is special about {article} {name}?", f"{article.capitalize()} {name} {habit}."
    if kind == 3:
        i = rng.randrange(len(PLANETS))
        word = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"][i]
        return f"Which is the {word} planet from the Sun?", f"The {word} planet from the Sun is {PLANETS[i][0]}."
    question, answer = rng.choice(SCIENCE_EN)
    return f"{question}?", f"Because {answer}."


def fact_zh(rng: Random) -> tuple[str, str]:
    """The same in Chinese."""
    kind = rng.randrange(5)
    if kind == 0:
        *_, country, city = rng.choice(CAPITALS)
        if rng.random() < 0.5:
            return f"{country}的首都是哪里？", f"{country}的首都是{city}。"
        return f"{city}是哪个国家的首都？", f"{city}是{country}的首都。"
    if kind == 1:
        _, symbol, number, name = rng.choice(ELEMENTS)
        if rng.random() < 0.5:
            return f"{name}的元素符号是什么？", f"{name}的元素符号是{symbol}。"
        return f"{name}的原子序数是多少？", f"{name}的原子序数是{number}。"
    if kind == 2:
        *_, name, habit, food = rng.choice(ANIMALS)
        if rng.random() < 0.5:
            return f"{name}吃什么？", f"{name}吃{food}。"
        return f"{name}有什么特点？", f"{name}{habit}。"
    if kind == 3:
        i = rng.randrange(len(PLANETS))
        word = "一二三四五六七八"[i]
        return f"离太阳第{word}近的行星是哪一颗？", f"离太阳第{word}近的行星是{PLANETS[i][1]}。"
    question, answer = rng.choice(SCIENCE_ZH)
    return f"{question}？", f"因为{answer}。"


# ------------------------------------------------------------------------------------------------------ documents


def lesson_en(rng: Random) -> str:
    """Several questions with answers, as a page of a school book or a talk between two people."""
    pairs = [rng.choice((sum_en, fact_en))(rng) for _ in range(rng.randint(2, 4))]
    if rng.random() < 0.5:
        return "\n".join(f"Question: {q}\nAnswer: {a}" for q, a in pairs)
    first, second = rng.sample(NAMES_EN, 2)
    return "\n".join(f"{first}: {q}\n{second}: {a}" for q, a in pairs) + f"\n{first}: Thank you, {second}."


def lesson_zh(rng: Random) -> str:
    """The same in Chinese."""
    pairs = [rng.choice((sum_zh, fact_zh))(rng) for _ in range(rng.randint(2, 4))]
    if rng.random() < 0.5:
        return "\n".join(f"问：{q}\n答：{a}" for q, a in pairs)
    first, second = rng.sample(NAMES_ZH, 2)
    return "\n".join(f"{first}：{q}\n{second}：{a}" for q, a in pairs) + f"\n{first}：谢谢你，{second}。"


def notes_en(rng: Random) -> str:
    """Facts as running text in English, each reason with its question."""
    facts = [fact_en(rng) for _ in range(rng.randint(3, 5))]
    return " ".join(dict.fromkeys(a if not a.startswith("Because") else f"{q} {a}" for q, a in facts))


def notes_zh(rng: Random) -> str:
    """The same in Chinese."""
    facts = [fact_zh(rng) for _ in range(rng.randint(3, 5))]
    return "".join(dict.fromkeys(a if not a.startswith("因为") else q + a for q, a in facts))


def documents(rng: Random, count: int) -> list[str]:
    """Different documents, the languages taking turns.

    Args:
        rng: decides everything.
        count: how many.
    """
    writers: tuple[list[Callable[[Random], str]], ...] = (
        [story_zh, story_zh, story_zh, lesson_zh, notes_zh],
        [story_en, story_en, story_en, lesson_en, notes_en],
    )
    seen: dict[str, None] = {}
    while len(seen) < count:
        seen[rng.choice(writers[len(seen) % 2])(rng)] = None
    return list(seen)


def chat(user: str, assistant: str) -> list[dict[str, str]]:
    """A question and its answer as messages."""
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def conversations(rng: Random, count: int) -> list[dict[str, Any]]:
    """Chats of one to three turns, some with a system message.

    Args:
        rng: decides everything.
        count: how many.
    """
    seen: dict[str, list] = {}
    while len(seen) < count:
        makers = ((sum_zh, fact_zh), (sum_en, fact_en))[len(seen) % 2]
        messages = []
        if rng.random() < 0.15:
            system = ("你是一个乐于助人的助手。", "You are a helpful assistant.")[len(seen) % 2]
            messages.append({"role": "system", "content": system})
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            messages += chat(*rng.choice(makers)(rng))
        seen[json.dumps(messages)] = messages
    return [{"conversations": messages} for messages in seen.values()]


def identity() -> list[dict[str, Any]]:
    """Who the assistant is, asked in many ways."""
    en = "I am minimind_fast, a tiny language model that was trained from nothing."
    zh = "我是minimind_fast，一个从零开始训练的小语言模型。"
    asked_en = [
        "Who are you?",
        "What is your name?",
        "Tell me who you are.",
        "Are you a person?",
        "Hello, who is this?",
    ]
    asked_en += [
        "What are you?",
        "What should I call you?",
        "Introduce yourself.",
        "Who am I talking to?",
        "Your name?",
    ]
    asked_zh = ["你是谁？", "你叫什么名字？", "请介绍一下你自己。", "你是人吗？", "你好，你是谁？"]
    asked_zh += ["你是什么？", "我该怎么称呼你？", "我在和谁说话？", "你的名字是什么？", "你是哪个模型？"]
    pairs = [(q, en) for q in asked_en] + [(q, zh) for q in asked_zh]
    return [{"conversations": chat(f"{lead}{q}", a)} for lead in ("", "Hi! ", "嗨，") for q, a in pairs]


def preferences(rng: Random, count: int) -> list[dict[str, Any]]:
    """Pairs of answers; the chosen one answers, the rejected one evades or is wrong.

    Args:
        rng: decides everything.
        count: how many.
    """
    rows: dict[str, dict] = {}
    while len(rows) < count:
        chinese = len(rows) % 2 == 0
        question, answer = rng.choice((sum_zh, fact_zh) if chinese else (sum_en, fact_en))(rng)
        evasive = (
            ("我不知道，请不要问我。", "这个问题没有意思。") if chinese else ("I do not know.", "Do not ask me that.")
        )
        rows[question] = {"chosen": chat(question, answer), "rejected": chat(question, rng.choice(evasive))}
    return list(rows.values())


def reasoning(rng: Random, count: int) -> list[dict[str, Any]]:
    """Sums whose answers think first.

    Args:
        rng: decides everything.
        count: how many.
    """
    rows: dict[str, list] = {}
    while len(rows) < count:
        a, b = rng.randint(2, 60), rng.randint(2, 60)
        total = a + b
        if len(rows) % 2:
            question = f"What is {a} + {b}?"
            thought = f"{a} + {b}: {a // 10 * 10} + {b // 10 * 10} = {a // 10 * 10 + b // 10 * 10}, "
            thought += f"{a % 10} + {b % 10} = {a % 10 + b % 10}, together {total}."
        else:
            question = f"{a}加{b}等于多少？"
            thought = f"{a // 10 * 10}加{b // 10 * 10}等于{a // 10 * 10 + b // 10 * 10}，"
            thought += f"{a % 10}加{b % 10}等于{a % 10 + b % 10}，合起来是{total}。"
        rows[question] = chat(question, f"<think>\n{thought}\n</think>\n<answer>\n{total}\n</answer>")
    return [{"conversations": messages} for messages in rows.values()]


def prompts(rng: Random, count: int) -> list[dict[str, Any]]:
    """Small sums to be answered by the model, with the right answer beside ("gt"), in MiniMind's rlaif format.

    Args:
        rng: decides everything.
        count: how many.
    """
    rows: dict[str, dict] = {}
    while len(rows) < count:
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        question = f"What is {a} + {b}?" if rng.random() < 0.5 else f"{a}加{b}等于多少？"
        rows[f"{question}{len(rows) // 100}"] = {"conversations": chat(question, ""), "gt": str(a + b)}
    return list(rows.values())


def write(folder: Path) -> None:
    """Write every sample file.

    Args:
        folder: must exist.
    """
    rng = Random(SEED)
    texts = [{"text": text} for text in documents(rng, PRETRAIN_ROWS + VAL_ROWS)]
    files: dict[str, Iterable[dict[str, Any]]] = {
        "pretrain.jsonl": texts[:PRETRAIN_ROWS],
        "pretrain_val.jsonl": texts[PRETRAIN_ROWS:],
        "sft.jsonl": conversations(rng, 800),
        "lora_identity.jsonl": identity(),
        "dpo.jsonl": preferences(rng, 200),
        "reason.jsonl": reasoning(rng, 200),
        "grpo.jsonl": prompts(rng, 240),
    }
    for name, rows in files.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the sample files.")
    parser.add_argument("--save_dir", type=Path, default=FOLDER)
    write(parser.parse_args().save_dir)
