"""Simple things in the place of those that take a process to make."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operators for which PyTorch has no fixed order of addition on a GPU, or only for integers: with --deterministic they raise.
# Source: torch.use_deterministic_algorithms (2.13), without those for pictures.
UNORDERED = {"cumsum", "histc", "median", "put", "put_", "nll_loss_forward", "nll_loss2d_forward", "_ctc_loss"}
UNORDERED |= {"_embedding_bag", "scatter_reduce", "scatter_reduce_"}


class Operators(TorchDispatchMode):
    """Notes the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


class Engine(torch.nn.Module):
    """What a stage sees of a `training.engine.Engine`."""

    zero_stage = 0

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.module, self.config = model, model.config

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    @contextlib.contextmanager
    def gathered(self):
        yield self.module
