"""Pretraining: a MiniMind from nothing, on `{"text": ...}` lines.

Purpose: `deepspeed train/pretrain.py` (or torchrun, or plain python); without arguments it trains a small model on the
    sample corpus that ships with the package, in under three minutes on a laptop.
Principle: next-token prediction. Documents are packed end to end, none sees another, and the loss is the mean over the
    counted tokens of the global batch.
Properties: what stages share (tokenizer, model, data, the loss) is in `training/setup.py`, the loop in `trainer.py`.
"""

from minimind_fast.data.cache import encode_pretrain
from minimind_fast.training import setup
from minimind_fast.training.cli import parse
from minimind_fast.training.config import TrainConfig
from minimind_fast.training.run import Stage

STAGE = Stage(
    "pretrain",
    sample="pretrain.jsonl",
    sample_val="pretrain_val.jsonl",
    suits=dict(
        batch_size=8, accumulation_steps=1, max_seq_len=256, learning_rate=2e-3, warmup_steps=20, max_minutes=1.75
    ),
)
PROMPTS = ["从前有个孩子叫", "离太阳最近的行星是", "Once upon a time", "The capital of France is", "问：2加3等于多少？"]


def main(argv: list[str] | None = None) -> None:
    run = setup.begin(parse(TrainConfig, argv, "Pretrain a MiniMind on {'text': ...} JSONL."), STAGE)
    trainer = setup.train(run, lambda _tokenizer: encode_pretrain)
    setup.report(trainer, PROMPTS, f"Next: minimind-fast generate {run.weights} --prompt 'Once upon a time'", chat=None)


if __name__ == "__main__":
    setup.start(main)
