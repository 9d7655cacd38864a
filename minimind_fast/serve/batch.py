"""Continuous batching: one thread runs the model; requests join and leave at token boundaries.

Purpose: `Batcher.submit(job)` from any thread; tokens come back through one callback.
Principle: each turn of the loop drops cancelled jobs, runs at most `prefill_chunk` tokens of new prompts, then one token of
    every running row. So a new request joins within a turn, and a long prompt delays the others by one piece per turn.
    The thread sees token ids only; text, stop strings and time limits are the reader's, which calls `cancel` when done.
Properties: rows sample with their own seed and settings; equal settings share one call. If the model fails, the requests in
    flight end with a message, the cache is cleared and the thread continues.
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
    """The model's log-probabilities at one token, before temperature and filters."""

    logprob: float
    top: list[tuple[int, float]]  # likeliest (token, log-probability), best first


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
        seed: for sampling.
        stop_ids: end the answer; the stop id itself is delivered like any token.
        top_logprobs: number of alternatives; None for no scores.
        client: key for fair queueing.
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
        rows: most requests running at once.
        context: most tokens per request, prompt and answer together.
        queue: most requests waiting.
        prefill_chunk: prompt tokens per turn.
    """

    def __init__(
        self, model: MiniMind, rows: int = 16, context: int = 2048, queue: int = 64, prefill_chunk: int = 256
    ) -> None:
        self.model, self.context, self.prefill_chunk = model.eval(), context, prefill_chunk
        self.slots = Slots(model, rows, context)
        self.generated_tokens = self.prompt_tokens = self.turns = 0
        self._wake = threading.Condition()
        self._waiting: FairQueue[Job] = FairQueue(queue)
        self._running: list[Job] = []  # in row order
        self._starting: list[Job] = []  # taken from the queue, prompts not yet fully in the cache
        self._closing = False
        self._deliver: Deliver = lambda _: None
        self._thread: threading.Thread | None = None

    def start(self, deliver: Deliver) -> None:
        """Start the thread.

        Args:
            deliver: called from the thread with a turn's events, in order; must not block.
        """
        self._deliver = deliver
        self._thread = threading.Thread(target=self._loop, name="batcher", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread; jobs in flight get an error event."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread is running."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def running(self) -> int:
        """Requests with a row in the batch."""
        return len(self._running) + len(self._starting)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Queue a job.

        Args:
            job: prompt and max_new_tokens must fit in the context.

        Raises:
            Full: too many jobs are waiting; this one was not queued.
        """
        assert job.prompt and 0 < job.max_new_tokens <= self.context - len(job.prompt)
        with self._wake:
            self._waiting.put(job.client, job)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Cancel a job in any state; its row is freed at the next token boundary."""
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
        """Continue a long prompt, or start as many new ones as fit in a turn."""
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
        """Take the next jobs whose prompts fit in a turn together; a longer one comes alone."""
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
        """Start the rows, with each first token from its prompt's logits."""
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
        """Choose a token for the rows from `first` on, deliver it, and remove finished rows."""
        jobs = self._running[first:]
        tokens = pick(jobs, logits)
        scores, events = _scores(jobs, logits, tokens), []
        for row in reversed(range(len(jobs))):  # backwards: a leaving row is replaced by one already handled
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
