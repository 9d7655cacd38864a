"""Real memory under watch: races between programs, elements outside an argument, memory that nobody wrote.

Purpose: finds in small cases what a GPU would do wrong now and then: a result that depends on the order of programs.
Principle: each launch keeps, for every element of every argument, which program wrote it and which read it. Two programs on
    one element with a write among them are a race, whatever the values. Programs run in a random order.
Properties: a fault is reported and its lanes are masked, so the process survives it. Masked lanes of a load without `other`
    are undefined: they hold nan or a huge integer, so a kernel that needs them gives another result. Memory is poisoned by
    the caller (`poisoned_memory`). Slow: about 1 ms an operation.

Source: the idea of compute-sanitizer's racecheck, memcheck and initcheck, on numpy.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from minimind_fast.proof.sanitizer.interpreter import Watcher

SEVERAL = -1  # readers of an element


class _Storage:
    """Who wrote and who read what begins at each byte of a storage, in one launch; programs count from 1."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.start, self.size = storage.data_ptr(), storage.nbytes()
        self.writer, self.reader = np.zeros((2, self.size), np.int32)


class _Argument:
    """A tensor as a kernel may use it: which elements of its storage belong to the view."""

    def __init__(self, tensor: torch.Tensor, storage: _Storage) -> None:
        self.tensor, self.storage, self.item = tensor, storage, tensor.element_size()
        belongs = torch.zeros(storage.size // self.item, dtype=torch.bool)
        if tensor.numel():
            belongs.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
        self.belongs = belongs.numpy()

    def within(self, at: np.ndarray) -> np.ndarray:
        """Which of these byte offsets are elements of the view."""
        inside = (at >= 0) & (at < self.storage.size // self.item * self.item) & (at % self.item == 0)
        inside[inside] = self.belongs[at[inside] // self.item]
        return inside


class Shadow(Watcher):
    """Watches launches on real tensors.

    Args:
        seed: of the order of programs; None: the given order.
    """

    def __init__(self, seed: int | None = 0) -> None:
        super().__init__()
        self.random = None if seed is None else random.Random(seed)
        self.arguments: dict[str, _Argument] = {}
        self.accesses = 0

    def begin(self, arguments: dict[str, Any]) -> bool:
        storages: dict[int, _Storage] = {}
        self.arguments = {}
        for name, tensor in arguments.items():
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage.data_ptr()
                storages[key] = storages.get(key) or _Storage(storage)
                self.arguments[name] = _Argument(tensor, storages[key])
        return True

    def order(self, count: int) -> Iterable[int]:
        programs = list(range(count))
        if self.random:
            self.random.shuffle(programs)
        return programs

    def _offsets(self, what: str, name: str, addresses: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Byte offsets of the live lanes in their storage; lanes outside the argument are reported and masked."""
        argument = self.arguments[name]
        at = addresses[mask].astype(np.int64) - argument.storage.start
        self.accesses += at.size
        inside = argument.within(at)
        if not inside.all():
            first = (int(at[~inside][0]) - argument.tensor.storage_offset() * argument.item) / argument.item
            shape = tuple(argument.tensor.shape)
            self.report(f"{what} out of bounds", name, f"element {first:g} of {shape}, {(~inside).sum()} lanes")
            mask[mask] = inside
        return at[inside]

    def load(self, argument: str, addresses: np.ndarray, mask: np.ndarray, dtype: np.dtype) -> np.ndarray | None:
        at = self._offsets("load", argument, addresses, mask)
        storage, me = self.arguments[argument].storage, self.program + 1
        writer, reader = storage.writer[at], storage.reader[at]
        if ((writer != 0) & (writer != me)).any():
            self.report("race: reads what another program writes", argument)
        if (writer == me).any():
            self.report("race: reads what it wrote itself", argument, "another thread's, without a barrier")
        storage.reader[at] = np.where((reader == 0) | (reader == me), me, SEVERAL)
        return None

    def read(self, argument: str, values: np.ndarray) -> None:
        if values.dtype.kind == "f":
            poison = np.isnan(values)
        elif values.dtype.itemsize > 1:
            poison = values == np.iinfo(values.dtype).max
        else:
            return
        if poison.any():
            self.report("reads what nobody wrote", argument, f"{poison.sum()} of {values.size} lanes are poison")

    def store(self, argument: str, addresses: np.ndarray, mask: np.ndarray, values: np.ndarray) -> bool:
        at = self._offsets("store", argument, addresses, mask)
        storage, me = self.arguments[argument].storage, self.program + 1
        writer, reader = storage.writer[at], storage.reader[at]
        if ((writer != 0) & (writer != me)).any():
            self.report("race: two programs write one element", argument)
        if ((reader == SEVERAL) | ((reader != 0) & (reader != me))).any():
            self.report("race: writes what another program reads", argument)
        if np.unique(at).size != at.size:
            self.report("race: one store writes an element twice", argument)
        storage.writer[at] = me
        return True
