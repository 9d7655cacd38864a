"""Who is next: a bounded queue that serves clients in turn.

Purpose: `FairQueue`, where requests wait for a free row of the batch.
Principle: each client has a line of its own; the queue takes the head of one line, and that line then stands behind the
    others. So a client with a hundred requests delays another one's first request by one turn, not by a hundred.
Properties: at most `bound` wait in all, and at most half of that (one at least) of one client while the queue is shared:
    one client cannot shut the others out. Not locked: the owner has the lock.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Full(Exception):
    """The queue takes no more of this client now."""


class FairQueue(Generic[T]):
    """Lines of clients.

    Args:
        bound: the most that wait at once.
    """

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self._lines: OrderedDict[str, deque[T]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, client: str, item: T) -> None:
        """Queue up.

        Args:
            client: whose line.
            item: what waits.

        Raises:
            Full: no room.
        """
        line = self._lines.get(client, ())
        others = self._count > len(line)
        if self._count >= self.bound or (others and len(line) >= max(1, self.bound // 2)):
            raise Full
        self._lines.setdefault(client, deque()).append(item)
        self._count += 1

    def peek(self) -> T:
        """Who is next."""
        return next(iter(self._lines.values()))[0]

    def pop(self) -> T:
        """Take who is next; their client's line goes behind the others."""
        client, line = next(iter(self._lines.items()))
        item = line.popleft()
        self._count -= 1
        if line:
            self._lines.move_to_end(client)
        else:
            del self._lines[client]
        return item

    def remove(self, client: str, item: T) -> bool:
        """Take one out of the middle.

        Args:
            client: whose line.
            item: what waits.

        Returns:
            Whether it was there.
        """
        line = self._lines.get(client)
        if line is None or item not in line:
            return False
        line.remove(item)
        self._count -= 1
        if not line:
            del self._lines[client]
        return True
