"""The ladder of levers: a rung is what it is called, joined rows are the packs' own tokens, and the table compares."""

import json

import pytest
import torch
from launching import run

from benchmarks.record import ROOT
from benchmarks.studies import train_step
from minimind_fast.data import samples
from minimind_fast.data.cache import build_cache
from minimind_fast.data.packing import IGNORE_INDEX, PackedBatches
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.training.config import TrainConfig


@pytest.mark.parametrize(("device", "bf16"), [("cpu", True), ("cpu", False), ("gpu", True)])
def test_a_ladder_changes_one_thing_a_rung(device, bf16, monkeypatch):
    monkeypatch.setattr(train_step.precision, "multiplies", lambda *_: bf16)
    ladder = train_step._cpu_ladder() if device == "cpu" else train_step._gpu_ladder()
    keys = [rung.key for rung in ladder]
    assert device == "gpu" or ("bf16" in keys) == bf16
    assert len(set(keys)) == len(keys)
    settings = [field for field in train_step.Rung.__dataclass_fields__ if field not in ("key", "name", "aside")]
    standing = None
    for rung in ladder:
        other = next(r for r in ladder if r.key == rung.aside) if rung.aside else standing
        if other is not None and (rung.key, other.key) != ("packed", "joined"):  # our model in the place of MiniMind's
            changed = [field for field in settings if getattr(rung, field) != getattr(other, field)]
            assert len(changed) == 1, (rung.key, changed)
        standing = standing if rung.aside else rung
    assert {"eager", "joined", "ours"} <= set(keys)
    ours = next(rung for rung in ladder if rung.key == "ours")
    defaults = {field: getattr(train_step.Rung("", ""), field) for field in settings}
    assert {field: getattr(ours, field) for field in settings} == defaults  # what a user gets without any option
    for rung in ladder:
        options = dict(dtype=rung.dtype, kernels=rung.kernels, attention=rung.attention, zero_stage=rung.zero_stage)
        TrainConfig(**options, use_compile=rung.compiled, cuda_graphs=rung.graphs)


def test_joined_rows_are_the_packs_tokens(tmp_path):
    tokenizer = Tokenizer.load(samples.path("tokenizer"))
    cache = build_cache(samples.path("pretrain.jsonl"), tokenizer, cache_dir=str(tmp_path), log=lambda _: None)

    def packs():
        return PackedBatches(cache, batch_tokens=512, max_seq_len=128, seed=1)

    for pack, rows, _ in zip(packs(), train_step.JoinedRows(packs(), 128), range(5), strict=False):
        assert rows.input_ids.shape[1:] == (128,) and len(rows.input_ids) >= 3
        whole = rows.input_ids.numel()
        assert torch.equal(rows.input_ids.flatten(), pack.input_ids[:whole])
        assert torch.equal(rows.targets.flatten(), pack.targets[:whole])
        assert rows.num_targets == (rows.targets != IGNORE_INDEX).sum() > 0.9 * whole


@pytest.mark.slow
def test_three_rungs_are_timed_compared_and_written(tmp_path):
    options = "--preset tiny --pack_tokens 1024 --warm 1 --steps 2 --turns 1 --threads 1 --rungs eager joined ours"
    run("benchmarks.studies.train_step", [*options.split(), "--out", tmp_path], cwd=ROOT)
    found = json.loads((tmp_path / "train_step_cpu.json").read_text())
    eager, joined, ours = found["rungs"]
    assert [rung["key"] for rung in found["rungs"]] == ["eager", "joined", "ours"]
    # The same weights and documents; their order differs, and what a joined row sees of the document before.
    assert eager["loss"] == pytest.approx(ours["loss"], abs=0.3) and joined["loss"] == pytest.approx(
        ours["loss"], abs=0.3
    )
    assert found["times_joined"] == ours["useful_tokens_per_s"] / joined["useful_tokens_per_s"]
    assert "times_compile" not in found and found["flop_per_useful_token"] > 1e7
    lines = (tmp_path / "train_step_cpu.md").read_text().splitlines()
    assert sum(line.startswith("| ") for line in lines) == 4 and f"| {found['times_eager']:.2f}x |" in lines[-3]


def test_what_stands_aside_is_compared_with_what_it_changes():
    rungs = [("eager", "", 100.0), ("ours", "", 400.0), ("compile", "ours", 300.0), ("thread", "ours", 200.0)]
    found = dict(on_gpu=False, threads=2, device="CPU", torch="2", preset="tiny", pack_tokens=9)
    found |= dict(flop_per_useful_token=1e6, peak_flop_per_s=1e9, peak_is="measured")
    found["rungs"] = [
        dict(key=key, name=key, compared_with=other, useful_tokens_per_s=rate, loss=1.0, first_step_s=2.0)
        for key, other, rate in rungs
    ]
    text = train_step.table(found)
    assert "| ours | 400 | 4.00x | 4.00x |" in text
    assert "| compile | 300 | 3.00x | 0.75x |" in text and "| thread | 200 | 2.00x | 0.50x |" in text
    assert "1,000 useful tokens/s, 10.0x the first row" in text
