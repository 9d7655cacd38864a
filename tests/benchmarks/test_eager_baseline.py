"""The baseline of every ratio does as much as MiniMind does, no more."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import minimind_fast as mm
from benchmarks.peers import eager_minimind as eager


class Operators(TorchDispatchMode):
    """Counts the operators that compute something: views are free."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        if not view and "view" not in str(function):
            self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def test_operators_of_a_micro_step_are_minimind3s():
    model = eager.EagerMiniMind(mm.ModelConfig.preset("minimind3"))
    ids = torch.randint(3, 6400, (1, 16), generator=torch.Generator().manual_seed(0))
    with Operators() as forward, torch.autocast("cpu", torch.bfloat16):
        loss = eager.loss(model, ids, ids)
    with Operators() as backward:
        loss.backward()
    assert forward.counts.total() == 541
    # MiniMind's 957 were counted on a GPU; autograd's casts differ by a few.
    assert abs(backward.counts.total() - 957) <= 0.02 * 957


def test_its_numbers_are_our_models():
    for preset in ("minimind2-small", "minimind3"):
        ours = mm.MiniMind(mm.ModelConfig.preset(preset, num_hidden_layers=2)).eval()
        ids = torch.randint(3, 6400, (2, 9), generator=torch.Generator().manual_seed(0))
        with mm.ops.use("none"), torch.no_grad():
            torch.testing.assert_close(eager.EagerMiniMind.from_ours(ours)(ids), ours(ids).logits, atol=1e-4, rtol=0)
