"""Preference pairs: the data of DPO.

Purpose: MiniMind's `{"chosen": [messages], "rejected": [messages]}` rows become packed batches in which the two answers of
    a pair are adjacent, each with its log-probability under a frozen reference (from `rl/preferences.py`).
Principle: whether prompts or answers are the same is asked of their rendering, not of their fields. A row becomes two
    documents, so documents 2i and 2i + 1 are a pair. Batches hold whole pairs. Only answers from the first differing
    message on are targets; earlier ones are the same in both and would cancel.
Properties: a pair with an answer beyond max_seq_len is dropped and counted. A position belongs to one reference: resuming
    with other weights is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minimind_fast.data.batches import Batch
from minimind_fast.data.cache import TokenCache
from minimind_fast.data.chats import Chat, ChatEncoder, Layout, lay_out, read_chat
from minimind_fast.data.formats import SIDES
from minimind_fast.data.minimind.variety import Variety
from minimind_fast.data.packing import PackedBatches
from minimind_fast.data.rows import BadRow
from minimind_fast.data.tokenizer import Tokenizer

SAME = BadRow("chosen and rejected are the same: there is nothing to prefer")


class PairEncoder(ChatEncoder):
    """Encodes each row as two documents, chosen and rejected; the answers in which they differ are targets."""

    kind = "pairs"

    def __init__(self, tokenizer: Tokenizer, variety: Variety | None = None) -> None:
        super().__init__(tokenizer, variety=variety)
        self.name = f"pairs-2-{self.name}"

    def layouts(self, row: dict[str, Any], tokenizer: Tokenizer) -> list[Layout] | BadRow:
        """Return the layouts of chosen and rejected, or what is wrong with the row."""
        chats: list[Chat] = []
        rest = {name: value for name, value in row.items() if name not in SIDES}
        for side in SIDES:
            if side not in row:
                return BadRow(f'has no field "{side}" (its fields: {", ".join(sorted(row)) or "none"})')
            chat = read_chat({**rest, "conversations": row[side]})
            if isinstance(chat, BadRow):
                return BadRow(f"{side}: {chat.problem}".replace('"conversations" ', ""))
            if chat.messages[-1]["role"] != "assistant":
                return BadRow(f"{side}: the last message must be the assistant's, the answer to learn from")
            chats.append(chat)
        shared = _shared_messages(tokenizer, *chats)
        if isinstance(shared, BadRow):
            return shared
        for side, chat in zip(SIDES, chats, strict=True):
            if any(index >= shared for index in chat.unlearned):
                return BadRow(f"{side}: an answer that is not to be learned (weight 0) cannot be preferred")
        layouts = [_last_layout(tokenizer, chat, shared, self.variety.whole_turn) for chat in chats]
        if layouts[0].text == layouts[1].text:
            return SAME
        return self.vary(self.variety.draw(row), layouts)


def _shared_messages(tokenizer: Tokenizer, chosen: Chat, rejected: Chat) -> int | BadRow:
    """The number of leading messages both share, as the model sees them; an answer must follow in both."""
    ours, theirs = chosen.messages, rejected.messages
    if chosen.tools != rejected.tools:
        return BadRow("chosen and rejected have different tools: they must answer the same prompt")
    shared = 0
    while shared < min(len(ours), len(theirs)) and _alike(tokenizer, chosen, rejected, shared):
        shared += 1
    if shared == len(ours) == len(theirs):
        return SAME
    if shared == 0 or any(shared == len(m) or m[shared]["role"] != "assistant" for m in (ours, theirs)):
        return BadRow(
            f"chosen and rejected part at message {shared + 1}, which is not an answer in both: they must share the prompt"
        )
    return shared


def _alike(tokenizer: Tokenizer, chosen: Chat, rejected: Chat, index: int) -> bool:
    """Whether a message is the same in both, when all before it are: by its rendering, which shows no id or score."""
    one, other = chosen.messages[index], rejected.messages[index]
    if one == other:
        return True
    if one["role"] != other["role"]:
        return False
    texts = [tokenizer.render_chat(chat.messages[: index + 1], chat.tools) for chat in (chosen, rejected)]
    return texts[0] == texts[1]


def _last_layout(tokenizer: Tokenizer, chat: Chat, shared: int, whole: bool) -> Layout:
    """The chat as the model sees it at its last answer; answers in the shared prefix are not marked."""
    early = {i for i, message in enumerate(chat.messages[:shared]) if message["role"] == "assistant"}
    return lay_out(tokenizer, replace(chat, unlearned=chat.unlearned | early), whole)[-1]


@dataclass
class PairBatch(Batch):
    """One micro-batch of whole pairs: its documents are chosen, rejected, chosen, rejected, ...

    Attributes:
        pairs: (P,) int64 indices of the pairs; None before they are numbered.
        reference: (P, 2) float32 log-probabilities of chosen and rejected under the reference, or None.
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
        cache: built with `PairEncoder`.
        batch_size: a batch holds as many pairs as fit in 2 * batch_size * max_seq_len positions: at least this many.
        max_seq_len, seed, rank, world_size, shuffle: as for `PackedBatches`; longer chats are truncated.

    Raises:
        DataError: no pairs remain.
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
        self.position.identity["kind"] = "pairs"
        self.reference: Tensor | None = None

    @property
    def num_pairs(self) -> int:
        """Pairs in an epoch, over all ranks."""
        return self.num_pieces // 2

    @property
    def num_dropped(self) -> int:
        """Pairs dropped because an answer was cut off."""
        return self.num_without_targets // 2

    def set_reference(self, fingerprint: str | None, values: Tensor | None) -> None:
        """Set the run's reference.

        Args:
            fingerprint: of the reference's weights; a stored position with another one is refused.
            values: (num_pairs, 2) float32 from `reference_logprobs`, handed out with the batches, or None.
        """
        self.position.identity["reference"] = fingerprint
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
