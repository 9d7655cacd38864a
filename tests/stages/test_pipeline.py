"""The whole chain: each stage starts from an earlier one's output, and the table agrees with the logs."""

import importlib.util
import json
import shlex
import sys

import pytest
from launching import ROOT, run

spec = importlib.util.spec_from_file_location("pipeline", ROOT / "train" / "pipeline.py")
assert spec is not None and spec.loader is not None
pipeline = importlib.util.module_from_spec(spec)
sys.modules["pipeline"] = pipeline
spec.loader.exec_module(pipeline)


# Each stage starts as a fork, with the command that the pipeline made for it.
FORKED = "import subprocess, torch, forking; subprocess.run = forking.run; torch.set_num_threads(1)"


def value(command, option):
    return command[command.index(option) + 1]


def test_each_stage_begins_with_a_run_that_was_made_before_and_none_is_forgotten():
    args = pipeline.parse_args([])
    made = {"none"}
    for stage in pipeline.STAGES:
        command = pipeline.stage_command(args, stage)
        assert value(command, "--from_weight") in made
        assert stage.name != "distill" or value(command, "--teacher_path") in made
        made.add(stage.name)
    scripts = {path.stem for path in (ROOT / "train").glob("*.py")}
    assert made - {"none"} == scripts - {"__init__", "tokenizer", "pipeline"}
    assert sum(stage.share for stage in pipeline.STAGES) == pytest.approx(1)


def test_files_time_and_options_reach_their_stage():
    words = [
        "--minutes",
        "10",
        "--data_path",
        "a b.jsonl",
        "c.jsonl",
        "--sft_data_path",
        "s.jsonl",
        "--args",
        "--seed 3",
    ]
    words += ["--dpo_args", "--beta 0.2 --seed 4", "--dpo_val_data_path", "v.jsonl", "--max_steps", "7"]
    args = pipeline.parse_args(words)
    commands = {stage.name: pipeline.stage_command(args, stage) for stage in pipeline.STAGES}
    tokenizer = pipeline.tokenizer_command(args)
    assert tokenizer[2:5] == ["--data_path", "a b.jsonl", "c.jsonl"] and "--vocab_size" not in tokenizer
    assert commands["pretrain"][commands["pretrain"].index("--data_path") + 1 :][:2] == ["a b.jsonl", "c.jsonl"]
    assert (
        "--val_data_path" not in commands["pretrain"]
    )  # the sample's validation data would say nothing about these files
    assert value(commands["sft"], "--data_path") == "s.jsonl" and "--val_data_path" not in commands["sft"]
    # A stage without its own files keeps the sample and the script's defaults for it.
    assert "--data_path" not in commands["dpo"] and value(commands["dpo"], "--val_data_path") == "v.jsonl"
    assert value(commands["reason"], "--val_data_path").endswith("reason_val.jsonl")
    assert commands["dpo"][-4:] == ["--beta", "0.2", "--seed", "4"]  # last, to take precedence
    minutes = [float(value(command, "--max_minutes")) for command in commands.values()]
    assert sum(minutes) == pytest.approx(10, rel=0.01) and {value(c, "--max_steps") for c in commands.values()} == {"7"}
    deepspeed = commands["lora"]
    assert deepspeed[1:3] == ["-m", "deepspeed.launcher.runner"]


def test_the_table_shows_first_and_last_of_the_best_measure(tmp_path):
    log = tmp_path / "log.jsonl"
    rows = [
        {"step": 0, "val_loss": 5.0},
        {"step": 1, "loss": 4.0},
        {"step": 2, "loss": 3.0},
        {"step": 2, "val_loss": 2.5},
    ]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert pipeline.change(log, pipeline.LOSSES) == ("validation loss", 5.0, 2.5)
    log.write_text("".join(json.dumps(row) + "\n" for row in rows if "loss" in row))
    assert pipeline.change(log, pipeline.LOSSES) == ("training loss", 4.0, 3.0)
    with pytest.raises(ValueError, match="has none of reward"):
        pipeline.change(log, {"reward": "reward"})
    head, rule, line = pipeline.table([("sft", "pretrain", "validation loss", 5.0, 2.5, 65.0)]).splitlines()
    assert line.split() == ["sft", "pretrain", "validation", "loss", "5.000", "2.500", "1m05s"]
    assert len(head) == len(rule) == len(line)  # aligned


def test_a_stage_that_fails_ends_the_pipeline_with_its_name(tmp_path):
    args = ["--launcher", "python", "--data_path", tmp_path / "nothing.jsonl", "--save_dir", tmp_path]
    said = run("pipeline.py", args, expect=1, fresh=True)
    assert "the stage tokenizer ended with exit code 1" in said
    assert "Traceback" not in said and "=== pretrain" not in said


def test_the_whole_chain_with_two_steps_a_stage(tmp_path):
    common = "--num_threads 1 --sample_tokens 0 --log_interval 1 --max_seq_len 64 --batch_size 4"
    shape = "--hidden_size 64 --num_hidden_layers 2 --accumulation_steps 1"
    args = ["--launcher", "python", "--save_dir", tmp_path, "--max_steps", 2]
    args += [f"--args={common} --cache_dir {shlex.quote(str(tmp_path))}", f"--pretrain_args={shape}"]
    args += ["--grpo_args=--num_generations 2 --max_gen_len 4", "--tokenizer_args=--vocab_size 700"]
    said = run("pipeline.py", args, before=FORKED)
    table = said.split("stage     begins with")[1].splitlines()
    named = [line.split()[0] for line in table[2 : 2 + len(pipeline.STAGES)]]
    assert named == [stage.name for stage in pipeline.STAGES]
    for stage in pipeline.STAGES:
        rows = [json.loads(line) for line in (tmp_path / stage.name / "log.jsonl").read_text().splitlines()]
        assert rows[-1]["step"] == 2 and (tmp_path / stage.name / "weights" / "tokenizer.json").is_file()
    assert "asked:\n  What is 2 + 3? →" in said and "sums never shown, right" in said
