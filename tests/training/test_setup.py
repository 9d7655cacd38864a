"""How the parts of a run are made."""

import minimind_fast as mm
from minimind_fast.data import samples
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.training import setup
from minimind_fast.training.config import TrainConfig

SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)


def test_dropout_reaches_every_branch_of_given_weights_as_of_new_ones(tmp_path):
    tokenizer = Tokenizer.load(samples.path("tokenizer"))
    mm.save_pretrained(mm.MiniMind(mm.ModelConfig.preset("minimind3", **SHAPE)), tmp_path / "m", tokenizer=tokenizer)
    for options in (dict(from_weight=str(tmp_path / "m")), dict(preset="minimind3", hidden_size=32)):
        model = setup.load_model(TrainConfig(dropout=0.25, **options), tokenizer)
        found = [module.dropout for module in model.modules() if isinstance(getattr(module, "dropout", None), float)]
        assert len(found) >= 2 * 2 + 1 and set(found) == {0.25} and model.config.dropout == 0.25
