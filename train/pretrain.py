"""Pretraining: a MiniMind from nothing, on `{"text": ...}` lines.

Purpose: `deepspeed train/pretrain.py` (or torchrun, or plain python); without arguments it trains a small model on the
    sample corpus that ships with the package, in under three minutes on a laptop.
Principle: next-token prediction. Documents are packed end to end, none sees another, and the loss is the mean over the
    counted tokens of the whole global batch.
Properties: what stages share (tokenizer, model, data, the loss) is in `training/setup.py`, the loop in `trainer.py`.
"""

import time

from minimind_fast.data.cache import encode_pretrain
from minimind_fast.training import setup as stage
from minimind_fast.training.cli import parse
from minimind_fast.training.config import TrainConfig

# What suits the sample corpus, where the option was not given.
SAMPLE_DEFAULTS = dict(
    batch_size=8, accumulation_steps=1, max_seq_len=256, learning_rate=2e-3, warmup_steps=20, max_minutes=1.75
)
PROMPTS = ["从前有个孩子叫", "离太阳最近的行星是", "Once upon a time", "The capital of France is", "问：2加3等于多少？"]


def main() -> None:
    began = time.perf_counter()
    config = parse(TrainConfig, description="Pretrain a MiniMind on {'text': ...} JSONL.")
    stage.use_sample(config, "pretrain.jsonl", SAMPLE_DEFAULTS, val="pretrain_val.jsonl")
    trainer = stage.train(config, "pretrain", lambda _tokenizer: encode_pretrain)
    then = f"Next: minimind-fast generate {trainer.weights_folder} --prompt 'Once upon a time'"
    stage.report(trainer, time.perf_counter() - began, PROMPTS, then, chat=None)


if __name__ == "__main__":
    stage.start(main)
