"""Simple things in the place of those that take a process to make."""

import contextlib

import torch


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
