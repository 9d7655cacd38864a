"""Simple things in the place of those that take a process to make."""

import contextlib

import torch

from minimind_fast.weights.checkpoint import to_disk_names


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
