"""Memory of a training step, computed without a GPU and without allocating it.

Purpose: the peak of a micro-batch's forward and backward, and what DeepSpeed holds beside it under each ZeRO stage.
Principle: the model itself runs forward and backward on fake tensors (shapes without data) while every allocation and
    release is counted. So the number follows the code: what autograd saves, when it frees it, where gradients appear. The
    engine's share is a table, measured on DeepSpeed 0.19 processes with one and two ranks.
Properties: takes seconds for any number of tokens. With kernels, their outputs and saved tensors are counted, but not their
    internal chunk buffers (tens of MB). Documents have equal length. Allocator overhead is excluded: a test holds the
    numbers within 15% of a process's real peak, where freed memory is returned at once.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from minimind_fast import ops
from minimind_fast.config import ModelConfig
from minimind_fast.errors import UserError
from minimind_fast.model import Attention, MiniMind
from minimind_fast.ops.cpu import attention as attention_rows

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


class _Meter(TorchDispatchMode):
    """Counts bytes of live storages, current and peak; fakes the few values that ops read from tensors."""

    def __init__(self, item: int) -> None:
        super().__init__()
        self.item, self.now, self.peak = item, 0, 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else self.item  # such as "was a promise broken?"
        if func is torch.ops.aten.allclose.default:
            return True
        if func is torch.ops.aten.bincount.default:  # its shape depends on data
            return torch.empty((kwargs or {}).get("minlength", args[-1]), dtype=torch.int64)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor.untyped_storage())
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


class _Keep(torch.autograd.Function):
    """An identity that saves extra elements for backward."""

    @staticmethod
    def forward(ctx, x, elements):
        ctx.save_for_backward(x.new_empty(elements))
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return grad, None


class _Rows:
    """Attention over documents of equal length, saving what a flash kernel saves: q, k, v, the output and the lse.

    `attention_rows` on a CPU saves the same, plus some probabilities per document and head.
    """

    def __init__(self, document: int, probabilities: int) -> None:
        self.document, self.probabilities = document, probabilities

    def attend(self, asker: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, (-1, self.document)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] > k.shape[1])
        out = out.transpose(1, 2).flatten(0, 1)
        return _Keep.apply(out, len(q) * q.shape[1] * self.probabilities) if self.probabilities else out


@contextlib.contextmanager
def _implementations(kernels: bool) -> Iterator[None]:
    """Select the kernels' custom ops (on fake tensors their launchers never run), or what runs on a CPU."""
    before = ops._interpreting
    ops._interpreting = lambda: True
    try:
        with ops.use("all" if kernels else "auto"):
            yield
    finally:
        ops._interpreting = before


@dataclass(frozen=True)
class MicroBatch:
    """Memory of one micro-batch beside parameters, masters and optimizer.

    Attributes:
        saved_bytes: saved for backward at the end of the forward pass.
        peak_bytes: peak of activations, temporaries and gradients in the parameters' dtype.
        buffer_bytes: the model's tables.
        parameters: number of parameters, a tied head counted once.
    """

    saved_bytes: int
    peak_bytes: int
    buffer_bytes: int
    parameters: int


def micro_batch(
    config: ModelConfig,
    tokens: int,
    document: int,
    dtype: str = "bfloat16",
    kernels: bool = True,
    gradient_checkpointing: bool = False,
) -> MicroBatch:
    """Run a micro-batch on tensors without data and count its memory.

    Args:
        config: the model's shape.
        tokens: packed positions, a multiple of document.
        document: tokens in each document.
        dtype: dtype of parameters and activations.
        kernels: True counts a GPU's kernels, False a CPU's path.
        gradient_checkpointing: recompute each block in the backward pass.

    Raises:
        ValueError: tokens is not a multiple of document, or a document is too long for the model.
    """
    if tokens % document or tokens < 1:
        raise UserError(f"{tokens} tokens are no whole number of documents of {document}")
    if document > config.max_position_embeddings:
        raise UserError(f"a document of {document} tokens exceeds {config.max_position_embeddings} positions")
    top_k = config.num_experts_per_tok or 1
    plain = torch.get_default_dtype()
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    # The only value read from a tensor: slots per expert, assumed balanced.
    with _implementations(kernels), fakes, _Meter(tokens * top_k // config.num_experts) as meter:
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            model = MiniMind(config).train()
        finally:
            torch.set_default_dtype(plain)
        model.model.gradient_checkpointing = gradient_checkpointing
        begin = meter.now
        ids = torch.zeros(tokens, dtype=torch.long)
        cu_seqlens = torch.empty(tokens // document + 1, dtype=torch.int32)
        kept = 0 if kernels else attention_rows.kept(document, getattr(torch, dtype))
        hidden, aux = model.model(ids, ids, _Rows(document, kept), cu_seqlens)
        out = model.lm_head(hidden, ids, grad_weights=torch.ones(tokens))
        assert out.logprobs is not None
        saved = meter.now - begin
        loss = aux - out.logprobs.sum()
        del out, hidden, aux
        loss.backward()
        parameters = model.num_parameters()
        return MicroBatch(saved, meter.peak - begin, begin - parameters * ITEM_BYTES[dtype], parameters)


@dataclass(frozen=True)
class Held:
    """Bytes per parameter that the engine holds on each rank, under one ZeRO stage.

    Attributes:
        weights: in the training dtype.
        gradients: kept between micro-batches, or held as buffers.
        optimizer: fp32 masters (the weights themselves in plain fp32) and Adam's two moments.
        transient: peak on top of these while gradients are reduced or the step is taken.
    """

    weights: float
    gradients: float
    optimizer: float
    transient: float

    @property
    def resident(self) -> float:
        """Bytes per parameter between steps."""
        return self.weights + self.gradients + self.optimizer


def held(stage: int, dtype: str, world_size: int) -> Held:
    """Bytes per parameter that DeepSpeed 0.19 holds under our settings.

    Args:
        stage: ZeRO stage, 0 to 3.
        dtype: "bfloat16", "float16" or "float32".
        world_size: number of ranks.

    Returns:
        Held. Transients at stages 2 and 3 assume that all gradients fit in one bucket (`REDUCE_BUCKET`); larger models
        take less. Measured on one and two ranks in bfloat16 at every stage and in float32 at 0 and 1, and on one at 3; the
        rest follows from the same partitioning.
    """
    w, item = world_size, ITEM_BYTES[dtype]
    if item == 4:
        return {
            0: Held(4, 0, 8, 4 if w == 1 else 8),  # gradients, and their flat copy for the all-reduce
            1: Held(4, 0, 12 / w, 8),
            2: Held(4, 0, 12 / w, 8 + 4 / w),
            3: Held(4 / w, 4 / w, 12 / w, 8),  # gradients need no copy in another dtype
        }[stage]
    return {
        0: Held(2, 0, 12, 6),  # gradients and their fp32 copies
        1: Held(2, 4, 12 / w, 0 if w == 1 else 4),  # whole fp32 sums of gradients, and a flat copy for the all-reduce
        2: Held(2, 0, 12 / w, 4.5 + 4 / w),
        3: Held(2 / w, 4 / w + 2, 12 / w, 6),
    }[stage]


def peak_bytes(need: MicroBatch, stage: int, dtype: str, world_size: int) -> int:
    """Peak memory of a rank during a training step.

    Args:
        need: from `micro_batch`.
        stage, dtype, world_size: as for `held`.
    """
    share = held(stage, dtype, world_size)
    gathered = ITEM_BYTES[dtype] * (1 - 1 / world_size) if stage == 3 else 0.0  # unsharded weights in use
    resident = (share.resident + gathered) * need.parameters + need.buffer_bytes
    return int(resident + max(need.peak_bytes, share.transient * need.parameters))
