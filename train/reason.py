"""Reasoning: SFT on chats with thoughts, in which the tags around thought and answer weigh ten times as much.

Purpose: `deepspeed train/reason.py` teaches the form `<think>...</think>` (and `<answer>...</answer>` where the data has
    it), by MiniMind2's method of distilling a reasoning model's answers.
Principle: a missing tag makes the whole answer unparsable, a wrong word costs only a word; so each token of a tag in an
    answer weighs --tag_weight. The loss is divided by the number of tokens, as in MiniMind.
Properties: weights exactly the tags' tokens, only in answers, however the tokenizer splits them; all else is SFT. The
    log's `nll` is the unweighted loss.

Source: MiniMind2's train_distill_reason.
"""

from minimind_fast.data.chats import PROMPTS, ChatEncoder
from minimind_fast.training import setup
from minimind_fast.training.cli import parse
from minimind_fast.training.config import TrainConfig, option, with_defaults
from minimind_fast.training.run import Stage

STAGE = Stage(
    "reason",
    sample="reason.jsonl",
    suits=dict(learning_rate=5e-4, max_seq_len=256, epochs=4, max_minutes=1.5),
    needs={"from_weight": "sft"},
)
QUESTIONS = ["What is 12 + 23?", "7加21等于多少？"]


@with_defaults(
    from_weight="sft",
    learning_rate=1e-6,
    batch_size=8,
    accumulation_steps=1,
    max_seq_len=1024,
    epochs=1,
    truncate=True,
)
class ReasonConfig(TrainConfig):
    """MiniMind's defaults of this stage."""

    tag_weight: int = option(10, "weight of the tokens of <think>, </think>, <answer>, </answer> in answers")


def main(argv: list[str] | None = None) -> None:
    text = "Teach a MiniMind to think before it answers, on {'conversations': [...]}."
    run = setup.begin(parse(ReasonConfig, argv, text), STAGE)
    trainer = setup.train(run, lambda tokenizer: ChatEncoder(tokenizer, run.config.tag_weight))
    then = f"Next: minimind-fast chat {run.weights} --thinking"
    setup.report(trainer, QUESTIONS, then, PROMPTS[1])  # opens with a thought


if __name__ == "__main__":
    setup.start(main)
