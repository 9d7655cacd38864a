"""Sampling of the next token: penalty, temperature, top-k, top-p, min-p, for a whole batch at once.

Purpose: logits (B, V) in, token ids (B,) out, with log-probabilities on request.
Principle: filters are thresholds on values, so tied tokens stay or go together and sorting order does not matter. A token
    is drawn by inverting the cumulative distribution at one uniform number per row and step.
Properties: a row's draw depends only on its own seed and step, so a row of a batch equals the same row run alone (as far
    as matmul rounding allows). The uniforms come from CPU generators: the same seed gives the same noise on every device.

Shapes: B rows, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minimind_fast.errors import UserError

_HEAD = 128  # top-p tries this many likeliest tokens first; the whole row is sorted only if their mass is too small
_BLOCK = 64  # uniforms drawn from a row's generator at a time
_MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: 0 takes the likeliest token (greedy); otherwise it divides the logits.
        top_p: keep the smallest set of likeliest tokens that holds this much probability; 1 keeps all.
        top_k: keep this many likeliest tokens; 0 keeps all.
        min_p: keep tokens with at least this share of the likeliest token's probability; 0 keeps all.
        repetition_penalty: divides positive logits of tokens already in the row, prompt included, and multiplies
            negative ones; 1 is off.

    Raises:
        ValueError: a value outside its range.

    Source: Holtzman et al., 2019 (top-p); Nguyen et al., 2024 (min-p); Keskar et al., CTRL, 2019 (penalty).
        Filters in the order of Hugging Face's: penalty, temperature, top-k, top-p, min-p.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, ok, wanted in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (1 keeps all)"),
            ("top_k", self.top_k >= 0 and self.top_k == int(self.top_k), "a whole number of at least 0 (0 keeps all)"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 (keeps all) and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0 (1 is off)"),
        ):
            if not ok:
                raise UserError(f"{name} must be {wanted}, not {getattr(self, name)}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, without a draw."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def penalizes(self) -> bool:
        """Whether the tokens seen so far are needed."""
        return self.repetition_penalty != 1


def row_seed(seed: int, row: int) -> int:
    """Derive a row's seed from the batch's; row 0 keeps the seed itself.

    Returns:
        A 63-bit number, far from its neighbours'.

    Source: Steele et al., SplitMix64, 2014 (the mixing).
    """
    if row == 0:
        return seed
    z = (seed + row * 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return (z ^ (z >> 31)) >> 1


class Noise:
    """Uniform numbers in [0, 1), one per row and step, each row from its own generator.

    Args:
        seeds: one per row.
        device: device of the numbers.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str) -> None:
        self._generators = [torch.Generator().manual_seed(seed & ((1 << 63) - 1)) for seed in seeds]
        self._device, self._step = device, 0
        self._block = torch.empty(0)

    def next(self) -> Tensor:
        """(B,) float64 for the next step."""
        column = self._step % _BLOCK
        if column == 0:
            rows = [torch.rand(_BLOCK, generator=g, dtype=torch.float64) for g in self._generators]
            self._block = torch.stack(rows, dim=1).to(self._device)
        self._step += 1
        return self._block[column]

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but the given ones."""
        self._generators = [self._generators[row] for row in rows]
        if self._step:
            self._block = self._block[:, list(rows)]


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that are already in the row less likely.

    Args:
        logits: (B, V).
        seen: (B, V) bool.
        penalty: see `Sampling`.

    Returns:
        (B, V), a new tensor.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_likely(logits: Tensor, sampling: Sampling) -> Tensor:
    """Set what top-k, top-p and min-p exclude to minus infinity.

    Args:
        logits: (B, V) float32, temperature already applied.
        sampling: holds the thresholds.

    Returns:
        (B, V); each row keeps at least its likeliest token.
    """
    vocab = logits.shape[-1]
    edge = None
    if 0 < sampling.top_k < vocab:
        edge = logits.topk(sampling.top_k, sorted=False).values.amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < edge, float("-inf"))
    edges = []
    if sampling.top_p < 1:
        edges.append(_top_p_edge(logits, sampling.top_p))
    if sampling.min_p > 0:
        edges.append(logits.amax(-1, keepdim=True) + float(torch.tensor(sampling.min_p).log()))
    for edge in edges:
        logits = logits.masked_fill(logits < edge, float("-inf"))
    return logits


def _running_sum(x: Tensor, dtype: torch.dtype) -> Tensor:
    """cumsum over the last dimension. PyTorch has no fixed order for it on a GPU: with --deterministic the host adds."""
    if not torch.are_deterministic_algorithms_enabled():
        return x.cumsum(-1, dtype=dtype)
    return torch.from_numpy(np.cumsum(x.cpu().to(dtype).numpy(), -1)).to(x.device)


def _top_p_edge(logits: Tensor, top_p: float) -> Tensor:
    """(B, 1): the smallest logit in the smallest set of likeliest tokens with mass top_p."""
    total = logits.logsumexp(-1, keepdim=True)

    def edge(ordered: Tensor) -> tuple[Tensor, Tensor]:
        before = _running_sum((ordered - total).exp(), torch.float32)
        inside = torch.cat([torch.zeros_like(before[:, :1]), before[:, :-1]], -1) < top_p
        return ordered.masked_fill(~inside, float("inf")).amin(-1, keepdim=True), before[:, -1]

    # On a GPU the test for enough mass would synchronise; sorting all of V is cheaper there.
    if logits.device.type == "cpu" and logits.shape[-1] > _HEAD:
        found, mass = edge(logits.topk(_HEAD).values)
        if bool((mass >= top_p).all()):
            return found
    return edge(logits.sort(-1, descending=True).values)[0]


def choose(logits: Tensor, sampling: Sampling, uniform: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
    """The next token of each row.

    Args:
        logits: (B, V) in any dtype.
        sampling: how to choose.
        uniform: (B,) float64 in [0, 1), from `Noise`; not needed when greedy.
        seen: (B, V) bool, tokens in the row so far; needed with a repetition penalty.

    Returns:
        (B,) int64.
    """
    logits = logits.float()
    if sampling.penalizes:
        assert seen is not None
        logits = penalize(logits, seen, sampling.repetition_penalty)
    if sampling.greedy:
        return logits.argmax(-1)
    assert uniform is not None
    logits = keep_likely(logits / sampling.temperature, sampling)
    cumulative = _running_sum(logits.softmax(-1), torch.float64)
    total = cumulative[:, -1:]
    # A token of probability 0 adds nothing to the sum, so it is never the first above the mark.
    mark = torch.minimum(uniform.unsqueeze(-1) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, mark, right=True).squeeze(-1)


def chosen_logprobs(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of the chosen tokens under softmax(logits / temperature), before any filter or penalty.

    Args:
        logits: (B, V) in any dtype.
        ids: (B,) int64.
        temperature: 0 counts as 1.

    Returns:
        (B,) float32, equal to `model(..., targets=ids, temperature=temperature).logprobs` for the same tokens.
    """
    wide = logits.float() / (temperature or 1.0)
    return wide.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - wide.logsumexp(-1)
