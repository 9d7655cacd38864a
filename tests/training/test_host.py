"""What a training step asks of the host on a GPU, counted without one: kernels' launches do nothing, all else runs."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from launching import run
from stand_ins import UNORDERED

from minimind_fast.errors import TrainingStopped
from minimind_fast.training.config import TrainConfig
from minimind_fast.training.log import Window
from minimind_fast.training.trainer import Trainer

# In its own process, because it becomes a rank and takes Triton's launches over: for each model, the last of three steps of
# two micro-batches, its operators counted by name, and the tensors that are copied to the device.
STEP = """
import json, tempfile
from collections import Counter
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.jit import JITFunction
from minimind_fast import ops
from minimind_fast.data import samples
from minimind_fast.data.batches import Batch
from minimind_fast.config import ModelConfig
from minimind_fast.model import MiniMind
from minimind_fast.training import ranks, setup
from minimind_fast.training.config import TrainConfig
from minimind_fast.training.log import Window
from minimind_fast.training.run import Stage

JITFunction.run = lambda self, *args, grid, warmup, **options: None
ops._interpreting = lambda: True

class Count(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        counts[function.overloadpacket.__name__] += 1
        if function.overloadpacket.__name__ == "note_promise":  # raises on a CPU; what a launch left is no gradient
            return None
        return function(*args, **(kwargs or {}))

class Data:
    needs_model = True
    def state_dict(self): return {"epoch": 0}
    def num_left(self, *_): return 3
    num_batches = num_left

to = Batch.to
def counted_to(self, *args, **options):
    counts["tensors copied"] += sum(isinstance(x, torch.Tensor) for x in vars(self).values())
    return to(self, *args, **options)
Batch.to = counted_to

add_work = Window.add_work
def uncounted(self, batch):
    with _disable_current_modes():  # the batch is still on the host
        add_work(self, batch)
Window.add_work = uncounted

for preset in ("minimind3", "minimind2-moe"):
    config = TrainConfig(preset=preset, dtype="bfloat16", zero_stage=1, batch_size=1, max_seq_len=32, kernels="all",
        attention="eager", accumulation_steps=2, save_dir=tempfile.mkdtemp(), num_threads=1, deterministic=True)
    run = setup.begin(config, Stage("host"))
    shape = dict(hidden_size=64, num_hidden_layers=2, vocab_size=256, intermediate_size=64, moe_intermediate_size=64)
    model = MiniMind(ModelConfig.preset(preset, **shape))
    trainer = setup.make_trainer(run, model, None, lambda _: Data(), setup.next_token_loss)
    ids = torch.arange(32)
    batch = Batch(ids, ids, torch.tensor([0, 10, 32], dtype=torch.int32), 22, 32, 2)
    for step in range(3):
        counts = Counter()
        with Count():
            trainer.train_step([batch, batch], 64.0, Window())
    print(json.dumps(counts))
"""


@pytest.fixture(scope="module")
def steps():
    return [json.loads(line) for line in run("-c", [STEP]).splitlines() if line.startswith("{")]


def test_a_step_waits_for_the_gpu_nowhere_and_copies_only_the_batches(steps):
    """Reading a number waits for all that was launched; a tensor made of a Python number is a copy from pageable memory."""
    for counts in steps:
        assert counts["rms_norm_fwd"] >= 4 and counts["_fused_adamw_"] == 2  # the kernels' side was counted
        waits = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique2", "_unique2"}
        assert not {name: n for name, n in counts.items() if name in waits}
        assert "lift_fresh" not in counts
        assert counts["tensors copied"] == 2 * 3


def test_a_step_adds_in_a_fixed_order(steps):
    """All else than kernels and attention, whose own tests see to it."""
    for counts in steps:
        assert counts["embedding_dense_backward"] == 2 and not UNORDERED & set(counts)


@pytest.mark.parametrize("limit, stops", [(3, False), (2, True)])
def test_how_steps_went_is_read_later_in_their_order(limit, stops):
    trainer, window, said = Trainer.__new__(Trainer), Window(), []
    trainer._say, trainer.step, trainer.nonfinite = said.append, 10, 0
    trainer.config, trainer.plan = TrainConfig(max_nonfinite_steps=limit), SimpleNamespace(checkpoints="checkpoints")
    trainer._unread = [torch.tensor(x) for x in (1.0, float("nan"), float("inf"), 2.0, float("nan"), 3.0)]
    with pytest.raises(TrainingStopped, match="2 steps in a row") if stops else nullcontext():
        assert trainer._read_outcomes(window) == 3.0
    assert [words.split(":")[0] for words in said] == ["Step 6", "Step 7", "Step 9"][: 2 if stops else 3]
    assert window.skipped == len(said) and not trainer._unread
    assert stops or trainer.nonfinite == 0
