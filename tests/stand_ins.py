"""Simple things in the place of those that take a process to make."""

import torch


class Engine(torch.nn.Module):
    """What a stage's loss sees of a DeepSpeed engine: a call, and the model as `module`."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.module = model

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)
