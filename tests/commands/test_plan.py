"""The planner's numbers against what a process really takes, against arithmetic anybody can do, and against itself."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from halves import HALF

from minimind_fast.cli import main as cli
from minimind_fast.commands import plan
from minimind_fast.config import ModelConfig
from minimind_fast.proof.cards import CARDS, Card
from minimind_fast.proof.memory import ITEM_BYTES, MicroBatch, held, micro_batch, peak_bytes
from minimind_fast.proof.roofline import op_work, shape_of, step_work

# A process that trains under the product's engine and tells its peak, in bytes beyond what it had before the model.
# Freed memory goes back at once (MALLOC_MMAP_THRESHOLD_), so that resident is what lives.
MEASURE = """
import ctypes, gc, json, sys
import torch
from minimind_fast.config import ModelConfig
from minimind_fast.data.packing import Batch
from minimind_fast.model import MiniMind
from minimind_fast.training import ranks, setup
from minimind_fast.training.config import TrainConfig
from minimind_fast.training.zero.engine import Engine
from minimind_fast.training.zero.options import deepspeed_config

ranks.keep_freed_memory = lambda: None
ranks.prepare(1)

def resident(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

def peak(preset, changes, zero_stage, dtype, tokens, document):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    config = TrainConfig(zero_stage=zero_stage, dtype=dtype, accumulation_steps=1, batch_size=1)
    model = MiniMind(ModelConfig.preset(preset, **changes))
    engine = Engine(model, config, deepspeed_config(config, 1))
    ids = torch.randint(0, model.config.vocab_size, (tokens,))
    cu = torch.arange(0, tokens + 1, document, dtype=torch.int32)
    for _ in range(2):  # the first makes the optimizer's state
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")
        out = setup.next_token_loss(engine, Batch(ids, ids, cu, document, tokens, tokens // document))
        loss = out.total / tokens
        engine.backward(loss if out.aux is None else loss + out.aux)
        del out, loss
        engine.step(1e-4)
    found = resident("VmHWM") - before
    engine._ds.destroy()
    return found

tiny = {"num_hidden_layers": 1, "vocab_size": 256}
for zero_stage, dtype in ((1, "bfloat16"), (0, "float32")):  # code and workspaces that the first step loads
    peak("tiny", tiny, zero_stage, dtype, 64, 32)
print(json.dumps([peak(*case) for case in json.loads(sys.argv[1])]))
"""
CUT = {"num_hidden_layers": 3, "vocab_size": 3200}
CASES = [
    # The parameters' part rules, the batch's part rules, plain float32, everything partitioned.
    ("minimind2-small", {}, 1, HALF, 128, 64),
    ("minimind2-small", CUT, 1, HALF, 2048, 256),
    ("minimind3", CUT, 0, "float32", 1024, 128),
    ("minimind2-small", {}, 3, HALF, 128, 64),
]


def test_predicted_memory_is_within_15_percent_of_a_process_that_trains():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc to read a process's peak")
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    run = [sys.executable, "-W", "ignore", "-c", MEASURE, json.dumps(CASES)]
    done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    measured = json.loads(done.stdout.strip().splitlines()[-1])
    for (preset, changes, stage, dtype, tokens, document), found in zip(CASES, measured, strict=True):
        config = ModelConfig.preset(preset, **changes)
        need = micro_batch(config, tokens, document, dtype, kernels=False)
        predicted = peak_bytes(need, stage, dtype, 1)
        assert abs(predicted / found - 1) < 0.15, (preset, stage, dtype, tokens, predicted / 1e6, found / 1e6)


def test_the_batch_part_grows_with_tokens_and_falls_with_checkpointing():
    config = ModelConfig.preset("minimind3", num_hidden_layers=4)
    sizes = [micro_batch(config, tokens, 256, kernels=True).saved_bytes for tokens in (2048, 4096, 6144)]
    assert sizes[2] - sizes[1] == pytest.approx(
        sizes[1] - sizes[0], rel=0.001
    )  # what is left is the head's own gradient
    assert sizes[0] > 0.8 * (sizes[1] - sizes[0])
    large = micro_batch(config, 4096, 256, kernels=True)
    again = micro_batch(config, 4096, 256, kernels=True, gradient_checkpointing=True)
    assert again.saved_bytes < 0.25 * large.saved_bytes and again.peak_bytes < large.peak_bytes


@pytest.mark.parametrize("preset", ["minimind2-moe", "minimind3-moe"])
def test_a_mixture_is_counted_on_both_paths(preset):
    config = ModelConfig.preset(preset, num_hidden_layers=2)
    gpu, cpu = (micro_batch(config, 512, 128, kernels=kernels) for kernels in (True, False))
    assert gpu.parameters == cpu.parameters == shape_of(config).num_parameters()
    assert 0 < gpu.saved_bytes < cpu.saved_bytes


def test_what_cannot_be_packed_is_refused():
    config = ModelConfig.preset("tiny")
    with pytest.raises(ValueError, match="no whole number of documents of 300"):
        micro_batch(config, 1000, 300)
    with pytest.raises(ValueError, match="exceeds 32768 positions"):
        micro_batch(config, 65536, 65536)


def test_zero_stages_partition_what_they_say():
    for dtype in ITEM_BYTES:
        for stage in range(4):
            one, many = held(stage, dtype, 1), held(stage, dtype, 64)
            assert (many.optimizer < one.optimizer / 32) == (stage > 0)
            assert (many.weights < one.weights / 32) == (stage == 3)
    assert held(1, "bfloat16", 1).resident == 18  # weights 2, fp32 sums 4, master 4, two moments 8
    need = MicroBatch(saved_bytes=0, peak_bytes=10**6, buffer_bytes=0, parameters=10**6)
    assert peak_bytes(need, 0, "float32", 8) == 20 * 10**6


def test_floors_are_those_that_anybody_can_work_out():
    c = ModelConfig.preset("minimind3")
    assert op_work("rms_norm", c, "forward", 65536, 2).bytes == 65536 * 4 * 768 * 2
    assert op_work("swiglu", c, "both", 65536, 2).bytes == 65536 * 8 * 2432 * 2
    assert op_work("linear_cross_entropy", c, "both", 100, 2).flops == 6 * 100 * 768 * 6400
    with pytest.raises(ValueError, match="unknown op 'swish'"):
        op_work("swish", c, "forward", 1, 2)
    work = step_work(c, 65536, 512)
    pairs = 65536 * 513 // 2
    assert sum(w.flops for w in work.values()) == shape_of(c).flops(65536, pairs)
    assert set(step_work(ModelConfig.preset("minimind3-moe"), 512, 64)) - set(work) == {"routing"}


def test_rooflines_of_an_h200_are_near_those_worked_out_by_hand():
    """Within 10% of an independent count, in million tokens/s: the exact byte counts of the two differ a little."""
    by_hand = {"minimind3": 1.46, "minimind2-small": 3.14, "minimind2-moe": 1.01, "minimind3-moe": 1.42}
    for preset, millions in by_hand.items():
        run = plan.Run(ModelConfig.preset(preset), CARDS["H200"], tokens=65536, document=400)
        assert 65536 / sum(plan.compute_seconds(run).values()) / 1e6 == pytest.approx(millions, rel=0.1)


def test_exchange_is_a_rings():
    n = 10**6
    assert plan.exchanged_bytes(n, 0, "float32", 1, 1) == 0
    assert plan.exchanged_bytes(n, 0, "float32", 4, 8) == 2 * 3 / 4 * 4 * n  # once a step, however many micro-batches
    assert plan.exchanged_bytes(n, 3, "bfloat16", 2, 5) == 0.5 * 3 * 2 * n * 5
    card = Card("x", 80, 1e12, 1e14, 100e9, "")
    run = plan.Run(ModelConfig.preset("tiny"), card, gpus=8, network_bytes_per_s=10e9)
    inside, outside = (plan.exchange_seconds(r, n, 1) for r in (run, plan.replace(run, gpus=16)))
    assert outside > 9 * inside > 0


def test_a_committed_measurement_moves_the_times(tmp_path):
    run = plan.Run(ModelConfig.preset("tiny"), CARDS["H200"], tokens=256, document=64)
    need = MicroBatch(1, 1, 0, shape_of(run.config).num_parameters())
    assert plan.measured(tmp_path, "H200") == {}
    info = {"kind": "model step", "implementation": "ours", "device": "NVIDIA H200", "preset": "tiny"}
    rows = [{"extra_info": {**info, "share_of_roof": 0.5}}, {"extra_info": {**info, "implementation": "eager"}}]
    (tmp_path / "nvidia_h200.json").write_text(json.dumps({"benchmarks": rows}))
    shares = plan.measured(tmp_path, "H200")
    assert shares == {"tiny": 0.5} and plan.measured(tmp_path, "A100") == {}
    before, after = (plan.make(run, need, 1, s, "tiny") for s in ({}, shares))
    assert after["step_s"] == pytest.approx(2 * before["step_s"])


def test_the_committed_cpu_result_is_used():
    assert 0.1 < plan.measured(plan.RESULTS, "CPU")["minimind2-small"] < 1.5


def test_the_command_prints_what_it_was_asked(tmp_path, capsys):
    file = tmp_path / "plan.json"
    argv = ["plan", "--preset", "tiny", "--card", "A100", "--gpus", "16", "--corpus_tokens", "1e9", "--price", "2"]
    assert cli([*argv, "--batch_size", "4", "--json", str(file), "--results", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for words in ("16 x A100", "ZeRO", "No measurement on A100", "<- planned", "The corpus"):
        assert words in text
    data = json.loads(file.read_text())
    assert data["parameters"] == shape_of(ModelConfig.preset("tiny")).num_parameters()
    assert list(data["scaling"]) == [str(n) for n in plan.SCALES]
    assert cli([*argv[:9], "--corpus", "sft_t2t_mini", "--results", str(tmp_path)]) == 2, "both say a corpus"
    assert cli([*argv[:7], "--corpus", "sft_t2t_mini", "--results", str(tmp_path)]) == 0
    assert "The corpus: 432,432,432 tokens x 1 epochs" in capsys.readouterr().out  # 1.6 GB of 3.7 bytes
    for wrong, said in (
        (["--gpus", "0"], "at least 1"),
        (["--corpus", "sft"], "no such data set .* there are pretrain_t2t_mini"),
    ):
        assert cli(["plan", "--preset", "tiny", *wrong]) == 2
        assert re.search(said, capsys.readouterr().err)


def test_what_does_not_fit_is_said(capsys, tmp_path):
    argv = ["--preset", "tiny", "--card", "RTX 3090", "--batch_size", "32768", "--max_seq_len", "512"]
    assert plan.main([*argv, "--results", str(tmp_path)]) == 0
    assert "does not fit 24 GiB" in capsys.readouterr().out
