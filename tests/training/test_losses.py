"""Cross-entropy, DPO and distillation against plain PyTorch and numbers worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from minimind_fast.ops import reference
from minimind_fast.training import losses

PAIR = [torch.tensor([x]) for x in (-1.0, -2.0, -1.75, -1.75)]  # chosen, rejected, and both under the reference


def test_lm_by_hand():
    logprobs = torch.tensor([-1.0, 0.0, -3.0], requires_grad=True)
    assert losses.lm(logprobs).item() == 4
    weighted = losses.lm(logprobs, torch.tensor([1.0, 0.0, 10.0]))
    weighted.backward()
    assert weighted.item() == 31 and logprobs.grad.tolist() == [-1, 0, -10]


@pytest.mark.parametrize(
    ("kind", "smoothing", "loss"),
    [
        ("sigmoid", 0.0, math.log(1 + math.exp(-0.5))),
        ("sigmoid", 0.1, 0.9 * math.log(1 + math.exp(-0.5)) + 0.1 * math.log(1 + math.exp(0.5))),
        ("ipo", 0.0, 0.0),  # the difference of the log-ratios is 1, which is 1 / (2 * 0.5)
    ],
)
def test_dpo_by_hand(kind, smoothing, loss):
    got, margin = losses.dpo(*PAIR, 0.5, kind, smoothing)
    assert margin.tolist() == [0.5] and got.item() == pytest.approx(loss, abs=1e-6)


def test_ipo_is_a_squared_distance_and_dpo_starts_at_log_2():
    assert losses.dpo(*PAIR, 0.25, "ipo")[0].tolist() == [1.0]  # (1 - 2) squared
    same, margin = losses.dpo(*PAIR[:2], *PAIR[:2], 0.15)
    assert margin.item() == 0 and same.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(("kind", "smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0)])
def test_dpo_is_that_of_whole_logits(kind, smoothing):
    """Oracle: answers of 3 tokens each; the sigmoid loss as a binary cross-entropy against a soft label."""
    torch.manual_seed(0)
    logits, frozen = torch.randn(2, 5, 3, 11, dtype=torch.float64), torch.randn(2, 5, 3, 11, dtype=torch.float64)
    tokens, beta = torch.randint(11, (2, 5, 3, 1)), 0.3
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()

    def answers(x):
        return x.log_softmax(-1).gather(-1, tokens).sum((-1, -2))

    got, margin = losses.dpo(*answers(ours), *answers(frozen), beta, kind, smoothing)
    ratio = answers(theirs) - answers(frozen)
    h = ratio[0] - ratio[1]
    if kind == "ipo":
        want = (h - 0.5 / beta) ** 2
    else:
        label = torch.full_like(h, 1 - smoothing)
        want = F.binary_cross_entropy_with_logits(beta * h, label, reduction="none")
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(margin, beta * h)
    got.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_dpo_survives_margins_that_overflow_an_exponential():
    chosen = torch.tensor([500.0, -500.0], requires_grad=True)
    zero = torch.zeros(2)
    loss, _ = losses.dpo(chosen, zero, zero, zero, 1.0)
    loss.sum().backward()
    assert loss.tolist() == [0, 500] and chosen.grad.tolist() == [0, -1]


@pytest.mark.parametrize(("kind", "smoothing"), [("hinge", 0.0), ("ipo", 0.1)])
def test_dpo_refuses_what_it_does_not_have(kind, smoothing):
    with pytest.raises(ValueError, match=f"not '{kind}'"):
        losses.dpo(*PAIR, 0.5, kind, smoothing)


def test_distill_by_hand():
    """Teacher (1/2, 1/2), student (4/5, 1/5): KL = ln 5/4."""
    kl = torch.tensor([math.log(1.25), 0.0])
    logprobs = torch.tensor([math.log(0.2), 0.0])
    got = losses.distill(logprobs, kl, alpha=0.25, temperature=2.0)
    assert got.item() == pytest.approx(0.25 * math.log(5) + 0.75 * 4 * math.log(1.25))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_distill_is_that_of_whole_logits(alpha, temperature):
    """Oracle: F.cross_entropy and F.kl_div on the counted rows; the teacher is wider and has a larger vocabulary."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    teacher_hidden, teacher_weight = torch.randn(6, 8, dtype=torch.float64), torch.randn(12, 8, dtype=torch.float64)
    targets = torch.tensor([3, -100, 8, 0, -100, 1])
    mine = [x.clone().requires_grad_() for x in (hidden, weight)]
    other = [x.clone().requires_grad_() for x in (hidden, weight)]
    logprobs = reference.linear_cross_entropy(*mine, targets)
    kl = reference.linear_kl(*mine, teacher_hidden, teacher_weight, targets >= 0, temperature)
    got = losses.distill(logprobs, kl, alpha, temperature)

    keep = targets >= 0
    logits = (other[0] @ other[1].T)[keep]
    soft = F.softmax((teacher_hidden @ teacher_weight[:9].T)[keep] / temperature, -1)
    want = alpha * F.cross_entropy(logits, targets[keep], reduction="sum")
    want = want + (1 - alpha) * temperature**2 * F.kl_div(
        F.log_softmax(logits / temperature, -1), soft, reduction="sum"
    )
    torch.testing.assert_close(got, want)
    got.backward()
    want.backward()
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
