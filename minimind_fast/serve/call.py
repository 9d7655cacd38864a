"""One request between the web and the batch: its events, deadline and cleanup.

Purpose: `Calls.open(job)` submits a job and returns a `Call`, whose `deltas()` are awaited; `close` frees the row.
Principle: the batch's thread hands each turn's events to the event loop in one call, which distributes them to the calls'
    queues. A call's holder closes it exactly once, and closing cancels the job.
Properties: no call is left open: the response classes close in `finally`. Generation never waits for a slow reader; the
    backlog is bounded by the answer's length.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

from minimind_fast.serve.batch import Batcher, Event, Job
from minimind_fast.serve.metrics import Metrics
from minimind_fast.serve.output import Answer, Delta
from minimind_fast.serve.protocol import ApiError
from minimind_fast.serve.queue import Full


class Gone(Exception):
    """The client has left."""


class Calls:
    """All open calls.

    Args:
        batcher: not started yet.
        timeout_s: from the request to the end of its answer.
        metrics: counters to update.
    """

    def __init__(self, batcher: Batcher, timeout_s: float, metrics: Metrics) -> None:
        self.batcher, self.timeout_s, self.metrics = batcher, timeout_s, metrics
        self.open_calls: dict[Job, Call] = {}

    def start(self) -> None:
        """Start the batch; its events go to the running event loop."""
        loop = asyncio.get_running_loop()

        def deliver(events: list[tuple[Job, Event]]) -> None:
            if events:
                loop.call_soon_threadsafe(self._sort, events)

        self.batcher.start(deliver)

    def _sort(self, events: list[tuple[Job, Event]]) -> None:
        for job, event in events:
            if call := self.open_calls.get(job):
                call.events.put_nowait(event)

    def open(self, job: Job, answer: Answer) -> Call:
        """Submit a job.

        Args:
            job: a new job.
            answer: collects its tokens.

        Raises:
            ApiError: too many requests are waiting (429), or the batch has stopped (503).
        """
        if not self.batcher.alive:
            raise ApiError(503, "the server is shutting down")
        call = Call(self, job, answer)
        try:
            self.batcher.submit(job)
        except Full:
            message = "too many requests are waiting; try again in a moment"
            raise ApiError(429, message, code="queue_full", kind="rate_limit_error") from None
        self.open_calls[job] = call
        return call


class Call:
    """One open request."""

    def __init__(self, calls: Calls, job: Job, answer: Answer) -> None:
        self.calls, self.job, self.answer = calls, job, answer
        self.events: asyncio.Queue[Event] = asyncio.Queue()

    async def deltas(self) -> list[Delta]:
        """Wait for new deltas and return them; `answer.finish_reason` is set at the end.

        Raises:
            ApiError: the model failed.
        """
        out: list[Delta] = []
        event: Event | None = await self.events.get()
        while event is not None and self.answer.finish_reason is None:
            if event.finish == "error":
                raise ApiError(500, "the model failed on this batch of requests, or the server stops; try again")
            if self.answer.count == 0:
                self.calls.metrics.first_token.add(time.perf_counter() - self.job.submitted_s)
            out += self.answer.push(event)
            event = None if self.events.empty() else self.events.get_nowait()
        return out

    def close(self) -> None:
        """Free the row, whatever the job's state."""
        if self.calls.open_calls.pop(self.job, None):
            self.calls.batcher.cancel(self.job)
            self.calls.metrics.whole.add(time.perf_counter() - self.job.submitted_s)

    async def guard(self, receive: Any, work: Coroutine[Any, Any, Any]) -> Any:
        """Await work while the client is connected and the time limit has not passed.

        Args:
            receive: ASGI's; the body has been read.
            work: the coroutine to await.

        Returns:
            The work's result.

        Raises:
            Gone: the client left; the work was cancelled.
            TimeoutError: the time limit passed.
        """
        worker, watcher = asyncio.ensure_future(work), asyncio.ensure_future(_until_gone(receive))
        try:
            rest_s = self.calls.timeout_s - (time.perf_counter() - self.job.submitted_s)
            await asyncio.wait({worker, watcher}, timeout=max(rest_s, 0), return_when=asyncio.FIRST_COMPLETED)
            if worker.done():
                return worker.result()
            raise Gone if watcher.done() else TimeoutError
        finally:
            worker.cancel()
            watcher.cancel()
            # Wait for both before the row is reused: a cancelled task runs once more.
            await asyncio.gather(worker, watcher, return_exceptions=True)


async def _until_gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
