"""`minimind-fast eval`: what it prints, writes and refuses."""

import json

import pytest
import torch

import minimind_fast as mm
from minimind_fast import cli
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
    [("{", "line 1, is not JSON"), ("[1]", "line 1, must be a JSON object"), ('{"txt": 1}', 'row 1, has no "text"')],
)
def test_a_bad_text_file_is_told_before_the_model_is_loaded(tmp_path, capsys, content, message):
    file = tmp_path / "t.jsonl"
    file.write_text(content, encoding="utf-8")
    assert cli.main(["eval", "nowhere", "--text", str(file)]) == 2
    assert message in capsys.readouterr().err
