"""Log-probabilities for DPO, and pairs that carry the reference's.

Purpose: `answer_logprobs(model, batch)` for the loss; `open_pairs(...)` for the stage.
Principle: the reference never changes, so its log-probabilities are constants: computed in one pass and stored beside the
    token cache.
Properties: the file is named after the data and the weights; a resumed run finds it or recomputes the same values.

T: positions in a packed batch, P: pairs.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from minimind_fast.config import IGNORE_INDEX
from minimind_fast.data.cache import build_cache
from minimind_fast.data.pairs import PairBatch, PairBatches, PairEncoder
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.model import MiniMind, ModelOutput
from minimind_fast.ops.documents import run
from minimind_fast.training import ranks
from minimind_fast.training.config import AnswerConfig
from minimind_fast.training.resume import frozen_fingerprint
from minimind_fast.weights.files import written_aside


def answer_logprobs(model: Any, batch: PairBatch) -> tuple[Tensor, ModelOutput]:
    """Log-probability of each answer in a batch, summed over its tokens.

    Args:
        model: a model or an engine.
        batch: on the model's device.

    Returns:
        (P, 2) float32, chosen and rejected, with gradients if the model has them; and the model's output.
    """
    out = run(model, batch, targets=batch.targets)
    return _by_answer(out.logprobs, batch), out


def answer_lengths(batch: PairBatch) -> Tensor:
    """Number of targets in each answer: (P, 2) float32, each at least 1."""
    return _by_answer((batch.targets != IGNORE_INDEX).float(), batch)


def _by_answer(values: Tensor, batch: PairBatch) -> Tensor:
    """(T,) -> (P, 2) sums over documents, in a fixed order of addition (unlike index_add on a GPU)."""
    assert batch.cu_seqlens is not None
    sums = torch.segment_reduce(values, "sum", lengths=batch.cu_seqlens.diff().long(), unsafe=True)
    return sums[: 2 * batch.num_pairs].view(-1, 2)  # without pairs the batch is one ignored position


@torch.no_grad()
def reference_logprobs(reference: MiniMind, data: PairBatches, device: torch.device) -> Tensor:
    """Log-probabilities of all pairs under a frozen model; collective: all ranks share the work.

    Args:
        reference: on the device, in evaluation mode.
        data: in file order, at the start of an epoch.
        device: the reference's device.

    Returns:
        (num_pairs, 2) float32 on the CPU.
    """
    sums = torch.zeros(data.num_pairs, 2, device=device)
    for batch in data:
        assert isinstance(batch, PairBatch) and batch.pairs is not None
        batch = batch.to(device)
        sums[batch.pairs] = answer_logprobs(reference, batch)[0]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums)
    return sums.cpu()


def cached_reference(
    reference: MiniMind, data: PairBatches, device: torch.device, log: Callable[[str], None]
) -> Tensor:
    """The reference's log-probabilities from the file beside the token cache, computed first if missing.

    Args:
        reference: frozen, on the CPU; moved to the device only if it has to compute.
        data: in file order, at the start of an epoch.
        device: device to compute on.
        log: called with one line about what was done.

    Returns:
        (num_pairs, 2) float32 on the CPU, the same on every rank.
    """
    decides = [data.cache.fingerprint, data.max_seq_len, frozen_fingerprint(reference)]
    key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]
    file = data.cache.path.with_name(f"{data.cache.path.name}.reference-{key}.npy")
    everywhere = torch.tensor([float(file.is_file())], device=device)
    if dist.is_initialized():
        dist.all_reduce(everywhere, dist.ReduceOp.MIN)  # ranks on another machine may not see the file
    if everywhere.item():
        log(f"the reference's log-probabilities were found: {file}")
        return torch.from_numpy(np.load(file))
    values = reference_logprobs(reference.to(device), data, device)
    log(f"the reference's log-probabilities of {data.num_pairs:,} pairs: {file}")
    if not dist.is_initialized() or dist.get_rank() == 0:
        content = io.BytesIO()
        np.save(content, values.numpy())
        with written_aside(file) as aside:
            aside.write_bytes(content.getvalue())
    return values


def open_pairs(
    config: AnswerConfig,
    paths: list[str],
    tokenizer: Tokenizer,
    reference: MiniMind,
    device: torch.device,
    cached: bool,
    training: bool,
) -> PairBatches:
    """Tokenise, cache and batch pairs, and tie them to their reference.

    Args:
        config: batch_size, max_seq_len, seed, cache_dir, on_bad_line, variety are read.
        paths: JSONL files.
        tokenizer: the model's.
        reference: frozen, on the CPU.
        device: this rank's device.
        cached: store the reference's log-probabilities in the batches.
        training: shuffle and vary.

    Raises:
        DataError: unusable data; names file and line.
    """
    (rank, world_size), log = ranks.world(), ranks.say
    folder, encode = config.cache_dir or None, PairEncoder(tokenizer, config.variety if training else None)
    how = {"on_bad_line": config.on_bad_line, "data_format": config.data_format, "log": log}
    cache = build_cache(paths, tokenizer, cache_dir=folder, encode=encode, **how)
    size = {"batch_size": config.batch_size, "max_seq_len": config.max_seq_len, "seed": config.seed}
    data = PairBatches(cache, **size, rank=rank, world_size=world_size, shuffle=training)
    if data.num_dropped:
        log(
            f"{data.num_dropped:,} of {data.num_pairs + data.num_dropped:,} pairs are left out: an answer lies beyond "
            f"--max_seq_len {config.max_seq_len}."
        )
    values, fingerprint = None, frozen_fingerprint(reference)
    if cached:
        in_order = PairBatches(cache, **size, rank=rank, world_size=world_size, shuffle=False)
        values = cached_reference(reference, in_order, device, log)
    data.set_reference(fingerprint, values)
    return data
