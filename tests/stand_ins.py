"""Simple things in the place of those that take a process to make."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minimind_fast.weights.checkpoint import to_disk_names

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


def resume_file(model, path, steps=3):
    """A `*_resume.pth` as MiniMind's loop leaves it: torch's AdamW over its own parameters; (the moments by name)."""
    tied = model.config.tie_word_embeddings
    names = to_disk_names(model.state_dict(), model.config)
    weights = {n: t.clone().requires_grad_() for n, t in names.items() if not (tied and n == "lm_head.weight")}
    adamw = torch.optim.AdamW(weights.values(), lr=1e-3)
    for _ in range(steps):
        for p in weights.values():
            p.grad = torch.randn_like(p)
        adamw.step()
    state = {n: p.detach().half() for n, p in weights.items()}
    state |= {"lm_head.weight": state["model.embed_tokens.weight"]} if tied else {}
    raw = {"model": state, "optimizer": adamw.state_dict(), "epoch": 1, "step": 30, "world_size": 1, "wandb_id": None}
    torch.save(raw, path)
    return {n: (adamw.state[p]["exp_avg"], adamw.state[p]["exp_avg_sq"]) for n, p in weights.items()}
