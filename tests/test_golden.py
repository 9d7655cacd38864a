"""MiniMind's own answers, in float64 arithmetic, for tiny models of both generations: our model must give the same."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import minimind_fast as mm
from minimind_fast.weights.checkpoint import to_disk_names

GOLDEN = Path(__file__).with_name("golden")
CASES = sorted(p.name for p in GOLDEN.iterdir())


@pytest.fixture(params=CASES)
def case(request):
    folder = GOLDEN / request.param
    golden = load_file(folder / "golden.safetensors")
    targets = golden["labels"].roll(-1, 1)
    targets[:, -1] = mm.IGNORE_INDEX
    return mm.load_pretrained(folder), golden, targets


def test_there_are_golden_cases():
    assert len(CASES) == 6


def test_logits_and_label_logprobs(case):
    model, golden, targets = case
    with torch.no_grad():
        torch.testing.assert_close(model(golden["input_ids"]).logits, golden["eval_logits"], atol=2e-5, rtol=0)
        logprobs = model(golden["input_ids"], targets=targets).logprobs[:, :-1]
    counted = targets[:, :-1] != mm.IGNORE_INDEX
    torch.testing.assert_close(logprobs[counted], golden["label_logprob"][counted], atol=2e-5, rtol=0)
    assert (logprobs[~counted] == 0).all()


def test_loss_and_every_gradient(case):
    model, golden, targets = case
    model.train()
    out = model(golden["input_ids"], targets=targets)
    ce = -out.logprobs.sum() / (targets != mm.IGNORE_INDEX).sum()
    assert abs(ce.item() - golden["train_ce"].item()) < 1e-5
    assert abs(out.aux_loss.item() - golden["train_aux"].item()) < 1e-5
    (ce + out.aux_loss).backward()
    ours = to_disk_names({n: p.grad for n, p in model.named_parameters()}, model.config)
    theirs = {n.removeprefix("grad."): g for n, g in golden.items() if n.startswith("grad.")}
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert (ours[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-9, name


def test_greedy_without_cache(case):
    model, golden, _ = case
    ids = golden["input_ids"][:1, :8]
    with torch.no_grad():
        for _ in range(16):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(ids, golden["greedy_ids"])
