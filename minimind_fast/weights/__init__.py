"""Weights on disk and in memory: MiniMind's and Hugging Face's formats, LoRA, frozen copies.

May import `model` and `data.tokenizer`; `rl`, `training`, stages and commands call it.
"""
