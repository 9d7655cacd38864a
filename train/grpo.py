"""GRPO: a MiniMind answers prompts, and learns from which of its own answers were rewarded.

Purpose: `deepspeed train/grpo.py` on MiniMind's rlaif lines, `{"conversations": [...]}` ending in an empty answer; without
    arguments it continues from `train/reason.py`, on arithmetic problems that can be checked.
Principle: the model writes several answers to each prompt; those better than the prompt's average become likelier, the
    others less likely, and a KL term keeps the model near its initial weights. No critic.
Properties: each answer has the same weight, however long. Rollouts and log-probabilities share one temperature unless told
    otherwise (--logprob_temperature). The rewards are in `minimind_fast/rl/rewards.py`, or yours.

Source: Shao et al., DeepSeekMath, 2024; MiniMind's train_grpo for defaults.
"""

from typing import Any

import torch

from minimind_fast.data.chats import PROMPTS
from minimind_fast.data.minimind.variety import Variety
from minimind_fast.errors import UserError
from minimind_fast.infer.sampling import Sampling
from minimind_fast.rl.judge import open_judge
from minimind_fast.rl.rewards import BUILT_IN, Rewards
from minimind_fast.rl.rollout import RolloutBatch, Rollouts, read_prompts
from minimind_fast.training import losses, ranks, setup
from minimind_fast.training.cli import parse
from minimind_fast.training.config import TrainConfig, option, with_defaults
from minimind_fast.training.log import draw_loss
from minimind_fast.training.losses import StepLoss
from minimind_fast.training.run import Stage
from minimind_fast.training.trainer import Hooks
from minimind_fast.weights.frozen import frozen

STAGE = Stage(
    "grpo",
    sample="grpo.jsonl",
    suits=dict(
        batch_size=8,
        num_generations=8,
        max_gen_len=64,
        reward=["correct", "tagged"],  # a model this small learns the format first
        thinking_ratio=1.0,
        beta=0.02,
        learning_rate=1.5e-4,
        lr_schedule="constant",
        warmup_steps=5,
        epochs=5,
        max_minutes=1.5,
    ),
    needs={"from_weight": "reason"},
)
QUESTIONS = ["What is 2 + 3?", "7加2等于多少？"]


@with_defaults(
    from_weight="reason",
    learning_rate=3e-7,
    batch_size=2,
    accumulation_steps=1,
    max_seq_len=768,
    epochs=1,
    log_interval=5,
)
class GRPOConfig(TrainConfig):
    """MiniMind's defaults of this stage; batch_size counts prompts, max_seq_len the tokens of a prompt."""

    num_generations: int = option(6, "answers to each prompt")
    max_gen_len: int = option(1024, "longest answer in tokens")
    temperature: float = option(
        0.8, "temperature of the answers and, unless --logprob_temperature, of log-probabilities"
    )
    top_p: float = option(1.0, "answers are drawn from the likeliest tokens with this much probability together")
    top_k: int = option(0, "answers are drawn from this many likeliest tokens (0: from all)")
    logprob_temperature: float = option(0.0, "temperature of all log-probabilities (0: that of the answers)")
    system_ratio: float = option(0.0, "share of the prompts without a system prompt that get one of MiniMind's ten")
    thinking_ratio: float = option(0.9, "share of the prompts that open a thought")
    reward: list[str] = option(
        ["length", "thinking", "repetition"],
        f"rewards to add up: {', '.join(BUILT_IN)}, MODULE:FUNCTION or FILE.py:FUNCTION, each with *WEIGHT if not 1",
    )
    reward_model_path: str = option("", "folder of a reward model or a language model whose score is added")
    trust_remote_code: bool = option(False, "run the Python code that a reward model's folder brings")
    grpo_loss: str = option("grpo", "clipped ratio, or clipped weight", choices=("grpo", "cispo"))
    epsilon: float = option(0.2, "GRPO: the ratio is clipped to 1 -+ this")
    epsilon_high: float = option(5.0, "CISPO: largest weight")
    beta: float = option(0.1, "weight of the KL divergence to the weights at the start (0: none, and no reference)")
    updates_per_rollout: int = option(1, "optimizer steps on the same answers")

    def check(self) -> None:
        """Reject invalid values."""
        super().check()
        for name, least in (("num_generations", 2), ("max_gen_len", 1), ("updates_per_rollout", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} must be at least {least}, not {getattr(self, name)}")
        if self.temperature <= 0:
            raise UserError(f"--temperature must be above 0, not {self.temperature}: equal answers teach nothing")
        if self.logprob_temperature < 0 or not 0 <= self.system_ratio <= 1:
            raise UserError("--logprob_temperature must not be negative, and --system_ratio in [0, 1]")
        if not 0 < self.top_p <= 1 or self.top_k < 0:
            raise UserError(f"--top_p must be in (0, 1] and --top_k at least 0, not {self.top_p} and {self.top_k}")
        if self.dropout or not self.packing or self.val_data_path or self.loss:
            raise UserError(
                "GRPO has no --dropout (the ratio compares two passes), --no_packing, --val_data_path or --loss"
            )


def policy_loss(config: GRPOConfig, data: Rollouts, policy: Any, batch: RolloutBatch) -> StepLoss:
    """The objective, summed over answers; before its first update a policy serves as its own old policy."""
    assert batch.weights is not None and batch.advantages is not None
    logprobs, aux = data.run(policy, batch)
    old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    if config.grpo_loss == "grpo":
        each, clipped = losses.grpo(logprobs, old, batch.advantages, config.epsilon)
    else:
        each, clipped = losses.cispo(logprobs, old, batch.advantages, config.epsilon_high)
    # `full` fills on the device; `tensor` would copy from the host and wait.
    metrics = {name: torch.full((), value, device=each.device) for name, value in batch.stats.items()}
    metrics["clip_fraction"] = (clipped * batch.weights).sum()
    if batch.reference_logprobs is not None:
        kl = losses.k3(logprobs, batch.reference_logprobs)
        metrics["kl"] = (kl * batch.weights).sum()
        each = each + config.beta * kl
    return StepLoss((each * batch.weights).sum(), aux if policy.config.use_moe else None, metrics)


def main(argv: list[str] | None = None) -> None:
    text = "Let a MiniMind learn from rewards, on {'conversations': [...]} prompts."
    run = setup.begin(parse(GRPOConfig, argv, text), STAGE)
    config, device = run.config, ranks.device()
    tokenizer = setup.load_tokenizer(config)
    model = setup.load_model(config, tokenizer)
    longest = config.max_seq_len + config.max_gen_len
    model.config.check_context(longest, "--max_seq_len and --max_gen_len: together")
    reference = frozen(model, device, run.dtype) if config.beta else None
    judge = None
    if config.reward_model_path:
        judge = open_judge(config.reward_model_path, device, run.dtype, config.trust_remote_code)
    rewards = Rewards(config.reward, judge)
    how = (config.on_bad_line, ranks.say, config.data_format, rewards.check_row)
    data = Rollouts(
        read_prompts(
            config.data_path, tokenizer, config.max_seq_len, *how, Variety(config.system_ratio, seed=config.seed)
        ),
        tokenizer,
        rewards,
        reference,
        *ranks.world(),
        batch_size=config.batch_size,
        generations=config.num_generations,
        max_new_tokens=config.max_gen_len,
        seed=config.seed,
        sampling=Sampling(config.temperature, config.top_p, config.top_k),
        logprob_temperature=config.logprob_temperature,
        thinking_ratio=config.thinking_ratio,
        accumulation_steps=config.accumulation_steps,
        updates=config.updates_per_rollout,
    )

    def loss(policy: Any, batch: Any) -> StepLoss:
        return policy_loss(config, data, policy, batch)

    hooks = Hooks(count=lambda batch: batch.num_docs)
    trainer = setup.make_trainer(run, model, tokenizer, data.written_by, loss, hooks)
    trainer.run()
    if trainer.rank == 0:
        curves = {"reward": "reward", **{f"reward_{name}": name for name in data.rewards.names}}
        draw_loss(run.folder / "log.jsonl", run.folder / "reward.png", "grpo", curves, "mean over the answers")
    then = f"Rewards: {run.folder / 'reward.png'}.   Next: minimind-fast chat {run.weights} --thinking"
    setup.report(trainer, QUESTIONS, then, PROMPTS[1])


if __name__ == "__main__":
    setup.start(main)
