"""Reward models: a folder becomes a reward, by our own reader or by Transformers.

Purpose: `open_judge(folder)` for --reward_model_path: internlm2-1_8b-reward as MiniMind uses it, and any model for sequence
    classification with one label.
Principle: what our own reader knows, it reads (`ModelReward`). The rest is Transformers', an optional package. A folder that
    brings code of its own runs it only with --trust_remote_code.
Properties: one answer at a time, so that no padding enters a score; scores are clipped to +-3, as in MiniMind. A judge sees
    the row's messages, without a system prompt added by --system_ratio.

Source: LMForRewardModel in MiniMind's trainer/trainer_utils.py, for what the judge is asked; the model card of
internlm2-1_8b-reward, for get_score.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from minimind_fast.data.rows import read_json
from minimind_fast.errors import UserError
from minimind_fast.rl.rewards import ModelReward, question

LIMIT = 3.0
_HISTORY = "以上是对话历史。我的新问题是：\n"


def open_judge(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> ModelReward | TransformersReward:
    """A model as a reward.

    Args:
        folder: weights, config.json and tokenizer.
        device: device of the weights.
        dtype: dtype of the weights; None: as stored.
        trust_remote_code: run code that lies in the folder.

    Raises:
        UserError: nobody can read the model; says who tried and what to do.
    """
    try:
        return ModelReward(folder, device, dtype)
    except UserError as error:
        if not (Path(folder) / "config.json").is_file():
            raise
        return TransformersReward(folder, device, dtype, trust_remote_code, str(error))


class TransformersReward:
    """Scores answers (after their thoughts) with a model that only Transformers can run.

    A `...ForSequenceClassification` with one label gives its logit of the chat, or of the pair (question, answer) if its
    tokenizer has no chat template. A model with `get_score(tokenizer, messages)`, as internlm2-1_8b-reward, is asked as in
    MiniMind: the history is told in the question.

    Args:
        folder, device, dtype, trust_remote_code: as for `open_judge`.
        before: why our own reader could not read it.

    Raises:
        UserError: Transformers is not installed or cannot load it, it brings code and is not trusted, or it gives no score.
    """

    __name__ = "model"

    def __init__(
        self,
        folder: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
        before: str = "",
    ) -> None:
        where = f"--reward_model_path {folder}"
        try:
            library: Any = importlib.import_module("transformers")
        except ImportError:
            raise UserError(f"{before or where}. Transformers may know it: pip install transformers") from None
        raw = read_json(Path(folder) / "config.json")
        if not isinstance(raw, dict):
            raise UserError(f"{where}: config.json must hold an object")
        if "auto_map" in raw and not trust_remote_code:
            raise UserError(
                f"{where} brings Python code of its own ({', '.join(sorted(p.name for p in Path(folder).glob('*.py')))}): "
                "read it, then add --trust_remote_code"
            )
        classifies = any(str(name).endswith("ForSequenceClassification") for name in raw.get("architectures") or ())
        kind = library.AutoModelForSequenceClassification if classifies else library.AutoModel
        try:
            self.tokenizer = library.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
            model = kind.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except Exception as error:  # Transformers' own kinds, and those of the folder's code
            raise UserError(f"{where}: Transformers {library.__version__} cannot load it: {error}") from None
        labels = getattr(model.config, "num_labels", 1)
        if classifies and labels != 1:
            raise UserError(f"{where} has {labels} labels: a reward model has one")
        if not classifies and not hasattr(model, "get_score"):
            raise UserError(
                f"{where}: {type(model).__name__} gives no score: it is no ...ForSequenceClassification and has no "
                "get_score. Call it from a function of your own: --reward FILE.py:FUNCTION"
            )
        self.model = model.to(device, dtype or model.dtype).eval().requires_grad_(False)
        self.classifies, self.device = classifies, torch.device(device)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], answers: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
        """Return each answer's score."""
        out = []
        for row, answer in zip(rows, answers, strict=True):
            messages = question(row).messages
            said = {"role": "assistant", "content": answer.rpartition("</think>")[2].strip()}
            if self.classifies:
                score = self._classify(messages, said)
            else:
                asked = {"role": "user", "content": told(messages)}
                score = self.model.get_score(self.tokenizer, [asked, said])
            out.append(max(-LIMIT, min(LIMIT, float(score))))
        return out

    def _classify(self, messages: list[dict[str, Any]], said: dict[str, Any]) -> float:
        if getattr(self.tokenizer, "chat_template", None):
            text = self.tokenizer.apply_chat_template([*messages, said], tokenize=False)
            inputs = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        else:
            inputs = self.tokenizer(told(messages), said["content"], return_tensors="pt")
        return self.model(**inputs.to(self.device)).logits.float().item()


def told(messages: Sequence[dict[str, Any]]) -> str:
    """A chat as one question, in MiniMind's words.

    Args:
        messages: up to the answer; the last one asks.
    """
    *earlier, last = messages
    if not earlier:
        return last["content"]
    return "\n".join(f"{m['role']}: {m['content']}" for m in earlier) + f"\n{_HISTORY}{last['content']}"
