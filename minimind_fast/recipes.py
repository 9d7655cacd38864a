"""Recipes: sets of option values by name, for `--recipe NAME`. One table.

Purpose: who wants to train as somebody else does, gives one option instead of ten.
Principle: a recipe is a dict of option -> value. A stage takes the values of the options that it has; an option that is
    given beside the recipe wins, and a recipe wins over what suits the shipped sample. To add one: an entry here and a line
    in docs/*/from_minimind.md.
Properties: plain data. `run.json` and the log name each value that a recipe set. A test holds entries to existing options.

Source: `minimind3`: MiniMind of August 2026, its dataset/lm_dataset.py, trainers, and `generate`'s defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RECIPES: Mapping[str, Mapping[str, Any]] = {
    "minimind3": {
        "beta2": 0.999,
        # chats: sft, lora, distill, dpo
        "system_ratio": 0.2,
        "empty_think_ratio": 0.2,
        "whole_turn": True,
        "lora_targets": ["square"],
        # distill: the experts' balancing loss is part of what alpha weighs
        "alpha_weighs_aux": True,
        # grpo
        "grpo_loss": "cispo",
        "top_p": 0.85,
        "top_k": 50,
        "logprob_temperature": 1.0,
        "reward": ["length", "thinking", "minimind_repetition"],
    },
}
