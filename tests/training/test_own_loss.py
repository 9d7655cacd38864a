"""`--loss`: a user's own objective, as in the docs."""

import json

import pytest
import torch
from launching import ROOT, TINY, run, write_corpus
from pages import fenced
from stand_ins import Engine

import minimind_fast as mm
from minimind_fast.data.packing import Batch
from minimind_fast.training import setup
from minimind_fast.training.config import TrainConfig

PAGE = ROOT / "docs" / "en" / "train_pretrain.md"


@pytest.fixture
def mine(tmp_path):
    """The docs' example, as a file."""
    file = tmp_path / "mine.py"
    (example,) = (b for b in fenced(PAGE.read_text(encoding="utf-8"), "python") if "def focal" in b)
    file.write_text(example, encoding="utf-8")
    return file


def small_batch():
    torch.manual_seed(0)
    shape = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=97)
    model = mm.MiniMind(mm.ModelConfig.preset("minimind3", **shape))
    ids = torch.randint(1, 97, (20,))
    targets = ids.roll(-1).index_fill(0, torch.tensor([7, 19]), mm.IGNORE_INDEX)
    return model, Batch(ids, targets, torch.tensor([0, 8, 20], dtype=torch.int32), 12, 18, 2)


def test_the_example_of_the_docs_computes_its_formula_and_gradient(mine):
    model, batch = small_batch()
    got = setup.own_loss(TrainConfig(loss=f"{mine}:focal"))(Engine(model), batch)
    got.total.backward()
    grad = model.lm_head.weight.grad.clone()
    model.zero_grad()
    logits = torch.cat([model(part[None]).logits[0] for part in (batch.input_ids[:8], batch.input_ids[8:])])
    counted = batch.targets >= 0
    p = logits.softmax(-1)[counted].gather(1, batch.targets[counted, None]).squeeze(1)
    want = -((1 - p.detach()) * p.log()).sum()
    want.backward()
    torch.testing.assert_close(got.total, want)
    torch.testing.assert_close(got.metrics["nll"], -p.log().sum())
    torch.testing.assert_close(grad, model.lm_head.weight.grad, atol=1e-6, rtol=1e-4)


def test_the_command_trains_it(mine, tmp_path):
    data = write_corpus(tmp_path / "train.jsonl", 60)
    args = [
        *TINY,
        "--data_path",
        data,
        "--preset",
        "tiny",
        "--max_steps",
        3,
        "--save_dir",
        tmp_path,
        "--dtype",
        "float32",
    ]
    run("pretrain.py", [*args, "--loss", f"{mine}:focal"])
    rows = [json.loads(line) for line in (tmp_path / "pretrain" / "log.jsonl").read_text().splitlines()]
    assert all(0 < row["loss"] < row["nll"] for row in rows if "nll" in row) and "nll" in rows[-1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("focal", "--loss focal: give MODULE:FUNCTION or FILE.py:FUNCTION"),
        ("nowhere.py:focal", "--loss nowhere.py:focal: nowhere.py cannot be imported"),
        ("math:focal", "--loss math:focal: math has no focal"),
        ("math:pi", "--loss math:pi: pi is no function"),
    ],
)
def test_a_name_that_means_nothing_is_told(name, message):
    with pytest.raises(ValueError) as raised:
        setup.own_loss(TrainConfig(loss=name))
    assert message in str(raised.value)
