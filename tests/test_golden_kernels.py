"""MiniMind's own answers with every Triton kernel on (float32): the tests of test_golden.py, at the same tolerances."""

# isort: off
import kernel_helpers  # before anything imports triton: it chooses the interpreter where there is no GPU

import pytest
import test_golden
from test_golden import test_logits_and_label_logprobs, test_loss_and_every_gradient  # noqa: F401

import minimind_fast as mm
from minimind_fast import ops
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
