"""Pairs of answers, one preferred to the other: the data of DPO.

Purpose: `{"chosen": [messages], "rejected": [messages]}` lines, MiniMind's own, become packed batches in which the two of a
    pair lie side by side, with the log-probability of each under a frozen reference.
Principle: a line becomes two documents, chosen and rejected, so that documents 2i and 2i + 1 are a pair. Batches are packed
    of whole pairs. What is trained is where the two part: the answers from the first message on that differs (an earlier
    answer is the same in both and would cancel). The reference is the model as it was when training began, so that its
    log-probabilities are numbers: they are computed in one pass and kept beside the token cache.
Properties: a pair of which either answer lies beyond max_seq_len is left out and counted. The file of log-probabilities is
    named by the data and the weights; a resumed run finds it, or makes the same again, and refuses other weights.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from minimind_fast.data.cache import BadRow, TokenCache, build_cache
from minimind_fast.data.chats import Chat, ChatEncoder, Layout, lay_out, read_chat
from minimind_fast.data.packing import IGNORE_INDEX, Batch, PackedBatches
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.model import MiniMind, ModelOutput
from minimind_fast.training import ranks
from minimind_fast.training.config import TrainConfig
from minimind_fast.training.resume import frozen_fingerprint
from minimind_fast.weights.files import written_aside

SIDES = ("chosen", "rejected")


class PairEncoder(ChatEncoder):
    """Rows of two chats to two documents each, chosen and rejected; the answers in which they differ are targets.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self.name = f"pairs-1-{self.name}"

    def layouts(self, row: dict[str, Any], tokenizer: Tokenizer) -> list[Layout] | BadRow:
        """Give the texts of chosen and rejected with their answers marked, or what is wrong with the row."""
        chats: list[Chat] = []
        for side in SIDES:
            if side not in row:
                return BadRow(f'has no field "{side}" (its fields: {", ".join(sorted(row)) or "none"})')
            chat = read_chat({"conversations": row[side], "tools": row.get("tools")})
            if isinstance(chat, BadRow):
                return BadRow(f"{side}: {chat.problem}".replace('"conversations" ', ""))
            if chat.messages[-1]["role"] != "assistant":
                return BadRow(f"{side}: the last message must be the assistant's, the answer to learn from")
            chats.append(chat)
        shared = _shared_messages(*chats)
        if isinstance(shared, BadRow):
            return shared
        return [_last_layout(tokenizer, chat, shared) for chat in chats]


def _shared_messages(chosen: Chat, rejected: Chat) -> int | BadRow:
    """How many messages both begin with, where an answer follows in both."""
    ours, theirs = chosen.messages, rejected.messages
    shared = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
    )
    if chosen.tools != rejected.tools:
        return BadRow("chosen and rejected have different tools: they must answer the same prompt")
    if shared == len(ours) == len(theirs):
        return BadRow("chosen and rejected are the same: there is nothing to prefer")
    if shared == 0 or any(shared == len(m) or m[shared]["role"] != "assistant" for m in (ours, theirs)):
        return BadRow(
            f"chosen and rejected part at message {shared + 1}, which is not an answer in both: they must share the prompt"
        )
    return shared


def _last_layout(tokenizer: Tokenizer, chat: Chat, shared: int) -> Layout:
    """The chat as the model sees it at its last answer; answers in the shared beginning are not marked."""
    layout = lay_out(tokenizer, chat)[-1]
    at = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant" and i > 0]
    marked = zip(at[-len(layout.answers) :], layout.answers, strict=True)
    return Layout(layout.text, [answer for index, answer in marked if index >= shared])


@dataclass
class PairBatch(Batch):
    """One micro-batch of whole pairs: its documents are chosen, rejected, chosen, rejected, ...

    Attributes:
        pairs: (P,) int64, which pairs these are; None before they are numbered.
        reference: (P, 2) float32, log-probability of chosen and rejected under the reference, or None.
    """

    pairs: Tensor | None = None
    reference: Tensor | None = None

    @property
    def num_pairs(self) -> int:
        """Pairs in this batch."""
        return 0 if self.pairs is None else self.pairs.numel()


class PairBatches(PackedBatches):
    """Packed micro-batches of whole pairs.

    Args:
        cache: of `PairEncoder`.
        batch_size: a batch holds as many pairs as fit 2 * batch_size * max_seq_len positions: at least this many.
        max_seq_len, seed, rank, world_size, shuffle: as for `PackedBatches`; longer chats are cut off.

    Raises:
        DataError: no pair is left.
    """

    def __init__(
        self,
        cache: TokenCache,
        *,
        batch_size: int,
        max_seq_len: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
    ) -> None:
        super().__init__(
            cache,
            batch_tokens=2 * batch_size * max_seq_len,
            max_seq_len=max_seq_len,
            seed=seed,
            rank=rank,
            world_size=world_size,
            truncate=True,
            shuffle=shuffle,
        )
        self._identity["kind"] = "pairs"
        self.reference: Tensor | None = None

    @property
    def num_pairs(self) -> int:
        """Pairs in an epoch, over all ranks."""
        return self.num_pieces // 2

    @property
    def num_dropped(self) -> int:
        """Pairs that are left out because an answer was cut away."""
        return self.num_without_targets // 2

    def set_reference(self, fingerprint: str | None, values: Tensor | None) -> None:
        """Say which reference the run has.

        Args:
            fingerprint: of its weights; a stored position of a run with others is refused.
            values: (num_pairs, 2) float32 of `reference_logprobs`, to be handed out with the batches, or None.
        """
        self._identity["reference"] = fingerprint
        self.reference = values

    def _trains(self, targets: np.ndarray) -> np.ndarray:
        return np.repeat((targets.reshape(-1, 2) > 0).all(1), 2)

    def _pair_lengths(self) -> np.ndarray:
        return self._lengths.reshape(-1, 2).sum(1)

    def _make_plan(self, epoch: int) -> list[np.ndarray]:
        return self._pack_shuffled(epoch, self._pair_lengths(), self._max_docs // 2)

    def _size(self, items: np.ndarray) -> int:
        return int(self._pair_lengths()[items].sum())

    def _assemble(self, items: np.ndarray) -> PairBatch:
        batch = super()._assemble(np.stack([2 * items, 2 * items + 1], axis=1).reshape(-1))
        pairs = torch.from_numpy(items.astype(np.int64))
        return PairBatch(
            **vars(batch), pairs=pairs, reference=None if self.reference is None else self.reference[pairs]
        )


def answer_logprobs(model: Any, batch: PairBatch) -> tuple[Tensor, ModelOutput]:
    """Log-probability of each answer of a batch, summed over its tokens.

    Args:
        model: a model or an engine.
        batch: on the model's device.

    Returns:
        (P, 2) float32, chosen and rejected, without gradients where the model has none; and the model's output.
    """
    out = model(batch.input_ids, targets=batch.targets, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen)
    return _by_answer(out.logprobs, batch), out


def answer_lengths(batch: PairBatch) -> Tensor:
    """Targets of each answer.

    Args:
        batch: of pairs.

    Returns:
        (P, 2) float32, each at least 1.
    """
    return _by_answer((batch.targets != IGNORE_INDEX).float(), batch)


def _by_answer(values: Tensor, batch: PairBatch) -> Tensor:
    """(T,) -> (P, 2) sums over the documents, in a fixed order of addition (index_add on a GPU has none)."""
    assert batch.cu_seqlens is not None
    sums = torch.segment_reduce(values, "sum", lengths=batch.cu_seqlens.diff().long(), unsafe=True)
    return sums[: 2 * batch.num_pairs].view(-1, 2)  # without pairs the batch is one ignored position


@torch.no_grad()
def reference_logprobs(reference: MiniMind, data: PairBatches, device: torch.device) -> Tensor:
    """Log-probabilities of all pairs under a frozen model; all ranks call it and share the work.

    Args:
        reference: on the device, in evaluation mode.
        data: in file order, at the beginning of an epoch.
        device: of the model.

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
    """The reference's log-probabilities from the file beside the token cache, made first if it is not there.

    Args:
        reference: frozen, on the CPU; it is moved to the device if it has to compute.
        data: in file order, at the beginning of an epoch.
        device: where to compute.
        log: takes a line about what was done.

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
    config: TrainConfig,
    paths: list[str],
    tokenizer: Tokenizer,
    reference: MiniMind,
    device: torch.device,
    cached: bool,
    training: bool,
) -> PairBatches:
    """Tokenised, cached and batched pairs that know their reference.

    Args:
        config: batch_size, max_seq_len, seed, cache_dir, on_bad_line.
        paths: JSONL files.
        tokenizer: of the model.
        reference: frozen, on the CPU.
        device: of this rank.
        cached: give the batches the reference's log-probabilities.
        training: shuffle.

    Raises:
        DataError: naming file and line.
    """
    (rank, world_size), log = ranks.world(), ranks.say
    folder, encode = config.cache_dir or None, PairEncoder(tokenizer)
    cache = build_cache(paths, tokenizer, cache_dir=folder, encode=encode, on_bad_line=config.on_bad_line, log=log)
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
