"""A broken promise: raised at once on a CPU, read from the device's flag elsewhere."""

import pytest
import torch

from minimind_fast import ops
from minimind_fast.ops import promises


def test_on_a_cpu_it_is_raised_at_once():
    promises.note_promise(torch.tensor(False))
    with pytest.raises(ops.BrokenPromise, match="leave grad_weights out"):
        promises.note_promise(torch.tensor(True))
    ops.check_promises()


def test_a_flag_is_told_once(monkeypatch):
    """A CPU tensor stands in for a GPU's flag."""
    flag = torch.tensor(False)
    monkeypatch.setattr(promises, "_flags", {torch.device("cuda", 0): flag})
    ops.check_promises()
    flag.logical_or_(torch.tensor(True))
    with pytest.raises(ops.BrokenPromise):
        ops.check_promises()
    assert not flag
    ops.check_promises()


@pytest.mark.gpu
def test_on_a_gpu_it_waits_for_the_check():
    device = torch.device("cuda", torch.cuda.current_device())
    promises.prepare(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        promises.note_promise(torch.full((), True, device=device))
        promises.note_promise(torch.full((), False, device=device))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(ops.BrokenPromise):
        ops.check_promises()
    ops.check_promises()


def test_a_loss_of_ones_own_that_breaks_the_promise_is_told_through_the_model():
    import minimind_fast as mm

    sizes = dict(num_hidden_layers=1, hidden_size=64, vocab_size=64, max_position_embeddings=32)
    model = mm.MiniMind(mm.ModelConfig.preset("minimind3", **sizes))
    ids = torch.arange(9)
    weights = torch.full((8,), 1 / 8)

    def logprobs():
        cu = torch.tensor([0, 8], dtype=torch.int32)
        return model(ids[:-1], targets=ids[1:], cu_seqlens=cu, grad_weights=weights).logprobs

    (-(logprobs() * weights).sum()).backward()
    out = logprobs()
    with pytest.raises(ops.BrokenPromise, match="leave grad_weights out"):
        (-(out * weights).sum() + 0.01 * (out**2).sum()).backward()
