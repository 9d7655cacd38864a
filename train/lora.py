"""LoRA: small adapters learn something new beside a frozen MiniMind, such as who it is.

Purpose: `deepspeed train/lora.py` after `train/sft.py`; without arguments it teaches that run's model an identity, from the
    sample that ships with the package.
Principle: SFT's loss; only the adapters have gradients and optimizer state (`minimind_fast/weights/lora.py`).
Properties: writes adapters to SAVE_DIR/SAVE_WEIGHT/adapter/ in PEFT's format and, unless --no_merge is given, a merged
    model to SAVE_DIR/SAVE_WEIGHT/weights/ at the end. The base is never modified.
"""

from minimind_fast.data.chats import ChatEncoder
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.errors import UserError
from minimind_fast.training import setup
from minimind_fast.training.cli import parse
from minimind_fast.training.config import ChatConfig, option, with_defaults
from minimind_fast.training.run import Run, Stage
from minimind_fast.weights import lora
from minimind_fast.weights.checkpoint import save_pretrained

STAGE = Stage(
    "lora",
    sample="lora_identity.jsonl",
    suits=dict(learning_rate=1e-2, batch_size=4, max_seq_len=256, epochs=20, max_minutes=1.5),
    needs={"from_weight": "sft"},
)
QUESTIONS = ["Who are you?", "你是谁？", "What is 2 + 3?"]


@with_defaults(
    from_weight="sft",
    learning_rate=1e-4,
    batch_size=32,
    accumulation_steps=1,
    max_seq_len=340,
    epochs=10,
    truncate=True,
)
class LoRAConfig(ChatConfig):
    """MiniMind's defaults of this stage."""

    lora_rank: int = option(16, "rank of the adapters")
    lora_alpha: float | None = option(None, "adapters are scaled by alpha / rank (if not given by 1, as in MiniMind)")
    lora_dropout: float = option(0.0, "dropout of the adapters' input")
    lora_targets: list[str] = option(
        list(lora.ATTENTION),
        f"projections that get adapters: {', '.join(lora.TARGETS)}, or square for MiniMind's choice",
    )
    merge: bool = option(True, "also write the model with its adapters merged, at the end")

    def check(self) -> None:
        super().check()
        if self.optimizer == "muon":
            raise UserError("--optimizer muon trains whole matrices, and LoRA trains adapters: leave it out")


def write_merged(run: Run[LoRAConfig], tokenizer: Tokenizer) -> None:
    """Write base and adapters as one model, in float32: bfloat16 would round small changes away."""
    model = setup.load_model(run.config, tokenizer)
    lora.load_adapters(model, run.folder / "adapter")
    lora.merge(model)
    save_pretrained(model, run.weights, tokenizer=tokenizer)


def main(argv: list[str] | None = None) -> None:
    text = "Train LoRA adapters for a MiniMind on {'conversations': [...]} JSONL."
    run = setup.begin(parse(LoRAConfig, argv, text), STAGE)
    config, adapter = run.config, run.folder / "adapter"
    spec = lora.LoRA(config.lora_rank, config.lora_alpha, config.lora_dropout, tuple(config.lora_targets))
    trainer = setup.train(
        run,
        ChatEncoder,
        adapt=lambda model: lora.apply(model, spec),
        save_weights=lambda model, _: lora.save_adapters(
            lora.adapters(model), spec, adapter, base=config.from_weight, fingerprint=model.base_fingerprint
        ),
    )
    if config.merge and trainer.rank == 0:
        write_merged(run, trainer.tokenizer)
    then = f"The adapters alone are in {adapter}. Next: minimind-fast chat {run.weights}"
    if not config.merge:
        then = f"Next: minimind-fast lora merge {config.from_weight} {adapter} OUT"
    setup.report(trainer, QUESTIONS, then, weights=None if config.merge else adapter)


if __name__ == "__main__":
    setup.start(main)
