"""Continuous batching: one thread that runs the model, and requests that join and leave it at token boundaries.

Purpose: `Batcher.submit(job)` from any thread; tokens come back through one callback.
Principle: a turn of the loop drops whom nobody waits for, runs at most `prefill_chunk` tokens of new prompts, then one
    token of every row that runs. So a newcomer joins within a turn, and a long prompt delays the others by one piece a
    turn. The thread knows token ids only; text, stop strings and time limits belong to whoever reads the tokens, and
    who has enough calls `cancel`.
Properties: rows sample by their own seed and settings; equal settings share one call. An error in the model ends the
    requests in flight with a message, empties the cache, and the thread goes on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from minimind_fast.infer.sampling import Noise, Sampling, choose
from minimind_fast.infer.slots import Slots
from minimind_fast.model import MiniMind
from minimind_fast.serve.queue import FairQueue

log = logging.getLogger("minimind_fast.serve")


class Scores(NamedTuple):
    """What the model thought at one token: log-probabilities of its own softmax, before temperature and filters."""

    logprob: float
    top: list[tuple[int, float]]  # the likeliest (token, log-probability), best first


class Event(NamedTuple):
    """One token, or the end."""

    token: int | None = None
    scores: Scores | None = None
    finish: str | None = None  # "stop", "length" or "error"


@dataclass(eq=False)
class Job:
    """One request in flight.

    Args:
        prompt: token ids, at least one.
        max_new_tokens: at least one.
        sampling: how tokens are chosen.
        seed: of the draw.
        stop_ids: end it; the stop id itself is an event like any other.
        top_logprobs: None for no scores, else how many alternatives.
        client: whose turn it is.
    """

    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling
    seed: int
    stop_ids: frozenset[int]
    top_logprobs: int | None = None
    client: str = ""
    cancelled: bool = False
    submitted_s: float = field(default_factory=time.perf_counter)
    count: int = 0  # tokens so far
    last: int = 0
    noise: Noise | None = None
    seen: Tensor | None = None


Deliver = Callable[[list[tuple[Job, Event]]], None]


class Batcher:
    """The loop and its thread.

    Args:
        model: put into evaluation mode.
        rows: the most that run at once.
        context: the most tokens of one request, prompt and answer.
        queue: the most that wait.
        prefill_chunk: prompt tokens a turn.
    """

    def __init__(
        self, model: MiniMind, rows: int = 16, context: int = 2048, queue: int = 64, prefill_chunk: int = 256
    ) -> None:
        self.model, self.context, self.prefill_chunk = model.eval(), context, prefill_chunk
        self.slots = Slots(model, rows, context)
        self.generated_tokens = self.prompt_tokens = self.turns = 0
        self._wake = threading.Condition()
        self._waiting: FairQueue[Job] = FairQueue(queue)
        self._running: list[Job] = []  # in the order of the rows
        self._starting: list[Job] = []  # taken from the queue, their prompts not yet whole in the cache
        self._closing = False
        self._deliver: Deliver = lambda _: None
        self._thread: threading.Thread | None = None

    def start(self, deliver: Deliver) -> None:
        """Begin to work.

        Args:
            deliver: called from the thread with the events of a turn, in order; must not block.
        """
        self._deliver = deliver
        self._thread = threading.Thread(target=self._loop, name="batcher", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; what is in flight gets an error event."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread works."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def running(self) -> int:
        """Requests with a row of the batch."""
        return len(self._running) + len(self._starting)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Queue a job up.

        Args:
            job: its prompt and max_new_tokens fit the context.

        Raises:
            Full: too many wait; nothing was queued.
        """
        assert job.prompt and 0 < job.max_new_tokens <= self.context - len(job.prompt)
        with self._wake:
            self._waiting.put(job.client, job)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Nobody reads this job's tokens any more; its row is free at the next token boundary.

        Args:
            job: in any state, also finished.
        """
        with self._wake:
            job.cancelled = True
            self._waiting.remove(job.client, job)
            self._wake.notify()

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._closing or self._waiting or self.running):
                    self._wake.wait()
                if self._closing:
                    break
            try:
                self._turn()
            except Exception:
                log.exception("a step of the model failed: the requests in flight end, the server goes on")
                self._end_all()
        with self._wake:
            waiting = [self._waiting.pop() for _ in range(len(self._waiting))]
        self._deliver([(job, Event(finish="error")) for job in waiting])
        self._end_all()

    def _turn(self) -> None:
        self.turns += 1
        self._drop_cancelled()
        self._prefill()
        if self._running:
            ids = torch.tensor([job.last for job in self._running], device=self.slots.cache.device)
            self._give(0, self.slots.step(ids))

    def _drop_cancelled(self) -> None:
        if self._starting and self._starting[0].cancelled:
            self.slots.drop_staged()
            self._starting = []
        for row in reversed(range(len(self._running))):
            if self._running[row].cancelled:
                self._leave(row)

    def _leave(self, row: int) -> None:
        self.slots.leave(row)
        self._running[row] = self._running[-1]
        self._running.pop()

    def _prefill(self) -> None:
        """Go on with a long prompt, or take as many new ones as a turn has room for."""
        self._starting = self._starting or self._take()
        if not self._starting:
            return
        job, begin = self._starting[0], self.slots.staged
        if len(job.prompt) <= self.prefill_chunk:
            self._joined(self.slots.join([job.prompt for job in self._starting]))
            return
        piece = job.prompt[begin : begin + self.prefill_chunk]
        last = begin + len(piece) == len(job.prompt)
        logits = self.slots.begin_piece(piece, last)
        if last:
            self._joined(logits)

    def _take(self) -> list[Job]:
        """The next jobs whose prompts together fit a turn; a longer one comes alone."""
        jobs, room = [], self.prefill_chunk
        with self._wake:
            while self._waiting and len(jobs) < self.slots.free:
                size = len(self._waiting.peek().prompt)
                if jobs and size > room:
                    break
                jobs.append(self._waiting.pop())
                room -= size
        return jobs

    def _joined(self, logits: Tensor) -> None:
        """The rows run from now on; each prompt's logits give its first token."""
        for job in self._starting:
            self.prompt_tokens += len(job.prompt)
            job.noise = None if job.sampling.greedy else Noise([job.seed], logits.device)
            if job.sampling.penalizes:
                job.seen = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
                job.seen[torch.tensor(job.prompt, device=logits.device)] = True
        first = len(self._running)
        self._running += self._starting
        self._starting = []
        self._give(first, logits)

    @torch.inference_mode()
    def _give(self, first: int, logits: Tensor) -> None:
        """Choose a token for the rows from `first` on, give them out, and let finished rows leave."""
        jobs = self._running[first:]
        tokens = pick(jobs, logits)
        scores, events = _scores(jobs, logits, tokens), []
        for row in reversed(range(len(jobs))):  # from the last: who leaves is replaced by a row that is done with
            job, token = jobs[row], tokens[row]
            job.last, job.count = token, job.count + 1
            stopped = token in job.stop_ids
            finish = "stop" if stopped else "length" if job.count == job.max_new_tokens else None
            if not job.cancelled:
                events.append((job, Event(token, scores[row], finish)))
            if finish:
                self._leave(first + row)
        self.generated_tokens += len(tokens)
        self._deliver(events)

    def _end_all(self) -> None:
        ended = self._running + self._starting
        self._running, self._starting = [], []
        self.slots.clear()
        self._deliver([(job, Event(finish="error")) for job in ended])


def pick(jobs: Sequence[Job], logits: Tensor) -> list[int]:
    """The next token of each job, rows of equal settings in one call.

    Args:
        jobs: B, with their noise and seen tokens.
        logits: (B, V).

    Returns:
        B token ids.
    """
    groups: dict[Sampling, list[int]] = {}
    for row, job in enumerate(jobs):
        groups.setdefault(job.sampling, []).append(row)
    tokens = [0] * len(jobs)
    for sampling, rows in groups.items():
        part = logits if len(rows) == len(jobs) else logits[rows]
        noise = [n.next() for row in rows if (n := jobs[row].noise) is not None]
        seen = [s for row in rows if (s := jobs[row].seen) is not None]
        ids = choose(part, sampling, torch.cat(noise) if noise else None, torch.stack(seen) if seen else None)
        for row, token in zip(rows, ids.tolist(), strict=True):
            tokens[row] = token
        for s, token in zip(seen, ids, strict=False):
            s[token] = True
    return tokens


def _scores(jobs: Sequence[Job], logits: Tensor, tokens: Sequence[int]) -> list[Scores | None]:
    out: list[Scores | None] = []
    for row, (job, token) in enumerate(zip(jobs, tokens, strict=True)):
        if job.top_logprobs is None:
            out.append(None)
            continue
        logprobs = logits[row].float().log_softmax(-1)
        top = logprobs.topk(min(job.top_logprobs, logprobs.numel()))
        pairs = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        out.append(Scores(float(logprobs[token]), pairs))
    return out
