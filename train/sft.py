"""Supervised fine-tuning: a pretrained MiniMind learns to answer, from `{"conversations": [...]}` lines.

Purpose: `deepspeed train/sft.py` after `train/pretrain.py`; without arguments it continues from that run, on the sample
    chats that ship with the package.
Principle: next-token prediction on the answers only: every assistant turn is a target, in the context of what precedes it.
    The loss is the mean over the answer tokens of the global batch.
Properties: chats longer than --max_seq_len are cut off; one whose answers all lie beyond it is left out and counted.
"""

from minimind_fast.data.chats import ChatEncoder
from minimind_fast.training import setup
from minimind_fast.training.cli import parse
from minimind_fast.training.config import ChatConfig, with_defaults
from minimind_fast.training.run import Stage, command

STAGE = Stage(
    "sft",
    sample="sft.jsonl",
    suits=dict(learning_rate=1e-3, batch_size=11, max_seq_len=384, epochs=6, warmup_steps=10, max_minutes=2.0),
    needs={"from_weight": "pretrain"},
)
QUESTIONS = ["What is 2 + 3?", "Why is the sky blue?", "地球的卫星是什么？"]


@with_defaults(
    from_weight="pretrain",
    learning_rate=1e-5,
    batch_size=16,
    accumulation_steps=1,
    max_seq_len=768,
    epochs=2,
    truncate=True,
)
class SFTConfig(ChatConfig):
    """MiniMind's defaults of this stage."""


def main(argv: list[str] | None = None) -> None:
    run = setup.begin(parse(SFTConfig, argv, "Teach a MiniMind to answer, on {'conversations': [...]} JSONL."), STAGE)
    trainer = setup.train(run, ChatEncoder)
    setup.report(trainer, QUESTIONS, f"Next: minimind-fast chat {run.weights}   or: {command('lora')}")


if __name__ == "__main__":
    setup.start(main)
