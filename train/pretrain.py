"""Pretraining: a MiniMind from nothing, on `{"text": ...}` lines.

Purpose: `deepspeed train/pretrain.py` (or torchrun, or plain python); without arguments it trains a small model on the
    sample corpus that ships with the package, in under three minutes on a laptop.
Principle: next-token prediction. Documents are packed end to end, none sees another, and the loss is the mean over the
    counted tokens of the whole global batch.
Properties: everything but the data, the model and the loss is `minimind_fast.trainer.Trainer`.
"""

import time
from dataclasses import dataclass

from minimind_fast import stage
from minimind_fast.config import TrainConfig, parse
from minimind_fast.token_cache import encode_pretrain
from minimind_fast.trainer import Trainer, finished

# What suits the sample corpus and a CPU, where the option was not given.
SAMPLE_DEFAULTS = dict(
    batch_size=8, accumulation_steps=1, max_seq_len=256, learning_rate=2e-3, warmup_steps=20, max_minutes=1.75
)
PROMPTS = ["从前", "水", "The", "Once upon a time", "Question: what is 2 + 3?"]


@dataclass
class PretrainConfig(TrainConfig):
    """Pretraining's own defaults are the shared ones."""


def main() -> None:
    began = time.perf_counter()
    config = parse(PretrainConfig, description="Pretrain a MiniMind on {'text': ...} JSONL.")
    stage.use_sample(config, "pretrain.jsonl", SAMPLE_DEFAULTS, val="pretrain_val.jsonl")
    device = stage.begin(config)
    tokenizer = stage.load_tokenizer(config)
    model = stage.load_model(config, tokenizer)
    data = stage.open_data(config, config.data_path, tokenizer, encode_pretrain, training=True)
    val_data = None
    if config.val_data_path:
        val_data = stage.one_pass(
            stage.open_data(config, config.val_data_path, tokenizer, encode_pretrain, training=False)
        )

    trainer = Trainer(config, "pretrain", model, tokenizer, data, stage.next_token_loss, device, val_data)
    trainer.run()

    if trainer.rank == 0:
        stage.show_samples(trainer.weights_folder, config.sample_prompts or PROMPTS, config.sample_tokens)
        print(finished(trainer, time.perf_counter() - began))
        print(f"Next: minimind-fast generate {trainer.weights_folder} --prompt 'Once upon a time'")


if __name__ == "__main__":
    stage.start(main)
