"""Launches on shapes that no memory holds: millions of tokens, a few programs of each grid.

Purpose: addresses past 2^31 are computed only where tensors are that large, which no test's memory holds.
Principle: an op's launchers run forward and backward on fake tensors (shapes without data). Each argument gets an address of
    its own, 16 TB apart. A few programs of each grid run: the first, the last, and random ones. What they load is made up:
    0.5, or for integers what such an index tensor holds. Accesses outside the argument and int32 overflow are reported.
Properties: seconds a launch; no values are computed (a tl.dot gives zeros). A kernel that is launched again and again, one
    chunk after another, runs in launches of new sizes and in those numbered by powers of two; a loop
    of many steps takes some. Tiles are those of a large card with 132 multiprocessors.

Shapes: T tokens, E experts, S = T * top_k slots.
"""

from __future__ import annotations

import contextlib
import importlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from minimind_fast import ops
from minimind_fast.ops.cases import Draw
from minimind_fast.proof.held import held
from minimind_fast.proof.sanitizer.interpreter import Watcher, watched

APART = 1 << 44  # bytes between two storages
LONG_LOOP = 64  # steps; of a longer one only some are taken: no kernel carries a pointer through one
EXTRA_PROGRAMS = 3  # random ones of each grid, beside the first two, the last two and the middle
CARD = SimpleNamespace(
    multi_processor_count=132, major=9, minor=0, L2_cache_size=50 << 20, warp_size=32, total_memory=80 << 30,
    shared_memory_per_block_optin=227 << 10,
)  # fmt: skip


class _Argument:
    """A tensor without data: its address, and the last element of its view."""

    def __init__(self, tensor: torch.Tensor, start: int) -> None:
        self.item, self.shape = tensor.element_size(), tuple(tensor.shape)
        self.address = start + int(tensor.storage_offset()) * self.item
        lengths = zip(tensor.shape, tensor.stride(), strict=True)
        self.last = sum(int((size - 1) * stride) for size, stride in lengths) if tensor.numel() else -1
        self.floating = tensor.is_floating_point()


class Virtual(Watcher):
    """Watches launches on tensors without data."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self.arguments: dict[str, _Argument] = {}
        self.sizes: dict[str, int] = {}
        self.largest: dict[tuple[str, str], int] = {}  # (kernel, argument) -> the largest element
        self._signatures: set[Any] = set()
        self._times: Counter[str] = Counter()

    def begin(self, arguments: dict[str, Any]) -> bool:
        starts: dict[int, int] = {}
        self.arguments, self.sizes = {}, {}
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                key = value.untyped_storage()._cdata
                start = starts.setdefault(key, (len(starts) + 1) * APART)
                self.arguments[name] = _Argument(value, start)
            elif isinstance(value, int):
                self.sizes[name] = int(value)
        if "order_ptr" in self.arguments:
            self.sizes["slots"] = self.arguments["order_ptr"].last + 1
        shapes = ((name, a.shape, a.last) for name, a in self.arguments.items())
        signature = self.kernel, *shapes, *self.sizes.items()
        self._times[self.kernel] += 1
        count = self._times[self.kernel]
        run = signature not in self._signatures or count & (count - 1) == 0
        self._signatures.add(signature)
        return run

    def address(self, name: str, tensor: torch.Tensor) -> int:
        return self.arguments[name].address

    def order(self, count: int) -> Iterable[int]:
        some = {0, 1, count // 2, count - 2, count - 1, *(self.random.randrange(count) for _ in range(EXTRA_PROGRAMS))}
        return sorted(program for program in some if 0 <= program < count)

    def _elements(self, what: str, name: str, addresses: np.ndarray, mask: np.ndarray) -> np.ndarray:
        argument = self.arguments[name]
        offsets = addresses.astype(np.int64) - argument.address
        at = offsets // argument.item
        outside = mask & ((offsets < 0) | (at > argument.last) | (offsets % argument.item != 0))
        if outside.any():
            self.report(f"{what} out of bounds", name, f"element {at[outside].flat[0]} of {argument.shape}")
        if mask.any():
            key = self.kernel, name
            self.largest[key] = max(self.largest.get(key, 0), int(at[mask].max()))
        return at

    def load(self, argument: str, addresses: np.ndarray, mask: np.ndarray, dtype: np.dtype) -> np.ndarray:
        at = self._elements("load", argument, addresses, mask)
        if self.arguments[argument].floating:
            return np.full(at.shape, 0.5).astype(dtype)
        return held(argument, np.where(mask, at, 0), self.sizes).astype(dtype)

    def store(self, argument: str, addresses: np.ndarray, mask: np.ndarray, values: np.ndarray) -> bool:
        self._elements("store", argument, addresses, mask)
        return False

    def multiply(self, a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
        return np.zeros_like(total)

    def steps(self, steps: range) -> Iterable[int]:
        if len(steps) <= LONG_LOOP:
            return steps
        return sorted({*steps[:2], *steps[-2:], *self.random.sample(steps, 4)})

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with _disable_current_modes():  # numbers are numbers again
            yield


@contextlib.contextmanager
def _a_card_that_is_not_there(module: Any) -> Iterator[None]:
    """Fake tensors say that they are on a GPU, and an op's launcher runs where its fake implementation would."""
    found = (getattr(value, "op", None) for value in vars(module).values())
    parts = [op for op in found if isinstance(op, torch.library.CustomOpDef)]
    with contextlib.ExitStack() as stack:
        patch = mock.patch.object
        stack.enter_context(patch(FakeTensor, "is_cuda", True))
        stack.enter_context(patch(torch.cuda, "device_of", lambda *_: contextlib.nullcontext()))
        stack.enter_context(patch(torch.cuda, "get_device_properties", lambda *_: CARD))
        stack.enter_context(patch(torch.cuda, "get_device_capability", lambda *_: (CARD.major, CARD.minor)))
        for part in parts:
            stack.enter_context(patch(part, "_abstract_fn", part._init_fn))
        yield


def examine_shape(
    op: str, preset: str, tokens: int, dtype: torch.dtype = torch.float16, function: Callable | None = None
) -> Virtual | None:
    """Watch all launches of an op, forward and backward, as one of the models trains with it.

    Args:
        op: its name.
        preset: the model.
        tokens: T.
        dtype: float16 or float32.
        function: the implementation; the op's kernel if None.

    Returns:
        The watcher, with its findings; None if that model does not call the op.
    """
    case = ops.OPS[op].preset_case(preset, tokens, training=True)
    if case is None:
        return None
    function, watcher = function or ops.kernel(op), Virtual()
    module = importlib.import_module(function.__module__)
    with watched(watcher), _a_card_that_is_not_there(module), FakeTensorMode(allow_non_fake_inputs=True):
        tensors = case.tensors(Draw(dtype))
        leaves = [tensors[key].requires_grad_() for key in ops.OPS[op].differentiable if tensors[key] is not None]
        outputs = [out for out in case.call(function, tensors) if out.requires_grad]
        grads = [torch.empty_like(out) for out in outputs]
        if case.promised:
            grads[0] = 0.5 * tensors[case.promised]
        torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
    return watcher
