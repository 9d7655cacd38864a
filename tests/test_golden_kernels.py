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
def case(request):
    folder = test_golden.GOLDEN / request.param
    golden = test_golden.load_file(folder / "golden.safetensors")
    golden = {name: tensor.to(kernel_helpers.DEVICE) for name, tensor in golden.items()}
    targets = golden["labels"].roll(-1, 1)
    targets[:, -1] = mm.IGNORE_INDEX
    with mm.ops.use("all"):
        assert all(said.startswith("kernel") for said in ops.describe(kernel_helpers.DEVICE).values())
        yield mm.load_pretrained(folder, device=kernel_helpers.DEVICE), golden, targets
