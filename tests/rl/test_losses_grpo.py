"""GRPO, CISPO, group advantages and the k3 estimate against plain PyTorch and against numbers by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from minimind_fast.training import losses

A = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
RATIOS = torch.tensor([1.5, 1.0, 0.5, 1.5, 1.0, 0.5])


def test_grpo_by_hand():
    """Better answers gain nothing above 1.2, worse ones nothing below 0.8; the other way nothing holds the gradient."""
    old = torch.full((6,), -2.0)
    logprobs = (old + RATIOS.log()).requires_grad_()
    loss, clipped = losses.grpo(logprobs, old, A, 0.2)
    torch.testing.assert_close(loss, torch.tensor([-1.2, -1.0, -0.5, 1.5, 1.0, 0.8]))
    assert clipped.tolist() == [True, False, False, False, False, True]
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, -1.0, -0.5, 1.5, 1.0, 0.0]))


def test_grpo_with_two_bounds():
    old = torch.zeros(2)
    loss, clipped = losses.grpo(torch.tensor([1.25, 1.45]).log(), old, torch.ones(2), 0.2, 0.3)
    torch.testing.assert_close(loss, torch.tensor([-1.25, -1.3]))
    assert clipped.tolist() == [False, True]


def test_cispo_by_hand():
    """The weight is a constant, whatever the advantage's sign; beyond the bound the token still has a gradient."""
    old = torch.full((3,), -1.0)
    logprobs = (old + torch.tensor([2.0, 8.0, 8.0]).log()).requires_grad_()
    loss, clipped = losses.cispo(logprobs, old, torch.tensor([1.0, 0.5, -1.0]), 5.0)
    want = [-2 * (math.log(2) - 1), -5 * 0.5 * (math.log(8) - 1), 5 * (math.log(8) - 1)]
    torch.testing.assert_close(loss, torch.tensor(want))
    assert clipped.tolist() == [False, True, True]
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([-2.0, -2.5, 5.0]))


def test_k3_by_hand():
    logprobs = torch.tensor([-1.0, -1.0, -2.0], requires_grad=True)
    kl = losses.k3(logprobs, torch.tensor([-1.0, -2.0, -1.0]))
    torch.testing.assert_close(kl, torch.tensor([0.0, math.exp(-1), math.e - 2]))
    kl.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, 1 - math.exp(-1), 1 - math.e]))


def test_k3_is_exact_where_policy_and_reference_nearly_agree():
    """exp(d) - 1 - d loses every digit in float32 at d = 1e-3; d^2 / 2 is what is left."""
    kl = losses.k3(torch.tensor([0.0]), torch.tensor([1e-3]))
    assert kl.item() == pytest.approx(5e-7, rel=2e-3)


def test_k3_is_unbiased():
    """Its mean over the policy's tokens is the KL divergence."""
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 11).double().log_softmax(-1)
    want = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close((policy.exp() * losses.k3(policy, reference)).sum(), want)


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
    got = losses.group_advantages(rewards)
    want = 0.5 / (0.5 + 1e-4)
    torch.testing.assert_close(got, torch.tensor([[want, -want, -want, want], [0.0] * 4], dtype=torch.float64))


@pytest.mark.parametrize("kind", ["grpo", "cispo"])
def test_the_whole_objective_and_its_gradients_are_those_of_padded_rows_with_whole_logits(kind):
    """The oracle has rows, padding and full logits, and takes MiniMind's mean of per-answer means."""
    torch.manual_seed(0)
    lengths, vocab, beta = [5, 3, 7], 13, 0.1
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    logits = torch.randn(3, 7, vocab, requires_grad=True)
    ids = torch.randint(0, vocab, (3, 7))
    near = logits.detach() + 0.5 * torch.randn(3, 7, vocab)
    take = lambda x: F.log_softmax(x, -1).gather(-1, ids[..., None])[..., 0]  # noqa: E731
    old, reference = take(near), take(torch.randn(3, 7, vocab))
    advantages = torch.tensor([1.2, -0.7, 0.3])

    new = take(logits)
    ratio, spread = torch.exp(new - old), advantages[:, None]
    if kind == "grpo":
        policy = torch.min(ratio * spread, torch.clamp(ratio, 0.8, 1.2) * spread)
    else:
        policy = torch.clamp(ratio, max=1.5).detach() * spread * new
    kl = torch.exp(reference - new) - (reference - new) - 1
    want = (-(policy - beta * kl) * mask).sum(1) / mask.sum(1)
    (want_grad,) = torch.autograd.grad(want.mean(), logits)

    packed = take(logits)[mask]
    each = advantages.repeat_interleave(torch.tensor(lengths))
    weights = (1 / torch.tensor(lengths)).repeat_interleave(torch.tensor(lengths))
    how = (losses.grpo, 0.2) if kind == "grpo" else (losses.cispo, 1.5)
    loss, _ = how[0](packed, old[mask], each, how[1])
    got = ((loss + beta * losses.k3(packed, reference[mask])) * weights).sum() / 3
    (got_grad,) = torch.autograd.grad(got, logits)
    torch.testing.assert_close(got, want.mean())
    torch.testing.assert_close(got_grad, want_grad)
