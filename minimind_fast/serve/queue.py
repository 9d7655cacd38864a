"""A bounded queue that serves clients round-robin.

Purpose: `FairQueue`, where requests wait for a free row of the batch.
Principle: each client has its own line; after serving a line's head, that line moves behind the others. So a client with a
    hundred requests delays another's first request by one turn, not by a hundred.
Properties: at most `bound` items wait, and at most half of that (at least one) per client while the queue is shared, so
    one client cannot lock out the others. Not thread-safe: the owner holds the lock.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Full(Exception):
    """The queue has no room for this client now."""


class FairQueue(Generic[T]):
    """One line per client.

    Args:
        bound: most items waiting at once.
    """

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self._lines: OrderedDict[str, deque[T]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, client: str, item: T) -> None:
        """Append an item to a client's line.

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
        """The next item."""
        return next(iter(self._lines.values()))[0]

    def pop(self) -> T:
        """Take the next item; its client's line moves behind the others."""
        client, line = next(iter(self._lines.items()))
        item = line.popleft()
        self._count -= 1
        if line:
            self._lines.move_to_end(client)
        else:
            del self._lines[client]
        return item

    def remove(self, client: str, item: T) -> bool:
        """Remove an item from anywhere in a client's line; False if it was not there."""
        line = self._lines.get(client)
        if line is None or item not in line:
            return False
        line.remove(item)
        self._count -= 1
        if not line:
            del self._lines[client]
        return True
