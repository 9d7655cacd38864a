"""The real training command, in real processes: resume after kill -9, ranks, ZeRO stages, bad input, signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from halves import HALF
from launching import ROOT, TINY, finish, free_port, hears, held_at, read_log, run, start, wait_for_step, write_corpus

import minimind_fast as mm
from minimind_fast.data.bpe import train_bpe
from minimind_fast.training.resume import checkpoints


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    data, val = write_corpus(folder / "train.jsonl", 400), write_corpus(folder / "val.jsonl", 20, seed=1)
    train_bpe((line for line in data.read_text(encoding="utf-8").splitlines()), 340).save(folder / "tokenizer")
    return ["--data_path", data, "--val_data_path", val, "--tokenizer_path", folder / "tokenizer"]


def losses(folder, first=1):
    return {step: row["loss"] for step, row in read_log(folder).items() if "loss" in row and step >= first}


# (ZeRO stage, ranks, dtype, optimizer); with Muon, AdamW has its part of the weights
RESUME = [(0, 1, "float32", "adamw"), (1, 1, HALF, "adamw"), (2, 2, HALF, "muon"), (3, 2, "float32", "muon")]
RESUME += [(0, 2, HALF, "adamw"), pytest.param(1, 2, HALF, "muon", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("stage", "ranks", "dtype", "optimizer"), RESUME)
def test_kill_9_and_resume_is_bitwise(corpus, tmp_path, stage, ranks, dtype, optimizer):
    args = [*TINY, *corpus, "--zero_stage", stage, "--dtype", dtype, "--accumulation_steps", 2, "--dropout", 0.1]
    args += ["--optimizer", optimizer, "--max_steps", 7, "--save_interval", 2, "--keep_checkpoints", 9]
    run("pretrain.py", [*args, "--save_dir", tmp_path / "whole"], ranks)
    whole = losses(tmp_path / "whole" / "pretrain")
    assert len(whole) == 7

    folder = tmp_path / "killed" / "pretrain"
    never = held_at(5, tmp_path / "never")
    processes = start("pretrain.py", [*args, "--save_dir", tmp_path / "killed"], ranks, before=never)
    wait_for_step(folder, 5, processes)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    finish(processes, expect=-signal.SIGKILL)
    saved = checkpoints(folder / "checkpoints")
    assert saved, "no checkpoint before the kill"
    # Step 5 was logged, so step 4's checkpoint is complete; resuming from step 2 covers more steps.
    out = run("pretrain.py", [*args, "--save_dir", tmp_path / "killed", "--from_resume"], ranks)
    assert "Going on from step" in out
    assert losses(folder) == whole


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_other_number_of_ranks_goes_on(corpus, tmp_path, stage):
    args = [
        *TINY,
        *corpus,
        "--zero_stage",
        stage,
        "--accumulation_steps",
        1,
        "--save_interval",
        3,
        "--save_dir",
        tmp_path,
    ]
    run("pretrain.py", [*args, "--max_steps", 3], ranks=2)
    before = mm.load_pretrained(tmp_path / "pretrain" / "weights")
    tokens = read_log(tmp_path / "pretrain")[3]["useful_tokens"]
    run("pretrain.py", [*args, "--max_steps", 5, "--from_resume", "--learning_rate", 1e-12], ranks=1)
    after = mm.load_pretrained(tmp_path / "pretrain" / "weights")
    for (name, a), b in zip(before.state_dict().items(), after.state_dict().values(), strict=True):
        # A lost master or optimizer state would show on the scale of a weight, 0.02, or a step, 5e-4.
        torch.testing.assert_close(a, b, atol=1e-7, rtol=0, msg=f"{name} moved although the learning rate is 1e-12")
    assert read_log(tmp_path / "pretrain")[5]["useful_tokens"] > tokens
    if stage == 0:
        other = "float32" if before.lm_head.weight.dtype == torch.bfloat16 else "bfloat16"
        out = run("pretrain.py", [*args, "--from_resume", "--dtype", other], ranks=1, expect=1)
        assert "was written with --dtype" in out and f"this run has {other}" in out


def test_ranks_and_zero_stages_agree_in_fp32(corpus, tmp_path):
    """The same global batch gives the same losses, however distributed."""
    args = [*TINY, *corpus, "--dtype", "float32", "--max_steps", 3, "--batch_size", 2]
    want = None
    for stage, ranks, accumulation in ((0, 1, 4), (1, 2, 2), (2, 2, 2), (3, 2, 2)):
        folder = tmp_path / f"{stage}-{ranks}"
        run(
            "pretrain.py",
            [*args, "--zero_stage", stage, "--accumulation_steps", accumulation, "--save_dir", folder],
            ranks,
        )
        got = losses(folder / "pretrain")
        want = want or got
        assert got == pytest.approx(want, abs=1e-5), f"ZeRO {stage}, {ranks} ranks"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_no_token_is_lost(corpus, tmp_path, number):
    args = [*TINY, *corpus, "--accumulation_steps", 1, "--max_steps", 5]
    run("pretrain.py", [*args, "--save_dir", tmp_path / "whole"])
    args += ["--save_dir", tmp_path]
    processes = start("pretrain.py", args, before=hears(number) + held_at(2, tmp_path / "go"))
    wait_for_step(tmp_path / "pretrain", 2, processes)
    processes[0].send_signal(number)
    (tmp_path / "go").touch()
    assert "as asked" in finish(processes)
    assert len(checkpoints(tmp_path / "pretrain" / "checkpoints")) == 1
    assert mm.load_pretrained(tmp_path / "pretrain" / "weights").num_parameters() > 0
    run("pretrain.py", [*args, "--from_resume"])
    assert losses(tmp_path / "pretrain") == losses(tmp_path / "whole" / "pretrain")


def test_kill_during_a_save_leaves_the_older_checkpoint(corpus, tmp_path):
    args = [*TINY, *corpus, "--accumulation_steps", 1, "--save_dir", tmp_path, "--save_interval", 2, "--max_steps", 400]
    processes = start("pretrain.py", args)
    folder = tmp_path / "pretrain" / "checkpoints"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and processes[0].poll() is None:
        if checkpoints(folder) and any(folder.glob(".new-*")):  # a second save has begun
            break
    os.kill(processes[0].pid, signal.SIGKILL)
    finish(processes, expect=-signal.SIGKILL)
    assert list(folder.glob(".new-*")), "the kill came too late to prove anything"
    kept = checkpoints(folder)
    out = run("pretrain.py", [*args[:-1], 1 + int(kept[-1].name.removeprefix("step_")), "--from_resume"])
    assert f"Going on from step {int(kept[-1].name.removeprefix('step_'))} " in out


def test_a_loss_that_is_not_finite_is_skipped_then_stops_the_run(corpus, tmp_path):
    for dtype in sorted({"float32", HALF}):
        args = [*TINY, *corpus, "--save_dir", tmp_path / dtype, "--learning_rate", 1e30, "--grad_clip", 0]
        out = run("pretrain.py", [*args, "--dtype", dtype, "--max_nonfinite_steps", 3, "--max_steps", 50], expect=1)
        assert "the step was skipped (1 in a row)" in out
        assert "3 steps in a row" in out and "--learning_rate" in out and "Traceback" not in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 3"),
        ('{"txt": "x"}', "line 3"),
        ('{"text": 5}', "line 3"),
    ],
)
def test_bad_lines_stop_before_training(corpus, tmp_path, line, message):
    data = write_corpus(tmp_path / "bad.jsonl", 5)
    rows = data.read_text(encoding="utf-8").splitlines()
    rows[2] = line
    data.write_text("\n".join(rows), encoding="utf-8")
    out = run("pretrain.py", [*TINY, *corpus, "--data_path", data, "--save_dir", tmp_path], expect=1)
    assert message in out and "bad.jsonl" in out and "Traceback" not in out
    assert not (tmp_path / "pretrain").exists()


def test_no_packing_is_minimind_padded_batches(corpus, tmp_path):
    run("pretrain.py", [*TINY, *corpus, "--no_packing", "--save_dir", tmp_path, "--max_steps", 2])
    assert len(losses(tmp_path / "pretrain")) == 2


def test_moe_trains_and_logs_its_load(corpus, tmp_path):
    run("pretrain.py", [*TINY, *corpus, "--preset", "minimind3-moe", "--save_dir", tmp_path, "--max_steps", 2])
    row = read_log(tmp_path / "pretrain")[2]
    assert row["aux_loss"] > 0 and row["router_entropy"] > 0 and len(row["expert_load"]) == 2


def test_a_full_disk_leaves_the_older_checkpoint(corpus, tmp_path):
    args = [*TINY, *corpus, "--accumulation_steps", 1, "--save_dir", tmp_path]
    run("pretrain.py", [*args, "--max_steps", 2])
    folder = tmp_path / "pretrain" / "checkpoints"
    before = {p: p.stat().st_size for p in folder.rglob("*")}
    full = start("pretrain.py", [*args, "--max_steps", 4, "--from_resume"], file_limit_bytes=300_000)
    out = finish(full, expect=1)
    assert "could not be written" in out and "older checkpoints are untouched" in out and "Traceback" not in out
    assert {p: p.stat().st_size for p in checkpoints(folder)[-1].rglob("*")} == {
        p: size for p, size in before.items() if p.parent.name.startswith("step_")
    }
    assert "Going on from step 2" in run("pretrain.py", [*args, "--max_steps", 3, "--from_resume"])


def test_only_the_wanted_number_of_checkpoints_is_kept(corpus, tmp_path):
    args = [*TINY, *corpus, "--accumulation_steps", 1, "--save_dir", tmp_path]
    run("pretrain.py", [*args, "--max_steps", 5, "--save_interval", 1, "--keep_checkpoints", 2])
    names = [p.name for p in checkpoints(tmp_path / "pretrain" / "checkpoints")]
    assert names == ["step_00000004", "step_00000005"]


def test_weights_of_one_stage_start_the_next_and_another_tokenizer_is_refused(corpus, tmp_path):
    run("pretrain.py", [*TINY, *corpus, "--save_dir", tmp_path, "--max_steps", 1])
    weights = tmp_path / "pretrain"
    again = [*TINY, *corpus[:4], "--from_weight", weights, "--save_dir", tmp_path / "next", "--max_steps", 1]
    first = losses(weights)[1]
    run("pretrain.py", again)
    assert losses(tmp_path / "next" / "pretrain")[1] < first - 0.01, "the weights were not taken over"
    other = train_bpe(["some other words than those, by far and wide"] * 40, 300)
    other.save(tmp_path / "other")
    out = run("pretrain.py", [*again, "--tokenizer_path", tmp_path / "other"], expect=1)
    assert "was trained with tokenizer" in out and "Traceback" not in out


def test_an_older_run_is_moved_aside(corpus, tmp_path):
    args = [*TINY, *corpus, "--save_dir", tmp_path, "--max_steps", 1]
    run("pretrain.py", args)
    assert "moved" in run("pretrain.py", args)
    assert (tmp_path / "pretrain.old1" / "weights" / "config.json").exists()


@pytest.mark.parametrize("launcher", ["deepspeed", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_two_ranks_under_the_launchers(corpus, tmp_path, launcher):
    command = {
        "deepspeed": ["deepspeed", "-q", "--num_gpus", "2", "--master_port", str(free_port())],
        "torchrun": ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port())],
    }[launcher]
    folder = Path(sys.executable).parent
    args = [str(a) for a in [*TINY, *corpus, "--save_dir", tmp_path, "--max_steps", 2]]
    done = subprocess.run(
        [str(folder / command[0]), *command[1:], str(ROOT / "train" / "pretrain.py"), *args],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 2 x CPU" in done.stdout
    assert len(losses(tmp_path / "pretrain")) == 2


def test_defaults_train_on_the_shipped_sample(tmp_path):
    args = ["--save_dir", tmp_path, "--max_steps", 3, "--log_interval", 1, "--sample_tokens", 5]
    out = run("pretrain.py", [*args, "--batch_size", 2, "--num_threads", 1], fresh=True)
    for words in ("tiny: 5.0M parameters", "Validation loss", "The model continues", "weights", "Next: "):
        assert words in out
