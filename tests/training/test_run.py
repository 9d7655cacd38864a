"""A run is resolved once: given options stay, chosen ones have a reason, and nothing is assigned afterwards."""

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from launching import ROOT, load_script, own_config
from pages import fenced

from minimind_fast.config import ModelConfig
from minimind_fast.data import samples
from minimind_fast.model import MiniMind
from minimind_fast.ops import precision
from minimind_fast.ops.attention import use
from minimind_fast.proof.memory import micro_batch
from minimind_fast.recipes import RECIPES
from minimind_fast.training import ranks, setup, words
from minimind_fast.training.cli import parse
from minimind_fast.training.config import TrainConfig, option, with_defaults
from minimind_fast.training.run import JOINED, Run, Stage, activation_bytes, resolve

SAMPLE = Stage("pretrain", "pretrain.jsonl", "pretrain_val.jsonl", suits=dict(batch_size=8, max_minutes=1.75, epochs=3))


@pytest.mark.parametrize("made", ["in Python", "by the command line"])
def test_what_is_given_stays_and_what_is_chosen_has_a_reason(made):
    given = dict(preset="minimind3", batch_size=4, max_minutes=30.0)
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    config = TrainConfig(**given) if made == "in Python" else parse(TrainConfig, words)
    assert config.given == set(given)
    run = resolve(config, SAMPLE)
    assert {name: getattr(run.config, name) for name in given} == given
    assert {run.config.why(name) for name in given} == {"given"}
    assert run.config.epochs == 3 and run.config.why("epochs") == "suits the shipped sample"
    assert run.config.data_path == [str(samples.path("pretrain.jsonl"))]
    assert run.config.val_data_path == [str(samples.path("pretrain_val.jsonl"))]
    assert run.config.why("seed") == "default" and config.epochs == 2


def test_a_default_that_is_typed_counts_as_given():
    assert resolve(TrainConfig(epochs=2), SAMPLE).config.epochs == 2


def test_own_data_leaves_the_samples_choices_out():
    run = resolve(TrainConfig(data_path=["mine.jsonl"], dtype="float32"), SAMPLE)
    assert (run.config.batch_size, run.config.epochs, run.config.val_data_path) == (32, 2, [])
    assert run.config.preset == ("minimind3" if torch.cuda.is_available() else "tiny")


UPSTREAM = {  # MiniMind of August 2026: its trainers' defaults, where ours differ
    "pretrain": {"beta2": 0.999},
    "sft": {"system_ratio": 0.2, "empty_think_ratio": 0.2, "whole_turn": True},
    "lora": {"system_ratio": 0.2, "empty_think_ratio": 0.2, "whole_turn": True, "lora_targets": ["square"]},
    "dpo": {"empty_think_ratio": 0.2, "whole_turn": True},
    "distill": {"system_ratio": 0.2, "empty_think_ratio": 0.2, "whole_turn": True, "alpha_weighs_aux": True},
    "reason": {},
    "grpo": {"grpo_loss": "cispo", "top_p": 0.85, "top_k": 50, "logprob_temperature": 1.0, "system_ratio": 0.2}
    | {"reward": ["length", "thinking", "minimind_repetition"]},
}


@pytest.mark.parametrize("name", UPSTREAM)
def test_a_recipe_sets_what_was_not_given_and_wins_over_the_sample_s_choices(name, tmp_path):
    module = load_script(name)
    cls = own_config(module)
    here = dict(from_weight="none", save_dir=str(tmp_path), dtype="float32")
    here |= {"teacher_path": str(tmp_path), "tokenizer_path": "x"} if name == "distill" else {}
    run = resolve(cls(recipe="minimind3", **here), module.STAGE)
    took = {n: getattr(run.config, n) for n in run.config.options() if run.config.why(n) == "--recipe minimind3"}
    assert took == {"beta2": 0.999} | UPSTREAM[name]
    assert resolve(cls(**here), module.STAGE).config.beta2 == 0.95, "no recipe unless it is asked for"
    entry, value = next(iter((UPSTREAM[name] or {"beta2": 0.999}).items()))
    own = {bool: False, float: 0.5, list: ["q_proj"], str: "grpo"}[type(value)]
    run = resolve(parse(cls, [f"--{entry}", str(own), "--recipe", "minimind3", "--from_weight", "none"]
        + [w for n, v in here.items() if n != "from_weight" for w in (f"--{n}", v)]), module.STAGE)  # fmt: skip
    assert getattr(run.config, entry) == own and run.config.why(entry) == "given"


def test_every_entry_of_a_recipe_is_an_option_of_some_stage_with_a_valid_value():
    classes = [own_config(load_script(name)) for name in UPSTREAM]
    for name, values in RECIPES.items():
        for entry, value in values.items():
            having = [cls for cls in classes if entry in {f.name for f in dataclasses.fields(cls)}]
            assert having, f"{name}: no stage has --{entry}"
            for cls in having:
                cls(**{entry: value})
    with pytest.raises(ValueError, match="--recipe must be one of none, minimind3"):
        TrainConfig(recipe="minimind4")


def test_nothing_is_left_open_and_nothing_can_be_assigned():
    run = resolve(TrainConfig(), SAMPLE)
    assert run.config.dtype == precision.choose("auto") and run.config.zero_stage in (0, 1)
    assert run.dtype == getattr(torch, run.config.dtype)
    for thing, name in ((run, "stage"), (run.config, "batch_size"), (run.config, "new")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, name, 3)


def test_the_run_is_written_beside_itself(tmp_path):
    run = resolve(TrainConfig(save_dir=str(tmp_path), seed=5), SAMPLE)
    run.folder.mkdir()
    run.write()
    told = json.loads((tmp_path / "pretrain" / "run.json").read_text(encoding="utf-8"))
    assert told["options"]["seed"] == {"value": 5, "why": "given"}
    assert told["options"]["batch_size"] == {"value": 8, "why": "suits the shipped sample"}
    assert {name: told["options"][name]["value"] for name in run.config.options()} == run.config.options()
    assert told["deepspeed"] == run.deepspeed and told["stage"] == "pretrain" and told["ranks"] == 1


GIB = 1 << 30


@pytest.mark.parametrize(
    "memory, given, size",
    [
        (80, {}, (256, 1)),
        (24, {}, (128, 2)),
        (8, {}, (32, 8)),
        (0, {}, (32, 8)),  # a CPU
        (8, {"preset": "tiny"}, (128, 2)),
        (80, {"max_seq_len": 1024}, (128, 2)),
        (80, {"batch_size": 32}, (32, 8)),
        (80, {"accumulation_steps": 8}, (32, 8)),
        (80, {"packing": False}, (32, 8)),  # MiniMind's mean of micro-batches' means is another step
        (80, {"cuda_graphs": True}, (32, 8)),
    ],
)
def test_on_a_gpu_a_step_is_as_few_micro_batches_as_fit(memory, given, size):
    options = {"preset": "minimind3", "dtype": "bfloat16", **given}
    config = resolve(TrainConfig(data_path=["mine.jsonl"], **options), SAMPLE, memory=memory * GIB).config
    assert (config.batch_size, config.accumulation_steps) == size
    assert (config.why("batch_size") == config.why("accumulation_steps") == JOINED) == (size != (32, 8))


def test_the_smallest_gpu_among_the_ranks_decides_and_the_log_says_what(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * GIB))
    monkeypatch.setattr(ranks, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(ranks, "world", lambda: (0, 2))
    monkeypatch.setattr(ranks.dist, "all_reduce", lambda x, op: x.clamp_(max=24 * GIB))
    for name in ("prepare", "first"):
        monkeypatch.setattr(ranks, name, lambda _: None)
    options = dict(preset="minimind3", data_path=["mine.jsonl"], save_dir=str(tmp_path), attention="eager")
    run = setup.begin(TrainConfig(**options, dtype="float32"), SAMPLE)
    assert (run.config.batch_size, run.config.accumulation_steps) == (64, 4)  # float32: half of bfloat16's
    model = MiniMind(ModelConfig.preset("tiny", num_hidden_layers=1))
    with use("auto"):
        said = "\n".join(words.introduction(run, model, "cpu", 10, 64 * 340))
    assert "--batch_size 64 --accumulation_steps 4" in said


@pytest.mark.parametrize("preset", ["minimind2", "minimind3", "minimind2-moe", "minimind3-moe"])
def test_what_a_token_needs_is_not_put_too_low(preset):
    config = ModelConfig.preset(preset, num_hidden_layers=4, vocab_size=256)
    peak = micro_batch(config, 2048, 256).peak_bytes
    assert peak <= 2048 * activation_bytes(config, 2) <= 2 * peak


def test_weights_are_found_by_the_name_of_a_run(tmp_path):
    stage = Stage("sft", needs={"from_weight": "pretrain"})

    @with_defaults(from_weight="pretrain")
    class Config(TrainConfig):
        extra: int = option(1, "one more")

    with pytest.raises(ValueError, match="no run of that name .* run `deepspeed train/pretrain.py` first"):
        resolve(Config(save_dir=str(tmp_path)), stage)
    with pytest.raises(ValueError, match="no run of that name in") as raised:
        resolve(Config(save_dir=str(tmp_path), from_weight="typo"), stage)
    assert "first" not in str(raised.value)
    (tmp_path / "pretrain").mkdir()
    run = resolve(Config(save_dir=str(tmp_path), extra=4), stage)
    assert run.config.from_weight == str(tmp_path / "pretrain") and run.config.extra == 4
    assert run.config.why("from_weight") == f"the run pretrain in {tmp_path}"


def test_an_interval_without_anything_to_validate_on_is_refused():
    with pytest.raises(ValueError, match="--val_interval validates nothing without --val_data_path"):
        resolve(TrainConfig(data_path=["mine.jsonl"], val_interval=5), SAMPLE)
    assert resolve(TrainConfig(val_interval=5), SAMPLE).config.val_data_path  # the sample brings its own
    resolve(TrainConfig(data_path=["mine.jsonl"], val_interval=5, val_data_path=["more.jsonl"]), SAMPLE)


def test_impossible_values_are_refused_in_python_too():
    with pytest.raises(ValueError, match="--batch_size must be at least 1"):
        TrainConfig(batch_size=0)
    with pytest.raises(ValueError, match="--batch_size must be at least 1"):
        TrainConfig().settle("a reason", batch_size=0)
    with pytest.raises(ValueError, match="no such option: bach_size"):
        TrainConfig().settle("a reason", bach_size=3)
    with pytest.raises(TypeError, match="bach_size"):
        TrainConfig(bach_size=3)


@pytest.mark.parametrize("name", ["pretrain", "sft", "lora", "dpo", "distill", "reason", "grpo"])
def test_every_stage_suits_its_sample_with_options_that_it_has(name):
    script = load_script(name)
    known = {f.name for c in vars(script).values() if dataclasses.is_dataclass(c) for f in dataclasses.fields(c)}
    assert set(script.STAGE.suits) <= known and samples.path(script.STAGE.sample).is_file()
    assert isinstance(script.STAGE, Stage) and issubclass(Run, object) and script.STAGE.name == name


FROM_PYTHON = """
import sys
from pathlib import Path
from minimind_fast.training import config

small = dict(hidden_size=64, num_hidden_layers=1, max_steps=2, save_dir=sys.argv[2], num_threads=1, max_seq_len=64)
options = config.TrainConfig
config.TrainConfig = lambda **given: options(**{**given, **small, "preset": "tiny"})
exec(Path(sys.argv[1]).read_text())
assert trainer.step == 2 and run.config.batch_size == 4 and (run.weights / "config.json").is_file()
"""


def test_the_docs_python_trains(tmp_path):
    page = (ROOT / "docs" / "en" / "train_pretrain.md").read_text(encoding="utf-8")
    (example,) = (block for block in fenced(page, "python") if "setup.begin" in block)
    (tmp_path / "example.py").write_text(example, encoding="utf-8")
    command = [sys.executable, "-W", "ignore", "-c", FROM_PYTHON, str(tmp_path / "example.py"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "given default" in done.stdout
