"""DPO: a MiniMind learns to prefer the better of two answers, from `{"chosen": [...], "rejected": [...]}` lines.

Purpose: `deepspeed train/dpo.py` after `train/sft.py`; without arguments it continues from that run, on the sample pairs
    that ship with the package.
Principle: relative to the initial model (the reference), the chosen answer should gain more log-probability than the
    rejected one. The reference's log-probabilities are computed once before training, so it needs no memory; or it is a
    second model (--reference alongside). The loss is the mean over the pairs of the global batch.
Properties: log-probabilities are sums over an answer's tokens; --average_logprob is MiniMind2's mean. --batch_size counts
    pairs of two full-length rows; packing fits as many pairs as possible into that space. A loss that stays at 0.693 means
    that the learning rate is too small: MiniMind's default is meant for a thousand steps.

Source: Rafailov et al., Direct Preference Optimization, 2023; MiniMind's train_dpo for defaults.
"""

from typing import Any

from minimind_fast.data.pairs import PairBatch
from minimind_fast.errors import UserError
from minimind_fast.model import MiniMind
from minimind_fast.rl.preferences import answer_lengths, answer_logprobs, open_pairs
from minimind_fast.training import losses, ranks, setup
from minimind_fast.training.cli import parse
from minimind_fast.training.config import AnswerConfig, option, with_defaults
from minimind_fast.training.log import draw_loss
from minimind_fast.training.losses import LossFunction, StepLoss
from minimind_fast.training.run import Stage, command
from minimind_fast.training.trainer import Hooks
from minimind_fast.weights.frozen import frozen

STAGE = Stage(
    "dpo",
    sample="dpo.jsonl",
    suits=dict(learning_rate=1e-5, max_seq_len=256, epochs=4, warmup_steps=5, log_interval=5, max_minutes=1.0),
    needs={"from_weight": "sft"},
)
QUESTIONS = ["What is 2 + 3?", "Why is the sky blue?", "地球的卫星是什么？"]


@with_defaults(
    from_weight="sft", learning_rate=4e-8, batch_size=4, accumulation_steps=1, max_seq_len=1024, epochs=1, truncate=True
)
class DPOConfig(AnswerConfig):
    """MiniMind's defaults of this stage; batch_size counts pairs."""

    beta: float = option(0.15, "scale of the log-ratios to the reference; larger keeps the model closer to it")
    dpo_loss: str = option("sigmoid", "loss of a pair's margin", choices=("sigmoid", "ipo"))
    label_smoothing: float = option(0.0, "probability that a pair is the wrong way round (sigmoid only)")
    average_logprob: bool = option(False, "mean of an answer's log-probabilities instead of their sum (MiniMind2)")
    reference: str = option(
        "cached", "its log-probabilities once before training, or the model in memory", choices=("cached", "alongside")
    )

    def check(self) -> None:
        """Reject invalid values."""
        super().check()
        if self.beta <= 0 or not 0 <= self.label_smoothing < 0.5:
            raise UserError("--beta must be above 0, and --label_smoothing in [0, 0.5)")
        if self.dpo_loss == "ipo" and self.label_smoothing:
            raise UserError("--label_smoothing is for --dpo_loss sigmoid; IPO has none")
        if not self.packing or self.loss:
            raise UserError("DPO has no --no_packing (the two of a pair are packed together) and no --loss")


def make_loss(config: DPOConfig, beside: MiniMind | None) -> LossFunction:
    """The loss of a micro-batch, against cached log-probabilities or a second model."""

    def loss(policy: Any, batch: PairBatch) -> StepLoss:
        answers, out = answer_logprobs(policy, batch)
        before = batch.reference if beside is None else answer_logprobs(beside, batch)[0]
        assert before is not None
        lengths = answer_lengths(batch) if config.average_logprob else 1
        (chosen, rejected), (old_chosen, old_rejected) = ((x / lengths).unbind(1) for x in (answers, before))
        how = (config.beta, config.dpo_loss, config.label_smoothing)
        each, margin = losses.dpo(chosen, rejected, old_chosen, old_rejected, *how)
        metrics = {"reward_margin": margin.sum(), "accuracy": (margin > 0).float().sum()}
        metrics |= {"chosen_logprob": chosen.sum(), "rejected_logprob": rejected.sum()}
        return StepLoss(each.sum(), out.aux_loss if policy.config.use_moe else None, metrics)

    return loss


def main(argv: list[str] | None = None) -> None:
    text = "Teach a MiniMind preferences, on {'chosen': [...], 'rejected': [...]} JSONL."
    run = setup.begin(parse(DPOConfig, argv, text), STAGE)
    config, device = run.config, ranks.device()
    tokenizer = setup.load_tokenizer(config)
    model = setup.load_model(config, tokenizer)
    reference = frozen(model, dtype=run.dtype)
    cached = config.reference == "cached"
    parts = (tokenizer, reference, device, cached)
    data = open_pairs(config, config.data_path, *parts, training=True)
    val_data = None
    if config.val_data_path:
        val_data = setup.one_pass(open_pairs(config, config.val_data_path, *parts, training=False))
    beside = None if cached else reference.to(device)
    del parts, reference  # cached: its log-probabilities are enough

    hooks = Hooks(val_data, count=lambda batch: batch.num_pairs)
    trainer = setup.make_trainer(run, model, tokenizer, data, make_loss(config, beside), hooks)
    trainer.run()
    if trainer.rank == 0:
        curves = {"loss": "loss", "accuracy": "accuracy", "reward_margin": "reward margin"}
        draw_loss(run.folder / "log.jsonl", run.folder / "loss.png", "DPO", curves, "mean over pairs")
    setup.report(trainer, QUESTIONS, f"Next: minimind-fast chat {run.weights}   or: {command('distill')}")


if __name__ == "__main__":
    setup.start(main)
