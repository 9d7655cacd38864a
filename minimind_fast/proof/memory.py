"""How much memory a training step takes, found without the memory and without a GPU.

Purpose: the peak of a micro-batch's forward and backward, and what DeepSpeed holds beside it under each ZeRO stage.
Principle: the model itself runs forward and backward on fake tensors, which have shapes and no data, while every storage
    that is born or dies is counted. So the number follows the code: what autograd keeps, when it lets go, where the
    gradients appear. What the engine holds is a table, read off DeepSpeed 0.19's processes on one and two ranks.
Properties: takes seconds for any number of tokens. With kernels their outputs and saved tensors are counted, not the
    chunk buffers inside them (tens of MB). Documents are of one length. Without the allocator's own losses: a test holds
    the numbers within 15% of a process's real peak, where freed memory is given back at once.
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
from minimind_fast.model import Attention, MiniMind
from minimind_fast.ops.cpu import attention as attention_rows

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


class _Meter(TorchDispatchMode):
    """Bytes of all storages alive, now and at most; the few values that an op reads from a tensor are made up."""

    def __init__(self, item: int) -> None:
        super().__init__()
        self.item, self.now, self.peak = item, 0, 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return self.item
        if func is torch.ops.aten.allclose.default:  # a promise checked is a promise kept
            return True
        if func is torch.ops.aten.bincount.default:  # has no shape without data
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
    """Nothing is done, but a number of elements more is kept for backward."""

    @staticmethod
    def forward(ctx, x, elements):
        ctx.save_for_backward(x.new_empty(elements))
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return grad, None


class _Rows:
    """Attention of documents of one length as a flash kernel does it: q, k, v, its output and the lse are kept.

    `attention_rows` keeps as much on a CPU, and so many probabilities a document and head beside it.
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
    """The kernels' custom ops, whose launchers never run on fake tensors and may so be chosen; or what runs on a CPU."""
    before = ops._interpreting
    ops._interpreting = lambda: True
    try:
        with ops.use("all" if kernels else "auto"):
            yield
    finally:
        ops._interpreting = before


@dataclass(frozen=True)
class MicroBatch:
    """What one micro-batch needs beside parameters, masters and optimizer.

    Attributes:
        saved_bytes: kept for the backward pass when the forward is over.
        peak_bytes: the most of activations, temporaries and gradients in the parameters' dtype at one moment.
        buffer_bytes: the model's tables.
        parameters: their number, a tied head counted once.
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
        config: the model.
        tokens: packed positions, a multiple of document.
        document: tokens in each document.
        dtype: of parameters and activations.
        kernels: as on a GPU; False: as on a CPU.
        gradient_checkpointing: recompute each block in the backward pass.

    Returns:
        MicroBatch.

    Raises:
        ValueError: tokens is no multiple of document, or the document is too long for the model.
    """
    if tokens % document or tokens < 1:
        raise ValueError(f"{tokens} tokens are no whole number of documents of {document}")
    if document > config.max_position_embeddings:
        raise ValueError(f"a document of {document} tokens exceeds {config.max_position_embeddings} positions")
    top_k = config.num_experts_per_tok or 1
    plain = torch.get_default_dtype()
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    # The one number that is read from a tensor: slots of each expert, here balanced.
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
    """Bytes a parameter that the engine holds on each rank, under one ZeRO stage.

    Attributes:
        weights: in the training dtype.
        gradients: kept between micro-batches, or held as buffers.
        optimizer: fp32 masters (the weights themselves in plain fp32) and Adam's two moments.
        transient: on top, at most, while gradients are reduced or the step is taken.
    """

    weights: float
    gradients: float
    optimizer: float
    transient: float

    @property
    def resident(self) -> float:
        """Bytes a parameter between steps."""
        return self.weights + self.gradients + self.optimizer


def held(stage: int, dtype: str, world_size: int) -> Held:
    """What DeepSpeed 0.19 keeps for each parameter, as `engine.deepspeed_config` sets it up.

    Args:
        stage: ZeRO stage, 0 to 3.
        dtype: "bfloat16", "float16" or "float32".
        world_size: number of ranks.

    Returns:
        Held. Transients at stages 2 and 3 are those of models that one bucket of gradients holds (`engine.REDUCE_BUCKET`);
        larger ones take less. Read off processes on one and two ranks in bfloat16 at every stage and in float32 at 0 and
        1; the rest follows the same partition.
    """
    w, item = world_size, ITEM_BYTES[dtype]
    if item == 4:
        return {
            0: Held(4, 0, 8, 4 if w == 1 else 8),  # gradients, and a flat copy of them for the all-reduce
            1: Held(4, 0, 12 / w, 8),
            2: Held(4, 0, 12 / w, 8 + 4 / w),
            3: Held(4 / w, 4 / w + 4, 12 / w, 12),
        }[stage]
    return {
        0: Held(2, 0, 12, 6),  # gradients and their fp32 copies
        1: Held(2, 4, 12 / w, 0 if w == 1 else 4),  # whole fp32 sums of gradients, and a flat copy for the all-reduce
        2: Held(2, 0, 12 / w, 4.5 + 4 / w),
        3: Held(2 / w, 4 / w + 2, 12 / w, 6),
    }[stage]


def peak_bytes(need: MicroBatch, stage: int, dtype: str, world_size: int) -> int:
    """The most that a rank holds at one moment of a training step.

    Args:
        need: of `micro_batch`.
        stage: ZeRO stage.
        dtype: of training.
        world_size: number of ranks.
    """
    share = held(stage, dtype, world_size)
    gathered = ITEM_BYTES[dtype] * (1 - 1 / world_size) if stage == 3 else 0.0  # whole weights in use
    resident = (share.resident + gathered) * need.parameters + need.buffer_bytes
    return int(resident + max(need.peak_bytes, share.transient * need.parameters))
