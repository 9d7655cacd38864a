"""A frozen copy: it answers as its source did, and learns nothing."""

import pytest
import torch

import minimind_fast as mm
from minimind_fast.weights.frozen import frozen


@pytest.mark.parametrize("from_disk", [False, True])
def test_a_frozen_model_is_its_own(tmp_path, from_disk):
    torch.manual_seed(0)
    model = mm.MiniMind(mm.ModelConfig.preset("tiny")).train()
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        want = model.eval()(ids).logits
    model.train()
    if from_disk:
        mm.save_pretrained(model, tmp_path / "weights", dtype=torch.float32)
    copy = frozen(tmp_path / "weights" if from_disk else model, "cpu", torch.float32)
    assert not copy.training and not any(p.requires_grad for p in copy.parameters())
    assert model.training and all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
        assert torch.equal(copy(ids).logits, want)
    assert copy.lm_head.weight is copy.model.embed_tokens.weight


def test_its_precision_is_the_callers():
    copy = frozen(mm.MiniMind(mm.ModelConfig.preset("tiny")), dtype=torch.bfloat16)
    assert {p.dtype for p in copy.parameters()} == {torch.bfloat16}
