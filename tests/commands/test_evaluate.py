"""`minimind-fast eval`: what it prints, writes and refuses."""

import gzip
import json

import pytest
import torch

import minimind_fast as mm
from minimind_fast import cli
from minimind_fast.commands.evaluate import read_some, text_of
from minimind_fast.infer.score import perplexity


@pytest.fixture(scope="module")
def tokenizer(shared):
    return mm.Tokenizer.load(shared / "minimind" / "minimind3")


@pytest.fixture(scope="module", params=["minimind2", "minimind3-moe"])
def model(request):
    torch.manual_seed(0)
    small = {"hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 64}
    config = mm.ModelConfig.preset(request.param, **small, tie_word_embeddings=False)
    model = mm.MiniMind(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # far from the uniform distribution
    return model


def test_the_command_says_and_writes_the_same(model, tokenizer, tmp_path, capsys):
    mm.save_pretrained(model, tmp_path / "m", tokenizer=tokenizer)
    text, choices = tmp_path / "t.jsonl", tmp_path / "c.jsonl"
    text.write_text('{"text": "春眠不觉晓"}\n\n{"text": "hello"}\n', encoding="utf-8")
    choices.write_text('{"question": "q", "A": "1", "B": "2", "answer": "B"}\n', encoding="utf-8")
    out = tmp_path / "r.json"
    args = [
        "eval",
        str(tmp_path / "m"),
        "--prompts",
        "pretrained",
        "identity",
        "--text",
        str(text),
        "--choices",
        str(choices),
    ]
    assert cli.main([*args, "--out", str(out), "--max_new_tokens", "4", "--max_seq_len", "32"]) == 0
    shown, written = capsys.readouterr().out, json.loads(out.read_text(encoding="utf-8"))
    p = perplexity(model, tokenizer, ["春眠不觉晓", "hello"], 32)
    assert written["perplexity"][str(text)] == pytest.approx(p._asdict())
    assert f"perplexity {p.per_token:.3f} per token" in shown and "chance 50.0%" in shown
    assert set(written["prompts"]) == {"pretrained", "identity"} and "你是谁" in shown


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "t.jsonl, line 1: not JSON"),
        ("[1]", "t.jsonl, line 1: a number, not an object"),
        ('{"txt": 1}', 't.jsonl, line 1: has no field "text"'),
        ('{"text": "a"}\n{"text": "\\ud83d"}', "t.jsonl, line 2: "),
        ('{"text": "a"}\r{"text": "b"}', "t.jsonl, line 1: lines end in a carriage return alone"),
        ("", "t.jsonl is empty"),
        ("\n", "t.jsonl has no rows"),
    ],
)
def test_a_bad_text_file_is_told_before_the_model_is_loaded(tmp_path, capsys, content, message):
    file = tmp_path / "t.jsonl"
    file.write_bytes(content.encode())
    assert cli.main(["eval", "nowhere", "--text", str(file)]) == 2
    assert message in capsys.readouterr().err


def test_files_are_read_as_in_training(tmp_path):
    """A byte-order mark, carriage returns before line feeds, blank rows, compression."""
    file = tmp_path / "t.jsonl.gz"
    file.write_bytes(gzip.compress(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\n\n{"text": "c"}'))
    assert read_some(str(file), "text", text_of) == ["a", "b", "c"]
    assert read_some(str(file), "text", text_of, limit=2) == ["a", "b"]
