"""Rollouts: the model answers prompts, and the rewarded answers become training batches.

Purpose: the data of GRPO. `read_prompts` reads MiniMind's rlaif lines; `Rollouts` takes the place of PackedBatches in the
    Trainer.
Principle: a micro-batch is `batch_size` prompts with `generations` answers each, generated in one batch by the current
    weights and packed end to end; only the answers' tokens are targets. The old log-probabilities come from the model
    being trained, by the same kernels as the update that follows. All randomness is a function of the seed, the place in
    the epoch's order and the answer's number.
Properties: an epoch is a whole number of optimizer steps, the last one filled up from the epoch's start. The position
    counts prompts over all ranks, so any number of ranks can resume. A rollout that serves several updates is saved with
    the position, since the weights that wrote it are gone; with a different number of ranks it is regenerated.

T: positions in a packed batch.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from minimind_fast.config import IGNORE_INDEX
from minimind_fast.data.batches import Batch, Position
from minimind_fast.data.chats import PROMPTS
from minimind_fast.data.complete import check_complete
from minimind_fast.data.formats import Formats
from minimind_fast.data.minimind.variety import Variety
from minimind_fast.data.rows import HALF_A_PAIR, BadRow, read_rows
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.errors import DataError, UserError
from minimind_fast.infer.decode import Workspace
from minimind_fast.infer.generate import complete
from minimind_fast.infer.sampling import Sampling, row_seed
from minimind_fast.model import MiniMind
from minimind_fast.ops.documents import run
from minimind_fast.rl.rewards import Rewards, question
from minimind_fast.training.losses import group_advantages
from minimind_fast.training.resume import frozen_fingerprint


@dataclass
class Prompt:
    """One row of the data.

    Attributes:
        row: as read.
        texts: the text given to the model, without and with an opened thought.
        ids: the token ids of each text.
    """

    row: dict[str, Any]
    texts: list[str]
    ids: list[list[int]]


@dataclass
class RolloutBatch(Batch):
    """Answers to learn from; `weights` is 1 / (tokens of the answer), so every answer counts the same.

    Attributes:
        advantages: (T,) float32, the answer's advantage at each of its tokens; 0 on prompts.
        old_logprobs: (T,) float32 under the policy that wrote the tokens; None: the single update computes them itself.
        reference_logprobs: (T,) float32, or None without a reference.
        stats: sums over the answers, for the log.
    """

    advantages: Tensor | None = None
    old_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None
    stats: dict[str, float] = field(default_factory=dict)


def read_prompts(
    paths: Sequence[str],
    tokenizer: Tokenizer,
    max_seq_len: int,
    on_bad_line: str = "error",
    log: Callable[[str], None] = print,
    data_format: str = "auto",
    check: Callable[[dict[str, Any]], None] | None = None,
    variety: Variety | None = None,
) -> list[Prompt]:
    """Read `{"conversations": [...]}` lines whose last message, the assistant's, is empty or missing.

    Args:
        paths: files, folders or globs.
        tokenizer: the model's.
        max_seq_len: most tokens in a prompt; longer ones are dropped, not truncated.
        on_bad_line: "error" or "skip".
        log: called with a line about dropped prompts.
        data_format: as for `build_cache`.
        check: raises UserError for a row that cannot be used, such as `Rewards.check_row`.
        variety: its system prompts are added.

    Returns:
        The prompts, in order.

    Raises:
        DataError: a line is unusable, or no prompts remain.
    """

    varied, given = variety or Variety(), [0]

    def read(row: dict[str, Any]) -> Prompt | BadRow:
        try:
            chat = question(row)
            system = varied.draw(row).system_for(chat.messages, chat.tools)
            if system is not None:
                chat.messages.insert(0, {"role": "system", "content": system})
            if check is not None:
                check(row)
            check_complete(tokenizer, chat.messages, chat.tools)
            texts = [tokenizer.render_chat(chat.messages, chat.tools, add_generation_prompt=True, **p) for p in PROMPTS]
            "".join(texts).encode()  # the tokenizer's own error would not name the row
            given[0] += system is not None
            return Prompt(row, texts, [tokenizer.encode(text) for text in texts])
        except UnicodeEncodeError:
            return BadRow(f"holds {HALF_A_PAIR}")
        except UserError as error:
            return BadRow(str(error))

    found = list(read_rows(paths, read, formats=Formats("chats", data_format), on_bad_line=on_bad_line, log=log))
    if varied.draws:
        log(f"{given[0]:,} of {len(found):,} prompts were given a system prompt (by seed {varied.seed})")
    short = [prompt for prompt in found if max(map(len, prompt.ids)) <= max_seq_len]
    if len(short) < len(found):
        log(
            f"{len(found) - len(short):,} of {len(found):,} prompts are left out: longer than --max_seq_len {max_seq_len}."
        )
    if not short:
        raise DataError(f"{', '.join(map(str, paths))}: no prompt of at most --max_seq_len {max_seq_len} tokens")
    return short


class Rollouts:
    """Micro-batches of answers that the model generates on demand.

    Args:
        prompts: from `read_prompts`.
        tokenizer: the model's.
        rewards: score the answers; all rows are checked at once.
        reference: the frozen model, on the training device; None: no KL.
        rank, world_size: select this process's share.
        batch_size: prompts in a micro-batch.
        generations: answers per prompt, at least 2.
        max_new_tokens: limit for an answer.
        sampling: how the answers' tokens are chosen.
        logprob_temperature: of all log-probabilities; 0: the sampling's.
        thinking_ratio: share of prompts that open a thought.
        accumulation_steps: micro-batches in an optimizer step.
        updates: optimizer steps per rollout.
        seed: decides the order and the sampling.

    Call `written_by` before the first batch.
    """

    needs_model = True  # see `Batches`

    def __init__(
        self,
        prompts: list[Prompt],
        tokenizer: Tokenizer,
        rewards: Rewards,
        reference: MiniMind | None = None,
        rank: int = 0,
        world_size: int = 1,
        *,
        batch_size: int,
        generations: int,
        max_new_tokens: int,
        seed: int,
        sampling: Sampling = Sampling(1.0),  # noqa: B008  frozen
        logprob_temperature: float = 0.0,
        thinking_ratio: float = 0.0,
        accumulation_steps: int = 1,
        updates: int = 1,
    ) -> None:
        self.prompts, self.tokenizer, self.rewards, self.reference = prompts, tokenizer, rewards, reference
        self.batch_size, self.generations, self.max_new_tokens = batch_size, generations, max_new_tokens
        self.sampling, self.thinking_ratio, self.seed = sampling, thinking_ratio, seed
        self.temperature = logprob_temperature or sampling.temperature  # of log-probabilities
        self.accumulation_steps, self.updates = accumulation_steps, updates
        self.rank, self.world_size = rank, world_size
        self.engine: Any = None
        self._copy: MiniMind | None = None
        self._workspace: Workspace | None = None
        self._longest = max(len(i) for p in prompts for i in p.ids) + max_new_tokens
        self.batch_tokens = batch_size * generations * self._longest
        for prompt in prompts:
            rewards.check_row(prompt.row)
        digest = hashlib.blake2b(json.dumps([p.texts for p in prompts]).encode(), digest_size=8).hexdigest()
        identity = {
            "kind": "rollouts",
            "data": digest,
            "reference": None if reference is None else frozen_fingerprint(reference),
            **dict(seed=seed, generations=generations, updates=updates, batch_size=batch_size),
            "accumulation_steps": accumulation_steps,
        }
        self.position = Position(identity, "prompt")
        self._update = 0  # updates made from the current rollout
        self._current: list[RolloutBatch] = []  # the rollout in use, kept between its updates

    def written_by(self, engine: Any) -> Self:
        """Set the engine whose model writes the answers."""
        self.engine = engine
        return self

    # ------------------------------------------------------------------------------------------------- the position

    @property
    def _step_prompts(self) -> int:
        """Prompts in a rollout, over all ranks."""
        return self.batch_size * self.accumulation_steps * self.world_size

    def num_batches(self, epoch: int) -> int:
        """Return the number of micro-batches per rank in a whole epoch, counting a rollout once per update."""
        return -(-len(self.prompts) // self._step_prompts) * self.updates * self.accumulation_steps

    def num_left(self) -> int:
        """Return the number of micro-batches per rank left in the current epoch."""
        rollouts = -(-(len(self.prompts) - self.position.next) // self._step_prompts)
        return (rollouts * self.updates - self._update) * self.accumulation_steps

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last whole optimizer step, and this rank's rollout if still in use."""
        state = {**self.position.state_dict(), "update": self._update}
        if self._update:
            state["own"] = [{k: v for k, v in vars(batch).items() if k != "documents"} for batch in self._current]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a position, stored by any number of ranks.

        Raises:
            ValueError: the state belongs to other data or settings.
        """
        self.position.load_state_dict(state)
        self._update = int(state["update"])
        self._current = [RolloutBatch(**own) for own in state.get("own", [])]

    def __iter__(self) -> Iterator[RolloutBatch]:
        """Yield this rank's micro-batches to the end of the epoch."""
        position = self.position
        epoch = position.epoch
        while position.epoch == epoch:
            if not self._current:
                mine = range(position.next + self.rank, position.next + self._step_prompts, self.world_size)
                cut = range(0, len(mine), self.batch_size)
                self._current = [self.roll_out(epoch, mine[i : i + self.batch_size]) for i in cut]
            batches = self._current
            yield from batches[:-1]
            self._update += 1
            if self._update == self.updates:
                self._update, self._current = 0, []
                position.advance(self._step_prompts, len(self.prompts))
            yield batches[-1]

    # --------------------------------------------------------------------------------------------------- a rollout

    def roll_out(self, epoch: int, places: Sequence[int]) -> RolloutBatch:
        """Let the model answer some prompts.

        Args:
            epoch: decides the order.
            places: indices into the epoch's order; they wrap at its end.

        Returns:
            The rewarded answers.

        Raises:
            ValueError: a reward returned invalid values.
        """
        key = np.array([self.seed % 2**64, epoch], np.uint64)
        order = np.argsort(np.random.Philox(key=key).random_raw(len(self.prompts)), kind="stable")
        chosen, contexts, texts, seeds = [], [], [], []
        for place in places:
            prompt = self.prompts[int(order[place % len(order)])]
            # Every answer of the run has its own number, whatever batch it falls into.
            first = 1 + ((epoch << 32) + place) * (self.generations + 1)
            opened = int(row_seed(self.seed, first) / 2**63 < self.thinking_ratio)
            for answer in range(self.generations):
                chosen.append(prompt)
                contexts.append(prompt.ids[opened])
                texts.append(prompt.texts[opened])
                seeds.append(row_seed(self.seed, first + 1 + answer))
        begin_s, author = time.perf_counter(), self._author()
        if self._workspace is None:
            self._workspace = Workspace(author, self.batch_size * self.generations, self._longest)
        limits: Any = dict(max_new_tokens=self.max_new_tokens, workspace=self._workspace)
        done = complete(author, contexts, self.sampling, seed=seeds, **limits)
        seconds = time.perf_counter() - begin_s
        said = [c.ids for c in done]
        answers = [self.tokenizer.decode(c.ids[: len(c.ids) - (c.finish_reason == "stop")]) for c in done]
        try:
            totals, each = self.rewards(texts, answers, [p.row for p in chosen])
        except UserError as error:
            if self.rank:  # rank 0 reports its own errors, but never hears of this one
                print(f"\nError on rank {self.rank}: {error}", file=sys.stderr, flush=True)
            raise
        grouped = torch.tensor(totals, dtype=torch.float64).view(-1, self.generations)
        lengths = [float(len(ids)) for ids in said]
        stats = {
            "reward": sum(totals),
            "reward_std": grouped.std(-1, correction=0).sum().item() * self.generations,
            "completion_length": sum(lengths),
            "finished": float(sum(c.finish_reason == "stop" for c in done)),
            "rollout_tokens_per_s": len(said) * sum(lengths) / seconds,
            **{f"reward_{name}": sum(values) for name, values in each.items()},
        }
        batch = pack(contexts, said, group_advantages(grouped).flatten().tolist(), stats)
        return self._add_logprobs(batch)

    def _author(self) -> MiniMind:
        """The current model for generation: itself or, under ZeRO-3, an unsharded copy."""
        policy: MiniMind = self.engine.module
        if self.engine.zero_stage < 3:
            return policy
        with self.engine.gathered(), torch.no_grad():
            if self._copy is None:
                weight = policy.model.embed_tokens.weight
                with torch.random.fork_rng(devices=[]):
                    self._copy = MiniMind(policy.config).to(weight.device, weight.dtype)
            for mine, theirs in zip(self._copy.parameters(), policy.parameters(), strict=True):
                mine.copy_(theirs)
        return self._copy

    def _add_logprobs(self, batch: RolloutBatch) -> RolloutBatch:
        """Add the reference and old log-probabilities; with one update per rollout the policy is its own old one."""
        batch = batch.to(self.engine.module.model.embed_tokens.weight.device)
        if self.updates > 1:
            # Keep autograd on and drop its graph: without it a CPU uses other kernels, and the ratio would not be 1.
            batch.old_logprobs = self.run(self.engine, batch)[0].detach()
        if self.reference is not None:
            with torch.no_grad():
                batch.reference_logprobs = self.run(self.reference, batch)[0]
        return batch

    def run(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Run a batch, with log-probabilities at the run's temperature.

        Args:
            model: a model or an engine.
            batch: on the model's device.

        Returns:
            (logprobs (T,) float32, the experts' load-balancing loss).
        """
        out = run(model, batch, targets=batch.targets, temperature=self.temperature)
        return out.logprobs, out.aux_loss


def pack(
    contexts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    advantages: Sequence[float],
    stats: dict[str, float],
) -> RolloutBatch:
    """Pack prompts and answers end to end, with the answers' tokens as targets.

    Args:
        contexts: token ids of each prompt, at least one.
        answers: token ids of each answer, at least one.
        advantages: one per answer.
        stats: stored in the batch.

    Returns:
        A batch without log-probabilities.
    """
    ids, targets, weights, per_token, lengths = [], [], [], [], []
    for context, answer, advantage in zip(contexts, answers, advantages, strict=True):
        before = len(context) - 1
        ids += [*context, *answer[:-1]]
        targets += [IGNORE_INDEX] * before + list(answer)
        weights += [0.0] * before + [1 / len(answer)] * len(answer)
        per_token += [0.0] * before + [advantage] * len(answer)
        lengths.append(before + len(answer))
    return RolloutBatch(
        torch.tensor(ids),
        torch.tensor(targets),
        torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        max(lengths),
        num_targets=sum(map(len, answers)),
        num_docs=len(answers),
        weights=torch.tensor(weights),
        advantages=torch.tensor(per_token),
        stats=stats,
    )
