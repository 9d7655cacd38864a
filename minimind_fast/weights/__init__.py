"""Weights on disk and in memory: MiniMind's and Hugging Face's formats, LoRA.

May import `model` and `data.tokenizer`; stages and commands call it.
"""
