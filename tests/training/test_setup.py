"""How the parts of a run are made."""

import shutil
from collections import namedtuple

import pytest

import minimind_fast as mm
from minimind_fast.data import samples
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.errors import UserError
from minimind_fast.training import resume, setup
from minimind_fast.training.config import TrainConfig

SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)


def test_dropout_reaches_every_branch_of_given_weights_as_of_new_ones(tmp_path):
    tokenizer = Tokenizer.load(samples.path("tokenizer"))
    mm.save_pretrained(mm.MiniMind(mm.ModelConfig.preset("minimind3", **SHAPE)), tmp_path / "m", tokenizer=tokenizer)
    for options in (dict(from_weight=str(tmp_path / "m")), dict(preset="minimind3", hidden_size=32)):
        model = setup.load_model(TrainConfig(dropout=0.25, **options), tokenizer)
        found = [module.dropout for module in model.modules() if isinstance(getattr(module, "dropout", None), float)]
        assert len(found) >= 2 * 2 + 1 and set(found) == {0.25} and model.config.dropout == 0.25


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture") / "m"
    config = mm.ModelConfig.preset("minimind3-moe", **SHAPE, norm_topk_prob=True)
    mm.save_pretrained(mm.MiniMind(config), folder, tokenizer=Tokenizer.load(samples.path("tokenizer")))
    return folder


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        (
            dict(preset="minimind2"),
            "--preset minimind2 does not fit .*: its generation is 3, not 2; leave --preset out",
        ),
        (dict(preset="minimind3"), "--preset minimind3 does not fit .*: its hidden_size is 32, not 768"),
        (dict(hidden_size=64), "--hidden_size 64 does not fit .*: its hidden_size is 32, not 64"),
        (dict(num_hidden_layers=3), "--num_hidden_layers 3 does not fit"),
        (dict(use_moe=False), "--use_moe False does not fit .*: its use_moe is True, not False"),
        (dict(norm_topk_prob=False), "--norm_topk_prob False does not fit .*: its norm_topk_prob is True"),
        (dict(preset="minimind3", hidden_size=32, num_hidden_layers=2, use_moe=True, norm_topk_prob=True), None),
        (dict(straight_through_router=True), None),
        ({}, None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_an_option_of_the_shape_acts_agrees_or_is_refused(given, refused, mixture):
    config = TrainConfig(from_weight=str(mixture), **given).suggest("suits the machine", preset="tiny")
    tokenizer = setup.load_tokenizer(config)
    if refused:
        with pytest.raises(UserError, match=refused):
            setup.load_model(config, tokenizer)
        return
    model = setup.load_model(config, tokenizer)
    assert model.config.straight_through_router == given.get("straight_through_router", False)


def test_a_disk_without_room_for_a_checkpoint_is_told_at_the_start(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(12_000))
    resume.check_room(tmp_path, 1000)
    with pytest.raises(UserError, match=r"has 0\.00 GB free and a checkpoint takes"):
        resume.check_room(tmp_path, 1001)
