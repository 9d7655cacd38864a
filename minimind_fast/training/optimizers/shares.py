"""Which rank orthogonalises which matrix, when ZeRO has spread each over several ranks.

Purpose: `Shares.map(function, parts)` applies a function of whole matrices to tensors of which every rank holds a part.
Principle: a matrix belongs to the rank that holds most of it, among equals to the one with the least to do. The others send
    it their parts, it computes, and sends the results back: two all-to-alls, of whole matrices only where parts are missing.
Properties: one rank exchanges nothing. Under ZeRO 1 and 2 only matrices at the borders of a partition travel; under ZeRO 3
    all of them; under ZeRO 0 every rank holds everything, so that only results do. The result does not depend on who
    computes it. Parts are described once, by objects; each step sends tensors only.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from minimind_fast.training.ranks import world


class Matrix(NamedTuple):
    """A matrix among the elements of all parameters, numbered one after the other."""

    begin: int
    rows: int
    columns: int

    @property
    def numel(self) -> int:
        return self.rows * self.columns


class Held(NamedTuple):
    """Adjacent elements that this rank holds.

    Attributes:
        begin: the first one's number among the elements of all parameters.
        numel: how many.
        tensor: which of this rank's tensors has them.
        offset: where in it they begin.
    """

    begin: int
    numel: int
    tensor: int
    offset: int


class _Part(NamedTuple):
    """The part of one matrix that one rank holds, and where."""

    matrix: int
    start: int
    numel: int
    tensor: int
    offset: int


def _parts(matrices: Sequence[Matrix], held: Sequence[Held]) -> list[_Part]:
    """Cut what a rank holds at the borders of matrices."""
    begins, found = [m.begin for m in matrices], []
    for h in held:
        at = h.begin
        while at < h.begin + h.numel:
            i = bisect_right(begins, at) - 1
            end = min(h.begin + h.numel, matrices[i].begin + matrices[i].numel)
            found.append(_Part(i, at - matrices[i].begin, end - at, h.tensor, h.offset + at - h.begin))
            at = end
    return sorted(found)


def owners(matrices: Sequence[Matrix], parts: Sequence[Sequence[_Part]]) -> dict[int, int]:
    """Matrix -> the rank that computes it.

    Args:
        matrices: all of them.
        parts: of each rank.
    """
    shares: dict[int, list[int]] = {}
    for rank, theirs in enumerate(parts):
        for part in theirs:
            shares.setdefault(part.matrix, [0] * len(parts))[rank] += part.numel
    load, chosen = [0] * len(parts), {}
    # Multiplying takes numel * the shorter side; the longest first, and each to whom has the least.
    for i in sorted(shares, key=lambda i: (-matrices[i].numel * min(matrices[i][1:]), i)):
        most = max(shares[i])
        chosen[i] = min((r for r, share in enumerate(shares[i]) if share == most), key=lambda r: load[r])
        load[chosen[i]] += matrices[i].numel * min(matrices[i][1:])
    return chosen


class Shares:
    """How the matrices in some tensors are shared among the ranks; made by all ranks together.

    Args:
        matrices: all of them, ascending and without gaps.
        held: what this rank holds.
        device: where matrices are whole; collectives need it.
    """

    def __init__(self, matrices: Sequence[Matrix], held: Sequence[Held], device: torch.device) -> None:
        self.matrices, self.device = matrices, device
        self.rank, ranks = world()
        self.parts: list[Any] = [_parts(matrices, held)]
        if ranks > 1:
            self.parts = [None] * ranks
            dist.all_gather_object(self.parts, _parts(matrices, held))
        self.owner = owners(matrices, self.parts)
        self.whole = {
            i
            for i, owner in self.owner.items()
            if sum(p.numel for p in self.parts[owner] if p.matrix == i) == matrices[i].numel
        }

    def _with(self, holder: int, owner: int, back: bool) -> list[_Part]:
        """The holder's parts that travel to the owner, or back from it, in the order in which they do."""
        if holder == owner:
            return []
        return [p for p in self.parts[holder] if self.owner[p.matrix] == owner and (back or p.matrix not in self.whole)]

    def _swap(self, send: list[list[Tensor]], receive: list[list[_Part]]) -> list[list[Tensor]]:
        """Send tensors to each rank; what each has sent, part by part."""
        if len(send) == 1:
            return [[]]
        out = torch.cat([tensor for each in send for tensor in each] or [torch.empty(0, device=self.device)])
        sizes = [sum(part.numel for part in each) for each in receive]
        into = out.new_empty(sum(sizes))
        dist.all_to_all_single(into, out, sizes, [sum(t.numel() for t in each) for each in send])
        parts = zip(into.split(sizes), receive, strict=True)
        return [list(flat.split([part.numel for part in each])) for flat, each in parts]

    def map(self, function: Callable[[list[Tensor]], list[Tensor]], tensors: list[Tensor]) -> list[Tensor]:
        """Apply a function of whole matrices; all ranks call it.

        Args:
            function: list of (rows, columns) -> list of the same shapes.
            tensors: float32, those that `held` numbers; flat or not.

        Returns:
            New tensors in the same shapes: 0 where no matrix lies (padding).
        """
        ranks, mine = range(len(self.parts)), self.parts[self.rank]
        flat = [t.flatten().to(self.device) for t in tensors]

        def of(part: _Part) -> Tensor:
            return flat[part.tensor][part.offset : part.offset + part.numel]

        own = [i for i, owner in self.owner.items() if owner == self.rank]
        whole = {i: torch.empty(self.matrices[i].numel, device=self.device) for i in own}
        arrived = self._swap(
            [[of(p) for p in self._with(self.rank, r, back=False)] for r in ranks],
            [self._with(r, self.rank, back=False) for r in ranks],
        )
        there = [(p, of(p)) for p in mine if p.matrix in whole]
        for r in ranks:
            there += zip(self._with(r, self.rank, back=False), arrived[r], strict=True)
        for part, values in there:
            whole[part.matrix][part.start : part.start + part.numel] = values
        results = function([whole[i].view(self.matrices[i].rows, self.matrices[i].columns) for i in own])
        whole = dict(zip(own, (result.reshape(-1) for result in results), strict=True))

        def result_of(part: _Part) -> Tensor:
            return whole[part.matrix][part.start : part.start + part.numel]

        back = self._swap(
            [[result_of(p) for p in self._with(r, self.rank, back=True)] for r in ranks],
            [self._with(self.rank, r, back=True) for r in ranks],
        )
        out = [torch.zeros_like(t) for t in flat]
        there = [(p, result_of(p)) for p in mine if p.matrix in whole]
        for r in ranks:
            there += zip(self._with(self.rank, r, back=True), back[r], strict=True)
        for part, values in there:
            out[part.tensor][part.offset : part.offset + part.numel] = values
        return [o.view(t.shape).to(t.device) for o, t in zip(out, tensors, strict=True)]
