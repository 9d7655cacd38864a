"""The sample files: what they promise, and that they are what the generator writes."""

import json
import re
from collections import Counter

import pytest

from minimind_fast import Tokenizer
from minimind_fast.data import samples
from minimind_fast.data.chats import lay_out, read_chat
from minimind_fast.data.rows import BadRow
from minimind_fast.data.samples import generate
from minimind_fast.data.samples.questions import kept_back

CHATS = ("sft", "sft_val", "lora_identity", "reason", "reason_val")
PREFERENCES = ("dpo", "dpo_val")
PROMPTS = ("grpo", "grpo_val")
SUMS = (
    (r"(\d+) \+ (\d+) = (\d+)", lambda a, b: a + b),
    (r"(\d+) - (\d+) = (\d+)", lambda a, b: a - b),
    (r"(\d+) times (\d+) is (\d+)", lambda a, b: a * b),
    (r"(\d+) divided by (\d+) is (\d+)", lambda a, b: a / b),
    (r"(\d+)加(\d+)等于(\d+)", lambda a, b: a + b),
    (r"(\d+)减(\d+)等于(\d+)", lambda a, b: a - b),
    (r"(\d+)乘以(\d+)等于(\d+)", lambda a, b: a * b),
    (r"(\d+)除以(\d+)等于(\d+)", lambda a, b: a / b),
)


def lines(name):
    return samples.path(f"{name}.jsonl").read_text(encoding="utf-8").splitlines()


def rows(name):
    return [json.loads(line) for line in lines(name)]


def texts(name):
    return [row["text"] for row in rows(name)]


def asked(name):
    turns = [turn for row in rows(name) for turn in row.get("conversations", row.get("chosen", []))]
    return [turn["content"] for turn in turns if turn["role"] == "user"]


def test_committed_files_are_what_the_generator_writes(tmp_path):
    generate.write(tmp_path)
    written = sorted(p.name for p in tmp_path.iterdir())
    assert written == sorted(p.name for p in samples.FOLDER.glob("*.jsonl"))
    for name in written:
        assert (tmp_path / name).read_bytes() == samples.path(name).read_bytes(), f"run the generator again: {name}"


def test_size_languages_and_no_row_twice():
    pretrain = texts("pretrain") + texts("pretrain_val")
    assert len(pretrain) >= 2000 and len(set(pretrain)) == len(pretrain)
    assert samples.path("pretrain.jsonl").stat().st_size < 1.5e6
    chinese = sum(bool(re.search("[\u4e00-\u9fff]", text)) for text in pretrain)
    assert 0.4 < chinese / len(pretrain) < 0.6
    for name in CHATS + PREFERENCES + PROMPTS:
        assert len(set(lines(name))) == len(lines(name)), name


def test_every_sum_is_right():
    text = "\n".join(line for name in ("pretrain", *CHATS, *PREFERENCES) for line in lines(name))
    checked = 0
    for pattern, right in SUMS:
        for a, b, c in re.findall(pattern, text):
            assert right(int(a), int(b)) == int(c), f"{a}, {b}: {c}"
            checked += 1
    assert checked > 2000


def test_stories_agree_with_themselves():
    for text in texts("pretrain") + texts("pretrain_val"):
        if "Snow covered" in text or "地上盖着雪" in text:
            assert "winter" in text or "冬日" in text, text
        for name in re.findall(r"([A-Z][a-z]+)'s", text):  # "Mia called Mia's mother": the same name twice
            assert not re.search(rf"{name} [^.]*{name}'s", text), text
        for hero in re.findall("小.|阿宝", text):
            assert not re.search(f"{hero}[^。\n]*{hero}的(?!家)", text), text
        assert "第一近" not in text and "One evening, One" not in text
        if "planted" in text or "种下" in text:
            assert not re.search("winter|autumn|冬日|初秋", text), text


def test_the_words_of_the_identity_are_known_before_but_not_the_identity():
    """Else the LoRA demo answers with holes: a word never seen cannot be learned by a small adapter."""
    pretrain = "\n".join(texts("pretrain"))
    about_it = [row for row in rows("lora_identity") if "minimind_fast" in row["conversations"][-1]["content"]]
    assert len(about_it) == 60 < len(rows("lora_identity"))  # the others keep it from answering everything
    identity = json.dumps(about_it, ensure_ascii=False)
    words = Counter(re.findall(r"[A-Za-z_]+", pretrain))
    said = {w for row in about_it for turn in row["conversations"] for w in re.findall("[A-Za-z_]+", turn["content"])}
    assert {word for word in said if not words[word]} == set()
    assert {c for c in re.findall("[\u4e00-\u9fff]", identity) if c not in pretrain} == set()
    assert "I am minimind_fast" not in pretrain and "我是minimind_fast" not in pretrain


@pytest.mark.parametrize("name", CHATS)
def test_chats_can_be_laid_out_and_answer_every_question(name):
    tokenizer = Tokenizer.load(samples.path("tokenizer"))
    for row in rows(name):
        roles = [m["role"] for m in row["conversations"] if m["role"] != "system"]
        assert " ".join(roles).replace("user assistant tool assistant", "user assistant").split() == (
            ["user", "assistant"] * (len(roles) // 2)
        ) or roles == ["user", "assistant", "tool", "assistant"]
        chat = read_chat(row)
        assert not isinstance(chat, BadRow)
        (layout,) = lay_out(tokenizer, chat)
        assert len(layout.answers) == roles.count("assistant")


def test_some_chats_have_tools_and_thoughts_as_minimind3_writes_them():
    calls = [row for row in rows("sft") if any("tool_calls" in turn for turn in row["conversations"])]
    thoughts = [row for row in rows("sft") if any("reasoning_content" in turn for turn in row["conversations"])]
    assert len(calls) >= 24 and len(thoughts) >= 24
    for row in calls:
        system, _, call, result, answer = row["conversations"]
        (tool,) = json.loads(system["tools"])
        (made,) = json.loads(call["tool_calls"])
        assert made["name"] == tool["function"]["name"]
        assert set(made["arguments"]) == set(tool["function"]["parameters"]["required"])
        (value,) = json.loads(result["content"]).values()
        assert str(value) in answer["content"]
        if made["name"] == "multiply":
            assert value == made["arguments"]["a"] * made["arguments"]["b"]


def test_preferences_answer_the_same_question_in_two_ways():
    for row in rows("dpo") + rows("dpo_val"):
        assert row["chosen"][0] == row["rejected"][0] and row["chosen"][1] != row["rejected"][1]


def test_prompts_have_an_answer_that_they_do_not_show():
    for row in rows("grpo") + rows("grpo_val"):
        question, turn = row["conversations"]
        a, b = map(int, re.findall(r"\d+", question["content"]))
        assert row["answer"] == str(a + b) and turn == {"role": "assistant", "content": ""}
        assert question["content"] in (f"What is {a} + {b}?", f"{a}加{b}等于多少？")
    assert len(set(asked("grpo"))) == len(asked("grpo")) > 200


def test_what_is_evaluated_was_not_trained():
    train = {question for name in ("sft", "dpo", "reason", "grpo") for question in asked(name)}
    for name in ("sft_val", "dpo_val", "reason_val", "grpo_val"):
        assert asked(name) and not train & set(asked(name)), name
    assert not set(texts("pretrain")) & set(texts("pretrain_val"))
    # The sums that GRPO is evaluated on stand in no file at all, in neither language.
    everything = "\n".join(line for name in ("pretrain", *CHATS, *PREFERENCES, "grpo") for line in lines(name))
    shown = re.findall(r"(\d+) \+ (\d+)", everything) + re.findall(r"(\d+)加(\d+)", everything)
    assert len(shown) > 2000
    assert [pair for pair in shown if kept_back(*map(int, pair))] == []


def test_shipped_tokenizer():
    tokenizer = Tokenizer.load(samples.path("tokenizer"))
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (6400, 0, 1, 2)
    for text in ("从前有个孩子", "Once upon a time 🙂\n\t 1234", "<think>水</think>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_each_digit_is_a_token():
    tokenizer = Tokenizer.load(samples.path("tokenizer"))
    digits = {tokenizer.encode(str(digit))[0] for digit in range(10)}
    assert len(digits) == 10
    for text in ("1000000 + 12 = 1000012", "2026年11月24日", "x1y22"):
        ids = tokenizer.encode(text)
        assert sum(index in digits for index in ids) == len(re.findall(r"\d", text))
    number_ids = [i for i, raw in enumerate(tokenizer.token_bytes()) if re.search(rb"\d", raw) and i >= 36]
    assert set(number_ids) == digits
