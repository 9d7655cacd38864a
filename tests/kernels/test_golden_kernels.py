"""MiniMind's reference outputs with every Triton kernel on (float32): test_golden.py's tests, at the same tolerances."""

# isort: off
import kernel_helpers  # before triton is imported: chooses the interpreter if there is no GPU

import copy

import pytest
import test_golden
from stand_ins import Engine
from test_golden import test_logits_and_label_logprobs, test_loss_and_every_gradient  # noqa: F401

import minimind_fast as mm
from minimind_fast import ops
from minimind_fast.training import setup as stage
from minimind_fast.data.packing import Batch
# isort: on

assert kernel_helpers.DTYPES


@pytest.fixture(params=test_golden.CASES)
def case(request, monkeypatch):
    folder = test_golden.GOLDEN / request.param
    golden = test_golden.load_file(folder / "golden.safetensors")
    golden = {name: tensor.to(kernel_helpers.DEVICE) for name, tensor in golden.items()}
    targets = golden["labels"].roll(-1, 1)
    targets[:, -1] = mm.IGNORE_INDEX
    asked, kernel = set(), ops.kernel
    monkeypatch.setattr(ops, "kernel", lambda name: asked.add(name) or kernel(name))
    with mm.ops.use("all"):
        yield mm.load_pretrained(folder, device=kernel_helpers.DEVICE), golden, targets
    own = {"moe_route", "moe_mlp"} if "moe" in request.param else {"swiglu"}
    assert asked >= {"rms_norm", "rope", "linear_cross_entropy"} | own


@pytest.mark.parametrize("case", ["minimind2_dense", "minimind3_moe"], indirect=True)
def test_the_pretraining_loss_computes_its_gradients_in_the_forward(case, monkeypatch):
    """The stages' loss promises the head its token weights; the gradients equal those without the promise."""
    model, golden, targets = case
    head = ops.kernel("linear_cross_entropy")
    promised = []
    monkeypatch.setattr(ops, "kernel", lambda name, k=ops.kernel: spy if name == "linear_cross_entropy" else k(name))

    def spy(*args):
        promised.append(args[5] is not None)
        return head(*args)

    model.train()
    batch = Batch(golden["input_ids"], targets, None, targets.shape[1], int((targets != mm.IGNORE_INDEX).sum()), 3)
    out = stage.next_token_loss(Engine(model), batch)
    mean = out.total / batch.num_targets
    mean.backward()
    assert promised == [True]
    # Without the balancing loss on both sides: only the head's gradient is tested.
    with ops.use("none"):
        twin = copy.deepcopy(model)
        twin.zero_grad()
        plain = twin(golden["input_ids"], targets=targets)
        (-plain.logprobs.sum() / batch.num_targets).backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        if name.endswith("gate.weight") and not model.config.router_gets_lm_gradient:
            assert a.grad.norm() < 1e-6 and b.grad.norm() < 1e-6, name  # only rounding, on both sides
            continue
        assert (a.grad - b.grad).norm() <= 1e-4 * b.grad.norm() + 1e-9, name
