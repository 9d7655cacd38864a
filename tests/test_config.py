"""Model configs of both generations, and the dataclass that becomes a command line."""

import json
from pathlib import Path

import pytest

import minimind_fast as mm
from minimind_fast.config import PRESETS, ModelConfig
from minimind_fast.training.cli import parse
from minimind_fast.training.config import TrainConfig

GOLDEN = Path(__file__).with_name("golden")


@pytest.mark.parametrize(
    ("preset", "millions", "active"),
    [
        ("minimind2-small", 26, 26),
        ("minimind2", 104, 104),
        ("minimind2-moe", 145, 92),
        ("minimind3", 64, 64),
        ("minimind3-moe", 198, 64),
    ],
)
def test_parameter_counts_of_the_presets(preset, millions, active):
    model = mm.MiniMind(ModelConfig.preset(preset, max_position_embeddings=64))
    assert round(model.num_parameters() / 1e6) == millions
    assert round(model.num_parameters(active=True) / 1e6) == active


@pytest.mark.parametrize("case", sorted(p.name for p in GOLDEN.iterdir()))
def test_minimind_config_round_trip(case):
    raw = json.loads((GOLDEN / case / "config.json").read_text())
    config = ModelConfig.from_dict(raw)
    assert config.generation == (2 if case.startswith("minimind2") else 3)
    again = config.to_dict()
    assert ModelConfig.from_dict(again) == config
    # MiniMind reads back what it wrote itself.
    for key in set(raw) - {"dtype", "architectures", "num_experts_per_tok"}:
        assert again[key] == raw[key], key


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_round_trip(preset):
    config = ModelConfig.preset(preset)
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ({"hidden_size": 0}, "hidden_size must be a whole number"),
        ({"use_moe": True, "num_experts_per_tok": 9}, "exceeds num_experts"),
        ({"rope_scaling": {"type": "linear"}}, "yarn"),
        ({"generation": 4}, "generation must be 2"),
    ],
)
def test_impossible_values_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**change)


def test_unknown_field_and_preset_are_named():
    with pytest.raises(ValueError, match="my.json: unknown field 'hidden_sise'"):
        ModelConfig.from_dict({"hidden_sise": 3}, "my.json")
    with pytest.raises(ValueError, match="unknown preset 'minimind4'.*minimind2-small"):
        ModelConfig.preset("minimind4")


def test_presets_for_new_training_teach_their_router():
    assert ModelConfig.preset("minimind3-moe").router_gets_lm_gradient
    assert not ModelConfig.preset("minimind3-moe", norm_topk_prob=True).router_gets_lm_gradient


def test_options_of_every_kind(tmp_path):
    config = parse(TrainConfig, ["--batch_size", "7", "--data_path", "a", "b", "--no_packing", "--use_moe", "false"])
    assert (config.batch_size, config.data_path, config.packing, config.use_moe) == (7, ["a", "b"], False, False)
    assert config.given == {"batch_size", "data_path", "packing", "use_moe"}
    assert parse(TrainConfig, ["--use_moe"]).use_moe and parse(TrainConfig, ["--use_moe", "1"]).use_moe
    assert parse(TrainConfig, ["--norm_topk_prob"]).norm_topk_prob is True
    assert parse(TrainConfig, []).norm_topk_prob is None
    assert parse(TrainConfig, ["--local_rank=3"]).given == set()
    file = tmp_path / "run.json"
    file.write_text('{"batch_size": 3, "epochs": 9}')
    config = parse(TrainConfig, ["--config", str(file), "--epochs", "4"])
    assert (config.batch_size, config.epochs) == (3, 4)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch_size", "0"], "--batch_size must be at least 1"),
        (["--learning_rate", "-1"], "--learning_rate must be positive"),
        (["--use_moe", "maybe"], "expected 1/0"),
        (["--dtype", "int8"], "invalid choice"),
        (["--beta2", "1"], "--beta1 and --beta2"),
        (["--batchsize", "3"], "unrecognized arguments: --batchsize"),
    ],
)
def test_bad_options_end_in_a_sentence(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(TrainConfig, argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_help_shows_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        parse(TrainConfig, ["--help"])
    text = capsys.readouterr().out
    assert "--accumulation_steps" in text and "(default: 8)" in text and "--local_rank" not in text
