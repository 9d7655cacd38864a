"""The sample files: what they promise, and that they are what the generator writes."""

import json
import re

from minimind_fast import Tokenizer, samples
from minimind_fast.samples import generate


def rows(name):
    return [json.loads(line) for line in samples.path(name).read_text(encoding="utf-8").splitlines()]


def test_committed_files_are_what_the_generator_writes(tmp_path):
    generate.write(tmp_path)
    written = sorted(p.name for p in tmp_path.iterdir())
    assert written == sorted(p.name for p in samples.FOLDER.glob("*.jsonl"))
    for name in written:
        assert (tmp_path / name).read_bytes() == samples.path(name).read_bytes(), f"run the generator again: {name}"


def test_size_languages_and_no_document_twice():
    texts = [row["text"] for row in rows("pretrain.jsonl") + rows("pretrain_val.jsonl")]
    assert len(texts) >= 2000 and len(set(texts)) == len(texts)
    assert samples.path("pretrain.jsonl").stat().st_size < 1.5e6
    chinese = sum(bool(re.search("[\u4e00-\u9fff]", text)) for text in texts)
    assert 0.4 < chinese / len(texts) < 0.6


def test_every_sum_is_right():
    text = "\n".join(row["text"] for row in rows("pretrain.jsonl"))
    checked = 0
    for pattern, right in (
        (r"(\d+) \+ (\d+) = (\d+)", lambda a, b: a + b),
        (r"(\d+) - (\d+) = (\d+)", lambda a, b: a - b),
        (r"(\d+) times (\d+) is (\d+)", lambda a, b: a * b),
        (r"(\d+) divided by (\d+) is (\d+)", lambda a, b: a / b),
        (r"(\d+)加(\d+)等于(\d+)", lambda a, b: a + b),
        (r"(\d+)减(\d+)等于(\d+)", lambda a, b: a - b),
        (r"(\d+)乘以(\d+)等于(\d+)", lambda a, b: a * b),
        (r"(\d+)除以(\d+)等于(\d+)", lambda a, b: a / b),
    ):
        for a, b, c in re.findall(pattern, text):
            assert right(int(a), int(b)) == int(c), f"{a}, {b}: {c}"
            checked += 1
    assert checked > 1000


def test_stage_formats():
    for name in ("sft.jsonl", "lora_identity.jsonl", "reason.jsonl"):
        for row in rows(name):
            roles = [m["role"] for m in row["conversations"] if m["role"] != "system"]
            assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
    for row in rows("dpo.jsonl"):
        assert row["chosen"][0] == row["rejected"][0] and row["chosen"][1] != row["rejected"][1]
    for row in rows("grpo.jsonl"):
        a, b = map(int, re.findall(r"\d+", row["conversations"][0]["content"]))
        assert row["gt"] == str(a + b) and row["conversations"][1]["content"] == ""


def test_shipped_tokenizer():
    tokenizer = Tokenizer.load(samples.path("tokenizer"))
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (6400, 0, 1, 2)
    for text in ("从前有个孩子", "Once upon a time 🙂\n\t 1234", "<think>水</think>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
