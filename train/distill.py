"""Distillation: a small MiniMind learns from a teacher's whole distribution, on `{"conversations": [...]}` lines.

Purpose: `deepspeed train/distill.py` after `train/dpo.py`; without arguments the pretrained model learns to answer from the
    model that DPO left, on the sample chats that ship with the package. With --from_weight none the student is a new model
    of --preset, --hidden_size and --num_hidden_layers.
Principle: alpha times the cross-entropy of SFT plus (1 - alpha) T^2 times KL(teacher || student) at temperature T, over the
    answer tokens of the global batch. The student's head computes both from hidden states (`ops.linear_kl`), without
    storing either model's full logits.
Properties: any teacher that `load_pretrained` reads, of any size, with the student's tokenizer. It runs in the student's
    precision without gradients or optimizer state, and is not checkpointed.

Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015; MiniMind's train_distillation for defaults.
"""

from typing import Any

import torch

from minimind_fast.data.chats import ChatEncoder
from minimind_fast.data.packing import Batch
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.errors import UserError
from minimind_fast.model import MiniMind, Teacher
from minimind_fast.ops.documents import run as run_packed
from minimind_fast.training import losses, ranks, setup
from minimind_fast.training.cli import parse
from minimind_fast.training.config import ChatConfig, option, with_defaults
from minimind_fast.training.losses import LossFunction, StepLoss
from minimind_fast.training.run import Run, Stage, command
from minimind_fast.weights.checkpoint import resolve_folder
from minimind_fast.weights.frozen import frozen
from minimind_fast.weights.open import check_match

QUESTIONS = ["What is 2 + 3?", "Why is the sky blue?", "地球的卫星是什么？"]


@with_defaults(
    from_weight="pretrain",
    learning_rate=5e-6,
    batch_size=32,
    accumulation_steps=1,
    max_seq_len=340,
    epochs=6,
    truncate=True,
)
class DistillConfig(ChatConfig):
    """MiniMind's defaults of this stage."""

    teacher_path: str = option("dpo", "the teacher: a folder with weights, or the name of a run in --save_dir")
    alpha: float = option(0.5, "weight of the cross-entropy; the KL to the teacher gets the rest")
    temperature: float = option(1.5, "softens both distributions in the KL term")
    alpha_weighs_aux: bool = option(False, "alpha weighs the experts' balancing loss too, as in MiniMind")

    def check(self) -> None:
        """Reject invalid values."""
        super().check()
        if not 0 <= self.alpha <= 1 or self.temperature <= 0:
            raise UserError("--alpha must be in [0, 1] and --temperature above 0")
        if not self.packing or self.loss:
            raise UserError("distillation has no --no_packing and no --loss")


def with_teachers_tokenizer(config: DistillConfig) -> DistillConfig:
    """A student trained from scratch uses the teacher's tokenizer."""
    if config.from_weight != "none" or config.tokenizer_path:
        return config
    return config.settle("the teacher's own", tokenizer_path=str(resolve_folder(config.teacher_path)))


STAGE = Stage(
    "distill",
    sample="sft.jsonl",
    suits=dict(learning_rate=1e-3, batch_size=11, max_seq_len=384, warmup_steps=10, max_minutes=1.5),
    needs={"from_weight": "pretrain", "teacher_path": "dpo"},
    also=with_teachers_tokenizer,
)


def load_teacher(run: Run[DistillConfig], student: MiniMind, tokenizer: Tokenizer) -> MiniMind:
    """The frozen teacher; its token ids must match the student's."""
    path = resolve_folder(run.config.teacher_path)
    if not path.is_dir():
        raise UserError(f"--teacher_path {path} is a file: give a folder, which says its model's shape and tokenizer")
    teacher = frozen(path, ranks.device(), run.dtype)
    check_match(path, tokenizer, "choose a teacher with the student's tokenizer")
    if teacher.config.vocab_size < student.config.vocab_size:
        raise UserError(
            f"the teacher {path} has {teacher.config.vocab_size} ids and the student {student.config.vocab_size}: "
            "choose a teacher with at least as many"
        )
    return teacher


def make_loss(run: Run[DistillConfig], student: MiniMind, tokenizer: Tokenizer) -> LossFunction:
    """The loss of a micro-batch; it holds the teacher, which the student must not."""
    config, teacher = run.config, load_teacher(run, student, tokenizer)

    def loss(model: Any, batch: Batch) -> StepLoss:
        with torch.no_grad():  # not inference_mode: autograd cannot save its tensors
            hidden = run_packed(teacher, batch, return_hidden=True).hidden
        view = Teacher(hidden, teacher.lm_head.weight, config.temperature)
        out = run_packed(model, batch, targets=batch.targets, teacher=view)
        total = losses.distill(out.logprobs, out.kl, config.alpha, config.temperature)
        metrics = {"nll": losses.lm(out.logprobs.detach()), "kl": out.kl.detach().sum()}
        weight = config.alpha if config.alpha_weighs_aux else 1.0
        return StepLoss(total, weight * out.aux_loss if model.config.use_moe else None, metrics)

    return loss


def main(argv: list[str] | None = None) -> None:
    text = "Teach a MiniMind what another model thinks, on {'conversations': [...]}."
    run = setup.begin(parse(DistillConfig, argv, text), STAGE)
    trainer = setup.train(run, ChatEncoder, make_loss=lambda *parts: make_loss(run, *parts))
    then = f"Next: minimind-fast chat {run.weights}   or: {command('reason')} --from_weight distill"
    setup.report(trainer, QUESTIONS, then)


if __name__ == "__main__":
    setup.start(main)
