"""Losses as pure functions of per-token log-probabilities.

Purpose: every stage's objective in a few lines that can be checked by hand.
Principle: the model turns tokens into log-probabilities of the targets; a stage's objective is arithmetic on them.
Properties: no model, no config, no state; sums, not means, so that the trainer can divide by the global batch's count.

Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind_fast.errors import UserError


@dataclass
class StepLoss:
    """What a stage's loss function returns for one micro-batch.

    Attributes:
        total: () sum over counted units (tokens, pairs); the trainer divides by their number in the global batch.
        aux: () averaged over micro-batches and added, or None.
        metrics: other sums over counted units, for the log.
    """

    total: Tensor
    aux: Tensor | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)


LossFunction = Callable[[Any, Any], StepLoss]  # (Engine or MiniMind, the stage's batch)


def lm(logprobs: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum of the negative log-likelihood over the counted positions.

    Args:
        logprobs: (...) float32, 0 where there is no target.
        weights: (...) float32 per-token weights, or None for 1.

    Returns:
        () float32.
    """
    return -(logprobs if weights is None else logprobs * weights).sum()


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Direct preference optimisation: the loss of each pair of answers, and its reward margin.

    Args:
        chosen: (P,) float32 log-probability of each preferred answer, summed (or, in all four, averaged) over its tokens.
        rejected: (P,) that of the other answer.
        reference_chosen, reference_rejected: (P,) the same under the frozen reference.
        beta: scale of the log-ratios.
        kind: "sigmoid", -log sigmoid(margin); "ipo", a squared distance of the log-ratios' difference to 1 / (2 beta).
        label_smoothing: probability that a pair is the wrong way round ("sigmoid" only).

    Returns:
        loss (P,); margin (P,), beta * ((chosen - reference_chosen) - (rejected - reference_rejected)).

    Raises:
        ValueError: an unknown kind, or smoothing that it does not have.

    Source: Rafailov et al., DPO, 2023; Mitchell, conservative DPO, 2023; Azar et al., IPO, 2023.
    """
    difference = (chosen - reference_chosen) - (rejected - reference_rejected)
    margin = beta * difference
    if kind == "ipo" and not label_smoothing:
        return (difference - 1 / (2 * beta)).square(), margin
    if kind != "sigmoid":
        raise UserError(f"DPO's kind is 'sigmoid' or 'ipo' (without label smoothing), not {kind!r}")
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin), margin


def distill(logprobs: Tensor, kl: Tensor, alpha: float, temperature: float) -> Tensor:
    """Sum of alpha * negative log-likelihood + (1 - alpha) * T^2 * KL over the counted positions.

    Args:
        logprobs: (...) float32 of the targets at temperature 1, 0 where there is none.
        kl: (...) float32 KL(teacher || student) of both at `temperature`, 0 where there is no target.
        alpha: weight of the data's tokens; the teacher gets the rest.
        temperature: T; the factor T^2 makes up for the smaller gradients.

    Returns:
        () float32.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015.
    """
    return (1 - alpha) * temperature**2 * kl.sum() - alpha * logprobs.sum()


# ------------------------------------------------------------------------------------------------------------------ GRPO


def group_advantages(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """How much better each answer is than the others to its prompt.

    Args:
        rewards: (prompts, answers) float.
        eps: added to the standard deviation, so that equal rewards give 0.

    Returns:
        The same shape: (reward - mean) / (std + eps), mean and (population) std over the answers of the prompt.

    Source: Shao et al., DeepSeekMath (GRPO), 2024.
    """
    spread = rewards.std(-1, keepdim=True, correction=0)
    return (rewards - rewards.mean(-1, keepdim=True)) / (spread + eps)


def grpo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, epsilon: float = 0.2, epsilon_high: float | None = None
) -> tuple[Tensor, Tensor]:
    """The clipped policy loss of each token.

    Args:
        logprobs: (T,) float32 under the policy in training.
        old_logprobs: (T,) float32 under the policy that wrote the tokens.
        advantages: (T,) float32, one per token: its answer's.
        epsilon: the ratio is clipped at 1 - epsilon.
        epsilon_high: and at 1 + epsilon_high; None: epsilon.

    Returns:
        loss (T,), -min(ratio * A, clip(ratio) * A); clipped (T,) bool, where the clip stops the gradient.

    Source: Schulman et al., PPO, 2017; Yu et al., DAPO, 2025 (two bounds).
    """
    ratio = (logprobs - old_logprobs).exp()
    bounded = ratio.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    free, held = ratio * advantages, bounded * advantages
    return -torch.minimum(free, held), held < free


def cispo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, epsilon_high: float = 5.0
) -> tuple[Tensor, Tensor]:
    """The policy loss of each token whose weight is clipped instead of its gradient.

    Args:
        logprobs: (T,) float32 under the policy in training.
        old_logprobs: (T,) float32 under the policy that wrote the tokens.
        advantages: (T,) float32, one per token: its answer's.
        epsilon_high: largest weight.

    Returns:
        loss (T,), -min(ratio, epsilon_high) * A * logprob with a constant weight; clipped (T,) bool, where it was cut.

    Source: MiniMax-M1 (CISPO), 2025; the bound is MiniMind's.
    """
    ratio = (logprobs.detach() - old_logprobs).exp()
    return -ratio.clamp(max=epsilon_high) * advantages * logprobs, ratio > epsilon_high


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Estimate KL(policy || reference) from each single token: unbiased, and never negative.

    Args:
        logprobs: (T,) float32 under the policy, which wrote the tokens.
        reference_logprobs: (T,) float32 under the reference.

    Returns:
        (T,), exp(d) - 1 - d with d = reference - policy.

    Source: Schulman, Approximating KL divergence, 2020.
    """
    difference = reference_logprobs - logprobs
    return difference.expm1() - difference
