"""Questions with answers: sums and facts.

Purpose: the material of the samples' lessons, chats and preferences, in both languages.
Principle: each function draws one (question, answer); facts come from `facts.py`.
Properties: every answer is right. Sums of `kept_back` appear only in the evaluation file of the last stage.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from minimind_fast.data.samples.facts import ANIMALS, CAPITALS, ELEMENTS, PLANETS, SCIENCE_EN, SCIENCE_ZH
from minimind_fast.data.samples.prose import NAMES_EN, NAMES_ZH

Maker = Callable[[Random], tuple[str, str]]
SMALL = 12  # the last stage asks for sums of numbers up to this
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


def kept_back(a: int, b: int) -> bool:
    """Whether a + b, in either order, is one of the small sums (about one in eight) held out of training."""
    return max(a, b) <= SMALL and a * b % 7 == 3


def numbers(rng: Random, most: int = 50) -> tuple[int, int]:
    """Two numbers up to `most` whose sum may be asked; half of the pairs are small, so those recur often."""
    while True:
        top = SMALL if rng.random() < 0.5 else most
        a, b = rng.randint(1, top), rng.randint(1, top)
        if not kept_back(a, b):
            return a, b


def sum_en(rng: Random) -> tuple[str, str]:
    """An arithmetic question and its answer."""
    kind, (a, b) = rng.choice("++-*/w"), numbers(rng)
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
    a, b = a + 1, b + 1  # "1 apples" would be wrong
    name, goods = rng.choice(NAMES_EN), rng.choice(GOODS_EN)
    if rng.random() < 0.5 and not kept_back(a, b):
        question = f"{name} has {a} {goods} and gets {b} more. How many {goods} does {name} have now?"
        return question, f"{a} + {b} = {a + b}, so {name} has {a + b} {goods}."
    question = f"{name} has {a + b} {goods} and gives away {b}. How many {goods} are left?"
    return question, f"{a + b} - {b} = {a}, so {a} {goods} are left."


def sum_zh(rng: Random) -> tuple[str, str]:
    """The same in Chinese."""
    kind, (a, b) = rng.choice("++-*/w"), numbers(rng)
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
        near = ["最", *(f"第{word}" for word in "二三四五六七八")][i]
        return f"离太阳{near}近的行星是哪一颗？", f"离太阳{near}近的行星是{PLANETS[i][1]}。"
    question, answer = rng.choice(SCIENCE_ZH)
    return f"{question}？", f"因为{answer}。"
