"""The documents of a pack: computed once a micro-batch, for every layer and every model that runs it.

Purpose: `Documents.of(cu_seqlens, ...)` for the model; `run(model, batch, ...)` passes a batch through a model, for
    training, rewards and scores.
Principle: what attention and RoPE need of a pack (positions, the backend, rectangles) depends on its bounds alone. On a CPU
    oneDNN keeps 0.5 MiB for each new shape of a 16-bit matmul, so a pack is padded to one of 16 sizes an octave: filler
    is added before the model and cut after it, and neither the model nor a loss sees it.
Properties: filler is documents of ignored tokens, none longer than a real one; it adds nothing to losses or gradients. It
    is at most a sixteenth (or 15 positions), 2% on average, and costs 1.4% of a step.

Shapes: T real tokens, F filler.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind_fast.config import IGNORE_INDEX
from minimind_fast.ops.attention import RUN, chosen
from minimind_fast.ops.cpu.attention import Rectangles
from minimind_fast.ops.cpu.shapes import compiled

LEAST_STEP = 16  # smallest gap between two sizes, in tokens
_FILL = {"targets": IGNORE_INDEX, "valid": False, "grad_weights": 0}


class Documents(NamedTuple):
    """A pack's bounds and what follows from them; a tuple, because ZeRO-3 looks for tensors only in tuples."""

    cu_seqlens: Tensor  # (documents + 1,) int32 from 0 to T + F
    max_seqlen: int  # no document is longer
    positions: Tensor  # (T + F,) int64, of each token in its document
    backend: str  # attention's, resolved
    tokens: int  # T
    filler: int = 0  # F, after the real tokens
    rectangles: Rectangles | None = None  # only for sdpa

    @classmethod
    def of(
        cls,
        cu_seqlens: Tensor,
        tokens: int,
        dtype: torch.dtype,
        max_seqlen: int | None = None,
        size: int | None = None,
    ) -> Documents:
        """Work out everything about a pack.

        Args:
            cu_seqlens: (documents + 1,) int32 from 0 to T, on the model's device.
            tokens: T.
            dtype: the model's; it decides attention's backend.
            max_seqlen: the longest document; None: read from the device.
            size: T + F; None: no filler.
        """
        longest = int(cu_seqlens.diff().max()) if max_seqlen is None else max_seqlen
        backend, _ = chosen(cu_seqlens.device.type, dtype)
        made = cls(cu_seqlens, longest, packed_positions(cu_seqlens, tokens), backend, tokens)
        if size is not None and size > tokens:
            made = made.padded(size)
        if backend != "sdpa":
            return made
        return made._replace(rectangles=Rectangles(made.cu_seqlens.tolist(), cu_seqlens.device))

    @classmethod
    def of_rows(cls, rows: int, length: int, device: torch.device, dtype: torch.dtype) -> Documents:
        """Documents of equal length.

        Args:
            rows: number of documents.
            length: tokens in each.
            device, dtype: the model's.
        """
        bounds = torch.arange(rows + 1, device=device, dtype=torch.int32) * length
        return cls.of(bounds, rows * length, dtype, length)

    def padded(self, size: int, bounds: int | None = None, longest: int | None = None) -> Documents:
        """The same documents followed by filler, without new rectangles and without a host sync.

        Args:
            size: T + F.
            bounds: length of the new cu_seqlens, the last documents empty; None: as short as possible.
            longest: the new max_seqlen, at least the old one; also the length of a filler document.
        """
        device, filler = self.cu_seqlens.device, size - self.tokens
        longest = self.max_seqlen if longest is None else longest
        more = -(-filler // longest) if bounds is None else bounds - self.cu_seqlens.numel()
        ends = torch.arange(1, more + 1, device=device, dtype=self.cu_seqlens.dtype) * longest + self.tokens
        return self._replace(
            cu_seqlens=torch.cat([self.cu_seqlens, ends.clamp_(max=size)]),
            max_seqlen=longest,
            positions=torch.cat([self.positions, torch.arange(filler, device=device) % longest]),
            filler=filler,
            rectangles=None,
        )

    def fill(self, x: Tensor, value: float = 0) -> Tensor:
        """(T, ...) -> (T + F, ...), with `value` at the filler."""
        return F.pad(x, (0, 0) * (x.dim() - 1) + (0, self.filler), value=value) if self.filler else x

    def fill_ids(self, ids: Tensor) -> Tensor:
        """(T,) -> (T + F,); filler repeats the pack's own tokens, so that the experts' load stays about the same."""
        size = self.tokens + self.filler
        return ids.repeat(-(-size // self.tokens))[:size] if self.filler else ids

    def cut(self, output: Any) -> Any:
        """Cut the filler off a model's output.

        Args:
            output: named tuple of (T + F, ...) tensors, scalars and None.
        """
        if not self.filler:
            return output
        return output._make(x[: self.tokens] if x is not None and x.dim() else x for x in output)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        """Causal self-attention within each document.

        Args:
            q: (T + F, H, hd).
            k: (T + F, K, hd), K divides H.
            v: (T + F, K, hd).
            dropout: probability of dropping an attention weight.

        Returns:
            (T + F, H, hd).
        """
        return RUN[self.backend](q, k, v, self.cu_seqlens, self.max_seqlen, dropout, self.rectangles)


def packed_positions(cu_seqlens: Tensor, total: int) -> Tensor:
    """Position of each token within its document.

    Args:
        cu_seqlens: (documents + 1,) int32.
        total: T.

    Returns:
        (T,) int64. No host synchronisation.
    """
    where = torch.arange(total, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens[1:].contiguous(), where, right=True)
    return where - cu_seqlens.long()[document]


def round_up(size: int) -> int:
    """Round up to one of 16 sizes an octave."""
    step = max(LEAST_STEP, 1 << max(size.bit_length() - 5, 0))
    return -(-size // step) * step


def size_for(model: Any, tokens: int) -> int:
    """T + F: with filler on a CPU in 16 bits, else T.

    Args:
        model: a MiniMind. A mixture of experts gets no filler: the router would see it, and experts' shapes vary anyway.
        tokens: T.
    """
    weight = model.model.embed_tokens.weight
    few = compiled(weight.device.type, weight.dtype) and not model.config.use_moe
    return round_up(tokens) if few else tokens


class Pack(Protocol):
    """The fields of a batch that `run` reads."""

    input_ids: Tensor
    cu_seqlens: Tensor | None
    max_seqlen: int
    documents: Any


def documents_of(model: Any, batch: Pack) -> Documents:
    """The documents of a batch, cached on it for the next pass or the next model.

    Args:
        model: a MiniMind.
        batch: packed, on the model's device.
    """
    assert batch.cu_seqlens is not None
    weight, tokens = model.model.embed_tokens.weight, batch.input_ids.numel()
    size, (backend, _) = size_for(model, tokens), chosen(batch.cu_seqlens.device.type, weight.dtype)
    made: Documents | None = batch.documents
    if made is None or (made.tokens + made.filler, made.backend) != (size, backend):
        made = batch.documents = Documents.of(batch.cu_seqlens, tokens, weight.dtype, batch.max_seqlen, size)
    return made


def run(model: Any, batch: Pack, **asked: Any) -> Any:
    """Pass a batch through a model.

    Args:
        model: a MiniMind, or an engine with one as `module`.
        batch: packed or rows, on the model's device.
        asked: other arguments of `MiniMind.forward`, for the batch's real tokens.

    Returns:
        ModelOutput for the real tokens.
    """
    if batch.cu_seqlens is None:
        return model(batch.input_ids, **asked)
    documents = documents_of(getattr(model, "module", model), batch)
    for name, value in _FILL.items():
        if asked.get(name) is not None:
            asked[name] = documents.fill(asked[name], value)
    if (teacher := asked.get("teacher")) is not None:
        asked["teacher"] = teacher._replace(hidden=documents.fill(teacher.hidden))
    return documents.cut(model(documents.fill_ids(batch.input_ids), documents=documents, **asked))
